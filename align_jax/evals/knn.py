"""Nearest neighbours among labelled images: recall of the label, and votes.

Sources: R@K is that of Jia et al. 2021, footnote 3 (the true label is among the labels of the K
nearest images: not a vote); votes weighted by exp(cosine / T) are those of Wu et al. 2018.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from align_jax.data.sources.open_source import open_labelled
from align_jax.evals import bootstrap
from align_jax.evals.records import Labelled, count_problems, encode_labelled, open_train
from align_jax.evals.top_k import top_k
from align_jax.storage import identity
from align_jax.storage.problems import Problems

_QUERIES = 1024  # whose neighbours are compared with each other at once


def neighbour_metrics(
    neighbour_labels: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    ks: Sequence[int],
    temperatures: Sequence[float] = (),
) -> dict[str, float]:
    """Returns percentages: `r<k>`, `vote_<k>` and `weighted_vote_<k>_t<temperature>`.

    `r<k>`: the label is among those of the k nearest. `vote_<k>`: it is the most frequent one of
    them; of equally frequent ones that which comes first among the neighbours wins. A weighted vote
    counts each neighbour exp(score / temperature).

    Args:
      neighbour_labels: [N, K] int, nearest first.
      scores: [N, K], the cosines.
      labels: [N] int, the true ones.
      ks: numbers of neighbours, at most K.
      temperatures: of the weighted votes.
    """
    hits: dict[str, int] = {}
    for start in range(0, len(labels), _QUERIES):
        rows = slice(start, start + _QUERIES)
        for key, count in _hits(
            neighbour_labels[rows], scores[rows], labels[rows], ks, temperatures
        ).items():
            hits[key] = hits.get(key, 0) + count
    return {key: 100 * count / len(labels) for key, count in hits.items()}


def _hits(
    neighbour_labels: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    ks: Sequence[int],
    temperatures: Sequence[float],
) -> dict[str, int]:
    hits = {}
    for k in ks:
        near = neighbour_labels[:, :k]
        same = near[:, :, None] == near[:, None, :]  # [N, k, k]
        hits[f"r{k}"] = int((near == labels[:, None]).any(axis=1).sum())
        votes = {f"vote_{k}": same.sum(axis=2)}
        for temperature in temperatures:
            gap = scores[:, :k].astype(np.float64) - scores[:, :1]  # free of overflow
            key = f"weighted_vote_{k}_t{temperature:g}"
            votes[key] = np.einsum("nij,nj->ni", same, np.exp(gap / temperature))
        for key, count in votes.items():
            winner = np.take_along_axis(near, count.argmax(axis=1)[:, None], axis=1)[:, 0]
            hits[key] = int((winner == labels).sum())
    return hits


class Knn:
    """Evaluator: the labels of the training images nearest to each test image.

    Args:
      name: prefix of its metrics.
      train: images that are searched, what `open_labelled` takes; "" searches `source` itself and
        leaves the image itself out.
      source: images that are queries.
      k: numbers of neighbours.
      temperatures: of weighted votes.

    Raises:
      ValueError: a source cannot be opened, classes differ, or an argument is out of range.
    """

    def __init__(
        self,
        name: str,
        source: Any,
        train: Any = "",
        k: int | Sequence[int] = (1, 5, 10, 20),
        temperatures: Sequence[float] = (0.07,),
    ):
        self.name = name
        self.ks = tuple(k) if isinstance(k, Sequence) else (k,)
        self.temperatures = tuple(temperatures)
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"k={self.ks} must be one or more numbers of at least 1.")
        if any(temperature <= 0 for temperature in self.temperatures):
            raise ValueError(f"temperatures={self.temperatures} must be positive.")
        self.source = open_labelled(source) if isinstance(source, str) else source
        self.train = open_train(train, self.source) if train else None
        self.problems = Problems()

    @cached_property
    def stamps(self) -> dict[str, str]:
        """What identifies the data."""
        train = self.source if self.train is None else self.train
        return {"source": identity.stamp(self.source), "train": identity.stamp(train)}

    def __call__(self, model: Any) -> dict[str, float]:
        """Returns the metrics of `neighbour_metrics`, of the smallest k with their interval, and
        `num_images`, `num_train`, `num_classes`.

        Raises:
          ValueError: no image can be read, or fewer than k.
        """
        self.problems = Problems()
        query = encode_labelled(model, self.source, self.problems)
        train, exclude = query, np.arange(len(query.labels))
        if self.train is not None:
            train, exclude = encode_labelled(model, self.train, self.problems), None
        indices, scores = top_k(query.z, train.z, max(self.ks), exclude=exclude)
        metrics = neighbour_metrics(
            train.labels[indices], scores, query.labels, self.ks, self.temperatures
        )
        least = min(self.ks)
        hits = (train.labels[indices[:, :least]] == query.labels[:, None]).any(axis=1)
        metrics |= bootstrap.with_interval(f"r{least}", hits)
        return metrics | {
            "num_images": len(query.labels),
            "num_train": len(train.labels),
            "num_classes": len(self.source.classes),
            "chance_r1": chance(train, query),
            **count_problems(self.problems),
        }

    def table(self, metrics: Mapping[str, float]) -> list[list[str]]:
        """Returns header and rows of the table of results."""
        keys = [f"r{k}" for k in self.ks]
        keys += [key for key in metrics if key.startswith(("vote_", "weighted_vote_"))]
        names = [key.replace("weighted_vote_", "wvote@").replace("vote_", "vote@") for key in keys]
        names = [f"R@{name[1:]}" if name[0] == "r" else name.replace("_t", " T=") for name in names]
        header = ["nearest images [%]", *names, "chance R@1", "images", "searched", "skipped"]
        counts = [f"{metrics[key]:,}" for key in ("num_images", "num_train", "num_skipped")]
        values = [f"{metrics[key]:.1f}" for key in (*keys, "chance_r1")]
        return [header, [self.name, *values, *counts]]


def chance(train: Labelled, query: Labelled) -> float:
    """Returns the percentage of queries whose label a random training image has."""
    num_classes = 1 + max(train.labels.max(), query.labels.max())
    shares = np.bincount(train.labels, minlength=num_classes) / len(train.labels)
    return 100 * float(shares[query.labels].mean())
