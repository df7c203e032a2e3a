"""Changes of training views against their definitions, and what they leave alone."""

import numpy as np
import pytest
from PIL import Image
from test_pipeline import make_source, take

from align_jax.data.augment import change_color, lose_detail

LUMA = np.array([0.299, 0.587, 0.114])


class Draws:
    """Gives these numbers as `random` would."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self, size=None):
        taken = [self.numbers.pop(0) for _ in range(1 if size is None else size)]
        return taken[0] if size is None else np.array(taken)


@pytest.fixture(scope="module")
def view():
    """Uint8 [24, 24, 3], far from black and white, so that nothing is clipped."""
    return np.random.default_rng(0).integers(70, 150, (24, 24, 3)).astype(np.uint8)


def changed(view, *draws, jitter=0.4, grayscale=0.0):
    return change_color(view, jitter=jitter, grayscale=grayscale, rng=Draws(*draws)).astype(float)


@pytest.mark.parametrize("draw", [0.0, 0.25, 0.5, 0.9])
def test_brightness_contrast_and_saturation_are_mixtures_with_black_mean_and_grey(view, draw):
    factor, x = 1 + 0.4 * (2 * draw - 1), view.astype(float)
    grey = (x @ LUMA)[..., None]
    np.testing.assert_allclose(changed(view, draw, 0.5, 0.5, 1.0), factor * x, atol=1)
    expected = factor * x + (1 - factor) * grey.mean()
    np.testing.assert_allclose(changed(view, 0.5, draw, 0.5, 1.0), expected, atol=1.5)
    expected = factor * x + (1 - factor) * grey
    np.testing.assert_allclose(changed(view, 0.5, 0.5, draw, 1.0), expected, atol=1.5)


def test_changes_come_in_their_order_and_are_clipped():
    view = np.zeros((8, 8, 3), np.uint8)
    view[:4] = 250, 100, 0
    found = changed(view, 1.0, 1.0, 0.0, 1.0, jitter=1.0)  # twice as bright, then contrast, grey
    bright = np.minimum(2.0 * view, 255)
    contrast = np.clip(2 * bright - (bright @ LUMA).mean(), 0, 255)
    np.testing.assert_allclose(found, np.repeat((contrast @ LUMA)[..., None], 3, -1), atol=2.5)
    assert found[0, 0, 0] > found[7, 7, 0] == 0


def test_share_of_grey_views_and_no_change_at_zero(view):
    rng = np.random.default_rng(1)
    found = [change_color(view, jitter=0.0, grayscale=0.3, rng=rng) for _ in range(2000)]
    grey = np.array([(v[..., 0] == v[..., 1]).all() for v in found])
    assert abs(grey.mean() - 0.3) < 0.031  # three standard errors
    assert all((v == view).all() for v in np.array(found)[~grey])
    expected = (view.astype(float) @ LUMA)[..., None]
    np.testing.assert_allclose(found[int(grey.argmax())], expected.repeat(3, -1), atol=1)


def test_neither_number_moves_the_draws_of_the_other_or_the_next(view):
    states = set()
    for jitter, grayscale in ((0.0, 0.5), (0.7, 0.0), (0.7, 1.0)):
        rng = np.random.default_rng(2)
        change_color(view, jitter=jitter, grayscale=grayscale, rng=rng)
        states.add(rng.random())
    assert len(states) == 1


@pytest.mark.parametrize("crop", ["random", "inception"])
def test_colours_change_after_the_crop_and_nothing_else_does(crop):
    """The batch in grey is that of the same rows, captions and crops, made grey."""
    plain, grey = (take(2, make_source(), crop=crop, grayscale=share) for share in (0.0, 1.0))
    for a, b in zip(plain, grey, strict=True):
        for name in ("ids", "mask", "index"):
            np.testing.assert_array_equal(a.arrays[name], b.arrays[name])
        for view, found in zip(a.arrays["image"], b.arrays["image"], strict=True):
            expected = np.asarray(Image.fromarray(view).convert("L"))
            np.testing.assert_array_equal(found, expected[..., None].repeat(3, -1))


def triangle_weights(before, after):
    """[after, before] of a bilinear resize, antialiased where it reduces, in float64."""
    scale = before / after
    centres = (np.arange(after) + 0.5) * scale - 0.5
    weights = 1 - abs(np.arange(before) - centres[:, None]) / max(scale, 1.0)
    weights = np.maximum(weights, 0)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("draw", "side"), [(0.0, 12), (0.5, 18), (0.99, 24)])
def test_a_view_that_loses_detail_is_reduced_and_enlarged(view, draw, side):
    both = triangle_weights(side, 24) @ triangle_weights(24, side)
    expected = np.einsum("yY,xX,YXc->yxc", both, both, view.astype(float))
    found = lose_detail(view, share=0.3, rng=Draws(0.29, draw))
    np.testing.assert_allclose(found.astype(float), expected, atol=2)  # rounded four times
    assert side == 24 or abs(found.astype(float) - view).max() > 5


def test_share_of_views_that_lose_detail_and_draws(view):
    rng = np.random.default_rng(1)
    found = [(lose_detail(view, share=0.3, rng=rng) != view).any() for _ in range(2000)]
    assert abs(np.mean(found) - 0.3 * 23 / 24) < 0.031  # one in 24 keeps its side
    states = set()
    for share in (0.0, 1.0):
        rng = np.random.default_rng(2)
        lose_detail(view, share=share, rng=rng)
        states.add(rng.random())
    assert len(states) == 1


def test_detail_is_lost_after_colours_and_nothing_else_changes():
    """Grey stays grey, and rows, captions and crops stay what they were."""
    changes = {"grayscale": 1.0, "downscale": 0.0}, {"grayscale": 1.0, "downscale": 1.0}
    sharp, lost = (take(2, make_source(), **change) for change in changes)
    for a, b in zip(sharp, lost, strict=True):
        for name in ("ids", "mask", "index"):
            np.testing.assert_array_equal(a.arrays[name], b.arrays[name])
        assert (b.arrays["image"] == b.arrays["image"][..., :1]).all()
        means = (x.arrays["image"].mean(axis=(1, 2, 3)) for x in (a, b))
        np.testing.assert_allclose(*means, rtol=0.05)
        assert (a.arrays["image"] != b.arrays["image"]).any(axis=(1, 2, 3)).mean() > 0.7
