"""Lines of comma-separated values -> rows of cells; a stray quote costs no other line.

A field is quoted (RFC 4180) if it begins with a quote and the next lone quote stands before a
delimiter or at the end of a line. Any other quote is a letter. A quoted field may hold ends of
lines, unless each of its lines is a row by itself: then its first quote is stray.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from align_jax.data.sources.column_names import COLUMN_NAMES, IMAGE_COLUMNS
from align_jax.storage.text import MAX_LINE_BYTES

DELIMITERS = ",\t;|"
_MAX_LINES = 64  # of one row
_FILE = re.compile(r"\S.*\.\w{2,5}$")
_URL = re.compile(r"https?://\S+$", re.IGNORECASE)
_DIGIT = re.compile(r"\d")
_KNOWN = {name for names in COLUMN_NAMES.values() for name in names}


class Rows(NamedTuple):
    """Rows of some lines.

    Attributes:
      cells: of each row; None where it has another number of cells than the header.
      starts: position of the line at which each row begins.
      used: number of lines that were read; the others may begin a row that goes on after them.
    """

    cells: list[list[str] | None]
    starts: list[int]
    used: int


def find_delimiter(header: str) -> str:
    """Returns the one of DELIMITERS that gives most known names, else the first that is there."""

    def num_known(mark: str) -> int:
        return len(_KNOWN & {name.strip(' "').lower() for name in header.split(mark)})

    found = [mark for mark in DELIMITERS if mark in header]
    return max(found, key=num_known, default=",")


def split_line(line: str, delimiter: str) -> list[str]:
    """Returns the cells of one line, as many as there are."""
    if delimiter == "\t":
        return [cell.lstrip(" ") for cell in line.split("\t")]
    return _parse((line,), 0, 1, delimiter)[0]


def is_url(cell: str) -> bool:
    """Returns whether a cell holds a web address and nothing else."""
    return _URL.match(cell) is not None


class Splitter:
    """Splits the lines after the header; the spaces after a delimiter do not count.

    Tabs separate without quotes, as in CC3M and CC12M: there a quote is a letter.
    """

    def __init__(self, delimiter: str, names: Sequence[str]):
        """Takes the delimiter and the names of the columns."""
        names = [name.lower() for name in names]
        self._delimiter = delimiter
        self._width = len(names)
        # Of two columns, the one of images has no delimiters where nothing is quoted.
        self._image = next((i for i, name in enumerate(names) if name in IMAGE_COLUMNS), None)
        ids = (*COLUMN_NAMES["key"], *COLUMN_NAMES["url"])
        self._id = next((i for i, name in enumerate(names) if name in ids), 0)
        self._line = _Line()
        self._reader = csv.reader(
            self._line, delimiter=delimiter, skipinitialspace=True, strict=True
        )
        mark = re.escape(delimiter)
        self._image_first = re.compile(rf" *([^\"].*?\.\w{{2,5}}) *{mark} *(.*)", re.DOTALL)
        self._image_last = re.compile(rf" *(.*?) *{mark} *([^{mark}\"]+\.\w{{2,5}}) *", re.DOTALL)

    def split(self, lines: Sequence[str], is_end: bool) -> Rows:
        """Returns the rows of lines without their ends; blank lines are none.

        Args:
          lines: of a file, from the first one that was not used.
          is_end: whether no line follows.
        """
        delimiter, width, quotes = self._delimiter, self._width, self._delimiter != "\t"
        spaced = delimiter + " "
        cells, starts, position = [], [], 0
        while position < len(lines):
            line, used = lines[position], 1
            if quotes and '"' in line:
                row, used = self._split_quoted(lines, position)
                if used is None:  # the lines at hand end inside of quotes
                    if not is_end and len(lines) - position < _MAX_LINES:
                        break
                    row, used = self._split_line(line), 1
            elif not line or line.isspace():
                position += 1
                continue
            else:
                row = line.split(delimiter)
                if len(row) != width:
                    row = self._recover(line)
                elif spaced in line or line[0] == " ":
                    row = [cell.lstrip(" ") for cell in row]
            cells.append(row)
            starts.append(position)
            position += used
        return Rows(cells, starts, position)

    def _split_quoted(
        self, lines: Sequence[str], start: int
    ) -> tuple[list[str] | None, int | None]:
        """(cells or None, lines used); (None, None) if `lines` end inside of quotes."""
        try:
            self._line.text = lines[start]
            row = next(self._reader)
            return (row if len(row) == self._width else self._recover(lines[start])), 1
        except csv.Error:  # a stray quote, one that is open at the end, or a long field
            pass
        row, used = _parse(lines, start, start + _MAX_LINES, self._delimiter)
        if used is None:
            return None, None
        if used == 1 or len(row) != self._width or self._are_rows(lines[start : start + used]):
            return self._split_line(lines[start]), 1
        return row, used

    def _split_line(self, line: str) -> list[str] | None:
        row, _ = _parse((line,), 0, 1, self._delimiter)
        return row if len(row) == self._width else self._recover(line)

    def _are_rows(self, lines: Sequence[str]) -> bool:
        """Whether each line is a row by itself, with one kind of name in its column of names."""
        if self._width == 1:
            return False
        rows = [self._split_line(line) for line in lines]
        kinds = {None if row is None else _kind(row[self._id]) for row in rows}
        return len(kinds) == 1 and None not in kinds

    def _recover(self, line: str) -> list[str] | None:
        """The cells of a line whose caption holds unquoted delimiters, where that is clear."""
        if self._width == 1:
            return [line.lstrip(" ")]
        if self._width != 2 or self._image is None:
            return None
        pattern = self._image_last if self._image else self._image_first
        match = pattern.fullmatch(line)
        return None if match is None else list(match.groups())


class _Line:
    """Iterator over one line, then none; making a csv.reader for each line would take longer."""

    text: str | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        text, self.text = self.text, None
        if text is None:
            raise StopIteration
        return text


def _parse(
    lines: Sequence[str], start: int, stop: int, delimiter: str
) -> tuple[list[str], int | None]:
    """Cells of the row that begins at a line and ends before `stop`, and its number of lines.

    The number is None where a quote is open at the end of `lines`.
    """
    row, used, text, position = [], 1, lines[start], 0
    while position <= len(text):
        while text.startswith(" ", position):
            position += 1
        if text.startswith('"', position):
            end, longer, more = _find_closing(lines, start, stop, text, used, position + 1)
            if end is None:
                return row, None
            after = end + 1
            while longer.startswith(" ", after):
                after += 1
            if end >= 0 and longer[after : after + 1] in ("", delimiter):
                row.append(longer[position + 1 : end].replace('""', '"'))
                text, used, position = longer, more, after + 1
                continue
        after = text.find(delimiter, position)
        after = len(text) if after < 0 else after
        row.append(text[position:after])
        position = after + 1
    return row, used


def _find_closing(
    lines: Sequence[str], start: int, stop: int, text: str, used: int, position: int
) -> tuple[int | None, str, int]:
    """(its position, text, lines in it); -1 if there is none, None if `lines` end before."""
    longer, more = text, used
    while True:
        end = longer.find('"', position)
        if end < 0:
            if start + more >= stop or len(longer) > MAX_LINE_BYTES:
                return -1, text, used
            if start + more >= len(lines):
                return None, text, used
            position = len(longer)
            longer += "\n" + lines[start + more]
            more += 1
        elif longer.startswith('""', end):
            position = end + 2
        else:
            return end, longer, more


def _kind(cell: str) -> str | None:
    """What a name looks like: "url", "file", "number", "code" or "word"; None if it is no name."""
    if is_url(cell):
        return "url"
    if not cell or "\n" in cell:
        return None
    if _FILE.match(cell):
        return "file"
    if cell.isdecimal():
        return "number"
    if " " in cell:
        return None
    return "code" if _DIGIT.search(cell) else "word"
