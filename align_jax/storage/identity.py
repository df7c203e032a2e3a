"""What a thing was made from: one stamp of a source, free of the path, for every verb.

Equal data have one stamp wherever they lie and whenever they were copied: sizes and contents
count, folders and times do not. Tables, whose rows are read anyway, count whole; of archives,
shards and pictures, which may be terabytes, their index, sizes and evenly spaced blocks do.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

_BLOCK = 1 << 14  # bytes
_BLOCKS = 16  # of a file, at most; smaller files are read whole
_FILES = 1 << 13  # of which blocks are read; of more, evenly spaced ones
_ALL_BLOCKS = 1 << 15

_Path = str | os.PathLike


def stamp(source: Any) -> str:
    """Returns 32 hex digits that identify the data of a source, and the order of its records.

    The source answers by `stamp()`, which knows its files. One without is known by its class and
    what it says of itself.

    Args:
      source: pairs or labelled images, see data.sources.open_source.
    """
    if hasattr(source, "stamp"):
        return source.stamp()
    return digest([type(source).__name__, source.describe(), len(source)])


def digest(parts: Iterable[Any]) -> str:
    """Returns 32 hex digits of plain values: strings, numbers, None, and tuples or lists of them.

    Args:
      parts: any number of values; their order counts.
    """
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        # Lists come back as tuples from some stores: they are the same here.
        text = repr(_plain(part)).encode("utf-8", "backslashreplace")
        state.update(b"%d:" % len(text) + text)
    return state.hexdigest()


def of_files(paths: Iterable[_Path]) -> str:
    """Returns 32 hex digits of the sizes of files and of blocks of their contents, in order.

    Of each of at most 8,192 files (evenly spaced, where there are more) first and last 16 KiB and
    up to 14 blocks between them are read: files up to 256 KiB whole.

    Args:
      paths: existing files; a missing one counts as such.
    """
    paths = [os.fspath(path) for path in paths]
    every = max(1, -(-len(paths) // _FILES))
    blocks = min(_BLOCKS, max(2, _ALL_BLOCKS // max(1, len(paths))))
    return digest(
        (_size(path), _read_blocks(path, blocks) if number % every == 0 else None)
        for number, path in enumerate(paths)
    )


def of_content(path: _Path) -> str:
    """Returns 32 hex digits of all bytes of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def of_code(*modules: ModuleType) -> str:
    """Returns 32 hex digits of the source of modules, for results that depend on their code.

    Args:
      modules: of a package, its folder without sub-folders counts.
    """
    files = []
    for module in modules:
        file = Path(module.__file__)
        files += sorted(file.parent.glob("*.py")) if hasattr(module, "__path__") else [file]
    return digest((file.name, of_content(file)) for file in files)


def _plain(value: Any) -> Any:
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _size(path: str) -> int | None:
    try:
        return os.path.getsize(path)
    except OSError:
        return None


def _read_blocks(path: str, blocks: int) -> str | None:
    state = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size <= blocks * _BLOCK:
                state.update(file.read())
            else:
                for number in range(blocks):
                    file.seek((size - _BLOCK) * number // (blocks - 1))
                    state.update(file.read(_BLOCK))
    except OSError:
        return None
    return state.hexdigest()
