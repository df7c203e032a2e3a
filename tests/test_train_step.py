"""The sharded train step: the same numbers on every mesh, with everything random switched on."""

import functools
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from align_jax import config, losses, mesh, optim, state, train_step, trees
from align_jax.models import dual_encoder

BATCH, SIZE, LENGTH, VOCAB, STEPS = 32, 64, 10, 60, 5

# Their gradient is zero in exact arithmetic, so they only collect rounding noise. A key bias shifts
# all scores of a softmax row alike. The last BatchNorm bias of a stage's first block (no stochastic
# depth there) reaches nothing but the next block's 1x1 convolution and its BatchNorm, which removes
# it; stage 7 feeds the pooling instead.
ZERO_GRADIENT = (r"/key/bias$", r"stage[1-6]/block0/project_bn/bias$")


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


@functools.cache
def run(data, fsdp, *, changes=(), steps=STEPS):
    """(losses, final state, abstract state) of a run; kept, since compiling takes longest."""
    c = config.default_config()
    c.model.image.variant, c.model.text.variant, c.model.embed_dim = "pico", "tiny", 64
    c.model.dtype, c.model.bn_group_size = "float32", 4
    c.optim.learning_rate, c.optim.warmup_steps = 1e-3, 2
    c.update_from_flattened_dict(dict(changes))
    assert c.model.image.drop_path_rate > 0 and c.model.text.dropout_rate > 0
    if data * fsdp == 1:
        axes = (mesh.DATA, mesh.FSDP)
        m = jax.make_mesh((1, 1), axes, (AxisType.Auto,) * 2, devices=jax.devices()[:1])
    else:
        m = mesh.make_mesh(data, fsdp)
    model = dual_encoder.make_model(c.model, vocab_size=VOCAB, temperature_init=0.1)
    schedule = optim.make_schedule(c.optim, 10)
    optimizer = optim.make_optimizer(c.optim, schedule)
    with mock.patch.object(mesh, "FSDP_MIN_ELEMENTS", 256):  # so that small tensors are split too
        abstract = state.abstract_state(model, optimizer, m)
    loss_fn = losses.make_loss("sharded", m, label_smoothing=0.1)
    step_fn = train_step.compile_train_step(
        train_step.make_train_step(
            model,
            optimizer,
            schedule,
            loss_fn,
            m,
            seed=3,
            bn_decay=0.9,
            mask_duplicates="caption",
        ),
        abstract,
        m,
    )
    s = train_step.init_state(model, optimizer, abstract, seed=0)
    history = []
    for batch in make_batches()[:steps]:
        s, metrics = step_fn(s, mesh.put_batch(batch, mesh.batch_sharding(m)))
        history.append(float(metrics["loss"]))
    assert step_fn._cache_size() == min(1, steps)  # compiled once
    return history, s, abstract


@pytest.fixture(scope="module")
def one_device():
    return run(1, 1)


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_five_steps_on_a_mesh_equal_one_device(one_device, shape):
    losses_one, state_one, _ = one_device
    losses_mesh, state_mesh, _ = run(*shape)
    np.testing.assert_allclose(losses_mesh, losses_one, rtol=1e-5)
    found, expected = (jax.device_get(s) for s in (state_mesh, state_one))
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
    assert len(noisy) == 2 + 6
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


def test_locked_image_tower_does_not_move():
    changes = (("model.bn_mode", "frozen"), ("optim.image_lr_multiplier", 0.0))
    _, before, _ = run(1, 1, changes=changes, steps=0)
    _, after, _ = run(1, 1, changes=changes, steps=3)
    jax.tree.map(np.testing.assert_array_equal, before.params["image"], after.params["image"])
    jax.tree.map(np.testing.assert_array_equal, before.batch_stats, after.batch_stats)
    assert np.abs(before.params["text_projection"]["kernel"]
                  - after.params["text_projection"]["kernel"]).max() > 0  # fmt: skip
