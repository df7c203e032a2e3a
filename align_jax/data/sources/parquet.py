"""Image bytes in Parquet: Hugging Face datasets, and img2dataset's output in that format.

A record is read with its row group, of which a process holds the ones used last. That suits reading
in order; for a global shuffle over more than they hold, pack first. open_source.py is the way in.
Source: `datasets` writes images as struct<bytes, path> and names of classes into the schema's
metadata `huggingface`; img2dataset a binary column that has the name of the format.
"""

import bisect
import collections
import dataclasses
import itertools
import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from align_jax.data.sources.column_names import CAPTION_COLUMNS, find_column, find_columns
from align_jax.data.sources.image_finder import short_names
from align_jax.data.sources.packed import ShardUnreadable
from align_jax.data.sources.record import LabelledImage, Record, is_usable, weigh_captions
from align_jax.storage import identity
from align_jax.storage.paths import find_paths
from align_jax.storage.problems import Problems
from align_jax.storage.text import check_caption

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

SUFFIX = ".parquet"
_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes")
_KEY_COLUMNS = ("key", "__key__", "uid", "image_id", "id")
_LABEL_COLUMNS = ("label", "cls", "labels", "class")
_SHARD_NAME = re.compile(r"(.+?)-\d{5}-of-\d{5}.*\.parquet")
_HELD_BYTES = 2**28  # of row groups, in a process; the last two in any case
_MOST_GROUP_BYTES = 2**31
_held: collections.OrderedDict[tuple[str, int, tuple[str, ...]], "pyarrow.Table"] = (
    collections.OrderedDict()
)
_held_lock = threading.Lock()


def find_files(path: str, split: str | None = None) -> list[str]:
    """Returns the Parquet files with images of a file, a glob or a folder, sorted; [] if none has.

    Args:
      path: a folder is searched two levels deep (`data/train-00000-of-00002.parquet`).
      split: of a folder, the part of the names before the numbers.

    Raises:
      ValueError: a folder of several splits without a choice, or without the one chosen.
    """
    if os.path.isdir(path):
        found = sorted(
            os.path.join(folder, name)
            for folder in (path, *(e.path for e in os.scandir(path) if e.is_dir()))
            for name in os.listdir(folder)
            if name.lower().endswith(SUFFIX) and not name.startswith((".", "_"))
        )
    else:
        found = [p for p in find_paths(path) if os.path.isfile(p) and p.lower().endswith(SUFFIX)]
    if not any(_image_column(file) for file in found[:4]):  # a damaged one may be the first
        return []
    if os.path.isdir(path):
        names = [_SHARD_NAME.fullmatch(os.path.basename(file)) for file in found]
        splits = sorted({name[1] for name in names if name})
        if len(splits) > 1 or split is not None:
            if split not in splits:
                raise ValueError(f"{path} has the splits {', '.join(splits)}; add ?split=NAME.")
            found = [f for f, name in zip(found, names, strict=True) if name and name[1] == split]
    return found


@dataclasses.dataclass(frozen=True)
class _File:
    """One file: its row groups, and which of its rows are images that were downloaded."""

    path: str
    name: str
    group_ends: tuple[int, ...]
    rows: np.ndarray | None  # int64; None for all


