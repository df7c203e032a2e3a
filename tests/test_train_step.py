"""The train step: the same numbers on every mesh and in any number of microbatches."""

import dataclasses
import functools
from unittest import mock

import jax
import numpy as np
import pytest
from helpers import has_compiler

from align_jax import config, mesh, train, train_step, trees

BATCH, SIZE, LENGTH, VOCAB, STEPS = 64, 32, 10, 60, 5

# As the loss, to be the same numbers everywhere.
WATCHED = (
    "loss",
    *(f"logit_max/{kind}" for kind in ("positive", "negative")),
    *(f"embedding_norm{of}/{tower}" for of in ("", "_max") for tower in ("image", "text")),
)

# Their gradient is zero in exact arithmetic, so they only collect rounding noise. A key bias shifts
# all scores of a softmax row alike. The last BatchNorm bias of a stage's first block (no stochastic
# depth there) reaches nothing but the next block's 1x1 convolution and its BatchNorm, which removes
# it; the last stage feeds the pooling instead.
ZERO_GRADIENT = (r"/key/bias$", r"stage[12]/block0/project_bn/bias$")


pytestmark = pytest.mark.usefixtures("quick_compile")
slow = pytest.mark.slow


def make_batches():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**32, (STEPS, BATCH, 2), np.uint32)
    hashes[:, 20] = hashes[:, 2]  # a false negative on another device
    return [
        {
            "image": rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8),
            "ids": rng.integers(5, VOCAB, (BATCH, LENGTH)).astype(np.int32),
            "mask": (np.arange(LENGTH) < rng.integers(3, LENGTH, (BATCH, 1))).astype(np.int32),
            "index": rng.permutation(1000)[:BATCH].astype(np.int32),
            "caption_hash": hashes[step],
        }
        for step in range(STEPS)
    ]


def make_program(mesh_, changes=()):
    """What `train.make_program` gives for the smallest model with everything random switched on."""
    c = config.default_config()
    c.model.image.variant, c.model.text.variant, c.model.embed_dim = "femto", "tiny", 64
    c.model.dtype, c.model.bn_group_size, c.model.bn_decay = "float32", 4, 0.9
    c.optim.learning_rate, c.optim.warmup_steps, c.train.steps = 1e-3, 2, 10
    c.loss.temperature_init, c.loss.mask_duplicates = 0.1, "caption"
    c.update_from_flattened_dict(dict(changes))
    assert c.model.image.drop_path_rate > 0 and c.model.text.dropout_rate > 0
    return train.make_program(c, mesh_, vocab_size=VOCAB)


def mesh_of(data, fsdp):
    if data * fsdp > 1:
        return mesh.make_mesh(data, fsdp)
    return mesh.make_mesh(1, 1, devices=jax.devices()[:1])


@functools.cache
def run(data, fsdp, *, changes=(), steps=STEPS):
    """(what is watched of each step, final state, abstract state) of a run; kept.

    Compiling takes longest.
    """
    m = mesh_of(data, fsdp)
    with mock.patch.object(mesh, "FSDP_MIN_ELEMENTS", 256):  # so that small tensors are split too
        model, optimizer, abstract, step_fn = make_program(m, changes)
    s = train_step.init_state(model, optimizer, abstract, seed=0)
    history = []
    for batch in make_batches()[:steps]:
        s, metrics = step_fn(s, mesh.put_batch(batch, mesh.batch_sharding(m)))
        history.append([float(metrics[name]) for name in WATCHED])
    assert step_fn._cache_size() == min(1, steps)  # compiled once
    return history, s, abstract


@pytest.fixture(scope="module")
def one_device():
    return run(1, 1)


@pytest.mark.parametrize(
    "shape", [(2, 4), *(pytest.param(shape, marks=slow) for shape in [(8, 1), (4, 2), (1, 8)])]
)
def test_five_steps_on_a_mesh_equal_one_device(one_device, shape):
    assert_same_run(run(*shape), one_device)


@slow
def test_five_steps_with_the_ring_equal_one_device(one_device):
    changes = (("loss.form", "ring"), ("loss.tile_size", 3))  # of 8 pairs a device
    assert_same_run(run(4, 2, changes=changes), one_device)


@slow
def test_sigmoid_loss_with_the_ring_equals_one_device_and_moves_its_bias():
    sigmoid = (("loss.kind", "sigmoid"), ("loss.label_smoothing", 0.0))
    ring = run(8, 1, changes=sigmoid + (("loss.form", "ring"), ("loss.tile_size", 3)))
    assert_same_run(ring, run(1, 1, changes=sigmoid))
    assert -10.1 < float(ring[1].params["bias"]) < -9.9
    assert float(ring[1].params["bias"]) != -10.0


