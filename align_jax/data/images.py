"""Encoded images to uint8 RGB, and the two views of a square crop that the towers are fed with.

Broken files raise `BadImage` with a reason to count by; nothing here logs. Scaling to [-1, 1]
happens on the device. The recipe is the paper's, and COYO-ALIGN's where the paper is silent.

Importing this module silences Pillow's warnings about damaged metadata and oversized images in the
whole process: they come once per crawled file, and no narrower filter is safe between threads. It
also lets Pillow keep a few buffers: fresh memory for each picture costs as much as its decoding.
"""

import contextlib
import io
import os
import warnings

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from align_jax.data import jpeg

try:
    import simplejpeg  # extra "fast": the same pixels in four fifths of the time
except ImportError:
    simplejpeg = None

BAD_IMAGE_REASONS = (
    "image_empty",
    "image_not_an_image",
    "image_truncated",
    "image_too_large",
    "image_too_small",
    "image_damaged",
)
MAX_PIXELS = 2**28 // 3  # 256 MiB as RGB; Pillow starts to warn at the same size
RESIZE_METHODS = ("pil", "tf")
DECODE_METHODS = ("full", "reduced")
CROPS = ("random", "inception")
REDUCED_MARGIN = 2  # times the side before the crop that reduced decoding leaves at least

# Left out on purpose: formats that start a program (EPS) or that no browser shows. Frequent first,
# since Pillow tries them in this order.
_WEB_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "ICO", "JPEG2000", "PPM")
Image.init()
_FORMATS = [name for name in _WEB_FORMATS if name in Image.OPEN]  # those this Pillow can read
# A multi-picture JPEG (.mpo) opens as JPEG.
IMAGE_SUFFIXES = tuple(
    sorted(
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in _FORMATS or (kind == "MPO" and "JPEG" in _FORMATS)
    )
)
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")
_TAIL_BYTES = 1024
_ROWS_AT_A_TIME = 64
_MIN_SIDE_PX = 2  # tracking pixels and spacer lines are no pictures
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

if "PILLOW_BLOCKS_MAX" not in os.environ:
    Image.core.set_blocks_max(8)  # of at most 16 MiB, and only as large as the last pictures
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class BadImage(ValueError):
    """An image that cannot be used; `reason` is one of BAD_IMAGE_REASONS."""

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)  # both, so that it survives pickling
        self.reason = reason

    def __str__(self) -> str:
        return self.args[1]


