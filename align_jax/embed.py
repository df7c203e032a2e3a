"""`align embed`: embeddings of many images or texts, in shards of rows with keys; resumable.

A shard covers a fixed range of the input and its data file appears whole or not at all, so a rerun
makes the missing shards only. `NNNNN.json` beside it says what was left out, and why.
"""

import dataclasses
import importlib.util
import json
import os
import posixpath
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from align_jax.align import Align
from align_jax.data.images import IMAGE_SUFFIXES, BadImage, decode_image
from align_jax.data.sources import archives, files
from align_jax.data.sources import open_source as sources
from align_jax.data.sources.img2dataset import is_img2dataset
from align_jax.data.sources.packed import find_tfds_folder
from align_jax.data.sources.record import Record, is_usable
from align_jax.run.progress import show_progress
from align_jax.storage import identity, writing
from align_jax.storage.paths import find_paths
from align_jax.storage.problems import Problems, reason_of, report
from align_jax.storage.text import check_caption, check_line_ends, read_blocks

FORMATS = ("npy", "parquet")

MANIFEST, SOURCE_FILE = "manifest.json", "source.txt"
_REPORT = "report.json"


@dataclasses.dataclass(frozen=True)
class Items:
    """What is to be embedded, by index.

    Attributes:
      kind: "image" or "text".
      count: of items; an item has one row (image) or several (captions of a record).
      read: index -> [(key, image or text)]; OSError if it cannot be read.
      name: index -> what to call the item where it cannot be read.
      identity: one line, equal if and only if keys, order and content are (identity.stamp).
      problems: what was found missing before anything is read.
    """

    kind: str
    count: int
    read: Callable[[int], list[tuple[str, bytes | np.ndarray | str]]]
    name: Callable[[int], str]
    identity: str
    problems: Problems


def open_images(spec: str) -> Items:
    """Returns the images that `spec` names; their keys are file names, or those of the records.

    Args:
      spec: an image file, a folder (searched recursively), a .zip or .tar, a glob of these, or
        what `sources.open_source` takes.

    Raises:
      ValueError: there is no image.
    """
    problems = Problems()
    paths = find_paths(spec)
    images = [path for path in paths if path.lower().endswith(IMAGE_SUFFIXES)]
    stores = [path for path in paths if path not in images and _is_store(path)]
    members = {path: archives.Member(path, path, "file") for path in images}
    if files.archives_inside(stores, problems) == stores:  # else a folder of shards
        for path, member in files.list_images(stores, problems):
            key = member.name if len(paths) == 1 else posixpath.join(path, member.name)
            members[key] = member
    if not members:
        source = sources.open_source(spec)
        return _source_items(source, "image", lambda record: [(record.key, record.image)])
    for path in paths:
        if path not in members and path not in stores:
            problems.add("file_not_an_image", path)
    keys = list(members)
    return Items(
        "image",
        len(keys),
        lambda index: [(keys[index], archives.read_member(members[keys[index]]))],
        lambda index: keys[index],
        f"{len(keys)} images {identity.digest([keys, archives.stamp_members(members.values())])}",
        problems,
    )


def open_texts(spec: str) -> Items:
    """Returns the texts that `spec` names.

    Args:
      spec: a .txt file with one text a line, whose keys are line numbers from 1; or what
        `sources.open_source` takes, whose keys are `<record>#<caption>`, captions from 0.

    Raises:
      ValueError: there is no text.
    """
    if not spec.endswith(".txt"):
        return _source_items(sources.open_source(spec), "text", _caption_rows)
    if not os.path.isfile(spec):
        raise ValueError(f"{spec} does not exist; name a file with one text a line, or pairs.")
    problems, texts = Problems(), []
    for block in read_blocks(spec):
        check_line_ends(spec, block)
        for i in sorted(block.repaired):
            problems.add("text_repaired", f"{spec}:{block.first + i}")
        texts += block.lines
    if not texts:
        raise ValueError(f"{spec} holds no text.")
    return Items(
        "text",
        len(texts),
        lambda index: [(str(index + 1), check_caption(texts[index], f"{spec}:{index + 1}"))],
        lambda index: f"{spec}:{index + 1}",
        f"{len(texts)} lines {identity.digest(texts)}",
        problems,
    )


def _caption_rows(record: Record) -> list[tuple[str, str]]:
    rows = [(f"{record.key}#{n}", text) for n, text in enumerate(record.captions)]
    return [(key, text) for key, text in rows if is_usable(text)]


