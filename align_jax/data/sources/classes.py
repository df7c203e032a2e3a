"""Labelled images as the training input wants its source: `open_classes`."""

from collections.abc import Mapping
from typing import Any

from align_jax.data.sources.open_source import LabelledSource, open_labelled
from align_jax.data.sources.record import LabelledImage
from align_jax.storage import identity
from align_jax.storage.problems import Problems


class Classes:
    """A labelled source that also says where a record lies, as a PairSource does.

    Attributes:
      classes: names of the labels.
      problems: of the source.
    """

    classes: tuple[str, ...]
    problems: Problems

    def __init__(self, source: LabelledSource):
        """Keeps the source.

        Raises:
          ValueError: it has fewer than two classes.
        """
        if len(source.classes) < 2:
            raise ValueError(
                f"{source.describe()}: a classifier needs at least two classes, not "
                f"{len(source.classes)}."
            )
        self._source = source
        self.classes, self.problems = tuple(source.classes), source.problems

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> LabelledImage:
        return self._source[index]

    def where(self, index: int) -> str:
        """Returns the file that holds a record, or the source where that does not tell."""
        if hasattr(self._source, "where"):
            return self._source.where(index)
        key = self._source.key(index) if hasattr(self._source, "key") else f"record {index}"
        return f"{self.describe()}: {key}"

    def describe(self) -> str:
        """Returns what the source says of itself."""
        return self._source.describe()

    def stamp(self) -> str:
        """Returns what identity.stamp does."""
        return identity.stamp(self._source)


def open_classes(config: Mapping[str, Any]) -> Classes:
    """Returns the labelled images of `source`.

    Args:
      config: group `data`.

    Raises:
      ValueError: see `open_labelled`; names the config path.
    """
    try:
        return Classes(open_labelled(config["source"]))
    except ValueError as error:
        raise ValueError(f"config.data.source: {error}") from error
