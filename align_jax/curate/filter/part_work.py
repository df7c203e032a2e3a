"""What `align curate` does part by part, in this process, in others, on Beam or on Spark.

Each function is a workers.Work: the result is a file that appears when it is complete, and depends
on the part and the settings alone.
"""

import dataclasses
import os
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from align_jax.curate.filter import ingest, report
from align_jax.curate.filter.plan import Part, Request, make_plan
from align_jax.curate.filter.rule import Options
from align_jax.storage import writing
from align_jax.storage.text import read_json

LEFT_FILE, REASONS_FILE = "left.npy", "reasons.npy"


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What a rule that chooses needs beside a part.

    Attributes:
      request: makes the plan.
      rule: place of the rule in the plan.
      matching: whether the rule's `match` is done, not its `choose`.
      folder: holds LEFT_FILE, bool [all rows], which of them the rules before have left; receives
        the verdicts.
      options: of the rule.
    """

    request: Request
    rule: int
    matching: bool
    folder: str
    options: Options


@dataclasses.dataclass(frozen=True)
class Reported:
    """What writing results needs beside a part.

    Attributes:
      request: makes the plan.
      num_rows: of all parts.
      folder: holds REASONS_FILE, uint8 [all rows]; receives what was seen.
      out_dir: receives the tables.
    """

    request: Request
    num_rows: int
    folder: str
    out_dir: str


def choose(part: Part, settings: Chosen) -> Iterator[int]:
    """Finds out which rows of a part stay by one rule; yields the number of rows."""
    plan = make_plan(settings.request)
    rule = plan.rules[settings.rule]
    left = _rows_of(os.path.join(settings.folder, LEFT_FILE), part)
    columns = ["key", "text", *(name for name in plan.columns if name == "language")]
    options = dataclasses.replace(settings.options, part=part.number)

    def batches() -> Iterator[pa.RecordBatch]:
        start = 0
        for batch in report.read_parts([part.path], columns):
            yield batch.filter(pa.array(left[start : start + len(batch)]))
            start += len(batch)

    path = verdict_path(settings.folder, part)
    if settings.matching:
        rule.match(batches, options)
    elif not os.path.exists(path):
        verdict = np.concatenate([np.zeros(0, np.uint8), *rule.choose(batches, options)])
        if len(verdict) != left.sum():
            raise RuntimeError(
                f"rule {rule.name} answered for {len(verdict)} of {left.sum()} rows."
            )
        writing.write_array(path, verdict)
    yield part.expected


def verdict_path(folder: str, part: Part) -> str:
    """Returns the path of what `choose` finds: uint8, 0 or 1 + index of a reason, of left rows."""
    return os.path.join(folder, f"verdict-{part.number:05d}.npy")


def write_results(part: Part, settings: Reported) -> Iterator[int]:
    """Writes the kept and the dropped rows of a part and what was seen; yields their number."""
    path = seen_path(settings.folder, part)
    if not os.path.exists(path):
        plan = make_plan(settings.request)
        seen = report.Seen(plan, settings.num_rows)
        reasons = _rows_of(os.path.join(settings.folder, REASONS_FILE), part)
        names = report.part_names(part.number)
        tables = (plan, seen, settings.out_dir, names)
        for _ in report.write_tables([part], reasons, part.first, *tables):
            pass
        writing.write_json(path, seen.to_json(), ensure_ascii=False)
    yield part.expected


def read_seen(part: Part, settings: Reported) -> dict:
    """Returns what `write_results` has seen of a part, see report.Seen.merge."""
    return read_json(seen_path(settings.folder, part))


def seen_path(folder: str, part: Part) -> str:
    """Returns the path of what was seen of a part."""
    return os.path.join(folder, f"seen-{part.number:05d}.json")


@dataclasses.dataclass(frozen=True)
class Files:
    """What reading needs beside a file: see ingest.write_part."""

    folder: str
    base: str
    chosen: tuple[tuple[str, str], ...]
    request: Request


def read_file(file: ingest.File, settings: Files) -> Iterator[int]:
    """Writes the canonical part of a file; yields the number of rows of each batch."""
    yield from ingest.write_part(
        file,
        dict(settings.chosen),
        settings.request.present,
        settings.folder,
        settings.base,
        dict(settings.request.others),
    )


def _rows_of(path: str, part: Part) -> np.ndarray:
    return np.load(path, mmap_mode="r")[part.first : part.first + part.expected]
