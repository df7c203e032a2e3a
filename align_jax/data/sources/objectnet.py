"""ObjectNet as its owners publish it: 313 folders, of which 113 are classes of ImageNet.

Source: Barbu et al. 2019; objectnet-1.0/mappings/{folder_to_objectnet_label,
objectnet_to_imagenet_1k}.json. Classes stand in the order of the second file, as in CLIP_benchmark.
"""

import os

from align_jax.data.images import decode_image
from align_jax.data.sources.files import LabelledFiles, open_class_folders
from align_jax.data.sources.record import LabelledImage
from align_jax.storage import identity
from align_jax.storage.text import read_json

_FOLDERS, _CLASSES = "folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json"


class ObjectNet:
    """A LabelledSource without the red border of `border` pixels that all images have."""

    def __init__(self, source: LabelledFiles, border: int):
        """Keeps the images with their borders."""
        self._source, self._border = source, border
        self.classes, self.problems = source.classes, source.problems
        self.key, self.label = source.key, source.label
        self.describe = source.describe

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> LabelledImage:
        """Returns the image, uint8, and its label; BadImage or OSError if it cannot be read."""
        item = self._source[index]
        if not self._border:
            return item
        cut = slice(self._border, -self._border)
        return LabelledImage(item.key, decode_image(item.image)[cut, cut], item.label)

    def stamp(self) -> str:
        """Returns what identity.stamp does."""
        return identity.digest([self._source.stamp(), self._border])


def open_objectnet(
    spec: str, paths: list[str], mappings: str, border: int, limit: int | None
) -> ObjectNet:
    """Returns the images of the classes that ObjectNet shares with ImageNet.

    Args:
      spec: names the source in messages.
      paths: folders with a folder a class.
      mappings: the folder of that name.
      border: pixels to leave out on each side.
      limit: images to use, evenly spaced; None for all.

    Raises:
      ValueError: the mappings are missing or of another form.
    """
    found = []
    for file in (_FOLDERS, _CLASSES):
        path = os.path.join(mappings, file)
        if not os.path.isfile(path):
            raise ValueError(f"{path} does not exist; it is one of ObjectNet's mappings.")
        found.append(read_json(path))
        if not isinstance(found[-1], dict):
            raise ValueError(f"{path} must hold an object of names.")
    folders = {name: folder for folder, name in found[0].items()}
    if missing := [name for name in found[1] if name not in folders]:
        raise ValueError(f"{mappings}/{_FOLDERS} has no folder of the class {missing[0]!r}.")
    label_of = {folders[name]: label for label, name in enumerate(found[1])}
    opened = open_class_folders(spec, paths, (tuple(found[1]), label_of), limit)
    # The folders of the other 200 classes are part of the data as it should be.
    opened.problems.pop("class_unknown", None)
    return ObjectNet(opened, border)
