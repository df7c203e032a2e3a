"""Columns of metadata that `align pack --columns` carries along: address, licence, scores.

Each becomes a feature of the dataset: text, int64 or float32, which is what a TFDS record holds of
numbers. Values come from the table of --keep where it has the column, else from the records.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from align_jax.curate.pack.key_lists import column_kinds
from align_jax.data.sources.open_source import PairSource
from align_jax.storage.text import clean

_TAKEN = ("image", "captions", "caption_columns", "key")
_LOOKED_AT = 100  # records, until each column has had a value
# What stands for a value that is not there.
_MISSING = {"text": "", "int": -1, "float": math.nan}


def choose(names: Sequence[str], keep: Sequence[str], source: PairSource) -> dict[str, str]:
    """Returns name -> kind ("text", "int" or "float") of the columns to write.

    Args:
      names: of the columns.
      keep: files of the table of --keep; none without it.
      source: of the records.

    Raises:
      ValueError: a name that is taken, or that neither the table nor the first records have.
    """
    for name in names:
        if name in _TAKEN:
            raise ValueError(
                f"--columns {name} is taken: a packed dataset has {', '.join(_TAKEN)}."
            )
    known = column_kinds(keep) if keep else {}
    missing = [name for name in names if name not in known]
    seen = _look_at_records(source, missing) if missing else {}
    for name in missing:
        if name not in seen:
            raise ValueError(
                f"--columns {name}: neither the table of --keep nor the source has it; they have "
                f"{', '.join(sorted({*known, *seen} - {*_TAKEN})) or 'none'}."
            )
    return {name: known.get(name) or seen[name] for name in names}


def features(columns: Mapping[str, str]) -> dict[str, Any]:
    """Returns the TFDS features of the columns."""
    made = {"text": tfds.features.Text, "int": lambda: np.int64, "float": lambda: np.float32}
    return {name: made[kind]() for name, kind in columns.items()}


def values(columns: Mapping[str, str], *found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a value for each column: the first that is found, in its kind; -1, NaN or "" else."""
    chosen = {}
    for name, kind in columns.items():
        value = next((place[name] for place in found if place.get(name) is not None), None)
        try:
            if kind == "text":
                chosen[name] = "" if value is None else clean(str(value))
            else:
                chosen[name] = (int if kind == "int" else float)(value)
        except (TypeError, ValueError):
            chosen[name] = _MISSING[kind]
    return chosen


def _look_at_records(source: PairSource, names: Sequence[str]) -> dict[str, str]:
    """Returns name -> kind of all metadata of the first records, until all `names` had a value."""
    kinds = {str: "text", int: "int", float: "float"}
    seen: dict[str, str] = {}
    opened = source.parts[0].open() if hasattr(source, "parts") else source
    for index in range(min(_LOOKED_AT, len(opened))):
        try:
            found = opened[index].metadata
        except OSError:
            continue
        for name, value in found.items():
            seen.setdefault(name, kinds.get(type(value), "text"))
        if set(names) <= seen.keys():
            break
    return seen
