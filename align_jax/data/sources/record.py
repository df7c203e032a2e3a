"""The two plain records that every data source hands on.

They live apart from the sources so that `scenes` and `sources` can both import them without
importing each other. Decoding and tokenising happen later, in `pipeline`.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from align_jax.data.images import BAD_IMAGE_REASONS

# By which every verb counts a record that it cannot use. New ones go to the end: checkpoints hold
# counts in this order.
UNUSABLE_REASONS = (
    *BAD_IMAGE_REASONS[:5],
    "caption_empty",
    "record_unreadable",
    "caption_not_utf8",
    "caption_too_long",
    *BAD_IMAGE_REASONS[5:],
)


@dataclasses.dataclass(frozen=True)
class Record:
    """One image with its alt-texts.

    Attributes:
      key: stable name of the item inside its source, for logs and error reports.
      image: encoded file bytes, or uint8 RGB [H, W, 3].
      captions: one or more alt-texts, in the order of the source.
      weights: how often training draws each caption, relative to the others (it never draws a
        blank one); () if all alike.
      columns: the column of the source that each caption is from; () if they have one in common.
      metadata: what else the source has of the image: address, licence, scores.
    """

    key: str
    image: bytes | np.ndarray
    captions: tuple[str, ...]
    weights: tuple[float, ...] = ()
    columns: tuple[str, ...] = ()
    metadata: Mapping[str, str | int | float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
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


def weigh_captions(
    columns: Mapping[str, Sequence[str]], weights: Mapping[str, float]
) -> tuple[tuple[str, ...], tuple[float, ...], tuple[str, ...]]:
    """Returns (captions, weights, columns) of a Record whose captions lie in several columns.

    The captions of one column share its weight; blank ones are left out, so a column that has none
    else leaves its share to the others.

    Args:
      columns: name -> captions of one image; a column of `weights` may be missing.
      weights: name -> relative probability that training draws from the column, positive.
    """
    captions, shares, names = [], [], []
    for name, weight in weights.items():
        usable = [caption for caption in columns.get(name, ()) if is_usable(caption)]
        captions += usable
        shares += [weight / max(1, len(usable))] * len(usable)
        names += [name] * len(usable)
    return tuple(captions), tuple(shares), tuple(names)


def is_usable(caption: str) -> bool:
    """Returns whether anything is left of a caption without white space and U+FFFD."""
    return bool(caption.replace("\ufffd", "").strip())


class KeyHashes:
    """Hashed keys that have occurred, in about 8 bytes each."""

    def __init__(self, hashes: np.ndarray):
        """Starts with some, uint64 [N]."""
        self._levels = [np.sort(hashes)]  # each sorted, and longer than the next

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Returns which of some different hashes, uint64 [N], had occurred; then they all have."""
        again = np.zeros(len(hashes), bool)
        for level in self._levels:
            places = np.searchsorted(level, hashes)
            found = places < len(level)
            again[found] |= level[places[found]] == hashes[found]
        self._levels.append(np.sort(hashes[~again]))
        while len(self._levels) > 1 and len(self._levels[-2]) <= 2 * len(self._levels[-1]):
            last = self._levels.pop()
            self._levels[-1] = np.sort(np.concatenate([self._levels[-1], last]), kind="stable")
        return again


def hash_key(key: str) -> int:
    """Returns 64 bits of BLAKE2b of a key, by which keys are compared where there are many."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
