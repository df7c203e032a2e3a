"""Caption tables: CSV, TSV, JSON and JSONL files that pair image names with captions.

Rows about the same image are merged into one, so that five captions in five rows become one image
with five captions. Where the images are is the business of sources.py.
"""

import csv
import json
import os
from collections.abc import Iterator
from typing import NamedTuple

from align_jax.data.archives import Problems

TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl")
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


def read_table(path: str, problems: Problems) -> list[Row]:
    """Returns the table's images in order of first appearance, with all their captions.

    Args:
      path: `.jsonl` (an object a line), `.json` (a list of objects, or COCO's `images` and
        `annotations`), `.tsv` (no quoting), `.csv` or `.txt` (comma, tab, ; or | as the header
        shows). Column names are matched without case against IMAGE_COLUMNS and CAPTION_COLUMNS,
        the first match of each list wins; `shard` is optional.
      problems: receives `row_malformed`.

    Raises:
      ValueError: no row has an image or a caption column, or the file is not of its format.
    """
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


def parse_sidecar(text: str) -> list[str]:
    """Returns the captions of one JSON object, found by CAPTION_COLUMNS; [] if there are none."""
    try:
        fields = json.loads(text)
    except json.JSONDecodeError:
        return []
    if not isinstance(fields, dict):
        return []
    fields = _lower_keys(fields)
    return _parse_captions(fields.get(_find_column(fields, CAPTION_COLUMNS, None))) or []


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


def _lower_keys(row):
    return {str(key).strip().lower(): value for key, value in row.items()}


def _jsonl_rows(path, file, problems):
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
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
