"""A part of labelled images: every n-th of each class, so that one set serves to learn and test."""

import re
from typing import Any

from align_jax.data.sources.record import LabelledImage
from align_jax.storage import identity


class Part:
    """A LabelledSource over part K of N of another: of each class the K-th image and every N-th
    after it, in the order of their keys."""

    def __init__(self, spec: str, source: Any, part: str):
        """Chooses the images.

        Args:
          spec: names the source in messages.
          source: a LabelledSource.
          part: `K/N`, K from 1 to N.

        Raises:
          ValueError: `part` is of another form, or no image is in it.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", part)
        number, count = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= count:
            raise ValueError(f"{spec}: part={part} must be K/N, such as 1/2 for the first half.")
        self._spec, self._part, self._source = spec, part, source
        self.classes, self.problems = source.classes, source.problems
        by_class: dict[int, list[tuple[str, int]]] = {}
        for index in range(len(source)):
            label, key = _label_and_key(source, index)
            by_class.setdefault(label, []).append((key, index))
        self._indices = sorted(
            index for items in by_class.values() for _, index in sorted(items)[number - 1 :: count]
        )
        if not self._indices:
            raise ValueError(f"{spec}: part={part} of {len(source)} images holds none.")

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> LabelledImage:
        return self._source[self._indices[index]]

    def key(self, index: int) -> str:
        """Returns the key of an image."""
        return _label_and_key(self._source, self._indices[index])[1]

    def describe(self) -> str:
        """Returns the spec and the numbers of images and classes."""
        return f"{self._spec}: {len(self)} images of {len(self.classes)} classes"

    def stamp(self) -> str:
        """Returns what identity.stamp does: the whole, and which part of it."""
        return identity.digest([identity.stamp(self._source), self._part])


def _label_and_key(source: Any, index: int) -> tuple[int, str]:
    if hasattr(source, "label") and hasattr(source, "key"):
        return source.label(index), source.key(index)
    item = source[index]
    return item.label, item.key
