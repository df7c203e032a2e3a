"""The one reader of table files, in batches of columns: CSV, TSV, JSON, JSONL, TXT and Parquet.

What a table cannot give is part of the batch: lines that are no row, with where they are, and rows
whose text was repaired. Which column is what is decided by those who read: tables.py (pairs),
captions.py (texts alone) and curate/filter/ingest.py (metadata).
"""

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from align_jax.data.sources import separated
from align_jax.data.sources.column_names import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    find_column,
    find_columns,
)
from align_jax.data.sources.record import is_usable
from align_jax.storage import text

if TYPE_CHECKING:
    import pyarrow as pa

TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".token", ".json", ".jsonl", ".parquet")
BATCH_ROWS = 2**16  # of Parquet and JSON; of the others, what is in a block of lines
_SAMPLE_ROWS = 100
_TOKEN = re.compile(r"(?P<image>[^\t]+)#\d+\t(?P<caption>.*)")
_ODD_ESCAPE = re.compile(r"\\u(?:[dD]|00[01789])")
_SHOWN_CHARS = 200  # of a line that is no row


class Batch(NamedTuple):
    """Some rows, in order.

    Attributes:
      columns: name -> cells. Of Parquet an Arrow array, texts as string or list<string>; of others
        a list of str, number, bool, list, dict or None.
      numbers: of the line where each row begins, from 1; of Parquet and JSON the row's, from 0.
      lost: position of a row that could not be read -> the start of what stands there. Its cells
        are None.
      repaired: positions of rows with U+FFFD for what was no text.
      num_bytes: of the file, read since the last batch; of Parquet and JSON an estimate.
    """

    columns: dict[str, "list[Any] | pa.Array"]
    numbers: Sequence[int]
    lost: dict[int, str]
    repaired: set[int]
    num_bytes: int


class Table:
    """A table file.

    Attributes:
      path: of the file.
      names: of its columns, in their order; of JSON, those of the first 100 rows.
      text_names: those that may hold captions.
      plain_names: those that may hold one text or number a row.
      sample: name -> a value, or whether it is a column of text (bool) if the file has types.
      num_rows: None if not known before reading.
      is_open: whether rows may have columns that are not in `names`.
    """

    num_rows: int | None = None
    is_open = False
    _place = "{}:{}"

    def __init__(self, path: str, names: Sequence[str], sample: dict[str, Any] | None = None):
        """Keeps the names.

        Raises:
          ValueError: a name is there twice.
        """
        self.path = path
        self.names = self.text_names = self.plain_names = list(names)
        self.sample = sample or {}
        for name in names:
            if name and self.names.count(name) > 1:
                raise ValueError(f"{path} has two columns {name!r}; rename or remove one of them.")

    def place(self, number: int) -> str:
        """Returns the file and the place in it of a row (one of Batch.numbers), for messages."""
        return self._place.format(self.path, number)

    def kind(self, name: str) -> str:
        """Returns "string", "integer" or "number": what a plain column holds by its type."""
        return "string"

    def describe(self) -> str:
        """Returns the names, for messages."""
        return ", ".join(self.names) or "none"

    def caption_names(self) -> list[str]:
        """Returns the columns of CAPTION_COLUMNS in their order; [] if there is none.

        A row's captions are those of the first in which it has any, see `caption_cells`.
        """
        names = find_columns(self.text_names, CAPTION_COLUMNS)
        if names and self.is_open:  # later rows may have the others
            spelled = {name.strip().lower(): name for name in names}
            return [spelled.get(known, known) for known in CAPTION_COLUMNS]
        return names

    def read(self, columns: Sequence[str]) -> Iterator[Batch]:
        """Yields all rows, and of them these columns.

        Raises:
          ValueError: the file is damaged so that no more of it can be read.
        """
        raise NotImplementedError


