import os
import pickle
import subprocess
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from image_helpers import encode, photo
from PIL import Image

from align_jax.data import images, jpeg
from align_jax.data.images import BadImage, decode_image, train_view


def reason_of(data, **options):
    with pytest.raises(BadImage) as caught:
        decode_image(data, **options)
    assert caught.value.reason in images.BAD_IMAGE_REASONS
    assert "\n" not in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM"])
def test_decode_lossless_format_gives_its_pixels(file_format):
    np.testing.assert_array_equal(decode_image(encode(photo(), file_format)), photo())


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP", "AVIF", "JPEG2000"])
def test_decode_lossy_format_stays_close(file_format):
    if file_format not in Image.SAVE:
        pytest.skip(f"Pillow was built without {file_format}")
    decoded = decode_image(encode(photo(), file_format, quality=95))
    # Chroma subsampling at quality 95 costs a few grey levels on a smooth picture.
    assert np.abs(decoded.astype(int) - photo()).mean() < 4


def test_decode_takes_path_pillow_image_and_array(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(encode(photo(), "PNG"))
    for given in (path, str(path), Image.open(path), Image.fromarray(photo()), photo()):
        decoded = decode_image(given)
        assert decoded.dtype == np.uint8
        np.testing.assert_array_equal(decoded, photo())
    with pytest.raises(FileNotFoundError):
        decode_image(tmp_path / "missing.png")


def test_decode_grey_repeats_it_in_three_channels():
    grey = photo()[:, :, 0]
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(decode_image(encode(grey, "PNG")), expected)
    np.testing.assert_array_equal(decode_image(grey), expected)


def test_decode_one_bit_image_is_black_and_white():
    bits = photo()[:, :, 0] > 127
    decoded = decode_image(encode(Image.fromarray(bits), "PNG"))
    np.testing.assert_array_equal(decoded, np.repeat(bits[:, :, None] * np.uint8(255), 3, axis=2))


def test_decode_blends_transparency_with_white():
    rgba = photo(channels=4)
    alpha = rgba[:, :, 3:] / 255
    expected = rgba[:, :, :3] * alpha + 255 * (1 - alpha)
    for given in (encode(rgba, "PNG"), rgba, Image.fromarray(rgba)):
        # 1: Pillow rounds the product and the sum separately.
        assert np.abs(decode_image(given) - expected).max() <= 1


def test_decode_grey_with_alpha_blends_with_white():
    grey_alpha = photo(channels=4)[:, :, :2]
    alpha = grey_alpha[:, :, 1:] / 255
    expected = (grey_alpha[:, :, :1] * alpha + 255 * (1 - alpha)).repeat(3, axis=2)
    decoded = decode_image(encode(Image.fromarray(grey_alpha, "LA"), "PNG"))
    assert np.abs(decoded - expected).max() <= 1


def test_decode_palette_with_transparent_entry_shows_white_there():
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 2), 1)
    for data in (encode(palette, "PNG", transparency=1), encode(palette, "GIF", transparency=1)):
        decoded = decode_image(data)
        assert decoded[2, 1].tolist() == [255, 255, 255]
        assert decoded[0, 0].tolist() == [255, 0, 0]
    opaque = decode_image(encode(palette, "PNG"))
    assert opaque[2, 1].tolist() == [0, 0, 255]


