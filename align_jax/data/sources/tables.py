"""Caption tables: files that pair image names with captions, as rows about one image each.

Rows about the same image are merged into one, so that five captions in five rows become one image
with five captions. Reading the files is in table_files.py; where the images are is the business of
files.py.
"""

import itertools
import json
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from align_jax.data.sources.column_names import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    find_column,
    find_columns,
)
from align_jax.data.sources.record import is_usable, weigh_captions
from align_jax.data.sources.table_files import (
    Batch,
    Table,
    as_list,
    caption_cells,
    captions_of,
    open_table,
    plain_text,
)
from align_jax.storage.problems import Problems
from align_jax.storage.text import check_caption


class Row(NamedTuple):
    """One image of a table."""

    image: str
    shard: str  # archive that holds the image; "" when the table does not say
    captions: tuple[str, ...]
    weights: tuple[float, ...] = ()  # of the captions, see record.Record
    columns: tuple[str, ...] = ()


def read_table(
    path: str, problems: Problems, weights: Mapping[str, float] | None = None
) -> list[Row]:
    """Returns the table's images in order of first appearance, with all their captions.

    Args:
      path: see table_files.open_table. Columns are matched with IMAGE_COLUMNS, of which the first
        match wins, and CAPTION_COLUMNS, of which the first does that has a caption in the row;
        `shard` is optional.
      problems: see `batch_captions`; also `row_malformed` for a row without image name.
      weights: caption columns to read, all of them, with their weights (record.weigh_captions);
        None reads those that are recognised.

    Raises:
      ValueError: the table has no image or no caption column, or the file is not of its format.
    """
    table = open_table(path)
    if not table.names:  # it is empty, or no line of it can be read
        for batch in table.read([]):
            batch_captions(table, batch, [], problems)
        return []
    image = _column(table, table.plain_names, IMAGE_COLUMNS, "image")
    shard = find_column(table.plain_names, ("shard",))
    if weights is None:
        _column(table, table.text_names, CAPTION_COLUMNS, "caption")  # there must be one
        columns = {"": table.caption_names()}
    else:
        weights = {name.strip().lower(): weight for name, weight in weights.items()}
        columns = _named_columns(table, weights)
    found: set[str] = set()  # columns with a caption
    merged: dict[tuple[str, str], dict[str, list[str]]] = {}
    texts = list(columns.values())
    for batch in table.read([image, *itertools.chain(*texts), *([shard] if shard else [])]):
        rows = batch_captions(table, batch, texts, problems)
        images = map(plain_text, as_list(batch.columns[image]))
        shards = map(plain_text, as_list(batch.columns[shard]) if shard else itertools.repeat(""))
        for number, name, of, cells in zip(batch.numbers, images, shards, rows, strict=False):
            if cells is None:
                continue
            if not name or not name.strip():
                problems.add("row_malformed", table.place(number))
                continue
            row = merged.setdefault((of or "", normalise_name(name)), {})
            for column, captions in zip(columns, cells, strict=True):
                row.setdefault(column, []).extend(captions)
                if captions:
                    found.add(column)
    if weights is None:
        return [Row(name, of, tuple(row[""])) for (of, name), row in merged.items()]
    for column, (name,) in columns.items():
        if column not in found and name not in table.names:
            raise _no_column(table, column)
    return [Row(name, of, *weigh_captions(row, weights)) for (of, name), row in merged.items()]


def batch_captions(
    table: Table, batch: Batch, columns: Sequence[Sequence[str]], problems: Problems
) -> list[tuple[list[str], ...] | None]:
    """Returns of each row of a batch the captions in each of some columns; None if it is lost.

    Args:
      table: what the batch is from.
      batch: rows.
      columns: names of columns with captions, of each those that stand in for it where it has
        none, see table_files.caption_cells.
      problems: receives `row_malformed` (a line that is no row, or a caption that is no text or too
        long) and `text_repaired` (a row that is used, with U+FFFD for what was no text).
    """
    cells = [list(map(captions_of, as_list(caption_cells(batch, names)))) for names in columns]
    rows: list[tuple | None] = list(zip(*cells, strict=True)) or [()] * len(batch.numbers)
    for i, row in enumerate(rows):
        if i in batch.lost or None in row:
            rows[i] = None
            problems.add("row_malformed", table.place(batch.numbers[i]))
        elif i in batch.repaired:
            problems.add("text_repaired", table.place(batch.numbers[i]))
    return rows


def normalise_name(name: str) -> str:
    """Returns the name of an image as archives and folders have it: `./a//1.jpg` is `a/1.jpg`."""
    name = name.strip()
    if "://" in name:
        return name
    if "\\" in name and "/" not in name:
        name = name.replace("\\", "/")  # written on Windows
    return posixpath.normpath(name) if "/" in name else name


def parse_sidecar(
    text: str, name: str, weights: Mapping[str, float] | None = None
) -> tuple[tuple[str, ...], tuple[float, ...], tuple[str, ...]]:
    """Returns (captions, weights, columns) of one JSON object, as a Record has them.

    Args:
      text: of the file.
      name: of the file, for messages.
      weights: fields to read with their weights (record.weigh_captions); None reads the first of
        CAPTION_COLUMNS that has a caption and gives neither weights nor columns.

    Raises:
      text.BadText: a caption is too long.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, integers or nesting beyond Python's limits
        return (), (), ()
    if not isinstance(fields, dict):
        return (), (), ()
    if weights is None:
        captions: list[str] = []
        for column in find_columns(fields, CAPTION_COLUMNS):
            captions = _captions_in(fields[column], name) or captions
            if any(map(is_usable, captions)):
                break
        return tuple(captions), (), ()
    weights = {name.strip().lower(): weight for name, weight in weights.items()}
    columns = {
        column: _captions_in(fields.get(find_column(fields, (column,))), name) for column in weights
    }
    return weigh_captions(columns, weights)


def _column(table: Table, names: Sequence[str], known: Sequence[str], what: str) -> str:
    found = find_column(names, known)
    if found is None:
        raise ValueError(
            f"{table.path} has no {what} column: it has {table.describe()}; recognised are "
            f"{', '.join(known)}."
        )
    return found


def _named_columns(table: Table, wanted: Iterable[str]) -> dict[str, list[str]]:
    """Lower-case name -> column of the table, as the only one."""
    columns = {name: find_column(table.text_names, (name,)) for name in wanted}
    for name, column in columns.items():
        if column is None and not table.is_open:
            raise _no_column(table, name)
    return {name: [column or name] for name, column in columns.items()}


def _no_column(table: Table, name: str) -> ValueError:
    return ValueError(f"{table.path} has no column {name!r}: it has {table.describe()}.")


def _captions_in(cell: Any, name: str) -> list[str]:
    return [check_caption(caption, name) for caption in captions_of(cell, limit=None) or ()]
