"""Checks the published logits of kakaobrain/align-base with the weights that you have.

    python experiments/check_golden.py 000000039769.jpg --model kakaobrain/align-base

The picture is number 39769 of COCO val2017 (two cats on a sofa); `--model` is the hub id or a
folder with its files. The values, 9.7093 for "a photo of a cat" and 3.4679 for "a photo of a dog",
are those of the integration test of transformers, with its tolerance of 1e-3.
"""

import argparse
import sys

import numpy as np

import align_jax

TEXTS = ("a photo of a cat", "a photo of a dog")
LOGITS = (9.7093, 3.4679)
TOLERANCE = 1e-3


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", help="000000039769.jpg of COCO val2017")
    parser.add_argument("--model", default="kakaobrain/align-base", help="hub id or folder")
    args = parser.parse_args()
    try:
        model = align_jax.load(args.model)
        z_image = model.encode_image([args.image])
    except (ValueError, OSError) as error:
        sys.exit(f"check_golden: {error}")
    logits = model.similarity(z_image, model.encode_text(TEXTS))[0]
    wrong = np.abs(logits - LOGITS) > TOLERANCE + TOLERANCE * np.abs(LOGITS)
    for text, found, wanted in zip(TEXTS, logits, LOGITS, strict=True):
        print(f"{text}: {found:.4f} (published: {wanted:.4f})")
    sys.exit("differs from the published values" if wrong.any() else None)


if __name__ == "__main__":
    main()
