"""Tables of pairs with a human score: sentences, words, and the files of Crisscrossed Captions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from align_jax.data.sources.column_names import find_column
from align_jax.data.sources.table_files import Table, as_list, open_table, plain_text
from align_jax.storage.problems import Problems

LEFT_COLUMNS = ("caption1", "sentence1", "text1", "word1", "word 1", "image1", "caption")
RIGHT_COLUMNS = ("caption2", "sentence2", "text2", "word2", "word 2", "image2", "image")
SCORE_COLUMNS = ("agg_score", "score", "simlex999", "human (mean)", "similarity", "label")


class RatedPairs(NamedTuple):
    """N pairs: items, scores [N] float64, and further columns as texts ("" for none)."""

    left: list[str]
    right: list[str]
    scores: np.ndarray
    columns: dict[str, list[str]]


def read_rated_pairs(path: str, problems: Problems, columns: Sequence[str] = ()) -> RatedPairs:
    """Returns the pairs of a table, see data.sources.table_files.open_table.

    A table of three columns without header (item, item, score) is recognised by the number in its
    first row.

    Args:
      path: of the table.
      problems: receives `row_malformed`: an item is missing or the score is no finite number.
      columns: names of further columns to read, where the table has them.

    Raises:
      ValueError: no such file, a column is missing, or no row can be used.
    """
    try:
        table = open_table(path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; it is a table of rated pairs.") from None
    names = table.plain_names
    has_header = len(names) != 3 or _number(names[2]) is None
    if not has_header:
        wanted = list(names)
    else:
        wanted = [
            _column(table, known, what)
            for known, what in (
                (LEFT_COLUMNS, "first item"),
                (RIGHT_COLUMNS, "second item"),
                (SCORE_COLUMNS, "score"),
            )
        ]
    extra = {name: found for name in columns if (found := find_column(names, (name.lower(),)))}
    cells: list[list[str]] = [[] if has_header else [name] for name in wanted]
    cells += [[] for _ in extra]
    places = [] if has_header else [table.place(1)]
    for batch in table.read([*wanted, *extra.values()]):
        for column, name in zip(cells, [*wanted, *extra.values()], strict=True):
            column += [plain_text(cell) or "" for cell in as_list(batch.columns[name])]
        places += map(table.place, batch.numbers)
    scores = [_number(text) for text in cells[2]]
    kept = []
    for row, place in enumerate(places):
        if cells[0][row].strip() and cells[1][row].strip() and scores[row] is not None:
            kept.append(row)
        else:
            problems.add("row_malformed", place)
    if not kept:
        raise ValueError(f"{path} holds no rated pair. {problems}".strip())
    return RatedPairs(
        [cells[0][row].strip() for row in kept],
        [cells[1][row].strip() for row in kept],
        np.array([scores[row] for row in kept], np.float64),
        {name: [cells[3 + place][row] for row in kept] for place, name in enumerate(extra)},
    )


def _column(table: Table, known: Sequence[str], what: str) -> str:
    found = find_column(table.plain_names, known)
    if found is None:
        raise ValueError(
            f"{table.path} has no column of the {what}: it has {table.describe()}; recognised are "
            f"{', '.join(known)}."
        )
    return found


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if np.isfinite(number) else None