class ParquetTable:
    """The rows of Parquet files, by index.

    Attributes:
      problems: `table_unreadable`, and img2dataset's `status_...` of rows without an image.
    """

    def __init__(self, spec: str, paths: Sequence[str], limit: int | None):
        """Reads the ends of the files.

        Raises:
          ValueError: no file can be read, the first lacks an image column, or a row group is
            larger than 2 GiB.
        """
        self._spec = spec
        self.problems = Problems()
        self._files: list[_File] = []
        for path, name in zip(paths, short_names(paths), strict=True):
            self._add(path, name)
        if not self._files:
            raise ValueError(f"{spec} cannot be read: {self.problems}.")
        self._schema = _open(self._files[0].path).schema_arrow
        self._image = _image_column(self._files[0].path)
        self._key = find_column(self._schema.names, _KEY_COLUMNS)
        lengths = [f.group_ends[-1] if f.rows is None else len(f.rows) for f in self._files]
        self._ends = list(itertools.accumulate(lengths))
        self._length = min(self._ends[-1], limit or self._ends[-1])

    def __len__(self) -> int:
        return self._length

    def key(self, index: int) -> str:
        """Returns the key of a record without reading its image: of its column, or `stem:row`."""
        file, row = self._locate(index)
        if self._key is None:
            return f"{file.name}:{row}"
        value = self._cells(file, row, [self._key])[self._key]
        return f"{file.name}:{row}" if value is None else str(value)

    def where(self, index: int) -> str:
        """Returns file and row."""
        file, row = self._locate(index)
        return f"{self._spec}: row {row} of {file.path}"

    def describe(self) -> str:
        """Returns the spec and the number of records."""
        return f"{self._spec}: {len(self)} records"

    def stamp(self) -> str:
        """Returns what identity.stamp does: the content of the files, and what is read of them."""
        columns = [self._image, self._key, *self._text_columns()]
        return identity.digest(
            [self._length, columns, identity.of_files(file.path for file in self._files)]
        )

    def _text_columns(self) -> list[str]:
        return []

    def _image_of(self, file: _File, row: int) -> bytes:
        value = self._cells(file, row, [self._image])[self._image]
        value = value.get("bytes") if isinstance(value, dict) else value
        return value or b""

    def _locate(self, index: int) -> tuple[_File, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {self.describe()}.")
        index %= len(self)
        number = bisect.bisect_right(self._ends, index)
        file = self._files[number]
        row = index - (self._ends[number - 1] if number else 0)
        return file, row if file.rows is None else int(file.rows[row])

    def _cells(self, file: _File, row: int, columns: Sequence[str]) -> dict[str, Any]:
        group = bisect.bisect_right(file.group_ends, row)
        table = _read_group(file.path, group, tuple(columns))
        row -= file.group_ends[group - 1] if group else 0
        return {name: table[name][row].as_py() for name in columns}

    def _add(self, path: str, name: str) -> None:
        import pyarrow as pa

        try:
            opened = _open(path)
            names, rows = opened.schema_arrow.names, None
            if {"status", "error_message"} <= set(names):  # of img2dataset
                status = opened.read(columns=["status"])["status"].to_numpy()
                rows = np.flatnonzero(status == "success")
                for reason, count in collections.Counter(status[status != "success"]).items():
                    self.problems.add(f"status_{reason}", path, count)
        except (pa.ArrowException, OSError) as error:
            self.problems.add("table_unreadable", f"{path}: {error}")
            return
        groups = [opened.metadata.row_group(n) for n in range(opened.metadata.num_row_groups)]
        if any(group.total_byte_size > _MOST_GROUP_BYTES for group in groups):
            raise ValueError(
                f"{path} has a row group of more than {_MOST_GROUP_BYTES >> 30} GiB, which must be "
                "read to get one image; write it again with smaller ones."
            )
        ends = tuple(itertools.accumulate(group.num_rows for group in groups))
        if ends and (rows is None or len(rows)):
            self._files.append(_File(path, name, ends, rows))


class ParquetPairs(ParquetTable):
    """A PairSource over Parquet files with images and captions."""

    def __init__(
        self,
        spec: str,
        paths: Sequence[str],
        limit: int | None,
        weights: Mapping[str, float] | None = None,
    ):
        """Opens the files; `weights` of caption columns: see record.weigh_captions.

        Raises:
          ValueError: also without a column of captions.
        """
        super().__init__(spec, paths, limit)
        self._weights = weights
        names = self._schema.names
        found = find_column(names, CAPTION_COLUMNS)
        missing = [name for name in weights or () if name not in names]
        if missing or (found is None and weights is None):
            what = missing[0] if missing else f"captions ({', '.join(CAPTION_COLUMNS)})"
            raise ValueError(f"{spec} has no column {what}: it has {', '.join(names)}.")
        self._captions = list(weights) if weights else [found]
        texts = [field.name for field in self._schema if _holds_text(field.type)]
        # What stands in where the column has no caption, unless weights say which ones to read.
        self._others = [n for n in find_columns(texts, CAPTION_COLUMNS) if n not in self._captions]
        self._metadata = [
            field.name
            for field in self._schema
            if field.name not in (self._image, self._key, *self._captions, "status")
            and _is_scalar(field.type)
        ]

    def __getitem__(self, index: int) -> Record:
        """Returns a record with the encoded image.

        Raises:
          OSError: its row group is damaged.
          ShardUnreadable: the file is gone or cannot be opened.
        """
        file, row = self._locate(index)
        image = self._image_of(file, row)
        metadata = self._cells(file, row, self._metadata)
        # NaN is what pandas has for null.
        metadata = {n: v for n, v in metadata.items() if v is not None and v == v}
        return Record(self.key(index), image, *self._texts(file, row), metadata)

    def captions(self, index: int) -> tuple[str, ...]:
        """Returns the captions of a record without reading its image."""
        return self._texts(*self._locate(index))[0]

    def _text_columns(self) -> list[str]:
        return self._captions

    def _texts(
        self, file: _File, row: int
    ) -> tuple[tuple[str, ...], tuple[float, ...], tuple[str, ...]]:
        columns = self._texts_of(file, row, self._captions)
        if self._weights is not None:
            return weigh_captions(columns, self._weights)
        captions = columns[self._captions[0]]
        if not any(map(is_usable, captions)):
            others = (self._texts_of(file, row, [name])[name] for name in self._others)
            captions = next((o for o in others if any(map(is_usable, o))), captions)
        return tuple(captions), (), ()

    def _texts_of(self, file: _File, row: int, names: Sequence[str]) -> dict[str, list[str]]:
        found = {}
        for name, value in self._cells(file, row, names).items():
            values = value if isinstance(value, list) else [value]
            texts = [text for text in values if isinstance(text, str)]
            found[name] = [check_caption(text, f"{file.path}[{row}]") for text in texts]
        return found


class ParquetLabelled(ParquetTable):
    """A LabelledSource over Parquet files with images and labels; `classes` names the labels."""

    def __init__(self, spec: str, paths: Sequence[str], limit: int | None):
        """Opens the files and reads the labels; rows without one are counted (`class_unknown`).

        Raises:
          ValueError: also without a column of labels.
        """
        super().__init__(spec, paths, None)
        column = find_column(self._schema.names, _LABEL_COLUMNS)
        if column is None:
            raise ValueError(
                f"{spec} has no column of labels ({', '.join(_LABEL_COLUMNS)}): it has "
                f"{', '.join(self._schema.names)}."
            )
        values: list[Any] = []
        for file in self._files:
            cells = _open(file.path).read(columns=[column])[column].to_pylist()
            values += cells if file.rows is None else [cells[row] for row in file.rows]
        names = _class_names(self._schema, column)
        present = sorted({value for value in values if value is not None})
        if names is None and present and isinstance(present[0], str):
            names, label_of = present, {name: label for label, name in enumerate(present)}
            values = [label_of.get(value) for value in values]
        elif names is None:
            names = [str(label) for label in range(1 + max(present, default=-1))]
        self.classes = tuple(names)
        labelled = [v is not None and 0 <= v < len(names) for v in values]
        if not all(labelled):
            self.problems.add("class_unknown", self.where(labelled.index(False)), labelled.count(0))
        self._rows = [row for row, known in enumerate(labelled) if known]
        if limit is not None and limit < len(self._rows):
            self._rows = [self._rows[i * len(self._rows) // limit] for i in range(limit)]
        self._labels = [values[row] for row in self._rows]
        self._total, self._length = self._length, len(self._rows)

    def __getitem__(self, index: int) -> LabelledImage:
        """Returns the encoded image and its label; errors as of ParquetPairs."""
        image = self._image_of(*self._locate(index))
        return LabelledImage(self.key(index), image, self._labels[index])

    def stamp(self) -> str:
        """Returns what identity.stamp does."""
        return identity.digest([super().stamp(), self.classes, self._labels])

    def _locate(self, index: int) -> tuple[_File, int]:
        if not hasattr(self, "_total"):
            return super()._locate(index)
        number = bisect.bisect_right(self._ends, self._rows[index])
        file = self._files[number]
        row = self._rows[index] - (self._ends[number - 1] if number else 0)
        return file, row if file.rows is None else int(file.rows[row])


def _open(path: str) -> "ParquetFile":
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading it needs pip install 'align_jax[parquet]'.") from error
    return parquet.ParquetFile(path)


def _image_column(path: str) -> str | None:
    import pyarrow as pa

    try:
        with _open(path) as opened:
            schema = opened.schema_arrow
    except (pa.ArrowException, OSError):
        return None
    names = [field.name for field in schema if _holds_bytes(field.type)]
    return find_column(names, _IMAGE_COLUMNS)


def _holds_bytes(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_scalar(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    kinds = (types.is_string, types.is_large_string, types.is_integer, types.is_floating)
    return any(is_(kind) for is_ in kinds)


def _holds_text(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    is_list = types.is_list(kind) or types.is_large_list(kind)
    kind = kind.value_type if is_list else kind
    return types.is_string(kind) or types.is_large_string(kind)


def _class_names(schema: "pyarrow.Schema", column: str) -> list[str] | None:
    """Returns what `datasets` has written of a column of labels."""
    try:
        content = json.loads((schema.metadata or {})[b"huggingface"])
        return list(content["info"]["features"][column]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _read_group(path: str, group: int, columns: tuple[str, ...]) -> "pyarrow.Table":
    """Returns some columns of a row group; a process holds those used last."""
    import pyarrow as pa

    place = path, group, columns
    with _held_lock:
        if place in _held:
            _held.move_to_end(place)
            return _held[place]
    try:
        opened = _open(path)
    except (pa.ArrowException, OSError) as error:
        raise ShardUnreadable(f"{path} cannot be opened: {error}.") from error
    try:
        with opened:
            table = opened.read_row_group(group, columns=list(columns)).combine_chunks()
    except (pa.ArrowException, OSError) as error:  # a damaged page
        raise OSError(f"{path}: row group {group} cannot be read: {error}") from error
    with _held_lock:
        _held[place] = table
        while len(_held) > 2 and sum(t.nbytes for t in _held.values()) > _HELD_BYTES:
            _held.popitem(last=False)
    return table
