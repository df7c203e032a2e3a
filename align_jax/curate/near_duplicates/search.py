"""Near-duplicates among image embeddings, and groups of near-duplicates.

Pairs are found exactly by comparing all, or at scale within buckets of clusters, after the paper.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import scipy.sparse
import scipy.sparse.csgraph

from align_jax.curate.clusters import find_clusters
from align_jax.curate.near_duplicates.image_sets import ImageSet
from align_jax.curate.near_duplicates.matches import Matches
from align_jax.data.perceptual_hash import MAX_PAIRS
from align_jax.run.progress import show_progress

MIN_COSINE = 0.975
NUM_NEAREST = 8  # clusters in which an image looks for others

_EXACT_COMPARISONS = 2e10  # of two embeddings; minutes on two cores
_BLOCK_COSINES = 2**24
_IMAGES_PER_CLUSTER = 32


def match(sets: Sequence[ImageSet], min_cosine: float) -> tuple[Matches, dict[str, int]]:
    """Returns the matches of the first set with the others, or inside it and counts of groups.

    Args:
      sets: with embeddings.
      min_cosine: see `embedding_pairs`.
    """
    train = sets[0]
    groups = {}
    if len(sets) > 1:
        found = []
        for number, other in enumerate(sets[1:], 1):
            i, j, scores = embedding_pairs(train.values, other.values, min_cosine)
            found.append((i, np.full(len(i), number), j, scores))
        rows, numbers, others, scores = (np.concatenate(part) for part in zip(*found, strict=True))
        order = np.lexsort((others, numbers, rows))
        rows, numbers, others, scores = (x[order] for x in (rows, numbers, others, scores))
    else:
        i, j, _ = embedding_pairs(train.values, None, min_cosine)
        kept = first_of_groups(len(train.values), i, j)
        rows = np.flatnonzero(kept != np.arange(len(kept)))
        numbers, others = np.zeros_like(rows), kept[rows]
        scores = np.einsum("PD,PD->P", train.values[rows], train.values[others])
        sizes = np.unique(others, return_counts=True)[1] + 1
        groups = {"groups": len(sizes), "largest_group": int(sizes.max(initial=1))}
    other_keys = np.empty(len(rows), object)
    for number, one in enumerate(sets):
        mine = numbers == number
        other_keys[mine] = one.keys.take(pa.array(others[mine])).to_pylist()
    keys = np.empty(len(rows), object)
    keys[:] = train.keys.take(pa.array(rows)).to_pylist()
    return Matches(rows, keys, numbers, others, other_keys, scores), groups


def embedding_pairs(
    left: np.ndarray, right: np.ndarray | None, min_cosine: float = MIN_COSINE
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the pairs of embeddings with a cosine above `min_cosine`.

    Exact up to 2e10 comparisons, else by `bucket_pairs` with a cluster for each 32 images.

    Args:
      left: float32 [N, D], unit norm.
      right: float32 [M, D], unit norm; None compares `left` with itself, each pair i < j once.
      min_cosine: above 0, below 1. The paper's 0.975 was fitted to its own image embedder.

    Returns:
      Rows of `left` and rows of `right`, int64 [P], and cosines, float32 [P], in order of rows.

    Raises:
      ValueError: `min_cosine` or a width is out of range, or more than MAX_PAIRS pairs.
    """
    check_cosine(min_cosine)
    if right is not None and left.shape[1] != right.shape[1]:
        raise ValueError(
            f"The embeddings have {left.shape[1]} and {right.shape[1]} dimensions; embed both "
            "sets with the same model."
        )
    num_right = len(left) if right is None else len(right)
    if len(left) * num_right <= _EXACT_COMPARISONS:
        return all_pairs(left, right, min_cosine)
    num_clusters = max(len(left), num_right) // _IMAGES_PER_CLUSTER
    return bucket_pairs(left, right, min_cosine, num_clusters)


