"""The view of classifiers in training: a part of random area and shape, scaled to a square."""

import math
import os

import numpy as np
from PIL import Image

from align_jax.data import images

_TRIES, _LOG_ASPECT = 10, math.log(4 / 3)


def inception_view(
    image: bytes | np.ndarray | Image.Image | str | os.PathLike,
    *,
    crop_px: int,
    min_area: float,
    method: str,
    rng: np.random.Generator,
    flip: bool,
) -> np.ndarray:
    """Returns uint8 [crop_px, crop_px, 3]: a part of random area and shape, scaled to a square.

    Area uniform between `min_area` and all of the image, aspect ratio log-uniform between 3/4 and
    4/3, position uniform. A part that does not fit is drawn again; after ten, the largest central
    part of an allowed shape is taken. Mirrored half of the time.

    Args:
      image: what `images.decode_image` takes.
      crop_px: side of the result.
      min_area: share of the image's pixels, in (0, 1].
      method: see `images.resize`.
      rng: as many draws as parts are tried, three times, and one for mirroring.
      flip: whether to mirror.

    Raises:
      BadImage: see `images.decode_image`.
      ValueError: on an unknown method.

    Source: Szegedy et al. 2015, in the form of torchvision's RandomResizedCrop.
    """
    image = images.decode_image(image)
    top, left, height, width = draw_part(*image.shape[:2], min_area, rng)
    part = images.resize(image[top : top + height, left : left + width], crop_px, method)
    if flip and rng.random() < 0.5:
        part = part[:, ::-1]
    return np.ascontiguousarray(part)


def draw_part(
    height: int, width: int, min_area: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Returns (top, left, height, width) of a part of an image, see `inception_view`."""
    for _ in range(_TRIES):
        area = height * width * rng.uniform(min_area, 1.0)
        aspect = math.exp(rng.uniform(-_LOG_ASPECT, _LOG_ASPECT))
        place = rng.random(2)
        part_width = round(math.sqrt(area * aspect))
        part_height = round(math.sqrt(area / aspect))
        if 0 < part_width <= width and 0 < part_height <= height:
            top = int(place[0] * (height - part_height + 1))
            left = int(place[1] * (width - part_width + 1))
            return top, left, part_height, part_width
    most = math.exp(_LOG_ASPECT)
    part_height, part_width = min(height, round(width * most)), min(width, round(height * most))
    return (height - part_height) // 2, (width - part_width) // 2, part_height, part_width
