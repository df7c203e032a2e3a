"""Crisscrossed Captions: retrieval between and inside the modalities, correlation with raters.

Source: Parekh et al. 2021, on the Karpathy splits of MSCOCO. Positives are pairs rated at least a
threshold; an item without a positive is no query, and no item is a candidate of itself. Which side
of a pair is the query of the sampled correlations is not published: both sides for captions (STS)
and images (SIS) and the image for mixed pairs (SITS) give the published deviations.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from align_jax.data.sources.karpathy import open_karpathy
from align_jax.evals.rated_pairs import RatedPairs, read_rated_pairs
from align_jax.evals.records import count_problems, encode_karpathy
from align_jax.evals.similarity import QUERIES, pairs_bootstrap, stamp_of
from align_jax.evals.top_k import top_k
from align_jax.storage import identity
from align_jax.storage.problems import Problems

KINDS = ("sts", "sis", "sits")
TASKS = {
    "image_to_text": "I→T",
    "text_to_image": "T→I",
    "text_to_text": "T→T",
    "image_to_image": "I→I",
}
_KS = (1, 5, 10)


class Cxc:
    """Evaluator: recalls of four tasks and three rank correlations.

    Args:
      name: prefix of its metrics.
      captions: Karpathy's dataset_coco.json.
      images: folders, zips or tars of the images.
      annotations: folder of sts_<split>.csv, sis_<split>.csv and sits_<split>.csv.
      split: test or val.
      sits_threshold: least score of a caption and an image that belong together.
      sts_threshold: the same of two captions.
      sis_threshold: the same of two images.
      co_captions: whether captions of one image belong together too.
      rounds: of the sampled correlations.
      sits_query: whose partners are drawn in SITS: "second" (the image), "first" or "both".
      seed: of the draws.

    Raises:
      ValueError: a file that cannot be read, or an argument out of range.
    """

    def __init__(
        self,
        name: str,
        captions: str,
        images: str,
        annotations: str,
        split: str = "test",
        sits_threshold: float = 3.0,
        sts_threshold: float = 3.0,
        sis_threshold: float = 2.5,
        co_captions: bool = True,
        rounds: int = 1000,
        sits_query: str = "second",
        seed: int = 0,
    ):
        self.name = name
        if rounds < 1:
            raise ValueError(f"rounds={rounds} must be at least 1.")
        if sits_query not in QUERIES:
            known = ", ".join(QUERIES)
            raise ValueError(f"sits_query={sits_query!r} is unknown; use one of: {known}.")
        self._thresholds = {"sts": sts_threshold, "sis": sis_threshold, "sits": sits_threshold}
        self._co_captions, self._rounds, self._seed = co_captions, rounds, seed
        self._sits_query = sits_query
        self._found = Problems()
        self._pairs = {
            kind: read_rated_pairs(str(Path(annotations) / f"{kind}_{split}.csv"), self._found)
            for kind in KINDS
        }
        self.source, self._images = open_karpathy(captions, captions, images, split)
        self._found.merge(self.source.problems)
        self.problems = self._found

    @cached_property
    def stamps(self) -> dict[str, Any]:
        """What identifies the data."""
        return {
            "captions": identity.stamp(self.source),
            "images": "",
            "annotations": {kind: stamp_of(pairs) for kind, pairs in self._pairs.items()},
        }

    def __call__(self, model: Any) -> dict[str, float]:
        """Returns `<task>_r<k>` and `<task>_queries` of TASKS; `sts`, `sis`, `sits` with `_std`,
        `correlation_mean` (x 100), numbers of images, captions and rated pairs.

        Raises:
          ValueError: no image can be read, or a task has no query.
        """
        self.problems = Problems()
        self.problems.merge(self._found)
        z_image, z_text, used = encode_karpathy(model, self.source, self._images, self.problems)
        image_rows = {image.name.rpartition("/")[2]: row for row, image in enumerate(used)}
        sentids = [sentid for image in used for sentid in image.sentids]
        text_rows = {sentid: row for row, sentid in enumerate(sentids)}
        owner = np.repeat(np.arange(len(used)), [len(image.captions) for image in used])
        rows = {kind: _rows_of(pairs, text_rows, image_rows) for kind, pairs in self._pairs.items()}
        metrics = self._recalls(z_image, z_text, rows, owner)
        metrics |= self._correlations(z_image, z_text, rows)
        counts = {"num_images": len(used), "num_captions": len(z_text)}
        return metrics | counts | count_problems(self.problems)

    def table(self, metrics: Mapping[str, float]) -> list[list[str]]:
        """Returns header and rows of the table of results."""
        header = ["CxC [%]", *(f"{short} R@{k}" for short in TASKS.values() for k in (1, 5, 10))]
        row = [self.name, *(f"{metrics[f'{task}_r{k}']:.1f}" for task in TASKS for k in _KS)]
        for kind in KINDS:
            header.append(kind.upper())
            row.append(f"{metrics[kind]:.1f} ± {metrics[f'{kind}_std']:.1f}")
        return [[*header, "skipped"], [*row, f"{metrics['num_skipped']:,}"]]

    def _recalls(
        self,
        z_image: np.ndarray,
        z_text: np.ndarray,
        rows: Mapping[str, "_Rows"],
        owner: np.ndarray,
    ) -> dict[str, float]:
        is_pair = {kind: rows[kind].scores >= self._thresholds[kind] for kind in KINDS}
        sits, sts, sis = (rows[kind].pairs[is_pair[kind]] for kind in ("sits", "sts", "sis"))
        texts = [sts, sts[:, ::-1]]
        if self._co_captions:
            texts.append(co_caption_pairs(owner))
        tasks = {
            "image_to_text": (z_image, z_text, sits[:, ::-1]),
            "text_to_image": (z_text, z_image, sits),
            "text_to_text": (z_text, z_text, np.concatenate(texts)),
            "image_to_image": (z_image, z_image, np.concatenate([sis, sis[:, ::-1]])),
        }
        metrics = {}
        for task, (z_query, z_index, pairs) in tasks.items():
            try:
                found = pair_recalls(z_query, z_index, pairs, _KS, inside=z_query is z_index)
            except ValueError as error:
                raise ValueError(f"{task}: {error}") from error
            metrics |= {f"{task}_{key}": value for key, value in found.items()}
        return metrics

    def _correlations(
        self, z_image: np.ndarray, z_text: np.ndarray, rows: Mapping[str, "_Rows"]
    ) -> dict[str, float]:
        sides = {"sts": (z_text, z_text), "sis": (z_image, z_image), "sits": (z_text, z_image)}
        metrics: dict[str, float] = {}
        for kind, (left, right) in sides.items():
            pairs, scores = rows[kind].pairs, rows[kind].scores
            cosines = np.einsum(
                "nD,nD->n", left[pairs[:, 0]].astype(np.float64), right[pairs[:, 1]]
            )
            # With both sides of SITS as queries, a caption is another item than an image.
            of_left = "caption " if kind == "sits" else ""
            items = [f"{of_left}{row}" for row in pairs[:, 0]], [str(row) for row in pairs[:, 1]]
            query = self._sits_query if kind == "sits" else "both"
            mean, std = pairs_bootstrap(
                RatedPairs(*items, scores, {}), cosines, query, rounds=self._rounds, seed=self._seed
            )
            metrics |= {kind: mean, f"{kind}_std": std, f"{kind}_pairs": len(scores)}
        mean = float(np.mean([metrics[kind] for kind in KINDS]))
        return metrics | {"correlation_mean": mean}


class _Rows:
    """Rated pairs whose items are both there: pairs [N, 2] of rows, scores [N]."""

    def __init__(self, pairs: list[tuple[int, int]], scores: list[float]):
        self.pairs = np.array(pairs, np.int64).reshape(-1, 2)
        self.scores = np.array(scores, np.float64)


def pair_recalls(
    z_query: np.ndarray,
    z_index: np.ndarray,
    pairs: np.ndarray,
    ks: Sequence[int],
    *,
    inside: bool = False,
) -> dict[str, float]:
    """Returns `r<k>`, the percentage of queries with a positive among the k nearest, and `queries`.

    Args:
      z_query: [N, D].
      z_index: [M, D].
      pairs: [P, 2] rows of z_query and z_index that belong together; repeats count once.
      ks: cut-offs; above the number of candidates, all of them are taken.
      inside: whether both sides are one set, in which no item is its own candidate.

    Raises:
      ValueError: no query has a positive, or there is no candidate.
    """
    if inside:
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    queries = np.unique(pairs[:, 0])
    most = min(max(ks), len(z_index) - inside)
    if not len(queries) or most < 1:
        raise ValueError("no rated pair reaches the threshold.")
    nearest, _ = top_k(z_query[queries], z_index, most, exclude=queries if inside else None)
    right = np.isin(queries[:, None] * len(z_index) + nearest, pairs @ [len(z_index), 1])
    metrics = {f"r{k}": 100 * float(right[:, :k].any(axis=1).mean()) for k in ks}
    return metrics | {"queries": len(queries)}


def co_caption_pairs(owner: np.ndarray) -> np.ndarray:
    """Returns [P, 2] rows of captions of one image, both directions; owner: [M], sorted."""
    starts = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
    groups = np.split(np.arange(len(owner)), starts[1:])
    pairs = [(a, b) for group in groups for a in group for b in group if a != b]
    return np.array(pairs, np.int64).reshape(-1, 2)


def _rows_of(
    pairs: RatedPairs, text_rows: Mapping[int, int], image_rows: Mapping[str, int]
) -> _Rows:
    def row(item: str) -> int | None:
        _, is_caption, sentid = item.rpartition(":sentid:")
        if is_caption:
            return text_rows.get(int(sentid)) if sentid.isdecimal() else None
        return image_rows.get(item)

    found = [(row(left), row(right)) for left, right in zip(pairs.left, pairs.right, strict=True)]
    kept = [place for place, sides in enumerate(found) if None not in sides]
    return _Rows([found[place] for place in kept], pairs.scores[kept].tolist())
