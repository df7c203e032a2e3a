"""A sheet of what queries have found: the query on the left, its hits from left to right."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from align_jax.evals.gallery import draw_text_block, font
from align_jax.search.rows import Hit, shorten

_TILE, _GAP, _MARGIN = 148, 14, 28  # px
_QUERY_WIDTH = 300
_BELOW = 46  # score and caption
_INK, _SOFT, _RULE = "#1c2126", "#6a737d", "#e3e6e9"


class Asked(NamedTuple):
    """A query and its hits; `picture` is uint8 [H, W, 3] or None, `text` says what was asked."""

    text: str
    picture: np.ndarray | None
    hits: Sequence[Hit]


def draw_sheet(
    path: str | os.PathLike,
    title: str,
    queries: Sequence[Asked],
    read: Callable[[str, str], np.ndarray],
) -> Path:
    """Returns the path of a PNG it writes: a query a row, its hits with scores and captions.

    Args:
      path: of the PNG.
      title: above the rows.
      queries: at least one.
      read: (key, source) of a hit to its picture, as ingest.Pictures.read; where it fails, and for
        texts, the tile shows words instead.
    """
    columns = max(len(query.hits) for query in queries)
    row_height = _TILE + _BELOW + _GAP
    width = 2 * _MARGIN + _QUERY_WIDTH + columns * (_TILE + _GAP)
    height = 72 + len(queries) * row_height + _MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, 20), title, font=font(20, bold=True), fill=_INK)
    for number, query in enumerate(queries):
        y = 72 + number * row_height
        pen.line([(_MARGIN, y - _GAP // 2), (width - _MARGIN, y - _GAP // 2)], fill=_RULE)
        text_x = _MARGIN
        if query.picture is not None:
            _paste(sheet, query.picture, _MARGIN, y)
            text_x += _TILE + _GAP
        draw_text_block(pen, (text_x, y), query.text, width=_MARGIN + _QUERY_WIDTH - text_x)
        for column, hit in enumerate(query.hits):
            x = _MARGIN + _QUERY_WIDTH + _GAP + column * (_TILE + _GAP)
            if hit.kind == "image":
                _draw_hit(sheet, pen, hit, x, y, read)
            else:
                draw_text_block(pen, (x, y), hit.caption, width=_TILE)
            below = shorten(hit.caption or hit.key, 21) if hit.kind == "image" else ""
            pen.text((x, y + _TILE + 4), f"{hit.score:.3f}", font=font(13), fill=_INK)
            pen.text((x, y + _TILE + 22), below, font=font(11), fill=_SOFT)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")
    return path


def _draw_hit(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    hit: Hit,
    x: int,
    y: int,
    read: Callable[[str, str], Any],
) -> None:
    try:
        _paste(sheet, read(hit.key, hit.source), x, y)
    except (ValueError, OSError) as error:
        draw_text_block(pen, (x, y), str(error), width=_TILE)


def _paste(sheet: Image.Image, picture: np.ndarray, x: int, y: int) -> None:
    tile = ImageOps.contain(Image.fromarray(picture), (_TILE, _TILE), Image.Resampling.LANCZOS)
    sheet.paste(tile, (x + (_TILE - tile.width) // 2, y + (_TILE - tile.height) // 2))
