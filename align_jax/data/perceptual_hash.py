"""64-bit perceptual hashes of images and of copies that people make of them, and exact search.

The hash is the one of the `imagehash` library (`phash`, hash_size 8, highfreq_factor 4), bit for
bit; COYO's column `image_phash` has its form, 16 hexadecimal digits.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import scipy.fft
from PIL import Image

MAX_DISTANCE = 16  # unrelated photos come this close by chance
MAX_PAIRS = 20_000_000

_CROPS, _BORDER = (0.05, 0.1, 0.17), 0.05  # shares of width and height, on each side
_ALTERED = (
    "as it is",
    *(f"{share:.0%} cropped" for share in _CROPS),
    "centre square",
    "black border",
    "white border",
    "letterbox",
)
COPIES = (*_ALTERED, *(f"mirrored, {name}" for name in _ALTERED))

_BITS = 64
_HASH_SIDE, _GREY_SIDE_PX = 8, 32
_CANDIDATES = 2**21  # looked at together; bounds the memory


def phash(image: np.ndarray) -> str:
    """Returns the perceptual hash of an image as 16 hexadecimal digits.

    The signs, against their median, of the 8 x 8 lowest frequencies of the image at 32 x 32 grey
    pixels: resizing, re-encoding and small changes of colour flip few of them.

    Args:
      image: uint8 RGB [H, W, 3], e.g. of images.decode_image.

    Source: imagehash.phash, after N. Krawetz, "Looks Like It" (2011).
    """
    return _hash_grey(_grey(image))


def phash_copies(image: np.ndarray) -> list[str]:
    """Returns the hashes of 16 copies of an image as people make them, in the order of COPIES.

    The image as it is, cropped by 5, 10 and 17 % on each side, its centre square, with a black and
    a white border of 5 %, in black bars that make it square; then all of these mirrored.

    Args:
      image: uint8 RGB [H, W, 3].
    """
    greys = [_grey(copy) for copy in (image, *_altered(image))]
    return [_hash_grey(grey) for grey in [*greys, *(grey[:, ::-1] for grey in greys)]]


def parse_hashes(texts: Sequence[str]) -> np.ndarray:
    """Returns the hashes, uint64 [N], of texts of 16 hexadecimal digits.

    Raises:
      ValueError: a text is of another form; names it.
    """
    joined = "".join(texts)
    try:
        if len(joined) != 16 * len(texts):
            raise ValueError
        hashes = np.frombuffer(bytes.fromhex(joined), ">u8").astype(np.uint64)
    except ValueError:
        hashes = None
    if hashes is None or any(len(text) != 16 for text in texts):
        wrong = next(text for text in texts if not _is_hash(text))
        raise ValueError(f"{wrong!r} is no perceptual hash; one has 16 hexadecimal digits.")
    return hashes


def hamming_pairs(
    left: np.ndarray, right: np.ndarray, max_distance: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns all pairs of hashes that differ in at most `max_distance` bits; exact.

    Two hashes within distance d differ in at most d // m bits in one of m bands of bits, so only
    hashes with a similar band are compared; m is the number that makes fewest comparisons.

    Args:
      left: uint64 [N].
      right: uint64 [M].
      max_distance: 0 to MAX_DISTANCE.

    Returns:
      Rows of `left` and rows of `right`, int64 [P], and distances, uint8 [P], in order of rows.

    Raises:
      ValueError: a distance out of range, or more than MAX_PAIRS pairs.

    Source: multi-index hashing, Norouzi, Punjani, Fleet 2012.
    """
    check_distance(max_distance)
    bands = _bands(len(left), len(right), max_distance)
    radius = max_distance // len(bands)
    found, num_found = [], 0
    for number, band in enumerate(bands):
        for i, j in _similar_in_band(_band_values(left, band), _band_values(right, band), radius):
            differing = left[i] ^ right[j]
            near = np.flatnonzero(np.bitwise_count(differing) <= max_distance)
            # An earlier band has found those that are similar there too.
            for earlier in bands[:number]:
                there = np.bitwise_count(_band_values(differing[near], earlier))
                near = near[there > radius]
            found.append((i[near], j[near], np.bitwise_count(differing[near])))
            num_found += len(near)
            if num_found > MAX_PAIRS:
                raise ValueError(
                    f"More than {MAX_PAIRS:,} pairs of images are within distance "
                    f"{max_distance}; choose a smaller one."
                )
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint8)
    i, j, distance = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((j, i))
    return i[order], j[order], distance[order]


