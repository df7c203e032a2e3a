"""Metadata files -> canonical Parquet parts, the one table that every engine reads.

Parquet, CSV, TSV and JSONL; a file, a glob or a folder of parts. What can differ between engines is
decided here once: types, lower case, white space, what a broken line is. Rules are in rules.py.
"""

import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from align_jax.curate.filter import columns, text_tables, unigrams
from align_jax.curate.filter.text_tables import PROBLEMS, as_float
from align_jax.run.progress import show_progress

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl")
COUNTS = ("num_words", "num_parts", "num_chars")
BATCH_ROWS = 1 << 17
_THREADS = 2
# What str.split() splits at beside spaces, as a class of RE2 and Java: their \s is ASCII only.
WHITE_SPACE = (
    r"\t\n\v\f\r\x1c-\x1f\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}"
    r"\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
)
_TYPES = {"string": pa.string(), "integer": pa.int64(), "number": pa.float64()}


def find_files(source: str) -> list[str]:
    """Returns the table files of a path, a glob or a folder, sorted by name.

    Raises:
      ValueError: none is there, or they are of several kinds.
    """
    if os.path.isdir(source):
        names = sorted(os.listdir(source))
        found = [os.path.join(source, name) for name in names if not name.startswith((".", "_"))]
        found = [path for path in found if path.lower().endswith(SUFFIXES)]
    elif os.path.isfile(source):
        found = [source]
    else:
        found = sorted(path for path in glob.glob(source, recursive=True) if os.path.isfile(path))
    if not found:
        raise ValueError(f"{source}: no such table; expected {', '.join(SUFFIXES)} files.")
    kinds = sorted({os.path.splitext(path)[1].lower() for path in found})
    for kind in kinds:
        if kind not in SUFFIXES:
            raise ValueError(
                f"{source}: cannot read {kind or 'a file without suffix'}; "
                f"known are {', '.join(SUFFIXES)}."
            )
    if len(kinds) > 1:
        raise ValueError(f"{source} holds {' and '.join(kinds)} files; choose one kind by a glob.")
    return found


def present_columns(files: Sequence[str], chosen: Mapping[str, str]) -> list[str]:
    """Returns the canonical columns that at least one of the files has, in their usual order.

    Raises:
      ValueError: a file cannot be read or has no text column.
    """
    present = set()
    for path in files:
        present |= set(_open(path, chosen).found)
    return [name for name in columns.COLUMNS if name in present]


def schema(present: Sequence[str]) -> pa.Schema:
    """Returns the types of the canonical parts that hold the columns `present`, and `key`.

    `row` int64 counts from 0 through all files. `words` is the text in lower case with a single
    space between its unigrams (unigrams.divide), `num_words` of them. `num_parts` and `num_chars`
    (code points) count the parts between white space, and the text with these joined by single
    spaces. `problem` is null for a good row, else an index of PROBLEMS.
    """
    fields = [("row", pa.int64())]
    names = [name for name in columns.COLUMNS if name in present or name == "key"]
    fields += [(name, _TYPES[columns.COLUMNS[name][0]]) for name in names]
    fields += [("words", pa.string()), *((name, pa.int32()) for name in COUNTS)]
    return pa.schema([*fields, ("problem", pa.int8())])


def write_parts(
    files: Sequence[str], chosen: Mapping[str, str], present: Sequence[str], folder: str
) -> int:
    """Writes one canonical part for each file into `folder`; returns the number of rows of all.

    Parts that are there already are kept: each appears when it is complete.

    A row without key column gets `name of the file:number of the row`, from 0; the name is
    relative to the folder that all files share.
    """
    os.makedirs(folder, exist_ok=True)
    base = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in files])
    target, rows, jobs = schema(present), 0, []
    for number, path in enumerate(files):
        jobs.append((_open(path, chosen), os.path.join(folder, f"part-{number:05d}.parquet")))
    sizes = [reader.num_rows for reader, _ in jobs]
    total = None if None in sizes else sum(sizes)

    def batches():
        nonlocal rows
        for reader, part in jobs:
            if os.path.exists(part):
                yield pq.read_metadata(part).num_rows
            else:
                name = os.path.relpath(os.path.abspath(reader.path), base)
                yield from _write_part(reader, name, part, target, rows)
            rows += pq.read_metadata(part).num_rows

    for _ in show_progress(batches(), total, "curate: read", "row", size=int):
        pass
    return rows


def _write_part(reader, name, part, target, first_row):
    temporary = part + ".tmp"
    writer = pq.ParquetWriter(temporary, target, compression="lz4")
    row = first_row

    def finish(job):
        fields, problem, start = job
        return _canonical(fields, problem, target, name, start, first_row)

    with ThreadPoolExecutor(_THREADS) as pool, writer:
        waiting = []
        for fields, problem in reader.batches():
            waiting.append(pool.submit(finish, (fields, problem, row)))
            row += len(problem)
            if len(waiting) > _THREADS:
                writer.write_table(waiting.pop(0).result())
            yield len(problem)
        for job in waiting:
            writer.write_table(job.result())
    os.replace(temporary, part)


