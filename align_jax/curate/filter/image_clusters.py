"""DataComp's image-based filter: which images lie near those of a target set, by clusters.

k-means of the pool's image embeddings; a cluster counts if it is the nearest one of a target image
(DataComp: those of ImageNet's training set), and an image of the pool stays if its nearest cluster
counts. Source: Gadre et al. 2023 (2304.14108), section 4.2 and appendix, `image_based`.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from align_jax.data.sources.record import hash_key
from align_jax.embed import MANIFEST, read_shard
from align_jax.storage.text import read_json

_ROUNDS = 20
_ROWS_PER_CLUSTER = 256  # more do not move centroids much; faiss learns from as many
_ROWS_AT_ONCE = 1 << 14


def near_targets(embeddings: str, targets: str, num_clusters: int, seed: int) -> np.ndarray:
    """Returns the hashed keys (record.hash_key) of images near a target, uint64, ascending.

    Memory: 256 embeddings a cluster, and 8 bytes an image.

    Args:
      embeddings: folder of `align embed --images` of the pool.
      targets: likewise of the target set, by the same model.
      num_clusters: as many as DataComp has: 100,000 for 128 M images. At most one for each image.
      seed: of the images from which clusters start.

    Raises:
      ValueError: a folder holds something else, or the two are of different models.
    """
    models = {folder: _model_of(folder) for folder in (embeddings, targets)}
    if len(set(models.values())) > 1:
        raise ValueError(f"{embeddings} and {targets} hold embeddings of different models.")
    centroids = find_clusters(_sample(embeddings, num_clusters, seed), num_clusters, seed)
    counts = np.zeros(len(centroids), bool)
    for _, z in _read(targets):
        counts[nearest(z, centroids)] = True
    near = [np.zeros(0, np.uint64)]
    for keys, z in _read(embeddings):
        stays = counts[nearest(z, centroids)]
        near.append(np.array([hash_key(keys[n]) for n in np.flatnonzero(stays)], np.uint64))
    return np.unique(np.concatenate(near))


def find_clusters(z: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """Returns centroids [C, D] of unit norm of embeddings [N, D], by 20 rounds of k-means.

    A cluster that no image is nearest to keeps its place.
    """
    rng = np.random.default_rng(seed)
    centroids = z[np.sort(rng.choice(len(z), min(num_clusters, len(z)), replace=False))]
    for _ in range(_ROUNDS):
        sums = np.zeros(centroids.shape, np.float64)
        np.add.at(sums, nearest(z, centroids), z)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        moved = np.where(norms > 0, sums / np.maximum(norms, 1e-12), centroids)
        moved = moved.astype(np.float32)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return centroids


def nearest(z: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Returns the centroid [C, D] of the largest cosine for each of `z` [N, D], int64 [N]."""
    slices = range(0, len(z), _ROWS_AT_ONCE)
    found = [(z[i : i + _ROWS_AT_ONCE] @ centroids.T).argmax(axis=1) for i in slices]
    return np.concatenate([np.zeros(0, np.int64), *found])


def _sample(folder: str, num_clusters: int, seed: int) -> np.ndarray:
    """Embeddings [N, D], evenly spaced, as many as clusters are learned from."""
    count = sum(len(z) for _, z in _read(folder))
    every = max(1, count // (_ROWS_PER_CLUSTER * num_clusters))
    rows, start = [], 0
    for _, z in _read(folder):
        rows.append(z[(-start) % every :: every])
        start += len(z)
    return np.concatenate(rows)


def _read(folder: str) -> Iterator[tuple[list[str], np.ndarray]]:
    for path in sorted([*Path(folder).glob("*.npy"), *Path(folder).glob("*.parquet")]):
        yield read_shard(path)


@functools.cache
def _model_of(folder: str) -> str:
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} holds no embeddings; name a folder of `align embed --images`.")
    manifest = read_json(path)
    if manifest["kind"] != "image":
        raise ValueError(f"{folder} holds embeddings of texts, not of images.")
    return manifest["model"]
