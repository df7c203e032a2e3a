"""Packing pairs into a TFDS dataset of ArrayRecord shards, without TensorFlow.

The source is cut into units that any worker can pack alone (pack_unit.py); here they are planned,
run and put together. Encoded images are stored byte for byte; each is decoded once to know that it
can be. The result has random access (global shuffle, exact resume) and opens with
`tfds.builder_from_directory` and with data/sources/open_source.py.
"""

import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from align_jax import __version__
from align_jax.curate import workers
from align_jax.curate.pack import finish as pack_finish
from align_jax.curate.pack import joins, key_lists, metadata
from align_jax.curate.pack import unit as pack_unit
from align_jax.curate.pack.unit import SKIP_REASONS
from align_jax.curate.workers import Unit
from align_jax.data.sources.open_source import PairSource
from align_jax.run.progress import show_progress
from align_jax.storage import identity, writing

__all__ = ["REPORT_FILE", "SKIP_REASONS", "pack"]

REPORT_FILE = pack_finish.REPORT_FILE
_FEWEST_RECORDS, _MOST_RECORDS, _UNITS = 1024, 8192, 64  # of a unit; units to aim at between


class _List(NamedTuple):
    """What `--keep` or `--drop` names, the files there, and what joins them to records."""

    option: str
    path: str
    files: list[str]
    by: str | None


