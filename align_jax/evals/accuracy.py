"""Accuracies of class scores, as all evaluators of classification report them."""

from collections.abc import Sequence

import numpy as np

from align_jax.evals import bootstrap


def score_accuracy(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns `rank_accuracy` of class scores; of equal scores that of the lower class comes first.

    Args:
      scores: [N, C].
      labels: [N] int in 0..C-1.
    """
    return rank_accuracy(score_ranks(scores, labels), labels, scores.shape[1])


def score_ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the place of each label [N] among the classes, 0 the best, see `score_accuracy`."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = (scores == own) & (np.arange(scores.shape[1]) < labels[:, None])
    return (scores > own).sum(axis=1) + before.sum(axis=1)


def rank_accuracy(
    ranks: np.ndarray, labels: np.ndarray, num_classes: int, ks: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Returns percentages: `top<k>` and `mean_per_class`.

    A `top<k>` above 1 is left out where there are not more than k classes. `mean_per_class` is the
    mean of the top-1 accuracies of the classes that occur.

    Args:
      ranks: [N], of each label among the classes, 0 the best.
      labels: [N] int in 0..C-1.
      num_classes: C.
      ks: cut-offs.
    """
    metrics = {f"top{k}": 100 * float(np.mean(ranks < k)) for k in ks if k == 1 or num_classes > k}
    counts = np.bincount(labels, minlength=num_classes)
    hits = np.bincount(labels, weights=ranks == 0, minlength=num_classes)
    occurs = counts > 0
    return metrics | {"mean_per_class": 100 * float(np.mean(hits[occurs] / counts[occurs]))}


def reported_accuracy(ranks: np.ndarray, labels: np.ndarray, num_classes: int) -> dict[str, float]:
    """Returns `rank_accuracy`, and the 95 % interval of top-1: `top1_low` and `top1_high`."""
    found = rank_accuracy(ranks, labels, num_classes)
    return found | bootstrap.with_interval("top1", ranks == 0)


def row_of(name: str, metrics: dict[str, float], keys: tuple[str, ...]) -> list[str]:
    """Returns a row of a table: the name, percentages, chance of top-1, and the counts."""
    row = [name, *(f"{metrics[key]:.1f}" if key in metrics else "-" for key in keys)]
    row.append(f"{100 / metrics['num_classes']:.1f}")
    return row + [f"{metrics[key]:,}" for key in ("num_images", "num_train", "num_skipped")]
