"""Pictures for the tests of images, and what files of them hold."""

import io

import numpy as np
from PIL import Image


def photo(height=40, width=60, channels=3, seed=0):
    """Smooth random picture, so that lossy formats stay close to it."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, channels), np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def encode(image, file_format, **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()
