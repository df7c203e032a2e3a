"""Finished parts of long work, kept beside its result until that is complete."""

import contextlib
import filecmp
import json
import os
import shutil
from collections.abc import Iterator

from align_jax.storage import writing

_SOURCE_FILE = "source.json"


def folder_of(out: str | os.PathLike) -> str:
    """Returns the folder that holds the parts of a file."""
    out = os.path.realpath(out)
    return os.path.join(os.path.dirname(out), f".{os.path.basename(out)}.parts")


@contextlib.contextmanager
def checked(folder: str, content: dict, work: str) -> Iterator[None]:
    """Context in which parts are written into a folder, after `_check`.

    A failure before the first part leaves nothing behind.
    """
    _check(folder, content, work)
    try:
        yield
    except BaseException:
        if set(os.listdir(folder)) <= {_SOURCE_FILE, writing.LOCK_FILE}:
            os.remove(os.path.join(folder, _SOURCE_FILE))
        raise


@contextlib.contextmanager
def result(folder: str, out: str | os.PathLike) -> Iterator[str]:
    """Yields the path of a file that becomes `out` when it is complete; the parts go then.

    It lies among the parts, so that what a killed run leaves of it goes with them.

    Raises:
      ValueError: `out` exists with other content; it stays.
    """
    path = os.path.join(folder, "result.tmp")
    yield path
    differs = os.path.exists(out) and not filecmp.cmp(path, out, shallow=False)
    if not differs:
        writing.move(path, os.path.realpath(out))
    shutil.rmtree(folder)
    if differs:
        raise ValueError(f"{out} exists with other content; name a new file.")


def is_finished(out: str | os.PathLike, work: str) -> bool:
    """Returns whether the file is there; removes parts that a kill at the very end has left."""
    folder = folder_of(out)
    if os.path.exists(out) and os.path.isdir(folder):
        with writing.locked(folder, work, shown=out):
            shutil.rmtree(folder)
    return os.path.exists(out)


def paths(folder: str, count: int) -> list[str]:
    """Returns the path of each part."""
    return [os.path.join(folder, f"{number:06d}.parquet") for number in range(count)]


def _check(folder: str, content: dict, work: str) -> None:
    """Refuses the parts of other data, options or versions; writes what new ones are made from.

    Args:
      folder: of the parts.
      content: what decides them, as JSON gives it back.
      work: names what is done in messages.

    Raises:
      ValueError: `folder` has parts of something else.
    """
    path = os.path.join(folder, _SOURCE_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            before = json.load(file)
    except (OSError, ValueError):
        before = {}
    if "stamp" not in before:  # nothing says what the parts are of, if there are any
        for name in os.listdir(folder):
            if name != writing.LOCK_FILE:
                os.remove(os.path.join(folder, name))
        writing.write_json(path, content)
    elif before != content:
        changed = [name for name in content if before.get(name) != content[name]]
        raise ValueError(
            f"{folder} holds an unfinished {work} of other input ({', '.join(changed)} changed); "
            "remove that folder or name another --out."
        )
