"""Labelled images from a TFDS dataset of ArrayRecord shards: any ClassLabel, or a formula."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from align_jax.data.sources.packed import TfdsPairs, open_builder
from align_jax.data.sources.record import LabelledImage
from align_jax.storage import identity

if TYPE_CHECKING:
    import tensorflow_datasets as tfds


class Formula:
    """How a label follows from features: their names, a function of an example, number of classes.

    `scale` multiplies the pixels, where the data hold fewer levels than 0 to 255.
    """

    def __init__(
        self,
        features: Sequence[str],
        label: Callable[[Mapping[str, Any]], int],
        num_classes: int,
        scale: int = 1,
    ):
        self.features, self.label = tuple(features), label
        self.num_classes, self.scale = num_classes, scale


class TfdsLabelled(TfdsPairs):
    """A LabelledSource over one split of a TFDS dataset; `classes` names the labels."""

    def __init__(
        self,
        spec: str,
        folder: str,
        split: str,
        limit: int | None,
        label: str | None = None,
        formula: Formula | None = None,
    ):
        """Opens the split.

        Args:
          spec: names the source in messages.
          folder: holds dataset_info.json.
          split: a split or a slice of one, e.g. `train[:1000]`.
          limit: number of records to keep, evenly spaced, or None for all.
          label: the ClassLabel; None takes `label`, or the only one that there is.
          formula: in place of a ClassLabel.

        Raises:
          ValueError: no such split or ClassLabel, or not ArrayRecord files.
        """
        self._label, self._formula = label, formula
        self.classes: tuple[str, ...] = ()
        super().__init__(spec, folder, split, None)
        count = self._length
        self._chosen = range(count)
        if limit is not None and limit < count:
            self._chosen = [i * count // limit for i in range(limit)]

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> LabelledImage:
        """Returns an image with its label, see TfdsPairs."""
        index = self._chosen[index]
        example = self.example(index)
        key = f"{index:08d}"
        image = example["image"]
        if self._formula is None:
            return LabelledImage(key, image, int(example[self._label]))
        if self._formula.scale != 1:
            from align_jax.data.images import decode_image

            image = decode_image(image) * np.uint8(self._formula.scale)
        return LabelledImage(key, image, self._formula.label(example))

    def describe(self) -> str:
        """Returns the spec and the numbers of images and classes."""
        return f"{self._spec}: {len(self)} images of {len(self.classes)} classes"

    def stamp(self) -> str:
        """Returns what identity.stamp does: shards, records used, the label."""
        return identity.digest([super().stamp(), list(self._chosen), self._label, self.classes])

    def _find_features(self, features: "tfds.features.FeaturesDict") -> None:
        self._captions: dict[str, str | None] = {}
        self._key = None
        if "image" not in features:
            raise ValueError(f"{self._spec} has features {', '.join(sorted(features))}; no image.")
        if self._formula is not None:
            if missing := set(self._formula.features) - set(features):
                raise ValueError(f"{self._spec} has no feature {', '.join(sorted(missing))}.")
            self._metadata = list(self._formula.features)
            self.classes = tuple(map(str, range(self._formula.num_classes)))
            return
        labels = [n for n in sorted(features) if getattr(features[n], "names", None) is not None]
        labels = [n for n in labels if getattr(features[n], "num_classes", None)]
        wanted = self._label or ("label" if "label" in labels else "")
        if not wanted and len(labels) == 1:
            wanted = labels[0]
        if wanted not in labels:
            known = ", ".join(labels) or "none"
            raise ValueError(
                f"{self._spec}: label={wanted!r} is no ClassLabel; there are: {known}."
            )
        self._label, self._metadata = wanted, [wanted]
        self.classes = tuple(features[wanted].names)


def num_examples(folder: str, split: str) -> int:
    """Returns the number of records of a split.

    Raises:
      ValueError: there is no such split.
    """
    splits = open_builder(folder).info.splits
    if split not in splits:
        raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(sorted(splits))}.")
    return splits[split].num_examples