def _canonical(fields, problem, target, name, start, first_row):
    rows = np.arange(start, start + len(problem))
    done: dict[str, pa.Array] = {"row": pa.array(rows)}
    for column in target.names:
        kind = columns.COLUMNS[column][0] if column in columns.COLUMNS else None
        raw = fields.get(column, [])
        if kind == "string":
            if not raw:
                done[column] = pa.nulls(len(rows), pa.string())
                continue
            done[column], bad = _as_string(raw[0])
            problem = np.where((problem < 0) & bad, PROBLEMS.index("not_utf8"), problem)
        elif kind:
            values = [_as_number(array) for array in raw]
            value = pa.nulls(len(rows), pa.float64()) if not values else values[0]
            if len(values) > 1:
                value = pc.max_element_wise(*values)
            done[column] = _as_integer(value) if kind == "integer" else value
    if "key" not in fields:
        numbers = (rows - first_row).astype(str)
        done["key"] = pc.binary_join_element_wise(name, pa.array(numbers), ":")
    done["text"] = pc.fill_null(done["text"], "")
    parts = normalise(done["text"])
    done["words"] = unigrams.divide(parts)
    done["num_words"], done["num_parts"] = _count(done["words"]), _count(parts)
    done["num_chars"] = pc.utf8_length(parts)
    done["problem"] = pa.array(problem, pa.int8(), mask=problem < 0)
    return pa.table([done[column] for column in target.names], schema=target)


def _count(parts):
    blank = pc.equal(parts, "")
    count = pc.add(pc.count_substring(parts, " "), 1)
    return pc.if_else(blank, pa.scalar(0, pa.int32()), count).cast(pa.int32())


def normalise(texts: pa.Array) -> pa.Array:
    """Returns the texts in lower case, white space (Unicode) single, none at either end.

    Lower case is Unicode's simple mapping, one code point to one, the same on every machine.
    """
    texts = pc.utf8_trim_whitespace(texts)
    odd = pc.match_substring_regex(texts, rf"  |[{WHITE_SPACE}]")
    if pc.any(odd).as_py():
        parts = pc.utf8_split_whitespace(pc.filter(texts, odd))
        texts = pc.replace_with_mask(texts, odd, pc.binary_join(parts, " "))
    ascii_only = pc.string_is_ascii(texts)
    if pc.all(ascii_only).as_py():
        return pc.ascii_lower(texts)
    lower = pc.utf8_lower(pc.filter(texts, pc.invert(ascii_only)))
    plain = pc.ascii_lower(pc.if_else(ascii_only, texts, ""))
    return pc.replace_with_mask(plain, pc.invert(ascii_only), lower)


def _as_string(array):
    """Returns the strings and a mask of those that are not UTF-8, repaired with U+FFFD."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_floating(array.type):  # pandas makes floats of integers beside nulls
        whole = _as_integer(array.cast(pa.float64()))
        array = pc.coalesce(whole.cast(pa.string()), array.cast(pa.string()))
    if pa.types.is_nested(array.type):
        array = pa.array([None if v is None else json.dumps(v) for v in array.to_pylist()])
    try:
        array = array.cast(pa.string())
        array.validate(full=True)
        return array, False
    except pa.ArrowInvalid:
        raw = array.cast(pa.binary()).to_pylist()
    text = [None if value is None else value.decode("utf-8", "replace") for value in raw]
    bad = [t is not None and t.encode() != v for t, v in zip(text, raw, strict=True)]
    return pa.array(text, pa.string()), np.array(bad)


def _as_number(array):
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_null(array.type):
        return array.cast(pa.float64())
    if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        array = pa.array([as_float(value) for value in array.to_pylist()], pa.float64())
    array = array.cast(pa.float64(), safe=False)
    return pc.if_else(pc.is_finite(array), array, pa.scalar(None, pa.float64()))


def _as_integer(array):
    usable = pc.less(pc.abs(array), 2.0**62)
    usable = pc.and_(usable, pc.equal(pc.floor(array), array))
    return pc.if_else(usable, array, pa.scalar(None, pa.float64())).cast(pa.int64(), safe=False)


def _open(path, chosen):
    suffix = os.path.splitext(path)[1].lower()
    readers = {".parquet": _Parquet, ".jsonl": text_tables.JsonLines}
    return readers.get(suffix, text_tables.Separated)(path, chosen)


class _Parquet:
    """Batches of a Parquet file: ({canonical: [arrays]}, problem [rows] int8, -1 for none)."""

    def __init__(self, path, chosen):
        self.path = path
        try:
            with pq.ParquetFile(path) as file:
                arrow, rows = file.schema_arrow, file.metadata.num_rows
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(f"{path} is not a readable Parquet file: {error}") from None
        sample = {field.name: _holds_text(field.type) for field in arrow}
        self.found = columns.find_columns(path, sample, chosen)
        self._status = "status" if {"status", "error_message"} <= set(sample) else None
        self.num_rows = rows

    def batches(self) -> Iterator:
        wanted = sorted({name for names in self.found.values() for name in names})
        wanted += [self._status] if self._status else []
        try:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(BATCH_ROWS, columns=wanted):
                    yield self._batch(batch)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{self.path} is not a readable Parquet file: {error}") from None
        except OSError as error:  # a damaged page, not a disk that is full
            raise ValueError(f"{self.path} cannot be read: {error}") from None

    def _batch(self, batch):
        problem = np.full(batch.num_rows, -1, np.int8)
        if self._status:
            done = pc.fill_null(pc.equal(batch[self._status], "success"), False)
            problem[~done.to_numpy(zero_copy_only=False)] = PROBLEMS.index("not_downloaded")
        text = batch[self.found["text"][0]]
        if pa.types.is_list(text.type) or pa.types.is_large_list(text.type):
            empty = pc.fill_null(pc.equal(pc.list_value_length(text), 0), True)
            if pc.any(empty).as_py():
                text = pa.array([value or [None] for value in text.to_pylist()], text.type)
            rows, flat = pc.list_parent_indices(text), pc.list_flatten(text)
            batch, problem = batch.take(rows), problem[rows.to_numpy()]
            fields = {n: [batch[c] for c in names] for n, names in self.found.items()}
            return fields | {"text": [flat]}, problem
        return {n: [batch[c] for c in names] for n, names in self.found.items()}, problem


def _holds_text(kind):
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or (pa.types.is_dictionary(kind) and _holds_text(kind.value_type))
    )
