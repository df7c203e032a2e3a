"""Sets of images with what they are compared by: perceptual hashes, or embeddings of a model.

Read from tables of `align scan` and of COYO's kind, from sources (scanned on the way), and from the
folders of `align embed`. What is done with them is in decontaminate.py.
"""

import dataclasses
import glob
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from align_jax.curate.scan import import_parquet, read_report, scan
from align_jax.data.perceptual_hash import parse_hashes
from align_jax.storage.paths import find_paths

if TYPE_CHECKING:
    import pyarrow as pa

_KEY_COLUMNS = ("key", "id", "uid")
_HASH_COLUMNS = ("phash", "image_phash", "image_hash")  # of scan, COYO, align curate
_MANIFEST = "manifest.json"  # of `align embed`


@dataclasses.dataclass
class ImageSet:
    """One set of images.

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


def is_embedded(name: str) -> bool:
    """Returns whether `name` is a folder that `align embed` wrote."""
    return os.path.isfile(os.path.join(name, _MANIFEST))


def open_hashes(name: str, number: int, out_dir: str | os.PathLike) -> ImageSet:
    """Returns the images of Parquet tables, or of a source of pairs, with perceptual hashes.

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
        if not os.path.exists(paths[0]):
            scan(name, paths[0])
        elif (spec := read_report(paths[0])["spec"]) != name:
            raise ValueError(f"{paths[0]} is a scan of {spec}, not of {name}; name a new folder.")
    elif not paths:
        raise ValueError(f"{name} does not exist; name a table with perceptual hashes.")
    parts = [_read_hashes(path) for path in paths]
    if len(parts) == 1:
        return dataclasses.replace(parts[0], name=name)
    import pyarrow as pa

    return ImageSet(
        name,
        pa.chunked_array([part.keys for part in parts]),
        np.concatenate([part.values for part in parts]),
        sum(part.num_without_hash for part in parts),
    )


def _read_hashes(path: str) -> ImageSet:
    import pyarrow as pa
    import pyarrow.compute as pc

    parquet = import_parquet()
    try:
        columns = parquet.read_schema(path).names
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
    report = read_report(path)
    table = parquet.read_table(path, columns=[key, hash_, *(["index"] if report else [])])
    num_rows = len(table)
    table = table.filter(pc.and_(pc.is_valid(table[key]), pc.is_valid(table[hash_])))
    num_without_hash = num_rows - len(table)
    keys = table[key].cast(pa.large_string()).combine_chunks()
    # Rows of further captions follow the first row of their image.
    first = np.ones(len(keys), bool)
    first[1:] = pc.not_equal(keys[1:], keys[:-1]).to_numpy(zero_copy_only=False)
    kept = pa.array(np.flatnonzero(first))
    hashes = parse_hashes(table[hash_].take(kept).to_pylist())
    positions = table["index"].take(kept).to_numpy() if report else None
    return ImageSet(path, keys.take(kept), hashes, num_without_hash, report, positions)


def open_embeddings(names: Sequence[str]) -> list[ImageSet]:
    """Returns the images of folders that `align embed` wrote, with their embeddings.

    Raises:
      ValueError: embeddings of texts or of different models, or shards are missing.
    """
    sets, models = [], []
    for name in names:
        manifest = _read_json(os.path.join(name, _MANIFEST))
        if manifest.get("kind") != "image":
            raise ValueError(f"{name} holds embeddings of {manifest.get('kind')}s, not of images.")
        models.append(manifest.get("model"))
        if models[-1] != models[0]:
            raise ValueError(f"{name} and {names[0]} are embedded by different models.")
        sets.append(_read_embeddings(name, manifest["file_format"]))
    return sets


def _read_embeddings(folder: str, file_format: str) -> ImageSet:
    import pyarrow as pa

    paths = sorted(glob.glob(os.path.join(glob.escape(folder), f"*.{file_format}")))
    wanted = [f"{number:05d}.{file_format}" for number in range(len(paths))]
    if not paths or [os.path.basename(path) for path in paths] != wanted:
        raise ValueError(f"{folder} misses shards; run `align embed` again, it continues.")
    keys, values = [], []
    for path in paths:
        if file_format == "npy":
            values.append(np.load(path))
            keys += _read_json(path.removesuffix(".npy") + ".json")["keys"]
        else:
            table = import_parquet().read_table(path)
            flat = table["embedding"].combine_chunks().flatten().to_numpy()
            values.append(flat.reshape(len(table), -1))
            keys += table["key"].to_pylist()
    values = [part for part in values if len(part)]
    return ImageSet(folder, pa.array(keys, pa.large_string()), np.concatenate(values))


def _read_json(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        return json.load(file)
