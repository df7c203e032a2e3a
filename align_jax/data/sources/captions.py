"""Captions of tables without images, a few thousand at a time: what a vocabulary is learned from.

Tables whose rows belong to images are read by tables.py, sources of pairs opened by open_source.py;
all tables go through table_files.py.
"""

import os
from collections.abc import Iterator

from align_jax.data.sources.column_names import CAPTION_COLUMNS, find_column
from align_jax.data.sources.table_files import TABLE_SUFFIXES, Table, open_table
from align_jax.data.sources.tables import batch_captions
from align_jax.storage.paths import find_paths
from align_jax.storage.problems import Problems


def is_table(spec: str) -> bool:
    """Returns whether a path or glob names tables of captions, not a source of pairs."""
    suffix = os.path.splitext(spec)[1].lower()
    is_pairs = "?images=" in spec or "&images=" in spec or os.path.isdir(spec)
    return suffix in TABLE_SUFFIXES and not is_pairs


def find_tables(spec: str) -> list[str]:
    """Returns the caption tables that a path or a glob names, sorted.

    Raises:
      ValueError: there is none, or a file is of another format.
    """
    paths = find_paths(spec)
    for path in paths:
        if not is_table(path):
            raise ValueError(f"{path} is no table of captions; known: {', '.join(TABLE_SUFFIXES)}.")
    if not paths:
        raise ValueError(f"{spec}: no such table of captions; known: {', '.join(TABLE_SUFFIXES)}.")
    return sorted(paths)


def read_captions(
    path: str, problems: Problems, column: str | None = None
) -> Iterator[tuple[list[str], int]]:
    """Yields (captions, bytes read since the last ones) of a table, see table_files.open_table.

    Args:
      path: of one file.
      problems: see tables.batch_captions.
      column: where the captions are, without regard to case; None takes those of
        Table.caption_names.

    Raises:
      ValueError: there is no such column, or the file is not of its format.
    """
    table = open_table(path)
    names = _caption_columns(table, column)
    for batch in table.read(names):
        rows = batch_captions(table, batch, [names] if names else [], problems)
        yield [caption for row in rows if row for caption in row[0]], batch.num_bytes


def _caption_columns(table: Table, column: str | None) -> list[str]:
    if column is None:
        found = table.caption_names()
        wanted = f"column of captions ({', '.join(CAPTION_COLUMNS)}); name it with --column"
    else:
        name = find_column(table.text_names, (column.strip().lower(),))
        found, wanted = [name] if name else [], f"column {column!r}"
    if not found and table.names:
        raise ValueError(f"{table.path} has no {wanted}: it has {table.describe()}.")
    return found
