"""`align embed`: embeddings of many images or texts, in shards of rows with keys; resumable.

A shard covers a fixed range of the input and its data file appears whole or not at all, so a rerun
makes the missing shards only. `NNNNN.json` beside it says what was left out, and why.
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
import posixpath
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align_jax.align import Align
from align_jax.data.images import IMAGE_SUFFIXES, BadImage, decode_image
from align_jax.data.sources import archives, files
from align_jax.data.sources import open_source as sources
from align_jax.data.sources.img2dataset import is_img2dataset
from align_jax.data.sources.packed import find_tfds_folder
from align_jax.run.progress import show_progress
from align_jax.storage.paths import find_paths
from align_jax.storage.problems import Problems
from align_jax.storage.text import check_caption, read_blocks

FORMATS = ("npy", "parquet")

_MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Items:
    """What is to be embedded, by index.

    Attributes:
      kind: "image" or "text".
      count: of items; an item has one row (image) or several (captions of a record).
      read: index -> [(key, image or text)]; OSError if it cannot be read.
      name: index -> what to call the item where it cannot be read.
      identity: one line, equal if and only if keys and order are (as far as names tell).
      problems: what was found missing before anything is read.
    """

    kind: str
    count: int
    read: Callable[[int], list[tuple[str, Any]]]
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
        f"{len(keys)} images, names {_digest(keys)}",
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
        return _source_items(
            sources.open_source(spec),
            "text",
            lambda record: [(f"{record.key}#{n}", text) for n, text in enumerate(record.captions)],
        )
    if not os.path.isfile(spec):
        raise ValueError(f"{spec} does not exist; name a file with one text a line, or pairs.")
    problems, texts = Problems(), []
    for block in read_blocks(spec):
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
        f"{len(texts)} lines {_digest(texts)}",
        problems,
    )


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
    out = Path(out)
    _check_manifest(
        out,
        {
            "kind": items.kind,
            "inputs": items.identity,
            "model": model.fingerprint(),
            "embed_dim": model.model.embed_dim,
            "file_format": file_format,
            "shard_size": shard_size,
        },
    )
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
    reports = [json.loads((out / f"{k:05d}.json").read_text()) for k in range(len(starts))]
    counts = {
        "rows": sum(report["rows"] for report in reports),
        "skipped": sum(len(report["skipped"]) for report in reports),
        "shards": len(starts),
        "shards_found": len(starts) - len(todo),
    }
    if not counts["rows"]:
        raise RuntimeError(f"None of the {items.count} items can be read; see {out}/00000.json.")
    return counts


def _source_items(source, kind, rows_of):
    return Items(
        kind,
        len(source),
        lambda index: rows_of(source[index]),
        lambda index: f"record {index}",
        source.describe(),
        source.problems,
    )


def _is_store(path: str) -> bool:
    if os.path.isdir(path):
        return not find_tfds_folder(path) and not is_img2dataset(path)
    return path.lower().endswith(archives.ARCHIVE_SUFFIXES)


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()[:16]


def _embed_images(model, items, indices, on_error):
    """(keys, z, {name: reason}) of the images; files are read and decoded in threads."""
    keys, skipped = {}, {}

    def reader(index):
        def read():
            name = items.name(index)
            try:
                [(name, image)] = items.read(index)
                rgb = decode_image(image)
            except (BadImage, OSError) as error:
                skipped[name] = str(error)
                reason = getattr(error, "reason", "image_unreadable")
                hint = " (--on-error skip leaves it out)" if on_error == "raise" else ""
                raise BadImage(reason, f"{name}: {error}{hint}") from error
            keys[index] = name
            return rgb

        return read

    z = model.encode_image((reader(index) for index in indices), on_error=on_error)
    kept = [row for row, index in enumerate(indices) if index in keys]
    return [keys[indices[row]] for row in kept], z[kept], skipped


def _embed_texts(model, items, indices, on_error):
    rows, skipped = [], {}
    for index in indices:
        try:
            rows += items.read(index)
        except OSError as error:
            if on_error == "raise":
                raise
            skipped[items.name(index)] = str(error)
    if not rows:
        return [], np.zeros((0, model.model.embed_dim), np.float32), skipped
    keys, texts = zip(*rows, strict=True)
    return list(keys), model.encode_text(texts), skipped


def _check_manifest(out: Path, manifest: dict[str, Any]) -> None:
    path = out / _MANIFEST
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder.")
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} holds other files; name a new folder.")
        out.mkdir(parents=True, exist_ok=True)
        _replace(path, lambda file: file.write(json.dumps(manifest, indent=2).encode()))
        return
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    for key, value in manifest.items():
        if before.get(key) != value:
            raise ValueError(
                f"{out} holds embeddings with {key}={before.get(key)!r}, not {value!r}; "
                "name another folder."
            )


def _write_shard(path: Path, keys, z, skipped) -> None:
    report: dict[str, Any] = {"rows": len(keys), "skipped": skipped}
    if path.suffix == ".npy":
        report["keys"] = keys
    text = json.dumps(report, indent=1)
    _replace(path.with_suffix(".json"), lambda file: file.write(text.encode()))
    # Last, because it marks the shard as done.
    if path.suffix == ".npy":
        _replace(path, lambda file: np.save(file, z))
    else:
        _replace(path, lambda file: _write_parquet(file, keys, z))


def _write_parquet(file, keys, z):
    import pyarrow
    from pyarrow import parquet

    values = pyarrow.array(z.ravel(), pyarrow.float32())
    embedding = pyarrow.FixedSizeListArray.from_arrays(values, z.shape[1])
    keys = pyarrow.array(keys, pyarrow.string())
    parquet.write_table(pyarrow.table({"key": keys, "embedding": embedding}), file)


def _replace(path: Path, write: Callable[[Any], Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
    os.replace(temporary, path)
