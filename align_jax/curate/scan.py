"""The metadata of pairs that are here already: what `align curate` filters and others compare.

Every image is decoded once for its size and perceptual hash. One row for each (image, caption), as
rules on texts count captions; several rows of one image follow each other and share its key.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING

import grain
import numpy as np

from align_jax import __version__
from align_jax.data import images
from align_jax.data.perceptual_hash import phash
from align_jax.data.sources import open_source as sources
from align_jax.data.sources.record import Record, hash_key, is_usable
from align_jax.data.sources.shards import find_repeated
from align_jax.run.progress import show_progress
from align_jax.storage import identity, text, writing
from align_jax.storage.problems import Problems, reason_of, report

if TYPE_CHECKING:
    import pyarrow as pa

_KEYS_LISTED = 20  # of each reason, in the report
_METADATA = b"align_scan"

_Result = tuple[str, str | None, list[dict]]  # key, reason or None, rows


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

    Images that cannot be used have no row and are counted, as are those of a key that an earlier
    row has; by the reasons of `align pack`. The file appears when it is complete;
    until then `part_size` records at a time are kept beside it, and a rerun continues after them.
    The same source gives the same bytes, interrupted or not.

    Args:
      spec: pairs, see sources.open_source.
      out: Parquet file, must not exist.
      labelled: `spec` names labelled images (sources.open_labelled); the text is the class.
      part_size: records of a part, which is a row group.
      num_threads: records read and decoded at the same time.

    Returns:
      `source`, `records_read`, `images`, `rows`, `unusable` (reason of record.UNUSABLE_REASONS or
      `key_duplicate` -> count), `unusable_keys` (reason -> first 20 keys), `source_problems`
      (reason -> count, what was missing before reading), and `problems` (reason -> count and first,
      of all these and of images without a caption). The file holds it, see `read_report`.

    Raises:
      ValueError: `out` exists, or the source cannot be opened or holds no usable image.
    """
    import_parquet()  # a missing package is named before hours of work
    if os.path.exists(out):
        raise ValueError(f"{out} exists; name a new file.")
    writing.check_local(out, "--out")
    out = os.path.abspath(out)
    source = open_any(spec, labelled)
    content = {"stamp": identity.stamp(source), "labelled": labelled, "part_size": part_size}
    parts_dir = os.path.join(os.path.dirname(out), f".{os.path.basename(out)}.parts")
    with (
        writing.locked(parts_dir, "align scan", shown=out),
        writing.explaining_full_disk(parts_dir),
    ):
        _check_parts(parts_dir, content | {"align_jax": __version__})
        head = {"spec": spec, "labelled": labelled, "source": source.describe()}
        made = _scan(source, head, out, part_size, num_threads, parts_dir)
        shutil.rmtree(parts_dir)
    if not made["images"]:
        raise ValueError(f"{source.describe()} holds no usable image: {made['unusable']}.")
    return made


def _scan(
    source: sources.PairSource,
    head: dict,
    out: str,
    part_size: int,
    num_threads: int,
    parts_dir: str,
) -> dict:
    """Returns the report, see `scan`; finished parts in `parts_dir` are used."""
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
    repeated = find_repeated(lambda number: _hashed_keys(paths[number]), len(paths))
    made = _total(paths, repeated, source, head)
    if made["images"]:
        _merge(paths, repeated, out, made)
    return made


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

    def __init__(self, source: sources.LabelledSource):
        self._source = source
        self.problems = source.problems

    def __len__(self) -> int:
        return len(self._source)

    def stamp(self) -> str:
        return identity.stamp(self._source)

    def __getitem__(self, index: int) -> Record:
        image = self._source[index]
        return Record(image.key, image.image, (self._source.classes[image.label],))

    def captions(self, index: int) -> tuple[str, ...]:
        return self[index].captions

    def where(self, index: int) -> str:
        is_named = hasattr(self._source, "key")
        name = self._source.key(index) if is_named else f"image {index}"
        return f"{self.describe()}: {name}"

    def describe(self) -> str:
        return self._source.describe()


class _Indices:
    """The positions of all parts, one after another; all parts but the last are full."""

    def __init__(self, parts: list[range], part_size: int):
        self._parts, self._part_size = parts, part_size

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, position: int) -> int:
        part, within = divmod(position, self._part_size)
        return self._parts[part][within]


def _read(source: sources.PairSource, indices: _Indices, num_threads: int) -> grain.IterDataset:
    records = grain.MapDataset.source(indices).map(_Reader(source))
    # Grain keeps the order whatever the number of threads.
    return records.to_iter_dataset(
        grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * num_threads)
    )


class _Reader:
    """Callable index -> (key, reason or None, rows); an image without caption has both."""

    def __init__(self, source: sources.PairSource):
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
            "index": index,
            "width": rgb.shape[1],
            "height": rgb.shape[0],
            "file_bytes": None if made else len(record.image),
            "sha256": hashlib.sha256(rgb.tobytes() if made else record.image).hexdigest(),
            "phash": phash(rgb),
        }
        return key, reason, [{"key": key, "text": one, **of_image} for one in texts or [""]]


