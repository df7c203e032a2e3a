"""Image-text retrieval: recall at k both ways with one or several captions per image.

How ranks are counted, over all devices and in bounded memory, is in ranking.py; drawing the
results is in gallery.py. Source: Jia et al. 2021, section 5.2 (Flickr30K and MSCOCO protocol).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from align_jax.data.images import decode_image
from align_jax.data.sources.open_source import open_source
from align_jax.data.sources.record import is_usable
from align_jax.evals import bootstrap
from align_jax.evals.peers import renamed
from align_jax.evals.ranking import pair_ranks
from align_jax.evals.records import count_problems, encode_records, name_of
from align_jax.evals.top_k import top_k
from align_jax.evals.zeroshot import TIES
from align_jax.storage import identity
from align_jax.storage.problems import Problems, reason_of


def retrieval_ranks(
    z_image: np.ndarray, z_text: np.ndarray, text_to_image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rank (0 is best) of each image's best caption [N] and of each text's image [M].

    The rank of a positive is the number of wrong candidates that score at least as high: a wrong
    candidate with an equal score counts against it, so a model that maps everything to one vector
    scores 0. The other captions of the same image are neither right nor wrong and do not count.
    Ranks are the same on any number of devices and processes, see `ranking.pair_ranks`.

    Args:
      z_image: [N, D] float32, unit norm.
      z_text: [M, D] float32, unit norm.
      text_to_image: [M] int, row of z_image that each text belongs to; every image needs a text.

    Raises:
      ValueError: if shapes disagree, an embedding is not finite, or an image has no text.
    """
    text_to_image = np.asarray(text_to_image)
    _check_embeddings(z_image, z_text, text_to_image)
    return pair_ranks(z_image, z_text, text_to_image)


