"""ECCV Caption: retrieval on MSCOCO's test split with all captions and images that people accepted.

Source: Chun et al. 2022 (naver-ai/eccv-caption), whose two JSON files hold the positives by MSCOCO
ids. Each query has R positives among all images or captions of the split. R-Precision is the share
of right ones among the R nearest; mAP@R averages over the first R places the precision so far,
counted as 0 where the item of the place is wrong (Musgrave et al. 2020).
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from align_jax.data.sources.karpathy import open_karpathy
from align_jax.evals.records import count_problems, encode_karpathy
from align_jax.evals.top_k import top_k
from align_jax.storage import identity
from align_jax.storage.problems import Problems
from align_jax.storage.text import read_json

_FILES = {
    "image_to_text": "eccv_image_to_caption.json",
    "text_to_image": "eccv_caption_to_image.json",
}
_KEYS = ("map_at_r", "r_precision", "r1")


class Eccv:
    """Evaluator: mAP@R, R-Precision and R@1 both ways.

    Args:
      name: prefix of its metrics.
      captions: Karpathy's dataset_coco.json.
      images: folders, zips or tars of the images.
      annotations: folder of eccv_image_to_caption.json and eccv_caption_to_image.json.
      split: of the captions.

    Raises:
      ValueError: a file that cannot be read or is of another form.
    """

    def __init__(
        self, name: str, captions: str, images: str, annotations: str, split: str = "test"
    ):
        self.name = name
        self._positives = {
            task: _read_positives(Path(annotations) / file) for task, file in _FILES.items()
        }
        self.source, self._images = open_karpathy(captions, captions, images, split)
        self.problems = self.source.problems

    @cached_property
    def stamps(self) -> dict[str, Any]:
        """What identifies the data."""
        annotations = identity.digest(
            [task, sorted((query, sorted(items)) for query, items in found.items())]
            for task, found in self._positives.items()
        )
        source = identity.stamp(self.source)
        return {"captions": source, "images": "", "annotations": annotations}

    def __call__(self, model: Any) -> dict[str, float]:
        """Returns `<direction>_map_at_r`, `_r_precision`, `_r1` (percent) and `_queries`.

        A query that is not there is left out, and so is a positive; `<direction>_missing` counts
        both.

        Raises:
          ValueError: no image can be read, or no query is there.
        """
        self.problems = Problems()
        self.problems.merge(self.source.problems)
        z_image, z_text, used = encode_karpathy(model, self.source, self._images, self.problems)
        image_rows = {image.cocoid: row for row, image in enumerate(used)}
        sentids = [sentid for image in used for sentid in image.sentids]
        text_rows = {sentid: row for row, sentid in enumerate(sentids)}
        sides = {
            "image_to_text": (z_image, z_text, image_rows, text_rows),
            "text_to_image": (z_text, z_image, text_rows, image_rows),
        }
        metrics: dict[str, float] = {}
        for task, (z_query, z_index, query_rows, index_rows) in sides.items():
            positives, missing = {}, 0
            for query, items in self._positives[task].items():
                rows = {index_rows[item] for item in items if item in index_rows}
                if query in query_rows and rows:
                    positives[query_rows[query]] = rows
                    missing += len(items) - len(rows)
                else:
                    missing += 1
            if not positives:
                raise ValueError(f"{task}: none of the queries of {_FILES[task]} is in the split.")
            found = precision_metrics(z_query, z_index, positives) | {"missing": missing}
            metrics |= {f"{task}_{key}": value for key, value in found.items()}
        counts = {"num_images": len(used), "num_captions": len(z_text)}
        return metrics | counts | count_problems(self.problems)

    def table(self, metrics: Mapping[str, float]) -> list[list[str]]:
        """Returns header and rows of the table of results."""
        names = {"map_at_r": "mAP@R", "r_precision": "R-Precision", "r1": "R@1"}
        header, row = ["ECCV Caption [%]"], [self.name]
        for task, short in (("image_to_text", "I→T"), ("text_to_image", "T→I")):
            header += [f"{short} {names[key]}" for key in _KEYS]
            row += [f"{metrics[f'{task}_{key}']:.1f}" for key in _KEYS]
        row += [f"{metrics[key]:,}" for key in ("num_images", "num_captions", "num_skipped")]
        return [[*header, "images", "captions", "skipped"], row]


def precision_metrics(
    z_query: np.ndarray, z_index: np.ndarray, positives: Mapping[int, set[int]]
) -> dict[str, float]:
    """Returns `map_at_r`, `r_precision`, `r1` in percent, and `queries`; see the top of the file.

    Args:
      z_query: [N, D].
      z_index: [M, D].
      positives: row of z_query -> rows of z_index, at least one.
    """
    queries = np.array(sorted(positives))
    sizes = np.array([len(positives[query]) for query in queries])
    nearest, _ = top_k(z_query[queries], z_index, int(sizes.max()))
    pairs = [query * len(z_index) + item for query in queries for item in positives[query]]
    right = np.isin(queries[:, None] * len(z_index) + nearest, pairs)
    first_r = right & (np.arange(sizes.max()) < sizes[:, None])
    precision = np.cumsum(right, axis=1) / np.arange(1, sizes.max() + 1)
    return {
        "map_at_r": 100 * float(np.mean((precision * first_r).sum(axis=1) / sizes)),
        "r_precision": 100 * float(np.mean(first_r.sum(axis=1) / sizes)),
        "r1": 100 * float(right[:, 0].mean()),
        "queries": len(queries),
    }


def _read_positives(path: Path) -> dict[int, set[int]]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; it is the ground truth of ECCV Caption.")
    content = read_json(path)
    try:
        return {int(query): {int(item) for item in items} for query, items in content.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f"{path} is not the ground truth of ECCV Caption: an object of id -> list of ids."
        ) from None
