"""Pairs in one of several languages: JSON lines with a field a language, and Multi30k's folders.

Sources: google/crossmodal-3600 (`captions.jsonl`: `image/key`, and each language as an object with
`caption`); multi30k/dataset, whose test split of 2016 has five sentences an image in English and
German (task 2) and one in French and Czech (task 1), line by line with the list of its images.
"""

import gzip
import os
from collections.abc import Mapping
from typing import Any

from align_jax.data.sources import files
from align_jax.data.sources.column_names import IMAGE_COLUMNS, find_column
from align_jax.data.sources.table_files import captions_of, open_table, plain_text
from align_jax.data.sources.tables import Row, as_list
from align_jax.storage import text
from align_jax.storage.problems import Problems

_KEY = "image/key"  # a name without its suffix
_MULTI30K_IMAGES = "image_splits/test_2016_flickr.txt"
_TASK_2 = ("en", "de")


def open_language(
    spec: str, path: str, images: str, lang: str, limit: int | None = None
) -> files.FilePairs:
    """Returns the pairs of one language.

    Problems counted: those of files.open_rows, `caption_missing` (an image that has none in this
    language) and `row_malformed`.

    Args:
      spec: names the source in messages.
      path: of a .jsonl file whose rows have the language as a field, or in a field of fields; or
        of Multi30k's folder `data`, that of task1 and task2.
      images: folders, zips and tars, see files.open_table.
      lang: code of the language, as the files have it.
      limit: images to use, or None for all.

    Raises:
      ValueError: a file that does not exist or is of another form, or no caption in the language.
    """
    problems = Problems()
    if os.path.isdir(path):
        rows = _read_multi30k(path, lang)
    elif not os.path.isfile(path):
        raise ValueError(f"{path} does not exist; it holds captions by language.")
    elif path.lower().endswith(".jsonl"):
        rows = _read_json_lines(path, lang, problems)
    else:
        raise ValueError(f"{spec}: lang= is of use for .jsonl files and Multi30k's folder alone.")
    if not rows:
        raise ValueError(f"{spec} holds no caption of lang={lang}. {problems}".strip())
    return files.open_rows(spec, rows, images, limit, problems)


def _read_json_lines(path: str, lang: str, problems: Problems) -> list[Row]:
    table = open_table(path)
    image = _KEY if _KEY in table.names else find_column(table.names, IMAGE_COLUMNS)
    if image is None:
        raise ValueError(f"{path} names no image: it has {table.describe()}.")
    names = list(dict.fromkeys([image, lang, *table.names]))
    rows = []
    for batch in table.read(names):
        cells = {name: as_list(batch.columns[name]) for name in names}
        for row, number in enumerate(batch.numbers):
            fields = {name: column[row] for name, column in cells.items()}
            key = plain_text(fields.pop(image))
            captions = captions_of(_of_language(fields, lang))
            if row in batch.lost or not key or captions is None:
                problems.add("row_malformed", table.place(number))
            elif not captions:
                problems.add("caption_missing", f"{table.place(number)} ({lang})")
            else:
                rows.append(Row(f"{key}.jpg" if image == _KEY else key, "", tuple(captions)))
    return rows


def _of_language(fields: Mapping[str, Any], lang: str) -> Any:
    """The field of a language, or that of the first field of fields that has it."""
    found = fields.get(lang)
    if found is None:
        nested = (value for value in fields.values() if isinstance(value, dict))
        found = next((value[lang] for value in nested if lang in value), None)
    return found.get("caption") if isinstance(found, dict) else found


def _read_multi30k(folder: str, lang: str) -> list[Row]:
    task = 2 if lang in _TASK_2 else 1
    names = [f"test_2016.{k}.{lang}" for k in range(1, 6)]
    if task == 1:
        names = [f"test_2016_flickr.{lang}"]
    images = _lines(os.path.join(folder, "task1", *_MULTI30K_IMAGES.split("/")))
    captions = [_lines(os.path.join(folder, f"task{task}", "raw", name)) for name in names]
    for name, lines in zip(names, captions, strict=True):
        if len(lines) != len(images):
            raise ValueError(
                f"{folder}/task{task}/raw/{name} has {len(lines)} lines, and {_MULTI30K_IMAGES} "
                f"names {len(images)} images."
            )
    return [
        Row(image.partition("#")[0], "", tuple(text.check_caption(t, image) for t in sentences))
        for image, *sentences in zip(images, *captions, strict=True)
    ]


def _lines(path: str) -> list[str]:
    """The lines of a file, or of that with .gz after its name."""
    if os.path.isfile(path):
        lines = text.read_lines(path)
    elif os.path.isfile(path + ".gz"):
        try:
            with gzip.open(path + ".gz") as file:
                lines = text.clean(file.read().decode("utf-8", "replace")).split("\n")
        except (OSError, EOFError) as error:
            raise ValueError(f"{path}.gz is no readable gzip file: {error}") from None
    else:
        raise ValueError(f"{path} does not exist, nor does it with .gz; it is part of Multi30k.")
    lines = [line.strip() for line in lines]
    return lines[: len(lines) - (lines[-1:] == [""])]
