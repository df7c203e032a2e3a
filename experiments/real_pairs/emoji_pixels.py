"""How well pixels alone find an emoji drawn by another vendor, beside a model's image embeddings.

python experiments/real_pairs/emoji_pixels.py 'data/real_pairs/emoji?split=train' \\
    'data/real_pairs/emoji?split=openmoji' [--model runs/real_pairs]

Prints R@1, 5 and 10 in % of each image of the second source among those of the first, by key.
"""

import argparse

import numpy as np
from PIL import Image

import align_jax
from align_jax.data.images import decode_image
from align_jax.data.sources.open_source import open_source

SIDE = 12  # pixels to which a drawing is reduced; 6 to 16 find within 2 points of it


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("known", help="source, e.g. 'data/real_pairs/emoji?split=train'")
    parser.add_argument("asked", help="source of the same keys drawn by another")
    parser.add_argument("--model", help="workdir or folder, see `align_jax.load`")
    args = parser.parse_args()
    known, asked = map(drawings_of, (args.known, args.asked))
    keys = sorted(known.keys() & asked.keys())
    counts = f"{len(keys):,} keys of {len(known):,} and {len(asked):,}"
    print(f"{counts}; chance of R@10 {1000 / len(keys):.1f}")
    sides = [[drawings[key] for key in keys] for drawings in (known, asked)]
    report("pixels", *(np.stack([*map(reduced, images)]) for images in sides))
    if args.model:
        model = align_jax.load(args.model)
        report("model", *(model.encode_image(images) for images in sides))


def drawings_of(spec: str) -> dict[str, np.ndarray]:
    """Returns key -> uint8 [H, W, 3]."""
    source = open_source(spec)
    records = (source[index] for index in range(len(source)))
    return {record.key: decode_image(record.image) for record in records}


def reduced(image: np.ndarray) -> np.ndarray:
    """Returns float64 [SIDE * SIDE * 3]: what is not white of uint8 [H, W, 3], scaled."""
    rows, columns = np.nonzero((image < 250).any(-1))
    if len(rows):
        image = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    small = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.float64).ravel()


def report(name: str, known: np.ndarray, asked: np.ndarray) -> None:
    """Prints the recalls of [N, D] vectors of equal rows, by cosine after centring each side."""
    known, asked = (side - side.mean(0) for side in (known, asked))
    known, asked = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (known, asked))
    cosine = asked @ known.T
    rank = (cosine > np.diag(cosine)[:, None]).sum(1)
    print(f"{name:7}", *(f"R@{k} {100 * np.mean(rank < k):.1f}" for k in (1, 5, 10)), sep="  ")


if __name__ == "__main__":
    main()
