"""Changes of training views: brightness, contrast, saturation, pictures in grey, lost detail."""

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


def lose_detail(view: np.ndarray, *, share: float, rng: np.random.Generator) -> np.ndarray:
    """Returns uint8 [S, S, 3]: now and then as if it came from a smaller picture.

    It is reduced to a side drawn uniformly from S/2 to S pixels and enlarged again, both bilinear.

    Args:
      view: uint8 [S, S, 3].
      share: of the views that lose detail, in [0, 1].
      rng: always gives two draws.

    Source: Downscale of Albumentations (Buslaev et al. 2020), of half the size or more.
    """
    is_reduced, size = rng.random() < share, len(view)
    side = round(size * (1 + rng.random()) / 2)
    if not is_reduced:
        return view
    image = Image.fromarray(view)
    for new in (side, size):
        image = image.resize((new, new), Image.Resampling.BILINEAR)
    return np.array(image)
