"""Lists of keys to keep or to drop, which every worker looks keys up in without holding them.

A list is a Parquet table that `align curate` or `align decontaminate` wrote, a folder of such, or a
subset file of DataComp (data/sources/subsets.py). It becomes sorted 8-byte hashes in files that are
mapped into memory, so that all processes share one copy. Two keys of the same hash are one to the
list: expect n*m / 2^64 such among n keys and m records.
"""

import os
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from align_jax.data.sources import subsets
from align_jax.data.sources.column_names import find_column
from align_jax.data.sources.record import hash_key
from align_jax.data.sources.table_files import plain_text
from align_jax.storage import identity

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_BATCH_ROWS = 2**16


class KeyList:
    """Keys, and their texts where the table has a column `text`. Pickles as a path.

    Attributes:
      path: as the user named it.
      size: number of rows.
      has_texts: whether the tables have texts.
      example: the first key, or "" in an empty list.
      columns: other columns of which the values are kept.
      by: name of the metadata by which records are looked up; None for their key.
    """

    def __init__(
        self,
        path: str,
        folder: str,
        size: int,
        has_texts: bool,
        example: str,
        columns: tuple[str, ...] = (),
        by: str | None = None,
    ):
        """Keeps what `write_key_list` wrote into `folder`."""
        self.columns, self.by = columns, by
        self.path, self.size, self.has_texts, self.example = path, size, has_texts, example
        self._folder = folder
        self._maps = self._table = None

    def __contains__(self, key: str) -> bool:
        first, end = self._find(key)
        return first < end

    def texts(self, key: str) -> tuple[str, ...]:
        """Returns the texts of all rows with that key, in the order of the table."""
        first, end = self._find(key)
        _, spans, texts = self._maps
        spans = spans[first:end].tolist()
        return tuple(texts[start:stop].tobytes().decode() for start, stop in spans)

    def values(self, key: str) -> dict[str, Any]:
        """Returns the values of the kept columns in the first row with that key; None for null."""
        if not self.columns:
            return {}
        first, end = self._find(key)
        if first == end:
            return {}
        if self._table is None:
            import pyarrow as pa

            with pa.memory_map(os.path.join(self._folder, "columns.arrow")) as file:
                self._table = pa.ipc.open_file(file).read_all()
        return {name: self._table[name][first].as_py() for name in self.columns}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": None, "_table": None}

    def _find(self, key: str) -> tuple[int, int]:
        """First place of a key among the hashes, and the one after its last."""
        if self._maps is None:
            self._maps = self._open()
        hashes = self._maps[0]
        hashed = np.uint64(hash_key(key))
        first, end = (np.searchsorted(hashes, hashed, side) for side in ("left", "right"))
        return int(first), int(end)

    def _open(self) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Hashes uint64 [N]; of texts, if there are any, spans int64 [N, 2] and bytes uint8."""
        hashes = np.load(os.path.join(self._folder, "hashes.npy"), mmap_mode="r")
        if not self.has_texts:
            return hashes, None, None
        spans = np.load(os.path.join(self._folder, "spans.npy"), mmap_mode="r")
        path = os.path.join(self._folder, "texts.bin")
        empty = os.path.getsize(path) == 0  # nothing to map
        texts = np.zeros(0, np.uint8) if empty else np.memmap(path, np.uint8, "r")
        return hashes, spans, texts


def is_subset(path: str) -> bool:
    """Returns whether a list is a subset file of DataComp."""
    return path.lower().endswith(".npy")


def find_files(path: str, option: str) -> list[str]:
    """Returns the files of a list: itself, or the Parquet files of a folder in order.

    A folder holds parts of one table. What `align curate` or `align decontaminate` wrote beside a
    list is none, and would be taken for one.

    Args:
      path: file or folder.
      option: names the list in messages, e.g. "--keep".

    Raises:
      ValueError: nothing there, no Parquet files, or files of a folder with different columns.
    """
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise ValueError(f"{option} {path} does not exist; it is a Parquet file of keys.")
    names = sorted(name for name in os.listdir(path) if name.endswith(".parquet"))
    files = [os.path.join(path, name) for name in names if name[0] not in "._"]
    if not files:
        raise ValueError(f"{option} {path} holds no .parquet file of keys.")
    first, *others = (_open(file, option).schema_arrow.names for file in files)
    for file, columns in zip(files[1:], others, strict=True):
        if set(columns) != set(first):
            described = "; ".join(
                f"{os.path.basename(name)} has {', '.join(held)}"
                for name, held in ((files[0], first), (file, columns))
            )
            raise ValueError(
                f"{option} {path} holds tables with different columns: {described}. Name one of "
                "them, or a folder of parts of one table."
            )
    return files


def stamp(files: Sequence[str], by: str | None) -> str:
    """Returns 32 hex digits of the content of a list and of how it is joined."""
    return identity.digest([by, *map(identity.of_content, files)])


def column_kinds(files: Sequence[str]) -> dict[str, str]:
    """Returns name -> "text", "int" or "float" of the columns of a list that are such."""
    import pyarrow as pa

    kinds = {}
    for field in [] if is_subset(files[0]) else _open(files[0], "--columns").schema_arrow:
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            kinds[field.name] = "text"
        elif pa.types.is_integer(field.type):
            kinds[field.name] = "int"
        elif pa.types.is_floating(field.type):
            kinds[field.name] = "float"
    return kinds


def write_key_list(
    path: str,
    files: Sequence[str],
    folder: str,
    *,
    option: str,
    texts: bool,
    columns: Sequence[str] = (),
    by: str | None = None,
) -> KeyList:
    """Returns the keys of a list: of the column `by`, or `key` (a Record.key a row) where it lacks.

    Memory holds 32 bytes a row while the list is written, with texts 56.

    Args:
      path: names the list in messages.
      files: of the list, see `find_files`.
      folder: receives the files of the list; made if need be.
      option: names the choice in messages, e.g. "--keep".
      texts: whether to keep the column `text`, if there is one.
      columns: others whose values to keep; those that the tables lack are left out.
      by: metadata of the records that is looked up; None for their key, of a subset file `uid`.

    Raises:
      ValueError: no Parquet file or no column of keys; names the columns that there are.
    """
    os.makedirs(folder, exist_ok=True)
    if is_subset(files[0]):
        by, texts, columns = by or "uid", False, ()
        batches = ((uids, []) for file in files for uids in subsets.read_subset(file))
    else:
        key_columns = [_key_column(file, option, by) for file in files]
        names = _open(files[0], option).schema_arrow.names
        texts = texts and "text" in names
        columns = tuple(column for column in columns if column in names)
        batches = _batches(files, option, key_columns, texts)
    hashes, spans, example = [], [], ""
    with open(os.path.join(folder, "texts.bin"), "wb") as file:
        for keys, batch_texts in batches:
            example = example or next(iter(keys), "")
            hashes.append(np.fromiter(map(hash_key, keys), np.uint64, len(keys)))
            if texts:
                encoded = [text.encode("utf-8", "replace") for text in batch_texts]
                ends = file.tell() + np.cumsum([len(text) for text in encoded], dtype=np.int64)
                spans.append(np.stack([ends - [len(text) for text in encoded], ends], 1))
                file.write(b"".join(encoded))
    hashes = np.concatenate([np.zeros(0, np.uint64), *hashes])
    order = np.argsort(hashes, kind="stable")
    np.save(os.path.join(folder, "hashes.npy"), hashes[order])
    if texts:
        spans = np.concatenate([np.zeros((0, 2), np.int64), *spans])
        np.save(os.path.join(folder, "spans.npy"), spans[order])
    if columns:
        _write_columns(files, os.path.join(folder, "columns.arrow"), key_columns[0], columns, order)
    return KeyList(path, folder, len(hashes), texts, example, columns, by)


def _key_column(file: str, option: str, by: str | None) -> str:
    names = _open(file, option).schema_arrow.names
    column = find_column(names, ("key",) if by is None else (by.lower(), "key"))
    if column is None:
        raise ValueError(
            f"{option} {file} has no column {by or 'key'!r}: it has {', '.join(names)}; give a "
            "table of `align curate` or `align decontaminate`."
        )
    return column


def _write_columns(
    files: Sequence[str], out: str, key: str, columns: Sequence[str], order: np.ndarray
) -> None:
    """Writes columns in the order of the hashes, as a file that is mapped into memory."""
    import pyarrow as pa

    parquet, names = _import_parquet("--columns"), list(dict.fromkeys([key, *columns]))
    table = pa.concat_tables(parquet.read_table(file, columns=names) for file in files)
    table = table.filter(table[key].is_valid()).select(list(columns)).take(pa.array(order))
    with pa.OSFile(out, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def _batches(
    files: Sequence[str], option: str, key_columns: Sequence[str], texts: bool
) -> Iterator[tuple[list[str], list[str]]]:
    for file, column in zip(files, key_columns, strict=True):
        columns = [column, "text"] if texts else [column]
        with _open(file, option) as table:
            for batch in table.iter_batches(_BATCH_ROWS, columns=columns):
                keys = batch[column].to_pylist()
                values = batch["text"].to_pylist() if texts else [""] * len(keys)
                # Keys that are numbers in the table are strings in a Record; no key, no record.
                rows = [
                    (plain_text(k) or str(k), v or "")
                    for k, v in zip(keys, values, strict=True)
                    if k is not None
                ]
                yield [key for key, _ in rows], [text for _, text in rows]


def _open(path: str, option: str) -> "pq.ParquetFile":
    parquet = _import_parquet(option)
    try:
        return parquet.ParquetFile(path)
    except Exception as error:  # pyarrow's own kinds; all mean the same here
        raise ValueError(f"{option} {path} is not a Parquet file: {error}") from error


def _import_parquet(option: str) -> ModuleType:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f"{option} reads Parquet, which needs pip install 'align_jax[parquet]'."
        ) from error
    return parquet
