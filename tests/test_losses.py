"""Loss forms against a float64 NumPy oracle: values and gradients, on meshes of eight devices."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import config, losses, mesh, ring_loss

BATCH, DIM = 88, 32  # 11 pairs on each of 8 devices
TEMPERATURES = (1.0, 1 / 64)
BIAS = -3.0
HASHES = ("caption_hash", "image_hash")
# Tiles of the ring: a device's whole share, 3 of 4 rows (one of them padding), 2 of 6, 12 of 1 in 3
# rounds of 4, one of them padding.
FORMS = (("dense", 0), ("sharded", 0), ("ring", 1024), ("ring", 5), ("ring", 7), ("ring", 1))
NEEDED = (("softmax", 0.0), ("softmax", 0.1), ("sigmoid", 0.0))


def oracle(kind, z_image, z_text, temperature, hashes=(), smoothing=0.0, weights=(1.0, 1.0)):
    """(parts, gradients of the weighted sum of parts, `LARGEST`), by the definition, in float64."""
    x, y = z_image.astype(np.float64), z_text.astype(np.float64)
    t = float(temperature)
    allowed = np.ones((len(x), len(x)), bool)
    for h in hashes:
        allowed &= ~(h[:, None, :] == h[None, :, :]).all(-1)
    np.fill_diagonal(allowed, True)
    cosine = x @ y.T
    of_kind = softmax_oracle if kind == "softmax" else sigmoid_oracle
    parts, d_logits, d_bias = of_kind(cosine / t, allowed, smoothing, weights)
    d_cosine = d_logits / t
    d_t = -(d_cosine * np.where(allowed, cosine, 0)).sum() / t
    logits = cosine / t + (BIAS if kind == "sigmoid" else 0)
    negatives = logits[allowed & ~np.eye(len(x), dtype=bool)]
    largest = [logits.diagonal().max(), negatives.max(initial=-np.inf)]
    return parts, (d_cosine @ y, d_cosine.T @ x, d_t, d_bias), largest


def softmax_oracle(all_logits, allowed, smoothing, weights):
    """Cross-entropy with an explicit target matrix, along rows and along columns."""
    batch = len(all_logits)
    parts, d_logits = [], 0.0
    for axis, weight in ((1, weights[0]), (0, weights[1])):
        logits = np.where(allowed, all_logits, -np.inf)
        target = allowed * (smoothing / allowed.sum(axis, keepdims=True))
        target[np.arange(batch), np.arange(batch)] += 1 - smoothing
        shifted = logits - logits.max(axis, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis, keepdims=True))
        parts.append(-(target * np.where(allowed, log_p, 0)).sum() / batch)
        d_logits = d_logits + weight * (np.exp(log_p) - target) / batch
    return parts, d_logits, 0.0


def sigmoid_oracle(all_logits, allowed, smoothing, weights):
    """-log sigmoid(l * logit), l = 1 on the diagonal and -1 elsewhere."""
    batch = len(all_logits)
    label = 2 * np.eye(batch) - 1
    cost = np.logaddexp(0, -label * (all_logits + BIAS)) * allowed
    d_cost = -label / (1 + np.exp(label * (all_logits + BIAS))) * allowed
    weight = np.where(label > 0, *weights) / batch
    parts = [(cost * (label == sign)).sum() / batch for sign in (1, -1)]
    return parts, weight * d_cost, (weight * d_cost).sum()


def make_batch(batch=BATCH, dim=DIM, noise=2.0):
    rng = np.random.default_rng(0)
    z_image = rng.standard_normal((batch, dim))
    z_text = z_image + noise * rng.standard_normal((batch, dim))
    return tuple(unit_norm(z) for z in (z_image, z_text))


def unit_norm(z):
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


def make_hashes():
    rng = np.random.default_rng(1)
    caption_hash, image_hash = rng.integers(0, 2**32, (2, BATCH, 2), np.uint32)
    caption_hash[40:46] = caption_hash[3]  # across what eight devices hold
    image_hash[1] = image_hash[0]
    caption_hash[60, 0], image_hash[71, 1] = caption_hash[61, 0], image_hash[70, 1]  # half alike
    return caption_hash, image_hash


def loss_config(**changes):
    c = config.default_config().loss
    c.update(changes)
    return c


@functools.cache
def compiled(form, tile_size, shape, kind, smoothing, num_hashes=0):
    """(jitted value and gradients of the loss, sharding of its rows)."""
    m = mesh.make_mesh(*shape)
    rows, everywhere = mesh.batch_sharding(m), mesh.replicated(m)
    names = HASHES[:num_hashes]
    c = loss_config(form=form, kind=kind, label_smoothing=smoothing, tile_size=max(1, tile_size))
    c.mask_duplicates = next(key for key, value in losses.DUPLICATES.items() if value == names)
    loss_fn = losses.make_loss(c, m)

    def weighted(z_image, z_text, temperature, bias, hashes, weights):
        params = {"temperature": temperature, "bias": bias}
        batch = dict(zip(names, hashes, strict=True))
        loss, parts = loss_fn(z_image, z_text, params, batch)
        values = [parts[name] for name in losses.PARTS[kind]]
        return weights @ jnp.stack(values), (loss, values, [parts[n] for n in losses.LARGEST])

    step = jax.value_and_grad(weighted, argnums=(0, 1, 2, 3), has_aux=True)
    out = ((everywhere, everywhere), (rows, rows, everywhere, everywhere))
    return jax.jit(step, out_shardings=out), rows


def evaluate(form, tile_size, shape, kind, pair, temperature, hashes=(), **options):
    """(loss, parts, gradients, largest) of a form, as NumPy; `options` as of `oracle`."""
    smoothing, weights = options.get("smoothing", 0.0), options.get("weights", (1.0, 1.0))
    step, rows = compiled(form, tile_size, shape, kind, smoothing, len(hashes))
    pair, hashes = jax.device_put((tuple(pair), tuple(hashes)), rows)
    scalars = (np.float32(temperature), np.float32(BIAS))
    with mock.patch.object(ring_loss, "_ROUND_TILES", 4):
        (_, found), gradients = step(*pair, *scalars, hashes, np.float32(weights))
    loss, parts, largest = jax.tree.map(float, found)
    return loss, parts, jax.device_get(gradients), largest


def assert_close_to_oracle(found, expected):
    loss, parts, gradients, largest = found
    expected_parts, expected_gradients, expected_largest = expected
    np.testing.assert_allclose(largest, expected_largest, rtol=1e-5)
    assert abs(loss - sum(expected_parts)) <= 1e-6 * abs(sum(expected_parts))
    for part, want in zip(parts, expected_parts, strict=True):
        assert abs(part - want) <= 1e-6 * abs(sum(expected_parts))
    for gradient, want in zip(gradients, expected_gradients, strict=True):
        error = np.linalg.norm(np.asarray(gradient, np.float64) - want)
        assert error <= 1e-5 * np.linalg.norm(want)


def check_case(form, tile_size, shape, kind, smoothing, masked):
    hashes = make_hashes() if masked else ()
    for temperature in TEMPERATURES:
        args = kind, make_batch(), temperature, hashes
        found = evaluate(form, tile_size, shape, *args, smoothing=smoothing)
        assert_close_to_oracle(found, oracle(kind, *make_batch(), *args[2:], smoothing))


@pytest.mark.parametrize("form, tile_size", FORMS)
@pytest.mark.parametrize("kind, smoothing", NEEDED)
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradients_equal_float64_oracle(form, tile_size, kind, smoothing, masked):
    check_case(form, tile_size, (8, 1), kind, smoothing, masked)


@pytest.mark.parametrize("form, tile_size", [("sharded", 0), ("ring", 5)])
@pytest.mark.parametrize("shape", [(4, 2), (1, 8)])
@pytest.mark.parametrize("kind, smoothing", NEEDED[1:])
def test_loss_and_gradients_on_other_meshes_equal_float64_oracle(
    form, tile_size, shape, kind, smoothing
):
    check_case(form, tile_size, shape, kind, smoothing, masked=True)


@pytest.mark.parametrize("kind", losses.PARTS)
def test_ring_gradient_of_unequally_weighted_parts_equals_oracle(kind):
    weights = (0.25, 3.0)
    found = evaluate("ring", 5, (8, 1), kind, make_batch(), 0.1, make_hashes(), weights=weights)
    expected = oracle(kind, *make_batch(), 0.1, make_hashes(), weights=weights)
    assert_close_to_oracle(found, expected)


@pytest.mark.parametrize("kind, smoothing", NEEDED[1:])
def test_ring_with_one_pair_a_device_equals_oracle(kind, smoothing):
    pair = make_batch(8)
    found = evaluate("ring", 1024, (8, 1), kind, pair, 0.1, smoothing=smoothing)
    assert_close_to_oracle(found, oracle(kind, *pair, 0.1, (), smoothing))


@pytest.mark.parametrize("form, tile_size", FORMS)
@pytest.mark.parametrize("kind, smoothing", NEEDED[1:])
def test_loss_of_positives_at_minus_64_and_negatives_up_to_64_equals_oracle(
    form, tile_size, kind, smoothing
):
    # exp of the difference of two logits overflows float32.
    z_image, _ = make_batch()
    z_image[::2] *= -1
    found = evaluate(
        form, tile_size, (8, 1), kind, (z_image, -z_image), 1 / 64, smoothing=smoothing
    )
    expected = oracle(kind, z_image, -z_image, 1 / 64, (), smoothing)
    assert sum(expected[0]) > 60
    assert_close_to_oracle(found, expected)


@pytest.mark.parametrize("form, tile_size", FORMS)
def test_loss_of_a_batch_of_duplicates_is_that_of_the_positives_alone(form, tile_size):
    hashes = (np.ones((BATCH, 2), np.uint32), make_hashes()[1])
    pair = make_batch()
    loss, parts, gradients, largest = evaluate(
        form, tile_size, (8, 1), "softmax", pair, 1 / 64, hashes, smoothing=0.1
    )
    assert largest[0] > 0 and largest[1] == -np.inf  # there is no negative
    # One column is left: cross-entropy 0, but for the rounding of logits of size 64.
    assert max(map(abs, [loss, *parts])) <= 2e-5
    assert max(np.abs(g).max() for g in gradients) <= 2e-5
    found = evaluate(form, tile_size, (8, 1), "sigmoid", pair, 1 / 64, hashes)
    assert found[1][1] == 0
    assert_close_to_oracle(found, oracle("sigmoid", *pair, 1 / 64, hashes))


@pytest.mark.parametrize("form, tile_size", [("dense", 0), ("sharded", 0), ("ring", 5)])
@pytest.mark.parametrize("kind, smoothing", NEEDED[1:])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_bfloat16_gradients_point_where_float32_ones_do(
    form, tile_size, kind, smoothing, temperature
):
    pair = make_batch(BATCH, 640)
    rounded = [z.astype(jnp.bfloat16) for z in pair]
    _, _, gradients, _ = evaluate(
        form, tile_size, (8, 1), kind, rounded, temperature, smoothing=smoothing
    )
    _, expected, _ = oracle(kind, *pair, temperature, (), smoothing)
    for gradient, want in zip(gradients[:2], expected, strict=False):
        assert gradient.dtype == jnp.bfloat16
        gradient = gradient.astype(np.float64)
        cosine = (gradient * want).sum() / np.linalg.norm(gradient) / np.linalg.norm(want)
        assert cosine >= 0.9999


def test_dense_softmax_equals_hand_worked_two_by_two():
    # cosines [[1, 0], [0, 1]], T = 1: each row costs log(1 + e) - 1 without smoothing, and the
    # smoothed target (0.95, 0.05) costs log(1 + e) - 0.95.
    z = jnp.eye(2)
    for smoothing, row in ((0.0, np.log1p(np.e) - 1), (0.1, np.log1p(np.e) - 0.95)):
        loss, parts = losses.dense_loss(z, z, jnp.float32(1.0), label_smoothing=smoothing)
        assert float(loss) == pytest.approx(2 * row, rel=1e-6)
        assert float(parts["loss_image_to_text"]) == pytest.approx(row, rel=1e-6)


def test_dense_sigmoid_equals_hand_worked_two_by_two():
    # Logits [[1, -1], [-1, 1]] with T = 1/2, b = -1: a pair costs log(1 + exp(-1)) each way.
    z, pair = jnp.eye(2), np.log1p(np.exp(-1.0))
    loss, parts = losses.dense_loss(z, z, jnp.float32(0.5), bias=jnp.float32(-1.0), kind="sigmoid")
    assert float(loss) == pytest.approx(2 * pair, rel=1e-6)
    assert float(parts["loss_positive"]) == pytest.approx(pair, rel=1e-6)
    assert float(parts["loss_negative"]) == pytest.approx(pair, rel=1e-6)


def test_loss_with_two_equal_captions_masks_only_the_other_pair():
    # Rows 0 and 1 share a caption: neither is the other's negative, row 2 sees all three.
    z_image, z_text = jnp.eye(3), jnp.eye(3)
    same = np.array([[1, 2], [1, 2], [3, 4]], np.uint32)
    loss, parts = losses.dense_loss(z_image, z_text, jnp.float32(1.0), (same,), label_smoothing=0.0)
    two, three = np.log1p(np.e) - 1, np.log(2 + np.e) - 1
    assert float(parts["loss_text_to_image"]) == pytest.approx((2 * two + three) / 3, rel=1e-6)
    assert float(loss) == pytest.approx(2 * (2 * two + three) / 3, rel=1e-6)


def lower(form, batch, dim, *, tile_size=1024, kind="softmax"):
    """The compiled value and gradients of the loss, captions masked, from shapes alone."""
    step, rows = compiled(form, tile_size, (8, 1), kind, 0.0, 1)
    z = jax.ShapeDtypeStruct((batch, dim), jnp.float32, sharding=rows)
    hashes = (jax.ShapeDtypeStruct((batch, 2), jnp.uint32, sharding=rows),)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    weights = jax.ShapeDtypeStruct((2,), jnp.float32)
    return step.lower(z, z, scalar, scalar, hashes, weights).compile()


def largest_tensor(text):
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", text)
    return max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)


def test_sharded_loss_never_builds_the_square_matrix():
    text = lower("sharded", 512, DIM).as_text()
    assert "f32[64,512]" in text  # a device's rows
    assert "[512,512]" not in text


@pytest.mark.parametrize("kind", losses.PARTS)
def test_ring_holds_no_tensor_larger_than_a_share_of_the_embeddings(kind):
    text = lower("ring", 512, DIM, tile_size=16, kind=kind).as_text()
    assert largest_tensor(text) == 64 * DIM
    assert "collective-permute" in text
    assert "all-gather" not in text and "reduce-scatter" not in text
    assert largest_tensor(lower("sharded", 512, DIM, kind=kind).as_text()) >= 64 * 512


@pytest.mark.parametrize("kind", losses.PARTS)
def test_ring_needs_less_memory_than_a_share_of_the_embeddings_of_a_million_pairs(kind):
    half, full = (
        lower("ring", batch, 640, kind=kind).memory_analysis().temp_size_in_bytes
        for batch in (2**19, 2**20)
    )
    assert full <= 0.75 * (2**20 // 8 * 640 * 4)  # 240 MiB
    assert full <= 2.1 * half


def test_ring_under_remat_and_scan_keeps_its_gradient():
    m = mesh.make_mesh(8, 1)
    c = loss_config(form="ring", tile_size=5, mask_duplicates="both")
    loss_fn = losses.make_loss(c, m)
    batch = dict(zip(HASHES, make_hashes(), strict=True))

    def value(z_image, z_text):
        return loss_fn(z_image, z_text, {"temperature": 0.1}, batch)[0]

    def twice(z_image, z_text):
        def body(total, _):
            return total + jax.checkpoint(value)(z_image, z_text), None

        return jax.lax.scan(body, 0.0, length=2)[0]

    pair = jax.device_put(make_batch(), mesh.batch_sharding(m))
    plain = jax.jit(jax.grad(value, argnums=(0, 1)))(*pair)
    for once, both in zip(plain, jax.jit(jax.grad(twice, argnums=(0, 1)))(*pair), strict=True):
        np.testing.assert_array_equal(2 * once, both)


@pytest.mark.parametrize("form", losses.FORMS)
def test_loss_of_unequal_batches_names_both_shapes(form):
    loss_fn = losses.make_loss(loss_config(form=form), mesh.make_mesh(8, 1))
    with pytest.raises(ValueError, match=r"\(4, 8\).*\(5, 8\)"):
        loss_fn(jnp.ones((4, 8)), jnp.ones((5, 8)), {"temperature": 1.0}, {})
