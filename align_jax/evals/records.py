"""Embeddings of a source's images, each read by the process that embeds it; failures counted."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from align_jax.data.images import BadImage, decode_image
from align_jax.data.sources.record import UNUSABLE_REASONS
from align_jax.run import multihost
from align_jax.storage.problems import Problems, reason_of


def encode_records(
    model: Any,
    source: Any,
    indices: Sequence[int],
    problems: Problems,
    note: Callable[[int, Any], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (z [N, D] float32, is_readable [N] bool); rows that are not readable mean nothing.

    Images are decoded as the model asks for them: in a run of several processes each reads its own
    part, and all get the same result.

    Args:
      model: with `encode_image(functions, on_error="skip")`, see `align.Align`.
      source: items with `key` and `image`.
      indices: N, of the items.
      problems: receives what cannot be read, by reason, the same in every process.
      note: called with row and item of every item that this process reads; no other process reads
        the same.
    """
    codes = np.zeros(len(indices), np.int64)  # of UNUSABLE_REASONS, from 1

    def read(row: int, index: int) -> np.ndarray:
        key = f"record {index}"
        try:
            item = source[index]
            key = item.key
            if note is not None:
                note(row, item)
            return decode_image(item.image)
        except (BadImage, OSError) as error:
            reason = reason_of(error)
            codes[row] = 1 + UNUSABLE_REASONS.index(reason)
            raise BadImage(reason, f"{key}: {error}") from error

    readers: list[Callable] = [partial(read, row, index) for row, index in enumerate(indices)]
    z = model.encode_image(readers, on_error="skip") if readers else np.zeros((0, 1), np.float32)
    codes = multihost.total(codes)
    for row in np.flatnonzero(codes).tolist():
        problems.add(UNUSABLE_REASONS[codes[row] - 1], name_of(source, indices[row]))
    return z, codes == 0


def name_of(source: Any, index: int) -> str:
    """Returns what to call a record that cannot be used, without reading it."""
    return source.key(index) if hasattr(source, "key") else f"record {index}"


def count_problems(problems: Problems) -> dict[str, int]:
    """Returns `num_skipped` and `problems/<reason>`, as every evaluator reports them."""
    counts = {f"problems/{reason}": count for reason, count in problems.items()}
    return {"num_skipped": problems.num_lost()} | counts
