"""The metadata of pairs that are here already: what `align curate` filters and others compare.

Every image is decoded once for its size and perceptual hash. One row for each (image, caption), as
rules on texts count captions; several rows of one image follow each other and share its key.
"""

import json
import os
import shutil

import numpy as np

from align_jax import __version__
from align_jax.curate import parts as parts_lib
from align_jax.curate import scan_unit, workers
from align_jax.curate.scan_unit import import_parquet
from align_jax.data.sources import open_source as sources
from align_jax.data.sources.record import Record, hash_key
from align_jax.data.sources.shards import find_repeated
from align_jax.run.progress import show_progress
from align_jax.storage import identity, writing
from align_jax.storage.problems import Problems, report

_FEWEST_RECORDS, _MOST_RECORDS, _PARTS = 1024, 10_000, 64  # of a part; parts to aim at between


def scan(
    spec: str,
    out: str | os.PathLike,
    *,
    labelled: bool = False,
    part_size: int | None = None,
    num_threads: int = 8,
    num_workers: int = 1,
    beam: str | None = None,
    reuse: bool = False,
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
    row has; by the reasons of `align pack`. The file appears when it is complete; until then parts
    of `part_size` records, or of one shard of img2dataset each, are kept beside it, and a rerun
    continues after them. The same source gives the same bytes, interrupted or not, for any number
    of workers.

    Args:
      spec: pairs, see sources.open_source.
      out: Parquet file, must not exist.
      labelled: `spec` names labelled images (sources.open_labelled); the text is the class.
      part_size: records of a part, which is a row group; default: a 64th of the source, 1,024 to
        10,000.
      num_threads: records read and decoded at the same time by all workers; at least 2 in each of
        several.
      num_workers: processes; 1 scans in this one.
      beam: options of an Apache Beam pipeline that scans instead, see workers.py.
      reuse: of img2dataset folders, takes captions, sizes and hashes from the tables beside the
        shards and reads no image: `sha256` is then that of what was downloaded, before resizing;
        file_bytes, sha256 and phash are null where the tables lack them.

    Returns:
      `source`, `records_read`, `images`, `rows`, `unusable` (reason of record.UNUSABLE_REASONS or
      `key_duplicate` -> count), `unusable_keys` (reason -> first 20 keys), `source_problems`
      (reason -> count, what was missing before reading), and `problems` (reason -> count and first,
      of all these and of images without a caption). The file holds it, see `read_report`.

    Raises:
      ValueError: `out` exists, or the source cannot be opened or holds no usable image, or `reuse`
        of tables that do not serve.
      RuntimeError: a worker died.
    """
    if num_workers < 1:
        raise ValueError(f"--workers {num_workers} must be at least 1.")
    import_parquet()  # a missing package is named before hours of work
    if parts_lib.is_finished(out, "align scan"):
        raise ValueError(f"{out} exists; name a new file.")
    writing.check_local(out, "--out")
    out = os.path.abspath(out)
    source = open_any(spec, labelled)
    if reuse and not hasattr(source, "parts"):
        raise ValueError(f"--reuse is for folders of img2dataset; {source.describe()} is none.")
    size = 0 if hasattr(source, "parts") else len(source)
    part_size = part_size or max(_FEWEST_RECORDS, min(_MOST_RECORDS, size // _PARTS))
    content = {"stamp": identity.stamp(source), "labelled": labelled, "part_size": part_size}
    content |= {"reuse": True} if reuse else {}
    parts_dir = parts_lib.folder_of(out)
    with (
        writing.locked(parts_dir, "align scan", shown=out),
        writing.explaining_full_disk(parts_dir),
        parts_lib.checked(parts_dir, content | {"align_jax": __version__}, "scan"),
    ):
        head = {"spec": spec, "labelled": labelled, "source": source.describe()}
        units = workers.plan(source, part_size)
        paths = parts_lib.paths(parts_dir, len(units))
        left = [unit for unit in units if not os.path.exists(paths[unit.number])]
        num_workers = max(1, min(num_workers, len(left)))
        threads = max(min(2, num_threads), num_threads // num_workers)
        settings = scan_unit.Settings(parts_dir, threads, reuse)
        done = workers.run(scan_unit.scan_unit, left, settings, num_workers=num_workers, beam=beam)
        for _ in show_progress(done, sum(unit.expected for unit in left), "scan", size=int):
            pass
        made = _merge(paths, source, head, out)
        shutil.rmtree(parts_dir, ignore_errors=True)  # where nothing was made of the parts
    if not made["images"]:
        raise ValueError(f"{source.describe()} holds no usable image: {made['unusable']}.")
    return made


def read_report(path: str | os.PathLike) -> dict | None:
    """Returns the report inside a file that `scan` wrote; None for any other Parquet file."""
    return scan_unit.read_counts(path)


def open_any(spec: str, labelled: bool) -> sources.PairSource:
    """Returns the pairs, or the labelled images with their class as caption, that `spec` names."""
    return _Labelled(sources.open_labelled(spec)) if labelled else sources.open_source(spec)


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


def _hashed_keys(path: str) -> np.ndarray:
    """Returns record.hash_key of each image of a part, uint64; made once, asked for often."""
    hashes = f"{path}.npy"
    if not os.path.exists(hashes):
        writing.write_array(hashes, _hash_keys(path))
    return np.load(hashes)


def _hash_keys(path: str) -> np.ndarray:
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
    unusable, keys, images_, rows, records = {}, {}, 0, 0, 0
    missing = Problems()
    missing.merge(source.folder_problems if hasattr(source, "parts") else source.problems)
    problems = Problems()
    for number, path in enumerate(paths):
        part = read_report(path)
        missing.merge(scan_unit.problems_of(part))
        table = import_parquet().read_table(path, columns=["key", "index"])
        gone = _rows_of(table["index"].to_numpy(), repeated.get(number))
        records += part["records"]
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
                    keys[reason] = (keys.get(reason, []) + first)[: scan_unit.KEYS_LISTED]
    found = Problems()
    found.merge(missing)
    found.merge(problems)
    return head | {
        "records_read": records,
        "source_problems": dict(missing),
        "images": images_,
        "rows": rows,
        "unusable": unusable,
        "unusable_keys": keys,
        "problems": report(found, source.describe()),
    }


def _rows_of(indices: np.ndarray, images_: np.ndarray | None) -> np.ndarray:
    """Returns a mask [rows] of the rows of some images, by their places in the part."""
    places = np.cumsum(np.diff(indices, prepend=-1) != 0) - 1
    return np.isin(places, [] if images_ is None else images_)


def _merge(paths: list[str], source: sources.PairSource, head: dict, out: str) -> dict:
    """Returns the report of the parts, of which `out` becomes one file if they hold an image."""
    import pyarrow as pa

    parquet = import_parquet()
    repeated = find_repeated(lambda number: _hashed_keys(paths[number]), len(paths))
    made = _total(paths, repeated, source, head)
    if not made["images"]:
        return made
    metadata = {scan_unit.METADATA: json.dumps(made, sort_keys=True)}
    schema = scan_unit.schema().with_metadata(metadata)
    first = 0  # index of the part's first record
    folder = os.path.dirname(paths[0])
    with (
        parts_lib.result(folder, out) as temporary,
        parquet.ParquetWriter(temporary, schema) as writer,
    ):
        for number, path in enumerate(paths):
            table = parquet.read_table(path).replace_schema_metadata(schema.metadata)
            gone = _rows_of(table["index"].to_numpy(), repeated.get(number))
            indices = pa.array(table["index"].to_numpy() + first)
            table = table.set_column(schema.get_field_index("index"), "index", indices)
            writer.write_table(table.filter(~gone) if gone.any() else table)
            first += read_report(path)["records"]
    return made
