"""Candidates of an image, share of the pairs found and time of near-duplicates among embeddings.

python experiments/benchmarks/embedding_buckets.py 10000 40000 160000

Made embeddings of width 64 around 150 topics; every 20th is a near copy of the one before.
"""

import argparse
import time

import numpy as np

from align_jax.curate.clusters import find_clusters
from align_jax.curate.near_duplicates import search

DIM, TOPICS = 64, 150


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("counts", nargs="+", type=int)
    for count in parser.parse_args().counts:
        z, copies = make_embeddings(count)
        start = time.process_time()
        clusters = find_clusters(z, count // 32, seed=0)
        nearest = clusters.nearest(z, search.NUM_NEAREST)
        sizes = np.bincount(nearest[:, 0], minlength=count // 32)
        seconds = time.process_time() - start
        copied = nearest[copies], nearest[copies - 1]
        found = [(a == b[:, :1]).any(axis=1) for a, b in (copied, copied[::-1])]
        print(
            f"{count:,} images: {sizes[nearest].sum() / count:.0f} candidates an image, "
            f"{100 * np.mean(found[0] | found[1]):.1f} % of {len(copies)} copies found, "
            f"{seconds:.0f} s of CPU",
            flush=True,
        )


def make_embeddings(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns unit vectors, float32 [count, DIM], and the rows that copy the one before."""
    rng = np.random.default_rng(count)
    topics = rng.normal(size=(TOPICS, DIM)).astype(np.float32)
    z = topics[rng.integers(0, TOPICS, count)]
    z += np.float32(0.8) * rng.normal(size=z.shape).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    copies = np.arange(1, count, 20)
    angles = rng.uniform(0, np.arccos(0.975), (len(copies), 1)).astype(np.float32)
    aside = rng.normal(size=(len(copies), DIM)).astype(np.float32)
    aside -= (aside * z[copies - 1]).sum(axis=1, keepdims=True) * z[copies - 1]
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    z[copies] = np.cos(angles) * z[copies - 1] + np.sin(angles) * aside
    return z, copies


if __name__ == "__main__":
    main()
