"""Near-duplicates among image embeddings, and groups of near-duplicates.

Pairs are found exactly by comparing all, or at scale by the paper's scheme of buckets of clusters.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import scipy.sparse
import scipy.sparse.csgraph

from align_jax.curate.near_duplicates.image_sets import ImageSet
from align_jax.curate.near_duplicates.matches import Matches
from align_jax.data.perceptual_hash import MAX_PAIRS
from align_jax.run.progress import show_progress

MIN_COSINE = 0.975
NUM_NEAREST, NUM_SHARED = 10, 3

_EXACT_COMPARISONS = 2e10  # of two embeddings; minutes on two cores
_BLOCK_COSINES = 2**24
_BLOCK_CANDIDATES = 2**23
_IMAGES_PER_CLUSTER, _MAX_CLUSTERS = 250, 4096
_TRAINED_ON_PER_CLUSTER = 64


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

    Exact up to 2e10 comparisons, else by `bucket_pairs` with a cluster for each 250 images, at most
    the 4096 of the paper.

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
    num_clusters = min(_MAX_CLUSTERS, max(len(left), num_right) // _IMAGES_PER_CLUSTER)
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

    Each image goes into C(10, 3) = 120 buckets: the triples of its 10 nearest clusters. Only pairs
    in a common bucket are compared.

    Args:
      left: float32 [N, D], unit norm.
      right: float32 [M, D], unit norm, or None.
      min_cosine: as in `embedding_pairs`.
      num_clusters: at least 10.
      seed: of the clusters; the same on the same machine gives the same pairs.

    Source: Jia et al. 2021, appendix A.
    """
    if num_clusters < NUM_NEAREST:
        raise ValueError(f"num_clusters={num_clusters} must be at least {NUM_NEAREST}.")
    inside = right is None
    pool = left if inside or len(left) >= len(right) else right
    centroids = kmeans(pool, num_clusters, seed)
    nearest_left = nearest_clusters(left, centroids)
    nearest_right = nearest_left if inside else nearest_clusters(right, centroids)
    right = left if inside else right
    found = _Found(min_cosine)
    members = max(1, NUM_NEAREST**2 * len(right) // num_clusters)  # met by a row, more or less
    rows = max(1, _BLOCK_CANDIDATES // members)
    starts = range(0, len(left), rows)
    for start in show_progress(starts, len(starts), "compare buckets", "block"):
        i, j = sharing(nearest_left[start : start + rows], nearest_right, num_clusters)
        i += start
        if inside:
            i, j = i[i < j], j[i < j]
        for begin in range(0, len(i), _BLOCK_COSINES // left.shape[1]):
            near_i, near_j = (x[begin : begin + _BLOCK_COSINES // left.shape[1]] for x in (i, j))
            cosine = np.einsum("PD,PD->P", left[near_i], right[near_j])
            near = cosine > min_cosine
            found.add(near_i[near], near_j[near], cosine[near])
    return found.in_order()


def kmeans(z: np.ndarray, num_clusters: int, seed: int, num_iterations: int = 8) -> np.ndarray:
    """Returns centroids, float32 [num_clusters, D], unit norm, by Lloyd's algorithm on cosines.

    Trained on at most 64 embeddings a cluster, drawn by the seed, which also draws the first
    centroids; an empty cluster keeps its centroid.

    Raises:
      ValueError: fewer embeddings than clusters.
    """
    if len(z) < num_clusters:
        raise ValueError(f"{len(z)} embeddings cannot make {num_clusters} clusters.")
    rng = np.random.default_rng(seed)
    size = min(len(z), _TRAINED_ON_PER_CLUSTER * num_clusters)
    z = z[np.sort(rng.choice(len(z), size, replace=False))]
    centroids = z[np.sort(rng.choice(size, num_clusters, replace=False))].copy()
    for _ in show_progress(range(num_iterations), num_iterations, "find clusters", "pass"):
        labels = nearest_clusters(z, centroids, 1)[:, 0]
        one_hot = (np.ones(size, np.float32), (labels, np.arange(size)))
        sums = scipy.sparse.csr_matrix(one_hot, shape=(num_clusters, size)) @ z
        norms = np.linalg.norm(sums, axis=1)
        moved = norms > 0
        centroids[moved] = sums[moved] / norms[moved, None]
    return centroids


def nearest_clusters(z: np.ndarray, centroids: np.ndarray, count: int = NUM_NEAREST) -> np.ndarray:
    """Returns the `count` clusters of the largest cosines, int64 [N, count], in order of number."""
    rows = max(1, _BLOCK_COSINES // len(centroids))
    nearest = np.empty((len(z), count), np.int64)
    for start in range(0, len(z), rows):
        cosines = z[start : start + rows] @ centroids.T
        if count == 1:
            nearest[start : start + rows, 0] = cosines.argmax(axis=1)
        else:
            best = np.argpartition(cosines, -count, axis=1)[:, -count:]
            nearest[start : start + rows] = np.sort(best, axis=1)
    return nearest


def sharing(
    left: np.ndarray, right: np.ndarray, num_clusters: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows (i, j), int64 [P], that have at least three clusters in common.

    They are the pairs with a common bucket, found without making the buckets: a pair may share
    many of its 120.
    """

    def membership(nearest: np.ndarray) -> scipy.sparse.csr_matrix:
        # [N, 10] -> [N, num_clusters]
        ends = np.arange(len(nearest) + 1) * nearest.shape[1]
        shape = (len(nearest), num_clusters)
        return scipy.sparse.csr_matrix(
            (np.ones(nearest.size, np.int8), nearest.ravel(), ends), shape=shape
        )

    common = (membership(left) @ membership(right).T).tocoo()
    enough = common.data >= NUM_SHARED
    return common.row[enough].astype(np.int64), common.col[enough].astype(np.int64)


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
