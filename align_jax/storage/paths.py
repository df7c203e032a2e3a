"""Paths that a user may write as a pattern."""

import glob
import os

from align_jax.storage.writing import check_local


def find_paths(pattern: str) -> list[str]:
    """Returns the paths that a path or a glob pattern (with `**`) names, sorted.

    A path that exists is no pattern, nor is the part of one that exists: `set [v2]/*.tar` looks
    into the folder `set [v2]`.
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
    return sorted(glob.glob(os.path.join(glob.escape(there), *rest), recursive=True))