def open_table(path: str) -> Table:
    """Returns the table of a file, by its suffix.

    `.csv` (comma, tab, ; or | as the header shows), `.tsv` (tabs, no quotes), `.jsonl` (an object a
    line), `.json` (a list of objects, or COCO's `images` and `annotations`), `.parquet`, `.txt` (as
    .csv if its header names images and captions; `image.jpg#0`, tab, caption as in Flickr's .token;
    else a column `text` with a caption a line). A
    header may be missing where the columns are a text and a URL (CC3M, CC12M).

    Raises:
      ValueError: the file is not of its format, lacks a header or has two columns of one name.
      OSError: it cannot be read.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".parquet":
        try:
            from align_jax.data.sources.parquet_table import ParquetTable
        except ImportError as error:
            raise ValueError(
                f"{path}: reading it needs pip install 'align_jax[parquet]'."
            ) from error
        return ParquetTable(path)
    if suffix == ".jsonl":
        return _JsonLines(path)
    if suffix == ".json":
        return _Json(path)
    return _open_separated(path, suffix)


def captions_of(cell: object, limit: int | None = text.MAX_CAPTION_CHARS) -> list[str] | None:
    """Returns the captions of a cell, [] for null; None if it holds something else.

    A caption of more than `limit` characters is something else: a page, an unclosed quote.
    """
    cells = cell if isinstance(cell, list) else [cell]
    captions = [item for item in cells if not _is_null(item)]
    for caption in captions:
        if not isinstance(caption, str) or (limit is not None and len(caption) > limit):
            return None
    return captions


def caption_cells(batch: Batch, names: Sequence[str]) -> "list[Any] | pa.Array":
    """Returns the cells of the first column; of another where a row has no caption before it.

    Tables made of several ones mix the names, and the unused ones are blank.

    Args:
      batch: rows.
      names: columns, from Table.caption_names.
    """
    cells = batch.columns[names[0]]
    for name in names[1:]:
        rows = [i for i, cell in enumerate(as_list(cells)) if not _holds_caption(cell)]
        if not rows:
            break
        cells, others = list(as_list(cells)), as_list(batch.columns[name])
        for i in rows:
            # What is empty or no text is kept, to be counted, unless a later one has a caption.
            if _holds_caption(others[i]) or _is_null(cells[i]):
                cells[i] = others[i]
    return cells


def as_list(column: "list[Any] | pa.Array") -> list[Any]:
    """Returns the cells of a column of a batch as Python objects."""
    return column if isinstance(column, list) else column.to_pylist()


def plain_text(cell: object) -> str | None:
    """Returns the text of a cell with one text or number; None if it holds anything else."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)  # pandas makes floats of integers beside nulls
    is_number = isinstance(cell, int | float) and not isinstance(cell, bool)
    return str(cell) if is_number and not _is_null(cell) else None


def _holds_caption(cell: object) -> bool:
    if isinstance(cell, str):
        return is_usable(cell)
    return any(map(is_usable, captions_of(cell) or ()))


def _is_null(value: object) -> bool:
    return value is None or value != value  # NaN: what pandas has for null


def _open_separated(path: str, suffix: str) -> Table:
    block = next(text.read_blocks(path), text.Block(1, [], frozenset(), frozenset(), 0))
    text.check_line_ends(path, block)
    filled = [i for i, line in enumerate(block.lines) if line.strip()][:2]
    first, second = ([block.lines[i] for i in filled] + ["", ""])[:2]
    delimiter = "\t" if suffix == ".tsv" else separated.find_delimiter(first)
    header = [name.strip() for name in separated.split_line(first, delimiter)] if first else []
    if suffix in (".txt", ".token") and _TOKEN.match(first):
        return _Tokens(path)
    if suffix in (".txt", ".token") and not (
        find_column(header, CAPTION_COLUMNS) and find_column(header, IMAGE_COLUMNS)
    ):
        return _Lines(path)
    urls = [i for i, name in enumerate(header) if separated.is_url(name)]
    if not urls:
        sample = separated.split_line(second, delimiter)
        sample += [""] * len(header)
        return _Separated(path, header, delimiter, filled[0] + 1 if filled else 0, sample)
    if len(header) != 2 or len(urls) != 1:  # CC3M: text, url; CC12M: url, text
        raise ValueError(
            f"{path} has no header and {len(header)} columns; give it one, as only "
            "url + text tables (CC3M, CC12M) are recognised without."
        )
    names = ["url", "text"] if urls == [0] else ["text", "url"]
    return _Separated(path, names, delimiter, 0, header)


