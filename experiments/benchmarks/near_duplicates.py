"""Which copies of evaluation images are found among training images, and what that costs.

python experiments/benchmarks/near_duplicates.py 'dev.jsonl?images=dev.zip&max=500' \
    --train 'cc3m.jsonl?images=cc3m.zip' --train 'train.jsonl?images=train.zip' --model RUN

For each kind of copy: the share missed by the hash of the image as it is and by the hashes of its
16 copies, at 8 bits. With --model also by the cosine of embeddings, and by both together: the least
cosine is that above which a part of the training images, 0.1 and 1 %, has one of the evaluation
images though nobody copied it. Then the training images that match: what a decontamination would
lose.
"""

import argparse
import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

import align_jax
from align_jax.align import Align
from align_jax.data.images import decode_image
from align_jax.data.perceptual_hash import COPIES, hamming_pairs, parse_hashes, phash, phash_copies
from align_jax.data.sources.open_source import open_source

MAX_DISTANCE = 8
LOST = (0.001, 0.01)  # parts of the training images that the least cosines may cost
ASPECT = 1.5  # of photos that the source holds squashed to a square


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("evaluation", help="pairs, see `align pack`")
    parser.add_argument("--train", action="append", default=[], metavar="PAIRS")
    parser.add_argument("--model", help="whose image embeddings are compared too")
    args = parser.parse_args()
    images = [_stretch(image) for image in _read(args.evaluation)]
    of_copies = np.array([parse_hashes(phash_copies(np.asarray(image))) for image in images])
    model = align_jax.load(args.model) if args.model else None
    z = _embed(model, images)
    found = {spec: _compare(_read(spec), of_copies, model, z) for spec in args.train}
    columns, cosines = ["as it is", f"{len(COPIES)} copies"], []
    if model:
        nearest = np.sort(np.concatenate([near for *_, near in found.values()]))
        cosines = [nearest[len(nearest) - 1 - int(part * len(nearest))] for part in LOST]
        for cosine in cosines:
            columns += [f"cos > {cosine:.4f}", "either"]

    def row(title: str, bits: np.ndarray, near: np.ndarray | None, lost: bool = False) -> None:
        matched = [bits[:, 0] <= MAX_DISTANCE, bits[:, 1] <= MAX_DISTANCE]
        for cosine in cosines:
            matched += [near > cosine, matched[1] | (near > cosine)]
        cells = [f"{m.sum():14,}" if lost else f"{100 * (1 - m.mean()):14.1f}" for m in matched]
        print(f"{title:44}", *cells, flush=True)

    print(f"{f'% missed of {len(images)}':44}", *(f"{column:>14}" for column in columns))
    for name, alter in MADE.items():
        copies = [alter(image) for image in images]
        hashes = parse_hashes([phash(np.asarray(copy)) for copy in copies])
        bits = np.bitwise_count(of_copies ^ hashes[:, None])
        near = (z * _embed(model, copies)).sum(axis=1) if model else None
        row(name, np.stack([bits[:, 0], bits.min(axis=1)], axis=1), near)
    for spec, (bits, near) in found.items():
        row(f"lost of {len(bits):,}: {spec.partition('?')[0][-20:]}", bits, near, lost=True)