def test_decode_cmyk_jpeg_gives_rgb():
    decoded = decode_image(encode(Image.fromarray(photo()).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(decoded.astype(int) - photo()).mean() < 8


def test_decode_16_bit_grey_is_scaled_not_clipped():
    grey = np.linspace(0, 65535, 48, dtype=np.uint16).reshape(6, 8)
    expected = np.rint(grey / 257).astype(int)
    for file_format in ("PNG", "TIFF", "PPM"):
        decoded = decode_image(encode(Image.fromarray(grey), file_format))
        np.testing.assert_array_equal(decoded, expected[:, :, None].repeat(3, axis=2))


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0, 1e6])
def test_decode_float_grey_is_scaled_to_full_range(top):
    grey = np.linspace(0, top, 48, dtype=np.float32).reshape(6, 8)
    decoded = decode_image(encode(Image.fromarray(grey), "TIFF"))
    np.testing.assert_array_equal(decoded[:, :, 0], np.rint(grey / top * 255))


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_decode_animation_gives_first_frame(file_format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    options = {"save_all": True, "append_images": frames[1:], "duration": 50}
    decoded = decode_image(encode(frames[0], file_format, **options))
    assert np.abs(decoded.astype(int) - [255, 0, 0]).max() <= 4  # WebP is lossy


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_honours_exif_orientation(orientation):
    # Rows and columns of the stored image as seen on screen, from the EXIF definition of the tag.
    seen = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: x.transpose(1, 0, 2)[:, ::-1],
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: x.transpose(1, 0, 2)[::-1],
    }[orientation](photo())
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(data), seen)
    np.testing.assert_array_equal(decode_image(images.load_rgb(data)), seen)  # turned once only


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")  # pytest undoes ours
def test_decode_image_with_damaged_exif_still_gives_pixels():
    data = encode(photo(), "JPEG")
    body = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\xff\xff\xff\x7f" * 3
    damaged = data[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + data[2:]
    np.testing.assert_array_equal(decode_image(damaged), decode_image(data))


def test_decode_empty_file_has_reason_empty():
    assert reason_of(b"") == "image_empty"


@pytest.mark.parametrize(
    "data",
    [
        b"<!DOCTYPE html><html><body>404</body></html>",
        b"\x00" * 500,
        b"GET",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n",
    ],
)
def test_decode_other_content_is_not_an_image(data):
    assert reason_of(data) == "image_not_an_image"


def test_decode_array_of_other_dtype_or_shape_is_not_an_image():
    for array in (np.zeros((8, 8, 3), np.float32), np.zeros((3, 8, 8), np.uint8), np.zeros(8)):
        assert reason_of(array) == "image_not_an_image"
    assert reason_of(None) == "image_not_an_image"


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_decode_truncated_file_is_truncated_or_not_an_image(file_format):
    data = encode(photo(), file_format)
    for kept in (0.95, 0.6, 0.3):
        assert reason_of(data[: int(kept * len(data))]) == "image_truncated"


@pytest.mark.parametrize("start", [0, 40, 200])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_decode_whole_file_that_is_damaged_is_not_called_truncated(file_format, start):
    data = bytearray(encode(photo(), file_format))
    start += 12  # what names the format, and the size of WebP
    data[start : start + 300] = np.random.default_rng(start).bytes(300)
    try:
        images.decode_image(bytes(data))
    except images.BadImage as error:
        assert error.reason == "image_damaged"


def test_decode_jpeg_header_says_whether_the_file_is_cut_off():
    data = encode(photo(), "JPEG")
    for whole in (data[:3] + bytes(200), data[:4] + bytes(30) + data[34:]):
        assert reason_of(whole) == "image_damaged"
    for cut in (data[:3], data[:25], data[:160], data[:-2]):
        assert reason_of(cut) == "image_truncated", len(cut)
    with pytest.raises(images.BadImage) as caught:
        images.decode_image(data[:3] + bytes(200))
    assert str(caught.value) == "The image header is damaged."


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")  # pytest undoes ours
def test_decode_cut_or_scrambled_file_gives_array_or_bad_image_only():
    rng = np.random.default_rng(0)
    for file_format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "ICO"):
        data = encode(photo(32, 32), file_format)
        for _ in range(60):
            scrambled = np.frombuffer(data, np.uint8).copy()
            where = rng.integers(len(data), size=rng.integers(1, 8))
            scrambled[where] = rng.integers(256, size=where.size)
            kept = scrambled[: rng.integers(1, len(data) + 1)].tobytes()
            try:
                decoded = decode_image(kept, max_pixels=10**6)
            except BadImage:
                continue
            assert decoded.dtype == np.uint8 and decoded.shape[2:] == (3,)


def test_decode_refuses_large_image_before_decoding_it(monkeypatch):
    data = encode(photo(40, 60), "PNG")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert reason_of(data, max_pixels=40 * 60 - 1) == "image_too_large"


