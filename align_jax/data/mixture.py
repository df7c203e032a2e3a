"""Several sources in one training set: which record every position of the stream holds.

A position's record follows from (sizes, weights, seed, position) alone, without iterator state.
Each source is shuffled as by Grain (epoch_order.py); its own `MapDataset.mix` rounds the weights
(to hundredths of the smallest) and does not tell how many passes over a source are done, so the few
lines that share out the positions are here. Reading and decoding are not.
"""

import bisect
import itertools
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

import numpy as np
from ml_collections import ConfigDict

from align_jax.data.epoch_order import EpochOrder
from align_jax.data.sources.open_source import PairSource, open_source
from align_jax.data.sources.record import Record
from align_jax.storage import identity
from align_jax.storage.problems import Problems

_MAX_PAIRS = 2**31  # an index goes to the device as int32


def open_sources(config: ConfigDict) -> PairSource:
    """Returns the pairs of `source` or, where that is empty, of `mixture`.

    Args:
      config: group `data`.

    Raises:
      ValueError: see open_source; names the config path.
    """
    if config.source:
        return _open("source", config.source)
    entries = config.mixture.items()
    opened = {name: _open(f"mixture.{name}.source", entry.source) for name, entry in entries}
    return Mixture(opened, {name: entry.get("weight", 1.0) for name, entry in entries})


class Mixture:
    """A PairSource over several: the records of one after those of another, in order of names.

    Attributes:
      sources: name -> PairSource.
      weights: name -> relative number of rows drawn from it.
      problems: those of all sources, the examples with the source's name in front.
    """

    def __init__(self, sources: Mapping[str, PairSource], weights: Mapping[str, float]):
        """Keeps the sources.

        Raises:
          ValueError: no source, a weight that is not positive and finite, or an empty source.
        """
        if not sources:
            raise ValueError("config.data.mixture names no source.")
        for name, source in sources.items():
            if not 0 < weights[name] < math.inf:
                raise ValueError(
                    f"config.data.mixture.{name}.weight={weights[name]} must be positive."
                )
            if len(source) == 0:
                raise ValueError(f"config.data.mixture.{name}: {source.describe()} is empty.")
        self.sources = {name: sources[name] for name in sorted(sources)}
        self.weights = {name: weights[name] for name in self.sources}
        self._ends = list(itertools.accumulate(map(len, self.sources.values())))
        self.problems = Problems()
        for name, source in self.sources.items():
            self.problems.merge(source.problems, name)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        _, source, index = self._find(index)
        return source[index]

    def captions(self, index: int) -> tuple[str, ...]:
        """Returns the captions of a record."""
        _, source, index = self._find(index)
        return source.captions(index)

    def where(self, index: int) -> str:
        """Returns the name of the source and where that has the record."""
        name, source, index = self._find(index)
        return f"{name}: {source.where(index)}"

    def describe(self) -> str:
        """Returns what the sources say of themselves, with name and share of the rows."""
        total = sum(self.weights.values())
        return "; ".join(
            f"{name} ({self.weights[name] / total:.3g} of the rows) {source.describe()}"
            for name, source in self.sources.items()
        )

    def stamp(self) -> str:
        """Returns what identity.stamp does: names, weights and the data of the sources."""
        return identity.digest(
            (name, self.weights[name], identity.stamp(source))
            for name, source in self.sources.items()
        )

    def _find(self, index: int) -> tuple[str, PairSource, int]:
        """Returns (name, source, index in it)."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} pairs.")
        number = bisect.bisect_right(self._ends, index)
        name = list(self.sources)[number]
        source = self.sources[name]
        return name, source, index - (self._ends[number] - len(source))


class Order:
    """An endless random-access sequence: position in the stream -> index of a record.

    Of each source the stream holds its records in epochs, one permutation after another, so that
    every record comes once in each pass over its source. Among the first k positions the number of
    a source's rows is within the number of sources of its exact share of k, for every k.
    """

    def __init__(self, source: PairSource, seed: int):
        """Makes the order of a PairSource, of a Mixture with its weights.

        Raises:
          ValueError: more pairs than an int32 can number.
        """
        if len(source) > _MAX_PAIRS:
            raise ValueError(f"{source.describe()}: at most {_MAX_PAIRS} pairs can be numbered.")
        if isinstance(source, Mixture):
            sizes = [len(part) for part in source.sources.values()]
            # By name, so that a source keeps its order whatever it is mixed with.
            seeds = [_seed(seed, name) for name in source.sources]
            self._weights = _exact(source.weights.values())
        else:
            sizes, seeds, self._weights = [len(source)], [seed], [1]
        self._orders = [EpochOrder(*pair) for pair in zip(sizes, seeds, strict=True)]
        ends = list(itertools.accumulate(sizes))
        self._ranges = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]

    def __getitem__(self, position: int) -> int:
        return int(self.take(np.array([position]))[0])

    def take(self, positions: np.ndarray) -> np.ndarray:
        """Returns the indices, int64 [K], at positions, int64 [K]: much sooner than one by one."""
        if len(self._orders) == 1:
            return self._orders[0].take(positions)
        numbers, places = np.array([self._turn(position) for position in positions.tolist()]).T
        indices = np.empty_like(positions)
        for number, (order, own) in enumerate(zip(self._orders, self._ranges, strict=True)):
            rows = numbers == number
            indices[rows] = own.start + order.take(places[rows])
        return indices

    def peers(self, index: int) -> range:
        """Returns the indices of all records of the source that holds this one."""
        return next(indices for indices in self._ranges if index in indices)

    def _turn(self, position: int) -> tuple[int, int]:
        """Returns (number of a source, place in its order)."""
        before, after = share(self._weights, position), share(self._weights, position + 1)
        number = next(i for i, count in enumerate(before) if count != after[i])
        return number, before[number]


def epochs(source: PairSource, num_rows: int) -> dict[str, float]:
    """Returns how many passes over each source the first rows of the stream make.

    Args:
      source: PairSource; the key of its count is "epochs", of a Mixture's "epochs/<name>".
      num_rows: B times the number of steps done. Replacements of bad records do not count.
    """
    if not isinstance(source, Mixture):
        return {"epochs": num_rows / len(source)}
    counts = share(_exact(source.weights.values()), num_rows)
    return {
        f"epochs/{name}": count / len(part)
        for (name, part), count in zip(source.sources.items(), counts, strict=True)
    }


def share(weights: Sequence[int], num_positions: int) -> list[int]:
    """Returns how many of the first positions belong to each source; they sum to `num_positions`.

    Args:
      weights: positive integers.
      num_positions: not negative, of any size.

    Source: the recurrence of grain.MapDataset.mix, here with exact weights: the first source takes
    its share, rounded up, and the others share the rest.
    """
    counts, rest, remaining = [], num_positions, sum(weights)
    for weight in weights:
        left = rest * (remaining - weight) // remaining
        counts.append(rest - left)
        rest, remaining = left, remaining - weight
    return counts


def _open(path: str, spec: str) -> PairSource:
    try:
        return open_source(spec)
    except ValueError as error:
        raise ValueError(f"config.data.{path}: {error}") from error


def _exact(weights: Iterable[float]) -> list[int]:
    """Returns integers of the same proportions."""
    # 0.7 means seven tenths, not the float next to it.
    fractions = [Fraction(repr(float(weight))) for weight in weights]
    unit = math.lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * unit) for fraction in fractions]


def _seed(seed: int, name: str) -> int:
    return int(np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0])
