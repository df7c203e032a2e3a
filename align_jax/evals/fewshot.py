"""Few-shot classification: least squares in closed form on the embeddings of a few images a class.

Source: google-research/big_vision, evaluators/fewshot_lsr.py: features whitened by the shots' mean
and deviation, a constant feature of 100, targets -1 and 1, ridge 2^10, shots drawn by a permutation
of each class. Features here are embeddings of unit norm.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from align_jax.evals.accuracy import score_accuracy
from align_jax.evals.records import Learned

_BIAS = 100.0
_RIDGE = 2.0**10


class FewShot(Learned):
    """Evaluator: accuracy of least squares on a few training images a class.

    Args:
      name: prefix of its metrics.
      source: images that are tested.
      train: images that the shots are drawn from, of the same classes.
      shots: images a class.
      seeds: number of draws, seeded 0, 1, ...

    Raises:
      ValueError: a source cannot be opened, classes differ, an argument is out of range.
    """

    def __init__(
        self,
        name: str,
        source: Any,
        train: Any,
        shots: int | Sequence[int] = (1, 5, 10, 25),
        seeds: int = 3,
    ):
        self.shots = tuple(shots) if isinstance(shots, Sequence) else (shots,)
        if not self.shots or min(self.shots) < 1 or seeds < 1:
            raise ValueError(f"shots={self.shots} and seeds={seeds} must be at least 1.")
        super().__init__(name, source, train)
        self._seeds = seeds

    def __call__(self, model: Any) -> dict[str, float]:
        """Returns `shot<k>`, the mean top-1 of the seeds, `shot<k>_std` and `shot<k>_seed<s>`."""
        train, test, counts = self.embed(model)
        num_classes = counts["num_classes"]
        metrics: dict[str, float] = {}
        for shots in self.shots:
            found = []
            for seed in range(self._seeds):
                rows = draw_shots(train.labels, num_classes, shots, seed)
                scores = least_squares(train.z[rows], train.labels[rows], num_classes, test.z)
                found.append(score_accuracy(scores, test.labels)["top1"])
                metrics[f"shot{shots}_seed{seed}"] = found[-1]
            metrics |= {f"shot{shots}": float(np.mean(found))}
            metrics |= {f"shot{shots}_std": float(np.std(found))}
        return metrics | counts

    def table(self, metrics: Mapping[str, float]) -> list[list[str]]:
        """Returns header and rows of the table of results."""
        header = ["few-shot top-1 [%]", *(f"{k} a class" for k in self.shots), "chance"]
        row = [f"{metrics[f'shot{k}']:.1f} ± {metrics[f'shot{k}_std']:.1f}" for k in self.shots]
        counts = [f"{metrics[key]:,}" for key in ("num_images", "num_skipped")]
        chance = f"{100 / metrics['num_classes']:.1f}"
        return [[*header, "images", "skipped"], [self.name, *row, chance, *counts]]


def draw_shots(labels: np.ndarray, num_classes: int, shots: int, seed: int) -> np.ndarray:
    """Returns rows of at most `shots` images of each class, as big_vision draws them."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(np.flatnonzero(labels == label)) for label in range(num_classes)]
    return np.concatenate([order[:shots] for order in orders])


def least_squares(
    z: np.ndarray, labels: np.ndarray, num_classes: int, z_test: np.ndarray
) -> np.ndarray:
    """Returns class scores [M, C] float64 of test embeddings [M, D].

    Args:
      z: [N, D], the shots.
      labels: [N].
      num_classes: C.
      z_test: [M, D].
    """
    z, z_test = z.astype(np.float64), z_test.astype(np.float64)
    mean, std = z.mean(axis=0), z.std(axis=0) + 1e-5
    x, x_test = (
        np.pad((a - mean) / std, [(0, 0), (0, 1)], constant_values=_BIAS) for a in (z, z_test)
    )
    y = 2.0 * np.eye(num_classes)[labels] - 1.0
    if len(x) >= x.shape[1]:
        weights = np.linalg.solve(x.T @ x + _RIDGE * np.eye(x.shape[1]), x.T @ y)
    else:  # the smaller of two equal forms
        weights = x.T @ np.linalg.solve(x @ x.T + _RIDGE * np.eye(len(x)), y)
    return x_test @ weights
