"""How much of what exact search finds an index finds: by kind of query and of what is found.

Texts lie outside of the cluster of images, and lose more in an approximate index than images do: a
recall measured with the index's own images as queries flatters it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from align_jax.evals.top_k import top_k
from align_jax.search.index import Index
from align_jax.search.rows import KINDS, Row, check_k


def measure_recall(
    index: Index, num_queries: int, k: int = 10, load_model: Callable[[], Any] | None = None
) -> dict[str, dict[str, float]]:
    """Returns {"text to image": {"queries", "k", "recall"}, ...} for what the index holds.

    Queries are rows that lie evenly in a hash of their keys. A row is not looked for by itself.
    Where there are no texts, they are captions of images, embedded by the model. A hit is right if
    its score is among the k best of exact search, which all equal scores are.

    Args:
      index: any.
      num_queries: of each kind, at least 1.
      k: hits of each.
      load_model: returns the index's model; None measures what rows are there.

    Raises:
      ValueError: the index has fewer than two rows.
    """
    if num_queries < 1:
        raise ValueError(f"--queries {num_queries} must be at least 1.")
    check_k(k)
    rows = {kind: _all(index.scan({"kind": kind}), index.identity.dim) for kind in KINDS}
    queries = {kind: (keys[:num_queries], z[:num_queries]) for kind, (keys, z, _) in rows.items()}
    captions = [text for text in rows["image"][2] if text.strip()][:num_queries]
    if not len(queries["text"][0]) and captions and load_model is not None:
        queries["text"] = ([""] * len(captions), load_model().encode_text(captions))
    found = {}
    for asked, (query_keys, z_query) in queries.items():
        for kind, (keys, z, _) in rows.items():
            is_own = asked == kind
            most = min(k, len(keys) - is_own)
            if not len(query_keys) or most < 1:
                continue
            place = {key: row for row, key in enumerate(keys)}
            own = [place[key] if is_own else -1 for key in query_keys]
            _, scores = top_k(z_query, z, most, exclude=np.array(own))
            answers = index.search(z_query, k=most + is_own, filter={"kind": kind})
            right = 0
            for key, least, hits in zip(query_keys, scores[:, -1], answers, strict=True):
                others = [hit for hit in hits if not (is_own and hit.key == key)][:most]
                right += sum(hit.score >= least - 1e-6 for hit in others)
            recall = right / (len(query_keys) * most)
            found[f"{asked} to {kind}"] = {"queries": len(query_keys), "k": most, "recall": recall}
    if not found:
        raise ValueError("The index holds too few rows to search for one by another.")
    return found


def _all(
    batches: Iterator[tuple[list[Row], np.ndarray]], dim: int
) -> tuple[list[str], np.ndarray, list[str]]:
    """Returns keys, vectors and captions of all batches."""
    keys, parts, captions = [], [np.zeros((0, dim), np.float32)], []
    for rows, z in batches:
        keys += [row.key for row in rows]
        captions += [row.caption for row in rows]
        parts.append(z)
    return keys, np.concatenate(parts), captions
