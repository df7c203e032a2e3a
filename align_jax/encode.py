"""Any number of images or texts in batches of few shapes, and their embeddings in the given order.

Threads decode images while the device computes; of several processes, each decodes the rows that
its devices compute. Texts are sorted by length, since a batch costs as much as its longest text.
What an embedding is stands in `models/dual_encoder.py`; here it is compiled.
"""

import bisect
import contextlib
import hashlib
import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding

from align_jax import mesh as mesh_lib
from align_jax import trees
from align_jax.data import images as images_lib
from align_jax.data.tokenizer import Tokenizer
from align_jax.hf.processor import Preprocessing
from align_jax.models import classifier, dual_encoder
from align_jax.run import multihost

ON_ERROR = ("raise", "skip")

_BATCHES_AHEAD = 2  # of images, decoded while one is computed
_BATCHES_PER_WINDOW = 32  # texts are sorted inside windows, so that generators may be endless
_PROGRESS_AFTER_S = 2.0

# (arrays of the compiled function, row of each example, rows that have no embedding)
Batches = Generator[tuple[tuple[np.ndarray, ...], np.ndarray, list[int]], None, None]

T = TypeVar("T")

_logger = logging.getLogger(__name__)


def compile_embed(
    model: dual_encoder.DualEncoder, variable_shardings: Any, mesh: Mesh
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """Returns (embed_image(variables, images), embed_text(variables, ids, mask)), jitted.

    Images are uint8 [B, H, W, 3], ids and mask int32 [B, L], with B divisible by the devices;
    results are replicated float32 [B, D], unit norm, eval mode.
    """
    rows, everywhere = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)
    return (
        jax.jit(
            partial(dual_encoder.embed_image, model),
            in_shardings=(variable_shardings, rows),
            out_shardings=everywhere,
        ),
        jax.jit(
            partial(dual_encoder.embed_text, model),
            in_shardings=(variable_shardings, rows, rows),
            out_shardings=everywhere,
        ),
    )


def compile_embed_cls(
    model: dual_encoder.DualEncoder, variable_shardings: Any, mesh: Mesh
) -> Callable[..., jax.Array]:
    """Returns embed_cls(variables, ids, mask), jitted: `compile_embed`'s of texts, but what it
    gives is the state of [CLS] before the projection, see dual_encoder.embed_text."""
    rows, everywhere = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)
    return jax.jit(
        partial(dual_encoder.embed_text, model, projected=False),
        in_shardings=(variable_shardings, rows, rows),
        out_shardings=everywhere,
    )


def compile_scores(
    model: classifier.Classifier, variable_shardings: Any, mesh: Mesh
) -> Callable[..., jax.Array]:
    """Returns scores(variables, images), jitted: `compile_embed`'s of images, but what it gives is
    the logits [B, K] of a classifier."""
    rows, everywhere = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)
    return jax.jit(
        partial(classifier.class_scores, model),
        in_shardings=(variable_shardings, rows),
        out_shardings=everywhere,
    )


def fingerprint(
    model: dual_encoder.Model, variables: dual_encoder.Variables, preprocessing: Preprocessing
) -> str:
    """Returns 16 hex digits that identify weights, compute dtype, tokenizer, preprocessing."""
    dtype = np.dtype(model.image.dtype).name
    digest = hashlib.sha256(repr((preprocessing, dtype)).encode())
    for name, leaf in sorted(trees.named_leaves(variables)):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()[:16]


def encode(
    embed: Callable[..., jax.Array],
    batches: Batches,
    *,
    sharding: NamedSharding,
    batch_size: int,
    progress: tqdm.tqdm,
) -> np.ndarray:
    """Returns [N, D] float32, row i the embedding of example i; NaN where it has none.

    Args:
      embed: arrays of B rows -> [B, D].
      batches: from `image_batches` or `text_batches`.
      sharding: of the rows of a batch.
      batch_size: most rows of a batch, a multiple of the devices. Smaller batches are padded to
        the devices times a power of two, so few shapes are compiled.
      progress: is told how many examples are done.

    Raises:
      ValueError: there is no example.
    """
    blocks, all_rows, all_bad, waiting = [], [], [], deque()
    with contextlib.closing(batches), progress:
        for arrays, rows, bad in batches:
            size = _padded_size(len(rows), sharding.num_devices, batch_size)
            waiting.append((embed(*(_to_device(a, size, sharding) for a in arrays)), len(rows)))
            all_rows.append(rows)
            all_bad += bad
            # Fetched one batch late: the next one is prepared while the device computes.
            if len(waiting) > 1:
                blocks.append(_fetch(*waiting.popleft()))
            progress.update(len(rows))
        blocks += [_fetch(*item) for item in waiting]
    if not blocks:
        raise ValueError("Nothing to encode: the input is empty.")
    z = np.concatenate(blocks)
    z[np.concatenate(all_rows)] = z.copy()
    is_bad = np.zeros(len(z), np.int64)
    is_bad[all_bad] = 1
    z[multihost.total(is_bad) > 0] = np.nan
    return z


