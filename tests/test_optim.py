"""Optimizers against a float64 loop written from the LAMB paper; masks, temperature, freezing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from align_jax import config, optim
from align_jax.models import freeze

PARAMS = {
    "image": {
        "stem_conv": {"kernel": np.linspace(-1, 2, 12).reshape(3, 4)},
        "stem_bn": {"scale": np.linspace(0.5, 1.5, 4), "bias": np.zeros(4)},
    },
    "image_projection": {"kernel": np.linspace(-2, 1, 8).reshape(4, 2)},
    "text": {"encoder": {"layer0": {"query": {"bias": np.linspace(0.1, 0.3, 4)}}}},
    "temperature": np.array(0.5),
}


def gradients(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: rng.standard_normal(np.shape(p)), PARAMS)


def settings(**changes):
    c = config.default_config().optim
    c.update({"learning_rate": 0.1, "warmup_steps": 2, "weight_decay": 0.01} | changes)
    return c


def run(c, steps=4):
    """(parameters before each step and at the end, optimizer state), of those that learn."""
    optimizer = optim.make_optimizer(c, optim.make_schedule(c, 10))
    learned = freeze.learned(freeze.make_frozen(c), None, PARAMS)
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), learned)
    state = optimizer.init(params)
    history = [params]
    for step in range(steps):
        g = freeze.learned(freeze.make_frozen(c), None, gradients(step))
        g = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), g)
        updates, state = optimizer.update(g, state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history, state


def lamb_reference(leaf_name, p, c, steps=4):
    """You et al. 2020, algorithm 2, with bias correction and COYO's exclusion of BatchNorm."""
    m = v = np.zeros_like(p)
    excluded = "_bn/" in leaf_name
    for step in range(steps):
        g = leaf(gradients(step), leaf_name)
        m = c.b1 * m + (1 - c.b1) * g
        v = c.b2 * v + (1 - c.b2) * g * g
        u = m / (1 - c.b1 ** (step + 1)) / (np.sqrt(v / (1 - c.b2 ** (step + 1))) + c.eps)
        if not excluded:
            u = u + c.weight_decay * p
            norms = np.linalg.norm(p), np.linalg.norm(u)
            u = u * (norms[0] / norms[1] if min(norms) > 0 else 1.0)
        rate = 0.1 * step / 2 if step < 2 else 0.1 * (1 - (step - 2) / 8)
        p = p - rate * u
    return p


def leaf(tree, name):
    for part in name.split("/"):
        tree = tree[part]
    return tree


NAMES = [
    "image/stem_conv/kernel",
    "image/stem_bn/scale",
    "image/stem_bn/bias",
    "image_projection/kernel",
    "text/encoder/layer0/query/bias",
    "temperature",
]


@pytest.mark.parametrize("name", NAMES)
def test_lamb_equals_the_reference_loop(name):
    c = settings()
    history, _ = run(c)
    expected = lamb_reference(name, leaf(PARAMS, name), c)
    np.testing.assert_allclose(leaf(history[-1], name), expected, rtol=2e-5, atol=1e-6)


def test_first_update_has_rate_zero_and_temperature_moves_by_exactly_the_rate():
    history, _ = run(settings(weight_decay=0.0), steps=3)
    np.testing.assert_array_equal(history[1]["temperature"], history[0]["temperature"])
    for step, rate in ((1, 0.05), (2, 0.1)):
        ratio = float(history[step + 1]["temperature"] / history[step]["temperature"])
        assert min(abs(ratio - (1 - rate)), abs(ratio - (1 + rate))) < 1e-5


def test_log_temperature_stays_positive_and_equals_adam_on_the_logarithm():
    c = settings(name="adamw", temperature="log", learning_rate=2.0, warmup_steps=0)
    history, _ = run(c)
    log_t, m, v = np.log(0.5), 0.0, 0.0
    for step in range(4):
        g = gradients(step)["temperature"] * np.exp(log_t)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        u = m / (1 - 0.9 ** (step + 1)) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + c.eps)
        log_t -= 2.0 * (1 - step / 10) * u
    assert float(history[-1]["temperature"]) > 0
    assert float(history[-1]["temperature"]) == pytest.approx(np.exp(log_t), rel=1e-4)


