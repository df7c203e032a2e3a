"""EfficientNetV2's fused blocks against torch, and its sizes against the published ones."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_chunked_mbconv import ONE_DEVICE
from torch.nn import functional as F

from align_jax import config, trees
from align_jax.hf import config as hf_config
from align_jax.models import dual_encoder, efficientnet, flops, layers

pytestmark = pytest.mark.usefixtures("quick_compile")

# keras.applications.EfficientNetV2B*: trainable weights without top_conv and top_bn.
PUBLISHED = {"v2-b0": 5_610_384, "v2-b1": 6_611_732, "v2-b2": 8_391_406}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_parameter_count_equals_published_total(variant):
    trunk = efficientnet.EfficientNet(*efficientnet.VARIANTS[variant])
    shapes = jax.eval_shape(lambda: trunk.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), False))
    assert trees.count(shapes["params"]) == PUBLISHED[variant]


def test_fused_nano_has_the_size_that_the_report_states():
    trunk = efficientnet.EfficientNet(*efficientnet.VARIANTS["fused-nano"])
    shapes = jax.eval_shape(lambda: trunk.init(jax.random.key(0), jnp.zeros((1, 48, 48, 3)), False))
    assert trees.count(shapes["params"]) == 1_785_624
    assert sum(flops._trunk(trunk, 48)) == 39_494_656
    assert efficientnet.output_width("fused-nano") == 256


def random_leaf(rng, name, leaf):
    positive = name.endswith(("/var", "/scale"))
    drawn = rng.uniform(0.5, 1.5, leaf.shape) if positive else rng.normal(0, 0.3, leaf.shape)
    return jnp.asarray(drawn, jnp.float32)


def torch_block(x, p, stats, *, stride, residual, train):
    """The block in torch: x [B, C, H, W]; p and stats hold tensors under our names."""

    def norm(y, name):
        if not train:
            mean, var = (stats[name][part] for part in ("mean", "var"))
        else:
            mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
        shape = (1, -1, 1, 1)
        y = (y - mean.view(shape)) / torch.sqrt(var.view(shape) + 1e-3)
        return y * p[name]["scale"].view(shape) + p[name]["bias"].view(shape)

    # Hugging Face's padding: at stride 2, nothing before the first row and one row after the last.
    low = 1 if stride == 1 else 0
    y = F.pad(x, (low, 1, low, 1))
    y = F.conv2d(y, p["expand"]["kernel"].permute(3, 2, 0, 1), stride=stride)
    y = F.silu(norm(y, "expand_bn"))
    if "project" in p:
        y = torch.einsum("bchw,cd->bdhw", y, p["project"]["kernel"])
        y = norm(y, "project_bn")
    return y + x if residual else y


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "expand_ratio, stride, is_first", [(1, 1, True), (4, 2, True), (4, 1, False), (1, 1, False)]
)
def test_fused_block_equals_torch_in_values_and_gradients(expand_ratio, stride, is_first, train):
    stage = efficientnet.StageSpec(3, 2, 6, 6 if stride == 1 else 10, expand_ratio, stride, True)
    rows = ONE_DEVICE if train else layers.unconstrained
    settings = efficientnet.Settings(
        *("hf", "swish", 0.25, "global", 4, 1e-3, jnp.float32, train, rows)
    )
    block = efficientnet.FusedMBConv(stage, False, is_first, settings)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 7, 7, 6)), jnp.float32)
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x, (0.0, None)))
    variables = trees.map_named(partial(random_leaf, rng), shapes)

    def ours(params, x):
        both = {"params": params, "batch_stats": variables["batch_stats"]}
        (y, _), _ = block.apply(both, x, (0.0, None), mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y)), y

    gradients = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))
    (_, y), (d_params, dx) = gradients(variables["params"], x)

    def tensor(leaf):
        return torch.tensor(np.asarray(leaf, np.float64), requires_grad=True)

    params = jax.tree.map(tensor, variables["params"])
    stats = jax.tree.map(tensor, variables["batch_stats"])
    x_torch = torch.tensor(
        np.asarray(x, np.float64).transpose(0, 3, 1, 2).copy(), requires_grad=True
    )
    residual = not is_first
    expected = torch_block(x_torch, params, stats, stride=stride, residual=residual, train=train)
    torch.sin(expected).sum().backward()
    np.testing.assert_allclose(y, expected.detach().permute(0, 2, 3, 1), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(dx, x_torch.grad.permute(0, 2, 3, 1), rtol=1e-3, atol=1e-4)
    for (name, found), right in zip(
        trees.named_leaves(d_params), jax.tree.leaves(params), strict=True
    ):
        scale = float(right.grad.abs().max())
        np.testing.assert_allclose(found, right.grad, rtol=1e-3, atol=1e-4 * scale, err_msg=name)


def make_model(**changes):
    c = config.default_config()
    c.model.image.variant, c.model.text.variant = "fused-nano", "tiny"
    c.model.embed_dim, c.model.dtype, c.model.bn_group_size = 64, "float32", 4
    c.model.update_from_flattened_dict(changes)
    return dual_encoder.make_model(c.model, c.loss, vocab_size=50)


def test_drop_path_and_scanned_blocks_work_with_fused_ones():
    image = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    model = make_model()
    deep = tuple(dataclasses.replace(s, repeats=3) for s in efficientnet.STAGES_V2[:2])
    keys = dual_encoder.example_keys(0, 0, np.arange(4, dtype=np.int32))
    trunk = dataclasses.replace(model.image, depth=1.0, stages=deep, drop_path_rate=0.5)
    x = jnp.asarray(image, jnp.float32) / 255

    def run(trunk, keys, train=True):
        def loss(params):
            y, _ = trunk.apply(
                {**variables, "params": params}, x, train, keys, mutable=["batch_stats"]
            )
            return jnp.sum(y**2), y

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    shapes = jax.eval_shape(lambda: trunk.init(jax.random.key(0), x, False))
    rng = np.random.default_rng(1)
    variables = trees.map_named(partial(random_leaf, rng), shapes)
    gradient, y = run(trunk, keys)
    for changes in ({"scan_blocks": True}, {"remat": "block"}, {"remat": "dots"}):
        other_gradient, other = run(dataclasses.replace(trunk, **changes), keys)
        np.testing.assert_allclose(other, y, rtol=1e-4, atol=1e-6)
        for (name, a), b in zip(
            trees.named_leaves(gradient), jax.tree.leaves(other_gradient), strict=True
        ):
            atol = 1e-4 * float(jnp.abs(a).max())
            np.testing.assert_allclose(b, a, rtol=1e-3, atol=atol, err_msg=name)
    assert np.abs(run(trunk, None)[1] - y).max() > 1e-3


def test_hugging_face_format_has_no_place_for_fused_blocks():
    with pytest.raises(ValueError, match="fused"):
        hf_config.hf_from_model(make_model(), image_size=64)


def test_flops_count_fused_blocks():
    trunk = efficientnet.EfficientNet(1.0, 1.0, efficientnet.STAGES_V2[:2])
    stem = 2 * 16**2 * 9 * 3 * 32
    first = 2 * 16**2 * 9 * 32 * 16
    second = 2 * 8**2 * (9 * 16 * 64 + 64 * 32)
    third = 2 * 8**2 * (9 * 32 * 128 + 128 * 32)
    assert flops._trunk(trunk, 32) == (stem, first + second + third)
