"""The two plain records that every data source hands on.

They live apart from the sources so that `scenes` and `sources` can both import them without
importing each other. Decoding and tokenising happen later, in `pipeline`.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Record:
    """One image with its alt-texts.

    Attributes:
      key: stable name of the item inside its source, for logs and error reports.
      image: encoded file bytes, or uint8 RGB [H, W, 3].
      captions: one or more alt-texts, in the order of the source.
    """

    key: str
    image: bytes | np.ndarray
    captions: tuple[str, ...]


@dataclass(frozen=True)
class LabelledImage:
    """One image with its class.

    Attributes:
      key: stable name of the item inside its source.
      image: encoded file bytes, or uint8 RGB [H, W, 3].
      label: index of the class, 0 to number of classes - 1.
    """

    key: str
    image: bytes | np.ndarray
    label: int