def test_fixed_temperature_and_frozen_tower_do_not_learn_and_keep_no_moments():
    history, state = run(settings(temperature="fixed", image_lr_multiplier=0.0))
    assert history[0].keys() == history[-1].keys() == {"text"}
    assert np.abs(history[0]["text"]["encoder"]["layer0"]["query"]["bias"] -
                  history[-1]["text"]["encoder"]["layer0"]["query"]["bias"]).max() > 0  # fmt: skip
    sizes = {np.shape(x) for x in jax.tree.leaves(state)}
    assert (3, 4) not in sizes and (4, 2) not in sizes


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_tower_multiplier_scales_the_update(name):
    full, _ = run(settings(name=name), steps=2)
    half, _ = run(settings(name=name, text_lr_multiplier=0.5), steps=2)
    path = "text/encoder/layer0/query/bias"
    start = leaf(PARAMS, path)
    np.testing.assert_allclose(
        leaf(half[-1], path) - start, 0.5 * (leaf(full[-1], path) - start), rtol=1e-3
    )


def test_weight_decay_spares_the_names_of_no_decay():
    zero = jax.tree.map(np.zeros_like, PARAMS)
    c = settings(name="adamw", weight_decay=0.5, warmup_steps=0)
    optimizer = optim.make_optimizer(c, optim.make_schedule(c, 10))
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), PARAMS)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["image"]["stem_bn"]["scale"], np.zeros(4))
    np.testing.assert_allclose(
        updates["image"]["stem_conv"]["kernel"],
        -0.05 * params["image"]["stem_conv"]["kernel"],
        rtol=1e-6,
    )


@pytest.mark.parametrize("kind,middle", [("linear", 0.5), ("cosine", 0.5)])
def test_schedule_warms_up_from_zero_and_ends_at_zero(kind, middle):
    schedule = optim.make_schedule(settings(schedule=kind, warmup_steps=20, learning_rate=1.0), 100)
    assert float(schedule(0)) == 0.0
    assert float(schedule(10)) == pytest.approx(0.5)
    assert float(schedule(20)) == pytest.approx(1.0)
    assert float(schedule(60)) == pytest.approx(middle, abs=1e-6)
    assert float(schedule(100)) == pytest.approx(0.0, abs=1e-6)


def test_clip_norm_bounds_the_gradient_the_optimizer_sees():
    c = settings(name="adamw", clip_norm=1e-3, eps=1.0, weight_decay=0.0, warmup_steps=0)
    history, _ = run(c, steps=1)
    moved = jax.tree.map(lambda a, b: np.sum(np.square(a - b)), history[0], history[1])
    # eps 1 makes Adam's update about m / 1, whose norm is the clipped gradient's.
    assert np.sqrt(sum(jax.tree.leaves(moved))) <= 0.1 * 1e-3 * 1.001


@pytest.mark.parametrize("name", ["lamb", "adamw", "lion"])
def test_bfloat16_momentum_is_stored_so_and_changes_little(name):
    full, _ = run(settings(name=name))
    half, state = run(settings(name=name, momentum_dtype="bfloat16"))
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert any(leaf.dtype == jnp.bfloat16 for leaf in moments)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half[-1]))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(full[-1]), jax.tree.leaves(half[-1]), strict=True
    ):
        # bfloat16 keeps 8 bits; lion only takes signs, which this rounding does not turn over.
        moved = np.abs(a - initial_value(path)).max()
        np.testing.assert_allclose(b, a, atol=0.02 * moved + 1e-7)


def initial_value(path):
    node = PARAMS
    for key in path:
        node = node[key.key]
    return np.asarray(node, np.float32)