def decode_image(
    image: bytes | np.ndarray | Image.Image | str | os.PathLike, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Returns the image as uint8 RGB [H, W, 3]; may be the array given. Thread-safe.

    The EXIF orientation is honoured, so H and W are those a browser shows. Transparent pixels are
    blended with white, 16-bit grey is scaled (not clipped) to 8 bits, of an animation the first
    frame is taken, colour profiles are ignored.

    Args:
      image: file content, a path, a Pillow image, or a uint8 array [H, W], [H, W, 3] or
        [H, W, 4] (RGBA).
      max_pixels: H * W above which a file is refused by its header, before any pixel is decoded.
        Default 89.5 megapixels; above twice `PIL.Image.MAX_IMAGE_PIXELS` Pillow refuses anyway.

    Raises:
      BadImage: with the reason image_empty (no bytes), image_not_an_image (HTML, unknown or
        unsupported format, array of other shape or dtype), image_truncated (cut off),
        image_damaged (not cut off), image_too_large, or image_too_small (a side below 2 px).
      OSError: if a path cannot be read.
    """
    return np.asarray(load_rgb(image, max_pixels))


def load_rgb(
    image: bytes | np.ndarray | Image.Image | str | os.PathLike,
    max_pixels: int = MAX_PIXELS,
    *,
    shrink_to_px: int | None = None,
) -> np.ndarray | Image.Image:
    """Returns what `decode_image` does, as an array or as an RGB Pillow image, whichever is sooner.

    Saves a copy where only a part is needed. Errors are those of `decode_image`.

    Args:
      image: see `decode_image`.
      max_pixels: see `decode_image`.
      shrink_to_px: a JPEG file is decoded at 1/2, 1/4 or 1/8 of its size as long as no side falls
        below this; None decodes all of it.
    """
    if isinstance(image, np.ndarray):
        return _check_array(image, max_pixels)
    if isinstance(image, Image.Image):
        _check_size(image.size, max_pixels)
        return _to_rgb(image)
    if isinstance(image, str | os.PathLike):
        with open(image, "rb") as file:
            image = file.read()
    if not isinstance(image, bytes):
        raise BadImage(
            "image_not_an_image",
            "An image is bytes, a path, a Pillow image or a uint8 array, not "
            f"{type(image).__name__}.",
        )
    if simplejpeg and not shrink_to_px and jpeg.plain_size(image, max_pixels):
        with contextlib.suppress(ValueError):  # damaged, however little
            return simplejpeg.decode_jpeg(image)
    with _open(image) as opened:
        _check_size(opened.size, max_pixels)
        if shrink_to_px:
            opened.draft(None, (shrink_to_px, shrink_to_px))  # no JPEG: does nothing
        elif (pixels := _simple_jpeg(image, opened)) is not None:
            return pixels
        try:
            return _to_rgb(opened)
        except BadImage as error:
            if error.reason == "image_damaged" and _is_cut_off(image, error.__cause__):
                raise BadImage("image_truncated", f"Cut off: {error}") from error
            raise


def resize(image: np.ndarray, size_px: int, method: str) -> np.ndarray:
    """Returns the image as uint8 [size_px, size_px, 3], its aspect ratio lost.

    Returns the image itself if it has that size.

    Args:
      image: uint8 [H, W, 3].
      size_px: side of the result.
      method: "pil" is Pillow's bilinear filter, which averages when it shrinks, as in the Hugging
        Face image processor. "tf" interpolates between the 2x2 nearest pixels whatever the factor,
        as tf.image.resize in COYO-ALIGN does; rounding to uint8 moves it by up to 0.5 grey levels.

    Raises:
      ValueError: if the method is unknown.
    """
    _check_method(method)
    if image.shape[:2] == (size_px, size_px):
        return image
    every = np.arange(size_px)
    if method == "tf":
        out = np.empty((size_px, size_px, 3), np.uint8)
        return _resize_tf(image, size_px, every, every, out)
    return np.asarray(_resize_pil(image, size_px))


def train_view(
    image: bytes | np.ndarray | Image.Image | str | os.PathLike,
    *,
    resize_px: int,
    crop_px: int,
    method: str,
    rng: np.random.Generator,
    flip: bool,
    decode: str = "full",
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Returns uint8 [crop_px, crop_px, 3]: resized, cropped at random, mirrored half of the time.

    The same as `decode_image`, `resize` and cutting out, bit for bit, but sooner.

    Args:
      image: what `decode_image` takes, or what `load_rgb` made of it.
      resize_px: side before the crop (paper: 346).
      crop_px: side of the crop, uniform over all positions (paper: 289).
      method: see `resize`.
      rng: always gives three draws (row, column, mirrored), so `flip` does not move the crops.
      flip: whether to mirror; off where captions say left and right.
      decode: "full", or "reduced": a JPEG file is decoded at 1/2, 1/4 or 1/8 of its size where
        that leaves at least twice `resize_px`. Twice as fast on photos of 6 megapixels, and within
        a few grey levels (docs/input.md), but only with "pil": "tf" looks at single pixels.
      out: contiguous; receives the view and is returned. Default: a new array.

    Raises:
      BadImage: see `decode_image`.
      ValueError: if crop_px exceeds resize_px, or on an unknown method or decode.

    Source: Jia et al. 2021, pre-training recipe; COYO-ALIGN for the lost aspect ratio.
    """
    _check_view(resize_px, crop_px, method)
    check_decode(decode, method)
    # One by one they are what size=2 gives, in half of the time.
    top, left = (int(rng.integers(resize_px - crop_px + 1)) for _ in range(2))
    mirrored = rng.random() < 0.5 and flip
    out = np.empty((crop_px, crop_px, 3), np.uint8) if out is None else out
    size = resize_px, resize_px
    if simplejpeg and decode == "full" and isinstance(image, bytes):
        if jpeg.plain_size(image, MAX_PIXELS) == size:
            if jpeg.cut_out(image, size, top, left, mirrored, out):
                return out
    image = load_rgb(
        image, shrink_to_px=REDUCED_MARGIN * resize_px if decode == "reduced" else None
    )
    return _view(image, resize_px, top, left, method, mirrored, out)


def eval_view(
    image: bytes | np.ndarray | Image.Image | str | os.PathLike,
    *,
    resize_px: int,
    crop_px: int,
    method: str,
) -> np.ndarray:
    """Returns uint8 [crop_px, crop_px, 3]: resized, central crop at offset (resize - crop) // 2.

    Arguments and errors are those of `train_view`.
    """
    _check_view(resize_px, crop_px, method)
    start = (resize_px - crop_px) // 2
    out = np.empty((crop_px, crop_px, 3), np.uint8)
    return _view(load_rgb(image), resize_px, start, start, method, False, out)


def check_decode(decode: str, method: str) -> None:
    """Raises ValueError unless `train_view` can decode so and resize by that method."""
    if decode not in DECODE_METHODS:
        raise ValueError(f"config.data.decode={decode!r} is unknown; use 'full' or 'reduced'.")
    if decode == "reduced" and method != "pil":
        raise ValueError(
            f"config.data.decode='reduced' would change what config.data.resize={method!r} sees; "
            "use config.data.resize='pil', or decode='full'."
        )


def _check_method(method: str) -> None:
    if method not in RESIZE_METHODS:
        raise ValueError(f"config.data.resize={method!r} is unknown; use 'pil' or 'tf'.")


def _check_view(resize_px: int, crop_px: int, method: str) -> None:
    _check_method(method)
    if not 1 <= crop_px <= resize_px:
        raise ValueError(
            f"config.data.image_size={crop_px} is the crop and must not exceed "
            f"config.data.resize_size={resize_px}."
        )


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise BadImage(
            "image_too_large", f"{width} x {height} pixels; the limit is {max_pixels:,} in all."
        )
    if min(width, height) < _MIN_SIDE_PX:
        raise BadImage(
            "image_too_small", f"{width} x {height} pixels; the least is {_MIN_SIDE_PX} a side."
        )


def _check_array(image: np.ndarray, max_pixels: int) -> None:
    channels = image.shape[2:]
    if image.dtype != np.uint8 or image.ndim < 2 or channels not in ((), (3,), (4,)):
        raise BadImage(
            "image_not_an_image",
            f"An image array is uint8 [H, W], [H, W, 3] or [H, W, 4], not {image.dtype} "
            f"{list(image.shape)}.",
        )
    _check_size(image.shape[1::-1], max_pixels)
    return image if channels == (3,) else _to_rgb(Image.fromarray(image))


def _open(data: bytes) -> Image.Image:
    if not data:
        raise BadImage("image_empty", "The file is empty.")
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage("image_too_large", str(error)) from error
    except Exception as error:  # plugins leak every kind of error on damaged headers
        if data.startswith(_SIGNATURES):
            if _is_cut_off(data, error):
                raise BadImage("image_truncated", "Cut off in the image header.") from error
            raise BadImage("image_damaged", "The image header is damaged.") from error
        if isinstance(error, UnidentifiedImageError):
            raise BadImage("image_not_an_image", "Not an image of a known format.") from error
        raise BadImage("image_not_an_image", f"Not a readable image ({error}).") from error


def _is_cut_off(data: bytes, error: Exception) -> bool:
    """Whether the end of a file is missing, rather than damaged, for which it does not decode."""
    if data.startswith(b"\xff\xd8"):
        return _is_cut_off_jpeg(data)
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-_TAIL_BYTES:]
    if data.startswith(b"RIFF"):
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data.startswith(b"GIF8"):
        return not data.rstrip(b"\0").endswith(b";")
    return "truncated" in str(error) or isinstance(error, EOFError)


