"""Every key of the config does something: a changed value changes what the key governs.

For each key of `default_config()` the table names a value and what must then differ: the program
of the train step, the first weights, the batches, a file or the behaviour of the loop. A new key
fails here until it has a row. That a change is the *right* one is for test_golden to say.
"""

import functools
from unittest import mock

import jax
import numpy as np
import pytest
from config_lab import BASE, Lab, lowered
from helpers import (
    has_compiler,
    read_checkpoint,
    read_lines,
    saved_steps,
    write_embeddings,
    write_table,
)
from ml_collections import ConfigDict
from PIL import Image

from align_jax import config as config_lib
from align_jax import config_checks, mesh, train, trees
from align_jax.models import layers

RING = {"loss.form": "ring"}
SIGMOID = {"loss.kind": "sigmoid", "loss.label_smoothing": 0.0}
FROZEN = {"model.bn_mode": "frozen"}
STEPS = {"optim.schedule": "steps"}
INCEPTION = {"data.crop": "inception"}
CLASSES = {"data.source": "scenes?size=9&label=shape"}
OFTEN = {"checkpoint.every_steps": 1}
ROLLBACK = {"train.on_divergence": "rollback"}
LORA = {
    "lora.rank": 2,
    "init_from": "before",
    "model.bn_mode": "frozen",
    "optim.name": "adamw",
    "optim.temperature": "fixed",
}
EVALUATOR = {"type": "retrieval", "source": "one.jsonl?images=images"}

# What a run shows; each is a function of a `Lab` and of the changes to BASE.


def program(lab, changes):
    """The train step as it is handed to the compiler."""
    if changes.get("train.native_kernels") and not has_compiler():
        pytest.skip("no C++ compiler")
    return lab.program(lab.config(changes))


def batches(lab, changes):
    return lab.run(changes).batches


def preprocessing(lab, changes):
    return (lab.run(changes).workdir / "preprocessing.json").read_text()


def order(lab, changes):
    """Which records the batches hold, whatever is made of them."""
    return [content for (_, name), content in batches(lab, changes).items() if name == "index"]


def weights(lab, changes):
    """All the tensors of the first checkpoint: the stub step leaves them as they were drawn."""
    run = lab.run(changes)
    content = read_checkpoint(run.workdir, min(saved_steps(run.workdir)))
    return {name: array.tobytes() for name, array in content.items()}


def tokenizer(lab, changes):
    return (lab.run(changes).workdir / "tokenizer" / "vocab.txt").read_text()


def lines(lab, changes):
    return [line["step"] for line in read_lines(lab.run(changes).workdir / "metrics.jsonl")]


def checkpoints(lab, changes):
    return saved_steps(lab.run(changes).workdir)


def evaluations(lab, changes):
    return lab.run(changes).evaluations


def mesh_shape(lab, changes):
    """The mesh over the eight devices, or why there is none."""
    return lab.until_program(changes)


def threads(lab, changes):
    """Whether two threads build batches at a time."""
    return lab.run(changes).threads > 1


def children(lab, changes):
    return lab.run(changes).children


def watched(lab, changes):
    """Whether a thread looks on."""
    return lab.run(changes).watched


def divergence(lab, changes):
    """How a run ends whose loss jumps at step 23 and is NaN at step 24, whatever it does."""
    return lab.diverged(changes)