def image_batches(
    images: Iterable,
    preprocessing: Preprocessing,
    *,
    sharding: NamedSharding,
    batch_size: int,
    on_error: str,
) -> Batches:
    """Yields uint8 [B, image_size, image_size, 3], B at most `batch_size`, in the given order.

    Rows of other processes' devices are black: every process takes all of `images` and decodes its
    own part of each batch.

    Args:
      images: what `images.decode_image` takes, or functions of no arguments that return it.
      preprocessing: of the model.
      sharding: of the rows of a batch.
      batch_size: most images of a batch.
      on_error: "raise", or "skip": the image is black, its row is reported, a warning is logged.

    Raises:
      images.BadImage, OSError: one of them cannot be used; the message names it.
    """
    size = preprocessing.image_size
    pool = ThreadPoolExecutor(os.cpu_count() or 1)

    def settle(start: int, count: int, futures: dict[int, Future]) -> tuple:
        """Returns an item of `Batches`; futures are of the rows that this process decodes."""
        views, bad = np.zeros((count, size, size, 3), np.uint8), []
        for row, future in futures.items():
            try:
                views[row] = future.result()
            except (images_lib.BadImage, OSError) as error:
                if on_error == "raise":
                    raise
                _logger.warning("left out: %s", error)
                bad.append(start + row)
        return (views,), np.arange(start, start + count), bad

    waiting, start = deque(), 0
    try:
        for window in _windows(images, batch_size):
            futures = {
                row: pool.submit(_view, start + row, window[row], preprocessing)
                for row in _own_rows(len(window), sharding, batch_size)
            }
            waiting.append((start, len(window), futures))
            start += len(window)
            if len(waiting) > _BATCHES_AHEAD:
                yield settle(*waiting.popleft())
        while waiting:
            yield settle(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def text_batches(
    texts: Iterable[str], tokenizer: Tokenizer, *, max_tokens: int, batch_size: int
) -> Batches:
    """Yields (ids, mask), both int32 [B, L], with similar lengths together.

    Args:
      texts: of any length.
      tokenizer: of the model.
      max_tokens: to which texts are cut; L is one of `text_lengths` of it.
      batch_size: most texts of a batch.

    Raises:
      ValueError: one of them is no string.
    """
    start = 0
    for window in _windows(texts, _BATCHES_PER_WINDOW * batch_size):
        for index, text in enumerate(window):
            if not isinstance(text, str):
                raise ValueError(f"text {start + index} is a {type(text).__name__}, no string.")
        ids, mask = tokenizer.encode(window, max_tokens)
        lengths = mask.sum(axis=1)
        order = np.argsort(lengths, kind="stable")
        for first in range(0, len(window), batch_size):
            rows = order[first : first + batch_size]
            yield trim(ids[rows], mask[rows]), start + rows, []
        start += len(window)


def one_batch(*arrays: np.ndarray, batch_size: int) -> Batches:
    """Yields arrays of N rows that the compiled function takes, in parts of `batch_size`."""
    for start in range(0, len(arrays[0]), batch_size):
        part = tuple(array[start : start + batch_size] for array in arrays)
        yield part, np.arange(start, start + len(part[0])), []


def trim(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns both [B, L], cut to the longest text and padded to one of `text_lengths`."""
    lengths = text_lengths(mask.shape[1])
    length = lengths[bisect.bisect_left(lengths, int(mask.sum(axis=1).max()))]
    return ids[:, :length], mask[:, :length]


def batch_sizes(num_devices: int, batch_size: int) -> list[int]:
    """Returns every number of rows that a batch of at most `batch_size` is padded to, ascending."""
    counts = range(1, batch_size + 1)
    return sorted({_padded_size(count, num_devices, batch_size) for count in counts})


def text_lengths(max_tokens: int) -> list[int]:
    """Returns every number of tokens that a batch of texts is padded to, ascending.

    8, 12, 16, 24, 32, 48, 64, ...: of 8 tokens or more at most a third is padding, with few shapes
    to compile.
    """
    steps = (part << power for power in range(max_tokens.bit_length()) for part in (8, 12))
    return [*itertools.takewhile(lambda length: length < max_tokens, steps), max_tokens]


def progress_bar(inputs: Iterable, unit: str, *, enabled: bool) -> tqdm.tqdm:
    """Returns a bar that appears after two seconds, if enabled and stderr is a terminal."""
    return tqdm.tqdm(
        total=len(inputs) if isinstance(inputs, Sized) else None,
        unit=f" {unit}",
        delay=_PROGRESS_AFTER_S,
        disable=None if enabled else True,  # None: shown on a terminal
        leave=False,
    )


def _view(index: int, image: Any, preprocessing: Preprocessing) -> np.ndarray:
    """Returns uint8 [S, S, 3]."""
    try:
        rgb = images_lib.decode_image(image() if callable(image) else image)
    except images_lib.BadImage as error:
        if callable(image):  # it knows better than we what it read
            raise
        name = image if isinstance(image, str | os.PathLike) else f"image {index}"
        raise images_lib.BadImage(error.reason, f"{name}: {error}") from error
    return images_lib.eval_view(
        rgb,
        resize_px=preprocessing.resize_size,
        crop_px=preprocessing.image_size,
        method=preprocessing.resize,
    )


def _windows(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yields lists of `size` items; the last may be shorter."""
    window = []
    for item in items:
        window.append(item)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def _padded_size(count: int, num_devices: int, batch_size: int) -> int:
    size = num_devices
    while size < count:
        size *= 2
    return min(size, batch_size)


def _own_rows(count: int, sharding: NamedSharding, batch_size: int) -> Iterator[int]:
    """Yields the rows of a batch of `count` that devices of this process compute."""
    size = _padded_size(count, sharding.num_devices, batch_size)
    slices = sharding.addressable_devices_indices_map((size,)).values()
    own = {rows.indices(size)[:2] for (rows,) in slices}
    for first, last in sorted(own):
        yield from range(first, min(last, count))


def _to_device(rows: np.ndarray, size: int, sharding: NamedSharding) -> jax.Array:
    """Returns [size, ...], the last row repeated."""
    rows = np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])
    # Only the rows of this process's devices are asked for.
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])


def _fetch(z: jax.Array, count: int) -> np.ndarray:
    return np.asarray(z)[:count]
