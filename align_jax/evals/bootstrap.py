"""Confidence intervals of means over queries, for protocols that publish none of their own."""

from collections.abc import Callable, Mapping

import numpy as np

ROUNDS = 1000
_NUMBERS = 2**22  # drawn at once


def interval(
    hits: np.ndarray, counts: np.ndarray | None = None, *, rounds: int = ROUNDS, seed: int = 0
) -> tuple[float, float]:
    """Returns the 95 % interval of a percentage: the 2.5th and 97.5th percentile of resamples.

    Units are drawn with replacement, as many as there are. Where a unit stands for several queries,
    as an image for its captions, all of them are drawn together, since they are not independent.

    Args:
      hits: [N], of each unit the number of queries that are right.
      counts: [N], of each unit the number of queries; one each by default.
      rounds: resamples.
      seed: of the draws.

    Source: Efron 1979; the percentile form.
    """
    hits = np.asarray(hits, np.float64)
    counts = np.ones(len(hits)) if counts is None else np.asarray(counts, np.float64)
    rng = np.random.default_rng(seed)
    means = np.empty(rounds)
    step = max(1, _NUMBERS // len(hits))
    for start in range(0, rounds, step):
        drawn = rng.integers(0, len(hits), (min(step, rounds - start), len(hits)))
        means[start : start + step] = hits[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(100 * means, [2.5, 97.5])
    return float(low), float(high)


def statistic_interval(
    key: str,
    statistic: Callable[..., float],
    *sizes: int,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> dict[str, float]:
    """Returns `<key>_low` and `<key>_high` of any statistic of resampled units, see `interval`.

    Args:
      key: of the metric.
      statistic: rows [N] int of the units drawn, an array for each stratum -> its value; NaN
        leaves the round out.
      sizes: number of units of each stratum, of which as many are drawn.
      rounds: resamples.
      seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    found = [statistic(*(rng.integers(0, n, n) for n in sizes)) for _ in range(rounds)]
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return {f"{key}_low": float(low), f"{key}_high": float(high)}


def with_interval(
    key: str, hits: np.ndarray, counts: np.ndarray | None = None
) -> Mapping[str, float]:
    """Returns `<key>_low` and `<key>_high`, see `interval`."""
    low, high = interval(hits, counts)
    return {f"{key}_low": low, f"{key}_high": high}
