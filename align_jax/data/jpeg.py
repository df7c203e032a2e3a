"""JPEG files without surprises: sound, upright, RGB, decoded by simplejpeg (extra "fast").

It is libjpeg-turbo, as Pillow's, and gives the same pixels sooner.
"""

import threading

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

_START, _FRAMES, _SCAN = b"\xff\xd8", (0xC0, 0xC2), 0xDA  # baseline and progressive
_JFIF, _JFIF_BYTES = b"JFIF\0", 16
_TABLE, _TABLE_BYTES = 0xDB, 65
_FRAME_BYTES, _BITS, _CHANNELS = 17, 8, 3
_WITHOUT_EFFECT = (0xC4, 0xDD, 0xFE)  # Huffman codes, restart interval, comment
_MOST_KEPT = 2**24  # bytes of decoded pixels that a thread keeps, and of their mirror image
_memory = threading.local()


def plain_size(data: bytes, max_pixels: int) -> tuple[int, int] | None:
    """Returns (height, width) of a JPEG file of which Pillow says no more than these, else None.

    Such a file opens in mode RGB, is upright, has no thumbnail, profile or marker of an
    application but JFIF, and is at least 2 px wide and high. Its pixels may be damaged.

    Args:
      data: content of a file.
      max_pixels: None of larger ones, and of those that Pillow warns of.
    """
    if data[:2] != _START:
        return None
    size, position, end = None, 2, len(data) - 4
    while position < end:
        if data[position] != 0xFF:
            return None
        kind, length = data[position + 1], data[position + 2] << 8 | data[position + 3]
        start = position + 4
        if kind == _TABLE:
            tables = range(start, start + length - 2, _TABLE_BYTES)
            if not tables or (length - 2) % _TABLE_BYTES or tables[-1] > end:
                return None
            if any(data[table] > 15 for table in tables):  # of 16 bits, or none
                return None
        elif kind in _FRAMES:
            if size or length != _FRAME_BYTES or start + 6 > end or data[start] != _BITS:
                return None
            if data[start + 5] != _CHANNELS:
                return None
            size = tuple(int.from_bytes(data[s : s + 2]) for s in (start + 1, start + 3))
            limit = min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)
            if min(size) < 2 or size[0] * size[1] > limit:
                return None
        elif kind == _SCAN:
            return size if 2 <= length <= len(data) - start else None
        elif kind == 0xE0:
            if length != _JFIF_BYTES or data[start : start + 5] != _JFIF:
                return None
        elif kind not in _WITHOUT_EFFECT or length < 2:
            return None
        position += 2 + length
    return None


def cut_out(
    data: bytes, size: tuple[int, int], top: int, left: int, mirrored: bool, out: np.ndarray
) -> bool:
    """Writes a window of a picture into `out`, uint8 [h, w, 3], contiguous.

    Args:
      data: content of a JPEG file.
      size: what `plain_size` says of it.
      top: first row of the window.
      left: first column, before mirroring.
      mirrored: whether left and right are exchanged.
      out: as large as the window, and receives it.

    Returns:
      False if the file is damaged however little; `out` is then as it was.
    """
    height, width = size
    window_height, window_width = out.shape[:2]
    pixels, turned = _scratch(3 * height * width)
    try:
        simplejpeg.decode_jpeg(data, "BGR" if mirrored else "RGB", buffer=pixels)
    except ValueError:
        return False
    if not mirrored:
        image = pixels[: 3 * height * width].reshape(height, width, 3)
        out[...] = image[top : top + window_height, left : left + window_width]
        return True
    # Read from its end, the picture of BGR is one of RGB turned by 180 degrees. Words of 8 bytes
    # are exchanged four times as fast as single pixels or channels.
    row_bytes = 3 * width
    start, needed = top * row_bytes, window_height * row_bytes
    words = -(-needed // 8)
    turned = turned[: 8 * words]
    turned.view(">u8")[...] = pixels[start : start + 8 * words].view("<u8")[::-1]
    image = turned[-needed:].reshape(window_height, width, 3)[::-1]
    out[...] = image[:, width - left - window_width : width - left]
    return True


def _scratch(num_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns two arrays of this thread, uint8, of at least so many bytes and a word."""
    if len(getattr(_memory, "arrays", [()])[0]) >= num_bytes + 8:
        return _memory.arrays
    arrays = np.empty(num_bytes + 8, np.uint8), np.empty(num_bytes + 8, np.uint8)
    if num_bytes <= _MOST_KEPT:
        _memory.arrays = arrays
    return arrays
