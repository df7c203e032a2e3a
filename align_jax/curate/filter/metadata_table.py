"""One metadata table as Arrow arrays of canonical columns; what cannot be used is marked.

The file is read by data/sources/table_files.py, like those of pairs and of vocabularies.
"""

import json
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from align_jax.curate.filter import columns
from align_jax.data.sources.column_names import IMAGE_COLUMNS
from align_jax.data.sources.table_files import (
    Batch,
    caption_cells,
    captions_of,
    open_table,
    plain_text,
)
from align_jax.data.sources.tables import normalise_name
from align_jax.storage.text import MAX_CAPTION_CHARS

PROBLEMS = ("row_malformed", "not_downloaded")  # dropped before any rule
_MALFORMED, _NOT_DOWNLOADED = range(2)
_SHOWN_CHARS = 200  # of a row that is malformed, as its text
_ODD_NAME = r"^\s|\s$|^\./|/\.?/|/\.\.?/|/\.?$|\\"


class Metadata:
    """A metadata table in batches.

    Attributes:
      table: the file.
      found: {canonical name: names in the file}.
      others: {name: type} of further columns with plain values, which are carried along.
      left_out: names of those that no engine takes: nested values, odd or reserved names.
      repaired: rows read so far whose text was repaired.
    """

    def __init__(self, path: str, chosen: Mapping[str, str]):
        self.table = open_table(path)
        self.found = columns.find_columns(self.table, chosen)
        self.others = columns.other_columns(self.table, self.found)
        # img2dataset's tables hold what could not be downloaded, too.
        self._status = ["status"] if {"status", "error_message"} <= set(self.table.names) else []
        used = {name for names in self.found.values() for name in names}
        used |= {*self.others, *self._status}
        self.left_out = [name for name in self.table.names if name not in used]
        (key,) = self.found.get("key", [""])
        self._key_is_image = key.strip().lower() in IMAGE_COLUMNS
        self.repaired = 0

    def batches(self) -> Iterator[tuple[dict[str, list[pa.Array]], np.ndarray]]:
        """Yields ({canonical: arrays}, problem [rows] int8, an index of PROBLEMS, -1 for none)."""
        wanted = {name for names in self.found.values() for name in names}
        wanted = sorted(wanted | (self.others.keys() & set(self.table.names)))
        for batch in self.table.read([*wanted, *self._status]):
            self.repaired += len(batch.repaired)
            if len(batch.numbers):
                yield self._batch(batch)

    def _batch(self, batch: Batch) -> tuple[dict[str, list[pa.Array]], np.ndarray]:
        problem = np.full(len(batch.numbers), -1, np.int8)
        for name in self._status:
            done = pc.fill_null(pc.equal(_strings(batch.columns[name]), "success"), False)
            problem[~done.to_numpy(zero_copy_only=False)] = _NOT_DOWNLOADED
        problem[list(batch.lost)] = _MALFORMED
        text, bad = _captions(caption_cells(batch, self.found["text"]), batch.lost)
        problem[list(bad)] = _MALFORMED
        fields = {}
        for ours, names in self.found.items():
            make = _strings if columns.COLUMNS[ours] == "string" else _numbers
            fields[ours] = [] if ours == "text" else [make(batch.columns[name]) for name in names]
        for name in self.others.keys() & set(self.table.names):
            make = _strings if self.others[name] == "string" else _numbers
            fields[name] = [make(batch.columns[name])]
        if self._key_is_image:
            fields["key"] = [_normalised(array) for array in fields["key"]]
        if pa.types.is_list(text.type):
            rows, text = _unnest(text)
            problem = problem[rows.to_numpy()]
            fields = {n: [array.take(rows) for array in arrays] for n, arrays in fields.items()}
        return fields | {"text": [text]}, problem


