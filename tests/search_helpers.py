"""A stand-in for a model and unit vectors, for the tests of search."""

import types

import numpy as np

from align_jax.search.index import Index

DIM = 16


def unit(z):
    return (z / np.linalg.norm(z, axis=-1, keepdims=True)).astype(np.float32)


def random_unit(count, dim=DIM, seed=0):
    return unit(np.random.default_rng(seed).normal(size=(count, dim)))


class FakeModel:
    """Texts and images become unit vectors that depend on them alone; images are texts here."""

    def __init__(self, name="one", dim=DIM):
        self.model = types.SimpleNamespace(embed_dim=dim)
        self.origin = types.SimpleNamespace(path=f"/models/{name}", step=None)
        self.preprocessing = "none"
        self._name = name

    def fingerprint(self):
        return f"{self._name:0>16}"

    def encode_text(self, texts):
        seeds = [list(f"{self._name} {text}".encode("utf-8", "replace")) for text in texts]
        return np.concatenate([random_unit(1, self.model.embed_dim, seed) for seed in seeds])

    def encode_image(self, images, *, on_error="raise"):
        return self.encode_text([f"image {image}" for image in images])


def exact(z_query, z_index, k):
    """Oracle: rows of the k highest cosines in float64, best first."""
    return np.argsort(-(z_query.astype(np.float64) @ z_index.T), axis=1, kind="stable")[:, :k]


def rows_of(folder):
    """Returns {key: (row, vector)} of an index."""
    with Index(str(folder)) as index:
        return {
            row.key: (row, z)
            for rows, vectors in index.scan()
            for row, z in zip(rows, vectors, strict=True)
        }
