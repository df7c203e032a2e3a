"""images.py: resizing, and the views that training and evaluation cut out."""

import numpy as np
import pytest
from image_helpers import encode, photo
from PIL import Image

from align_jax.data import images
from align_jax.data.images import decode_image, eval_view, resize, train_view


def resize_tf_reference(image, size):
    """Half-pixel bilinear, pixel by pixel in float64, not rounded."""
    height, width, _ = image.shape
    out = np.zeros((size, size, 3))
    for i in range(size):
        for j in range(size):
            y = (i + 0.5) * height / size - 0.5
            x = (j + 0.5) * width / size - 0.5
            y0, x0 = int(np.floor(y)), int(np.floor(x))
            for row, row_weight in ((y0, 1 - (y - y0)), (y0 + 1, y - y0)):
                for column, column_weight in ((x0, 1 - (x - x0)), (x0 + 1, x - x0)):
                    pixel = image[min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
                    out[i, j] += row_weight * column_weight * pixel
    return out


def resize_tf_float32(image, size):
    """The order of arithmetic that every checkpoint trained with "tf" has seen, in float32."""

    def neighbours(size_in):
        centre = (np.arange(size) + 0.5) * (size_in / size) - 0.5
        first, last = np.floor(centre), size_in - 1
        indices = (x.clip(0, last).astype(int) for x in (first, np.ceil(centre)))
        return *indices, (centre - first).astype(np.float32)

    above, below, down = neighbours(image.shape[0])
    left, right, across = neighbours(image.shape[1])
    pixels = image.astype(np.float32)
    lines = pixels[:, left] + (pixels[:, right] - pixels[:, left]) * across[:, None]
    blended = lines[above] + (lines[below] - lines[above]) * down[:, None, None]
    return np.rint(blended).astype(np.uint8)


@pytest.mark.parametrize("shape", [(40, 60), (13, 7), (24, 50), (2, 2), (500, 31), (346, 347)])
def test_resize_tf_keeps_every_bit(shape):
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    for size in (24, 90):
        np.testing.assert_array_equal(resize(image, size, "tf"), resize_tf_float32(image, size))


@pytest.mark.parametrize("shape", [(40, 60), (13, 7), (24, 50), (2, 2)])
def test_resize_tf_equals_reference_to_rounding(shape):
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    difference = resize(image, 24, "tf") - resize_tf_reference(image, 24)
    assert np.abs(difference).max() <= 0.5 + 1e-4  # rounding to uint8; float32 weights


def test_resize_pil_equals_pillow():
    image = np.random.default_rng(1).integers(0, 256, (90, 50, 3), np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((24, 24), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resize(image, 24, "pil"), expected)


def test_resize_methods_differ_when_shrinking():
    image = np.random.default_rng(1).integers(0, 256, (90, 90, 3), np.uint8)
    assert resize(image, 24, "tf").std() > 1.5 * resize(image, 24, "pil").std()


@pytest.mark.parametrize("method", images.RESIZE_METHODS)
def test_resize_to_its_own_size_returns_the_image(method):
    image = photo(24, 24)
    assert resize(image, 24, method) is image


def test_resize_unknown_method_names_the_config_key():
    with pytest.raises(ValueError, match=r"config.data.resize='cubic'.*'pil' or 'tf'"):
        resize(photo(), 24, "cubic")


def test_train_view_is_a_crop_of_the_resized_image_at_every_position_and_mirrored_half_the_time():
    image = np.arange(10 * 10 * 3, dtype=np.uint8).reshape(10, 10, 3)
    crops = {
        image[y : y + 8, x : x + 8][:, :: -1 if mirrored else 1].tobytes(): (y, x, mirrored)
        for y in range(3)
        for x in range(3)
        for mirrored in (False, True)
    }
    rng = np.random.default_rng(0)
    drawn = [
        crops[
            train_view(image, resize_px=10, crop_px=8, method="pil", rng=rng, flip=True).tobytes()
        ]
        for _ in range(1800)
    ]
    counts = np.array([drawn.count(key) for key in crops.values()])
    # Expected 100 each with standard deviation 9.7; 5 of those.
    assert counts.min() > 50 and counts.max() < 150


@pytest.mark.parametrize("method", images.RESIZE_METHODS)
@pytest.mark.parametrize("size", [(30, 30), (44, 61), (200, 17)])
def test_views_equal_decoding_resizing_and_cutting_out_bit_for_bit(method, size):
    given = encode(photo(*size), "JPEG")
    resized = resize(decode_image(given), 30, method)
    options = {"resize_px": 30, "crop_px": 20, "method": method}
    for form in (given, decode_image(given), images.load_rgb(given)):
        for seed in range(8):
            rng = np.random.default_rng(seed)
            top, left = rng.integers(11, size=2)
            expected = resized[top : top + 20, left : left + 20]
            expected = expected[:, ::-1] if rng.random() < 0.5 else expected
            view = train_view(form, rng=np.random.default_rng(seed), flip=True, **options)
            np.testing.assert_array_equal(view, expected)
        np.testing.assert_array_equal(eval_view(form, **options), resized[5:25, 5:25])


def test_train_view_without_flip_draws_the_same_crops_unmirrored():
    options = {"resize_px": 30, "crop_px": 20, "method": "tf"}
    rngs = [np.random.default_rng(5) for _ in range(2)]
    different = 0
    for _ in range(50):
        plain = train_view(photo(), rng=rngs[0], flip=False, **options)
        maybe_mirrored = train_view(photo(), rng=rngs[1], flip=True, **options)
        equal = np.array_equal(plain, maybe_mirrored)
        different += not equal
        assert equal or np.array_equal(plain, maybe_mirrored[:, ::-1])
    assert 10 < different < 40


def test_eval_view_is_the_central_crop_rounded_towards_the_top_left():
    image = photo(33, 33)
    view = eval_view(image, resize_px=33, crop_px=28, method="pil")
    np.testing.assert_array_equal(view, image[2:30, 2:30])
    assert view.flags.c_contiguous


def test_train_view_of_reduced_decoding_stays_close_and_reads_fewer_pixels(monkeypatch):
    large = np.asarray(Image.fromarray(photo(150, 200)).resize((1600, 1200), Image.BICUBIC))
    data = encode(large, "JPEG", quality=95)
    monkeypatch.setattr(images, "simplejpeg", None)
    loaded = []
    to_rgb = images._to_rgb
    monkeypatch.setattr(images, "_to_rgb", lambda im: loaded.append(im.size) or to_rgb(im))
    options = {"resize_px": 100, "crop_px": 80, "method": "pil", "flip": True}
    views = [
        train_view(data, rng=np.random.default_rng(3), decode=decode, **options).astype(int)
        for decode in images.DECODE_METHODS
    ]
    assert loaded == [(1600, 1200), (400, 300)]  # 1/8 would leave less than twice 100
    assert 0 < np.abs(views[0] - views[1]).max() <= 4
    # Without a JPEG, or without room for a reduction, nothing changes.
    for given in (encode(large, "PNG"), large, encode(large[:350, :350], "JPEG")):
        views = [
            train_view(given, rng=np.random.default_rng(3), decode=decode, **options)
            for decode in images.DECODE_METHODS
        ]
        np.testing.assert_array_equal(*views)


def test_reduced_decoding_is_refused_where_it_would_change_the_picture():
    options = {"resize_px": 20, "crop_px": 20, "rng": np.random.default_rng(0), "flip": False}
    with pytest.raises(ValueError, match="config.data.decode='reduced'.*resize='tf'.*'pil'"):
        train_view(photo(), method="tf", decode="reduced", **options)
    with pytest.raises(ValueError, match="config.data.decode='half'.*'full' or 'reduced'"):
        train_view(photo(), method="pil", decode="half", **options)


def test_views_crop_larger_than_image_is_an_error():
    with pytest.raises(ValueError, match="config.data.image_size=30.*config.data.resize_size=20"):
        eval_view(photo(), resize_px=20, crop_px=30, method="pil")
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="config.data.image_size=30"):
        train_view(photo(), resize_px=20, crop_px=30, method="pil", rng=rng, flip=True)
