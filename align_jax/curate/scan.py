"""The metadata of pairs that are here already: what `align curate` filters and others compare.

Every image is decoded once for its size and perceptual hash. One row for each (image, caption), as
rules on texts count captions; several rows of one image follow each other and share its key.
"""

import hashlib
import json
import os
import shutil
from types import ModuleType

import grain
import numpy as np

from align_jax.data import images
from align_jax.data.perceptual_hash import phash
from align_jax.data.sources import open_source as sources
from align_jax.data.sources.record import Record
from align_jax.run.progress import show_progress
from align_jax.storage.problems import reason_of
from align_jax.storage.text import clean

_KEYS_LISTED = 20  # of each reason, in the report
_METADATA = b"align_scan"


def scan(
    spec: str,
    out: str | os.PathLike,
    *,
    labelled: bool = False,
    part_size: int = 10_000,
    num_threads: int = 8,
) -> dict:
    """Returns the report of writing the metadata of the pairs that `spec` names as Parquet.

    | column | what |
    |---|---|
    | `key` | `Record.key`, by which `align pack` keeps and drops |
    | `text` | one caption, blank ones left out; "" where an image has no other |
    | `index` | int64, position of the record in the source |
    | `width`, `height` | int32, pixels as shown, that is after the EXIF orientation |
    | `file_bytes` | int64, of the encoded image; null if the source makes pixels |
    | `sha256` | of the encoded image, or of the pixels |
    | `phash` | perceptual hash, see phash.phash |

    Images that cannot be used have no row and are counted. The file appears when it is complete;
    until then `part_size` records at a time are kept beside it, and a rerun continues after them.
    The same source gives the same bytes, interrupted or not.

    Args:
      spec: pairs, see sources.open_source.
      out: Parquet file, must not exist.
      labelled: `spec` names labelled images (sources.open_labelled); the text is the class.
      part_size: records of a part, which is a row group.
      num_threads: records read and decoded at the same time.

    Returns:
      `source`, `records_read`, `images`, `rows`, `unusable` (reason of images.BAD_IMAGE_REASONS or
      `record_unreadable` -> count), `unusable_keys` (reason -> first 20 keys), `source_problems`
      (reason -> count, what was missing before reading). The file holds it, see `read_report`.

    Raises:
      ValueError: `out` exists, or the source cannot be opened or holds no usable image.
    """
    import_parquet()  # a missing package is named before hours of work
    if os.path.exists(out):
        raise ValueError(f"{out} exists; name a new file.")
    source = open_any(spec, labelled)
    identity = {"spec": spec, "labelled": labelled, "source": source.describe()}
    parts_dir = _open_parts(os.path.abspath(out), identity | {"part_size": part_size})
    starts = range(0, len(source), part_size)
    paths = [os.path.join(parts_dir, f"{number:06d}.parquet") for number in range(len(starts))]
    todo = [
        (path, range(start, min(start + part_size, len(source))))
        for path, start in zip(paths, starts, strict=True)
        if not os.path.exists(path)
    ]
    indices = _Indices([part for _, part in todo], part_size)
    results = iter(show_progress(_read(source, indices, num_threads), len(indices), "scan"))
    for path, part in todo:
        _write_part(path, [next(results) for _ in part])
    problems = dict(getattr(source, "problems", {}))
    head = identity | {"records_read": len(source), "source_problems": problems}
    report = _total(paths, head)
    if report["images"]:
        _merge(paths, os.path.abspath(out), report)
    shutil.rmtree(parts_dir)
    if not report["images"]:
        raise ValueError(f"{source.describe()} holds no usable image: {report['unusable']}.")
    return report


def read_report(path: str | os.PathLike) -> dict | None:
    """Returns the report inside a file that `scan` wrote; None for any other Parquet file."""
    metadata = import_parquet().read_schema(path).metadata or {}
    return json.loads(metadata[_METADATA]) if _METADATA in metadata else None


def open_any(spec: str, labelled: bool) -> sources.PairSource:
    """Returns the pairs, or the labelled images with their class as caption, that `spec` names."""
    return _Labelled(sources.open_labelled(spec)) if labelled else sources.open_source(spec)


