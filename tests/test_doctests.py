"""The examples in the docstrings of the public calls run, and print what they say."""

import contextlib
import doctest

import numpy as np
import pytest
from PIL import Image

import align_jax
from align_jax import align, config, mesh
from align_jax.data import tokenizer
from align_jax.hf import processor
from align_jax.models import dual_encoder

PUBLIC = {
    "load": align.load,
    **{
        name: getattr(align.Align, name)
        for name in ("encode_image", "encode_text", "similarity", "classify", "save")
    },
}


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """The names that an example finds, in a folder with two images and a model, `tiny`."""
    folder = tmp_path_factory.mktemp("examples")
    for name in ("red", "blue"):
        Image.new("RGB", (40, 40), name).save(folder / f"{name}.png")
    c = config.default_config()
    c.model.image.variant, c.model.text.variant, c.model.dtype = "pico", "tiny", "float32"
    c.model.embed_dim = 80  # the width of pico: Hugging Face's format has no image projection
    c.loss.temperature_init = 0.5
    words = tokenizer.train_wordpiece(["a red square", "a blue one", "green"] * 4, 200)
    model = dual_encoder.make_model(c.model, c.loss, vocab_size=words.vocab_size)
    grid = mesh.make_mesh()
    shardings = mesh.infer_shardings(dual_encoder.abstract_variables(model), grid)
    made = align.Align(
        model,
        dual_encoder.init_variables(model, seed=0, shardings=shardings),
        words,
        processor.Preprocessing(32, 40, "pil", 16, words.vocab_size, words.fingerprint()),
        grid,
        batch_size=8,
    )
    with contextlib.chdir(folder):
        made.save("tiny")
        yield {"align_jax": align_jax, "np": np, "model": align_jax.load("tiny", batch_size=8)}


@pytest.mark.parametrize("name", PUBLIC)
def test_example_of_public_call_prints_what_it_says(name, examples):
    (found,) = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs=dict(examples))
    assert found.examples
    printed = []
    doctest.DocTestRunner().run(found, out=printed.append)
    assert not printed, "".join(printed)