@pytest.mark.parametrize(
    "shape, microbatches",
    [
        pytest.param(shape, parts, marks=() if (shape, parts) == ((4, 2), 8) else slow)
        for shape in [(1, 1), (8, 1), (4, 2)]
        for parts in (2, 4, 8)
    ],
)
def test_five_steps_in_microbatches_equal_one_pass(one_device, shape, microbatches):
    changes = (("train.microbatches", microbatches),)
    assert_same_run(run(*shape, changes=changes), one_device)


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("shape", [(4, 2), pytest.param((1, 1), marks=slow)])
def test_five_steps_with_native_kernels_equal_those_without(one_device, shape):
    assert_same_run(run(*shape, changes=(("train.native_kernels", True),)), one_device)


@pytest.mark.parametrize(
    "shape, scan",
    [
        ((4, 2), True),
        pytest.param((1, 1), True, marks=slow),
        pytest.param((8, 1), False, marks=slow),
    ],
)
def test_five_steps_of_blocks_in_groups_equal_one_pass(one_device, shape, scan):
    changes = (("model.remat", "block"), ("model.scan_layers", scan))
    assert_same_run(run(*shape, changes=changes), one_device)


@slow
def test_eight_microbatches_need_at_most_two_fifths_of_the_memory():
    m, size = mesh_of(1, 1), 256
    temporaries = {}
    for parts in (1, 8):
        changes = (("train.microbatches", parts), ("model.image.variant", "pico"))
        _, _, abstract, step_fn = make_program(m, changes)
        batch = {
            name: jax.ShapeDtypeStruct((size, *value.shape[1:]), value.dtype)
            for name, value in make_batches()[0].items()
        }
        lowered = step_fn.lower(abstract, batch)
        analysis = lowered.compile({"xla_backend_optimization_level": 3}).memory_analysis()
        temporaries[parts] = analysis.temp_size_in_bytes
    assert temporaries[8] <= 0.4 * temporaries[1], temporaries


@slow
def test_averages_on_a_mesh_equal_those_of_one_device_and_leave_the_run_as_it_is(one_device):
    changes = (("train.ema_decay", 0.15),)
    on_mesh, alone = run(2, 4, changes=changes), run(1, 1, changes=changes)
    assert_same_run(on_mesh, one_device)
    served = [
        (losses, dataclasses.replace(s, **s.served()), abstract)
        for losses, s, abstract in (on_mesh, alone)
    ]
    assert_same_run(*served)


@slow
def test_fused_blocks_on_a_mesh_equal_one_device():
    changes = (("model.image.variant", "fused-nano"),)
    assert_same_run(run(8, 1, changes=changes), run(1, 1, changes=changes))


def assert_same_run(found, expected):
    """What is watched to 1e-5, parameters and BatchNorm statistics to 1e-4 of a tensor's norm."""
    (losses_found, state_found, _), (losses_expected, state_expected, _) = found, expected
    np.testing.assert_allclose(losses_found, losses_expected, rtol=1e-5)
    found, expected = (jax.device_get(s) for s in (state_found, state_expected))
    for (name, value), want in zip(
        trees.named_leaves(found.params), jax.tree.leaves(expected.params), strict=True
    ):
        if not trees.match_any(ZERO_GRADIENT, name):
            assert np.linalg.norm(value - want) <= 1e-4 * np.linalg.norm(want), name
    deviations = {n: np.sqrt(np.maximum(v, 0)) for n, v in trees.named_leaves(expected.batch_stats)}
    for (name, value), want in zip(
        trees.named_leaves(found.batch_stats), jax.tree.leaves(expected.batch_stats), strict=True
    ):
        # A mean that is zero but for the noise of those biases has no norm to compare with: the
        # deviation of the same channels sets the scale.
        scale = deviations[name.replace("/mean", "/var")] if name.endswith("/mean") else want
        assert np.linalg.norm(value - want) <= 1e-4 * np.linalg.norm(scale), name


def test_parameters_called_zero_gradient_really_are(one_device):
    _, s, _ = one_device
    moments = {
        name: np.asarray(leaf)
        for name, leaf in trees.named_leaves(s.opt_state)
        if "/nu/" in name or "/nu" in name.split("params")[0]
    }
    noisy = [n for n in moments if trees.match_any(ZERO_GRADIENT, n)]
    assert len(noisy) == 2 + 2
    typical = np.median([np.sqrt(v.mean()) for v in moments.values()])
    for name in noisy:
        assert np.sqrt(moments[name].mean()) < 1e-4 * typical, name


def test_state_is_born_sharded_and_stays_so():
    _, s, abstract = run(2, 4)
    kernels = 0
    for leaf, want in zip(jax.tree.leaves(s), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
        kernels += not want.sharding.is_fully_replicated
    assert kernels > 50  # parameters and both moments
