"""Analytic FLOPs against a count of the traced program, XLA's cost analysis and published sizes."""

import math

import jax
import jax.numpy as jnp
import pytest

from align_jax import config
from align_jax.models import dual_encoder, efficientnet, flops

SIZE, LENGTH = 65, 24


def make_model(image="pico", text="tiny", **changes):
    c = config.default_config()
    c.model.image.variant, c.model.text.variant, c.model.embed_dim = image, text, 64
    c.model.update(changes)
    return dual_encoder.make_model(c.model, c.loss, vocab_size=50)


def towers(model):
    """(image tower, text tower) as functions of the variables and one pair, in eval mode."""
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.uint8)
    ids = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    return (
        (lambda v, x: dual_encoder.embed_image(model, v, x), (image,)),
        (lambda v, i, m: dual_encoder.embed_text(model, v, i, m), (ids, ids)),
    )


def count(jaxpr):
    """FLOPs of all matrix products and convolutions of a jaxpr, two per multiply-add."""
    total = 0
    for eqn in jaxpr.eqns:
        shapes = [var.aval.shape for var in eqn.invars]
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(shapes[0][axis] for axis in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * depth
        elif eqn.primitive.name == "conv_general_dilated":
            taps = math.prod(shapes[1][:-1])  # [H, W, in / groups, out]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * taps
        elif eqn.primitive.name == "cond":  # the depthwise convolution of each platform
            total += max(count(branch.jaxpr) for branch in eqn.params["branches"])
        else:
            inner = [p for p in eqn.params.values() if hasattr(p, "jaxpr") or hasattr(p, "eqns")]
            total += sum(count(getattr(p, "jaxpr", p)) for p in inner)
    return total


@pytest.mark.parametrize("padding", ["hf", "same"])
@pytest.mark.parametrize("variant", ["pico", "b1"])
def test_flops_equal_the_products_and_convolutions_of_the_traced_towers(variant, padding):
    model = make_model(variant, "mini", padding=padding)
    variables = dual_encoder.abstract_variables(model)
    found = flops.pair_flops(model, image_size_px=SIZE, max_tokens=LENGTH, batch_size=8)
    counted = [count(jax.make_jaxpr(fn)(variables, *args).jaxpr) for fn, args in towers(model)]
    assert [found.image, found.text] == counted


def test_flops_are_close_to_xla_where_elementwise_work_weighs_little():
    # Wide and shallow, so that norms and activations, which XLA counts too, are small beside the
    # products. XLA leaves out the products with padding.
    efficientnet_shallow = efficientnet.EfficientNet(4.3, 0.1)
    model = make_model("l2", "base").clone(image=efficientnet_shallow)
    variables = dual_encoder.abstract_variables(model)
    found = flops.pair_flops(model, image_size_px=SIZE, max_tokens=LENGTH, batch_size=8)
    for expected, (fn, args) in zip((found.image, found.text), towers(model), strict=True):
        xla = jax.jit(fn).lower(variables, *args).cost_analysis()["flops"]
        assert xla == pytest.approx(expected, rel=0.05)

        def loss(variables, *args, fn=fn):
            return fn(variables, *args).sum()

        xla = jax.jit(jax.grad(loss)).lower(variables, *args).cost_analysis()["flops"]
        assert xla == pytest.approx(3 * expected, rel=0.05)


def test_b0_and_b7_flops_match_the_published_multiply_adds():
    # Tan & Le 2019: 0.39 G at 224 px and 37 G at 600 px, with the top convolution and the
    # classifier (0.02 and 0.9 G) that ALIGN leaves out.
    for variant, size, giga in (("b0", 224, 0.39 - 0.02), ("b7", 600, 37.0 - 0.9)):
        found = flops.pair_flops(
            make_model(variant), image_size_px=size, max_tokens=8, batch_size=8
        )
        assert found.image / 2e9 == pytest.approx(giga, rel=0.05)


def test_recomputed_flops_follow_remat_and_microbatches():
    def recomputed(microbatches, **changes):
        return flops.pair_flops(
            make_model(**changes),
            image_size_px=SIZE,
            max_tokens=LENGTH,
            batch_size=8,
            microbatches=microbatches,
        )

    plain = recomputed(1)
    towers_flops = plain.image + plain.text
    assert plain.recomputed == 0 and plain.hardware == plain.model
    assert plain.model == 3 * (towers_flops + 2 * 8 * 64)
    assert recomputed(4).recomputed == towers_flops
    blocks = recomputed(1, remat="block").recomputed
    assert 0.8 * towers_flops < blocks < towers_flops  # all but stem and projections
    assert recomputed(4, remat="block").recomputed == towers_flops + blocks
