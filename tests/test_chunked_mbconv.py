"""Blocks that train on a few images at a time, against the formula in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import mesh
from align_jax.models import chunked_mbconv, efficientnet, layers

ONE_DEVICE = mesh.Rows(mesh.make_mesh(1, 1, devices=jax.devices()[:1]))
SETTINGS = efficientnet.Settings(
    "hf", "swish", 0.25, "grouped", 4, 1e-3, jnp.float32, True, ONE_DEVICE
)
STAGE = efficientnet.StageSpec(3, 2, 8, 12, 6, 2)
CASES = {  # images, changes of the stage, first of its stage, changes of the settings
    "strided": (8, {}, True, {}),
    "residual": (8, {"kernel_size": 5, "out_channels": 8}, False, {}),
    "not expanded, one group": (8, {"expand_ratio": 1, "stride": 1}, True, {"bn_mode": "global"}),
    "5 x 5, gelu": (8, {"kernel_size": 5}, True, {"padding": "same", "activation": "gelu"}),
}


def formula(params, x, stage, is_first, settings):
    """Returns (y, batch moments) of a block, in the precision of its arguments."""
    activate, moments = layers.ACTIVATIONS[settings.activation], {}
    stride = stage.stride if is_first else 1

    def norm(name, x):
        groups = x.reshape(-1, settings.group(x), *x.shape[1:])
        mean = groups.mean((1, 2, 3), keepdims=True)
        var = groups.var((1, 2, 3), keepdims=True)
        moments[name] = {"mean": mean.mean(0).ravel(), "var": var.mean(0).ravel()}
        y = (groups - mean) / jnp.sqrt(var + settings.bn_eps)
        return y.reshape(x.shape) * params[name]["scale"] + params[name]["bias"]

    y = x
    if stage.expand_ratio != 1:
        y = activate(norm("expand_bn", y @ params["expand"]["kernel"]))
    y = jax.lax.conv_general_dilated(
        y,
        params["depthwise"]["kernel"],
        (stride, stride),
        layers.conv_padding(settings.padding, stage.kernel_size, stride, x.shape[1:3]),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=y.shape[-1],
    )
    y = activate(norm("depthwise_bn", y))
    s = y.mean((1, 2))
    for name, function in (("reduce", activate), ("expand", jax.nn.sigmoid)):
        layer = params["squeeze"][name]
        s = function(s @ layer["kernel"] + layer["bias"])
    y = norm("project_bn", (y * s[:, None, None]) @ params["project"]["kernel"])
    return y if is_first else y + x, moments


def inputs(case, size=(6, 5)):
    """Returns (module, variables, images), float32."""
    count, changes, is_first, of_settings = CASES[case]
    settings = dataclasses.replace(SETTINGS, **of_settings)
    stage = dataclasses.replace(STAGE, **changes)
    block = efficientnet.MBConv(stage, False, is_first, settings)
    rng = np.random.default_rng(0)
    x = jnp.asarray(1 + rng.standard_normal((count, *size, stage.in_channels)), jnp.float32)
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x, (0.0, None)))
    draw = lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), leaf.dtype)  # noqa: E731
    return block, jax.tree.map(draw, shapes), x


def gradients(fn, params, x):
    """Returns (y, moments, gradients by the parameters and by x) of a sum of functions of y."""

    def value(params, x):
        y, moments = fn(params, x)
        return jnp.sum(jnp.sin(y.astype(x.dtype))), (y, moments)

    of, (y, moments) = jax.jit(jax.grad(value, (0, 1), has_aux=True))(params, x)
    return jax.tree.map(np.asarray, (y, moments, of))


def of_module(block, variables, x, constrain=ONE_DEVICE, dtype=jnp.float32):
    settings = dataclasses.replace(block.settings, constrain=constrain, dtype=dtype)
    block = block.clone(settings=settings)

    def fn(params, x):
        variables_ = variables | {"params": params}
        (y, _), updated = block.apply(
            variables_, x.astype(dtype), (0.0, None), mutable=["batch_stats"]
        )
        return y, updated["batch_stats"]

    return gradients(fn, variables["params"], x)


def of_formula(block, variables, x):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), variables["params"])
        fn = lambda params, x: formula(params, x, block.stage, block.is_first, block.settings)  # noqa: E731
        return gradients(fn, wide, jnp.asarray(np.asarray(x, np.float64)))


def errors(got, expected):
    """Returns {name: largest error over the largest value}."""
    got = jax.tree.leaves_with_path(got)
    expected = dict(jax.tree.leaves_with_path(expected))
    assert {path for path, _ in got} == set(expected)
    return {
        jax.tree_util.keystr(path): float(
            np.abs(np.float64(value) - expected[path]).max() / np.abs(expected[path]).max()
        )
        for path, value in got
    }


@pytest.mark.parametrize("case", CASES)
def test_values_moments_and_gradients_are_those_of_the_formula(monkeypatch, case):
    monkeypatch.setattr(chunked_mbconv, "_CHUNK_BYTES", 2 * 6 * 5 * 48 * 4)  # two images, of four
    arguments = inputs(case)
    expected = of_formula(*arguments)
    for name, error in errors(of_module(*arguments), expected).items():
        assert error < 1e-4, name


def test_bfloat16_is_as_near_to_the_formula_as_layer_by_layer():
    arguments = inputs("residual")
    expected = of_formula(*arguments)
    layered = of_module(*arguments, constrain=layers.unconstrained, dtype=jnp.bfloat16)
    layered, chunked = (
        errors(got, expected) for got in (layered, of_module(*arguments, dtype=jnp.bfloat16))
    )
    for name, error in chunked.items():
        assert error < 1.5 * layered[name] + 0.005, name


def test_two_devices_give_the_numbers_of_one():
    arguments = inputs("residual")
    rows = mesh.Rows(mesh.make_mesh(2, 1, devices=jax.devices()[:2]))
    two, one = of_module(*arguments, constrain=rows), of_module(*arguments)
    for name, error in errors(two, one).items():
        assert error < 2e-5, name


def test_groups_that_lie_on_several_devices_run_layer_by_layer(monkeypatch):
    monkeypatch.setattr(chunked_mbconv, "mbconv", None)
    arguments = inputs("residual")
    rows = mesh.Rows(mesh.make_mesh(8, 1))
    eight, one = (of_module(*arguments, constrain=c) for c in (rows, layers.unconstrained))
    for name, error in errors(eight, one).items():
        assert error < 2e-5, name


def compiled_gradient():
    """(compiled gradients of a block on 32 x 32 px, bytes of one expanded map of the batch)."""
    block, variables, x = inputs("residual", size=(32, 32))
    x = jnp.tile(x, (4, 1, 1, 1))

    def value(params, x):
        updated = variables | {"params": params}
        (y, _), _ = block.apply(updated, x, (0.0, None), mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y))

    gradient = jax.jit(jax.grad(value, (0, 1)))
    return gradient.lower(variables["params"], x).compile(), 6 * x.nbytes


def test_the_backward_pass_keeps_little():
    """In expanded maps of the batch: h, d, two gradients, and chunks. Layer by layer 34.8."""
    compiled, expanded_bytes = compiled_gradient()
    assert compiled.memory_analysis().temp_size_in_bytes < 7 * expanded_bytes