def all_pairs(
    left: np.ndarray, right: np.ndarray | None, min_cosine: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns what `embedding_pairs` does, by comparing all with all in blocks."""
    inside = right is None
    right = left if inside else right
    found = _Found(min_cosine)
    rows = max(1, _BLOCK_COSINES // max(1, len(right)))
    starts = range(0, len(left), rows)
    for start in show_progress(starts, len(starts), "compare embeddings", "block"):
        first = start if inside else 0
        cosines = left[start : start + rows] @ right[first:].T  # [rows, M - first]
        i, j = np.nonzero(cosines > min_cosine)
        cosine = cosines[i, j]
        i, j = i + start, j + first
        ahead = i < j if inside else slice(None)
        found.add(i[ahead], j[ahead], cosine[ahead])
    return found.in_order()


def bucket_pairs(
    left: np.ndarray,
    right: np.ndarray | None,
    min_cosine: float,
    num_clusters: int,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns what `embedding_pairs` does, less the pairs that share no bucket.

    A bucket is a cluster: it holds the images of which it is the nearest, which are compared with
    all images that have it among their 8 nearest. As the clusters grow with the images, an image is
    compared with as many others whatever their number.

    Args:
      left: float32 [N, D], unit norm.
      right: float32 [M, D], unit norm, or None.
      min_cosine: as in `embedding_pairs`.
      num_clusters: at most the number of images of the larger set.
      seed: of the clusters; the same on the same machine gives the same pairs.

    Source: after Jia et al. 2021, appendix A, which takes 4096 clusters, and as buckets the triples
    of the 10 nearest of an image: candidates then grow with the images.
    """
    inside = right is None
    pool = left if inside or len(left) >= len(right) else right
    clusters = find_clusters(pool, num_clusters, seed)
    nearest_left = clusters.nearest(left, NUM_NEAREST)
    found = _Found(min_cosine)
    if inside:
        for i, j, cosine in _compare(left, nearest_left, left, nearest_left[:, 0], min_cosine):
            apart = i != j
            i, j = i[apart], j[apart]
            found.add(np.minimum(i, j), np.maximum(i, j), cosine[apart])
        return found.in_order()
    nearest_right = clusters.nearest(right, NUM_NEAREST)
    for i, j, cosine in _compare(left, nearest_left, right, nearest_right[:, 0], min_cosine):
        found.add(i, j, cosine)
    for j, i, cosine in _compare(right, nearest_right, left, nearest_left[:, 0], min_cosine):
        found.add(i, j, cosine)
    return found.in_order()


def _compare(
    left: np.ndarray,
    nearest: np.ndarray,
    right: np.ndarray,
    first: np.ndarray,
    min_cosine: float,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields the near pairs (i, j, cosine) where `first` [M] of j is in `nearest` [N, 8] of i."""
    asking = np.argsort(nearest, axis=None, kind="stable")
    members = np.argsort(first, kind="stable")
    numbers, starts = np.unique(first[members], return_index=True)
    ends = np.append(starts[1:], len(members))
    sought = nearest.ravel()[asking]
    low, high = np.searchsorted(sought, numbers), np.searchsorted(sought, numbers, "right")
    buckets = zip(low.tolist(), high.tolist(), starts.tolist(), ends.tolist(), strict=True)
    for begin, end, start, stop in show_progress(buckets, len(numbers), "compare", "bucket"):
        j = members[start:stop]
        z = right[j]
        step = max(1, _BLOCK_COSINES // len(j))
        for at in range(begin, end, step):
            i = asking[at : min(at + step, end)] // nearest.shape[1]
            cosines = left[i] @ z.T
            rows, columns = np.nonzero(cosines > min_cosine)
            yield i[rows], j[columns], cosines[rows, columns]


def first_of_groups(num_images: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Returns for each image the first image of its group, int64 [num_images].

    Groups are the connected components of the pairs (i, j): images joined by a chain of pairs.
    """
    ones = np.ones(len(i), np.int8)
    graph = scipy.sparse.coo_matrix((ones, (i, j)), shape=(num_images, num_images))
    _, labels = scipy.sparse.csgraph.connected_components(graph, directed=False)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return first[inverse]


def check_cosine(min_cosine: float) -> None:
    """Raises ValueError if `min_cosine` is no threshold."""
    if not 0 < min_cosine < 1:
        raise ValueError(f"--min-cosine {min_cosine} must lie between 0 and 1, e.g. {MIN_COSINE}.")


class _Found:
    """Collects pairs with their cosines, each once however often it is added."""

    def __init__(self, min_cosine: float):
        self._min_cosine = min_cosine
        self._parts = []
        self._count = 0

    def add(self, i: np.ndarray, j: np.ndarray, cosine: np.ndarray) -> None:
        """Adds pairs (i, j) with their cosines, all [P]."""
        self._parts.append((i.astype(np.int64), j.astype(np.int64), cosine.astype(np.float32)))
        self._count += len(i)
        if self._count > MAX_PAIRS:
            self._parts = [self.in_order()]
            self._count = len(self._parts[0][0])
            if self._count > MAX_PAIRS // 2:
                raise ValueError(
                    f"More than {MAX_PAIRS // 2:,} pairs of images have a cosine above "
                    f"{self._min_cosine}; choose a larger one."
                )

    def in_order(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns i and j, int64 [P], and cosines, float32 [P], in order of i, then j."""
        if not self._parts:
            return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
        i, j, cosine = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        order = np.lexsort((j, i))
        i, j, cosine = i[order], j[order], cosine[order]
        new = np.ones(len(i), bool)
        new[1:] = (i[1:] != i[:-1]) | (j[1:] != j[:-1])
        return i[new], j[new], cosine[new]
