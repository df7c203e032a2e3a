"""A sheet of matched pictures, for a human to judge: each pair side by side, with its distance."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from align_jax.curate.near_duplicates.image_sets import Pictures
from align_jax.curate.near_duplicates.matches import Matches
from align_jax.data.perceptual_hash import COPIES

_THUMB_PX, _GAP_PX, _LINE_PX = 128, 12, 13
_COLUMNS = 4  # pairs in a row
_LINE_LETTERS, _MOST_LINES = 20, 5  # of a key, whose end is shown if it is longer


def draw(matches: Matches, pictures: Sequence[Pictures]) -> Image.Image:
    """Returns the sheet of some matches; `pictures` are those of all sets, by their numbers."""
    names, found, titles = [], [], []
    for place, number in enumerate(matches.sets.tolist()):
        keys = matches.keys[place], matches.other_keys[place]
        positions = matches.positions[place].tolist()
        of_sides = zip((0, number), keys, positions, strict=True)
        found.append([pictures[side].get(key, position) for side, key, position in of_sides])
        names.append([_lines_of(key) for key in keys])
        copy = "" if matches.copies is None else f", {COPIES[matches.copies[place]]}"
        titles.append(f"distance {matches.scores[place]}{copy}")
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
        for side, picture in enumerate(sides):
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