def _is_cut_off_jpeg(data: bytes) -> bool:
    position = 2
    while position + 4 <= len(data):
        mark, kind = data[position : position + 2]
        if mark != 0xFF or kind == 0:
            return False  # what stands here is no segment
        if kind == 0xDA:  # the pixels follow
            break
        position += 2 + int.from_bytes(data[position + 2 : position + 4]) if kind != 0xFF else 1
    return b"\xff\xd9" not in data[-_TAIL_BYTES:]  # appendices may follow the mark of the end


def _simple_jpeg(data: bytes, opened: Image.Image) -> np.ndarray | None:
    """The pixels of a sound, upright RGB JPEG file; else None, for Pillow to do what it does."""
    if simplejpeg is None or (opened.format, opened.mode) != ("JPEG", "RGB"):
        return None
    if _orientation(opened) in _TRANSPOSES:
        return None
    try:
        return simplejpeg.decode_jpeg(data)
    except ValueError:  # as strict as it can be: whatever libjpeg warns of
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    try:
        image.load()
        orientation = _orientation(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = _scale_to_8_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        if image.mode != "RGB":  # else it would be copied
            image = image.convert("RGB")
    except Image.DecompressionBombError as error:  # e.g. an .ico whose header lies
        raise BadImage("image_too_large", str(error)) from error
    except Exception as error:  # decoders leak every kind of error on damaged data
        raise BadImage("image_damaged", f"The image does not decode ({error}).") from error
    if orientation in _TRANSPOSES:
        image = image.transpose(_TRANSPOSES[orientation])
        image.info = {}  # or it would be turned again
    return image


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata must not cost a good picture
        return None


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits; integers span 16 bits unless larger values occur."""
    grey = np.nan_to_num(np.asarray(image, np.float32)).clip(0)
    brightest = grey.max()
    if image.mode == "F":
        top = next((top for top in (1.0, 255.0, 65535.0) if brightest <= top), brightest)
    else:
        top = max(65535.0, brightest)
    return Image.fromarray(np.rint(grey * (255 / top)).astype(np.uint8))


def _view(
    image: np.ndarray | Image.Image,
    size_px: int,
    top: int,
    left: int,
    method: str,
    mirrored: bool,
    out: np.ndarray,
) -> np.ndarray:
    """Returns `out`, uint8 [S, S, 3], after a window of the image resized to a square."""
    crop_px = len(out)
    height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
    if (height, width) != (size_px, size_px):
        if method == "tf":
            rows, columns = (start + np.arange(crop_px) for start in (top, left))
            columns = columns[::-1] if mirrored else columns
            return _resize_tf(np.asarray(image), size_px, rows, columns, out)
        image = _resize_pil(image, size_px)
    bottom, right = top + crop_px, left + crop_px
    if isinstance(image, np.ndarray):
        image = image[top:bottom, left:right]
        if mirrored:
            for channel in range(3):  # three times as fast as copying image[:, ::-1]
                out[:, :, channel] = image[:, ::-1, channel]
            return out
    else:
        image = image.crop((left, top, right, bottom))
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    out[...] = image
    return out


def _resize_pil(image: np.ndarray | Image.Image, size_px: int) -> Image.Image:
    # Pillow can also make a part alone (box=...), but takes its corners as float32: a value in 300
    # is then off by one or two.
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return image.resize((size_px, size_px), Image.Resampling.BILINEAR)


def _resize_tf(
    image: np.ndarray, size_px: int, rows: np.ndarray, columns: np.ndarray, out: np.ndarray
) -> np.ndarray:
    """Returns `out` after those rows and columns, in their order, of the resized image."""
    above, below, row_weights = _neighbours(image.shape[0], size_px, rows)
    left, right, column_weights = _neighbours(image.shape[1], size_px, columns)
    channels = np.arange(3)
    left, right = ((3 * x[:, None] + channels).ravel() for x in (left, right))
    column_weights, row_weights = np.repeat(column_weights, 3), row_weights[:, None]
    image = image.reshape(len(image), -1)  # [H, W * 3]
    resized = out.reshape(len(rows), 3 * len(columns))
    # In place and a few rows at a time: touching fresh memory is slower than the arithmetic.
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        block = slice(start, start + _ROWS_AT_A_TIME)
        needed = np.concatenate([above[block], below[block]])
        needed, where = np.unique(needed, return_inverse=True)
        where_above, where_below = np.split(where, 2)
        lines = image[needed]
        first = lines.take(left, axis=1).astype(np.float32)
        blended = lines.take(right, axis=1) - first
        blended *= column_weights
        blended += first  # [R, S * 3]
        first, blended = blended[where_above], blended[where_below]
        blended -= first
        blended *= row_weights[block]
        blended += first
        resized[block] = np.rint(blended, out=blended)
    return out


def _neighbours(
    size_in: int, size_out: int, which: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each output pixel of `which` the two nearest input pixels and the second's weight."""
    centre = (which + 0.5) * (size_in / size_out) - 0.5
    first = np.floor(centre)
    weight = (centre - first).astype(np.float32)
    last = size_in - 1
    return (
        first.clip(0, last).astype(int),
        np.ceil(centre).clip(0, last).astype(int),
        weight,
    )