def _schema() -> "pa.Schema":
    import pyarrow as pa

    numbers = {"index": pa.int64(), "width": pa.int32(), "height": pa.int32()}
    fields = {"key": pa.string(), "text": pa.string(), **numbers, "file_bytes": pa.int64()}
    return pa.schema(fields | {"sha256": pa.string(), "phash": pa.string()})


def _check_parts(folder: str, content: dict) -> None:
    """Refuses the parts of other data, options or versions; writes what new ones are made from."""
    path = os.path.join(folder, "source.json")
    try:
        with open(path, encoding="utf-8") as file:
            before = json.load(file)
    except (OSError, ValueError):
        before = {}
    if "stamp" not in before:  # nothing says what the parts are of, if there are any
        for name in os.listdir(folder):
            if name != writing.LOCK_FILE:
                os.remove(os.path.join(folder, name))
        writing.write_json(path, content)
    elif before != content:
        changed = [name for name in content if before.get(name) != content[name]]
        raise ValueError(
            f"{folder} holds an unfinished scan of other input ({', '.join(changed)} changed); "
            "remove that folder or name another --out."
        )


def _write_part(path: str, results: list[_Result]) -> None:
    import pyarrow as pa

    counts = {
        "images": sum(bool(rows) for *_, rows in results),
        "unusable": _list_keys((key, reason) for key, reason, rows in results if not rows),
        "without_caption": _list_keys((key, reason) for key, reason, rows in results if rows),
    }
    schema = _schema().with_metadata({_METADATA: json.dumps(counts)})
    table = pa.Table.from_pylist([row for *_, rows in results for row in rows], schema)
    with writing.replacing(path) as temporary:
        import_parquet().write_table(table, temporary)


def _list_keys(pairs: Iterable[tuple[str, str | None]]) -> dict[str, list]:
    """Returns reason -> [count, first keys]."""
    listed: dict[str, list] = {}
    for key, reason in pairs:
        if reason is not None:
            entry = listed.setdefault(reason, [0, []])
            entry[0] += 1
            entry[1] += [key] * (len(entry[1]) < _KEYS_LISTED)
    return listed


def _hashed_keys(path: str) -> np.ndarray:
    """Returns record.hash_key of each image of a part, uint64."""
    table = import_parquet().read_table(path, columns=["key", "index"])
    first = _first_rows(table["index"].to_numpy())
    keys = table["key"].take(first).to_pylist()
    return np.fromiter(map(hash_key, keys), np.uint64, len(keys))


def _first_rows(indices: np.ndarray) -> np.ndarray:
    """Returns the first row of each image, whose rows follow each other."""
    return np.flatnonzero(np.diff(indices, prepend=-1))


def _total(
    paths: list[str], repeated: dict[int, np.ndarray], source: sources.PairSource, head: dict
) -> dict:
    """The report of all parts."""
    unusable, keys, images_, rows = {}, {}, 0, 0
    problems = Problems()
    problems.merge(source.problems)
    for number, path in enumerate(paths):
        part = read_report(path)
        table = import_parquet().read_table(path, columns=["key", "index"])
        gone = _rows_of(table["index"].to_numpy(), repeated.get(number))
        images_ += part["images"] - len(repeated.get(number, ()))
        rows += len(table) - int(gone.sum())
        twice = dict.fromkeys(table["key"].filter(gone).to_pylist())
        if twice:
            part["unusable"]["key_duplicate"] = [len(repeated[number]), list(twice)]
        for kind in ("unusable", "without_caption"):
            for reason, (count, first) in part[kind].items():
                problems.add(reason, first[0], count)
                if kind == "unusable":
                    unusable[reason] = unusable.get(reason, 0) + count
                    keys[reason] = (keys.get(reason, []) + first)[:_KEYS_LISTED]
    return head | {
        "records_read": len(source),
        "source_problems": dict(source.problems),
        "images": images_,
        "rows": rows,
        "unusable": unusable,
        "unusable_keys": keys,
        "problems": report(problems, source.describe()),
    }


def _rows_of(indices: np.ndarray, images_: np.ndarray | None) -> np.ndarray:
    """Returns a mask [rows] of the rows of some images, by their places in the part."""
    places = np.cumsum(np.diff(indices, prepend=-1) != 0) - 1
    return np.isin(places, [] if images_ is None else images_)


def _merge(paths: list[str], repeated: dict[int, np.ndarray], out: str, made: dict) -> None:
    parquet = import_parquet()
    schema = _schema().with_metadata({_METADATA: json.dumps(made, sort_keys=True)})
    with writing.replacing(out) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for number, path in enumerate(paths):
            table = parquet.read_table(path).replace_schema_metadata(schema.metadata)
            gone = _rows_of(table["index"].to_numpy(), repeated.get(number))
            writer.write_table(table.filter(~gone) if gone.any() else table)
