"""`align train` from config to metrics, batches and weights, against a second implementation.

Three runs, in which together every key that a batch or a step sees has another value than the
default. Losses, gradient norms, learning rates, temperatures, weights and running statistics are
those of golden.py (PyTorch and NumPy, float64); pixels, captions, tokens and hashes are derived
here once more. So a key that is not passed on, or passed to the wrong place, is found.
"""

import contextlib
import dataclasses
import hashlib
import io
import shutil

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from helpers import read_checkpoint, read_lines, write_table
from ml_collections import ConfigDict
from PIL import Image
from tokenizers import BertWordPieceTokenizer

from align_jax import config as config_lib
from align_jax import optim, train, trees
from align_jax.models import layers

STEPS, BATCH = 6, 16

COMMON = {
    "model.image.variant": "pico",
    "model.image.drop_path_rate": 0.6,
    "model.text.variant": "tiny",
    "model.text.dropout_rate": 0.2,
    "model.text.max_positions": 20,
    "model.embed_dim": 48,
    "model.dtype": "float32",
    "data.image_size": 37,
    "data.resize_size": 45,
    "data.num_threads": 2,
    "loss.temperature_init": 0.3,
    "optim.warmup_steps": 2,
    "train.batch_size": BATCH,
    "train.steps": STEPS,
    "checkpoint.every_steps": STEPS,
    "log.every_steps": 1,
}
RUNS = {
    "lamb": {
        "model.padding": "same",
        "model.bn_group_size": 4,
        "model.bn_decay": 0.8,
        "data.source": "one.jsonl?images=images",
        "data.resize": "pil",
        "data.decode": "reduced",
        "data.flip": False,
        "data.max_tokens": 7,
        "data.tokenizer": "vocab.txt",
        "loss.form": "ring",
        "loss.tile_size": 3,
        "loss.label_smoothing": 0.25,
        "loss.mask_duplicates": "both",
        "loss.negatives": 0.5,
        "optim.learning_rate": 3e-3,
        "optim.schedule": "cosine",
        "optim.weight_decay": 0.05,
        "optim.b1": 0.8,
        "optim.b2": 0.9,
        "optim.eps": 1e-3,
        "optim.momentum_dtype": "bfloat16",
        "optim.clip_norm": 0.5,
        "optim.no_decay": ("_norm/", "bias$"),
        "optim.no_trust_ratio": ("expand_bn/", "_norm/"),
        "optim.temperature": "log",
        "optim.temperature_lr_multiplier": 30.0,
        "optim.image_lr_multiplier": 0.5,
        "optim.text_lr_multiplier": 0.7,
        "mesh.data": 1,
        "mesh.fsdp": 2,
        "train.microbatches": 2,
        "train.seed": 7,
    },
    "adamw": {
        "model.image.variant": "femto",
        "model.bn_mode": "global",
        "data.source": "two.jsonl?images=images",
        "data.max_tokens": 12,
        "data.tokenizer": "",
        "data.vocab_size": 100,
        "loss.kind": "sigmoid",
        "loss.label_smoothing": 0.0,
        "loss.form": "dense",
        "loss.bias_init": -3.0,
        "loss.mask_duplicates": "caption",
        "optim.name": "adamw",
        "optim.learning_rate": 1e-3,
        "optim.eps": 1e-3,
        "optim.weight_decay": 0.1,
        "optim.temperature": "fixed",
        "optim.image_lr_multiplier": 0.5,
        "optim.min_learning_rate": 2e-4,
        "optim.freeze": ("/query/bias$", "text/embeddings_norm/"),
        "optim.lr_rules": (("_projection/", 2.0), ("/kernel$", 0.5)),
        "train.seed": 3,
    },
    "lion": {
        "model.image.variant": "femto",
        "model.bn_mode": "frozen",
        "model.remat": "dots",
        "model.scan_layers": True,
        "data.mixture.a.source": "one.jsonl?images=images",
        "data.mixture.a.weight": 3.0,
        "data.mixture.b.source": "two.jsonl?images=images",
        "data.mixture.b.weight": 1.0,
        "data.max_tokens": 9,
        "data.tokenizer": "vocab.txt",
        "loss.form": "sharded",
        "loss.mask_duplicates": "image",
        "loss.negatives": 0.25,
        "optim.name": "lion",
        "optim.learning_rate": 1e-4,
        "optim.weight_decay": 0.1,
        "optim.temperature": "same",
        "train.seed": 2**32 - 1,
    },
}
# Their gradient is zero in exact arithmetic (see test_train_step): rounding decides where they go.
ZERO_GRADIENT = ("/key/bias", "/project_bn/bias")