TABLE = {
    "task": [("classify", mesh_shape, CLASSES)],
    "init_from": [("before", weights)],
    "init_towers": [("text", weights, {"init_from": "before"})],
    "model.image.variant": [("nano", program)],
    "model.image.drop_path_rate": [(0.3, program)],
    "model.text.variant": [("mini", program)],
    "model.text.dropout_rate": [(0.3, program)],
    "model.text.max_positions": [(50, program)],
    "model.embed_dim": [(40, program)],
    "model.dtype": [("bfloat16", program)],
    "model.padding": [("same", program)],
    "model.bn_mode": [("frozen", program), ("global", program)],
    "model.bn_group_size": [(2, program)],
    "model.bn_decay": [(0.9, program)],
    "model.remat": [("dots", program), ("block", program)],
    "model.scan_layers": [(True, program)],
    "data.source": [("two.jsonl?images=images", batches)],
    "data.mixture": [
        ({"b": {"source": "two.jsonl?images=images", "weight": 1.0}}, batches, {"data.source": ""})
    ],
    "data.image_embeddings": [("embedded", batches, {"optim.image_lr_multiplier": 0.0})],
    "data.image_size": [(32, batches)],
    "data.resize_size": [(41, batches)],
    "data.resize": [("tf", batches)],
    "data.decode": [("reduced", batches)],
    "data.crop": [("inception", batches)],
    "data.crop_min_area": [(0.9, batches, INCEPTION)],
    "data.color_jitter": [(0.5, batches)],
    "data.grayscale": [(1.0, batches)],
    "data.downscale": [(1.0, batches)],
    "data.eval_image_size": [(36, preprocessing)],
    "data.flip": [(False, batches)],
    "data.max_tokens": [(6, batches)],
    "data.tokenizer": [("vocab.txt", batches), ("vocab.txt", tokenizer)],
    "data.vocab_size": [(110, tokenizer)],
    "data.num_threads": [(2, threads)],
    "data.num_workers": [(1, children)],
    "loss.kind": [("sigmoid", program, {"loss.label_smoothing": 0.0})],
    "loss.form": [("ring", program), ("dense", program)],
    "loss.tile_size": [(3, program, RING)],
    "loss.label_smoothing": [(0.2, program), (0.2, program, RING)],
    "loss.temperature_init": [(0.5, weights)],
    "loss.bias_init": [(-5.0, weights, SIGMOID)],
    "loss.mask_duplicates": [
        ("image", program),
        ("caption", program),
        ("both", program),
        ("both", batches),
    ],
    "loss.negatives": [(0.5, program)],
    "optim.name": [(name, program) for name in ("adamw", "lion", "sgd", "adafactor", "muon")],
    "optim.learning_rate": [(0.1, program)],
    "optim.warmup_steps": [(2, program)],
    "optim.schedule": [(name, program) for name in ("cosine", "steps", "constant", "rsqrt")],
    "optim.cooldown_steps": [(2, program, {"optim.schedule": "constant"})],
    "optim.min_learning_rate": [(1e-4, program)],
    "optim.lr_rules": [((("^text/", 0.5),), program)],
    "optim.layer_decay": [(0.8, program)],
    "optim.decay_every": [(0.5, program, STEPS)],
    "optim.decay_factor": [(0.1, program, STEPS)],
    "optim.weight_decay": [(0.2, program)],
    "optim.b1": [(0.8, program)],
    "optim.b2": [(0.9, program)],
    "optim.eps": [(1e-4, program)],
    "optim.momentum_dtype": [("bfloat16", program)],
    "optim.clip_norm": [(1.0, program)],
    "optim.no_decay": [((), program)],
    "optim.no_trust_ratio": [((), program)],
    "optim.temperature": [("same", program), ("fixed", program)],
    "optim.temperature_lr_multiplier": [(2.0, program)],
    "optim.image_lr_multiplier": [(0.5, program), (0.0, program, FROZEN)],
    "optim.freeze": [(("^text/",), program), (("^image/stem",), program)],
    "optim.text_lr_multiplier": [(0.5, program)],
    "lora.rank": [(3, program, LORA), (3, weights, LORA)],
    "lora.alpha": [(8.0, program, LORA)],
    "lora.kernels": [((r"/query/kernel$",), program, LORA), ((r"/query/kernel$",), weights, LORA)],
    # With as many devices as there are, `data` can only be what `fsdp` leaves, or be refused.
    "mesh.data": [(2, mesh_shape)],
    "mesh.fsdp": [(4, mesh_shape)],
    "train.batch_size": [(16, batches)],
    "train.steps": [(5, lines), (5, program)],
    "train.microbatches": [(2, program)],
    "train.native_kernels": [(True, program)],
    "train.ema_decay": [(0.9, program)],
    "train.seed": [(1, program), (1, batches), (1, order), (1, weights)],
    "train.on_divergence": [("rollback", divergence)],
    "train.max_rollbacks": [(0, divergence, ROLLBACK)],
    "train.spike": [(0.0, divergence, ROLLBACK)],
    "train.hang_s": [(0.0, watched)],
    "checkpoint.every_steps": [(2, checkpoints)],
    "checkpoint.keep": [(2, checkpoints, OFTEN)],
    "checkpoint.keep_every": [(1, checkpoints, OFTEN)],
    "checkpoint.best": [
        ("own/r1", checkpoints, {"eval.evaluators": {"own": EVALUATOR}, "eval.every_steps": 3})
    ],
    "eval.every_steps": [(2, evaluations)],
    "eval.batch_size": [(64, evaluations)],
    "eval.evaluators": [({"own": EVALUATOR}, evaluations)],
    "log.every_steps": [(2, lines)],
    "debug.nans": [(True, program)],
}


