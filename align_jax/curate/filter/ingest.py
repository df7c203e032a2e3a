"""Metadata files -> canonical Parquet parts, the one table that every engine reads.

Parquet, CSV, TSV and JSONL; a file, a glob or a folder of parts. What can differ between engines is
decided here once: types, lower case, white space, what a broken line is. Rules are in rules.py.
"""

import dataclasses
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from align_jax.curate.filter import columns, unigrams
from align_jax.curate.filter.metadata_table import Metadata, as_integer
from align_jax.storage import writing
from align_jax.storage.paths import check_kept_alone, find_paths

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl")
COUNTS = ("num_words", "num_parts", "num_chars")
_THREADS = 2
ROW_BITS = 40  # of `row`: the place in a part; above them the number of the part
_REPAIRED = b"text_repaired"
# What str.split() splits at beside spaces, as a class of RE2 and Java: their \s is ASCII only.
WHITE_SPACE = (
    r"\t\n\v\f\r\x1c-\x1f\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}"
    r"\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
)
_TYPES = {"string": pa.string(), "integer": pa.int64(), "number": pa.float64()}


def find_files(source: str) -> list[str]:
    """Returns the table files of a path, a glob or a folder, sorted by name.

    Raises:
      ValueError: none is there, they are of several kinds, or both results of a curation.
    """
    if os.path.isdir(source):
        names = sorted(os.listdir(source))
        found = [os.path.join(source, name) for name in names if not name.startswith((".", "_"))]
        found = [path for path in found if path.lower().endswith(SUFFIXES)]
    elif os.path.isfile(source):
        found = [source]
    else:
        found = [path for path in find_paths(source) if os.path.isfile(path)]
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
    check_kept_alone(source, found)
    return found


def present_columns(files: Sequence[str], chosen: Mapping[str, str]) -> list[str]:
    """Returns the canonical columns that at least one of the files has, in their usual order.

    Raises:
      ValueError: a file cannot be read or has no text column.
    """
    present = set()
    for path in files:
        present |= set(Metadata(path, chosen).found)
    return [name for name in columns.COLUMNS if name in present]


def other_columns(files: Sequence[str], chosen: Mapping[str, str]) -> dict[str, str]:
    """Returns {name: type} of what else the files have; text where they have different types."""
    others: dict[str, str] = {}
    for path in files:
        for name, kind in Metadata(path, chosen).others.items():
            others[name] = kind if others.get(name, kind) == kind else "string"
    return others


def schema(
    present: Sequence[str], others: Mapping[str, str] = types.MappingProxyType({})
) -> pa.Schema:
    """Returns the types of the canonical parts that hold the columns `present`, `key` and others.

    `row` int64 is the number of the part times 2^40 and the place in it, so that it ascends through
    all parts and each can be made without the others. `words` is the text in lower case with a
    single space between its unigrams (unigrams.divide), `num_words` of them. `num_parts` and
    `num_chars` (code points) count the parts between white space, and the text with these joined by
    single spaces. `problem` is null for a good row, else an index of PROBLEMS.
    """
    fields = [("row", pa.int64())]
    names = [name for name in columns.COLUMNS if name in present or name == "key"]
    fields += [(name, _TYPES[columns.COLUMNS[name]]) for name in names]
    fields += [(name, _TYPES[kind]) for name, kind in others.items()]
    fields += [("words", pa.string()), *((name, pa.int32()) for name in COUNTS)]
    return pa.schema([*fields, ("problem", pa.int8())])


@dataclasses.dataclass(frozen=True)
class File:
    """A table file, as a unit of work; `expected` is its rows, 1 where that is not known."""

    number: int
    path: str
    expected: int


def part_path(folder: str, number: int) -> str:
    """Returns the path of the canonical part of a file."""
    return os.path.join(folder, f"part-{number:05d}.parquet")


def write_part(
    file: File,
    chosen: Mapping[str, str],
    present: Sequence[str],
    folder: str,
    base: str,
    others: Mapping[str, str] = types.MappingProxyType({}),
) -> Iterator[int]:
    """Writes the canonical part of a file into `folder`; yields the number of rows of each batch.

    A part that is there already is kept: it appears when it is complete.

    A row without key column gets `name of the file:number of the row`, from 0; the name is
    relative to `base`, the folder that all files share.
    """
    part = part_path(folder, file.number)
    if os.path.exists(part):
        yield pq.read_metadata(part).num_rows
        return
    reader = Metadata(file.path, chosen)
    reader.others = dict(others)
    name = os.path.relpath(os.path.abspath(file.path), base)
    yield from _write_part(reader, name, part, schema(present, others), file.number << ROW_BITS)


def count_repaired(parts: Sequence[str]) -> int:
    """Returns in how many rows of the tables that became `parts` text was repaired."""
    return sum(int(pq.read_metadata(part).metadata[_REPAIRED]) for part in parts)


def _write_part(
    reader: Metadata, name: str, part: str, target: pa.Schema, first_row: int
) -> Iterator[int]:
    """Yields the number of rows of each batch that was read."""
    row = first_row

    def finish(job: tuple[dict[str, list[pa.Array]], np.ndarray, int]) -> pa.Table:
        fields, problem, start = job
        return _canonical(fields, problem, target, name, start, first_row)

    with (
        writing.replacing(part) as temporary,
        ThreadPoolExecutor(_THREADS) as pool,
        pq.ParquetWriter(temporary, target, compression="lz4") as writer,
    ):
        waiting = []
        for fields, problem in reader.batches():
            waiting.append(pool.submit(finish, (fields, problem, row)))
            row += len(problem)
            if len(waiting) > _THREADS:
                writer.write_table(waiting.pop(0).result())
            yield len(problem)
        for job in waiting:
            writer.write_table(job.result())
        writer.add_key_value_metadata({_REPAIRED: str(reader.repaired)})


def _canonical(
    fields: dict[str, list[pa.Array]],
    problem: np.ndarray,
    target: pa.Schema,
    name: str,
    start: int,
    first_row: int,
) -> pa.Table:
    """Returns one batch of Metadata.batches, with its `problem` int8 [rows], as `target` says."""
    rows = np.arange(start, start + len(problem))
    done: dict[str, pa.Array] = {"row": pa.array(rows)}
    for column in target.names:
        raw = fields.get(column, [])
        if column in columns.RESERVED:
            continue
        value = raw[0] if raw else pa.nulls(len(rows), target.field(column).type)
        if len(raw) > 1:
            value = pc.max_element_wise(*raw)
        is_integer = pa.types.is_integer(target.field(column).type)
        done[column] = as_integer(value) if raw and is_integer else value
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


def _count(parts: pa.Array) -> pa.Array:
    """Number of parts between single spaces of each text, int32."""
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
