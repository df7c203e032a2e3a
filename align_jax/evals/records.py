"""Embeddings of a source's images, each read by the process that embeds it; failures counted."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from align_jax.data.images import BadImage, decode_image
from align_jax.run import multihost
from align_jax.storage.problems import reason_of


def encode_records(
    model: Any, source: Any, indices: Sequence[int], note: Callable[[int, Any], None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (z [N, D] float32, is_readable [N] bool); rows that are not readable mean nothing.

    Images are decoded as the model asks for them: in a run of several processes each reads its own
    part, and all get the same result.

    Args:
      model: with `encode_image(functions, on_error="skip")`, see `align.Align`.
      source: items with `key` and `image`.
      indices: N, of the items.
      note: called with row and item of every item that this process reads; no other process reads
        the same.
    """
    unreadable = np.zeros(len(indices), np.int64)

    def read(row: int, index: int) -> np.ndarray:
        key = f"record {index}"
        try:
            item = source[index]
            key = item.key
            if note is not None:
                note(row, item)
            return decode_image(item.image)
        except (BadImage, OSError) as error:
            unreadable[row] = 1
            reason = reason_of(error)
            raise BadImage(reason, f"{key}: {error}") from error

    readers: list[Callable] = [partial(read, row, index) for row, index in enumerate(indices)]
    z = model.encode_image(readers, on_error="skip") if readers else np.zeros((0, 1), np.float32)
    return z, multihost.total(unreadable) == 0