def pack(
    source: PairSource,
    out_dir: str | os.PathLike,
    *,
    split: str = "train",
    shard_bytes: int = 256 * 2**20,
    unit_records: int | None = None,
    num_threads: int = 8,
    num_workers: int = 1,
    beam: str | None = None,
    resize_px: int | Sequence[int] | None = None,
    keep: str | None = None,
    drop: str | Sequence[str] | None = None,
    keep_by: str | None = None,
    drop_by: str | None = None,
    columns: Sequence[str] = (),
) -> dict:
    """Returns the report of writing `source` as one split of the TFDS dataset in `out_dir`.

    Each record has `image` (the encoded bytes as they are; arrays become PNG), `captions` (those
    that are neither blank nor damaged, in order) and `key`. What cannot be used is skipped and
    counted; of records with one key the first usable one is written. The bytes written depend on
    the source and the options that change records or shards, not on workers, threads or restarts.

    The data appears in `out_dir` only when it is complete; a second split is added to the same
    dataset by a second call. Until then finished units wait beside it in `.<name>.<split>.tmp`,
    and the same call after an interruption goes on from there.

    Memory: an img2dataset folder is opened shard by shard, other sources hold their index in this
    process (CC3M: 740 bytes a pair). A worker holds the index of its unit and `num_threads` decoded
    images (of 89 megapixels at most, which is 1 GiB with transparency), the end 256 MiB and 1 KB a
    unit. Keys are compared by 64-bit hashes: a record is taken for a duplicate of another key's
    with probability n / 2^64; expect 0.01 such among 700 million.

    Args:
      source: pairs to write, in their order.
      out_dir: new or empty folder, or one that an earlier call wrote.
      split: letters, digits and underscores; must not exist yet.
      shard_bytes: a shard is closed when it reaches this size, and at the end of its unit.
      unit_records: records packed as one unit; default: a 64th of the source, 1024 to 8192. Each
        shard of an img2dataset folder is a unit.
      num_threads: records read and checked at the same time by all workers; at least 2 in each of
        several.
      num_workers: processes; 1 packs in this one.
      beam: options of an Apache Beam pipeline that packs the units instead, see workers.py.
      resize_px: images whose short side is longer shrink to it, keeping their aspect ratio, and
        become JPEG of quality 95; smaller ones are not touched. Of (width, height) each side that
        is longer shrinks to its number, as training does to the square that it crops from.
      keep: Parquet table, or a folder of parts; records whose key is not in its column `key` are
        skipped. If it has a column `text`, the texts of a key replace the captions of its record.
        Or a subset file of DataComp, see data/sources/subsets.py.
      drop: likewise, one or several; records whose key is in one of them are skipped.
      keep_by: metadata of the records that joins them to `keep` in place of their key: uid, id,
        url (joins.py), compared with the column of that name, or `key` where there is none.
        Records without it are skipped as `join_missing`. Of a subset file `uid` unless given.
      drop_by: likewise of `drop`; records without it stay.
      columns: metadata to write as features of the dataset, from the table of `keep` or from the
        records (Record.metadata); "", -1 or NaN where there is none. See metadata.py.

    Returns:
      What `pack_report.json` holds under `split`: `source`, `records_read`, `records_written`,
      `shards`, `bytes`, `skipped` (reason of SKIP_REASONS -> count), `skipped_keys` (reason ->
      first 20 keys), `source_problems` (reason -> count, what was missing before reading) and
      `problems` (reason -> count and first, of both, without what the lists left out).

    Raises:
      ValueError: the split exists, `out_dir` holds something else or is being written, no record
        is usable, a list without keys or with none in common.
      RuntimeError: a worker died.
    """
    if not re.fullmatch(r"\w+", split, re.ASCII):
        raise ValueError(f"split={split!r} must consist of letters, digits and underscores.")
    sizes = {"workers": num_workers, "shard-size": shard_bytes}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"--{name} {value} must be at least 1.")
    sides = [resize_px] if isinstance(resize_px, int) else list(resize_px or ())
    if not all(side >= 1 for side in sides):
        raise ValueError(f"--resize {'x'.join(map(str, sides))} must be at least 1.")
    lists = []
    for option, given, by in (("keep", keep, keep_by), ("drop", drop, drop_by)):
        paths = [given] if isinstance(given, str) else list(given or ())
        lists += [_List(option, p, key_lists.find_files(p, f"--{option}"), by) for p in paths]
        if by is not None and not paths:
            raise ValueError(f"--{option}-by {by} needs --{option}, the list that it joins.")
    kept_files = [file for one in lists if one.option == "keep" for file in one.files]
    writing.check_local(out_dir, "--out")
    out_dir = os.path.abspath(out_dir)
    staging = os.path.join(os.path.dirname(out_dir), f".{os.path.basename(out_dir)}.{split}.tmp")
    kinds = metadata.choose(columns, kept_files, source)
    pack_finish.check_out_dir(out_dir, split, staging, kinds)
    with (
        writing.locked(staging, "align pack", shown=out_dir),
        writing.explaining_full_disk(out_dir),
    ):
        try:
            units = _plan(source, unit_records)
            options = {"shard_bytes": shard_bytes, "resize_px": sides}
            stamp = _stamp(source, units, lists, options | {"columns": kinds})
            left = _units_left(staging, stamp, units, f"pack {split}")
            num_workers = max(1, min(num_workers, len(left)))
            settings = pack_unit.Settings(
                folder=os.path.join(staging, "units"),
                num_threads=max(min(2, num_threads), num_threads // num_workers),
                **options,
                **_key_lists(staging, lists, columns),
                columns=kinds,
            )
            _check_lists(source, settings)
            done = workers.run(
                pack_unit.pack_unit, left, settings, num_workers=num_workers, beam=beam
            )
            expected = sum(unit.expected for unit in left)
            for _ in show_progress(done, expected, f"pack {split}", size=int):
                pass
            try:
                report = pack_finish.finish(source, len(units), settings, staging, out_dir, split)
            except ValueError:  # the input is at fault: nothing here can be used again
                shutil.rmtree(staging)
                raise
        except BaseException:
            if not _finished_units(staging):
                shutil.rmtree(staging, ignore_errors=True)
            raise
        shutil.rmtree(staging)
    return report


def _plan(source: PairSource, unit_records: int | None) -> list[Unit]:
    size = 0 if hasattr(source, "parts") else len(source)
    return workers.plan(
        source, unit_records or max(_FEWEST_RECORDS, min(_MOST_RECORDS, size // _UNITS))
    )


def _stamp(
    source: PairSource,
    units: list[Unit],
    lists: Sequence[_List],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What decides the bytes written; finished units count only where it is the same."""
    return {
        "align_jax": __version__,
        "source": identity.stamp(source),
        "lists": [[one.option, key_lists.stamp(one.files, one.by)] for one in lists],
        **options,
        "units": len(units),
    }


def _units_left(staging: str, stamp: dict[str, Any], units: list[Unit], title: str) -> list[Unit]:
    """Returns the units without a result; starts afresh where the stamp is another one."""
    folder, plan = os.path.join(staging, "units"), os.path.join(staging, "plan.json")
    if not os.path.exists(plan) or pack_finish.read_json(plan) != stamp:
        for name in os.listdir(staging):
            if name != "lock":
                shutil.rmtree(os.path.join(staging, name), ignore_errors=True)
        os.makedirs(folder)
        writing.write_json(plan, stamp)
        return units
    left = [u for u in units if not os.path.exists(pack_unit.result_path(folder, u.number))]
    if len(left) < len(units):
        kept = len(units) - len(left)
        print(f"{title}: {kept} of {len(units)} units are there already", file=sys.stderr)
    return left


def _finished_units(staging: str) -> bool:
    folder = os.path.join(staging, "units")
    return os.path.isdir(folder) and any(name.endswith(".json") for name in os.listdir(folder))


def _key_lists(staging: str, lists: Sequence[_List], columns: Sequence[str]) -> dict[str, Any]:
    """Returns the lists as settings of a unit."""
    made: dict[str, list[key_lists.KeyList]] = {"keep": [], "drop": []}
    for number, one in enumerate(lists):
        made[one.option].append(
            key_lists.write_key_list(
                one.path,
                one.files,
                os.path.join(staging, f"list-{number}"),
                option=f"--{one.option}",
                texts=one.option == "keep",
                columns=columns if one.option == "keep" else (),
                by=one.by,
            )
        )
    return {"keep": next(iter(made["keep"]), None), "drop": tuple(made["drop"])}


def _check_lists(source: PairSource, settings: pack_unit.Settings) -> None:
    """Refuses a list without a key of the source, where that costs no reading of records."""
    kept = [("keep", settings.keep)] if settings.keep is not None else []
    for option, keys in (*kept, *(("drop", keys) for keys in settings.drop)):
        if option == "keep" and not keys.size:
            raise ValueError(f"--keep {keys.path} is empty; nothing would be packed.")
        if keys.by is not None:
            joins.check(source, f"--{option}-by", keys.by)
        elif keys.size and hasattr(source, "key") and len(source):
            if not any(source.key(index) in keys for index in range(len(source))):
                raise ValueError(pack_finish.no_common_key(option, keys, source.key(0)))
