"""Frozen parameters cost nothing: no gradient, no optimizer state, no randomness, no memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import config, config_checks, losses, mesh, optim, train, train_step, trees
from align_jax.models import dual_encoder, freeze

BATCH, SIZE, LENGTH, VOCAB = 16, 32, 8, 60


def make_config(**changes):
    c = config.default_config()
    c.model.image.variant, c.model.text.variant, c.model.embed_dim = "femto", "tiny", 32
    c.model.dtype, c.model.bn_group_size = "float32", 4
    c.optim.name, c.optim.temperature, c.optim.warmup_steps = "adamw", "log", 1
    c.optim.clip_norm, c.loss.temperature_init, c.train.steps = 1e-3, 0.1, 10
    c.data.source, c.data.image_size, c.train.batch_size = "scenes?size=9&seed=1", SIZE, BATCH
    c.update_from_flattened_dict(changes)
    return c


def make_batch(seed, batch=BATCH, size=SIZE):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (batch, size, size, 3), np.uint8),
        "ids": rng.integers(5, VOCAB, (batch, LENGTH)).astype(np.int32),
        "mask": np.ones((batch, LENGTH), np.int32),
        "index": rng.permutation(1000)[:batch].astype(np.int32),
    }


pytestmark = pytest.mark.usefixtures("quick_compile", "quick_depthwise")
ONE = functools.partial(mesh.make_mesh, 1, 1)
LOCKED = {"optim.image_lr_multiplier": 0.0}


@pytest.fixture(scope="module")
def locked():
    """(model, states before each of three steps and after, metrics) with a locked image tower."""
    m = ONE(devices=jax.devices()[:1])
    model, optimizer, abstract, step_fn = train.make_program(
        make_config(**LOCKED), m, vocab_size=VOCAB
    )
    state = train_step.init_state(model, optimizer, abstract, seed=0)
    states, metrics = [jax.device_get(state)], []
    for step in range(3):
        state, found = step_fn(state, mesh.put_batch(make_batch(step), mesh.batch_sharding(m)))
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(found))
    return model, states, metrics


def test_locked_tower_does_not_move_and_has_no_optimizer_state(locked):
    _, states, _ = locked
    first, last = states[0], states[-1]
    after = dict(trees.named_leaves(last.params))
    for name, value in trees.named_leaves(first.params):
        is_image = name.startswith(("image/", "image_projection/"))
        if is_image or not name.endswith(("key/bias", "embeddings/embedding")):
            assert (value.tobytes() == after[name].tobytes()) == is_image, name
    # BatchNorm is 'grouped' by the config: a locked tower has its running statistics all the same.
    jax.tree.map(np.testing.assert_array_equal, first.batch_stats, last.batch_stats)
    learned = sum(n for n in map(np.size, jax.tree.leaves(
        {k: v for k, v in first.params.items() if not k.startswith("image")})))  # fmt: skip
    moments = sum(np.size(leaf) for leaf in jax.tree.leaves(last.opt_state) if np.ndim(leaf))
    assert moments == 2 * (learned - 1)  # but those of the temperature, which are scalars


def test_gradient_norm_is_that_of_what_learns(locked):
    _, states, metrics = locked
    # Another way: a model with nothing frozen, its image tower called in eval mode.
    model = dual_encoder.make_model(make_config().model, make_config().loss, vocab_size=VOCAB)
    variables, batch = states[1].variables(), make_batch(1)
    keys = dual_encoder.example_keys(0, jnp.int32(1), batch["index"])

    def loss(text_side):
        v = variables | {"params": variables["params"] | text_side}
        z_image = dual_encoder.embed_image(model, v, batch["image"])
        _, z_text, t, *_ = dual_encoder.apply_towers(model, v, batch, train=True, keys=keys)
        return losses.dense_loss(z_image, z_text, t, label_smoothing=0.1)[0]

    text_side = {n: tree for n, tree in variables["params"].items() if not n.startswith("image")}
    value, gradients = jax.jit(jax.value_and_grad(loss))(text_side)
    assert metrics[1]["loss"] == pytest.approx(float(value), rel=1e-5)
    squares = sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradients))
    assert metrics[1]["grad_norm"] == pytest.approx(np.sqrt(squares), rel=1e-4)


def test_embeddings_of_a_locked_tower_are_bitwise_equal_in_every_step(locked):
    model, states, _ = locked

    @jax.jit
    def encode(variables, step):
        batch = make_batch(7)
        keys = dual_encoder.example_keys(0, step, batch["index"])
        return dual_encoder.apply_towers(model, variables, batch, train=True, keys=keys)[:2]

    found = [encode(s.variables(), s.step) for s in states]
    assert model.image.drop_path_rate > 0  # of the parts of the tower that would drop out
    for z_image, z_text in found[1:]:
        np.testing.assert_array_equal(z_image, found[0][0])
        assert (z_text != found[0][1]).any()


def test_cached_embeddings_give_the_losses_of_the_tower(locked):
    model, states, metrics = locked
    m = ONE(devices=jax.devices()[:1])
    _, _, _, step_fn = train.make_program(make_config(**LOCKED), m, vocab_size=VOCAB)
    state = jax.device_put(states[0])
    for step in range(3):
        batch = make_batch(step)
        z = jax.jit(functools.partial(dual_encoder.embed_image, model))(
            states[0].variables(), batch.pop("image")
        )
        batch["z_image"] = np.asarray(z)
        state, found = step_fn(state, mesh.put_batch(batch, mesh.batch_sharding(m)))
        assert found["loss"] == pytest.approx(metrics[step]["loss"], rel=1e-5)
    for name, value in trees.named_leaves(states[3].params["text_projection"]):
        got = dict(trees.named_leaves(state.params["text_projection"]))[name]
        np.testing.assert_allclose(got, value, rtol=1e-3, atol=1e-5)


def test_clipping_takes_the_norm_of_what_learns():
    c = make_config(**LOCKED, **{"optim.eps": 1.0, "optim.weight_decay": 0.0}).optim
    c.warmup_steps, c.clip_norm, c.learning_rate = 0, 0.5, 1.0
    params = {"image": {"a": np.ones(3, "f")}, "text": {"b": np.ones(4, "f")}}
    gradients = {"image": {"a": np.full(3, 100.0, "f")}, "text": {"b": np.full(4, 0.2, "f")}}
    split = functools.partial(freeze.learned, freeze.make_frozen(c), None)
    optimizer = optim.make_optimizer(c, optim.make_schedule(c, 10))
    updates, _ = optimizer.update(split(gradients), optimizer.init(split(params)), split(params))
    # The norm, 0.4, is not clipped; the first update of Adam is g / (|g| + eps).
    np.testing.assert_allclose(updates["text"]["b"], -0.2 / 1.2, rtol=1e-5)


def test_freeze_names_parts_by_regex_of_adapters_too():
    params = {
        "image": {"stem": {"kernel": 1}, "stage1": {"kernel": 2}},
        "text": {"query": {"kernel": 3}},
        "temperature": 4,
    }
    assert freeze.learned(("^image/stem", "query"), None, params) == {
        "image": {"stage1": {"kernel": 2}},
        "temperature": 4,
    }
    assert freeze.learned((), None, params) == params
    adapted = params | {"lora": {"image": {"stem": {"a": 5}}, "text": {"query": {"a": 6}}}}
    c = make_config(**LOCKED).optim
    some = freeze.make_frozen(c)
    assert freeze.learned(some, object(), adapted) == {"lora": {"text": {"query": {"a": 6}}}}
    new = trees.updated(params, {"text": {"query": {"kernel": 7}}})
    assert new["text"] == {"query": {"kernel": 7}} and new["image"] == params["image"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.freeze": ("imgae",)}, r"config.optim.freeze: 'imgae' is in the name of none of"),
        ({"optim.freeze": ("(",)}, r"config.optim.freeze holds '\(', no regular expression"),
        ({"optim.freeze": (".",)}, "nothing is left to learn"),
        ({"data.image_embeddings": "z"}, "projection that do not learn, but image"),
        ({"data.image_embeddings": "z", "optim.freeze": ("^image/",)}, "but image_projection does"),
    ],
)
def test_freezing_nothing_or_all_is_one_line_before_anything_compiles(changes, message):
    with pytest.raises(ValueError, match=message):
        config_checks.validate(make_config(**changes), num_devices=1)


@pytest.mark.slow
def test_locked_tower_needs_at_most_15_percent_of_the_temporaries(monkeypatch):
    # As accelerators compile it. In chunks, as CPUs do, all takes 138 MiB, not 272; locked 27.
    monkeypatch.setattr(mesh.Rows, "on_cpu", False)
    m, sizes = ONE(devices=jax.devices()[:1]), {}
    batch = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype)
        for name, value in make_batch(0, batch=64, size=64).items()
    }
    for name, changes in (("all", {}), ("locked", LOCKED)):
        c = make_config(**changes, **{"model.image.variant": "nano"})
        _, _, abstract, step_fn = train.make_program(c, m, vocab_size=VOCAB)
        analysis = step_fn.lower(abstract, batch).compile().memory_analysis()
        sizes[name] = analysis.temp_size_in_bytes / 2**20
    print(sizes)
    assert sizes["locked"] <= 0.15 * sizes["all"], sizes
