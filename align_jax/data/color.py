"""Changes of colour in training: brightness, contrast, saturation, and pictures in grey."""

import numpy as np
from PIL import Image, ImageEnhance


def change_color(
    view: np.ndarray, *, jitter: float, grayscale: float, rng: np.random.Generator
) -> np.ndarray:
    """Returns uint8 [S, S, 3]: other brightness, contrast and saturation, and grey now and then.

    Each of the three, in this order, mixes the view with its black, its mean grey and its grey
    version: `f * view + (1 - f) * other`, rounded down and clipped to [0, 255], f uniform in
    [1 - jitter, 1 + jitter]. Grey is the luma of ITU-R 601.

    Args:
      view: uint8 [S, S, 3].
      jitter: in [0, 1]; 0 changes nothing.
      grayscale: share of the views that lose all colour, in [0, 1].
      rng: always gives four draws, so that neither number moves the other's.

    Source: the changes of SimCLR (Chen et al. 2020) without hue, in the form of torchvision's
    ColorJitter in a fixed order.
    """
    factors = 1 + jitter * (2 * rng.random(3) - 1)
    is_gray = rng.random() < grayscale
    image = Image.fromarray(view)
    if jitter:
        changes = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for change, factor in zip(changes, factors, strict=True):
            image = change(image).enhance(factor)
    if is_gray:
        image = image.convert("L").convert("RGB")
    return np.array(image)