def import_parquet() -> ModuleType:
    """Returns pyarrow.parquet; ValueError if it is not installed."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("Parquet files need pyarrow: pip install 'align_jax[curate]'.") from error
    return parquet


class _Labelled:
    """Labelled images as pairs."""

    def __init__(self, source):
        self._source = source
        self.problems = getattr(source, "problems", {})

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        image = self._source[index]
        return Record(image.key, image.image, (self._source.classes[image.label],))

    def captions(self, index):
        return self[index].captions

    def describe(self):
        return self._source.describe()


class _Indices:
    """The positions of all parts, one after another; all parts but the last are full."""

    def __init__(self, parts, part_size):
        self._parts, self._part_size = parts, part_size

    def __len__(self):
        return sum(map(len, self._parts))

    def __getitem__(self, position):
        part, within = divmod(position, self._part_size)
        return self._parts[part][within]


def _read(source, indices, num_threads):
    records = grain.MapDataset.source(indices).map(_Reader(source))
    # Grain keeps the order whatever the number of threads.
    return records.to_iter_dataset(
        grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * num_threads)
    )


class _Reader:
    """Callable index -> (key, reason or None, rows)."""

    def __init__(self, source):
        self._source = source

    def __call__(self, index):
        key = f"record {index}"
        try:
            record = self._source[index]
            key = clean(record.key)
            rgb = images.decode_image(record.image)
        except (images.BadImage, OSError) as error:
            return key, reason_of(error), []
        made = isinstance(record.image, np.ndarray)
        of_image = {
            "index": index,
            "width": rgb.shape[1],
            "height": rgb.shape[0],
            "file_bytes": None if made else len(record.image),
            "sha256": hashlib.sha256(rgb.tobytes() if made else record.image).hexdigest(),
            "phash": phash(rgb),
        }
        texts = [clean(text) for text in record.captions if text.strip()] or [""]
        return key, None, [{"key": key, "text": text, **of_image} for text in texts]


def _schema():
    import pyarrow as pa

    numbers = {"index": pa.int64(), "width": pa.int32(), "height": pa.int32()}
    fields = {"key": pa.string(), "text": pa.string(), **numbers, "file_bytes": pa.int64()}
    return pa.schema(fields | {"sha256": pa.string(), "phash": pa.string()})


def _open_parts(out, identity):
    """Returns the folder of the parts; those of another source are removed."""
    folder = os.path.join(os.path.dirname(out), f".{os.path.basename(out)}.parts")
    path = os.path.join(folder, "source.json")
    try:
        with open(path, encoding="utf-8") as file:
            if json.load(file) == identity:
                return folder
    except (OSError, ValueError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(identity, file)
    return folder


def _write_part(path, results):
    import pyarrow as pa

    unusable = [(key, reason) for key, reason, _ in results if reason]
    counts = {
        "images": len(results) - len(unusable),
        "unusable": _count(unusable),
        "unusable_keys": _list_keys(unusable),
    }
    schema = _schema().with_metadata({_METADATA: json.dumps(counts)})
    table = pa.Table.from_pylist([row for *_, rows in results for row in rows], schema)
    import_parquet().write_table(table, path + ".tmp")
    os.replace(path + ".tmp", path)


def _count(unusable):
    counts = {}
    for _, reason in unusable:
        counts[reason] = counts.get(reason, 0) + 1
    return counts


def _list_keys(unusable):
    listed = {}
    for key, reason in unusable:
        keys = listed.setdefault(reason, [])
        if len(keys) < _KEYS_LISTED:
            keys.append(key)
    return listed


def _total(paths, head):
    """The report of all parts."""
    report = head | {"images": 0, "rows": 0, "unusable": {}, "unusable_keys": {}}
    for path in paths:
        part = read_report(path)
        report["images"] += part["images"]
        report["rows"] += import_parquet().read_metadata(path).num_rows
        for reason, count in part["unusable"].items():
            report["unusable"][reason] = report["unusable"].get(reason, 0) + count
        for reason, keys in part["unusable_keys"].items():
            listed = report["unusable_keys"].get(reason, []) + keys
            report["unusable_keys"][reason] = listed[:_KEYS_LISTED]
    return report


def _merge(paths, out, report):
    parquet = import_parquet()
    schema = _schema().with_metadata({_METADATA: json.dumps(report, sort_keys=True)})
    with parquet.ParquetWriter(out + ".tmp", schema) as writer:
        for path in paths:
            writer.write_table(parquet.read_table(path).replace_schema_metadata(schema.metadata))
    os.replace(out + ".tmp", out)
