"""Sets of images with what they are compared by: perceptual hashes, or embeddings of a model.

Read from tables of `align scan` and of COYO's kind, from sources (scanned on the way), and from the
folders of `align embed`. What is done with them is in decontaminate.py.
"""

import dataclasses
import glob
import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from align_jax.curate import parts
from align_jax.curate.scan import import_parquet, open_any, read_report, scan
from align_jax.data.images import decode_image
from align_jax.data.perceptual_hash import parse_hashes
from align_jax.storage import identity, text, writing
from align_jax.storage.paths import find_paths

if TYPE_CHECKING:
    import pyarrow as pa

_KEY_COLUMNS = ("key", "id", "uid")
_HASH_COLUMNS = ("phash", "image_phash", "image_hash")  # of scan, COYO, align curate
_MANIFEST = "manifest.json"  # of `align embed`
_BLOCK_ROWS = 2**20


@dataclasses.dataclass
class ImageSet:
    """One set of images, or a block of one.

    Attributes:
      name: as the user wrote it.
      keys: Arrow array of text [N].
      values: hashes, uint64 [N], or embeddings, float32 [N, D].
      num_without_hash: rows that have none.
      scan: report of the scan that made the table, or None.
      positions: int64 [N], of the images in the source of that scan.
    """

    name: str
    keys: "pa.Array | pa.ChunkedArray"
    values: np.ndarray
    num_without_hash: int = 0
    scan: dict | None = None
    positions: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class HashTables:
    """The tables of a set with perceptual hashes, not yet read.

    Attributes:
      name: as the user wrote it.
      paths: Parquet files.
      scan: report of the scan that made the only table, or None.
    """

    name: str
    paths: Sequence[str]
    scan: dict | None

    def blocks(self) -> Iterator[ImageSet]:
        """Yields the images, about a million at a time."""
        for path in self.paths:
            yield from _read_hashes(path, self)

    def read(self) -> ImageSet:
        """Returns all images."""
        import pyarrow as pa

        blocks = list(self.blocks())
        return ImageSet(
            self.name,
            pa.chunked_array([block.keys for block in blocks], pa.large_string()),
            np.concatenate([block.values for block in blocks]),
            sum(block.num_without_hash for block in blocks),
            self.scan,
            np.concatenate([block.positions for block in blocks]) if self.scan else None,
        )


class Pictures:
    """The pictures of a scanned set; ValueError if no scan says where they are."""

    def __init__(self, images: HashTables, what: str):
        """Opens the source that was scanned, for what needs it."""
        if images.scan is None:
            raise ValueError(f"{what} needs a table of `align scan`, which {images.name} is not.")
        self._spec = images.scan["spec"]
        try:
            self._source = open_any(self._spec, images.scan["labelled"])
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{images.name} is a scan of {self._spec}, which cannot be opened: {error} Start "
                "where it was scanned from, or do without pictures (no --sheet, but --as-is)."
            ) from error

    def get(self, key: str, position: int) -> np.ndarray:
        """Returns the picture, uint8 [H, W, 3], of a key at its position in the source."""
        record = self._source[position]
        if text.clean(record.key) != key:
            raise ValueError(
                f"{self._spec} has changed since it was scanned: {record.key} is where {key} was; "
                "scan it again."
            )
        return decode_image(record.image)


def is_embedded(name: str) -> bool:
    """Returns whether `name` is a folder that `align embed` wrote."""
    return os.path.isfile(os.path.join(name, _MANIFEST))


def identify_embeddings(folder: str) -> str:
    """Returns what the embeddings of a folder were made from, and how, as one line."""
    return identity.of_content(os.path.join(folder, _MANIFEST))


def find_hashes(name: str, number: int, out_dir: str | os.PathLike) -> HashTables:
    """Returns Parquet tables with perceptual hashes; those of a source of pairs are made first.

    Args:
      name: path or glob of tables, else a source, whose scan becomes `scan-<number>.parquet`.
      number: place among the sets.
      out_dir: receives the scan, or holds it from an interrupted call.

    Raises:
      ValueError: no such table, no usable columns, or the scan of another source.
    """
    paths = find_paths(name)
    if not name.endswith(".parquet"):
        paths = [os.path.join(out_dir, f"scan-{number}.parquet")]
        os.makedirs(out_dir, exist_ok=True)
        if not parts.is_finished(paths[0], "align scan"):
            scan(name, paths[0])
        elif (spec := read_report(paths[0])["spec"]) != name:
            raise ValueError(f"{paths[0]} is a scan of {spec}, not of {name}; name a new folder.")
    elif not paths:
        raise ValueError(f"{name} does not exist; name a table with perceptual hashes.")
    for path in paths:
        _find_columns(path)
    return HashTables(name, paths, read_report(paths[0]) if len(paths) == 1 else None)