class _Separated(Table):
    """CSV, TSV and TXT, the cells of a row separated by a delimiter."""

    def __init__(self, path: str, names: list[str], delimiter: str, skip: int, sample: list[str]):
        super().__init__(path, names, dict(zip(names, sample, strict=False)))
        self._delimiter, self._skip = delimiter, skip

    def read(self, columns: Sequence[str]) -> Iterator[Batch]:
        splitter = separated.Splitter(self._delimiter, self.names)
        places = {name: self.names.index(name) for name in columns}
        rest: list[str] = []
        first, repaired, too_long = 1, set(), set()
        for block in itertools.chain(text.read_blocks(self.path), (None,)):
            lines, num_bytes = rest, 0
            if block is not None:
                lines, num_bytes = rest + block.lines, block.num_bytes
                repaired |= {block.first + i for i in block.repaired}
                too_long |= {block.first + i for i in block.too_long}
            if first == 1:
                lines, first = lines[self._skip :], 1 + self._skip
            if block is None and not lines:
                return
            rows = splitter.split(lines, is_end=block is None)
            rest = lines[rows.used :]
            yield self._batch(rows, lines, first, places, repaired, too_long, num_bytes)
            first += rows.used

    def _batch(
        self,
        rows: separated.Rows,
        lines: list[str],
        first: int,
        places: dict[str, int],
        repaired: set[int],
        too_long: set[int],
        num_bytes: int,
    ) -> Batch:
        cells, numbers = rows.cells, [first + start for start in rows.starts]
        lost = {
            i: lines[rows.starts[i]].strip()[:_SHOWN_CHARS]
            for i, row in enumerate(cells)
            if row is None or numbers[i] in too_long
        }
        if lost:
            blank = [None] * len(self.names)
            cells = [blank if i in lost else row for i, row in enumerate(cells)]
        touched = set()
        if repaired and numbers:
            ends = [*numbers[1:], first + rows.used]
            touched = {
                i
                for i, (start, end) in enumerate(zip(numbers, ends, strict=True))
                if i not in lost and not repaired.isdisjoint(range(start, end))
            }
        columns = {name: [row[place] for row in cells] for name, place in places.items()}
        return Batch(columns, numbers, lost, touched, num_bytes)


class _Lines(Table):
    """TXT with a caption a line; blank lines are rows."""

    def __init__(self, path: str):
        super().__init__(path, ["text"], {"text": ""})

    def read(self, columns: Sequence[str]) -> Iterator[Batch]:
        for block in text.read_blocks(self.path):
            lines: list[str | None] = list(block.lines)
            lost = {i: block.lines[i] for i in block.too_long}
            for i in lost:
                lines[i] = None
            numbers = range(block.first, block.first + len(lines))
            repaired = set(block.repaired - block.too_long)
            yield Batch(dict.fromkeys(columns, lines), numbers, lost, repaired, block.num_bytes)


class _Tokens(Table):
    """Flickr8k's and Flickr30k's lines: `image.jpg#0`, a tab, a caption; blank lines are none."""

    def __init__(self, path: str):
        super().__init__(path, ["image", "caption"], {"image": "", "caption": ""})

    def read(self, columns: Sequence[str]) -> Iterator[Batch]:
        for block in text.read_blocks(self.path):
            rows: list[dict[str, str]] = []
            numbers, lost, repaired = [], {}, set()
            for i, line in enumerate(block.lines):
                if not line.strip():
                    continue
                found = None if i in block.too_long else _TOKEN.match(line)
                if found is None:
                    lost[len(rows)] = line.strip()[:_SHOWN_CHARS]
                elif i in block.repaired:
                    repaired.add(len(rows))
                rows.append(found.groupdict() if found else {})
                numbers.append(block.first + i)
            cells = {name: [row.get(name) for row in rows] for name in columns}
            yield Batch(cells, numbers, lost, repaired, block.num_bytes)


class _JsonLines(Table):
    """A JSON object a line; blank lines are none. Columns may be missing in any row."""

    is_open = True

    def __init__(self, path: str):
        rows: list[dict] = []
        for block in text.read_blocks(path):
            text.check_line_ends(path, block)
            for line in block.lines:
                row = _parse_json(line)
                rows += [row] if isinstance(row, dict) else []
                if len(rows) == _SAMPLE_ROWS:
                    break
            if len(rows) == _SAMPLE_ROWS:
                break
        super().__init__(path, *_sample(rows))

    def read(self, columns: Sequence[str]) -> Iterator[Batch]:
        for block in text.read_blocks(self.path):
            rows, numbers, lost, repaired = [], [], {}, set()
            odd = []
            for i, line in enumerate(block.lines):
                if not line or line.isspace():
                    continue
                row = None if i in block.too_long else _parse_json(line)
                if not isinstance(row, dict):
                    lost[len(rows)] = line.strip()[:_SHOWN_CHARS]
                    row = {}
                elif i in block.repaired:
                    repaired.add(len(rows))
                if "\\u" in line and _spells_odd(line):
                    odd.append(len(rows))
                rows.append(row)
                numbers.append(block.first + i)
            found = _cells(rows, columns)
            repaired |= _clean(found, odd)
            yield Batch(found, numbers, lost, repaired, block.num_bytes)


