"""How far perceptual hashes of altered copies and of unrelated images lie apart, and search speed.

python experiments/benchmarks/near_duplicates.py 'dev.jsonl?images=dev.zip&max=1000' \
    'cc3m.jsonl?images=cc3m.zip&max=1000'

For each source: the share of copies missed at each distance in bits; then matches among the pairs
of images of different sources; then times of the exact search among a million made hashes.
"""

import argparse
import io
import itertools
import time

import numpy as np
from PIL import Image

from align_jax.data.images import decode_image
from align_jax.data.perceptual_hash import hamming_pairs, parse_hashes, phash
from align_jax.data.sources.open_source import open_source

DISTANCES = (0, 2, 4, 6, 8, 10, 12)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", help="pairs, see `align pack`")
    args = parser.parse_args()
    print(f"{'% missed at':38}", *(f"{distance:>6}" for distance in DISTANCES))
    hashes = []
    for spec in args.sources:
        source = open_source(spec)
        images = [Image.fromarray(decode_image(source[n].image)) for n in range(len(source))]
        hashes.append(parse_hashes([phash(np.asarray(image)) for image in images]))
        print(source.describe())
        for name, alter in COPIES.items():
            copies = parse_hashes([phash(alter(image)) for image in images])
            bits = np.bitwise_count(hashes[-1] ^ copies)
            missed = [100 * np.mean(bits > distance) for distance in DISTANCES]
            print(f"  {name:36}", *(f"{share:6.1f}" for share in missed))
    pairs = list(itertools.combinations(hashes, 2))
    num_pairs = sum(len(left) * len(right) for left, right in pairs)
    found = [sum(len(hamming_pairs(*pair, d)[0]) for pair in pairs) for d in DISTANCES]
    print(f"{f'matches of {num_pairs:,} unrelated pairs':38}", *(f"{count:6}" for count in found))
    rng = np.random.default_rng(0)
    train, evaluation = (rng.integers(0, 2**64, size, np.uint64) for size in (1_000_000, 5_000))
    for title, other, distance in (("5,000", evaluation, 8), ("themselves", None, 4)):
        start = time.perf_counter()
        hamming_pairs(train, other, distance)
        print(f"1 M hashes, {title}, {distance} bits: {time.perf_counter() - start:.1f} s")


def jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return decode_image(file.getvalue())


def scaled(image, width, height, method=Image.Resampling.BICUBIC):
    size = (max(2, round(image.width * width)), max(2, round(image.height * height)))
    return image.resize(size, method)


def cropped(image, share):
    x, y = round(image.width * share), round(image.height * share)
    return image.crop((x, y, image.width - x, image.height - y))


COPIES = {
    "JPEG quality 75": lambda image: jpeg(image, 75),
    "JPEG quality 30": lambda image: jpeg(image, 30),
    "half the size": lambda image: np.asarray(scaled(image, 0.5, 0.5)),
    "twice the size": lambda image: np.asarray(scaled(image, 2, 2)),
    "squashed to 3:2": lambda image: np.asarray(scaled(image, 0.75, 0.5)),
    "grey": lambda image: np.asarray(image.convert("L").convert("RGB")),
    "20 % brighter": lambda image: (np.asarray(image) * 1.2).clip(0, 255).astype(np.uint8),
    "1 % cropped on each side": lambda image: np.asarray(cropped(image, 0.01)),
    "2.5 % cropped on each side": lambda image: np.asarray(cropped(image, 0.025)),
    "5 % cropped on each side": lambda image: np.asarray(cropped(image, 0.05)),
    "1 % cropped, half size, quality 50": lambda image: jpeg(
        scaled(cropped(image, 0.01), 0.5, 0.5), 50
    ),
}


if __name__ == "__main__":
    main()
