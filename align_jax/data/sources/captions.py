"""Captions of tables without images, a few thousand at a time: what a vocabulary is learned from.

Tables whose rows belong to images are read by tables.py, sources of pairs opened by open_source.py.
"""

import csv
import glob
import itertools
import json
import os
import re
from collections.abc import Iterator

from align_jax.data.sources.tables import CAPTION_COLUMNS, IMAGE_COLUMNS

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".txt")

_ROWS = 4096


def is_table(spec: str) -> bool:
    """Returns whether a path or glob names tables of captions, not a source of pairs."""
    return _suffix(spec) in SUFFIXES and "?images=" not in spec and "&images=" not in spec


def find_tables(spec: str) -> list[str]:
    """Returns the caption tables that a path or a glob names, sorted.

    Raises:
      ValueError: there is none, or a file is of another format.
    """
    paths = [spec] if os.path.isfile(spec) else glob.glob(spec, recursive=True)
    for path in paths:
        if not is_table(path):
            raise ValueError(f"{path} is no table of captions; known: {', '.join(SUFFIXES)}.")
    if not paths:
        raise ValueError(f"{spec}: no such table of captions; known: {', '.join(SUFFIXES)}.")
    return sorted(paths)


def read_captions(path: str, column: str | None = None) -> Iterator[tuple[list[str], int]]:
    """Yields (captions, bytes read since the last ones) of a table.

    `.parquet`, `.csv` (comma, tab, ; or | as the header shows), `.tsv` (no quoting), `.jsonl` (an
    object a line), `.txt` (a caption a line, or as .csv if the header names images and captions).
    A cell may be a list of captions; rows that have none or cannot be read are passed over. A TSV
    of captions and URLs alone needs no header (CC3M, CC12M). Bytes that are no UTF-8 become U+FFFD.

    Args:
      path: of one file.
      column: where the captions are, without regard to case; None takes the first of
        CAPTION_COLUMNS that is there. Of no use for `.txt`.

    Raises:
      ValueError: there is no such column, or the file is not of its format.
    """
    if _suffix(path) == ".parquet":
        yield from _read_parquet(path, column)
        return
    read = {".jsonl": _read_jsonl, ".txt": _read_lines}.get(_suffix(path), _read_csv)
    done = 0
    with open(path, "rb") as raw:
        captions = read(path, _decode(raw), column)
        while batch := list(itertools.islice(captions, _ROWS)):
            yield batch, raw.tell() - done
            done = raw.tell()


def _suffix(path):
    return os.path.splitext(path)[1].lower()


def _decode(raw):
    """Lines of text; a TextIOWrapper would not tell how far it has read."""
    for number, line in enumerate(raw):
        text = line.decode("utf-8", "replace")
        yield text.removeprefix("\ufeff") if number == 0 else text


def _read_lines(path, lines, column):
    first = next(lines, "")
    lines = itertools.chain([first], lines)
    names = set(re.split(r"[,\t;|]", first.strip().lower()))
    if names & set(CAPTION_COLUMNS) and names & set(IMAGE_COLUMNS):  # Flickr's captions.txt
        yield from _read_csv(path, lines, column)
        return
    for line in lines:
        yield line.rstrip("\r\n")


def _read_jsonl(path, lines, column):
    name, names = None, []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            if name is None:
                names = list(row)
                name = _match_column(names, column)
            yield from _cell_captions(row.get(name))
    if name is None and names:
        raise _no_column(path, names, column)


def _read_csv(path, lines, column):
    first = next(lines, "")
    is_tsv = _suffix(path) == ".tsv"
    delimiter = next((mark for mark in ",\t;|" if mark in first and not is_tsv), "\t")
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    lines = itertools.chain([first], lines)
    rows = csv.reader(lines, delimiter=delimiter, quoting=quoting, skipinitialspace=True)
    try:
        header = next(rows, [])
        urls = [cell.startswith(("http://", "https://")) for cell in header]
        if is_tsv and column is None and sorted(urls) == [False, True]:
            index, width = urls.index(False), 2
            yield header[index]
        else:
            name = _match_column(header, column)
            if name is None:
                raise _no_column(path, header, column)
            index, width = header.index(name), len(header)
        for row in rows:
            if len(row) == width:  # else an unquoted delimiter has cut the caption
                yield row[index]
    except csv.Error as error:
        raise ValueError(f"{path}:{rows.line_num} is not valid CSV: {error}.") from error


def _read_parquet(path, column):
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading it needs pip install 'align_jax[parquet]'.") from error
    try:
        file = parquet.ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error
    with file:
        names = file.schema_arrow.names
        name = _match_column(names, column)
        if name is None:
            raise _no_column(path, names, column)
        bytes_per_row = os.path.getsize(path) / max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(_ROWS, columns=[name]):
            cells = batch.column(0).to_pylist()
            captions = [caption for cell in cells for caption in _cell_captions(cell)]
            yield captions, round(bytes_per_row * len(cells))


def _match_column(names, column):
    known = {name.strip().lower(): name for name in reversed(names)}
    wanted = CAPTION_COLUMNS if column is None else (column.strip().lower(),)
    return next((known[name] for name in wanted if name in known), None)


def _no_column(path, names, column):
    if column is None:
        wanted = f"column of captions ({', '.join(CAPTION_COLUMNS)}); name it with --column"
    else:
        wanted = f"column {column!r}"
    return ValueError(f"{path} has no {wanted}: it has {', '.join(names)}.")


def _cell_captions(cell):
    cells = cell if isinstance(cell, list) else [cell]
    return [caption for caption in cells if isinstance(caption, str)]
