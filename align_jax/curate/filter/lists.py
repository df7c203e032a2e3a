"""What others take of a curation: a list that img2dataset downloads, a subset file of DataComp."""

import os
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from align_jax.curate import parts
from align_jax.data.sources import subsets
from align_jax.data.sources.column_names import find_column
from align_jax.data.sources.record import hash_key
from align_jax.data.sources.shards import find_repeated
from align_jax.storage import writing

_IDENTITIES = ("uid", "sample_id", "id")  # what DataComp, LAION and COYO call their rows
_OTHERS = ("md5", "sha256")  # by which img2dataset can verify a download


def write_url_list(kept: Sequence[str], path: str | os.PathLike, key_name: str) -> int:
    """Writes what img2dataset downloads of kept rows; returns the number of urls.

    Columns `url`, `caption` (of the first row of an url), the key as `key_name`, and md5 and sha256
    where the table has them. One row an url: img2dataset would fetch an image again for each of its
    texts; `align pack --keep kept.parquet --keep-by url` gives all of them back.

    Args:
      kept: kept tables of `align curate`.
      path: of the Parquet file.
      key_name: name of the column `key`, see `key_name`.

    Raises:
      ValueError: the tables have no urls.
    """
    schema = pq.read_schema(kept[0])
    if "url" not in schema.names:
        raise ValueError(
            "--url-list: the table has no column url, so there is nothing to download."
        )
    groups = [
        (file, group) for file in kept for group in range(pq.read_metadata(file).num_row_groups)
    ]
    names = {"url": "url", "text": "caption", "key": key_name}
    names |= {name: name for name in schema.names if name.lower() in _OTHERS}
    target = pa.schema([(new, schema.field(old).type) for old, new in names.items()])
    folder, count = parts.folder_of(path), 0
    with (
        writing.locked(folder, "align curate", shown=path),
        writing.explaining_full_disk(folder),
    ):
        for number, group in enumerate(groups):
            np.save(os.path.join(folder, f"{number}.npy"), _hashes(*group))
        # Two urls of the same 64 bits would be one: n^2 / 2^65 such among n.
        repeated = find_repeated(
            lambda number: np.load(os.path.join(folder, f"{number}.npy")), len(groups)
        )
        with parts.result(folder, path) as temporary, pq.ParquetWriter(temporary, target) as writer:
            for number, (file, group) in enumerate(groups):
                table = pq.ParquetFile(file).read_row_group(group, columns=list(names))
                stays = _has_url(table)
                stays[np.flatnonzero(stays)[repeated.get(number, [])]] = False
                table = table.filter(pa.array(stays)).select(list(names))
                count += len(table)
                writer.write_table(table.rename_columns(target.names))
    return count


def key_name(names: Sequence[str]) -> str:
    """Returns what to call the key in a list: as the column that it came from, else `id`.

    img2dataset has a `key` of its own.
    """
    return find_column(names, _IDENTITIES) or "id"


def command(path: str | os.PathLike, key_name: str) -> str:
    """Returns the command of img2dataset that downloads a list."""
    return (
        f"img2dataset --url_list {path} --input_format parquet --url_col url --caption_col caption "
        f"--save_additional_columns '[\"{key_name}\"]' --output_format webdataset "
        "--output_folder shards"
    )


def write_subset(kept: Sequence[str], path: str | os.PathLike) -> int:
    """Writes the keys of kept rows as a subset file of DataComp; returns their number.

    Args:
      kept: kept tables of `align curate`; their column `uid`, or `key`, holds uids.
      path: of the .npy file.

    Raises:
      ValueError: they do not.
    """
    column = find_column(pq.read_schema(kept[0]).names, ("uid", "key"))
    folder = parts.folder_of(path)
    with writing.locked(folder, "align curate", shown=path), parts.result(folder, path) as made:
        count = subsets.write_subset(made, _values(kept, column), f"--subset, column {column}")
    return count


def _values(kept: Sequence[str], column: str) -> Iterator[list[str]]:
    for file in kept:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(columns=[column]):
                yield [value or "" for value in batch[column].to_pylist()]


def _has_url(table: pa.Table) -> np.ndarray:
    return np.array([bool(url) for url in table["url"].to_pylist()], bool)


def _hashes(file: str, group: int) -> np.ndarray:
    """Hashes of the urls of a row group, uint64; rows without url have none."""
    urls = pq.ParquetFile(file).read_row_group(group, columns=["url"])["url"].to_pylist()
    return np.array([hash_key(url) for url in urls if url], np.uint64)
