"""Rank correlation of similarities with human scores: of all pairs, and by sampled bootstrap.

Source: Parekh et al. 2021 (Crisscrossed Captions), which reports the sampled form because few of
all pairs are rated and some items have many more rated partners than others. The two forms differ
by 7 to 11 points on the same scores, so their results never share a key.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from scipy.stats import rankdata


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the rank correlation in percent, -100 to 100; equal values share the mean rank.

    0 where all values of one side are equal: such a model says nothing of the scores.

    Args:
      x: [N] numbers.
      y: [N] numbers.

    Raises:
      ValueError: lengths differ, fewer than two pairs, or a number is not finite.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 1 or x.shape != y.shape or len(x) < 2:
        raise ValueError(
            f"Correlation needs two lists of the same two or more; got {x.shape} and {y.shape}."
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("A score or a similarity is not finite.")
    x, y = (ranks - ranks.mean() for ranks in (rankdata(x), rankdata(y)))
    norm = np.sqrt((x @ x) * (y @ y))
    return 100 * float(x @ y / norm) if norm else 0.0


def sampled_spearman(
    scores: np.ndarray,
    similarities: np.ndarray,
    queries: Sequence[Hashable],
    *,
    rounds: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns mean and standard deviation of `rounds` rank correlations, in percent.

    Each is over half of the queries, drawn without replacement, and for each of them one of its
    rated pairs, each with the same probability.

    Args:
      scores: [N] of people.
      similarities: [N] of the model.
      queries: N, the item of each pair that counts as its query.
      rounds: of the bootstrap, at least 1.
      seed: of the draws.

    Raises:
      ValueError: see `spearman`; fewer than four queries; or no round.
    """
    scores, similarities = np.asarray(scores), np.asarray(similarities)
    if not len(scores) == len(similarities) == len(queries):
        raise ValueError(
            f"Got {len(scores)} scores, {len(similarities)} similarities, {len(queries)} queries."
        )
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1.")
    numbers: dict[Hashable, int] = {}
    group = np.array([numbers.setdefault(query, len(numbers)) for query in queries], np.int64)
    if len(numbers) < 4:
        raise ValueError(f"The bootstrap needs four queries; got {len(numbers)}.")
    order = np.argsort(group, kind="stable")
    counts = np.bincount(group)
    starts = np.cumsum(counts) - counts
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(rounds):
        drawn = rng.permutation(len(counts))[: len(counts) // 2]
        rows = order[starts[drawn] + rng.integers(counts[drawn])]
        found.append(spearman(scores[rows], similarities[rows]))
    return float(np.mean(found)), float(np.std(found))
