"""A random share of the in-batch negatives: the loss of the pairs that are left, in every form."""

import jax
import numpy as np
import pytest

from align_jax import config, config_checks, losses, mesh, train
from align_jax.models import dual_encoder
from align_jax.plan import aot


def pairs(size, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(2, size, 8)).astype(np.float32)
    z_image, z_text = z / np.linalg.norm(z, axis=-1, keepdims=True)
    return z_image, z_text


def keys_of(index, step=3):
    return dual_encoder.example_keys(0, step, np.asarray(index, np.int32))


def kept_of(hashes, size):
    """bool [B, B]: the positive, and every pair that differs in all hashes."""
    kept = np.ones((size, size), bool)
    for hash_ in hashes:
        kept &= (np.asarray(hash_)[:, None] != np.asarray(hash_)[None]).any(-1)
    return kept | np.eye(size, dtype=bool)


@pytest.mark.parametrize("negatives", [0.5, 0.25])
def test_share_of_negatives_is_met_and_changes_with_the_step(negatives):
    size = 1024
    kept = kept_of(losses.subset_hashes(keys_of(range(size)), negatives), size)
    # 5 standard deviations of a binomial of 1,024 around each row's share.
    np.testing.assert_allclose(kept.mean(1), negatives, atol=5 * 0.5 / size**0.5)
    np.testing.assert_array_equal(kept, kept.T)
    other = kept_of(losses.subset_hashes(keys_of(range(size), step=4), negatives), size)
    assert (kept != other).mean() > 0.2


def test_subset_depends_on_the_example_not_on_its_row():
    order = np.random.default_rng(0).permutation(64)
    straight = losses.subset_hashes(keys_of(np.arange(64)), 0.25)
    shuffled = losses.subset_hashes(keys_of(order), 0.25)
    for a, b in zip(straight, shuffled, strict=True):
        np.testing.assert_array_equal(np.asarray(a)[order], b)


@pytest.mark.parametrize("form", losses.FORMS)
def test_loss_with_a_quarter_of_the_negatives_equals_the_masked_oracle(form):
    size, temperature, smoothing = 64, 0.1, 0.1
    z_image, z_text = pairs(size)
    c = config.default_config().loss
    c.form, c.label_smoothing, c.tile_size, c.negatives = form, smoothing, 5, 0.25
    loss_fn = losses.make_loss(c, mesh.make_mesh())
    keys = keys_of(range(size))
    loss, _ = jax.jit(loss_fn)(z_image, z_text, {"temperature": temperature}, {}, keys)
    hashes = losses.subset_hashes(keys, 0.25)
    logits, expected = z_image.astype(np.float64) @ z_text.T / temperature, 0.0
    kept = kept_of(hashes, size)
    for side in (logits, logits.T):
        for i in range(size):
            row = side[i, kept[i]]
            smooth = (1 - smoothing) * side[i, i] + smoothing * row.mean()
            expected += (np.log(np.exp(row).sum()) - smooth) / size
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_train_step_hands_the_config_s_share_to_the_loss(monkeypatch):
    c = config.default_config()
    c.model.image.variant, c.model.text.variant = "femto", "tiny"
    c.data.image_size, c.data.max_tokens = 32, 8
    c.train.batch_size, c.loss.mask_duplicates = 16, "caption"
    c.loss.form = "dense"
    given = []

    def dense_loss(z_image, z_text, temperature, hashes, bias, **options):
        given.append([h.shape for h in hashes])
        return (z_image * z_text).sum(), {}

    monkeypatch.setattr(losses, "dense_loss", dense_loss)
    for c.loss.negatives in losses.NEGATIVES:
        grid = mesh.make_mesh()
        _, _, abstract, step_fn = train.make_program(c, grid, vocab_size=99)
        jax.eval_shape(step_fn, abstract, aot._abstract_batch(c, grid, 16))
    captions = (16, 2)
    assert given == [[captions], [captions] + [(16, 2)], [captions] + [(16, 2)] * 2]


def test_all_negatives_need_no_hashes():
    assert losses.subset_hashes(keys_of(range(4)), 1.0) == ()


def test_other_share_is_refused_in_one_line():
    c = config.default_config()
    c.data.source = "scenes?size=10"
    c.loss.negatives = 0.3
    with pytest.raises(ValueError, match="config.loss.negatives=0.3 is unknown.*1.0, 0.5, 0.25"):
        config_checks.validate(c, num_devices=1)
