"""Rows of an index, and what is refused before a database sees it.

Milvus stores vectors that are not a number and fails on whole batches for one long caption; here
each is one clear line that names the key.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from align_jax.storage import identity

KINDS = ("image", "text")
MAX_TEXT_BYTES = 65_535  # of key, caption, source and metadata in UTF-8; the limit of Milvus
MAX_K = 16_384  # hits of a query; likewise

_MAX_NORM_ERROR = 1e-3  # bfloat16 models round their embeddings


@dataclasses.dataclass(frozen=True)
class Row:
    """One row, less its vector.

    Attributes:
      key: unique in the index.
      kind: one of KINDS.
      caption: of an image, or the text itself.
      source: how to read the picture again; "" if unknown.
      metadata: column -> value, as JSON has them.
      digest: of all these and of what was embedded: a rerun embeds only what has changed.
    """

    key: str
    kind: str
    caption: str
    source: str
    metadata: Mapping[str, Any]
    digest: str


def make_row(
    key: str, kind: str, caption: str, source: str, metadata: Mapping[str, Any], value: Any
) -> Row:
    """Returns a row with the digest of what is embedded: a text, encoded bytes, or an array."""
    if isinstance(value, np.ndarray):
        value = repr((value.shape, value.dtype)).encode() + value.tobytes()
    elif isinstance(value, str):
        value = value.encode("utf-8", "replace")
    content = hashlib.blake2b(value, digest_size=16).hexdigest()
    parts = (key, kind, caption, source, json.dumps(metadata, sort_keys=True, default=repr))
    return Row(key, kind, caption, source, metadata, identity.digest([*parts, content]))


class Hit(NamedTuple):
    """A row that was found; `score` is its cosine with the query."""

    key: str
    score: float
    kind: str
    caption: str
    source: str
    metadata: dict[str, Any]


def check_row(row: Row) -> None:
    """Raises ValueError, which names the key, if the row cannot be stored as it is."""
    if not isinstance(row.key, str) or not row.key:
        raise ValueError(f"A key is {row.key!r}; every row needs a text that is not empty.")
    name = shorten(row.key)
    if row.kind not in KINDS:
        raise ValueError(f"{name}: kind {row.kind!r} is unknown; use {' or '.join(KINDS)}.")
    try:
        metadata = json.dumps(dict(row.metadata), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: its metadata does not suit JSON: {error}.") from None
    texts = {"key": row.key, "caption": row.caption, "source": row.source, "metadata": metadata}
    for what, text in texts.items():
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise ValueError(f"{name}: its {what} holds half a surrogate pair.") from None
        if size > MAX_TEXT_BYTES:
            raise ValueError(
                f"{name}: its {what} has {size:,} bytes; at most {MAX_TEXT_BYTES:,} fit."
            )


def check_vectors(vectors: np.ndarray, names: Sequence[str], dim: int) -> np.ndarray:
    """Returns the vectors as float32 [N, dim].

    Args:
      vectors: [N, dim].
      names: N, of rows or queries, for the error.
      dim: of the index.

    Raises:
      ValueError: a wrong shape, or a vector that is not finite or not of unit norm; names it.
    """
    vectors = np.asarray(vectors, np.float32)
    if vectors.shape != (len(names), dim):
        raise ValueError(
            f"The vectors are {list(vectors.shape)}; this index takes [{len(names)}, {dim}]."
        )
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    for row in np.flatnonzero(~(np.abs(norms - 1) <= _MAX_NORM_ERROR))[:1]:
        what = f"has norm {norms[row]:.4g}, not 1" if np.isfinite(norms[row]) else "is not finite"
        raise ValueError(f"{shorten(names[row])}: its vector {what}.")
    return vectors


def check_k(k: int) -> None:
    """Raises ValueError if no query may ask for `k` hits."""
    if not 1 <= k <= MAX_K:
        raise ValueError(f"k={k} must be between 1 and {MAX_K:,}.")


def shorten(text: str, most: int = 80) -> str:
    """Returns printable text of at most `most` characters, on one line."""
    text = "".join(char if char.isprintable() else " " for char in text[: most + 1])
    return text if len(text) <= most else text[: most - 1] + "…"
