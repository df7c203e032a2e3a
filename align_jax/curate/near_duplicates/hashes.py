"""Matches by perceptual hashes: of training images with evaluation images, or inside a set.

Training hashes are read a block at a time. Those of evaluation images are in memory, 16 an image:
people crop, mirror and frame what they copy (perceptual_hash.COPIES).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import ibis.expr.types as ir
import numpy as np
import pyarrow as pa

from align_jax.curate.filter.engines import Engine
from align_jax.curate.near_duplicates import inside
from align_jax.curate.near_duplicates.image_sets import HashTables, ImageSet, Pictures
from align_jax.curate.near_duplicates.matches import Matches
from align_jax.curate.scan import import_parquet
from align_jax.data.perceptual_hash import COPIES, hamming_pairs, parse_hashes, phash_copies
from align_jax.run.progress import num_cores, show_progress
from align_jax.storage import writing

_IMAGES_AT_ONCE = 1000
_ROWS = "images"  # folder of parts


def hash_copies(tables: HashTables, images: ImageSet, path: str) -> np.ndarray:
    """Returns the hashes of the copies of scanned images, uint64 [N, 16].

    Args:
      tables: of a scan.
      images: what they hold.
      path: file, made here, or left by an interrupted call.

    Raises:
      ValueError: the source that was scanned cannot be opened or has changed.
    """
    if os.path.exists(path):
        return np.fromfile(path, np.uint64).reshape(-1, len(COPIES))
    pictures = Pictures(tables, "copies of images")

    def hash_image(row: int) -> np.ndarray:
        picture = pictures.get(images.keys[row].as_py(), int(images.positions[row]))
        return parse_hashes(phash_copies(picture))

    found = []
    starts = range(0, len(images.values), _IMAGES_AT_ONCE)
    with ThreadPoolExecutor(num_cores()) as threads:
        for start in show_progress(starts, len(starts), "hash copies", "thousand"):
            rows = range(start, min(start + _IMAGES_AT_ONCE, len(images.values)))
            found += threads.map(hash_image, rows)
    hashes = np.array(found, np.uint64)
    writing.write_bytes(path, hashes.tobytes())
    return hashes


def match_others(
    train: HashTables,
    others: Sequence[tuple[ImageSet, np.ndarray]],
    max_distance: int,
    count: Callable[[ImageSet], None],
) -> Iterator[Matches]:
    """Yields the matches of training images with other sets.

    Args:
      train: tables of the training set.
      others: images with the hashes of their copies, uint64 [M, copies]; sets 1, 2, ...
      max_distance: bits.
      count: is told of each block of training images.
    """
    num_rows = 0
    for block in train.blocks():
        count(block)
        found = []
        for number, (images, hashes) in enumerate(others, 1):
            rows, places, distances = hamming_pairs(block.values, hashes.ravel(), max_distance)
            of_image, copies = np.divmod(places, hashes.shape[1])
            # Of an image's copies the nearest, and of those the first.
            order = np.lexsort((copies, distances, of_image, rows))
            pair = np.stack([rows, of_image], axis=1)[order]
            nearest = order[(np.diff(pair, axis=0, prepend=-1) != 0).any(axis=1)]
            rows, of_image = rows[nearest], of_image[nearest]
            found.append(
                Matches(
                    rows + num_rows,
                    _take(block.keys, rows),
                    np.full(len(rows), number),
                    of_image,
                    _take(images.keys, of_image),
                    distances[nearest],
                    copies[nearest],
                    np.stack([_positions(block, rows), _positions(images, of_image)], axis=1),
                )
            )
        columns = zip(*(vars(one).values() for one in found), strict=True)
        matches = Matches(*map(np.concatenate, columns))
        yield matches[np.lexsort((matches.others, matches.sets, matches.rows))]
        num_rows += len(block.values)


def write_rows(train: HashTables, folder: str, count: Callable[[ImageSet], None]) -> None:
    """Writes the images as numbered rows for an engine, a part for each block that is not there.

    Args:
      train: tables of the set.
      folder: keeps what is found on the way.
      count: is told of each block of images.
    """
    num_rows = 0
    for number, block in enumerate(train.blocks()):
        count(block)
        rows = np.arange(num_rows, num_rows + len(block.values))
        num_rows += len(rows)
        path = os.path.join(folder, _ROWS, f"{number:06d}.parquet")
        if not os.path.exists(path):
            columns = {
                "row": rows,
                "key": block.keys.cast(pa.string()),
                "hash": block.values.view(np.int64),
                "index": _positions(block, slice(None)),
            }
            with writing.replacing(path) as temporary:
                import_parquet().write_table(pa.table(columns), temporary)


def match_inside(
    engine: Engine, folder: str, max_distance: int
) -> tuple[dict[str, int], Iterator[Matches]]:
    """Returns counts of groups, and each image that is not the first of its group with that one.

    Args:
      engine: see filter/engines.py.
      folder: where `write_rows` has put the images; keeps what is found on the way, with which a
        later call goes on.
      max_distance: bits.
    """
    table = engine.read(os.path.join(folder, _ROWS))
    groups = inside.find_groups(
        table.select("row", "hash"), engine, os.path.join(folder, "inside"), max_distance
    )
    sizes = groups.group_by("first").aggregate(size=groups.count() + 1)
    counts = engine.first(sizes.aggregate(groups=sizes.count(), largest_group=sizes.size.max()))
    counts["largest_group"] = counts["largest_group"] or 1
    return counts, _with_first(engine, table, groups)


def _with_first(engine: Engine, table: ir.Table, groups: ir.Table) -> Iterator[Matches]:
    names = {"first": "row", "first_key": "key", "first_hash": "hash", "first_index": "index"}
    found = groups.join(table, "row").join(table.select(**names), "first")
    columns = ("row", "key", "first", "first_key", "index", "first_index")
    found = found.select(*columns, bits=found.hash ^ found.first_hash)
    for batch in engine.batches(found.order_by("row")):
        rows, others, bits = (batch[name].to_numpy() for name in ("row", "first", "bits"))
        yield Matches(
            rows,
            _objects(batch["key"]),
            np.zeros(len(rows), np.int64),
            others,
            _objects(batch["first_key"]),
            np.bitwise_count(bits.view(np.uint64)),
            None,
            np.stack([batch[name].to_numpy() for name in ("index", "first_index")], axis=1),
        )


def _positions(images: ImageSet, rows: np.ndarray | slice) -> np.ndarray:
    """Positions in the source that was scanned, int64 [rows]; -1 where there was no scan."""
    none = images.positions is None
    return np.full(len(images.values), -1)[rows] if none else images.positions[rows]


def _take(keys: pa.Array | pa.ChunkedArray, rows: np.ndarray) -> np.ndarray:
    return _objects(keys.take(pa.array(rows)))


def _objects(keys: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Texts as an array of objects [N]."""
    found = np.empty(len(keys), object)
    found[:] = keys.to_pylist()
    return found
