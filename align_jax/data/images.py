"""Encoded images to uint8 RGB, and the two views of a square crop that the towers are fed with.

Broken files raise `BadImage` with a reason to count by; nothing here logs. Scaling to [-1, 1]
happens on the device. The recipe is the paper's, and COYO-ALIGN's where the paper is silent.

Importing this module silences Pillow's warnings about damaged metadata and oversized images in the
whole process: they come once per crawled file, and no narrower filter is safe between threads.
"""

import io
import os
import warnings

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

BAD_IMAGE_REASONS = (
    "image_empty",
    "image_not_an_image",
    "image_truncated",
    "image_too_large",
    "image_too_small",
)
MAX_PIXELS = 2**28 // 3  # 256 MiB as RGB; Pillow starts to warn at the same size
RESIZE_METHODS = ("pil", "tf")

# Left out on purpose: formats that start a program (EPS) or that no browser shows. Frequent first,
# since Pillow tries them in this order.
_WEB_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "ICO", "JPEG2000", "PPM")
Image.init()
_FORMATS = [name for name in _WEB_FORMATS if name in Image.OPEN]  # those this Pillow can read
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")
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
        unsupported format, array of other shape or dtype), image_truncated (an image, but cut
        off or damaged), image_too_large, or image_too_small (a side below 2 px).
      OSError: if a path cannot be read.
    """
    if isinstance(image, np.ndarray):
        return _decode_array(image, max_pixels)
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
    with _open(image) as opened:
        _check_size(opened.size, max_pixels)
        return _to_rgb(opened)


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
    if method not in RESIZE_METHODS:
        raise ValueError(f"config.data.resize={method!r} is unknown; use 'pil' or 'tf'.")
    if image.shape[:2] == (size_px, size_px):
        return image
    if method == "pil":
        size = (size_px, size_px)
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    return _resize_tf(image, size_px)


def train_view(
    image: np.ndarray,
    *,
    resize_px: int,
    crop_px: int,
    method: str,
    rng: np.random.Generator,
    flip: bool,
) -> np.ndarray:
    """Returns uint8 [crop_px, crop_px, 3]: resized, cropped at random, mirrored half of the time.

    Args:
      image: uint8 [H, W, 3].
      resize_px: side before the crop (paper: 346).
      crop_px: side of the crop, uniform over all positions (paper: 289).
      method: see `resize`.
      rng: always gives three draws (row, column, mirrored), so `flip` does not move the crops.
      flip: whether to mirror; off where captions say left and right.

    Raises:
      ValueError: if crop_px exceeds resize_px or the method is unknown.

    Source: Jia et al. 2021, pre-training recipe; COYO-ALIGN for the lost aspect ratio.
    """
    _check_crop(resize_px, crop_px)
    top, left = rng.integers(resize_px - crop_px + 1, size=2)
    mirrored = rng.random() < 0.5
    image = resize(image, resize_px, method)[top : top + crop_px, left : left + crop_px]
    if flip and mirrored:
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def eval_view(image: np.ndarray, *, resize_px: int, crop_px: int, method: str) -> np.ndarray:
    """Returns uint8 [crop_px, crop_px, 3]: resized, central crop at offset (resize - crop) // 2.

    Arguments and errors are those of `train_view`.
    """
    _check_crop(resize_px, crop_px)
    start = (resize_px - crop_px) // 2
    image = resize(image, resize_px, method)
    return np.ascontiguousarray(image[start : start + crop_px, start : start + crop_px])


def _check_crop(resize_px, crop_px):
    if not 1 <= crop_px <= resize_px:
        raise ValueError(
            f"config.data.image_size={crop_px} is the crop and must not exceed "
            f"config.data.resize_size={resize_px}."
        )


def _check_size(size, max_pixels):
    width, height = size
    if width * height > max_pixels:
        raise BadImage(
            "image_too_large", f"{width} x {height} pixels; the limit is {max_pixels:,} in all."
        )
    if min(width, height) < _MIN_SIDE_PX:
        raise BadImage(
            "image_too_small", f"{width} x {height} pixels; the least is {_MIN_SIDE_PX} a side."
        )


def _decode_array(image, max_pixels):
    channels = image.shape[2:]
    if image.dtype != np.uint8 or image.ndim < 2 or channels not in ((), (3,), (4,)):
        raise BadImage(
            "image_not_an_image",
            f"An image array is uint8 [H, W], [H, W, 3] or [H, W, 4], not {image.dtype} "
            f"{list(image.shape)}.",
        )
    _check_size(image.shape[1::-1], max_pixels)
    return image if channels == (3,) else _to_rgb(Image.fromarray(image))


def _open(data):
    if not data:
        raise BadImage("image_empty", "The file is empty.")
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage("image_too_large", str(error)) from error
    except Exception as error:  # plugins leak every kind of error on damaged headers
        if data.startswith(_SIGNATURES):
            raise BadImage("image_truncated", "The image header is damaged.") from error
        if isinstance(error, UnidentifiedImageError):
            raise BadImage("image_not_an_image", "Not an image of a known format.") from error
        raise BadImage("image_not_an_image", f"Not a readable image ({error}).") from error


def _to_rgb(image):
    try:
        image.load()
        orientation = _orientation(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = _scale_to_8_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        image = image.convert("RGB")
    except Image.DecompressionBombError as error:  # e.g. an .ico whose header lies
        raise BadImage("image_too_large", str(error)) from error
    except Exception as error:  # decoders leak every kind of error on damaged data
        raise BadImage("image_truncated", f"Cut off or damaged ({error}).") from error
    if orientation in _TRANSPOSES:
        image = image.transpose(_TRANSPOSES[orientation])
    return np.asarray(image)


def _orientation(image):
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata must not cost a good picture
        return None


def _scale_to_8_bits(image):
    """Grey of more than 8 bits; integers span 16 bits unless larger values occur."""
    grey = np.nan_to_num(np.asarray(image, np.float32)).clip(0)
    brightest = grey.max()
    if image.mode == "F":
        top = next((top for top in (1.0, 255.0, 65535.0) if brightest <= top), brightest)
    else:
        top = max(65535.0, brightest)
    return Image.fromarray(np.rint(grey * (255 / top)).astype(np.uint8))


def _resize_tf(image, size_px):
    rows, rows_next, row_weights = _neighbours(image.shape[0], size_px)
    columns, columns_next, column_weights = _neighbours(image.shape[1], size_px)
    row_weights, column_weights = row_weights[:, None, None], column_weights[:, None]

    def blend_columns(lines):  # [S, W, 3] -> [S, S, 3]
        left = lines[:, columns].astype(np.float32)
        return left + (lines[:, columns_next] - left) * column_weights

    top, bottom = blend_columns(image[rows]), blend_columns(image[rows_next])
    return np.rint(top + (bottom - top) * row_weights).astype(np.uint8)


def _neighbours(size_in, size_out):
    """For each output pixel the two nearest input pixels and the weight of the second."""
    centre = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
    first = np.floor(centre)
    weight = (centre - first).astype(np.float32)
    last = size_in - 1
    return (
        first.clip(0, last).astype(int),
        np.ceil(centre).clip(0, last).astype(int),
        weight,
    )