def test_decode_image_of_exactly_max_pixels_is_accepted():
    assert decode_image(encode(photo(40, 60), "PNG"), max_pixels=40 * 60).shape == (40, 60, 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width", [10_000, 14_000, 60_000])
def test_decode_decompression_bomb_is_too_large_by_its_header(width):
    # A PNG of a few bytes that claims width x 10,000 pixels; its data are never looked at.
    data = bytearray(encode(photo(8, 8), "PNG"))
    data[16:24] = width.to_bytes(4, "big") + (10_000).to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    assert reason_of(bytes(data)) == "image_too_large"


def test_decode_tracking_pixel_is_too_small():
    assert reason_of(encode(photo(1, 1), "GIF")) == "image_too_small"
    assert reason_of(encode(photo(1, 50), "PNG")) == "image_too_small"
    assert decode_image(encode(photo(2, 2), "PNG")).shape == (2, 2, 3)


def test_decode_prints_no_warning_for_large_header_or_damaged_exif(tmp_path):
    # In a process of its own: pytest replaces the warning filters.
    data = bytearray(encode(photo(8, 8), "BMP"))
    data[18:26] = (10_000).to_bytes(4, "little") * 2
    (tmp_path / "bomb.bmp").write_bytes(data)
    photo_bytes = encode(photo(), "JPEG")
    body = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\xff\xff\xff\x7f" * 3
    exif = b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body
    (tmp_path / "exif.jpg").write_bytes(photo_bytes[:2] + exif + photo_bytes[2:])
    code = (
        "import sys; from align_jax.data.images import BadImage, decode_image\n"
        "for path in sys.argv[1:]:\n"
        "    try: print(decode_image(path).shape)\n"
        "    except BadImage as error: print(error.reason)\n"
    )
    paths = [str(tmp_path / "bomb.bmp"), str(tmp_path / "exif.jpg")]
    result = subprocess.run(
        [sys.executable, "-c", code, *paths],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert result.stderr == ""
    assert result.stdout.split("\n")[:2] == ["image_too_large", "(40, 60, 3)"]


def test_decode_in_threads_gives_the_same_as_alone():
    files = [encode(photo(seed=seed), "JPEG") for seed in range(16)] + [b"", b"<html>"]

    def attempt(data):
        try:
            return decode_image(data).tobytes()
        except BadImage as error:
            return error.reason

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(attempt, files * 8)) == [attempt(data) for data in files] * 8


def test_decode_with_simplejpeg_equals_pillow_on_sound_and_damaged_files(monkeypatch):
    simplejpeg = pytest.importorskip("simplejpeg")
    rng = np.random.default_rng(0)
    noisy = photo() // 2 + rng.integers(0, 128, photo().shape, np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [encode(photo(), "JPEG", exif=exif), encode(photo()[:, :, 0], "JPEG")]
    for options in ({"quality": 50}, {"quality": 95, "progressive": True}, {"quality": 100}):
        files += [encode(noisy, "JPEG", subsampling=kind, **options) for kind in range(3)]
    for _ in range(60):
        damaged = np.frombuffer(files[2], np.uint8).copy()
        damaged[rng.integers(len(damaged), size=2)] = rng.integers(256, size=2)
        files.append(damaged[: rng.integers(len(damaged) // 2, len(damaged) + 1)].tobytes())

    def outcomes():
        for data in files:
            try:
                yield decode_image(data).tobytes()
            except BadImage as error:
                yield error.reason

    assert images.simplejpeg is simplejpeg
    found = list(outcomes())
    monkeypatch.setattr(images, "simplejpeg", None)
    assert found == list(outcomes())


def test_decode_of_altered_jpeg_headers_is_pillows(monkeypatch):
    pytest.importorskip("simplejpeg")
    rng = np.random.default_rng(0)
    noisy = rng.integers(0, 256, (24, 32, 3), np.uint8)
    files = [
        encode(noisy, "JPEG"),
        encode(noisy, "JPEG", subsampling=0, comment=b"text", restart_marker_rows=1),
        encode(noisy, "JPEG", progressive=True, dpi=(72, 72)),
        encode(noisy[:, :, 0], "JPEG"),
        encode(noisy, "JPEG", exif=Image.Exif()),
    ]
    options = {"resize_px": 32, "crop_px": 20, "method": "pil", "flip": True}

    def outcomes(data):
        for read in (
            decode_image,
            lambda d: train_view(d, rng=np.random.default_rng(1), **options),
        ):
            try:
                yield read(data).tobytes()
            except BadImage as error:
                yield error.reason

    plain = 0
    for number in range(300):
        data = bytearray(files[number % len(files)])
        scan = data.index(b"\xff\xda")
        for place in rng.integers(2, scan + 14, number % 3):
            data[place] = rng.integers(256)
        data = bytes(data[: rng.integers(scan) if number % 10 == 9 else len(data)])
        found = list(outcomes(data))
        if size := jpeg.plain_size(data, images.MAX_PIXELS):
            plain += 1
            with images._open(data) as opened:
                assert (opened.mode, opened.size[::-1]) == ("RGB", size)
                assert images._orientation(opened) is None
        with monkeypatch.context() as without:
            without.setattr(images, "simplejpeg", None)
            assert found == list(outcomes(data))
    assert 60 < plain < 240


@pytest.mark.parametrize("size", [(30, 30), (33, 33)])
def test_windows_cut_out_of_a_jpeg_are_those_of_its_pixels(size):
    pytest.importorskip("simplejpeg")
    data = encode(photo(*size), "JPEG")
    pixels, side = decode_image(data), size[0]
    batch = np.full((3, 20, 20, 3), 7, np.uint8)
    for top, left in ((0, 0), (side - 20, side - 20), (3, 8), (0, side - 20), (side - 20, 0)):
        for mirrored in (False, True):
            assert jpeg.plain_size(data, side * side) == size
            assert jpeg.cut_out(data, size, top, left, mirrored, batch[1])
            expected = pixels[top : top + 20, left : left + 20]
            np.testing.assert_array_equal(batch[1], expected[:, :: -1 if mirrored else 1])
    assert (batch[::2] == 7).all()
    assert jpeg.plain_size(data, side * side - 1) is None
    assert not jpeg.cut_out(data[:-40], size, 0, 0, False, batch[0])
    assert (batch[0] == 7).all()


def test_train_view_into_given_memory_writes_there_and_only_there():
    files = [encode(photo(40, 40), "JPEG"), encode(photo(31, 57), "PNG"), photo(40, 40)]
    for given in files:
        for method in images.RESIZE_METHODS:
            for seed in range(4):  # mirrored or not
                options = {"resize_px": 40, "crop_px": 25, "method": method, "flip": True}
                batch = np.full((3, 25, 25, 3), 7, np.uint8)
                row = batch[1]
                rng = np.random.default_rng(seed)
                assert train_view(given, rng=rng, out=row, **options) is row
                expected = train_view(given, rng=np.random.default_rng(seed), **options)
                np.testing.assert_array_equal(row, expected)
                assert (batch[::2] == 7).all()


def test_bad_image_survives_pickling():
    error = pickle.loads(pickle.dumps(BadImage("image_empty", "The file is empty.")))
    assert (error.reason, str(error)) == ("image_empty", "The file is empty.")


def test_real_crawl_failures_give_array_or_the_right_reason():
    folder = Path(
        os.environ.get("ALIGN_JAX_REAL_DATA", Path(__file__).parents[2] / "shared" / "data")
    )
    path = folder / "metadata" / "crawl_failures.zip"
    if not path.exists():
        pytest.skip(f"real data not found: {path}")
    reason_of_kind = {
        "empty": "image_empty",
        "undecodable": "image_not_an_image",
        "tiny": "image_too_small",
    }
    lines = path.with_suffix(".tsv").read_text().splitlines()
    rows = [dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]]
    with zipfile.ZipFile(path) as archive:
        members = {os.path.basename(name): name for name in archive.namelist()}
        for row in rows:
            data = archive.read(members[row["file"]])
            if row["kind"] in reason_of_kind:
                assert reason_of(data) == reason_of_kind[row["kind"]], row
            else:
                assert decode_image(data).shape == (int(row["height"]), int(row["width"]), 3), row
    assert len(rows) == 132