def make_config(run):
    c = config_lib.default_config()
    changes = COMMON | RUNS[run]
    for name in {key.split(".")[2] for key in changes if key.startswith("data.mixture.")}:
        c.data.mixture[name] = ConfigDict({"source": "", "weight": 1.0})
    c.update_from_flattened_dict(changes)
    return c.lock()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tables over one folder of pictures; captions and pictures come more than once."""
    folder = tmp_path_factory.mktemp("golden")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(30):
        # Two-pixel noise, as large as reduced decoding needs: the ways of resizing differ.
        noise = rng.integers(0, 256, (104, 116, 3), np.uint8).repeat(2, 0).repeat(2, 1)
        Image.fromarray(noise[:, :220]).save(folder / "images" / f"{i}.jpg", quality=95)
        if i % 3 == 1:
            shutil.copy(folder / "images" / f"{i - 1}.jpg", folder / "images" / f"{i}.jpg")
    words = ["Red", "green", "blue", "square", "circle", "one", "two"]
    words += ["".join(letters) for letters in rng.choice(list("Abcdefgh"), (12, 6))]
    for table, start, count in (("one", 0, 20), ("two", 18, 12)):
        rows = []
        for i in range(start, start + count):
            captions = [" ".join(rng.choice(words, 1 + int(rng.integers(9)))) for _ in range(3)]
            captions = [*captions[: 1 + i % 3], "a Red square ", "  "]
            rows.append({"image": f"{i}.jpg", "captions": captions})
        write_table(folder / f"{table}.jsonl", rows)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = ["red", "green", "blue", "sq", "##uare", "circle", "one", "two", "a"]
    (folder / "vocab.txt").write_text("\n".join(specials + pieces) + "\n")
    return folder


class Recorder:
    """The step of the program, or one that only counts, and all that went into it."""

    def __init__(self, step_fn, computes):
        self.step_fn, self.computes = step_fn, computes
        self.batches, self.first_state = [], None

    def lower(self, *args):
        if self.computes:
            # Half the compile time; what XLA makes of the program is not in question here.
            lowered = self.step_fn.lower(*args)
            self._compiled = lowered.compile({"xla_backend_optimization_level": 0})
        return self

    def compile(self):
        return self

    def memory_analysis(self):
        return None

    def __call__(self, state, batch):
        if self.first_state is None:
            variables = {"params": state.params, "batch_stats": state.batch_stats}
            self.first_state = {n: np.array(leaf) for n, leaf in trees.named_leaves(variables)}
        self.batches.append({name: np.array(value) for name, value in batch.items()})
        if self.computes:
            return self._compiled(state, batch)
        metrics = {"loss": np.float32(1), "grad_norm": np.float32(1)}
        return dataclasses.replace(state, step=state.step + 1), metrics


def run_of(run, folder, computes):
    """(config, Recorder, lines of metrics.jsonl, workdir)."""
    config, recorders, make_program = make_config(run), [], train.make_program
    make_mesh, workdir = train.mesh_lib.make_mesh, folder / f"{run}{computes:d}"

    def recorded(*args, **kwargs):
        *rest, step_fn = make_program(*args, **kwargs)
        recorders.append(Recorder(step_fn, computes))
        return *rest, recorders[0]

    def few_devices(data=-1, fsdp=1):
        data = max(1, data)
        return make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])

    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_program", recorded)
        patch.setattr(train.mesh_lib, "make_mesh", few_devices)
        # Equal to the form of CPUs (test_layers), and compiled in a part of the time.
        patch.setattr(layers, "depthwise_conv", layers.native_depthwise_conv)
        train.train_and_evaluate(config, workdir)
    (recorder,) = recorders
    return config, recorder, read_lines(workdir / "metrics.jsonl"), workdir


@pytest.fixture(scope="module", params=RUNS)
def fed(request, folder):
    """A run of each config whose steps compute nothing."""
    return run_of(request.param, folder, computes=False)


@pytest.mark.parametrize("run", [pytest.param("lamb", marks=pytest.mark.slow), "adamw", "lion"])
def test_every_step_is_that_of_the_second_implementation(folder, run):
    config, recorder, lines, workdir = run_of(run, folder, computes=True)
    checkpoint = read_checkpoint(workdir, STEPS)
    history, variables = golden.run(config, recorder.first_state, recorder.batches)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, expected in zip(lines, history, strict=True):
        found = {k.removeprefix("train/"): v for k, v in line.items() if k.startswith("train/")}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            rtol = 1e-6 if name == "learning_rate" else 1e-4
            np.testing.assert_allclose(
                found[name], value, rtol=rtol, err_msg=f"{line['step']} {name}"
            )
    for name, value in variables.items():
        if not name.endswith(ZERO_GRADIENT):
            before, found = recorder.first_state[name], checkpoint[f"weights/{name}"]
            moved = np.abs(value - before).max()
            wrong = np.abs(found - value) > 0.01 * moved + 1e-6 * np.abs(value).max() + 1e-7
            # Where the gradient of an element is nearly zero, rounding decides its sign.
            assert wrong.mean() <= 0.01 or wrong.sum() <= 1, (name, wrong.mean(), moved)


PARAMETERS = {
    "image/stem_conv/kernel": (3, 3, 3, 8),
    "image/stem_bn/scale": (8,),
    "image/stage2/block0/expand_bn/scale": (8,),
    "image/stage2/block0/project_bn/bias": (8,),
    "image_projection/kernel": (8, 4),
    "text/embeddings_norm/scale": (6,),
    "text/encoder/layer0/query/bias": (6,),
    "text_projection/kernel": (6, 4),
    "temperature": (),
    "bias": (),
}


@pytest.mark.parametrize("run", RUNS)
def test_optimizer_alone_is_that_of_the_second_implementation(run):
    config, rng = make_config(run), np.random.default_rng(0)
    shapes = {n: s for n, s in PARAMETERS.items() if not golden.is_frozen(config.optim, n)}
    assert len(shapes) == len(PARAMETERS) - 3 * (run == "adamw")
    expected = {n: np.float64(0.5 + rng.random(shape)) for n, shape in shapes.items()}
    optimizer = optim.make_optimizer(
        config.optim, optim.make_schedule(config.optim, config.train.steps)
    )
    params = nested(expected)
    state, oracle = optimizer.init(params), golden.Optimizer(config)
    for step in range(STEPS):
        # Clipped at some steps and not at others.
        gradients = {n: rng.standard_normal(s) * 0.02 * 2**step for n, s in shapes.items()}
        before = expected
        expected = oracle.update(expected, gradients, golden.learning_rate(config, step))
        updates, state = optimizer.update(nested(gradients), state, params)
        params = optax.apply_updates(params, updates)
        for name, leaf in trees.named_leaves(params):
            moved = np.abs(expected[name] - before[name]).max()
            np.testing.assert_allclose(leaf, expected[name], rtol=1e-6, atol=2e-3 * moved)
            assert (moved > 0) == (step > 0), name


def nested(flat):
    tree = {}
    for name, value in flat.items():
        *path, last = name.split("/")
        leaf = tree
        for part in path:
            leaf = leaf.setdefault(part, {})
        leaf[last] = jnp.asarray(value, jnp.float32)
    return tree


def test_batches_hold_the_pixels_captions_and_hashes_of_the_config(fed, folder):
    config, recorder, _, workdir = fed
    rows = [r for source in sources_of(config) for r in read_lines(folder / source.split("?")[0])]
    vocabulary = folder / "vocab.txt"
    if not config.data.tokenizer:
        vocabulary = workdir / "tokenizer" / "vocab.txt"
        assert len(vocabulary.read_text().splitlines()) == config.data.vocab_size
    tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    length = config.data.max_tokens
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    for step, batch in enumerate(recorder.batches):
        for i, index in enumerate(batch["index"]):
            rng = np.random.Generator(np.random.Philox([config.train.seed, step * BATCH + i, 0]))
            usable = [caption for caption in rows[index]["captions"] if caption.strip()]
            caption = usable[int(rng.integers(len(usable)))]
            encoding = tokenizer.encode(caption)
            np.testing.assert_array_equal(batch["ids"][i], encoding.ids)
            np.testing.assert_array_equal(batch["mask"][i], encoding.attention_mask)
            data = (folder / "images" / rows[index]["image"]).read_bytes()
            image = view(config.data, data, rng)
            # Torch adds in another order: a value may round to the other side.
            difference = np.abs(batch["image"][i].astype(int) - image)
            assert difference.max() <= (1 if config.data.resize == "tf" else 0)
            assert (difference > 0).mean() < 0.01
            for what, content in (
                ("caption", caption.strip().lower().encode()),
                ("image", data),
            ):
                digest = hashlib.blake2b(content, digest_size=8).digest()
                assert batch[f"{what}_hash"][i].tobytes() == digest


def view(data, content, rng):
    image, size = Image.open(io.BytesIO(content)), data.resize_size
    top, left = rng.integers(size - data.image_size + 1, size=2)
    mirrored = rng.random() < 0.5
    if data.decode == "reduced":
        image.draft(None, (2 * size, 2 * size))
        assert image.size == (110, 104)
    if data.resize == "pil":
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), int)
    else:
        planes = torch.tensor(np.array(image)).permute(2, 0, 1)[None].double()
        planes = torch.nn.functional.interpolate(planes, (size, size), mode="bilinear")
        pixels = planes[0].permute(1, 2, 0).round().numpy().astype(int)
    pixels = pixels[top : top + data.image_size, left : left + data.image_size]
    return pixels[:, ::-1] if mirrored and data.flip else pixels


def sources_of(config):
    entries = config.data.mixture
    return [entries[name].source for name in sorted(entries)] or [config.data.source]


def test_rows_come_in_epochs_and_by_the_weights_of_the_mixture(fed):
    config, recorder, lines, _ = fed
    drawn = np.concatenate([batch["index"] for batch in recorder.batches]).tolist()
    if config.data.mixture:
        counts = np.bincount([index >= 20 for index in drawn])
        assert counts.tolist() == [72, 24]  # 3 to 1
        assert lines[-1]["data/epochs/a"] == 72 / 20 and lines[-1]["data/epochs/b"] == 24 / 12
    else:
        size = len(set(drawn))
        epochs = [drawn[i : i + size] for i in range(0, len(drawn) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[1]
        assert lines[-1]["data/epochs"] == STEPS * BATCH / size


def test_these_runs_change_every_key_that_a_batch_or_a_step_sees():
    defaults, changed = flat(config_lib.default_config()), set()
    for name in RUNS:
        found = flat(make_config(name))
        changed |= {key for key in defaults if found.get(key, ...) != defaults[key]}
    seen = {k for k in defaults if k.split(".")[0] in ("model", "data", "loss", "optim", "mesh")}
    seen |= {key for key in defaults if key.startswith("train.")}
    assert seen - changed == ELSEWHERE


# Keys with an oracle of their own, or without a part in any number.
ELSEWHERE = {
    "data.num_workers",  # who builds a batch changes nothing in it
    *("data.crop", "data.crop_min_area", "data.eval_image_size"),  # test_classify
    *("data.color_jitter", "data.grayscale", "data.downscale"),  # test_augment
    "data.image_embeddings",  # test_image_embeddings
    *("optim.cooldown_steps", "optim.decay_every", "optim.decay_factor"),  # test_optim
    "optim.layer_decay",  # test_optim
    *("train.on_divergence", "train.max_rollbacks", "train.spike"),  # test_divergence
    "train.hang_s",  # test_watchdog
    "train.native_kernels",  # test_native
    "train.ema_decay",  # test_average
}


def flat(config):
    keys = {}
    for group, value in config.items():
        if isinstance(value, ConfigDict) and group != "mixture" and group != "evaluators":
            keys |= {f"{group}.{key}": item for key, item in flat(value).items()}
        else:
            keys[group] = value
    return keys
