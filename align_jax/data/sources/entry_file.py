"""The index of a source with many pairs, in a file: it takes no memory, a pair is one small read.

Files lie in the user's cache folder (XDG_CACHE_HOME, else ~/.cache, else the one for temporary
files). Of archives they are named by paths, sizes and times of all of them, so that an index is
found again, and one of changed archives is not; what was not used for 30 days is removed. They
appear whole or not at all: several processes may make the same one.
"""

import array
import contextlib
import itertools
import json
import os
import struct
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from align_jax import __version__
from align_jax.data import sources as package
from align_jax.data.sources.archives import Member
from align_jax.data.sources.tables import Row
from align_jax.storage import identity, writing
from align_jax.storage.paths import find_paths
from align_jax.storage.problems import Problems, from_json

Entry = tuple[str, Member, Row | Member]  # key, image, captions

_FEW = 10_000  # entries that stay in memory
_AT_ONCE = 4096
_KEPT_DAYS = 30
_SUFFIX = ".entries"
_MAGIC = b"ALIGNIX1"
_FOOTER = struct.Struct("<QQ8s")  # number of entries, bytes of the JSON before, magic


def keep_entries(
    stamp: str | None, build: Callable[[Problems], Iterable[Entry]]
) -> tuple[Sequence[Entry], Problems]:
    """Returns the entries that `build` makes, in a file if they are many, and their problems.

    Args:
      stamp: of all that the entries depend on (`stamp_files`), by which they are found again; None
        for entries that are not kept beyond this process.
      build: makes the entries, and adds to the problems while it does.
    """
    folder = _folder()
    name = stamp or uuid.uuid4().hex
    path = os.path.join(folder, name + _SUFFIX)
    if stamp:
        with contextlib.suppress(OSError, ValueError):
            found = EntryFile(path)
            os.utime(path)
            return found, found.problems
    problems = Problems()
    entries = iter(build(problems))
    few = list(itertools.islice(entries, _FEW))
    if len(few) < _FEW:
        return few, problems
    _remove_old(folder)
    found = _write(path, itertools.chain(few, entries), problems)
    if not stamp:
        found.remove_at_end()
    return found, problems


def stamp_files(what: Sequence[Any], paths: Iterable[str]) -> str | None:
    """Returns 32 hex digits of what is done with some files, and of which and when they were.

    Args:
      what: plain values, see identity.digest.
      paths: files, or patterns of files; None is returned if one is a folder, whose files change
        without it.
    """
    files = [file for path in paths for file in find_paths(path)]
    if any(map(os.path.isdir, files)):
        return None
    facts = [(os.path.abspath(file), os.stat(file)) for file in files]
    places = [(path, stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in facts]
    return identity.digest([__version__, identity.of_code(package), what, places])


class EntryFile(Sequence[Entry]):
    """Entries in a file; can be pickled, and read from any thread or process.

    Attributes:
      problems: those found when the entries were made.
    """

    def __init__(self, path: str):
        """Opens the file; OSError or ValueError if it is not there whole."""
        self._path, self._file = path, None
        size = os.path.getsize(path)
        self._length, json_bytes, magic = _FOOTER.unpack(self._read(size - _FOOTER.size, size))
        if magic != _MAGIC:
            raise ValueError(f"{path} is no index.")
        end = size - _FOOTER.size - json_bytes
        content = json.loads(self._read(end, size - _FOOTER.size))
        self._paths: list[str] = content["paths"]
        self.problems = from_json(content["problems"])
        self._ends = end - 8 * self._length
        (size,) = struct.unpack("<Q", self._read(end - 8, end))
        if size != self._ends:
            raise ValueError(f"{path} is damaged.")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | slice) -> Entry | list[Entry]:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._length)
            return list(self._between(start, stop))[::step] if step > 0 else []
        if not -self._length <= index < self._length:
            raise IndexError(index)
        index %= self._length
        (entry,) = self._between(index, index + 1)
        return entry

    def __iter__(self) -> Iterator[Entry]:
        return self._between(0, self._length)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()

    def remove_at_end(self) -> None:
        """Removes the file when nobody in this process uses it any more."""
        process = os.getpid()
        weakref.finalize(self, _remove, self._path, process)

    def _between(self, start: int, stop: int) -> Iterator[Entry]:
        for first in range(start, stop, _AT_ONCE):
            last = min(first + _AT_ONCE, stop)
            begin = max(first - 1, 0)
            ends = self._read(self._ends + 8 * begin, self._ends + 8 * last)
            ends = [0] * (first == 0) + list(struct.unpack(f"<{last - begin}Q", ends))
            data = self._read(ends[0], ends[-1])
            for low, high in itertools.pairwise(ends):
                yield self._entry(json.loads(data[low - ends[0] : high - ends[0]]))

    def _entry(self, values: list) -> Entry:
        key, image, texts = values
        captions = Row(*texts[:2], *map(tuple, texts[2:])) if texts[0] != 0 else None
        return key, self._member(image), captions or self._member(texts[1:])

    def _member(self, values: list) -> Member:
        place, *others = values
        return Member(self._paths[place] if isinstance(place, int) else place, *others)

    def _read(self, start: int, stop: int) -> bytes:
        if self._file is None:
            self._file = open(self._path, "rb")
        data = os.pread(self._file.fileno(), stop - start, start) if start >= 0 else b""
        if len(data) < stop - start or start < 0:
            raise ValueError(f"{self._path} is cut off.")
        return data


def _write(path: str, entries: Iterable[Entry], problems: Problems) -> EntryFile:
    """Returns the new file, opened before another process can remove it."""
    ends, places = array.array("Q"), {}
    size = 0

    def pack(member: Member) -> list:
        path, *others = member
        if member.kind != "file":
            path = places.setdefault(path, len(places))
        return [path, *others]

    with writing.replacing(path) as temporary:
        with open(temporary, "wb") as file:
            for key, image, texts in entries:
                texts = [0, *pack(texts)] if isinstance(texts, Member) else list(texts)
                size += file.write(json.dumps([key, pack(image), texts]).encode())
                ends.append(size)
            file.write(ends.tobytes())
            content = {"paths": list(places), "problems": problems.to_json()}
            content = json.dumps(content).encode()
            file.write(content)
            file.write(_FOOTER.pack(len(ends), len(content), _MAGIC))
        found = EntryFile(str(temporary))
    found._path = path
    return found


def _folder() -> str:
    """Returns a folder for indexes that can be written."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    own = os.path.join(tempfile.gettempdir(), f"align_jax-{os.getuid()}")
    for folder in (os.path.join(cache, "align_jax"), own):
        folder = os.path.join(folder, "indexes")
        with contextlib.suppress(OSError):
            os.makedirs(folder, mode=0o700, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    raise OSError(f"neither {cache} nor {own} can be written; set XDG_CACHE_HOME.")


def _remove_old(folder: str) -> None:
    before = time.time() - _KEPT_DAYS * 86400
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):  # another process may remove it too
            if entry.stat().st_mtime < before:
                os.unlink(entry.path)


def _remove(path: str, process: int) -> None:
    if os.getpid() == process:
        with contextlib.suppress(OSError):
            os.unlink(path)
