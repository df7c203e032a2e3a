"""Parquet files as tables (table_files.py): which Arrow types hold text, and text that is sound."""

import os
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from align_jax.data.sources import table_files
from align_jax.storage.text import ODD_CHARACTERS, clean


class ParquetTable(table_files.Table):
    """A Parquet file; columns of other types than text, numbers and lists of texts are not read."""

    _place = "{}[{}]"

    def __init__(self, path: str):
        try:
            with pq.ParquetFile(path) as file:
                schema, self.num_rows = file.schema_arrow, file.metadata.num_rows
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a readable Parquet file: {error}") from None
        self._types = {field.name: field.type for field in schema}
        super().__init__(path, schema.names, {n: _is_text(t) for n, t in self._types.items()})
        self.text_names = [n for n, t in self._types.items() if _holds_captions(t)]
        self.plain_names = [n for n, t in self._types.items() if _is_plain(t)]

    def kind(self, name: str) -> str:
        kind = self._types[name]
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if pa.types.is_integer(kind):
            return "integer"
        return "number" if pa.types.is_floating(kind) else "string"

    def describe(self) -> str:
        usable = {*self.text_names, *self.plain_names}
        return (
            ", ".join(n if n in usable else f"{n} ({t})" for n, t in self._types.items()) or "none"
        )

    def read(self, columns: Sequence[str]) -> Iterator[table_files.Batch]:
        names = list(dict.fromkeys(columns))
        size, start = os.path.getsize(self.path), 0
        try:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(table_files.BATCH_ROWS, columns=names):
                    repaired: set[int] = set()
                    found = {name: _sound(batch.column(name), repaired) for name in names}
                    numbers = range(start, start + batch.num_rows)
                    share = size * batch.num_rows // max(1, self.num_rows)
                    yield table_files.Batch(found, numbers, {}, repaired, share)
                    start += batch.num_rows
        except (pa.ArrowException, OSError) as error:  # a damaged page
            raise ValueError(f"{self.path} cannot be read: {error}") from None


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(is_(kind) for is_ in texts)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_list(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_(kind) for is_ in lists)


def _holds_captions(kind: pa.DataType) -> bool:
    """Text, lists of texts, or nulls alone. Spark may write text as bytes."""
    if _is_list(kind):
        kind = kind.value_type
    return _is_text(kind) or _is_bytes(kind) or pa.types.is_null(kind)


def _is_plain(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return number or _is_text(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)


def _sound(array: pa.Array, repaired: set[int]) -> pa.Array:
    """Text as string, lists as list<string>, numbers as they are; adds rows repaired."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        return _sound(array.dictionary_decode(), repaired)
    if _is_text(kind) or _is_bytes(kind):
        array, bad = _sound_text(array)
        repaired |= set(bad)
    elif _is_list(kind):
        array = array.cast(pa.list_(kind.value_type))
        if pa.types.is_null(kind.value_type):
            return array.cast(pa.list_(pa.string()))
        flat, bad = _sound_text(array.flatten())
        parents = pc.list_parent_indices(array).to_numpy()
        repaired |= set(parents[bad].tolist())
        offsets = np.append(0, np.cumsum(pc.fill_null(pc.list_value_length(array), 0)))
        mask = array.is_null() if array.null_count else None
        array = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, mask=mask)
    return array


def _sound_text(array: pa.Array) -> tuple[pa.Array, list[int]]:
    """Valid UTF-8 as string, and the positions of what had to be repaired with U+FFFD."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    try:
        sound = array.cast(pa.string())
        sound.validate(full=True)
        odd = pc.fill_null(pc.match_substring_regex(sound, ODD_CHARACTERS), False)
        if not pc.any(odd).as_py():
            return sound, []
        bad = np.flatnonzero(odd.to_numpy(zero_copy_only=False)).tolist()
        return pc.replace_substring_regex(sound, ODD_CHARACTERS, "\ufffd"), bad
    except pa.ArrowInvalid:
        raw = array.cast(pa.binary()).to_pylist()
    texts = [None if value is None else clean(value.decode("utf-8", "replace")) for value in raw]
    bad = [i for i, text in enumerate(texts) if text is not None and text.encode() != raw[i]]
    return pa.array(texts, pa.string()), bad
