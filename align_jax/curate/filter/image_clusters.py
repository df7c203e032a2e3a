"""DataComp's image-based filter: which images lie near those of a target set, by clusters.

k-means of the pool's image embeddings; a cluster counts if it is the nearest one of a target image
(DataComp: those of ImageNet's training set), and an image of the pool stays if its nearest cluster
counts. Source: Gadre et al. 2023 (2304.14108), section 4.2 and appendix, `image_based`.
"""

import numpy as np
import pyarrow as pa

from align_jax.curate.clusters import find_clusters
from align_jax.curate.near_duplicates import image_sets
from align_jax.data.sources.record import hash_key

_PASSES = 20
_ROWS_PER_CLUSTER = 256  # more do not move centroids much; faiss learns from as many
_ROWS_AT_ONCE = 1 << 16


def near_targets(
    embeddings: str, targets: str, num_clusters: int, seed: int, folder: str
) -> np.ndarray:
    """Returns the hashed keys (record.hash_key) of images near a target, uint64, ascending.

    Memory: the keys of the images and three times the centroids; embeddings are mapped.

    Args:
      embeddings: folder of `align embed --images` of the pool.
      targets: likewise of the target set, by the same model.
      num_clusters: as many as DataComp has: 100,000 for 128 M images. At most one for each image.
      seed: of the images from which clusters start.
      folder: receives copies of the embeddings in one file each.

    Raises:
      ValueError: a folder holds something else, or the two are of different models.
    """
    for name in (embeddings, targets):
        if not image_sets.is_embedded(name):
            raise ValueError(
                f"{name} holds no embeddings; name a folder of `align embed --images`."
            )
    pool, wanted = image_sets.open_embeddings([embeddings, targets], folder)
    if not len(pool.values):
        raise ValueError(f"{embeddings} holds no images.")
    count = min(num_clusters, len(pool.values))
    every = max(1, len(pool.values) // (_ROWS_PER_CLUSTER * num_clusters))
    clusters = find_clusters(pool.values[::every], count, seed, _PASSES)
    counts = np.zeros(count, bool)
    counts[clusters.nearest(wanted.values, 1)[:, 0]] = True
    near = [np.zeros(0, np.uint64)]
    for start in range(0, len(pool.values), _ROWS_AT_ONCE):
        block = pool.values[start : start + _ROWS_AT_ONCE]
        stays = np.flatnonzero(counts[clusters.nearest(block, 1)[:, 0]])
        keys = pool.keys.take(pa.array(stays + start)).to_pylist()
        near.append(np.fromiter(map(hash_key, keys), np.uint64, len(keys)))
    return np.unique(np.concatenate(near))
