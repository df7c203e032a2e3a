"""The gallery of docs/search.md: three queries of each kind, at even distances, in one picture.

Run: python experiments/search_gallery.py --model runs/quickstart --index photos
        --queries 'scenes?size=300&seed=8' --out docs/images/search.png
"""

import argparse

import numpy as np

import align_jax
from align_jax.data.images import decode_image
from align_jax.data.sources.open_source import open_source
from align_jax.evals.composed import composed_scenes
from align_jax.search import ingest, sheet

PER_KIND, HITS = 3, 5


def main() -> None:
    """Draws text to image, image to text, and image with a change of colour."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--index", required=True, help="images and texts, `align index add --kind both`"
    )
    parser.add_argument("--queries", required=True, help="pairs that are not in the index")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    model = align_jax.load(args.model)
    source = open_source(args.queries)
    numbers = ((np.arange(PER_KIND) + 0.5) * len(source) / PER_KIND).astype(int)
    records = [source[int(number)] for number in numbers]
    changes = composed_scenes(0, PER_KIND)
    asked = []
    with align_jax.open_index(args.index, model) as index:
        images, texts = ({"k": HITS, "filter": {"kind": kind}} for kind in ("image", "text"))
        for record in records:
            text = record.captions[0]
            asked.append(sheet.Asked(text, None, index.search(text=text, **images)))
        for record in records:
            hits = index.search(image=record.image, **texts)
            asked.append(sheet.Asked("", decode_image(record.image), hits))
        for picture, new, old in zip(changes.pictures, changes.new, changes.old, strict=True):
            hits = index.search(image=picture, add=[new], remove=[old], **images)
            asked.append(sheet.Asked(f"+ {new}\n− {old}", picture, hits))
    title = f"{PER_KIND} queries of each kind, none chosen by hand, among {args.index}"
    sheet.draw_sheet(args.out, title, asked, ingest.Pictures().read)


if __name__ == "__main__":
    main()
