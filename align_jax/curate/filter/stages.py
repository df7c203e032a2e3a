"""The stages of `align curate` between reading and writing: which rows each rule drops.

Each stage is complete or absent: what is known after it is in one file of reasons, from which a
killed run goes on.
"""

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa

from align_jax.curate import workers
from align_jax.curate.filter import engines, part_work
from align_jax.curate.filter import plan as plan_lib
from align_jax.curate.filter import rules as rules_lib
from align_jax.curate.filter.plan import KEPT, Part, Plan, Request
from align_jax.curate.filter.rule import Options, Rule
from align_jax.run.progress import show_progress
from align_jax.storage import writing

NOTES_FILE = "notes.json"
_REASONS = "reasons.npz"
_ROWS_A_WORKER = 100_000  # fewer are done before another process has started


@dataclasses.dataclass(frozen=True)
class Crew:
    """Who works on parts, and where.

    Attributes:
      request: of the plan.
      stages: folder.
      engine: opened; its executors work where it has some.
      pool: of processes, where they do not.
      beam: options of a pipeline that works in place of processes.
    """

    request: Request
    stages: Path
    engine: engines.Engine
    pool: workers.Pool
    beam: str | None

    def work(
        self,
        function: workers.Work,
        units: Sequence[Any],
        settings: Any,
        what: str,
        most: int | None = None,
    ) -> None:
        """Does the work of all units, here if it is too little for `most` processes.

        By default `most` follows from the number of rows.
        """
        total = sum(unit.expected for unit in units)
        most = total // _ROWS_A_WORKER if most is None else most
        done = workers.run(
            function,
            units,
            settings,
            num_workers=self.pool.size if most > 1 else 1,
            beam=self.beam,
            pool=self.pool,
            spark=self.engine.spark,
        )
        for _ in show_progress(done, total, f"curate: {what}", "row", size=int):
            pass


def apply(
    plan: Plan, parts: list[Part], crew: Crew, engine_name: str, options: Options
) -> np.ndarray:
    """Returns the code of each row's first reason, uint8 [rows], KEPT if none.

    Goes on after the last stage.
    """
    path = crew.stages / _REASONS
    reasons, done = np.full(sum(part.expected for part in parts), KEPT, np.uint8), []
    if path.exists():
        with np.load(path) as file:
            reasons, done = file["reasons"], file["done"].tolist()
    applied = plan.applied()
    raw = [rule for rule in applied if rule.drop and not rule.survivors]
    after = [rule for rule in applied if rule.survivors]
    todo = [("single rows", None), *((r.name, r) for r in raw), *((r.name, r) for r in after)]
    todo = [(name, rule) for name, rule in todo if name not in done]
    if not todo:
        return reasons
    engine, rows = crew.engine, plan_lib.Rows(parts)
    table = engine.read(str(crew.stages / "table"))
    if plan.has_image:
        table = rules_lib.identify_images(table)
    for name, rule in todo:
        start = time.monotonic()
        try:
            if rule is None:
                _single_rows(plan, table, engine, reasons, rows)
            elif rule.choose:
                _choose(plan, rule, parts, crew, reasons, options)
            else:
                _group_rule(plan, rule, table, engine, reasons, rows)
        except (ValueError, RuntimeError, OSError):
            raise
        except Exception as error:  # each engine has classes of its own
            text = str(error).strip().partition("\n")[0]
            raise RuntimeError(f"{engine_name} failed at {name}: {text}") from error
        engine.release()
        done.append(name)
        writing.write_json(crew.stages / NOTES_FILE, options.notes)
        _save_reasons(path, reasons, done)
        seconds = time.monotonic() - start
        print(f"curate: {name}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return reasons


def _single_rows(
    plan: Plan,
    table: ir.Table,
    engine: engines.Engine,
    reasons: np.ndarray,
    rows: plan_lib.Rows,
) -> None:
    """Marks in `reasons`, uint8 [rows], what rules about single rows drop."""
    branches = [(table.problem.notnull(), table.problem.cast("int16"))]
    for rule in plan.applied():
        if rule.keep:
            stays = rule.keep(table).fill_null(False)
            branches.append((~stays, ibis.literal(plan.first_code[rule.name], "int16")))
    code = ibis.cases(*branches, else_=ibis.null("int16"))
    found = table.select("row", code=code)
    for batch in engine.batches(found.filter(found.code.notnull())):
        _drop(reasons, rows, batch["row"], batch["code"].to_numpy(zero_copy_only=False))


def _group_rule(
    plan: Plan,
    rule: Rule,
    table: ir.Table,
    engine: engines.Engine,
    reasons: np.ndarray,
    rows: plan_lib.Rows,
) -> None:
    """Marks in `reasons`, uint8 [rows], what a rule about groups drops."""
    code = plan.first_code[rule.name]
    if rule.survivors:
        gone = pa.table({"row": rows.rows(np.flatnonzero(reasons < code))})
        table = table.anti_join(engine.upload(gone), "row")
    else:
        table = table.filter(table.problem.isnull())
    going = rule.drop(table, engine)
    if going is not None:
        for batch in engine.batches(going):
            _drop(reasons, rows, batch["row"], code)


def _choose(
    plan: Plan,
    rule: Rule,
    parts: list[Part],
    crew: Crew,
    reasons: np.ndarray,
    options: Options,
) -> None:
    """Marks in `reasons`, uint8 [rows], what a rule that chooses drops."""
    code = plan.first_code[rule.name]
    left = reasons > code + len(rule.reasons) - 1
    folder = options.stage_dir
    writing.write_array(os.path.join(folder, part_work.LEFT_FILE), left)
    settings = part_work.Chosen(crew.request, plan.rules.index(rule), True, folder, options)
    if rule.match:
        crew.work(part_work.choose, parts, settings, f"{rule.name}: match")
    if rule.settle:
        rule.settle(options, len(parts))
    settings = dataclasses.replace(settings, matching=False)
    crew.work(part_work.choose, parts, settings, rule.name)
    found = (np.load(part_work.verdict_path(folder, part)) for part in parts)
    verdict = np.concatenate([np.zeros(0, np.uint8), *found])
    goes = verdict > 0
    reasons[np.flatnonzero(left)[goes]] = code + verdict[goes] - 1
    shutil.rmtree(folder)


def _drop(reasons: np.ndarray, rows: plan_lib.Rows, ids: pa.Array, codes: np.ndarray | int) -> None:
    """Marks rows `ids` [n] in `reasons`, uint8 [all rows], by `codes` [n] or one code."""
    places = rows.places(ids.to_numpy(zero_copy_only=False))
    reasons[places] = np.minimum(reasons[places], np.asarray(codes).astype(np.uint8))


def _save_reasons(path: Path, reasons: np.ndarray, done: list[str]) -> None:
    with writing.replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, reasons=reasons, done=np.array(done, dtype=str))
