"""Images with several classes in CLIP_benchmark's webdatasets: tars of key.jpg + key.npy."""

import io

import numpy as np

from align_jax.data.images import IMAGE_SUFFIXES
from align_jax.data.sources.archives import Member, list_files, read_member, stamp_members
from align_jax.data.sources.classified_tars import find_tars, group_samples, read_names
from align_jax.data.sources.record import Record
from align_jax.storage import identity
from align_jax.storage.problems import Problems


class MultiLabelledFiles:
    """Images by index; `classes` names the columns of `labels`, [N, C] bool."""

    def __init__(
        self,
        spec: str,
        members: list[Member],
        labels: np.ndarray,
        classes: tuple[str, ...],
        problems: Problems,
    ):
        """Keeps the images and their classes."""
        self._spec, self._members = spec, members
        self.labels, self.classes, self.problems = labels, classes, problems

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> Record:
        """Returns the encoded image, without captions; OSError if its bytes cannot be read."""
        return Record(self.key(index), read_member(self._members[index]), ())

    def key(self, index: int) -> str:
        """Returns the key of an image without reading it."""
        return self._members[index].name

    def stamp(self) -> str:
        """Returns what identity.stamp does: classes, labels, and the content of the files."""
        labels = self.labels.astype(np.uint8).tolist()
        return identity.digest([self.classes, labels, stamp_members(self._members)])


def open_multilabel(spec: str) -> MultiLabelledFiles:
    """Returns the images of a folder, tar or glob of tars whose .npy hold a number a class.

    A class counts where its number is above 0. Problems counted: those of archives.list_files,
    `class_unknown` (no .npy, or one of another length) and `image_missing`.

    Raises:
      ValueError: there are no such tars, or classnames.txt is not beside or above them.
    """
    problems = Problems()
    tars = find_tars(spec)
    samples = [sample for path in tars for sample in group_samples(list_files(path, problems))]
    if not any(".npy" in sample for sample in samples):
        raise ValueError(f"{spec} holds no .tar with key.jpg + key.npy, the classes of images.")
    classes = read_names(spec, tars)
    members, rows = [], []
    for sample in samples:
        image = next((m for suffix, m in sample.items() if suffix in IMAGE_SUFFIXES), None)
        if image is None:
            problems.add("image_missing", next(iter(sample.values())).name)
            continue
        row = _read_row(sample[".npy"]) if ".npy" in sample else None
        if row is None or row.shape != (len(classes),):
            problems.add("class_unknown", image.name)
            continue
        members.append(image)
        rows.append(row > 0)
    if not members:
        raise ValueError(f"{spec} holds no image with {len(classes)} classes. {problems}")
    return MultiLabelledFiles(spec, members, np.array(rows), classes, problems)


def _read_row(member: Member) -> np.ndarray | None:
    try:
        row = np.load(io.BytesIO(read_member(member)), allow_pickle=False)
        return row if row.dtype.kind in "biuf" else None
    except (ValueError, EOFError):
        return None
