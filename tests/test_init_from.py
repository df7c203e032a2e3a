"""Runs that start from other weights: both towers or one, of every format, and what is refused."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest
from helpers import CONFIG, StubStep, error_of, make_pairs, read_checkpoint

from align_jax import align, config, mesh, trees
from align_jax.cli import main as cli
from align_jax.data import tokenizer
from align_jax.hf import convert, processor
from align_jax.hf import weights as weights_file
from align_jax.models import dual_encoder
from align_jax.run import init_from

TRAIN = (
    "train",
    "--config",
    "config.py",
    "--config.train.steps=1",
    "--config.optim.warmup_steps=0",
)


def tiny_model(**changes):
    c = config.default_config()
    c.model.image.variant, c.model.text.variant = "femto", "tiny"
    c.model.embed_dim, c.model.dtype = 24, "float32"  # femto's own width: no image projection
    c.model.update(changes)
    return dual_encoder.make_model(c.model, c.loss, vocab_size=len(TOKENS.tokens))


TOKENS = tokenizer.train_wordpiece(
    ["a red square and a blue one", "green things in a row"] * 4, 200
)
OTHER_TOKENS = tokenizer.train_wordpiece(["quite another text of words"] * 4, 200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pairs, a config, and `hf`, a Hugging Face ALIGN folder with the weights of seed 7."""
    folder = tmp_path_factory.mktemp("start")
    make_pairs(folder, count=16)
    text = CONFIG.replace("embed_dim = 32", "embed_dim = 24").replace(
        'c.data.tokenizer = "tokenizer"', "pass"
    )
    (folder / "config.py").write_text(text)
    with contextlib.chdir(folder):
        assert cli.main(["pack", "captions.jsonl?images=images", "--out", "data"]) == 0
    model = tiny_model()
    source = align.Align(
        model,
        fresh(model, seed=7),
        TOKENS,
        processor.Preprocessing(32, 40, "pil", 12, TOKENS.vocab_size, TOKENS.fingerprint()),
        mesh.make_mesh(),
        batch_size=8,
    )
    source.save(folder / "hf")
    return folder


def fresh(model, seed):
    m = mesh.make_mesh()
    shardings = mesh.infer_shardings(dual_encoder.abstract_variables(model), m)
    return dual_encoder.init_variables(model, seed=seed, shardings=shardings)


def leaves(variables):
    return {name: np.asarray(leaf) for name, leaf in trees.named_leaves(variables)}


@pytest.mark.parametrize("towers", ["both", "image", "text"])
def test_chosen_towers_come_from_the_folder_and_the_rest_stays_fresh(folder, towers):
    model = tiny_model()
    own, theirs = leaves(fresh(model, seed=1)), leaves(fresh(model, seed=7))
    found = leaves(init_from.start_from(folder / "hf", towers, model, fresh(model, seed=1)))
    for name, value in found.items():
        part = name.split("/")[1]
        expected = theirs if towers == "both" or part == towers else own
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert not np.array_equal(
        own["params/text/word_embeddings/embedding"],
        theirs["params/text/word_embeddings/embedding"],
    )


def test_shardings_stay_as_they_are(folder):
    model = tiny_model()
    before = fresh(model, seed=1)
    after = init_from.start_from(folder / "hf", "both", model, before)
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding and a.dtype == b.dtype, before, after)
    assert all(jax.tree.leaves(same))


def test_plain_bert_starts_the_text_tower_only(folder, tmp_path):
    model = tiny_model()
    theirs = convert.to_hf(jax.device_get(fresh(model, seed=7)), model)
    bert = {
        name.replace("text_model.", "bert."): value
        for name, value in theirs.items()
        if name.startswith("text_model.")
    }
    weights_file.write_safetensors(tmp_path / "model.safetensors", bert)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    found = leaves(init_from.start_from(tmp_path, "text", model, fresh(model, seed=1)))
    expected = leaves(fresh(model, seed=7))
    name = "params/text/encoder/layer1/query/kernel"
    np.testing.assert_array_equal(found[name], expected[name])
    with pytest.raises(ValueError, match="config.init_towers='text'"):
        init_from.start_from(tmp_path, "both", model, fresh(model, seed=1))


def test_other_sizes_are_refused_with_names_and_shapes(folder):
    model = tiny_model(embed_dim=96)
    with pytest.raises(ValueError, match=r"config.init_from=.*text_projection/kernel"):
        init_from.start_from(folder / "hf", "both", model, fresh(model, seed=1))
    # A single tower does not need the projections to agree.
    init_from.start_from(folder / "hf", "text", model, fresh(model, seed=1))


def test_training_starts_from_the_folder_with_its_tokenizer(folder, monkeypatch):
    monkeypatch.chdir(folder)
    StubStep().patch(monkeypatch)  # counts, and leaves the weights alone
    assert cli.main([*TRAIN, "--workdir", "run", "--config.init_from=hf"]) == 0
    saved = read_checkpoint(folder / "run", 1)
    for name, value in leaves(fresh(tiny_model(), seed=7)).items():
        np.testing.assert_array_equal(saved[f"weights/{name}"], value, err_msg=name)
    used = tokenizer.load_tokenizer(folder / "run" / "tokenizer")
    assert used.fingerprint() == TOKENS.fingerprint()
    # A workdir is a source too; a finished run does not load it again.
    assert cli.main([*TRAIN, "--workdir", "second", "--config.init_from=run"]) == 0
    second = read_checkpoint(folder / "second", 1)
    name = "weights/params/image/stem_conv/kernel"
    np.testing.assert_array_equal(second[name], saved[name])


def test_fine_tuned_run_continues_when_what_it_started_from_is_gone(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    StubStep().patch(monkeypatch)
    shutil.copytree("hf", "lent")
    TOKENS.save(folder / "words")
    command = [*TRAIN, "--workdir", "tuned", "--config.init_from=lent"]
    command += ["--config.data.tokenizer=words"]
    assert cli.main(command) == 0
    shutil.rmtree("lent")
    shutil.rmtree("words")
    assert cli.main([*command, "--config.train.steps=2"]) == 0
    assert "continuing from step 1 of tuned" in capfd.readouterr().err
    # Before its first checkpoint a run still needs the weights.
    shutil.rmtree("tuned/checkpoints")
    assert cli.main([*command, "--config.train.steps=2"]) == 2
    assert "align: lent does not exist; name a workdir" in capfd.readouterr().err


@pytest.mark.parametrize(
    "override, expected",
    [
        ("--config.init_from=nowhere", "config.init_from: nowhere does not exist"),
        ("--config.init_towers=images", "config.init_towers='images' is unknown"),
    ],
)
def test_wrong_init_from_is_one_clear_line(folder, monkeypatch, capfd, override, expected):
    monkeypatch.chdir(folder)
    assert expected in error_of(capfd, *TRAIN, "--workdir", "no", override)


def test_tokenizer_of_other_words_is_refused(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    OTHER_TOKENS.save(folder / "other")
    message = error_of(
        capfd, *TRAIN, "--workdir", "no", "--config.init_from=hf", "--config.data.tokenizer=other"
    )
    assert "config.data.tokenizer=other" in message and "config.init_from=hf" in message