def expand_ranges(
    starts: np.ndarray, counts: np.ndarray, limit: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields rows r and all positions starts[r] ... starts[r] + counts[r] - 1, in blocks.

    A block has at most `limit` positions, or those of one row. All arrays are int64 [N].
    """
    rows = np.flatnonzero(counts)
    ends = np.cumsum(counts[rows])
    begin = 0
    while begin < len(rows):
        before = ends[begin - 1] if begin else 0
        stop = max(begin + 1, int(np.searchsorted(ends, before + limit, "right")))
        repeats = counts[rows[begin:stop]]
        row = np.repeat(rows[begin:stop], repeats)
        within = np.arange(len(row)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        yield row, starts[row] + within
        begin = stop


def check_distance(max_distance: int) -> None:
    """Raises ValueError if `max_distance` cannot be searched for."""
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise ValueError(
            f"--max-distance {max_distance} must be 0 to {MAX_DISTANCE} of the {_BITS} bits."
        )


def _grey(image: np.ndarray) -> np.ndarray:
    """Returns an image as uint8 [32, 32]."""
    grey = Image.fromarray(image).convert("L")
    return np.asarray(grey.resize((_GREY_SIDE_PX, _GREY_SIDE_PX), Image.Resampling.LANCZOS))


def _hash_grey(grey: np.ndarray) -> str:
    frequencies = scipy.fft.dct(scipy.fft.dct(grey, axis=0), axis=1)
    low = frequencies[:_HASH_SIDE, :_HASH_SIDE]
    return np.packbits(low > np.median(low)).tobytes().hex()


def _altered(image: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the copies of COPIES between "as it is" and the mirrored ones."""
    height, width, _ = image.shape
    for share in _CROPS:
        y, x = round(height * share), round(width * share)
        yield image[y : height - y, x : width - x]
    side = min(height, width)
    y, x = (height - side) // 2, (width - side) // 2
    yield image[y : y + side, x : x + side]
    y, x = (max(1, round(size * _BORDER)) for size in (height, width))
    for shade in (0, 255):
        yield np.pad(image, ((y, y), (x, x), (0, 0)), constant_values=shade)
    missing = max(height, width) - np.array([height, width])
    (top, left), (bottom, right) = missing // 2, missing - missing // 2
    yield np.pad(image, ((top, bottom), (left, right), (0, 0)))


def _is_hash(text: str) -> bool:
    return len(text) == 16 and all(digit in "0123456789abcdefABCDEF" for digit in text)


def _bands(num_left: int, num_right: int, max_distance: int) -> list[tuple[int, int]]:
    """(lowest bit, width) of each band, for the fewest look-ups and comparisons."""

    def cost(count: int) -> float:
        width = _BITS // count
        flips = sum(math.comb(width, n) for n in range(max_distance // count + 1))
        return num_left * count * flips * (1 + num_right / 2**width)

    count = min(range(4, _BITS // 2), key=cost)  # 4: a table of 2**16 for each band
    edges = [_BITS * k // count for k in range(count + 1)]
    return [(low, high - low) for low, high in zip(edges, edges[1:], strict=False)]


def _band_values(hashes: np.ndarray, band: tuple[int, int]) -> np.ndarray:
    """Returns uint64 [N], the bits of the band."""
    low, width = band
    return (hashes >> np.uint64(low)) & np.uint64(2**width - 1)


def _similar_in_band(
    left: np.ndarray, right: np.ndarray, radius: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows (i, j) whose bands differ in at most `radius` bits, each once, a block at a time."""
    width = int(max(left.max(initial=0), right.max(initial=0))).bit_length()
    left, right = left.astype(np.int64), right.astype(np.int64)
    order = np.argsort(right, kind="stable")
    starts = np.searchsorted(right[order], np.arange(2**width + 1))
    for flips in _masks(width, radius):
        values = left ^ flips
        counts = starts[values + 1] - starts[values]
        for i, at in expand_ranges(starts[values], counts, _CANDIDATES):
            yield i, order[at]


def _masks(width: int, radius: int) -> list[int]:
    """Returns all numbers of `width` bits of which at most `radius` are set."""
    masks = [0]
    for _ in range(radius):
        masks += [mask ^ (1 << bit) for mask in masks for bit in range(width)]
        masks = list(dict.fromkeys(masks))
    return masks