def retrieval_recalls(
    image_ranks: np.ndarray, text_ranks: np.ndarray, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Returns recalls in percent (0 to 100): `image_to_text_r<k>`, `text_to_image_r<k>`, and more.

    Also `mean_recall` (the mean of them all), `num_images` and `num_captions`. Image to text is a
    hit if any caption of the image is in the top k, text to image if the caption's image is.

    Args:
      image_ranks: [N] and
      text_ranks: [M] from `retrieval_ranks`.
      ks: cut-offs, at least 1.

    Source: Jia et al. 2021, table 4; the several-captions rule is that of Karpathy & Li 2015.
    """
    found = {f"image_to_text_r{k}": 100 * float(np.mean(image_ranks < k)) for k in ks}
    found |= {f"text_to_image_r{k}": 100 * float(np.mean(text_ranks < k)) for k in ks}
    mean_recall = float(np.mean(list(found.values())))
    counts = {"num_images": len(image_ranks), "num_captions": len(text_ranks)}
    return found | {"mean_recall": mean_recall} | counts


def rank_summary(image_ranks: np.ndarray, text_ranks: np.ndarray) -> dict[str, float]:
    """Returns `<direction>_mean_rank` and `<direction>_median_rank`, 1 the best.

    Args:
      image_ranks: [N] and
      text_ranks: [M] from `retrieval_ranks`.
    """
    summary = {}
    for direction, ranks in (("image_to_text", image_ranks), ("text_to_image", text_ranks)):
        summary[f"{direction}_mean_rank"] = 1 + float(np.mean(ranks))
        summary[f"{direction}_median_rank"] = 1 + float(np.median(ranks))
    return summary


def index_ranks(
    z_image: np.ndarray, z_text: np.ndarray, text_to_image: np.ndarray, most: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ranks as `retrieval_ranks` does, of equal scores the lower index first.

    A rank is exact below `most`; what is not among the `most` best has the rank `most`. Own other
    captions are candidates here.
    """
    image_own = np.arange(len(z_image))
    sides = (
        (z_image, z_text, text_to_image, image_own),
        (z_text, z_image, image_own, text_to_image),
    )
    ranks = []
    for z_query, z_index, found_image, own in sides:
        nearest, _ = top_k(z_query, z_index, min(most, len(z_index)))
        is_own = found_image[nearest] == own[:, None]
        ranks.append(np.where(is_own.any(axis=1), is_own.argmax(axis=1), most))
    return ranks[0], ranks[1]


def ndcg_at_10(
    z_query: np.ndarray, z_index: np.ndarray, of_index: np.ndarray, of_query: np.ndarray
) -> float:
    """Returns the mean normalised discounted cumulative gain of the 10 nearest, 0 to 1.

    Items with the group of the query are right; of equal scores the lower index comes first.

    Args:
      z_query: [N, D].
      z_index: [M, D].
      of_index: [M], the group of each item.
      of_query: [N], the group of each query, which has an item.

    Source: Jarvelin & Kekalainen 2002, binary relevance.
    """
    nearest, _ = top_k(z_query, z_index, min(10, len(z_index)))
    discounts = 1 / np.log2(np.arange(2, 2 + nearest.shape[1]))
    gains = (of_index[nearest] == of_query[:, None]) @ discounts
    sizes = np.bincount(of_index, minlength=of_query.max() + 1)[of_query]
    ideal = np.cumsum(discounts)[np.minimum(sizes, len(discounts)) - 1]
    return float(np.mean(gains / ideal))


@dataclasses.dataclass(frozen=True)
class RetrievalEmbeddings:
    """What an evaluation embedded: row i of z_image is record `records[i]` of the source."""

    z_image: np.ndarray  # [N, D] float32
    z_text: np.ndarray  # [M, D] float32
    text_to_image: np.ndarray  # [M] int64, row of z_image
    text_ranks: np.ndarray  # [M] int64, of each text's image; 0 is best
    captions: list[str]  # M
    records: list[int]  # N


class Retrieval:
    """Evaluator: recalls of a model over the pairs of a source.

    Args:
      name: prefix of its metrics.
      source: what `align_jax.data.sources.open_source` takes, or an open source.
      max_pairs: evaluate only the first `max_pairs` records (images with all their captions).
      folds: the images are also cut into so many equal parts in their order, each with its own
        captions, and the mean of the parts' recalls is reported (5 on COCO's test split is "1K").
      ties: "against" the model, see `retrieval_ranks`; or "index", of equal scores that of the
        lower index comes first, as in the peers' code (recalls alone, not the ranks).

    Raises:
      ValueError: if the source cannot be opened or is empty.
    """

    def __init__(
        self,
        name: str,
        source: Any,
        max_pairs: int | None = None,
        folds: int = 0,
        ties: str = "against",
    ):
        self.name = name
        if folds < 0 or ties not in TIES:
            raise ValueError(
                f"folds={folds} must not be negative and ties={ties!r} one of: {', '.join(TIES)}."
            )
        self._folds, self._ties = folds, ties
        self.source = open_source(source) if isinstance(source, str) else source
        if max_pairs is not None and max_pairs < 1:
            raise ValueError(f"max_pairs={max_pairs} of evaluator '{name}' must be at least 1.")
        self._num_records = min(len(self.source), max_pairs or len(self.source))
        if not self._num_records:
            raise ValueError(f"The source of evaluator '{name}' holds no record.")
        self.embeddings: RetrievalEmbeddings | None = None
        self.problems = Problems()

    def __call__(self, model: Any) -> dict[str, float]:
        """Returns the metrics of `retrieval_recalls` and `rank_summary`, 95 % intervals of both
        R@1 (`<metric>_low`, `_high`; images drawn with all their captions), the number of captions
        that are there before, `num_skipped` and `problems/<reason>`. With folds, also
        `<F>_folds/<metric>`, `num_images_a_fold` and `num_images_in_no_fold`.

        `num_skipped` counts all that was meant to be evaluated and is not: what the source misses,
        and what is unreadable, no image, or without a caption. `self.problems` names the first.

        Raises:
          ValueError: if no record can be used.
        """
        self.problems = problems = Problems()
        problems.merge(self.source.problems)
        captions = [self._captions(index) for index in range(self._num_records)]
        captioned = [index for index, texts in enumerate(captions) if texts]
        z_image, is_readable = encode_records(model, self.source, captioned, problems)
        records = [index for index, kept in zip(captioned, is_readable, strict=True) if kept]
        if not records:
            raise ValueError(
                f"None of the {self._num_records} records has both a caption and a readable image: "
                f"{problems}."
            )
        z_image = z_image[is_readable]
        texts = [text for index in records for text in captions[index]]
        z_text = model.encode_text(texts)
        rows = np.repeat(np.arange(len(records)), [len(captions[index]) for index in records])
        image_ranks, text_ranks = retrieval_ranks(z_image, z_text, rows)
        self.embeddings = RetrievalEmbeddings(z_image, z_text, rows, text_ranks, texts, records)
        metrics = rank_summary(image_ranks, text_ranks)
        if self._ties == "index":
            image_ranks, text_ranks = index_ranks(z_image, z_text, rows)
        metrics |= retrieval_recalls(image_ranks, text_ranks)
        metrics |= r1_intervals(image_ranks, text_ranks, rows)
        metrics["num_duplicate_captions"] = len(texts) - len(set(texts))
        if self._folds:
            metrics |= self._fold_means(z_image, z_text, rows)
        return metrics | count_problems(problems)

    def _fold_means(
        self, z_image: np.ndarray, z_text: np.ndarray, rows: np.ndarray
    ) -> dict[str, float]:
        size = len(z_image) // self._folds
        if not size:
            raise ValueError(f"{len(z_image)} images are too few for {self._folds} folds.")
        found: dict[str, list[float]] = {}
        for start in range(0, size * self._folds, size):
            texts = (rows >= start) & (rows < start + size)
            part = z_image[start : start + size], z_text[texts], rows[texts] - start
            ranks = index_ranks(*part) if self._ties == "index" else retrieval_ranks(*part)
            for key, value in retrieval_recalls(*ranks).items():
                found.setdefault(key, []).append(value)
        means = {key: values for key, values in found.items() if not key.startswith("num_")}
        return {f"{self._folds}_folds/{key}": float(np.mean(v)) for key, v in means.items()} | {
            "num_images_a_fold": size,
            "num_images_in_no_fold": len(z_image) - size * self._folds,
        }

    @cached_property
    def stamps(self) -> dict[str, str]:
        """What identifies the data."""
        return {"source": identity.stamp(self.source)}

    def table(self, metrics: Mapping[str, float]) -> list[list[str]]:
        """Returns header and rows of the table of results."""
        ks = (1, 5, 10)
        header = ["retrieval [%]"] + [f"I→T R@{k}" for k in ks] + [f"T→I R@{k}" for k in ks]
        row = [self.name]
        for direction in ("image_to_text", "text_to_image"):
            row += [f"{metrics[f'{direction}_r{k}']:.1f}" for k in ks]
        num_images, num_captions = metrics["num_images"], metrics["num_captions"]
        row += [f"{num_images:,}", f"{num_captions:,}", f"{metrics.get('num_skipped', 0):,}"]
        chances = [chance_recall(k, num_captions / num_images, num_captions) for k in ks]
        chances += [chance_recall(k, 1, num_images) for k in ks]
        chance = ["  chance", *(f"{chance:.1f}" for chance in chances), "", "", ""]
        rows = [row, chance]
        if folds := next((key for key in metrics if key.endswith("_folds/mean_recall")), None):
            name = folds.partition("/")[0]
            keys = [f"{name}/{d}_r{k}" for d in ("image_to_text", "text_to_image") for k in ks]
            left = metrics["num_images_in_no_fold"]
            label = f"  mean of {name.replace('_', ' ')}" + (f", {left} in none" if left else "")
            size = f"{metrics['num_images_a_fold']:,}"
            rows.insert(1, [label, *(f"{metrics[key]:.1f}" for key in keys), size, "", ""])
        return [[*header, "images", "captions", "skipped"], *rows]

    def clip_benchmark(self, metrics: Mapping[str, float]) -> tuple[str, dict[str, float]]:
        """Returns task and metrics of CLIP_benchmark, whose image_retrieval is text to image."""
        names = {f"image_retrieval_recall@{k}": f"text_to_image_r{k}" for k in (1, 5, 10)}
        names |= {f"text_retrieval_recall@{k}": f"image_to_text_r{k}" for k in (1, 5, 10)}
        return "zeroshot_retrieval", renamed(metrics, names)

    def mteb(self, metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Returns the scores of MTEB's tasks of the last call: I2T and T2I, main score nDCG@10.

        `hit_rate_at_<k>` are our recalls, with the evaluator's ties; nDCG goes by index.
        """
        found = self.embeddings
        return mteb_scores(found.z_image, found.z_text, found.text_to_image, metrics)

    def open_clip(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Returns metrics as open_clip's evaluation calls them."""
        line: dict[str, float] = {"num_samples": metrics["num_images"]}
        for task in ("image_to_text", "text_to_image"):
            line |= renamed(metrics, {f"{task}_R@{k}": f"{task}_r{k}" for k in (1, 5, 10)})
            for kind in ("mean_rank", "median_rank"):
                line[f"{task}_{kind}"] = metrics[f"{task}_{kind}"]
        return line

    def write_plots(self, folder: Path) -> None:
        """Draws the gallery of the last call: `gallery_<name>.png`."""
        from align_jax.evals.gallery import retrieval_gallery

        path = folder / f"gallery_{self.name}.png"
        retrieval_gallery(path, self.embeddings, self.load_image)

    def load_image(self, row: int) -> np.ndarray:
        """Returns the image [H, W, 3] uint8 of a row of `self.embeddings.z_image`."""
        return decode_image(self.source[self.embeddings.records[row]].image)

    def _captions(self, index: int) -> list[str]:
        reason = "caption_empty"
        try:
            if usable := [text for text in self.source.captions(index) if is_usable(text)]:
                return usable
        except OSError as error:
            reason = reason_of(error)
        self.problems.add(reason, name_of(self.source, index))
        return []


def r1_intervals(
    image_ranks: np.ndarray, text_ranks: np.ndarray, text_to_image: np.ndarray
) -> dict[str, float]:
    """Returns the 95 % intervals of both R@1 (`<metric>_low`, `_high`).

    Images are drawn again, with all their captions; arguments as `retrieval_ranks` has them.
    """
    hits, counts = np.bincount(text_to_image, text_ranks == 0), np.bincount(text_to_image)
    return {
        **bootstrap.with_interval("image_to_text_r1", image_ranks == 0),
        **bootstrap.with_interval("text_to_image_r1", hits, counts),
    }


def mteb_scores(
    z_image: np.ndarray,
    z_text: np.ndarray,
    text_to_image: np.ndarray,
    metrics: Mapping[str, float],
) -> dict[str, dict[str, float]]:
    """Returns the scores of MTEB's tasks I2T and T2I: the recalls of `metrics`, and nDCG@10."""
    own = np.arange(len(z_image))
    sides = {
        "I2T": ("image_to_text", z_image, z_text, text_to_image, own),
        "T2I": ("text_to_image", z_text, z_image, own, text_to_image),
    }
    tasks = {}
    for suffix, (task, z_query, z_index, of_index, of_query) in sides.items():
        names = {f"hit_rate_at_{k}": f"{task}_r{k}" for k in (1, 5, 10)}
        gain = ndcg_at_10(z_query, z_index, of_index, of_query)
        tasks[suffix] = renamed(metrics, names) | {"ndcg_at_10": gain, "main_score": gain}
    return tasks


def chance_recall(k: int, num_right: float, num_candidates: int) -> float:
    """Returns the percentage of random rankings with a right candidate among the first k."""
    miss = 1.0
    for drawn in range(min(k, num_candidates)):
        miss *= max(0.0, 1 - num_right / (num_candidates - drawn))
    return 100 * (1 - miss)


def _check_embeddings(z_image: np.ndarray, z_text: np.ndarray, text_to_image: np.ndarray) -> None:
    if np.ndim(z_image) != 2 or np.ndim(z_text) != 2 or z_image.shape[1] != z_text.shape[1]:
        raise ValueError(
            f"Embeddings must be [N, D] and [M, D]; got {np.shape(z_image)} for images and "
            f"{np.shape(z_text)} for texts."
        )
    if text_to_image.shape != (len(z_text),) or text_to_image.dtype.kind not in "iu":
        raise ValueError(
            f"text_to_image must be [{len(z_text)}] integers, one for each text; got "
            f"{text_to_image.shape} of {text_to_image.dtype}."
        )
    if text_to_image.size and not 0 <= text_to_image.min() <= text_to_image.max() < len(z_image):
        raise ValueError(f"text_to_image must lie in 0..{len(z_image) - 1}, the rows of z_image.")
    num_captions = np.bincount(text_to_image, minlength=len(z_image))
    if not len(z_image) or not num_captions.all():
        missing = np.flatnonzero(num_captions == 0)
        raise ValueError(f"Every image needs a text; without one: {missing[:5].tolist()} ...")
    for what, z in (("image", z_image), ("text", z_text)):
        bad = np.flatnonzero(~np.isfinite([z.max(axis=1), z.min(axis=1)]).all(axis=0))
        if bad.size:
            raise ValueError(
                f"{bad.size} of {len(z)} {what} vectors are not finite; the first is row {bad[0]}."
            )
