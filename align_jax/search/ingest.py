"""Fills an index: from pairs, from images, or from what `align embed` has written.

Works in batches and starts again where it was stopped: what is there and has not changed is read,
but not embedded again. Rows say where their picture is read again, by source and number.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from align_jax import embed
from align_jax.data.images import BadImage, decode_image
from align_jax.data.sources.open_source import open_source
from align_jax.data.sources.record import hash_key
from align_jax.run.progress import show_progress
from align_jax.search.index import Index
from align_jax.search.rows import KINDS, Row, check_row, make_row, shorten
from align_jax.storage.problems import Problems, reason_of
from align_jax.storage.text import read_json, read_text

CHOICES = (*KINDS, "both")
LITE_COSTLY_ROWS, LITE_MOST_ROWS = 100_000, 1_000_000

_BATCH_ITEMS = 512


@dataclasses.dataclass(frozen=True)
class Items:
    """What can become rows, by number.

    Attributes:
      spec: of the source, with absolute paths.
      count: of items; a record has a row for its image and one for each caption.
      read: number -> [(row, image or text)]; OSError if it cannot be read.
      problems: what the source cannot give.
    """

    spec: str
    count: int
    read: Callable[[int], list[tuple[Row, Any]]]
    problems: Problems


def open_items(spec: str, kind: str = "image") -> Items:
    """Returns the rows that a source of pairs, or of images alone, can give.

    Args:
      spec: what `open_source` or `embed.open_images` takes; kind "text" also takes a .txt file.
      kind: "image", "text" (of pairs: their captions) or "both".

    Raises:
      ValueError: it is neither.
    """
    where = absolute(spec)
    if spec.endswith(".txt"):
        if kind != "text":
            raise ValueError(f"{spec} holds texts; add --kind text.")
        return _plain(embed.open_texts(spec), where)
    try:
        source = open_source(spec)
    except ValueError as error:
        if kind != "image":
            raise
        try:
            return _plain(embed.open_images(spec), where)
        except ValueError:
            raise error from None

    def read(number: int) -> list[tuple[Row, Any]]:
        record = source[number]
        caption = next((text for text in record.captions if text.strip()), "")
        place, metadata = f"{where}#{number}", dict(record.metadata)
        found = []
        if kind != "text":
            found.append((record.key, "image", caption, record.image))
        if kind != "image":
            texts = [(n, text) for n, text in enumerate(record.captions) if text.strip()]
            found += [(f"{record.key}#{n}", "text", text, text) for n, text in texts]
        return [
            (make_row(key, kind, caption, place, metadata, value), value)
            for key, kind, caption, value in found
        ]

    problems = Problems()
    problems.merge(source.problems)
    return Items(where, len(source), read, problems)


def check_source(spec: str, kind: str) -> None:
    """Raises ValueError if `add` could not open the source; before a model is loaded."""
    if not (Path(spec) / embed.MANIFEST).is_file():
        open_items(spec, kind)


def add(
    index: Index,
    model: Any,
    spec: str,
    *,
    kind: str = "image",
    on_error: str = "raise",
    force: bool = False,
) -> dict[str, Any]:
    """Adds what a source holds to the index; returns counts and problems.

    Counts are rows `added`, `updated` and `unchanged`; `problems` counts by reason what was left
    out. A rerun goes on where a killed one stopped.

    Args:
      index: of the same model.
      model: an `Align`.
      spec: a source, see `open_items`, or a folder of `align embed` of the same model.
      kind: see `open_items`; a folder of `align embed` has its own.
      on_error: "raise" stops at the first item that cannot be used, "skip" leaves it out.
      force: lets Milvus Lite hold a million rows and more.

    Raises:
      ValueError: the source cannot be opened or used, or the index is full.
    """
    if (Path(spec) / embed.MANIFEST).is_file():
        items, batches = _open_shards(spec, index)
    else:
        items = open_items(spec, kind)
        batches = _batches(items)
    rows_there = index.count()
    if index.is_local and not force and rows_there + items.count >= LITE_MOST_ROWS:
        raise ValueError(
            f"{spec} could bring the index to {rows_there + items.count:,} rows; Milvus Lite is "
            f"refused {LITE_MOST_ROWS:,} and more. Use a server (align index copy --to "
            "http://host:19530), or --force."
        )
    counts = {"added": 0, "updated": 0, "unchanged": 0}
    problems, seen = items.problems, set()
    progress = show_progress(batches, items.count, "index", "item", size=lambda batch: batch.size)
    for batch in progress:
        for reason, name in batch.unreadable:
            _leave_out(reason, name, problems, on_error)
        ready = []
        for row, value in batch.rows:
            if (hashed := hash_key(row.key)) in seen:
                _leave_out("key_duplicate", shorten(row.key), problems, on_error)
                continue
            seen.add(hashed)
            try:
                check_row(row)
            except ValueError as error:
                _leave_out("row_refused", str(error), problems, on_error)
                continue
            ready.append((row, value))
        changed, there = index.changed([row for row, _ in ready])
        todo = [ready[number] for number in changed]
        rows, vectors, unreadable = _embed(model, todo)
        for reason, name in unreadable:
            _leave_out(reason, name, problems, on_error)
        index.put(rows, vectors)
        for row in rows:
            counts["updated" if row.key in there else "added"] += 1
        counts["unchanged"] += len(ready) - len(changed)
    index.flush()
    return {**counts, "problems": problems}


def absolute(spec: str) -> str:
    """Returns a source with absolute paths, so that it opens from any folder."""
    path, mark, query = spec.partition("?")
    if path == "scenes":
        return spec
    options = []
    for option in filter(None, query.split("&")):
        name, _, value = option.partition("=")
        if name in ("images", "classes"):
            value = ",".join(os.path.abspath(part) for part in value.split(","))
        options.append(f"{name}={value}")
    return os.path.abspath(path) + mark + "&".join(options)


class Pictures:
    """Reads the pictures of rows again; keeps the sources that it has opened."""

    def __init__(self) -> None:
        """Opens nothing yet."""
        self._opened: dict[str, Items] = {}

    def read(self, key: str, source: str) -> np.ndarray:
        """Returns the picture of a row, uint8 RGB [H, W, 3].

        Raises:
          ValueError, OSError: it is no longer there, or another one is in its place.
        """
        spec, mark, number = source.rpartition("#")
        if not mark or not number.isdecimal():
            raise ValueError(f"{shorten(key)}: its row does not say where its picture is.")
        if spec not in self._opened:
            self._opened[spec] = open_items(spec)
        items = self._opened[spec]
        found = items.read(int(number)) if int(number) < items.count else []
        for row, image in found:
            if row.key == key:
                return decode_image(image)
        raise ValueError(f"{spec} has changed: {shorten(key)} is no longer its item {number}.")


class _Batch(NamedTuple):
    """Rows with what is to be embedded, or with their vectors; names of items left out."""

    size: int
    rows: list[tuple[Row, Any]]
    unreadable: list[tuple[str, str]]


def _plain(items: embed.Items, spec: str) -> Items:
    """The rows of images or texts that are no pairs."""

    def read(number: int) -> list[tuple[Row, Any]]:
        return [
            (make_row(key, items.kind, text_of(value), f"{spec}#{number}", {}, value), value)
            for key, value in items.read(number)
        ]

    def text_of(value: Any) -> str:
        return value if items.kind == "text" else ""

    return Items(spec, items.count, read, items.problems)


def _batches(items: Items) -> Iterator[_Batch]:
    for start in range(0, items.count, _BATCH_ITEMS):
        numbers = range(start, min(start + _BATCH_ITEMS, items.count))
        yield _Batch(len(numbers), *_read(items, numbers))


def _read(items: Items, numbers: range) -> tuple[list[tuple[Row, Any]], list[tuple[str, str]]]:
    rows, unreadable = [], []
    for number in numbers:
        try:
            rows += items.read(number)
        except (BadImage, OSError) as error:
            unreadable.append((reason_of(error), f"item {number}: {error}"))
    return rows, unreadable


def _open_shards(folder: str, index: Index) -> tuple[Items, Iterator[_Batch]]:
    """The rows of a folder of `align embed`; captions and columns come from its source."""
    try:
        manifest = read_json(Path(folder) / embed.MANIFEST)
        size, kind, suffix = (manifest[key] for key in ("shard_size", "kind", "file_format"))
        model = manifest["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/{embed.MANIFEST} cannot be used: {error!r}.") from None
    if model != index.identity.fingerprint:
        raise ValueError(
            f"{folder} holds embeddings of the model {model}, the index of "
            f"{index.identity.fingerprint}; embed with its model."
        )
    paths = sorted(Path(folder).glob(f"[0-9]*.{suffix}"), key=lambda path: int(path.stem))
    items = Items(folder, len(paths) * size, lambda number: [], Problems())
    named = Path(folder) / embed.SOURCE_FILE
    if named.is_file():
        items = open_items(read_text(named).strip(), kind)

    def batches() -> Iterator[_Batch]:
        for path in paths:
            keys, z = embed.read_shard(path)
            vectors = dict(zip(keys, z, strict=True))
            first = int(path.stem) * size
            rows, _ = _read(items, range(first, min(first + size, items.count)))
            found = [(row, vectors.pop(row.key)) for row, _ in rows if row.key in vectors]
            # Where the source has other keys, or is not known, a row is its key and vector.
            bare = [(make_row(key, kind, "", "", {}, z), z) for key, z in vectors.items()]
            yield _Batch(size, found + bare, [])

    return items, batches()


def _embed(
    model: Any, todo: list[tuple[Row, Any]]
) -> tuple[list[Row], np.ndarray, list[tuple[str, str]]]:
    """Returns rows, their vectors [N, D], and (reason, name) of images that are none."""
    vectors: dict[int, np.ndarray] = {}
    unreadable: dict[int, tuple[str, str]] = {}

    def decode(number: int) -> np.ndarray:
        row, image = todo[number]
        try:
            return decode_image(image)
        except (BadImage, OSError) as error:
            reason = getattr(error, "reason", "image_unreadable")
            unreadable[number] = (reason, f"{shorten(row.key)}: {error}")
            raise BadImage(reason, f"{shorten(row.key)}: {error}") from error

    images, texts = [], []
    for number, (row, value) in enumerate(todo):
        if isinstance(value, np.ndarray) and value.dtype == np.float32:
            vectors[number] = value
        else:
            (images if row.kind == "image" else texts).append(number)
    if images:
        z = model.encode_image([partial(decode, number) for number in images], on_error="skip")
        vectors.update(zip(images, z, strict=True))
    if texts:
        vectors.update(zip(texts, model.encode_text([todo[i][1] for i in texts]), strict=True))
    kept = [number for number in range(len(todo)) if number not in unreadable]
    z = np.array([vectors[number] for number in kept], np.float32)
    return [todo[number][0] for number in kept], z, list(unreadable.values())


def _leave_out(reason: str, name: str, problems: Problems, on_error: str) -> None:
    if on_error == "raise":
        raise ValueError(f"{name} ({reason}; --on-error skip leaves it out)")
    problems.add(reason, name)
