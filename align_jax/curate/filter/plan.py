"""The rules of a preset against the columns of a table: made alike here and in every worker."""

import dataclasses
import functools
import os
from collections.abc import Sequence

import numpy as np

from align_jax.curate.filter import columns as columns_lib
from align_jax.curate.filter import ingest
from align_jax.curate.filter.metadata_table import PROBLEMS
from align_jax.curate.filter.presets import Preset, load_preset
from align_jax.curate.filter.rule import Rule

KEPT = 255


@dataclasses.dataclass(frozen=True)
class Request:
    """What a plan is made of; unlike rules it can be sent to another process.

    Attributes:
      preset: as load_preset takes it, files with their whole path.
      cap: of MetaCLIP in place of the preset's, or None.
      tail: likewise.
      present: canonical columns of the table.
      others: (name, type) of further columns, which are carried along.
    """

    preset: str
    cap: int | None = None
    tail: float | None = None
    present: tuple[str, ...] = ()
    others: tuple[tuple[str, str], ...] = ()


@functools.lru_cache(8)
def make_plan(request: Request) -> "Plan":
    """Returns the plan of a request; ValueError as `load_rules`."""
    preset = load_rules(request.preset, request.cap, request.tail)
    return Plan(preset, request.present, dict(request.others))


def load_rules(name: str, cap: int | None, tail: float | None) -> Preset:
    """Returns a preset with the cap or tail of the command in place of its own.

    Raises:
      ValueError: no such preset, or the numbers are out of range or of no use to it.
    """
    preset = load_preset(name)
    if cap is None and tail is None:
        return preset
    option = f"--cap {cap}" if tail is None else f"--tail {tail}"
    if cap is not None and tail is not None:
        raise ValueError(f"--cap {cap} and --tail {tail} say the same; give one of them.")
    if (cap is not None and cap < 1) or (tail is not None and not 0 < tail <= 1):
        raise ValueError(
            f"{option} is out of range: a cap is 1 or more, a tail above 0, at most 1."
        )
    if not any(rule.remake for rule in preset.rules):
        raise ValueError(f"{option} is of no use to --preset {preset.name}.")
    return preset._replace(
        rules=tuple(r.remake(cap=cap, tail=tail) if r.remake else r for r in preset.rules)
    )


def whole_paths(preset: str) -> str:
    """Returns the name of a preset with the whole paths of files, as other machines find them."""
    parts = [preset] if os.path.isfile(preset) else preset.split("+")
    return "+".join(os.path.abspath(part) if os.path.isfile(part) else part for part in parts)


class Plan:
    """The rules of a preset against the columns of a table.

    Attributes:
      preset: with its rules.
      rules: all rules in order, with those that stand in where a column is missing.
      columns: those of the canonical table, without the counted ones.
      others: {name: type} of further columns, which are carried along.
      reasons: all reasons in order; a code in the array of reasons is an index of it.
      first_code: name of a rule -> code of its first reason.
      missing: name of a rule that is not applied -> why.
      has_image: whether a column says which image a row has.
    """

    def __init__(self, preset: Preset, present: Sequence[str], others: dict[str, str]):
        self.preset, self.others = preset, others
        self.columns = [name for name in columns_lib.COLUMNS if name in present or name == "key"]
        self.has_image = bool({"image_hash", "url", "key"} & set(present))
        self.rules, self.reasons = [], [*PROBLEMS]
        self.first_code, self.missing = {}, {}
        for rule in preset.rules:
            lacks = [name for name in rule.needs if not self._has(name)]
            other = rule.otherwise() if lacks and rule.otherwise else None
            if lacks and not other:
                self.missing[rule.name] = "no column " + ", ".join(
                    "image_hash, url or key" if name == "image" else name for name in lacks
                )
            # Rules that stand in have the reasons of those that they stand for.
            self.rules.append(other or rule)
            self.first_code[rule.name] = len(self.reasons)
            self.reasons += rule.reasons

    def _has(self, name: str) -> bool:
        if name == "image":
            return self.has_image
        return name in self.columns or name in ("words", *ingest.COUNTS)

    def applied(self) -> list[Rule]:
        """Returns the rules that are applied."""
        return [rule for rule in self.rules if rule.name not in self.missing]


@dataclasses.dataclass(frozen=True)
class Part:
    """A canonical part, as a unit of work.

    Attributes:
      number: place among the parts, and among the files that they were made from.
      path: Parquet file.
      first: number of rows in the parts before.
      expected: number of its rows.
    """

    number: int
    path: str
    first: int
    expected: int


class Rows:
    """The places of rows of all parts: `row` of a part says its number and the place in it."""

    def __init__(self, parts: Sequence[Part]):
        self._starts = np.array([part.first for part in parts], np.int64)

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Returns the place of each row among all, int64."""
        return self._starts[rows >> ingest.ROW_BITS] + (rows & ((1 << ingest.ROW_BITS) - 1))

    def rows(self, places: np.ndarray) -> np.ndarray:
        """Returns the column `row` of places, int64."""
        number = np.searchsorted(self._starts, places, side="right") - 1
        return (number.astype(np.int64) << ingest.ROW_BITS) + places - self._starts[number]
