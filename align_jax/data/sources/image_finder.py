"""Which picture of some archives a table's row means, and how archives are told from each other."""

import collections
import os
import posixpath
from collections.abc import Mapping, Sequence

from align_jax.data.sources.archives import Member
from align_jax.storage.problems import Problems


class ImageFinder:
    """Finds a table's image names: in the named archive, or in all of them.

    By the full name; else where the one is the end of the other, in whole parts of the path: of a
    table with bare names, or with folders that the archive does not have.
    """

    def __init__(self, archives: Sequence[tuple[str, Mapping[str, Member]]], problems: Problems):
        self._problems = problems
        self._shards: dict[str, list[tuple[list[str], int]]] = {}
        self._by_name: dict[str, list[tuple[int, Member]]] = {}
        self._by_base_name: dict[str, list[tuple[int, Member]]] = {}
        for place, (path, index) in enumerate(archives):
            path = os.path.abspath(path).replace(os.sep, "/")
            for spelled in {path, posixpath.splitext(path)[0]}:
                parts = spelled.split("/")
                self._shards.setdefault(parts[-1], []).append((parts, place))
            for name, member in index.items():
                self._by_name.setdefault(_normal(name), []).append((place, member))
                self._by_base_name.setdefault(posixpath.basename(name), []).append((place, member))

    def __call__(self, image: str, shard: str) -> tuple[int, Member] | None:
        """Returns the place of the archive and the member, None if there is none or several."""
        place = None
        if shard:
            parts = _normal(shard).split("/")
            places = {
                place for path, place in self._shards.get(parts[-1], ()) if _agree(path, parts)
            }
            if len(places) != 1:
                self._problems.add("shard_ambiguous" if places else "shard_missing", shard)
                return None
            (place,) = places
        name = _normal(image)
        hits = self._in(place, self._by_name.get(name, ()))
        if not hits:
            parts = name.split("/")
            hits = self._in(place, self._by_base_name.get(parts[-1], ()))
            hits = [hit for hit in hits if _agree(parts, _normal(hit[1].name).split("/"))]
        if len(hits) == 1:
            return hits[0]
        self._problems.add("image_ambiguous" if hits else "image_missing", image)
        return None

    @staticmethod
    def _in(place: int | None, hits: Sequence[tuple[int, Member]]) -> Sequence[tuple[int, Member]]:
        return hits if place is None else [hit for hit in hits if hit[0] == place]


def short_names(paths: Sequence[str]) -> list[str]:
    """Returns the end of each path, without suffix, that tells it from the others: `b/00000`."""
    parts = [os.path.abspath(path).split(os.sep) for path in paths]
    names = {}
    for depth in range(1, 1 + max(map(len, parts), default=0)):
        ends = collections.Counter(tuple(part[-depth:]) for part in parts)
        for place, part in enumerate(parts):
            if place not in names and (ends[tuple(part[-depth:])] == 1 or depth >= len(part)):
                names[place] = posixpath.splitext("/".join(part[-depth:]))[0]
    return [printable(names[place]) for place in range(len(paths))]


def printable(name: str) -> str:
    """Returns the name of a file as text that can be written as UTF-8."""
    # Names need not be UTF-8 (tar) nor free of lone surrogates (JSON); keys are written as UTF-8.
    return name.encode("utf-8", "backslashreplace").decode()


def _normal(name: str) -> str:
    """`./a/1.jpg`, `/a//1.jpg` and, where there is no other separator, `a\\1.jpg` as `a/1.jpg`."""
    name = name if "/" in name else name.replace("\\", "/")
    return posixpath.normpath(name).lstrip("/")


def _agree(left: Sequence[str], right: Sequence[str]) -> bool:
    """Whether the shorter path is the end of the longer one."""
    length = min(len(left), len(right))
    return left[-length:] == right[-length:]