def _find_columns(path: str) -> tuple[str, str]:
    """Returns the columns of keys and of hashes."""
    import pyarrow as pa

    try:
        columns = import_parquet().read_schema(path).names
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error
    key, hash_ = (
        next((name for name in known if name in columns), None)
        for known in (_KEY_COLUMNS, _HASH_COLUMNS)
    )
    if key is None or hash_ is None:
        raise ValueError(
            f"{path} needs a column {' or '.join(_KEY_COLUMNS)} and a perceptual hash in "
            f"{' or '.join(_HASH_COLUMNS)}; it has {', '.join(columns)}. `align scan` makes both "
            "from the images."
        )
    return key, hash_


def _read_hashes(path: str, of: HashTables) -> Iterator[ImageSet]:
    import pyarrow as pa
    import pyarrow.compute as pc

    key, hash_ = _find_columns(path)
    names = [key, hash_, *(["index"] if of.scan else [])]
    last = None
    with import_parquet().ParquetFile(path) as file:
        for batch in file.iter_batches(_BLOCK_ROWS, columns=names):
            num_rows = len(batch)
            batch = batch.filter(pc.and_(pc.is_valid(batch[key]), pc.is_valid(batch[hash_])))
            keys = batch[key].cast(pa.large_string())
            # Rows of further captions follow the first row of their image.
            first = np.ones(len(keys), bool)
            first[1:] = pc.not_equal(keys[1:], keys[:-1]).to_numpy(zero_copy_only=False)
            if len(keys):
                first[0] = keys[0].as_py() != last
                last = keys[-1].as_py()
            kept = pa.array(np.flatnonzero(first))
            yield ImageSet(
                of.name,
                keys.take(kept),
                parse_hashes(batch[hash_].take(kept).to_pylist()),
                num_rows - len(batch),
                of.scan,
                batch["index"].take(kept).to_numpy() if of.scan else None,
            )


def open_embeddings(names: Sequence[str], folder: str) -> list[ImageSet]:
    """Returns the images of folders that `align embed` wrote, with their embeddings mapped.

    Args:
      names: folders.
      folder: receives `embeddings-N.f32`, all shards of a folder in one file.

    Raises:
      ValueError: embeddings of texts or of different models, or shards are missing.
    """
    sets, models = [], []
    for number, name in enumerate(names):
        manifest = _read_json(os.path.join(name, _MANIFEST))
        if manifest.get("kind") != "image":
            raise ValueError(f"{name} holds embeddings of {manifest.get('kind')}s, not of images.")
        models.append(manifest.get("model"))
        if models[-1] != models[0]:
            raise ValueError(f"{name} and {names[0]} are embedded by different models.")
        path = os.path.join(folder, f"embeddings-{number}.f32")
        sets.append(_read_embeddings(name, manifest["file_format"], path))
    return sets


def _read_embeddings(folder: str, file_format: str, mapped: str) -> ImageSet:
    import pyarrow as pa

    paths = sorted(glob.glob(os.path.join(glob.escape(folder), f"*.{file_format}")))
    wanted = [f"{number:05d}.{file_format}" for number in range(len(paths))]
    if not paths or [os.path.basename(path) for path in paths] != wanted:
        raise ValueError(f"{folder} misses shards; run `align embed` again, it continues.")
    keys, num_values = [], 0
    with writing.replacing(mapped) as temporary, open(temporary, "wb") as file:
        for path in paths:
            if file_format == "npy":
                values = np.load(path)
                keys.append(pa.array(_read_json(path.removesuffix(".npy") + ".json")["keys"]))
            else:
                table = import_parquet().read_table(path)
                values = table["embedding"].combine_chunks().flatten().to_numpy()
                values = values.reshape(len(table), -1)
                keys.append(table["key"].combine_chunks())
            num_values += values.size
            file.write(np.ascontiguousarray(values, np.float32).tobytes())
    keys = pa.chunked_array([part.cast(pa.large_string()) for part in keys])
    shape = (len(keys), num_values // max(1, len(keys)))
    values = np.memmap(mapped, np.float32, "r", shape=shape) if num_values else np.zeros(shape)
    return ImageSet(folder, keys, values)


def _read_json(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        return json.load(file)
