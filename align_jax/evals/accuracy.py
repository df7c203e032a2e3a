"""Accuracies of class scores, as the evaluators that learn a classifier report them."""

import numpy as np


def score_accuracy(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns percentages: `top1`, `top5` (of more than five classes) and `mean_per_class`.

    Of equal scores that of the lower class comes first. `mean_per_class` is the mean of the top-1
    accuracies of the classes that occur.

    Args:
      scores: [N, C].
      labels: [N] int in 0..C-1.
    """
    num_classes = scores.shape[1]
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = (scores == own) & (np.arange(num_classes) < labels[:, None])
    ranks = (scores > own).sum(axis=1) + before.sum(axis=1)
    metrics = {f"top{k}": 100 * float(np.mean(ranks < k)) for k in (1, 5) if num_classes > k}
    counts = np.bincount(labels, minlength=num_classes)
    hits = np.bincount(labels, weights=ranks == 0, minlength=num_classes)
    occurs = counts > 0
    return metrics | {"mean_per_class": 100 * float(np.mean(hits[occurs] / counts[occurs]))}


def row_of(name: str, metrics: dict[str, float], keys: tuple[str, ...]) -> list[str]:
    """Returns a row of a table: the name, percentages, chance of top-1, and the counts."""
    row = [name, *(f"{metrics[key]:.1f}" if key in metrics else "-" for key in keys)]
    row.append(f"{100 / metrics['num_classes']:.1f}")
    return row + [f"{metrics[key]:,}" for key in ("num_images", "num_train", "num_skipped")]