def _captions(cells: list | pa.Array, lost: Mapping[int, str]) -> tuple[pa.Array, set[int]]:
    """Captions as string or list<string>, and the rows that hold something else.

    What is lost or something else is shown by its start.
    """
    if not isinstance(cells, list):
        return _without_long(cells.cast(pa.string()) if pa.types.is_null(cells.type) else cells)
    cells, bad = list(cells), set()
    for i, start in lost.items():
        cells[i] = start
    try:
        return _without_long(pa.array(cells, pa.string()))
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # lists, numbers, objects
        pass
    for i, cell in enumerate(cells):
        captions = captions_of(cell)
        if captions is None:
            bad.add(i)
            captions = [json.dumps(cell, ensure_ascii=False)[:_SHOWN_CHARS]]
        cells[i] = captions
    return pa.array(cells, pa.list_(pa.string())), bad


def _without_long(texts: pa.Array) -> tuple[pa.Array, set[int]]:
    """The texts, and the rows with one beyond the limit, of which only the start is kept."""
    flat = texts.flatten() if pa.types.is_list(texts.type) else texts
    long = pc.greater(pc.fill_null(pc.binary_length(flat), 0), MAX_CAPTION_CHARS)
    if not pc.any(long).as_py():
        return texts, set()
    cells = texts.to_pylist()
    bad = {i for i, cell in enumerate(cells) if captions_of(cell) is None}
    for i in bad:
        cell = cells[i]
        shown = max(filter(None, cell), key=len) if isinstance(cell, list) else cell
        cells[i] = [shown[:_SHOWN_CHARS]] if isinstance(cell, list) else shown[:_SHOWN_CHARS]
    return pa.array(cells, texts.type), bad


def _unnest(captions: pa.Array) -> tuple[pa.Array, pa.Array]:
    """(row, caption) of each caption in lists; a row without any has null."""
    flat, rows = captions.flatten(), pc.list_parent_indices(captions)
    there = flat.is_valid()
    flat, rows = flat.filter(there), rows.filter(there)
    count = np.bincount(rows.to_numpy(), minlength=len(captions))
    empty = np.flatnonzero(count == 0)
    if len(empty):
        flat = pa.concat_arrays([flat, pa.nulls(len(empty), pa.string())])
        rows = np.concatenate([rows.to_numpy(), empty])
        order = np.argsort(rows, kind="stable")
        flat, rows = flat.take(pa.array(order)), pa.array(rows[order])
    return rows, flat


def _strings(cells: list | pa.Array) -> pa.Array:
    if isinstance(cells, list):
        try:
            return pa.array(cells, pa.string())
        except (pa.ArrowInvalid, pa.ArrowTypeError):  # numbers, objects
            return pa.array([plain_text(cell) for cell in cells], pa.string())
    if pa.types.is_floating(cells.type):  # pandas makes floats of integers beside nulls
        whole = as_integer(cells.cast(pa.float64()))
        return pc.coalesce(whole.cast(pa.string()), cells.cast(pa.string()))
    return cells.cast(pa.string())


def _numbers(cells: list | pa.Array) -> pa.Array:
    if not isinstance(cells, list):
        kind = cells.type
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind):
            return _finite(cells.cast(pa.float64(), safe=False))
        cells = cells.to_pylist()
    try:
        values = [None if cell is None or cell == "" else float(cell) for cell in cells]
    except (TypeError, ValueError, OverflowError):
        values = [_as_float(cell) for cell in cells]
    return _finite(pa.array(values, pa.float64()))


def _as_float(cell: object) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        return None


def _finite(array: pa.Array) -> pa.Array:
    return pc.if_else(pc.is_finite(array), array, pa.scalar(None, pa.float64()))


def _normalised(names: pa.Array) -> pa.Array:
    """Names of images as tables.normalise_name writes them."""
    odd = pc.fill_null(pc.match_substring_regex(names, _ODD_NAME), False)
    if not pc.any(odd).as_py():
        return names
    done = [normalise_name(name) for name in names.filter(odd).to_pylist()]
    return pc.replace_with_mask(names, odd, pa.array(done, pa.string()))


def as_integer(array: pa.Array) -> pa.Array:
    """Returns float64 numbers as int64, null where they are not whole."""
    usable = pc.less(pc.abs(array), 2.0**62)
    usable = pc.and_(usable, pc.equal(pc.floor(array), array))
    return pc.if_else(usable, array, pa.scalar(None, pa.float64())).cast(pa.int64(), safe=False)
