"""Clusters of embeddings: k-means by cosines, and the clusters that are nearest.

Source: Lloyd's algorithm; that many clusters are looked up through clusters of them is the idea of
an inverted file, as in Faiss.
"""

import itertools
import math

import numpy as np
import scipy.sparse

from align_jax.run.progress import show_progress

_BLOCK_COSINES = 2**24
_MOST_COMPARED, _NUM_PROBED = 4096, 8  # clusters; beyond that, of clusters of them


class Clusters:
    """Unit vectors to which embeddings are assigned; many are looked up through fewer.

    Attributes:
      centroids: float32 [K, D], unit norm.
    """

    def __init__(self, centroids: np.ndarray, seed: int):
        """Keeps the centroids; more than 4096 are put into clusters of their own, by the seed."""
        self.centroids = centroids
        self._coarse = None
        if len(centroids) > _MOST_COMPARED:
            self._coarse = find_clusters(centroids, math.isqrt(len(centroids)), seed)
            group = self._coarse.nearest(centroids, 1)[:, 0]
            self._order = np.argsort(group, kind="stable")
            self._starts = np.searchsorted(
                group[self._order], np.arange(len(self._coarse.centroids) + 1)
            )

    def nearest(self, z: np.ndarray, count: int) -> np.ndarray:
        """Returns the clusters of the largest cosines, the largest first, int64 [N, count]."""
        count = min(count, len(self.centroids))
        compared = len(self.centroids)
        if self._coarse:
            compared = _NUM_PROBED * count + len(self._coarse.centroids)
        rows = max(1, _BLOCK_COSINES // compared)
        nearest = np.empty((len(z), count), np.int64)
        for start in range(0, len(z), rows):
            block = np.asarray(z[start : start + rows])
            if self._coarse:
                nearest[start : start + rows] = self._probe(block, count)
            else:
                nearest[start : start + rows] = _top(block @ self.centroids.T, count)[0]
        return nearest

    def _probe(self, z: np.ndarray, count: int) -> np.ndarray:
        """Looks in the coarse clusters that are nearest."""
        probed = self._coarse.nearest(z, _NUM_PROBED)
        cosines = np.full((len(z), probed.shape[1], count), -np.inf, np.float32)
        numbers = np.zeros(cosines.shape, np.int64)
        order = np.argsort(probed, axis=None, kind="stable")
        edges = np.searchsorted(probed.ravel()[order], np.arange(len(self._starts)))
        for group, (low, high) in enumerate(itertools.pairwise(edges)):
            inside = self._order[self._starts[group] : self._starts[group + 1]]
            if low < high and len(inside):
                rows, slots = np.divmod(order[low:high], probed.shape[1])
                best, cosine = _top(z[rows] @ self.centroids[inside].T, min(count, len(inside)))
                numbers[rows, slots, : best.shape[1]] = inside[best]
                cosines[rows, slots, : best.shape[1]] = cosine
        best, _ = _top(cosines.reshape(len(z), -1), count)
        return np.take_along_axis(numbers.reshape(len(z), -1), best, axis=1)


def find_clusters(z: np.ndarray, num_clusters: int, seed: int, num_passes: int = 4) -> Clusters:
    """Returns clusters by passes of Lloyd's algorithm on cosines over all embeddings.

    The seed draws the embeddings that are the first centroids; an empty cluster keeps its centroid.

    Args:
      z: float32 [N, D], unit norm; may be mapped, a block at a time is in memory.
      num_clusters: at most N.
      seed: the same on the same machine gives the same clusters.
      num_passes: at most; it ends where a pass moves nothing.

    Raises:
      ValueError: fewer embeddings than clusters.
    """
    if len(z) < num_clusters:
        raise ValueError(f"{len(z)} embeddings cannot make {num_clusters} clusters.")
    chosen = np.random.default_rng(seed).choice(len(z), num_clusters, replace=False)
    clusters = Clusters(np.array(z[np.sort(chosen)], np.float32), seed)
    rows = max(1, _BLOCK_COSINES // z.shape[1])
    starts = range(0, len(z), rows)
    for number in range(num_passes):
        sums = np.zeros(clusters.centroids.shape, np.float32)
        for start in show_progress(starts, len(starts), f"find clusters, pass {number}", "block"):
            block = np.asarray(z[start : start + rows])
            labels = clusters.nearest(block, 1)[:, 0]
            ones = (np.ones(len(block), np.float32), (labels, np.arange(len(block))))
            sums += scipy.sparse.csr_matrix(ones, shape=(num_clusters, len(block))) @ block
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        moved = sums / np.maximum(norms, 1e-12)
        moved = np.where(norms > 0, moved, clusters.centroids)
        if np.array_equal(moved, clusters.centroids):
            break
        clusters = Clusters(moved, seed)
    return clusters


def _top(cosines: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns columns and values of the `count` largest of each row, the largest first."""
    if count == 1:
        best = cosines.argmax(axis=1)[:, None]
        return best, np.take_along_axis(cosines, best, axis=1)
    best = np.argpartition(cosines, -count, axis=1)[:, -count:]
    values = np.take_along_axis(cosines, best, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(best, order, axis=1), np.take_along_axis(values, order, axis=1)
