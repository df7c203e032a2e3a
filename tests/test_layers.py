"""Layers against slow, obvious references, in train and eval mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from align_jax import config, mesh
from align_jax.models import dual_encoder, init, layers


def apply_norm(x, *, mode="grouped", group_size=4, train=True, stats=None):
    norm = layers.GroupedBatchNorm(mode, group_size, train)
    channels = x.shape[-1]
    params = {"scale": jnp.linspace(0.5, 1.5, channels), "bias": jnp.linspace(-1, 1, channels)}
    stats = stats or {"mean": jnp.full(channels, 0.3), "var": jnp.full(channels, 2.0)}
    variables = {"params": params, "batch_stats": stats}
    y, updated = norm.apply(variables, x, mutable=["batch_stats"])
    return np.asarray(y), updated["batch_stats"], params


def loop_reference(x, group_size, params):
    """Group by group, channel by channel, in float64."""
    x = np.asarray(x, np.float64)
    y, means, variances = np.empty_like(x), [], []
    for start in range(0, len(x), group_size):
        group = x[start : start + group_size]
        mean, var = group.mean((0, 1, 2)), group.var((0, 1, 2))  # biased
        normalised = (group - mean) / np.sqrt(var + 1e-3)
        y[start : start + group_size] = normalised * params["scale"] + params["bias"]
        means.append(mean)
        variances.append(var)
    return y, np.mean(means, 0), np.mean(variances, 0)


@pytest.mark.parametrize("mode,size", [("grouped", 4), ("grouped", 1), ("global", 8)])
def test_batch_norm_in_train_mode_equals_loop_over_groups(mode, size):
    x = 3 * np.random.default_rng(0).standard_normal((8, 5, 5, 6)).astype(np.float32) + 1
    y, moments, params = apply_norm(x, mode=mode, group_size=size)
    expected, mean, var = loop_reference(x, size, params)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(moments["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(moments["var"], var, rtol=1e-5)


@pytest.mark.parametrize("mode,train", [("grouped", False), ("frozen", True), ("frozen", False)])
def test_batch_norm_with_running_statistics_leaves_them_as_they_are(mode, train):
    x = np.random.default_rng(0).standard_normal((8, 5, 5, 6)).astype(np.float32)
    y, stats, params = apply_norm(x, mode=mode, train=train)
    expected = (x - 0.3) / np.sqrt(2.0 + 1e-3) * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_array_equal(stats["mean"], np.full(6, 0.3, np.float32))


def test_batch_norm_gradient_equals_finite_differences():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, 3, 2)), jnp.float32)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)

    def value(x):
        norm = layers.GroupedBatchNorm("grouped", 2, True)
        params = {"scale": jnp.array([0.5, 1.5]), "bias": jnp.array([-1.0, 1.0])}
        stats = {"mean": jnp.zeros(2), "var": jnp.ones(2)}
        variables = {"params": params, "batch_stats": stats}
        return jnp.sum(norm.apply(variables, x, mutable=["batch_stats"])[0] * weights)

    check_grads(value, (x,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_batch_norm_statistics_stay_float32_under_bfloat16():
    x = jnp.asarray(100 + np.random.default_rng(0).standard_normal((8, 4, 4, 3)), jnp.bfloat16)
    y, moments, _ = apply_norm(x)
    assert y.dtype == jnp.bfloat16 and moments["var"].dtype == jnp.float32
    np.testing.assert_allclose(
        moments["mean"], np.asarray(x, np.float64).mean((0, 1, 2)), rtol=1e-4
    )


def test_batch_norm_groups_do_not_depend_on_the_number_of_devices():
    x = np.random.default_rng(0).standard_normal((16, 3, 3, 4)).astype(np.float32)
    one, moments, _ = apply_norm(x, group_size=4)  # two images a device: groups straddle devices
    m = mesh.make_mesh(8, 1)
    eight = jax.jit(lambda x: layers.GroupedBatchNorm("grouped", 4, True).apply(
        {
            "params": {"scale": jnp.linspace(0.5, 1.5, 4), "bias": jnp.linspace(-1, 1, 4)},
            "batch_stats": {"mean": jnp.zeros(4), "var": jnp.ones(4)},
        },
        x,
        mutable=["batch_stats"],
    ), in_shardings=mesh.batch_sharding(m))(x)  # fmt: skip
    np.testing.assert_allclose(eight[0], one, atol=1e-6)
    np.testing.assert_allclose(eight[1]["batch_stats"]["var"], moments["var"], rtol=1e-6)


def test_batch_norm_group_that_does_not_divide_the_batch_is_an_error():
    with pytest.raises(ValueError, match="bn_group_size=3 does not divide the batch of 8"):
        apply_norm(jnp.ones((8, 2, 2, 2)), group_size=3)


@pytest.mark.parametrize("mode, expected", [("grouped", 1.5), ("global", 1.5), ("frozen", 1.0)])
def test_update_batch_stats_weighs_the_old_value_by_the_decay(mode, expected):
    c = config.default_config()
    c.model.bn_decay, c.model.bn_mode = 0.75, mode
    model = dual_encoder.make_model(c.model, c.loss, vocab_size=9)
    old, moments = {"mean": jnp.ones(2)}, {"mean": jnp.full(2, 3.0)}
    variables = {"params": {"image": {"scale": 1.0}}, "batch_stats": old}
    new = dual_encoder.update_batch_stats(model, variables, moments)
    np.testing.assert_array_equal(new["mean"], np.full(2, expected))


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["hf", "same"])
@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
def test_shifted_depthwise_equals_native_convolution_and_gradients(
    kernel_size, stride, padding, size
):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, *size, 5)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((kernel_size, kernel_size, 1, 5)), jnp.float32)
    pads = layers.conv_padding(padding, kernel_size, stride, size)

    def run(fn):
        y, pull = jax.vjp(lambda x, k: fn(x, k, stride, pads), x, kernel)
        return y, *pull(jnp.cos(y))

    for shifted, native in zip(
        run(layers.depthwise_conv), run(layers.native_depthwise_conv), strict=True
    ):
        np.testing.assert_allclose(shifted, native, atol=2e-5)


def test_depthwise_conv_is_chosen_by_the_platform_it_is_lowered_for():
    args = (
        jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32),
        jax.ShapeDtypeStruct((3, 3, 1, 4), jnp.float32),
    )
    traced = jax.jit(lambda x, k: layers.depthwise_conv(x, k, 1, ((1, 1), (1, 1)))).trace(*args)
    assert "convolution" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "convolution" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize(
    "padding,kernel_size,stride,size,expected",
    [
        ("hf", 3, 2, 289, (0, 1)),  # hf_align_parity 1.4: right and bottom only
        ("hf", 5, 2, 144, (1, 2)),
        ("hf", 5, 1, 36, (2, 2)),
        ("same", 3, 2, 289, (1, 1)),
        ("same", 3, 2, 288, (0, 1)),
        ("same", 5, 2, 37, (2, 2)),
    ],
)
def test_conv_padding_equals_the_reference_graphs(padding, kernel_size, stride, size, expected):
    assert layers.conv_padding(padding, kernel_size, stride, (size, size)) == (expected, expected)


@pytest.mark.parametrize("drop,shape", [(layers.dropout, None), (layers.drop_path, (1, 1))])
def test_dropping_keeps_the_mean_and_draws_by_example(drop, shape):
    keys = dual_encoder.example_keys(0, 0, jnp.arange(2000))
    x = jnp.ones((2000, 4, 5))
    y = np.asarray(drop(x, 0.25, keys))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    # 2000 examples: three standard deviations of the share of kept paths are 0.029.
    assert y.mean() == pytest.approx(1.0, abs=0.04)
    same = (y == y[:, :1, :1]).all((1, 2))
    assert same.mean() == (1.0 if shape else pytest.approx(0.75**20 + 0.25**20, abs=0.01))
    np.testing.assert_array_equal(y[7:9], drop(x[7:9], 0.25, keys[7:9]))
    np.testing.assert_array_equal(drop(x, 0.25, None), x)  # eval mode


def test_draw_of_an_unknown_tensor_is_an_error():
    with pytest.raises(KeyError, match="no rule"):
        init.draw("params/unknown/kernel", (2, 2), 0)


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 4, 5)])
def test_product_of_cpus_equals_float64_in_values_and_gradients(shape):
    rng = np.random.default_rng(0)
    x, kernel, dy = (rng.normal(size=s) for s in (shape, (5, 7), (*shape[:-1], 7)))
    y, pull = jax.vjp(layers.matmul, jnp.float32(x), jnp.float32(kernel))
    rows, drows = x.reshape(-1, 5), dy.reshape(-1, 7)
    found = y, *pull(jnp.float32(dy))
    for array, expected in zip(found, (x @ kernel, dy @ kernel.T, rows.T @ drows), strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5)
    assert layers.dense_product(layers.unconstrained) is None
