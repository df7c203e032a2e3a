"""One unit of `align scan`: some records of a source become a part, in any process."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from align_jax.curate.workers import Unit, in_order
from align_jax.data import images
from align_jax.data.perceptual_hash import phash
from align_jax.data.sources.column_names import COLUMN_NAMES, find_column
from align_jax.data.sources.open_source import PairSource
from align_jax.data.sources.record import is_usable
from align_jax.data.sources.table_files import (
    as_list,
    caption_cells,
    captions_of,
    open_table,
    plain_text,
)
from align_jax.storage import text, writing
from align_jax.storage.problems import Problems, from_json, reason_of

if TYPE_CHECKING:
    import pyarrow as pa

METADATA = b"align_scan"
KEYS_LISTED = 20  # of each reason, in the report
_SIZES = ("width", "height")  # of the file as it is, not of the original

_Result = tuple[str, str | None, list[dict]]  # key, reason or None, rows


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all units of a run share.

    Attributes:
      folder: receives the parts.
      num_threads: records read and decoded at the same time.
      reuse: sizes and hashes come from the tables beside img2dataset's shards.
    """

    folder: str
    num_threads: int
    reuse: bool = False


def scan_unit(unit: Unit, settings: Settings) -> Iterator[int]:
    """Writes the part of a unit, which appears whole; yields 1 after each record."""
    path = os.path.join(settings.folder, f"{unit.number:06d}.parquet")
    results = []
    if settings.reuse:
        problems = Problems()
        made = _read_side_table(unit.source.path, problems)
    else:
        source, records = unit.open()
        problems = source.problems if unit.stop is None else Problems()
        made = in_order(_Reader(source), records, settings.num_threads)
    for result in made:
        results.append(result)
        yield 1
    write_part(path, results, problems)


def read_counts(path: str | os.PathLike) -> dict | None:
    """Returns what the metadata of a file of `align scan` holds; None for any other file."""
    metadata = import_parquet().read_schema(path).metadata or {}
    return json.loads(metadata[METADATA]) if METADATA in metadata else None


def import_parquet() -> ModuleType:
    """Returns pyarrow.parquet; ValueError if it is not installed."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("Parquet files need pyarrow: pip install 'align_jax[curate]'.") from error
    return parquet


def schema() -> "pa.Schema":
    """Returns the columns of a scan, see scan.scan."""
    import pyarrow as pa

    numbers = {"index": pa.int64(), "width": pa.int32(), "height": pa.int32()}
    fields = {"key": pa.string(), "text": pa.string(), **numbers, "file_bytes": pa.int64()}
    return pa.schema(fields | {"sha256": pa.string(), "phash": pa.string()})


def write_part(path: str, results: list[_Result], problems: Problems) -> None:
    """Writes the rows of records, whose `index` counts within the unit, with what was lost."""
    import pyarrow as pa

    for index, (_, _, rows) in enumerate(results):
        for row in rows:
            row["index"] = index
    counts = {
        "records": len(results),
        "images": sum(bool(rows) for *_, rows in results),
        "unusable": _list_keys((key, reason) for key, reason, rows in results if not rows),
        "without_caption": _list_keys((key, reason) for key, reason, rows in results if rows),
        "source_problems": problems.to_json(),
    }
    target = schema().with_metadata({METADATA: json.dumps(counts)})
    table = pa.Table.from_pylist([row for *_, rows in results for row in rows], target)
    with writing.replacing(path) as temporary:
        import_parquet().write_table(table, temporary)


def problems_of(counts: dict) -> Problems:
    """Returns what a part's source missed before its records were read."""
    return from_json(counts["source_problems"])


class _Reader:
    """Callable index -> (key, reason or None, rows); an image without caption has both."""

    def __init__(self, source: PairSource):
        self._source = source

    def __call__(self, index: int) -> _Result:
        key, reason = f"record {index}", None
        if hasattr(self._source, "key"):
            key = text.clean(self._source.key(index))
        try:
            record = self._source[index]
            key = text.clean(record.key)
            texts = [text.clean(caption) for caption in record.captions if is_usable(caption)]
            reason = None if texts else "caption_empty"
            rgb = images.decode_image(record.image)
        except (images.BadImage, OSError) as error:
            return key, reason or reason_of(error), []
        made = isinstance(record.image, np.ndarray)
        of_image = {
            "width": rgb.shape[1],
            "height": rgb.shape[0],
            "file_bytes": None if made else len(record.image),
            "sha256": hashlib.sha256(rgb.tobytes() if made else record.image).hexdigest(),
            "phash": phash(rgb),
        }
        return key, reason, [{"key": key, "text": one, **of_image} for one in texts or [""]]


def _read_side_table(path: str, problems: Problems) -> Iterator[_Result]:
    """Yields the results of a shard's downloads by the table beside it; no image is read."""
    side = f"{os.path.splitext(path)[0]}.parquet"
    if not os.path.isfile(side):
        raise ValueError(f"--reuse: {side} does not exist; scan without it.")
    table = open_table(side)
    known = {"key": ("key",), "status": ("status",), "sha256": ("sha256",)}
    known |= {name: (name,) for name in _SIZES}
    known["phash"] = COLUMN_NAMES["image_hash"][:-2]  # without sha256 and md5
    known["file_bytes"] = COLUMN_NAMES["file_bytes"]
    names = {ours: find_column(table.names, theirs) for ours, theirs in known.items()}
    missing = [name for name in ("key", "status", *_SIZES) if names[name] is None]
    if missing or not table.caption_names():
        missing += [] if table.caption_names() else ["caption"]
        raise ValueError(f"--reuse: {side} has no column {missing[0]}; scan without it.")
    found = {ours: name for ours, name in names.items() if name is not None}
    texts = table.caption_names()
    for batch in table.read(sorted({*found.values(), *texts})):
        cells = {ours: as_list(batch.columns[name]) for ours, name in found.items()}
        captions = as_list(caption_cells(batch, texts))
        for row, caption in enumerate(captions):
            values = {ours: column[row] for ours, column in cells.items()}
            if values.pop("status") != "success":
                problems.add(f"status_{cells['status'][row]}", side)
                continue
            yield _reused(values, caption)


def _reused(values: dict, caption: object) -> _Result:
    key = text.clean(plain_text(values.pop("key")) or "")
    sides = [values.pop(name) for name in _SIZES]
    if not key or not all(isinstance(side, int | float) and side > 0 for side in sides):
        return key, "record_unreadable", []
    size = values.pop("file_bytes", None)
    of_image = {
        **dict(zip(_SIZES, map(int, sides), strict=True)),
        "file_bytes": None if size is None else int(size),
        **{name: plain_text(value) for name, value in values.items()},
    }
    texts = [text.clean(one) for one in captions_of(caption) or () if is_usable(one)]
    rows = [{"key": key, "text": one, **of_image} for one in texts or [""]]
    return key, None if texts else "caption_empty", rows


def _list_keys(pairs: Iterable[tuple[str, str | None]]) -> dict[str, list]:
    """Returns reason -> [count, first keys]."""
    listed: dict[str, list] = {}
    for key, reason in pairs:
        if reason is not None:
            entry = listed.setdefault(reason, [0, []])
            entry[0] += 1
            entry[1] += [key] * (len(entry[1]) < KEYS_LISTED)
    return listed