class _Json(Table):
    """A list of objects, or COCO's images and annotations; read whole."""

    is_open = True
    _place = "{}[{}]"

    def __init__(self, path: str):
        content, self._repaired = text.read_bulk(path)
        self._spells_odd = _spells_odd(content)
        self._num_bytes = os.path.getsize(path)
        try:
            rows = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}.") from None
        if isinstance(rows, dict) and {"images", "annotations"} <= set(rows):
            try:
                names = {image.get("id"): image.get("file_name") for image in rows["images"]}
                rows = [
                    {"image": names.get(row.get("image_id")), "caption": row.get("caption")}
                    for row in rows["annotations"]
                ]
            except (AttributeError, TypeError):
                raise ValueError(f"{path}: 'images' and 'annotations' are not COCO's.") from None
        if not isinstance(rows, list):
            raise ValueError(
                f"{path} holds neither a list of objects nor COCO's 'images' and 'annotations'; "
                "for Karpathy's splits add &split=test."
            )
        self._rows = rows
        self.num_rows = len(rows)
        objects = [row for row in rows[:_SAMPLE_ROWS] if isinstance(row, dict)]
        super().__init__(path, *_sample(objects))

    def read(self, columns: Sequence[str]) -> Iterator[Batch]:
        for start in range(0, len(self._rows), BATCH_ROWS):
            rows = self._rows[start : start + BATCH_ROWS]
            lost = {
                i: repr(row)[:_SHOWN_CHARS]
                for i, row in enumerate(rows)
                if not isinstance(row, dict)
            }
            rows = [{} if i in lost else row for i, row in enumerate(rows)]
            found = _cells(rows, columns)
            repaired = _clean(found, range(len(rows))) if self._spells_odd else set()
            if self._repaired:
                repaired |= {i for i, row in enumerate(rows) if "\ufffd" in repr(row)}
            size = self._num_bytes * len(rows) // len(self._rows)
            yield Batch(found, range(start, start + len(rows)), lost, repaired, size)


def _parse_json(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # also integers beyond Python's limits
        return None


def _sample(rows: Sequence[dict]) -> tuple[list[str], dict[str, Any]]:
    """The names in the order in which they appear, and the first value of each that is not null."""
    sample: dict[str, Any] = {}
    for row in rows:
        sample |= {name: value for name, value in row.items() if sample.get(name) is None}
    return list(sample), sample


def _spells_odd(line: str) -> bool:
    """Whether JSON may spell half of a surrogate pair, or a control character."""
    return _ODD_ESCAPE.search(line) is not None


def _clean(columns: dict[str, list[Any]], rows: Iterable[int]) -> set[int]:
    """Repairs texts and lists of texts in some rows in place; returns those that were not sound."""
    repaired = set()
    for cells in columns.values():
        for i in rows:
            cell = cells[i]
            if isinstance(cell, str):
                cells[i] = text.clean(cell)
            elif isinstance(cell, list):
                cells[i] = [text.clean(item) if isinstance(item, str) else item for item in cell]
            if cells[i] != cell:
                repaired.add(i)
    return repaired


def _cells(rows: Sequence[dict], names: Sequence[str]) -> dict[str, list[Any]]:
    """Name -> cells, without regard to case where a row has no field of that very name."""
    found: dict[str, list[Any]] = {}
    fields = set(map(tuple, rows))  # of most tables one
    for name in names:
        lower = name.strip().lower()
        spelled = {of: _spelling(name, lower, of) for of in fields}
        if set(spelled.values()) == {name}:
            found[name] = [row[name] for row in rows]
        elif any(spelled.values()):
            found[name] = [row.get(spelled[tuple(row)]) for row in rows]
        else:
            found[name] = [None] * len(rows)
    return found


def _spelling(name: str, lower: str, fields: tuple[str, ...]) -> str | None:
    if name in fields:
        return name
    return next((field for field in fields if field.strip().lower() == lower), None)