def check_format(name: str) -> None:
    """Raises ValueError if embeddings cannot be written in the format `name` on this machine."""
    if name == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(
            "--format parquet needs pyarrow: pip install 'align_jax[parquet]', or --format npy."
        )


def embed(
    model: Align,
    items: Items,
    out: str | os.PathLike,
    *,
    file_format: str = "npy",
    shard_size: int = 4096,
    on_error: str = "raise",
) -> dict[str, int]:
    """Writes shards of embeddings and returns counts: rows, skipped, shards, shards_found.

    `skipped` is the sum of all reasons by which something was left out (Problems.num_lost). They
    are said on standard error and, with what the source misses, in `report.json`:
    reason -> count and first.

    `npy`: NNNNN.npy float32 [rows, D], keys in NNNNN.json. `parquet`: NNNNN.parquet with columns
    key and embedding. Shards that are there already (`shards_found`) are left alone.

    Args:
      model: that embeds.
      items: from `open_images` or `open_texts`.
      out: folder; made if missing.
      file_format: one of FORMATS.
      shard_size: items of a shard, at least 1.
      on_error: "raise" stops at the first item that cannot be read, "skip" leaves it out.

    Raises:
      ValueError: the folder holds embeddings of another model or input, or an item is unusable.
      RuntimeError: an embedding is not finite, or no item could be read.
    """
    if shard_size < 1:
        raise ValueError(f"--shard-size {shard_size} must be at least 1.")
    writing.check_local(out, "--out")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder.")
    manifest = {
        "kind": items.kind,
        "inputs": items.identity,
        "model": model.fingerprint(),
        "embed_dim": model.model.embed_dim,
        "file_format": file_format,
        "shard_size": shard_size,
    }
    with writing.locked(out, "align embed"), writing.explaining_full_disk(out):
        _check_manifest(out, manifest, items.count)
        return _embed_shards(model, items, out, file_format, shard_size, on_error)


def _embed_shards(
    model: Align, items: Items, out: Path, file_format: str, shard_size: int, on_error: str
) -> dict[str, int]:
    embed_part = _embed_images if items.kind == "image" else _embed_texts
    starts = range(0, items.count, shard_size)
    todo = [k for k in range(len(starts)) if not (out / f"{k:05d}.{file_format}").exists()]
    shards = [range(start, min(start + shard_size, items.count)) for start in starts]
    left = sum(len(shards[k]) for k in todo)
    for k in show_progress(todo, left, "embed", items.kind, size=lambda k: len(shards[k])):
        indices = shards[k]
        keys, z, skipped = embed_part(model, items, indices, on_error)
        if not np.isfinite(z).all():
            bad = int(np.flatnonzero(~np.isfinite(z).all(axis=1))[0])
            raise RuntimeError(f"The embedding of {keys[bad]} is not finite; check the weights.")
        _write_shard(out / f"{k:05d}.{file_format}", keys, z, skipped)
    written = [json.loads((out / f"{k:05d}.json").read_text()) for k in range(len(starts))]
    problems = Problems()
    problems.merge(items.problems)
    for name, reason, _ in (item for shard in written for item in _skipped_of(shard)):
        problems.add(reason, name)
    counts = {
        "rows": sum(shard["rows"] for shard in written),
        "skipped": problems.num_lost(),
        "shards": len(starts),
    }
    # Without what was found: the report of a run that was killed is that of one that was not.
    content = {"source": items.identity, **counts, "problems": report(problems, str(out))}
    writing.write_json(out / _REPORT, content, ensure_ascii=False)
    if not counts["rows"]:
        raise RuntimeError(f"None of the {items.count} items can be read; see {out}/{_REPORT}.")
    return counts | {"shards_found": len(starts) - len(todo)}


def read_shard(path: Path) -> tuple[list[str], np.ndarray]:
    """Returns the keys and embeddings [rows, D] of a data file that `embed` has written."""
    if path.suffix == ".npy":
        return json.loads(path.with_suffix(".json").read_text())["keys"], np.load(path)
    from pyarrow import parquet

    table = parquet.read_table(path).combine_chunks()
    z = table["embedding"].combine_chunks().flatten().to_numpy()
    return table["key"].to_pylist(), z.reshape(table.num_rows, -1)


def _source_items(
    source: sources.PairSource,
    kind: str,
    rows_of: Callable[[Record], list[tuple[str, bytes | np.ndarray | str]]],
) -> Items:
    return Items(
        kind,
        len(source),
        lambda index: rows_of(source[index]),
        source.where,
        f"{len(source)} records {identity.stamp(source)}",
        source.problems,
    )


