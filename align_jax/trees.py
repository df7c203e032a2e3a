"""Path-named pytrees: names such as `image/stem_conv/kernel`, counts and readable differences."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np


def path_name(path: tuple) -> str:
    """Returns the name of a key path: its parts joined by "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Returns [(name, leaf)] in the order of `jax.tree.leaves`."""
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def nested(named: dict[str, Any]) -> dict[str, Any]:
    """Returns the nested dict whose branches have these names, parts joined by "/"."""
    tree: dict[str, Any] = {}
    for name, value in named.items():
        *path, last = name.split("/")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[last] = value
    return tree


def map_named(fn: Callable[[str, Any], Any], tree: Any) -> Any:
    """Returns the tree with each leaf replaced by `fn(name, leaf)`."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(path_name(path), leaf), tree)


def select(tree: dict, keep: Callable[[str], bool], prefix: str = "") -> dict:
    """Returns the nested dict without the leaves whose names `keep` refuses, nor empty branches."""
    found = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            if branch := select(value, keep, f"{name}/"):
                found[key] = branch
        elif keep(name):
            found[key] = value
    return found


def updated(tree: dict, new: dict) -> dict:
    """Returns the nested dict with the leaves that `new`, a part of it, has replaced."""
    return tree | {
        key: updated(tree[key], value) if isinstance(value, dict) else value
        for key, value in new.items()
    }


def shared(tree: dict, part: dict) -> dict:
    """Returns the nested dict without the leaves that `part`, of names in it, has not."""
    return {
        key: shared(tree[key], value) if isinstance(value, dict) else tree[key]
        for key, value in part.items()
    }


def match_any(patterns: Iterable[str], name: str) -> bool:
    """Returns whether any regular expression matches somewhere in the name."""
    return any(re.search(pattern, name) for pattern in patterns)


def count(tree: Any) -> int:
    """Returns the number of scalars in all leaves (arrays or shapes)."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in jax.tree.leaves(tree))


def describe_difference(expected: Any, found: Any, *, limit: int = 5) -> str:
    """Returns "" if both trees have the same names and shapes, else one line that says how not.

    Args:
      expected: tree of arrays or shapes that the model has.
      found: tree of arrays or shapes that was read, e.g. from a checkpoint.
      limit: names listed of each kind of difference.
    """
    want = {name: tuple(leaf.shape) for name, leaf in named_leaves(expected)}
    have = {name: tuple(leaf.shape) for name, leaf in named_leaves(found)}
    missing = [name for name in want if name not in have]
    extra = [name for name in have if name not in want]
    shapes = [
        f"{name} is {have[name]}, the model expects {want[name]}"
        for name in want
        if name in have and have[name] != want[name]
    ]
    parts = [
        f"{len(items)} {label}: {', '.join(items[:limit])}{', ...' if len(items) > limit else ''}"
        for label, items in (
            ("missing", missing),
            ("unexpected", extra),
            ("of other shape", shapes),
        )
        if items
    ]
    return "; ".join(parts)
