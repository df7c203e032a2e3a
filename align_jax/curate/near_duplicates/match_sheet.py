"""A sheet of matched pictures, for a human to judge: each pair side by side, with its distance."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from align_jax.curate.near_duplicates.image_sets import ImageSet
from align_jax.curate.scan import open_any
from align_jax.data.images import decode_image

_THUMB_PX, _GAP_PX, _LINE_PX = 128, 12, 13
_COLUMNS = 4  # pairs in a row
_LINE_LETTERS, _MOST_LINES = 20, 5  # of a key, whose end is shown if it is longer


class Pictures:
    """The pictures of a scanned set, by row; ValueError if no scan says where they are."""

    def __init__(self, images: ImageSet):
        """Opens the source that was scanned."""
        if images.scan is None:
            raise ValueError(f"--sheet needs a table of `align scan`, which {images.name} is not.")
        self._images = images
        self._source = open_any(images.scan["spec"], images.scan["labelled"])

    def __getitem__(self, row: int) -> tuple[str, np.ndarray]:
        """Returns key and picture, uint8 [H, W, 3], of a row of the set."""
        key = self._images.keys[int(row)].as_py()
        record = self._source[int(self._images.positions[row])]
        if record.key != key:
            raise ValueError(
                f"{self._images.scan['spec']} has changed since it was scanned: {record.key} is "
                f"where {key} was; scan it again."
            )
        return key, decode_image(record.image)


def draw(
    left: Sequence[tuple[Pictures, int]],
    right: Sequence[tuple[Pictures, int]],
    titles: Sequence[str],
) -> Image.Image:
    """Returns the sheet: pair k is row left[k][1] of left[k][0] beside that of right[k]."""
    found = [[pictures[row] for pictures, row in sides] for sides in zip(left, right, strict=True)]
    names = [[_lines_of(key) for key, _ in sides] for sides in found]
    text_px = _LINE_PX * (1 + max(len(lines) for sides in names for lines in sides))
    width, height = 2 * (_THUMB_PX + 2) + _GAP_PX, _THUMB_PX + text_px + _GAP_PX
    columns = min(_COLUMNS, len(titles))
    num_rows = -(-len(titles) // columns)
    sheet = Image.new("RGB", (columns * width + _GAP_PX, num_rows * height + _GAP_PX), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (sides, title) in enumerate(zip(found, titles, strict=True)):
        x = _GAP_PX + number % columns * width
        y = _GAP_PX + number // columns * height
        pen.text((x, y), title, "black")
        for side, (_, picture) in enumerate(sides):
            left_px = x + side * (_THUMB_PX + 2)
            thumb = Image.fromarray(picture)
            thumb.thumbnail((_THUMB_PX, _THUMB_PX))
            sheet.paste(thumb, (left_px, y + text_px))
            for line, text in enumerate(names[number][side], 1):
                pen.text((left_px, y + line * _LINE_PX), text, "grey")
    return sheet


def _lines_of(key: str) -> list[str]:
    """A key in lines that are as wide as a picture."""
    most = _MOST_LINES * _LINE_LETTERS
    key = key if len(key) <= most else f"...{key[3 - most :]}"
    key = key.encode("ascii", "replace").decode()
    return [key[i : i + _LINE_LETTERS] for i in range(0, len(key), _LINE_LETTERS)]
