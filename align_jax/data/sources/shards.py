"""Pairs in many archives, opened one by one where that is enough, or all together.

`curate/pack/` takes the parts, so that it never holds the index of more than a few archives;
training and evaluation index everything when they first read. img2dataset.py is another kind.
"""

import abc
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from align_jax.data.sources import files
from align_jax.data.sources.record import Record
from align_jax.storage import identity
from align_jax.storage.problems import Problems

_HASHES_AT_ONCE = 2**23  # while equal ones are looked for: 32 bytes each


class Part(Protocol):
    """A share of a source, not yet indexed.

    Attributes:
      path: file or folder.
      num_expected: pairs in it, as far as that is known.
      weights: caption field -> weight, see files.open_samples.
    """

    path: str
    num_expected: int
    weights: Mapping[str, float] | None

    def open(self) -> files.FilePairs:
        """Returns the pairs, with the problems of this part."""


class Shards(abc.ABC):
    """A PairSource of parts.

    Attributes:
      parts: those that can be opened.
      folder_problems: reason -> count, what is known without opening parts.
    """

    parts: Sequence[Part]
    folder_problems: Problems

    def __init__(self):
        self.folder_problems = Problems()
        self._pairs: files.FilePairs | None = None

    @abc.abstractmethod
    def open(self, limit: int | None = None) -> files.FilePairs:
        """Returns the pairs of all parts, or the first `limit` of them, indexed."""

    @property
    def problems(self) -> Problems:
        """Those of the folder and of all parts."""
        return self._all().problems

    def __len__(self) -> int:
        return len(self._all())

    def __getitem__(self, index: int) -> Record:
        """Returns a record with the encoded image; OSError if its bytes cannot be read."""
        return self._all()[index]

    def captions(self, index: int) -> tuple[str, ...]:
        """Returns the captions of a record without reading its image."""
        return self._all().captions(index)

    def where(self, index: int) -> str:
        """Returns the archive that holds a record, and the name in it."""
        return self._all().where(index)

    def stamp(self) -> str:
        """Returns what identity.stamp does; indexes nothing."""
        paths, weights = self._paths_and_weights()
        return identity.digest(
            [
                [os.path.basename(path) for path in paths],
                [sorted((weights or {}).items())],
                [identity.of_files(_files_of(path)) for path in paths if os.path.isdir(path)],
                identity.of_files(path for path in paths if not os.path.isdir(path)),
            ]
        )

    def _paths_and_weights(self) -> tuple[Sequence[str], Mapping[str, float] | None]:
        return [part.path for part in self.parts], self.parts[0].weights

    def _all(self) -> files.FilePairs:
        if self._pairs is None:
            self._pairs = self.open()
        return self._pairs


def _files_of(folder: str) -> list[str]:
    return sorted(entry.path for entry in os.scandir(folder) if entry.is_file())


@dataclasses.dataclass(frozen=True)
class Archive:
    """A tar or zip of samples, not yet indexed.

    Attributes:
      path: of the archive.
      name: what tells it from the others (files.short_names).
      num_expected: pairs in it.
      taken: hashed keys of it that an earlier archive has too, ascending.
      weights: caption field -> weight, see files.open_samples.
    """

    path: str
    name: str
    num_expected: int
    taken: np.ndarray
    weights: Mapping[str, float] | None = None

    def open(self) -> files.FilePairs:
        """Returns the pairs; keys that an earlier archive has get this one's name in front."""
        return files.open_samples(
            self.path, [self.path], None, self.weights, names=[self.name], taken=self.taken
        )


class Archives(Shards):
    """Several archives of samples, see files.open_samples."""

    def __init__(
        self,
        spec: str,
        paths: Sequence[str],
        problems: Problems,
        weights: Mapping[str, float] | None = None,
    ):
        """Keeps the paths of the archives, and the problems of the folder that they are in."""
        super().__init__()
        self.folder_problems = problems
        self._spec, self._paths, self._weights = spec, list(paths), weights

    @functools.cached_property
    def parts(self) -> tuple[Archive, ...]:
        """The archives; all are indexed once to find the keys that they share."""
        hashes = list(files.hash_samples(self._paths, self._weights))
        repeated = find_repeated(hashes.__getitem__, len(hashes))
        return tuple(
            Archive(path, name, len(own), np.sort(own[repeated.get(number, [])]), self._weights)
            for number, (path, name, own) in enumerate(
                zip(self._paths, files.short_names(self._paths), hashes, strict=True)
            )
        )

    def open(self, limit: int | None = None) -> files.FilePairs:
        """Returns the pairs of all archives, or the first `limit` of them, indexed."""
        pairs = files.open_samples(self._spec, self._paths, limit, self._weights)
        pairs.problems.merge(self.folder_problems)
        return pairs

    def _paths_and_weights(self) -> tuple[Sequence[str], Mapping[str, float] | None]:
        return self._paths, self._weights

    def describe(self) -> str:
        """Returns the spec and the number of archives."""
        return f"{self._spec}: {len(self._paths)} archives"


def find_repeated(load: Callable[[int], np.ndarray], count: int) -> dict[int, np.ndarray]:
    """Returns array -> ascending places of its values that occurred before, in it or in an earlier.

    Args:
      load: number of an array -> uint64 values.
      count: of the arrays; they are loaded again for every 8 million values.
    """
    total = sum(len(load(number)) for number in range(count))
    passes = max(1, -(-total // _HASHES_AT_ONCE))
    found = {}
    for remainder in range(passes):
        values, places = [np.zeros(0, np.uint64)], [np.zeros((0, 2), np.uint32)]
        for number in range(count):
            own = load(number)
            rows = np.flatnonzero(own % np.uint64(passes) == remainder)
            values.append(own[rows])
            places.append(np.stack([np.full_like(rows, number), rows], 1).astype(np.uint32))
        values, places = np.concatenate(values), np.concatenate(places)
        order = np.argsort(values, kind="stable")  # of equal ones the first leads
        repeated = order[1:][values[order[1:]] == values[order[:-1]]]
        for number, row in places[repeated].tolist():
            found.setdefault(number, []).append(row)
    return {number: np.sort(rows) for number, rows in found.items()}
