"""The experiment files: they load, are valid, and hold the published hyper-parameters."""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers import environment, read_lines, run_align

from align_jax import config, config_checks, evals, trees
from align_jax.models import dual_encoder

ALL_FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
EVALS = [path for path in ALL_FILES if path.name.startswith("eval_")]
FILES = [path for path in ALL_FILES if path not in EVALS]

# batch, steps, peak rate, warm-up (align_paper, section 3), parameters of image and text side with
# the vocabulary the config names: 100,000 wordpieces in the paper, 30,522 in COYO. By hand, from
# hf_align_parity 6: encoder of 30,522 + 69,478 more rows of the embedding + projection.
PUBLISHED = {
    "align_b7_base": (16_384, 1_200_000, 1e-3, 10_000, 62_143_440, 162_742_912, 100_000),
    "align_l2_large": (16_384, 1_200_000, 1e-3, 10_000, 467_219_796, 406_648_160, 100_000),
    "coyo_b7_base": (65_536, 300_000, 2e-3, 40_000, 62_143_440, 109_383_808, 30_522),
    "cc3m_b3_mini": (16_384, 100_000, 5e-3, 10_000, 10_349_736, 11_269_248, 30_522),
}


def load(name):
    return config.load_config(
        str(Path(__file__).parents[1] / "configs" / f"{name}.py"),
        ["--config.data.source=scenes?size=10"],
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_is_valid_and_opens_with_its_command(path):
    mixture = config.load_config(str(path))  # is given its own sources
    config_checks.validate(mixture if mixture.data.mixture else load(path.stem), num_devices=8)
    text = path.read_text()
    assert f"align train --config configs/{path.name}" in text
    assert "ublished" in text


@pytest.mark.parametrize("path", EVALS, ids=lambda path: path.stem)
def test_config_of_evaluators_takes_a_root_and_says_its_command(path):
    entries = config.load_config(f"{path}:elsewhere").eval.evaluators.to_dict()
    assert "elsewhere/" in str(entries) and "data/" not in str(entries)
    assert {entry["type"] for entry in entries.values()} <= set(evals.TYPES)
    assert f"--config configs/{path.name}" in path.read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_holds_the_published_recipe(name):
    c = load(name)
    batch, steps, rate, warmup, image, text, vocab_size = PUBLISHED[name]
    assert (c.train.batch_size, c.train.steps) == (batch, steps)
    assert (c.optim.learning_rate, c.optim.warmup_steps) == (rate, warmup)
    assert (c.optim.name, c.optim.schedule, c.optim.weight_decay) == ("lamb", "linear", 1e-5)
    assert (c.loss.label_smoothing, c.loss.temperature_init) == (0.1, 1.0)
    assert (c.data.image_size, c.data.resize_size, c.data.max_tokens) == (289, 346, 64)
    assert c.model.bn_group_size == 16
    model = dual_encoder.make_model(c.model, c.loss, vocab_size=vocab_size)
    params = dual_encoder.abstract_variables(model)["params"]
    sides = {
        side: trees.count({k: v for k, v in params.items() if k.startswith(side)})
        for side in ("image", "text")
    }
    assert sides == {"image": image, "text": text}


@pytest.mark.slow
def test_published_recipe_of_one_chip_makes_a_step_at_its_size(tmp_path):
    changes = {"batch_size": 16, "steps": 1}  # 289 px, B3 + mini, bfloat16, LAMB: as it is
    done = run_align(
        *("train", "--config", ALL_FILES[0].parent / "cc3m_b3_mini.py", "--workdir", "run"),
        *("--config.data.source=scenes?size=64", "--config.data.tokenizer="),
        *("--config.optim.warmup_steps=0", "--config.data.vocab_size=300"),
        *(f"--config.train.{k}={v}" for k, v in changes.items()),
        cwd=tmp_path,
        env=environment(tmp_path / "cache"),
        timeout_s=900,
    )
    assert done.returncode == 0, done.stderr
    assert "b3 + mini" in done.stderr and "bfloat16" in done.stderr
    (line,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    # Fresh towers at temperature 1: at chance, with smoothing.
    assert line["train/loss"] == pytest.approx(2 * np.log(16), rel=0.05)
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"form": "rings"}, "config.loss.form='rings' is unknown. Did you mean 'ring'?"),
        ({"kind": "siglip"}, "config.loss.kind='siglip' is unknown. Did you mean 'sigmoid'?"),
        ({"tile_size": 0}, "config.loss.tile_size=0 must be positive"),
        ({"kind": "sigmoid"}, "config.loss.label_smoothing=0.1 is of the softmax; set it to 0"),
        ({"bias_init": float("nan")}, "config.loss.bias_init=nan must be finite"),
        ({"form": "dense"}, "config.loss.form='dense' builds a 16384 x 16384 matrix"),
    ],
)
def test_loss_settings_that_cannot_work_are_named(changes, message):
    c = load("align_b7_base")
    c.loss.update(changes)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        config_checks.validate(c, num_devices=8)


def test_sigmoid_loss_in_ring_form_is_valid():
    c = load("align_b7_base")
    c.loss.update({"kind": "sigmoid", "form": "ring", "label_smoothing": 0.0, "tile_size": 7})
    config_checks.validate(c, num_devices=8)


# batch, steps, rate, share of the tower, schedule, decay, pixels in training, evaluation and before
# its crop of 0.875, statistics (Jia et al. 2021, section 5.3). 100 epochs: 1,281,167 x 100 images.
RECIPES = {
    "imagenet_head": (1024, 125_113, 0.1, 0.0, "steps", 0.0, 289, 360, 411, "grouped"),
    "imagenet": (1024, 125_113, 0.01, 0.1, "steps", 0.0, 475, 600, 686, "grouped"),
} | {
    name + stage: (256, 20_000, rate, share, "cosine", 1e-5, 289, 360, 411, "frozen")
    for name in ("flowers", "pets", "cars", "food")
    for stage, rate, share in (("_head", 1e-2, 0.0), ("", 1e-3, 1.0))
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_of_classification_is_the_published_one(name):
    c = config.load_config(str(Path(__file__).parents[1] / f"configs/finetune_classes.py:{name}"))
    config_checks.validate(c, num_devices=8)
    assert RECIPES[name] == (
        *(c.train.batch_size, c.train.steps, c.optim.learning_rate, c.optim.image_lr_multiplier),
        *(c.optim.schedule, c.optim.weight_decay, c.data.image_size, c.data.eval_image_size),
        *(c.data.resize_size, c.model.bn_mode),
    )
    assert (c.optim.name, c.optim.b1, c.optim.warmup_steps) == ("sgd", 0.9, 0)
    assert (c.optim.decay_every, c.optim.decay_factor) == (0.3, 0.2)  # 30 of 100 epochs
    assert (c.task, c.data.crop, c.data.crop_min_area, c.data.flip) == (
        *("classify", "inception", 0.08, True),
    )
    assert c.loss.label_smoothing == 0.0


def test_recipe_of_another_name_is_named():
    path = str(Path(__file__).parents[1] / "configs/finetune_classes.py:flower")
    with pytest.raises(ValueError, match="there is no recipe 'flower'; known: imagenet_head, "):
        config.load_config(path)
