"""Caption tables: CSV, TSV, JSON, JSONL and Parquet files that pair image names with captions.

Rows about the same image are merged into one, so that five captions in five rows become one image
with five captions. Where the images are is the business of files.py.
"""

import csv
import json
import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from align_jax.data.sources.record import weigh_captions
from align_jax.storage.problems import Problems

TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet")
_BATCH_ROWS = 2**14  # of Parquet, at once in memory
IMAGE_COLUMNS = (
    "image",
    "file_name",
    "filename",
    "file",
    "filepath",
    "image_path",
    "image_name",
    "image_file",
    "path",
    "key",
)
CAPTION_COLUMNS = (
    "captions",
    "caption",
    "text",
    "texts",
    "txt",
    "sentences",
    "sentence",
    "comment",
    "title",
    "alt_text",
)


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
      path: `.parquet` (read in batches), `.jsonl` (an object a line), `.json` (a list of objects,
        or COCO's `images` and `annotations`), `.tsv` (no quoting), `.csv` or `.txt` (comma, tab, ;
        or | as the header shows). Column names are matched without case against IMAGE_COLUMNS and
        CAPTION_COLUMNS, the first match of each list wins; `shard` is optional.
      problems: receives `row_malformed`.
      weights: caption columns to read, all of them, with their weights (record.weigh_captions);
        None reads the one that is recognised.

    Raises:
      ValueError: no row has an image or a caption column, or the file is not of its format.
    """
    if weights is not None:
        return _read_columns(path, problems, weights)
    merged: dict[tuple[str, str], list[str]] = {}
    image_column = caption_column = None
    seen_columns: tuple[str, ...] = ()
    for where, fields in _read_rows(path, problems):
        seen_columns = seen_columns or tuple(fields)
        image_column = _find_column(fields, IMAGE_COLUMNS, image_column)
        caption_column = _find_column(fields, CAPTION_COLUMNS, caption_column)
        image = fields.get(image_column)
        captions = _parse_captions(fields.get(caption_column))
        if image is None or image == "" or captions is None:
            problems.add("row_malformed", where)
            continue
        shard = str(fields.get("shard") or "")
        merged.setdefault((shard, str(image)), []).extend(captions)
    for column, known in ((image_column, IMAGE_COLUMNS), (caption_column, CAPTION_COLUMNS)):
        if column is None and seen_columns:
            what = "image" if known is IMAGE_COLUMNS else "caption"
            raise ValueError(
                f"{path} has no {what} column: it has {', '.join(seen_columns)}; recognised are "
                f"{', '.join(known)}."
            )
    return [Row(image, shard, tuple(captions)) for (shard, image), captions in merged.items()]


def parse_sidecar(
    text: str, weights: Mapping[str, float] | None = None
) -> tuple[tuple[str, ...], tuple[float, ...], tuple[str, ...]]:
    """Returns (captions, weights, columns) of one JSON object, as a Record has them.

    Args:
      text: of the file.
      weights: fields to read with their weights (record.weigh_captions); None reads the first of
        CAPTION_COLUMNS that is there and gives neither weights nor columns.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, integers or nesting beyond Python's limits
        return (), (), ()
    if not isinstance(fields, dict):
        return (), (), ()
    fields = _lower_keys(fields)
    if weights is not None:
        return weigh_captions(_columns(fields, weights), _lower_keys(weights))
    captions = _parse_captions(fields.get(_find_column(fields, CAPTION_COLUMNS, None)))
    return tuple(captions or ()), (), ()


def _read_columns(path, problems, weights):
    weights = _lower_keys(weights)
    merged: dict[tuple[str, str], dict[str, list[str]]] = {}
    image_column, seen_columns = None, set()
    for where, fields in _read_rows(path, problems):
        seen_columns |= fields.keys()
        image_column = _find_column(fields, IMAGE_COLUMNS, image_column)
        image, columns = fields.get(image_column), _columns(fields, weights)
        if image is None or image == "" or not columns:
            problems.add("row_malformed", where)
            continue
        row = merged.setdefault((str(fields.get("shard") or ""), str(image)), {})
        for name, captions in columns.items():
            row.setdefault(name, []).extend(captions)
    missing = [name for name in weights if name not in seen_columns]
    if missing or image_column is None:
        raise ValueError(
            f"{path} has no column {missing[0] if missing else 'of image names'!r}: it has "
            f"{', '.join(sorted(seen_columns))}."
        )
    return [
        Row(image, shard, *weigh_captions(columns, weights))
        for (shard, image), columns in merged.items()
    ]


def _columns(fields, names):
    parsed = {name: _parse_captions(fields.get(name)) for name in _lower_keys(names)}
    return {name: captions for name, captions in parsed.items() if captions is not None}


def _parse_captions(value):
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(caption, str) for caption in value):
        return value
    return None


def _find_column(fields, known, found):
    if found in fields:
        return found
    return next((column for column in known if column in fields), found)


def _read_rows(path, problems) -> Iterator[tuple[str, dict]]:
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        if suffix == ".jsonl":
            rows = _jsonl_rows(path, file, problems)
        elif suffix == ".json":
            rows = _json_rows(path, file)
        else:
            rows = _csv_rows(path, file, "\t" if suffix == ".tsv" else None, problems)
        for where, row in rows:
            if isinstance(row, dict):
                yield where, _lower_keys(row)
            else:
                problems.add("row_malformed", where)


def _parquet_rows(path):
    try:
        from pyarrow import parquet, types
    except ImportError as error:
        raise ValueError(f"{path}: reading it needs pip install 'align_jax[parquet]'.") from error
    try:
        table = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow's own kinds; all mean the same here
        raise ValueError(f"{path} is not a Parquet file: {error}") from error
    # Images inside of the table would fill the memory.
    bulky = (types.is_binary, types.is_large_binary, types.is_struct)
    fields = [field for field in table.schema_arrow if not any(is_(field.type) for is_ in bulky)]
    columns = [field.name for field in fields]
    number = 0
    with table:
        for batch in table.iter_batches(_BATCH_ROWS, columns=columns):
            for row in batch.to_pylist():
                yield f"{path}[{number}]", _lower_keys(row)
                number += 1


def _lower_keys(row):
    return {str(key).strip().lower(): value for key, value in row.items()}


def _jsonl_rows(path, file, problems):
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            problems.add("row_malformed", f"{path}:{number}")
            continue
        yield f"{path}:{number}", row


def _json_rows(path, file):
    try:
        content = json.load(file)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if isinstance(content, dict) and {"images", "annotations"} <= set(content):
        names = {image.get("id"): image.get("file_name") for image in content["images"]}
        content = [
            {"image": names.get(row.get("image_id")), "caption": row.get("caption")}
            for row in content["annotations"]
        ]
    if not isinstance(content, list):
        raise ValueError(
            f"{path} holds neither a list of objects nor COCO's 'images' and 'annotations'."
        )
    for number, row in enumerate(content):
        yield f"{path}[{number}]", row


def _csv_rows(path, file, delimiter, problems):
    if delimiter is None:
        header = file.readline()
        file.seek(0)
        delimiter = next((mark for mark in ",\t;|" if mark in header), ",")
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.DictReader(file, delimiter=delimiter, quoting=quoting, skipinitialspace=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            # More cells than the header has: an unquoted delimiter has cut the caption.
            if None in row:
                problems.add("row_malformed", where)
                continue
            yield where, row
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num} is not valid CSV: {error}.") from error