def _compare(
    train: list[Image.Image], of_copies: np.ndarray, model: Align | None, z: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the least bits to an image as it is and to one of its copies, [N, 2], and cosines."""
    hashes = parse_hashes([phash(np.asarray(image)) for image in train])
    bits = np.full((len(train), 2), 64)
    for column, those in enumerate((of_copies[:, 0], of_copies)):
        rows, _, distances = hamming_pairs(hashes, those.ravel(), MAX_DISTANCE)
        np.minimum.at(bits[:, column], rows, distances)
    return bits, (_embed(model, train) @ z.T).max(axis=1) if model else None


def _read(spec: str) -> list[Image.Image]:
    source = open_source(spec)
    return [Image.fromarray(decode_image(source[n].image)) for n in range(len(source))]


def _embed(model: Align | None, images: list[Image.Image]) -> np.ndarray | None:
    return None if model is None else model.encode_image([image.convert("RGB") for image in images])


def _stretch(image: Image.Image) -> Image.Image:
    """A photo that was squashed to a square, as a photo of 3:2."""
    if image.width != image.height:
        return image
    return image.resize((round(image.height * ASPECT), image.height), Image.Resampling.BICUBIC)


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.fromarray(decode_image(file.getvalue()))


def _scaled(image: Image.Image, width: float, height: float) -> Image.Image:
    size = (max(2, round(image.width * width)), max(2, round(image.height * height)))
    return image.resize(size, Image.Resampling.BICUBIC)


def _cropped(
    image: Image.Image, left: float, top: float, right: float, bottom: float
) -> Image.Image:
    """Without these shares of width and height."""
    width, height = image.size
    box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
    return image.crop(tuple(round(edge) for edge in box))


def _inside(image: Image.Image, share: float) -> Image.Image:
    return _cropped(image, share, share, share, share)


def _square(image: Image.Image) -> Image.Image:
    share = (1 - image.height / image.width) / 2
    return _cropped(image, share, 0, share, 0)


def _padded(image: Image.Image, x: float, y: float, colour: str) -> Image.Image:
    """With bars of these shares of width and height on both sides."""
    x, y = round(x * image.width), round(y * image.height)
    canvas = Image.new("RGB", (image.width + 2 * x, image.height + 2 * y), colour)
    canvas.paste(image, (x, y))
    return canvas


def _captioned(image: Image.Image) -> Image.Image:
    """With a white bar of 15 % of the height below, and text in it."""
    bar = round(0.15 * image.height)
    canvas = Image.new("RGB", (image.width, image.height + bar), "white")
    canvas.paste(image, (0, 0))
    ImageDraw.Draw(canvas).text((5, image.height + 4), "WHEN IT IS MONDAY AGAIN", "black")
    return canvas


def _mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


MADE: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG quality 30": lambda image: _jpeg(image, 30),
    "half the size": lambda image: _scaled(image, 0.5, 0.5),
    "squashed to a square": lambda image: _scaled(image, 1 / ASPECT, 1),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "20 % brighter": lambda image: image.point(lambda value: min(255, round(value * 1.2))),
    "2.5 % cropped on each side": lambda image: _inside(image, 0.025),
    "5 % cropped": lambda image: _inside(image, 0.05),
    "7.5 % cropped": lambda image: _inside(image, 0.075),
    "10 % cropped": lambda image: _inside(image, 0.1),
    "13 % cropped": lambda image: _inside(image, 0.13),
    "17 % cropped": lambda image: _inside(image, 0.17),
    "20 % cropped": lambda image: _inside(image, 0.2),
    "centre square": _square,
    "black border of 5 %": lambda image: _padded(image, 0.05, 0.05, "black"),
    "white border of 5 %": lambda image: _padded(image, 0.05, 0.05, "white"),
    "black border of 3 %": lambda image: _padded(image, 0.03, 0.03, "black"),
    "white border of 8 %": lambda image: _padded(image, 0.08, 0.08, "white"),
    "letterbox, black, to a square": lambda image: _padded(image, 0, (ASPECT - 1) / 2, "black"),
    "letterbox, white, to a square": lambda image: _padded(image, 0, (ASPECT - 1) / 2, "white"),
    "letterbox, black, to 4:3": lambda image: _padded(image, 0, 0.0625, "black"),
    "mirrored": _mirrored,
    "mirrored, 10 % cropped, half, quality 50": lambda image: _jpeg(
        _scaled(_inside(_mirrored(image), 0.1), 0.5, 0.5), 50
    ),
    "mirrored, centre square": lambda image: _square(_mirrored(image)),
    "caption bar of 15 % below": _captioned,
    "5 % cropped on the left": lambda image: _cropped(image, 0.05, 0, 0, 0),
    "10 % cropped on the left": lambda image: _cropped(image, 0.1, 0, 0, 0),
    "20 % cropped on the left": lambda image: _cropped(image, 0.2, 0, 0, 0),
    "20 % cropped at the top": lambda image: _cropped(image, 0, 0.2, 0, 0),
}


if __name__ == "__main__":
    main()