@pytest.fixture(scope="module", autouse=True)
def quick_depthwise():
    # The form of CPUs has a multiplication for each pixel of a kernel: slow to trace.
    with mock.patch.object(layers, "depthwise_conv", layers.native_depthwise_conv):
        yield


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        pixels = rng.integers(0, 256, (90, 100, 3), np.uint8).repeat(2, 0).repeat(2, 1)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.jpg")
    words = ["".join(letters) for letters in rng.choice(list("abcdefgh"), (40, 6))]
    for table, start in (("one", 0), ("two", 4)):
        rows = [
            {"image": f"{i}.jpg", "captions": [" ".join(rng.choice(words, 6)) for _ in range(8)]}
            for i in range(start, start + 6)
        ]
        write_table(folder / f"{table}.jsonl", rows)
    write_embeddings(folder / "embedded", f"{folder}/one.jsonl?images={folder}/images", dim=32)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join(specials + words[::2]) + "\n")
    made = Lab(folder)
    before = made.run({"train.seed": 11, "data.tokenizer": "vocab.txt"})
    before.workdir.rename(folder / "before")
    return made


CASES = [(key, *case) for key, cases in TABLE.items() for case in cases]


@functools.cache
def keys_of_config():
    def flat(config, prefix=""):
        for key, value in config.items():
            if isinstance(value, ConfigDict) and key not in ("mixture", "evaluators"):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"

    return set(flat(config_lib.default_config()))


def test_every_key_has_a_row_and_every_row_a_key():
    assert keys_of_config() == TABLE.keys()


@pytest.mark.parametrize(
    ("key", "value", "observer", "base"),
    [(*case[:3], case[3] if len(case) > 3 else {}) for case in CASES],
    ids=[f"{case[0]}={case[1]}-{case[2].__name__}"[:60] for case in CASES],
)
def test_changed_key_changes_what_it_governs(lab, key, value, observer, base):
    if key == "data.mixture":  # the same source, but by another door
        base = base | {"data.mixture": {"a": {"source": BASE["data.source"], "weight": 1.0}}}
    elif observer is mesh_shape:
        base = base | {"mesh.fsdp": 2}
    changed = base | {key: value}
    assert lab.config(changed) != lab.config(base)
    if observer is not mesh_shape:
        for config in (lab.config(base), lab.config(changed)):
            config_checks.validate(config, num_devices=1)
    assert observer(lab, changed) != observer(lab, base)


@pytest.mark.parametrize(
    "key", [key for key, cases in TABLE.items() if len({str(case[0]) for case in cases}) > 1]
)
def test_values_of_a_key_differ_from_each_other(lab, key):
    cases = [case for case in TABLE[key] if len(case) == 2 and case[1] is program]
    seen = [program(lab, {key: value}) for value, _ in cases]
    assert len(set(seen)) == len(cases)


# What may be another in a later part of a run: neither its numbers nor its data follow from it.
FREE = {
    *("data.num_threads", "data.num_workers", "loss.form", "loss.tile_size", "mesh.fsdp"),
    *("model.remat", "model.scan_layers", "train.microbatches", "train.steps"),
    "train.native_kernels",
    *("train.on_divergence", "train.max_rollbacks", "train.spike", "train.hang_s"),
    *(key for key in TABLE if key.split(".")[0] in ("checkpoint", "debug", "eval", "log")),
}
NEEDED = {
    "task": CLASSES,
    "checkpoint.best": {"eval.evaluators": {"own": EVALUATOR}},
    "data.mixture": {"data.source": ""},
    "data.image_embeddings": {"optim.image_lr_multiplier": 0.0},
    "optim.cooldown_steps": {"optim.schedule": "constant"},
    "loss.kind": {"loss.label_smoothing": 0.0},
    "lora.rank": {key: value for key, value in LORA.items() if key != "lora.rank"},
}


@pytest.mark.parametrize("key", sorted(TABLE.keys() - {"mesh.data"}))
def test_run_goes_on_with_another_value_only_of_a_key_that_changes_no_number(lab, key):
    workdir = lab.run({}).workdir
    end = lab.until_program({key: TABLE[key][0][0]} | NEEDED.get(key, {}), workdir)
    if key in FREE:
        assert end.startswith("{"), end  # as far as the mesh
    else:
        assert "but the run in" in end and "another --workdir" in end


def test_equal_configs_show_no_difference(lab):
    left, right = lab.run({}), lab.run({}, repeat=1)
    assert left.workdir != right.workdir
    assert left.batches == right.batches
    assert (left.threads > 1, left.children) == (right.threads > 1, right.children) == (False, 0)
    assert left.evaluations == right.evaluations
    contents = [read_checkpoint(run.workdir, 4) for run in (left, right)]
    assert {n: a.tobytes() for n, a in contents[0].items()} == {
        n: a.tobytes() for n, a in contents[1].items()
    }
    assert program(lab, {}) == lowered(lab.config({}))


def test_state_is_donated_whole(lab):
    one_device = mesh.make_mesh(1, 1, devices=jax.devices()[:1])
    _, _, abstract, _ = train.make_program(lab.config({}), one_device, vocab_size=60)
    donated = program(lab, {}).count("tf.aliasing_output")
    assert donated == len(trees.named_leaves(abstract))
