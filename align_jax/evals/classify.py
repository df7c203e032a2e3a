"""Accuracy of a classifier whose head was learned by `align train` (config.task='classify').

Source: Jia et al. 2021, section 5.3: one central crop; top-1 and top-5 for ImageNet. Peers report
the mean per class for Flowers-102 and Oxford Pets, and top-1 for Cars and Food.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from align_jax.data.sources.open_source import open_labelled
from align_jax.evals.accuracy import reported_accuracy, row_of, score_ranks
from align_jax.evals.records import count_problems, encode_labelled
from align_jax.storage import identity
from align_jax.storage.problems import Problems


class Classify:
    """Evaluator: accuracy of a classifier over a labelled source of its classes.

    Args:
      name: prefix of its metrics.
      source: what `open_labelled` takes, or an open labelled source.

    Raises:
      ValueError: the source cannot be opened.
    """

    def __init__(self, name: str, source: Any):
        self.name = name
        self.source = open_labelled(source) if isinstance(source, str) else source
        self.problems = Problems()

    @cached_property
    def stamps(self) -> dict[str, str]:
        """What identifies the data."""
        return {"source": identity.stamp(self.source)}

    def __call__(self, model: Any) -> dict[str, float]:
        """Returns `top1` with its interval, `top5`, `mean_per_class`, `loss` (mean cross-entropy in
        nats), `num_images`, `num_classes` and what was left out.

        Raises:
          ValueError: the model is no classifier, or has other classes; or no image can be read.
        """
        self.check_classes(getattr(model, "classes", None))
        self.problems = Problems()
        found = encode_labelled(_Scores(model), self.source, self.problems)
        counts = {"num_images": len(found.labels), "num_classes": len(model.classes)}
        ranks = score_ranks(found.z, found.labels)
        metrics = reported_accuracy(ranks, found.labels, len(model.classes))
        metrics |= {"loss": cross_entropy(found.z, found.labels)}
        return metrics | counts | count_problems(self.problems)

    def check_classes(self, classes: Sequence[str] | None) -> None:
        """Raises ValueError if a model of these classes, or without a head, cannot be evaluated."""
        if classes is None:
            raise ValueError(
                "the model has no head of classes; train one with config.task='classify', or use "
                "type='zeroshot'."
            )
        if tuple(classes) != tuple(self.source.classes):
            raise ValueError(
                f"the classifier has {len(classes)} classes and source "
                f"{len(self.source.classes)}, or they have other names or another order: "
                f"{', '.join(classes[:3])} ... and {', '.join(self.source.classes[:3])} ..."
            )

    def table(self, metrics: Mapping[str, float]) -> list[list[str]]:
        """Returns header and rows of the table of results."""
        header = ["classifier [%]", "top-1", "top-5", "mean per class", "chance top-1"]
        row = row_of(self.name, metrics | {"num_train": 0}, ("top1", "top5", "mean_per_class"))
        del row[-2]
        return [[*header, "images", "skipped"], row]


def cross_entropy(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean cross-entropy in nats of logits [N, K] and labels [N], in float64."""
    scores = scores.astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    own = np.take_along_axis(scores, labels[:, None], axis=1)[:, 0]
    return float(np.mean(np.log(np.exp(scores).sum(axis=1)) - own))


class _Scores:
    """Gives scores where `encode_labelled` asks for embeddings."""

    def __init__(self, model: Any):
        self._model = model

    def encode_image(self, images: Iterable, *, on_error: str) -> np.ndarray:
        return self._model.class_scores(images, on_error=on_error)
