"""Paths that a user may write as a pattern."""

import glob
import os
from collections.abc import Sequence

from align_jax.storage.writing import check_local

# What `align curate` calls its two results, as tables and as folders of parts.
KEPT_FILE, DROPPED_FILE = "kept.parquet", "dropped.parquet"
KEPT_FOLDER, DROPPED_FOLDER = "kept", "dropped"


def find_paths(pattern: str) -> list[str]:
    """Returns the paths that a path or a glob pattern (with `**`) names, sorted.

    A path that exists is no pattern, nor is the part of one that exists: `set [v2]/*.tar` looks
    into the folder `set [v2]`.

    Raises:
      ValueError: a pattern that finds both what `align curate` kept and what it dropped.
    """
    check_local(pattern, "input")
    if os.path.lexists(pattern):
        return [pattern]
    there, rest = pattern, []
    while there and not os.path.lexists(there):
        parent, name = os.path.split(there)
        if parent == there:
            break
        there = parent
        rest.insert(0, name)
    paths = sorted(glob.glob(os.path.join(glob.escape(there), *rest), recursive=True))
    check_kept_alone(pattern, paths)
    return paths


def check_kept_alone(source: str, paths: Sequence[str]) -> None:
    """Refuses the tables, or the folders of parts, of both results of `align curate`.

    Args:
      source: what the user wrote.
      paths: found by it.

    Raises:
      ValueError: rows that were kept and rows that were dropped are among them.
    """
    places = {*paths, *map(os.path.dirname, paths)}
    for dropped, kept in ((DROPPED_FILE, KEPT_FILE), (DROPPED_FOLDER, KEPT_FOLDER)):
        for place in sorted(place for place in places if os.path.basename(place) == dropped):
            other = os.path.join(os.path.dirname(place), kept)
            if other in places:
                named = other if kept == KEPT_FILE else os.path.join(other, "*.parquet")
                raise ValueError(
                    f"{source} holds what `align curate` kept and what it dropped; name {named}."
                )
