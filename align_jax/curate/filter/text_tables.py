"""CSV, TSV and JSONL tables in batches: lines that cannot be used are marked, never fatal.

Same interface as the Parquet reader of ingest.py, which uses both.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice

import numpy as np
import pyarrow as pa

from align_jax.curate.filter import columns

PROBLEMS = ("malformed", "not_utf8", "not_downloaded")  # dropped before any rule
_CHUNK_BYTES = 8 << 20
_SHOWN_CHARS = 200  # of a malformed line, kept as its text
_SAMPLE_LINES = 100
_URL = re.compile(r"https?://\S+$", re.IGNORECASE)

csv.field_size_limit(1 << 20)


class _TextTable:
    """Batches of a text file: ({canonical: [arrays]}, problem [rows] int8, -1 for none).

    Attributes:
      found: {canonical name: names in the file}.
      num_rows: None, not known before reading.
    """

    num_rows = None

    def __init__(self, path: str, chosen: Mapping[str, str]):
        self.path = path
        self.found = columns.find_columns(path, self._sample(), chosen)

    def batches(self) -> Iterator[tuple[dict[str, list[pa.Array]], np.ndarray]]:
        names = {ours: theirs[:] for ours, theirs in self.found.items() if ours != "text"}
        (text_name,) = self.found["text"]
        values: dict[str, list[list]] = {ours: [[] for _ in names[ours]] for ours in names}
        texts, problem, size = [], [], 0
        for fields, bad, line_bytes in self._rows():
            size += line_bytes
            text = fields.get(text_name)
            captions = (text or [None]) if isinstance(text, list) else [text]
            if not all(caption is None or isinstance(caption, str) for caption in captions):
                bad = PROBLEMS.index("malformed") if bad < 0 else bad
                captions = [json.dumps(text)[:_SHOWN_CHARS]]
            for caption in captions:
                texts.append(caption)
                problem.append(bad)
                for ours, columns_of in values.items():
                    for name, column in zip(names[ours], columns_of, strict=True):
                        column.append(fields.get(name))
            if size >= _CHUNK_BYTES:
                yield _arrays({**values, "text": [texts]}, problem)
                texts, problem, size = [], [], 0
                values = {ours: [[] for _ in names[ours]] for ours in names}
        if texts:
            yield _arrays({**values, "text": [texts]}, problem)

    def _malformed(self, line):
        (text_name,) = self.found["text"]
        return {text_name: line.strip()[:_SHOWN_CHARS]}, PROBLEMS.index("malformed")

    def _sample(self) -> dict[str, object]:
        raise NotImplementedError

    def _rows(self) -> Iterator[tuple[dict, int, int]]:
        raise NotImplementedError


def _arrays(values, problem):
    problem = np.array(problem, np.int8)
    fields = {}
    for ours, lists in values.items():
        is_string = columns.COLUMNS[ours][0] == "string"
        fields[ours] = []
        for column in lists:
            if is_string:
                fields[ours].append(_strings([_as_text(v) for v in column], problem))
            else:
                fields[ours].append(pa.array([as_float(v) for v in column], pa.float64()))
    return fields, problem


def _as_text(value):
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas makes floats of integers beside nulls
    return json.dumps(value)


def _strings(values, problem):
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:  # bytes that are no UTF-8, or half a pair of \ud83d\ude00
        pass
    for row, value in enumerate(values):
        if value is None:
            continue
        try:
            value.encode()
        except UnicodeEncodeError:
            raw = value.encode("utf-8", "surrogatepass" if _halves(value) else "surrogateescape")
            values[row] = raw.decode("utf-8", "replace")
            problem[row] = PROBLEMS.index("not_utf8") if problem[row] < 0 else problem[row]
    return pa.array(values, pa.string())


def _halves(text):
    # surrogateescape makes U+DC80..U+DCFF of single bytes; other halves come from JSON escapes
    return any("\ud800" <= c <= "\udfff" and not "\udc80" <= c <= "\udcff" for c in text)


def as_float(value: object) -> float | None:
    """Returns the number that a cell holds, None if it holds none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


class JsonLines(_TextTable):
    """A JSON object a line; blank lines do not count."""

    def _sample(self):
        sample: dict[str, object] = {}
        for fields in islice((f for f, _ in self._objects() if f is not None), _SAMPLE_LINES):
            sample |= {name: v for name, v in fields.items() if sample.get(name) is None}
        return sample

    def _objects(self):
        with open(self.path, "rb") as file:
            for number, line in enumerate(file):
                if number == 0:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                try:
                    fields = json.loads(line.decode("utf-8", "surrogateescape"))
                except (ValueError, RecursionError):
                    fields = None
                yield fields if isinstance(fields, dict) else None, line

    def _rows(self):
        for fields, line in self._objects():
            bad = -1
            if fields is None:
                fields, bad = self._malformed(line.decode("utf-8", "replace"))
            yield fields, bad, len(line)


class Separated(_TextTable):
    """CSV (quotes) or TSV (none), with a header or, in two columns of url and text, without."""

    def _sample(self):
        self._tabs = self.path.lower().endswith(".tsv")
        first = next((row for row in self._fields() if row is not None), [])
        urls = [position for position, value in enumerate(first) if _URL.match(value)]
        if not urls:
            self._names = first
            self._has_header = True
            second = next(islice((row for row in self._fields() if row is not None), 1, 2), [])
            return {n: v for n, v in zip(first, second + [""] * len(first), strict=False)}
        if len(first) != 2 or len(urls) != 1:  # CC3M: text, url; CC12M: url, text
            raise ValueError(
                f"{self.path} has no header and {len(first)} columns; give it one, as only "
                "url + text tables (CC3M, CC12M) are recognised without."
            )
        self._names = ["url", "text"] if urls == [0] else ["text", "url"]
        self._has_header = False
        return dict(zip(self._names, first, strict=True))

    def _fields(self):
        """Yields the fields of each row, None where the csv module gives up."""
        self._bytes = 0
        self._line = ""

        def lines():
            with open(self.path, "rb") as file:
                for number, line in enumerate(file):
                    if number == 0:
                        line = line.removeprefix(b"\xef\xbb\xbf")
                    self._bytes += len(line)
                    self._line = line.decode("utf-8", "surrogateescape")
                    yield self._line

        if self._tabs:
            # str.splitlines and the csv module also end lines at lone \r; a TSV line ends at \n.
            rows = (line.rstrip("\r\n").split("\t") for line in lines())
        else:
            rows = csv.reader(lines())
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error:
                yield None
                continue
            if row and row != [""]:
                yield row

    def _rows(self):
        rows, before = self._fields(), 0
        if self._has_header:
            next(rows)
        for row in rows:
            size, before = self._bytes - before, self._bytes
            if row is None or len(row) != len(self._names):
                line = self._line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
                yield *self._malformed(line), size
            else:
                yield dict(zip(self._names, row, strict=True)), -1, size
