"""Optimizers against a float64 loop written from the LAMB paper; masks, temperature, freezing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from align_jax import config, config_checks, optim, trees
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


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # 100 steps: warm-up of 20 to 1.0, last 30 down to 0.1. By hand.
        ({"schedule": "constant"}, {10: 0.5, 20: 1.0, 70: 1.0, 85: 0.55, 100: 0.1}),
        ({"schedule": "rsqrt"}, {10: 0.5, 20: 1.0, 45: 2 / 3, 70: (2 / 7) ** 0.5, 100: 0.1}),
        ({"schedule": "rsqrt", "cooldown_steps": 0}, {20: 1.0, 80: 0.5, 100: 0.2**0.5}),
        ({"schedule": "linear", "cooldown_steps": 0}, {20: 1.0, 60: 0.55, 100: 0.1}),
        ({"schedule": "cosine", "cooldown_steps": 0}, {20: 1.0, 60: 0.55, 100: 0.1}),
        ({"schedule": "constant", "warmup_steps": 0}, {0: 1.0, 70: 1.0, 85: 0.55}),
    ],
)
def test_schedules_by_hand(changes, expected):
    c = settings(warmup_steps=20, learning_rate=1.0, cooldown_steps=30, min_learning_rate=0.1)
    c.update(changes)
    schedule = optim.make_schedule(c, 100)
    for step, rate in expected.items():
        assert float(schedule(jnp.int32(step))) == pytest.approx(rate, rel=1e-5), step


def test_rate_of_a_parameter_is_by_layer_and_by_the_first_rule_that_is_found():
    params = {
        "image": {"stem_conv": {"kernel": 1}, "stage7": {"block0": {"kernel": 1}}},
        "image_projection": {"kernel": 1},
        "text": {
            "position_embeddings": 1,
            "encoder": {f"layer{i}": {"query": {"kernel": 1}} for i in range(12)},
        },
        "text_projection": {"bias": 1},
        "temperature": 1,
    }
    params = jax.tree.map(lambda _: jnp.ones((2, 2)), params)
    c = settings(name="adamw", weight_decay=0.0, warmup_steps=0, eps=1.0, temperature="same")

    def updates(**changes):
        c.update(changes)
        optimizer = optim.make_optimizer(c, optim.make_schedule(c, 10))
        found, _ = optimizer.update(params, optimizer.init(params), params)
        return {name: float(leaf[0, 0]) for name, leaf in trees.named_leaves(found)}

    plain = updates()
    scaled = updates(layer_decay=0.5, lr_rules=(("layer11/", 3.0), ("^text/", 5.0)))
    # By hand: layers below the projection of the tower.
    expected = {
        "image/stem_conv/kernel": 0.5**8,
        "image/stage7/block0/kernel": 0.5,
        "image_projection/kernel": 1.0,
        "text/position_embeddings": 5.0 * 0.5**13,
        "text/encoder/layer0/query/kernel": 5.0 * 0.5**12,
        "text/encoder/layer11/query/kernel": 3.0 * 0.5,
        "text_projection/bias": 1.0,
        "temperature": 1.0,
    }
    for name, factor in expected.items():
        assert scaled[name] == pytest.approx(factor * plain[name], rel=1e-6), name


def test_adafactor_by_hand():
    # Three gradients of a 128 x 128 matrix (factored) and of a vector (not), in float64.
    rng = np.random.default_rng(0)
    params = {"text": {"kernel": np.ones((128, 128), "f"), "bias": np.ones(7, "f")}}
    c = settings(name="adafactor", weight_decay=0.0, warmup_steps=0, b1=0.9, learning_rate=1.0)
    optimizer = optim.make_optimizer(c, optax.constant_schedule(1.0))
    state, rows, columns, whole = optimizer.init(params), 0.0, 0.0, 0.0
    momentum = {"kernel": 0.0, "bias": 0.0}
    sizes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert (128,) in sizes and len([s for s in sizes if s == (128, 128)]) == 1
    for step in range(1, 4):
        g = {"kernel": rng.standard_normal((128, 128)), "bias": rng.standard_normal(7)}
        found, state = optimizer.update(
            {"text": {n: jnp.asarray(v, jnp.float32) for n, v in g.items()}}, state, params
        )
        old = 1 - step**-0.8
        square = g["kernel"] ** 2 + 1e-30
        rows = old * rows + (1 - old) * square.mean(1)
        columns = old * columns + (1 - old) * square.mean(0)
        whole = old * whole + (1 - old) * (g["bias"] ** 2 + 1e-30)
        moment = np.outer(rows / rows.mean(), columns)
        for name, v in (("kernel", moment), ("bias", whole)):
            u = g[name] / np.sqrt(v)
            u /= max(1.0, np.sqrt((u**2).mean()))
            momentum[name] = 0.9 * momentum[name] + 0.1 * u
            np.testing.assert_allclose(found["text"][name], -momentum[name], rtol=1e-4, atol=1e-6)


def test_muon_orthogonalises_matrices_of_towers_alone():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (8, 4), "embedding": (8, 4), "bias": (4,)}
    g = {"text": {"layer": {n: rng.standard_normal(s).astype("f") for n, s in shapes.items()}}}
    c = settings(name="muon", weight_decay=0.0, learning_rate=1.0, eps=1e-8)
    optimizer = optim.make_optimizer(c, optax.constant_schedule(1.0))
    found = optimizer.update(g, optimizer.init(g), g)[0]["text"]["layer"]
    # The first momentum is the gradient times a number: U V^T of its SVD, to the width of the five
    # Newton-Schulz steps, whose singular values lie in about [0.7, 1.2].
    u, _, vt = np.linalg.svd(g["text"]["layer"]["kernel"], full_matrices=False)
    values = -np.diag(u.T @ found["kernel"] @ vt.T) / (0.2 * np.sqrt(8))
    assert (0.6 < values).all() and (values < 1.3).all()
    off = u.T @ found["kernel"] @ vt.T + np.diag(values) * 0.2 * np.sqrt(8)
    assert np.abs(off).max() < 1e-3
    for name in ("embedding", "bias"):  # Adam's first step is the sign
        np.testing.assert_allclose(found[name], -np.sign(g["text"]["layer"][name]), rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cooldown_steps": 10}, "cooldown_steps=10 is of the schedules"),
        ({"cooldown_steps": 999, "schedule": "rsqrt"}, "cooldown_steps=999 leaves nothing"),
        ({"min_learning_rate": 1.0}, "min_learning_rate=1.0 is above"),
        ({"min_learning_rate": 0.01, "schedule": "constant"}, "needs config.optim.cooldown_steps"),
        ({"lr_rules": (("a", 0.0),)}, "multiplier above 0.*config.optim.freeze"),
        ({"lr_rules": ("a",)}, r"holds 'a', not \(regex"),
        ({"lr_rules": (("(", 1.0),)}, "no regular expression"),
        ({"lr_rules": (("txet", 0.5),)}, "config.optim.lr_rules: 'txet' is in the name of none"),
        ({"layer_decay": 0.0}, "layer_decay=0.0 must be positive"),
    ],
)
def test_rates_that_cannot_work_are_one_line(changes, message):
    c = config.default_config()
    c.data.source, c.train.steps = "scenes?size=9", 1000
    c.optim = settings(**changes)
    with pytest.raises(ValueError, match=message):
        config_checks.validate(c, num_devices=1)
