"""What a rule of curation is, and what it may ask for; the rules themselves are in rules.py."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import ibis.expr.types as ir
import numpy as np
import pyarrow as pa

from align_jax.curate.filter.engines import Engine

Batches = Callable[[], Iterator[pa.RecordBatch]]


@dataclasses.dataclass(frozen=True)
class Options:
    """What rules that choose may ask for beside the rows; can be sent to another process.

    Attributes:
      seed: of sampling.
      stage_dir: folder where a rule may keep what it has found.
      metadata: file of MetaCLIP's entries, or folder of such files of languages.
      files: name -> file or folder, of `--file`.
      num_threads: to use in this process.
      part: number of the part whose rows are asked for.
      notes: what rules have to say in the report.
    """

    seed: int
    stage_dir: str
    metadata: str | None = None
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    num_threads: int = 1
    part: int = 0
    notes: dict[str, object] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What stays, and why.

    Attributes:
      name: reason in the table of dropped rows.
      keeps: what stays, in a few words with the threshold.
      source: where rule and threshold come from.
      needs: columns without which the rule is not applied.
      keep: table -> boolean expression, true for rows that stay.
      drop: (table, engine) -> table with the column `row` of rows that go; None if none goes.
      choose: (function that iterates over batches of key, text and language where the table has
        it, of one part; options) -> arrays of 0 for rows that stay and 1 + index of `reasons` for
        rows that go, in the same order. Parts are asked about in any process.
      match: likewise, what is to be found out about each part before; results in files.
      settle: (options, number of parts), called once between the two.
      survivors: `drop` looks at the rows left by the rules before, not at the raw data.
      reasons: names in the table of dropped rows; `name` unless `choose` has several.
      options: names of the verb's options that the rule cannot do without.
      files: names of files or folders of `--file` that it cannot do without.
      remake: makes the rule anew by options of the verb (cap, tail) in place of the preset's.
      otherwise: makes the rule that stands in where a column is missing; None if none can.
    """

    name: str
    keeps: str
    source: str
    needs: tuple[str, ...] = ()
    keep: Callable[[ir.Table], ir.BooleanValue] | None = None
    drop: Callable[[ir.Table, Engine], ir.Table | None] | None = None
    choose: Callable[[Batches, Options], Iterator[np.ndarray]] | None = None
    match: Callable[[Batches, Options], None] | None = None
    settle: Callable[[Options, int], None] | None = None
    survivors: bool = False
    reasons: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    remake: "Callable[..., Rule] | None" = None
    otherwise: Callable[[], "Rule | None"] | None = None

    def __post_init__(self) -> None:
        if not self.reasons:
            object.__setattr__(self, "reasons", (self.name,))
