"""Embeddings of images as input: rows by record, bound to their source and to their tower."""

import pickle

import numpy as np
import pytest
from helpers import make_pairs, write_embeddings

from align_jax import config
from align_jax.data import image_embeddings, pipeline, tokenizer
from align_jax.data.sources import open_source

DIM = 6


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(source, embeddings [N, 6], their folder)"""
    folder = tmp_path_factory.mktemp("pairs")
    make_pairs(folder, count=10)
    spec = f"{folder}/captions.jsonl?images={folder}/images"
    z = write_embeddings(folder / "z", spec, DIM)
    return open_source.open_source(spec), z, folder / "z"


def test_row_of_a_batch_is_the_embedding_of_its_record(pairs):
    source, z, folder = pairs
    data = config.default_config().data
    data.num_threads, data.max_tokens = 1, 8
    embeddings = pickle.loads(pickle.dumps(image_embeddings.ImageEmbeddings(folder, source)))
    taken = {}
    for name, given in (("z", embeddings), ("pixels", None)):
        batches = pipeline.train_batches(
            source,
            tokenizer.train_wordpiece(["a red square"] * 9, vocab_size=100),
            data,
            batch_size=4,
            seed=3,
            embeddings=given,
        )
        taken[name] = [next(batches).arrays for _ in range(4)]
        batches.close()
    for own, other in zip(taken["z"], taken["pixels"], strict=True):
        np.testing.assert_array_equal(own["z_image"], z[own["index"]])
        assert "image" not in own and own["z_image"].dtype == np.float32
        for name in ("index", "ids", "mask"):  # the same pairs and captions in the same order
            np.testing.assert_array_equal(own[name], other[name])


def test_embeddings_of_other_images_or_of_some_are_one_line(pairs, tmp_path):
    source, _, folder = pairs
    (tmp_path / "other").mkdir()
    rows = make_pairs(tmp_path / "other", count=9)
    other = open_source.open_source(
        f"{tmp_path}/other/captions.jsonl?images={tmp_path}/other/images"
    )
    assert len(rows) == len(other)
    with pytest.raises(ValueError, match="its inputs is '10 records .*, not '9 records"):
        image_embeddings.ImageEmbeddings(folder, other)
    with pytest.raises(ValueError, match="config.data.image_embeddings=.*missing.*align embed"):
        image_embeddings.ImageEmbeddings(tmp_path / "missing", source)
    for name in ("manifest.json", "00000.npy", "00001.npy"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ValueError, match="shard 2 of 3 does not hold all of its 2 images"):
        image_embeddings.ImageEmbeddings(tmp_path, source)


def test_embeddings_of_another_tower_are_one_line(pairs):
    source, z, folder = pairs
    embeddings = image_embeddings.ImageEmbeddings(folder, source)
    chosen = [0, 3, 6, 9]
    embeddings.check(source, lambda images: z[chosen])
    turned = z[chosen].copy()
    turned[2] = np.roll(turned[2], 1)
    with pytest.raises(ValueError, match="6.jpg has cosine -0.5.* embed with the model"):
        embeddings.check(source, lambda images: turned)
    with pytest.raises(ValueError, match="have 6 dimensions, config.model.embed_dim is 5"):
        embeddings.check(source, lambda images: z[chosen, :5])