def _is_store(path: str) -> bool:
    if os.path.isdir(path):
        return not find_tfds_folder(path) and not is_img2dataset(path)
    return path.lower().endswith(archives.ARCHIVE_SUFFIXES)


def _embed_images(
    model: Align, items: Items, indices: range, on_error: str
) -> tuple[list[str], np.ndarray, list[list[str]]]:
    """(keys, z [rows, D], [[name, reason, message]]) of the images, decoded in threads."""
    keys, skipped = {}, {}

    def reader(index: int) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:  # uint8 [H, W, 3]
            name = items.name(index)
            try:
                [(key, image)] = items.read(index)
                rgb = decode_image(image)
            except (BadImage, OSError) as error:
                reason = reason_of(error)
                skipped[index] = [name, reason, str(error)]
                hint = " (--on-error skip leaves it out)" if on_error == "raise" else ""
                raise BadImage(reason, f"{name}: {error}{hint}") from error
            keys[index] = key
            return rgb

        return read

    z = model.encode_image((reader(index) for index in indices), on_error=on_error)
    kept = [row for row, index in enumerate(indices) if index in keys]
    skipped = [skipped[index] for index in sorted(skipped)]
    return [keys[indices[row]] for row in kept], z[kept], skipped


def _embed_texts(
    model: Align, items: Items, indices: range, on_error: str
) -> tuple[list[str], np.ndarray, list[list[str]]]:
    """What `_embed_images` does, of texts; an item may have several rows."""
    rows, skipped = [], []
    for index in indices:
        try:
            found = items.read(index)
        except OSError as error:
            if on_error == "raise":
                raise
            skipped.append([items.name(index), reason_of(error), str(error)])
            continue
        rows += found
        if not found:
            skipped.append([items.name(index), "caption_empty", "No caption."])
    if not rows:
        return [], np.zeros((0, model.model.embed_dim), np.float32), skipped
    keys, texts = zip(*rows, strict=True)
    return list(keys), model.encode_text(texts), skipped


def _skipped_of(shard: dict[str, Any]) -> list[list[str]]:
    """Returns name, reason and message of what a shard left out; 0.1.0 kept no reason."""
    skipped = shard["skipped"]
    if isinstance(skipped, dict):
        return [[name, "record_unreadable", message] for name, message in skipped.items()]
    return skipped


def _check_manifest(out: Path, manifest: dict[str, Any], count: int) -> None:
    """Writes the manifest of a new folder; refuses a folder of other embeddings."""
    path = out / MANIFEST
    if not path.exists():
        if any(other.name != writing.LOCK_FILE for other in out.iterdir()):
            raise ValueError(f"{out} holds other files; name a new folder.")
        writing.write_json(path, manifest)
        return
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    is_older = not re.search(" [0-9a-f]{32}$", str(before.get("inputs")))
    for key, value in manifest.items():
        same = before.get(key) == value
        if key == "inputs" and is_older:
            same = str(count) in re.findall(r"\d+", str(before.get(key)))
        if not same:
            raise ValueError(
                f"{out} holds embeddings with {key}={before.get(key)!r}, not {value!r}; "
                "name another folder."
            )
    if is_older:
        print(
            f"{out} is of a version that did not record what its inputs held: only their number "
            "could be compared.",
            file=sys.stderr,
        )
        writing.write_json(path, manifest)


def _write_shard(path: Path, keys: list[str], z: np.ndarray, skipped: list[list[str]]) -> None:
    """Writes embeddings [rows, D] with their keys, and what was left out."""
    content: dict[str, Any] = {"rows": len(keys), "skipped": skipped}
    if path.suffix == ".npy":
        content["keys"] = keys
    writing.write_json(path.with_suffix(".json"), content, indent=1)
    # Last, because it marks the shard as done.
    with writing.replacing(path) as temporary, open(temporary, "wb") as file:
        if path.suffix == ".npy":
            np.save(file, z)
        else:
            _write_parquet(file, keys, z)


def _write_parquet(file: BinaryIO, keys: list[str], z: np.ndarray) -> None:
    """Writes embeddings [rows, D] with their keys."""
    import pyarrow
    from pyarrow import parquet

    values = pyarrow.array(z.ravel(), pyarrow.float32())
    embedding = pyarrow.FixedSizeListArray.from_arrays(values, z.shape[1])
    table = pyarrow.table({"key": pyarrow.array(keys, pyarrow.string()), "embedding": embedding})
    parquet.write_table(table, file)
