"""Loss forms against a float64 NumPy oracle: values and gradients, one and eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import losses, mesh

BATCH, DIM = 64, 32
TEMPERATURES = (1.0, 1 / 64)


def oracle(z_image, z_text, temperature, hashes, smoothing):
    """(loss, gradients) by the definition, with an explicit target matrix, in float64."""
    x, y = z_image.astype(np.float64), z_text.astype(np.float64)
    t = float(temperature)
    batch = len(x)
    allowed = np.ones((batch, batch), bool)
    for h in hashes:
        allowed &= ~(h[:, None, :] == h[None, :, :]).all(-1)
    np.fill_diagonal(allowed, True)

    cosine = x @ y.T
    loss, d_cosine, d_t = 0.0, np.zeros_like(cosine), 0.0
    for c, sign in ((cosine, 0), (cosine.T, 1)):
        logits = np.where(allowed, c / t, -np.inf)
        target = allowed * (smoothing / allowed.sum(1, keepdims=True))
        target[np.arange(batch), np.arange(batch)] += 1 - smoothing
        shifted = logits - logits.max(1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        loss -= np.where(allowed, target * np.where(allowed, log_p, 0), 0).sum() / batch
        d_logits = (np.exp(log_p) - target) / batch
        d_cosine += (d_logits.T if sign else d_logits) / t
        d_t -= (d_logits * np.where(allowed, c, 0)).sum() / t**2
    return loss, (d_cosine @ y, d_cosine.T @ x, d_t)


def make_batch(seed=0, noise=2.0):
    rng = np.random.default_rng(seed)
    z_image = rng.standard_normal((BATCH, DIM))
    z_text = z_image + noise * rng.standard_normal((BATCH, DIM))
    unit = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (z_image, z_text)]
    caption_hash = rng.integers(0, 2**32, (BATCH, 2), np.uint32)
    caption_hash[40:46] = caption_hash[3]  # across what eight devices hold
    image_hash = rng.integers(0, 2**32, (BATCH, 2), np.uint32)
    image_hash[1] = image_hash[0]
    return *(z.astype(np.float32) for z in unit), caption_hash, image_hash


@pytest.mark.parametrize("form", losses.FORMS)
@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (1, 8)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_loss_and_gradients_equal_float64_oracle(form, shape, smoothing, masked, temperature):
    z_image, z_text, *hashes = make_batch()
    hashes = tuple(hashes) if masked else ()
    m = mesh.make_mesh(*shape)
    rows = mesh.batch_sharding(m)
    loss_fn = losses.make_loss(form, m, label_smoothing=smoothing)

    def value(z_image, z_text, temperature):
        return loss_fn(z_image, z_text, temperature, hashes)[0]

    args = (
        jax.device_put(z_image, rows),
        jax.device_put(z_text, rows),
        jnp.float32(temperature),
    )
    loss, gradients = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2)))(*args)
    expected, expected_gradients = oracle(z_image, z_text, temperature, hashes, smoothing)
    assert abs(float(loss) - expected) <= 1e-6 * abs(expected)
    for found, want in zip(gradients, expected_gradients, strict=True):
        error = np.linalg.norm(np.asarray(found, np.float64) - want)
        assert error <= 1e-5 * np.linalg.norm(want)


def test_dense_loss_equals_hand_worked_two_by_two():
    # cosines [[1, 0], [0, 1]], T = 1: each row costs log(1 + e) - 1 without smoothing, and the
    # smoothed target (0.95, 0.05) costs log(1 + e) - 0.95.
    z = jnp.eye(2)
    for smoothing, row in ((0.0, np.log1p(np.e) - 1), (0.1, np.log1p(np.e) - 0.95)):
        loss, parts = losses.dense_loss(z, z, jnp.float32(1.0), label_smoothing=smoothing)
        assert float(loss) == pytest.approx(2 * row, rel=1e-6)
        assert float(parts["loss_image_to_text"]) == pytest.approx(row, rel=1e-6)


def test_loss_with_two_equal_captions_masks_only_the_other_pair():
    # Rows 0 and 1 share a caption: neither is the other's negative, row 2 sees all three.
    z_image, z_text = jnp.eye(3), jnp.eye(3)
    same = np.array([[1, 2], [1, 2], [3, 4]], np.uint32)
    loss, parts = losses.dense_loss(z_image, z_text, jnp.float32(1.0), (same,), label_smoothing=0.0)
    two, three = np.log1p(np.e) - 1, np.log(2 + np.e) - 1
    assert float(parts["loss_text_to_image"]) == pytest.approx((2 * two + three) / 3, rel=1e-6)
    assert float(loss) == pytest.approx(2 * (2 * two + three) / 3, rel=1e-6)


def test_sharded_loss_never_builds_the_square_matrix():
    m = mesh.make_mesh(8, 1)
    rows = mesh.batch_sharding(m)
    loss_fn = losses.make_loss("sharded", m, label_smoothing=0.1)
    z = jax.ShapeDtypeStruct((512, DIM), jnp.float32, sharding=rows)
    gradient = jax.grad(lambda a, b: loss_fn(a, b, jnp.float32(1.0))[0], argnums=(0, 1))
    text = jax.jit(gradient).lower(z, z).compile().as_text()
    assert "f32[64,512]" in text  # a device's rows
    assert "[512,512]" not in text


def test_loss_of_unequal_batches_names_both_shapes():
    with pytest.raises(ValueError, match=r"\(4, 8\).*\(5, 8\)"):
        losses.dense_loss(jnp.ones((4, 8)), jnp.ones((5, 8)), 1.0, label_smoothing=0.0)
