"""A picture of what text-to-image retrieval finds: queries, their top images, the right image."""

import os
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from align_jax.evals.retrieval import RetrievalEmbeddings
from align_jax.storage import writing

_TILE = 148  # px, side of an image
_GAP = 14
_MARGIN = 28
_TEXT_WIDTH = 300
_ROW_HEIGHT = _TILE + 36  # image, the line below it, space
_HEADER_HEIGHT = 118
_INK, _SOFT, _GREEN, _PAPER, _RULE = "#1c2126", "#6a737d", "#1a9850", "#ffffff", "#e3e6e9"


def retrieval_gallery(
    path: str | os.PathLike,
    embeddings: RetrievalEmbeddings,
    load_image: Callable[[int], np.ndarray],
    *,
    num_queries: int = 8,
    top: int = 5,
) -> Path:
    """Returns the path of a PNG it writes: a caption a row, its `top` images from left to right.

    The queries lie evenly over the captions, so nobody picked them. The caption's own image is
    framed green, and shown once more at the end of the row with its rank, also where it is not
    among the top ones. Characters the font lacks appear as boxes.

    Args:
      embeddings: what a `Retrieval` evaluator keeps, N images and M captions.
      load_image: row of z_image to its image, [H, W, 3] uint8.
      num_queries: rows to draw, at most M.
      top: images a row, at most N.
    """
    captions, z_image = embeddings.captions, embeddings.z_image
    num_queries, top = min(num_queries, len(captions)), min(top, len(z_image))
    queries = (np.arange(num_queries) + 0.5) * len(captions) / num_queries
    width = 2 * _MARGIN + _TEXT_WIDTH + (top + 1) * (_TILE + _GAP) + 2 * _GAP
    height = _HEADER_HEIGHT + num_queries * (_ROW_HEIGHT + _GAP) + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _draw_header(draw, num_queries, len(captions), len(z_image), top)
    for row, query in enumerate(queries.astype(int)):
        scores = z_image @ embeddings.z_text[query]  # [N]
        own = int(embeddings.text_to_image[query])
        own_rank = int(embeddings.text_ranks[query]) + 1
        y = _HEADER_HEIGHT + row * (_ROW_HEIGHT + _GAP)
        draw.line([(_MARGIN, y - _GAP), (width - _MARGIN, y - _GAP)], fill=_RULE)
        draw_text_block(draw, (_MARGIN, y), captions[query])
        for column, found in enumerate(np.argsort(-scores, kind="stable")[:top]):
            is_own = int(found) == own
            _draw_tile(sheet, draw, column, y, load_image(int(found)), is_own)
            _draw_below(draw, column, y, f"{scores[found]:.3f}", _GREEN if is_own else _SOFT)
        _draw_tile(sheet, draw, top, y, load_image(own), True, x_shift=2 * _GAP)
        color = _GREEN if own_rank <= top else _INK
        _draw_below(draw, top, y, f"rank {own_rank:,} · {scores[own]:.3f}", color, 2 * _GAP)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing.replacing(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def _draw_header(
    draw: ImageDraw.ImageDraw, num_queries: int, num_captions: int, num_images: int, top: int
) -> None:
    title = f"Text to image: the {top} nearest of {num_images:,} images"
    note = (
        f"{num_queries} queries at even distances in the list of {num_captions:,} captions. "
        "None was chosen by hand. Below each image: cosine similarity. Green: its own image."
    )
    draw.text((_MARGIN, 20), title, font=font(22, bold=True), fill=_INK)
    draw.text((_MARGIN, 52), note, font=font(13), fill=_SOFT)
    for column in range(top):
        _draw_centred(draw, _column_x(column), 78, f"{column + 1}", _SOFT)
    _draw_centred(draw, _column_x(top) + 2 * _GAP, 78, "its image", _SOFT)


def draw_text_block(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, width: int = _TEXT_WIDTH
) -> None:
    """Draws a text in lines of at most `width` px, as high as an image, cut where it is longer."""
    letters, line_height = font(16), 22
    # Lone surrogates cannot be drawn and control characters are no text.
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = "".join(char if char.isprintable() else " " for char in text)
    lines = _wrap(text, letters, width)
    max_lines = _TILE // line_height
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        while lines[-1] and letters.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "…"
    for number, line in enumerate(lines):
        draw.text((corner[0], corner[1] + number * line_height), line, font=letters, fill=_INK)


def _wrap(text: str, letters: ImageFont.FreeTypeFont, width: float) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if letters.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        while letters.getlength(word) > width:  # addresses, and scripts without spaces
            cut = next(n for n in range(1, len(word) + 1) if letters.getlength(word[:n]) > width)
            lines.append(word[: cut - 1])
            word = word[cut - 1 :]
        line = word
    return [*lines, line] if line else lines


def _draw_tile(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    column: int,
    y: int,
    image: np.ndarray,
    is_own: bool,
    x_shift: int = 0,
) -> None:
    tile = ImageOps.contain(Image.fromarray(image), (_TILE, _TILE), Image.Resampling.LANCZOS)
    x = _column_x(column) + x_shift + (_TILE - tile.width) // 2
    y += (_TILE - tile.height) // 2
    sheet.paste(tile, (x, y))
    if is_own:
        draw.rectangle([x - 4, y - 4, x + tile.width + 3, y + tile.height + 3], None, _GREEN, 4)


def _draw_below(
    draw: ImageDraw.ImageDraw, column: int, y: int, text: str, color: str, x_shift: int = 0
) -> None:
    _draw_centred(draw, _column_x(column) + x_shift, y + _TILE + 8, text, color)


def _draw_centred(draw: ImageDraw.ImageDraw, x: int, y: int, text: str, color: str) -> None:
    draw.text((x + _TILE // 2, y), text, font=font(13), fill=color, anchor="ma")


def _column_x(column: int) -> int:
    return _MARGIN + _TEXT_WIDTH + _GAP + column * (_TILE + _GAP)


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Returns the font of all sheets."""
    # Matplotlib brings DejaVu (Latin, Greek, Cyrillic, Arabic and more) with it on every machine.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}", size)
