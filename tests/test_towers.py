"""Towers: parameter counts, scanned blocks, train and eval mode. Parity: test_hf_parity.py."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AlignConfig

from align_jax import config, trees
from align_jax.models import bert, dual_encoder, efficientnet

# hf_align_parity 6.1 and 6.2, computed there from the published definitions.
TRUNKS = {
    "b0": 3_595_388,
    "b1": 6_101_024,
    "b2": 7_202_562,
    "b3": 10_103_336,
    "b4": 16_742_216,
    "b5": 27_288_112,
    "b6": 39_403_992,
    "b7": 62_143_440,
    "b8": 82_608_046,
    "l2": 467_219_796,
    "femto": 16_020,  # counted by hand, as it is ours
}
ENCODERS = {  # without pooler, 30,522 wordpieces
    "tiny": 4_385_920 - (128 * 128 + 128),
    "mini": 11_104_768,
    "small": 28_500_992,
    "medium": 41_110_528,
    "base": 108_891_648,
    "large": 334_092_288,
}
VOCAB = 50

pytestmark = pytest.mark.usefixtures("quick_compile")


def small_model(**changes):
    base = config.default_config()
    c, base.loss.temperature_init = base.model, 0.5
    c.image.variant, c.text.variant = "femto", "tiny"
    c.embed_dim, c.dtype, c.bn_group_size = 24, "float32", 4
    c.update_from_flattened_dict(changes)
    return dual_encoder.make_model(c, base.loss, vocab_size=VOCAB)


def random_variables(model, seed=0):
    """Fresh weights with BatchNorm statistics that are not the identity."""
    rng = np.random.default_rng(seed)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = dual_encoder.abstract_variables(model)
    shardings = jax.tree.map(lambda _: one, shapes)
    variables = dual_encoder.init_variables(model, seed=seed, shardings=shardings)

    def change(name, leaf):
        if name.endswith("/mean"):
            return jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32)
        if name.endswith("/var") or name.endswith("/scale"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
        if name.endswith("/bias"):
            return jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32)
        return leaf

    return trees.map_named(change, variables)


def make_batch(batch=8, size=64, length=12, seed=1):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, length + 1, batch)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    return {
        "image": rng.integers(0, 256, (batch, size, size, 3), np.uint8),
        "ids": (rng.integers(5, VOCAB, (batch, length)) * mask).astype(np.int32),
        "mask": mask,
        "index": np.arange(batch, dtype=np.int32),
    }


def keys_of(batch, step=0):
    return dual_encoder.example_keys(0, step, batch["index"])


@pytest.mark.parametrize("variant", TRUNKS)
def test_trunk_parameter_count_equals_published_total(variant):
    trunk = efficientnet.EfficientNet(*efficientnet.VARIANTS[variant])
    shapes = jax.eval_shape(lambda: trunk.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), False))
    assert trees.count(shapes["params"]) == TRUNKS[variant]


@pytest.mark.parametrize("variant", ENCODERS)
def test_text_encoder_parameter_count_equals_published_total(variant):
    size = bert.VARIANTS[variant]
    encoder = bert.Bert(30_522, size.num_layers, size.hidden_dim, size.num_heads)
    ids = jnp.zeros((1, 8), jnp.int32)
    shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), ids, ids))
    assert trees.count(shapes["params"]) == ENCODERS[variant]


def test_b7_geometry_equals_align_base():
    trunk = efficientnet.EfficientNet(*efficientnet.VARIANTS["b7"])
    shapes = jax.eval_shape(
        lambda: trunk.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), False)
    )["params"]
    blocks = {f"{s}/{b}" for s in shapes if s.startswith("stage") for b in shapes[s]}
    assert len(blocks) == 55
    assert shapes["stage6"]["block1"]["squeeze"]["reduce"]["kernel"].shape == (2304, 96)
    assert shapes["stage7"]["block3"]["depthwise"]["kernel"].shape == (3, 3, 1, 3840)
    assert efficientnet.output_width("b7") == 640


@pytest.mark.parametrize("scan", [False, True])
def test_initial_values_depend_on_seed_and_name_only(scan):
    pico = {"image.variant": "pico", "embed_dim": 80}  # has kernels that are large enough
    plain = random_variables(small_model(**pico))
    other = random_variables(small_model(**pico, scan_layers=scan), seed=0)
    jax.tree.map(np.testing.assert_array_equal, plain, other)
    kernel = plain["params"]["image"]["stage6"]["block1"]["expand"]["kernel"]
    fan_out = kernel.shape[-1]
    assert np.std(kernel) == pytest.approx(np.sqrt(2 / fan_out), rel=0.05)
    assert abs(kernel).max() <= 2 * np.sqrt(2 / fan_out) / 0.8796 * 1.001
    assert np.std(plain["params"]["text"]["encoder"]["layer0"]["key"]["kernel"]) == pytest.approx(
        0.02, rel=0.05
    )


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_scanned_and_rematerialised_blocks_give_equal_values_and_gradients(train):
    batch = make_batch()
    variables = random_variables(small_model())

    def run(model):
        def loss(params):
            z_image, z_text, temperature, _, stats = dual_encoder.apply_towers(
                model,
                {**variables, "params": params},
                batch,
                train=train,
                keys=keys_of(batch) if train else None,
            )
            return jnp.sum(z_image * z_text) / temperature, stats

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    (value, stats), gradient = run(small_model())
    for changes in (
        {"scan_layers": True},
        {"scan_layers": True, "remat": "block"},
        {"remat": "dots"},
    ):
        (other_value, other_stats), other_gradient = run(small_model(**changes))
        assert float(other_value) == pytest.approx(float(value), rel=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), stats, other_stats)
        atol = 1e-5 * max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
        close = partial(np.testing.assert_allclose, atol=atol)
        jax.tree.map(close, gradient, other_gradient)


def test_train_mode_changes_batch_stats_and_eval_mode_does_not():
    model, batch = small_model(), make_batch()
    variables = random_variables(model)
    towers = jax.jit(partial(dual_encoder.apply_towers, model), static_argnames="train")
    *_, moments = towers(variables, batch, train=True, keys=keys_of(batch))
    *_, unchanged = towers(variables, batch, train=False)
    jax.tree.map(np.testing.assert_array_equal, unchanged, variables["batch_stats"])
    for (name, old), new in zip(
        trees.named_leaves(variables["batch_stats"]), jax.tree.leaves(moments), strict=True
    ):
        assert not np.array_equal(old, new), name


def test_frozen_batch_norm_in_train_mode_equals_eval_mode():
    frozen = small_model(**{"bn_mode": "frozen", "image.drop_path_rate": 0.0})
    batch, variables = make_batch(), random_variables(small_model())
    towers = jax.jit(partial(dual_encoder.apply_towers, frozen), static_argnames="train")
    z_train, *_, stats = towers(variables, batch, train=True, keys=keys_of(batch))
    z_eval, *_ = towers(variables, batch, train=False)
    np.testing.assert_array_equal(z_train, z_eval)
    jax.tree.map(np.testing.assert_array_equal, stats, variables["batch_stats"])


def test_randomness_follows_the_example_not_its_place_in_the_batch():
    # One BatchNorm group an image, so that examples do not see each other.
    model = small_model(bn_group_size=1)
    variables, batch = random_variables(model), make_batch()
    order = np.random.default_rng(0).permutation(8)
    shuffled = {name: value[order] for name, value in batch.items()}

    @jax.jit
    def apply(b, keys):
        return dual_encoder.apply_towers(model, variables, b, train=True, keys=keys)

    def towers(b, step=0):
        return apply(b, keys_of(b, step))

    z_image, z_text, *_ = towers(batch)
    z_image_shuffled, z_text_shuffled, *_ = towers(shuffled)
    np.testing.assert_allclose(z_image[order], z_image_shuffled, atol=2e-6)
    np.testing.assert_allclose(z_text[order], z_text_shuffled, atol=2e-6)
    _, z_text_next, *_ = towers(batch, step=1)
    assert np.abs(z_text - z_text_next).max() > 1e-3


def test_epsilons_are_those_of_the_published_model():
    theirs = AlignConfig()
    assert small_model().text.norm_eps == theirs.text_config.layer_norm_eps == 1e-12
    assert small_model().image.bn_eps == theirs.vision_config.batch_norm_eps == 1e-3


def test_image_projection_exists_only_where_widths_differ():
    assert "image_projection" not in dual_encoder.abstract_variables(small_model())["params"]
    other = dual_encoder.abstract_variables(small_model(embed_dim=32))["params"]
    assert other["image_projection"]["kernel"].shape == (24, 32)


def test_padding_modes_differ_only_on_odd_inputs():
    variables = random_variables(small_model())

    def features(padding, size):
        embed = jax.jit(partial(dual_encoder.embed_image, small_model(padding=padding)))
        return embed(variables, make_batch(2, size)["image"])

    np.testing.assert_array_equal(features("hf", 64), features("same", 64))
    assert np.abs(features("hf", 65) - features("same", 65)).max() > 1e-3


def test_too_many_tokens_is_an_error_naming_both_limits():
    model = small_model(**{"text.max_positions": 8})
    towers = partial(dual_encoder.apply_towers, model, train=False)
    with pytest.raises(ValueError, match="12 exceeds the 8 positions"):
        jax.eval_shape(towers, dual_encoder.abstract_variables(model), make_batch())
