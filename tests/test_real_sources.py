"""Sources on the real archives that lie beside the project; skipped where they are not there."""

import numpy as np
import pytest
from helpers import real_data

from align_jax.data import images
from align_jax.data.sources.open_source import open_labelled, open_source


def test_real_tars_equal_the_zip_they_were_made_from():
    tars = open_source(f"{real_data('wds_sample')}/*.tar")
    table = real_data("cc3m", "train.jsonl")
    pairs = open_source(f"{table}?images={real_data('cc3m')}/*.zip&max=512")
    assert len(tars) == len(pairs) == 512 and tars.problems == {}
    for index in (0, 255, 256, 511):
        assert tars[index].image == pairs[index].image
        assert tars[index].captions == pairs[index].captions
        assert images.decode_image(tars[index].image).shape == (128, 128, 3)


def test_real_flickr8k_has_five_captions_an_image():
    folder = real_data("flickr8k")
    source = open_source(f"{folder}/dev.jsonl?images={folder}/dev.zip")
    assert len(source) == 1000 and source.problems == {}
    assert {len(source[index].captions) for index in range(50)} == {5}


@pytest.mark.parametrize(
    ("archive", "size", "first"),
    [("cifar10/test.zip", 10_000, "airplane"), ("imagenette/train_subset.zip", 1000, "tench")],
)
def test_real_labelled_archives_have_balanced_classes(archive, size, first):
    path = real_data(archive)
    source = open_labelled(f"{path}?classes={path.parent}/classes.tsv")
    assert (len(source), len(source.classes), source.classes[0]) == (size, 10, first)
    subset = open_labelled(f"{path}?classes={path.parent}/classes.tsv&max=50")
    labels = [subset[index].label for index in range(50)]
    assert np.bincount(labels).tolist() == [5] * 10
