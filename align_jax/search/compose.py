"""Queries made of images and texts: one of them, the sum of both, or a change.

Sum, of the paper: unit(z_image + 2 z_text). Change: unit(z + w (z_new - z_old)), which keeps all
of the image that the words do not speak of; where both words are known it finds three times as
much (docs/search.md). Source of the sum: Jia et al. 2021, section 6.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from align_jax.evals.composed import CHANGE_WEIGHT, SUM_WEIGHT, compose


def encode_query(
    model: Any,
    *,
    image: Any = None,
    text: str | None = None,
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
    weight: float | None = None,
) -> np.ndarray:
    """Returns the query, float32 [D], unit norm.

    Args:
      model: with `encode_image` and `encode_text`, see align.Align.
      image: what `encode_image` takes one of.
      text: with an image it is added like `add`.
      add: texts whose embeddings are added.
      remove: texts whose embeddings are subtracted.
      weight: of each text that is added or subtracted; None takes 1 where there are both, a change,
        and else 2, the paper's.

    Raises:
      ValueError: neither image nor text, a blank text, a weight that is not finite, or parts that
        cancel out.
    """
    if image is None and text is None:
        raise ValueError("A query needs an image or a text.")
    given = ([] if text is None else [text]) + list(add) + list(remove)
    for one in given:
        if not isinstance(one, str) or not one.strip():
            raise ValueError(f"{one!r} is no text to search by.")
    z_text = list(model.encode_text(given)) if given else []
    if image is None:
        z, z_text = z_text[0], z_text[1:]
    else:
        z = model.encode_image([image])[0]
    num_added = len(z_text) - len(remove)
    if weight is None:
        weight = CHANGE_WEIGHT if num_added and remove else SUM_WEIGHT
    added, removed = z_text[:num_added], z_text[num_added:]
    return compose(z, np.sum(added, axis=0), np.sum(removed, axis=0), weight)
