"""Zero-shot classification where an image has several classes: mean average precision.

Sources: LAION's CLIP_benchmark (VOC 2007 multilabel) for the plain form; Everingham et al. 2010,
section 3.4, for the 11-point form, which the CLIP paper reports of VOC 2007.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from align_jax.data.sources.multilabel_tars import open_multilabel
from align_jax.evals import bootstrap
from align_jax.evals.peers import renamed
from align_jax.evals.records import count_problems, encode_records
from align_jax.evals.templates import SIMPLE, load_templates
from align_jax.evals.zeroshot import class_vectors
from align_jax.storage import identity
from align_jax.storage.problems import Problems


class MultiLabel:
    """Evaluator: mean average precision of the classes, over images with any number of them.

    Args:
      name: prefix of its metrics.
      source: tars of images with multi-hot vectors, see `open_multilabel`.
      templates: see `load_templates`.
      class_names: words for the classes, in label order; the source's own names by default.

    Raises:
      ValueError: a source or templates that cannot be read, or the number of names is wrong.
    """

    def __init__(
        self,
        name: str,
        source: str,
        templates: str | Sequence[str] = SIMPLE,
        class_names: Sequence[str | Sequence[str]] | None = None,
    ):
        self.name = name
        self.source = open_multilabel(source)
        self.templates = load_templates(templates)
        self.class_names = tuple(self.source.classes if class_names is None else class_names)
        if len(self.class_names) != len(self.source.classes):
            raise ValueError(
                f"there are {len(self.class_names)} class_names, and {source} has "
                f"{len(self.source.classes)} classes; give one name for each class."
            )
        self.problems = Problems()

    @cached_property
    def stamps(self) -> dict[str, Any]:
        """What identifies the data, and the words in use."""
        return {
            "source": identity.stamp(self.source),
            "templates": self.templates,
            "class_names": self.class_names,
        }

    def __call__(self, model: Any) -> dict[str, float]:
        """Returns `map` with its interval over images, `map11` and `chance_map` (percent), numbers
        of images, classes and of classes that no image has, which do not count.

        Raises:
          ValueError: no image can be read, or none has a class.
        """
        z_class = class_vectors(model.encode_text, self.class_names, self.templates)
        self.problems = Problems()
        self.problems.merge(self.source.problems)
        z, is_readable = encode_records(model, self.source, range(len(self.source)), self.problems)
        is_right = self.source.labels[is_readable]
        if not is_right.any():
            raise ValueError(f"No image that can be read has a class: {self.problems}.")
        scores = z[is_readable].astype(np.float64) @ z_class.T.astype(np.float64)
        occurs = is_right.any(axis=0)
        found = average_precisions(scores[:, occurs], is_right[:, occurs])
        return {
            **{key: 100 * float(values.mean()) for key, values in found.items()},
            **map_interval(scores[:, occurs], is_right[:, occurs]),
            "chance_map": 100 * float(is_right[:, occurs].mean()),
            "num_images": len(is_right),
            "num_classes": len(self.class_names),
            "num_absent_classes": int((~occurs).sum()),
            **count_problems(self.problems),
        }

    def clip_benchmark(self, metrics: Mapping[str, float]) -> tuple[str, dict[str, float]]:
        """Returns task and metrics of CLIP_benchmark."""
        return "zeroshot_classification", renamed(metrics, {"mean_average_precision": "map"})

    def table(self, metrics: Mapping[str, float]) -> list[list[str]]:
        """Returns header and rows of the table of results."""
        header = ["multilabel zero-shot [%]", "mAP", "11-point mAP", "chance", "classes", "images"]
        row = [self.name, *(f"{metrics[key]:.1f}" for key in ("map", "map11", "chance_map"))]
        row += [f"{metrics[key]:,}" for key in ("num_classes", "num_images", "num_skipped")]
        return [[*header, "skipped"], row]


def average_precisions(scores: np.ndarray, is_right: np.ndarray) -> dict[str, np.ndarray]:
    """Returns `map` and `map11` of each class, [C] from 0 to 1; of equal scores the earlier first.

    `map`: the mean over the right images of the precision at their place. `map11`: the mean over
    the recalls 0, 0.1, ... 1 of the highest precision at that recall or a higher one.

    Args:
      scores: [N, C].
      is_right: [N, C] bool, each class in at least one image.
    """
    order = np.argsort(-scores, axis=0, kind="stable")
    right = np.take_along_axis(is_right, order, axis=0)
    hits, precision = _hits_and_precision(right)
    plain = (precision * right).sum(axis=0) / hits[-1]
    best_from = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    points = []
    for tenths in range(11):
        # In whole numbers: 0.7 times 10 is not 7 in floating point.
        place = (10 * hits >= tenths * hits[-1]).argmax(axis=0)
        points.append(np.take_along_axis(best_from, place[None], axis=0)[0])
    return {"map": plain, "map11": np.mean(points, axis=0)}


def map_interval(scores: np.ndarray, is_right: np.ndarray) -> dict[str, float]:
    """Returns `map_low` and `map_high`: images are drawn again, classes that none of them has do
    not count; arguments of `average_precisions`."""
    order = np.argsort(-scores, axis=0, kind="stable")
    right = np.take_along_axis(is_right, order, axis=0)

    def statistic(rows: np.ndarray) -> float:
        times = np.bincount(rows, minlength=len(scores))
        columns = [np.repeat(r, times[o]) for r, o in zip(right.T, order.T, strict=True)]
        drawn = np.stack(columns, axis=1)
        drawn = drawn[:, drawn.any(axis=0)]
        if not drawn.size:
            return math.nan
        hits, precision = _hits_and_precision(drawn)
        return 100 * float(((precision * drawn).sum(axis=0) / hits[-1]).mean())

    return bootstrap.statistic_interval("map", statistic, len(scores))


def _hits_and_precision(right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns number and share [N, C] of right ones among the first of a ranking, from bool."""
    hits = np.cumsum(right, axis=0)
    return hits, hits / np.arange(1, len(right) + 1)[:, None]
