"""Labelled images in CLIP_benchmark's webdatasets: tars of key.jpg + key.cls, classnames.txt."""

import os
import posixpath
from collections.abc import Iterable, Sequence

from align_jax.data.images import IMAGE_SUFFIXES
from align_jax.data.sources.archives import Member, list_files, read_member
from align_jax.data.sources.files import LabelledFiles, expand
from align_jax.storage.problems import Problems
from align_jax.storage.text import read_lines

_NAMES_FILE = "classnames.txt"


def open_classified_tars(spec: str, pattern: str, limit: int | None) -> LabelledFiles | None:
    """Returns the images of tars with .cls files; None if there are no tars or no such files.

    Problems counted: those of archives.list_files, `class_unknown` (no .cls file, or
    none with the number of a class) and `image_missing`.

    Args:
      spec: names the source in messages.
      pattern: folder, tar, or glob of tars.
      limit: images to use, evenly spaced so that all classes stay; None for all.

    Raises:
      ValueError: classnames.txt is neither beside the tars nor in the folder above.
    """
    problems = Problems()
    tars = find_tars(pattern)
    samples = [sample for path in tars for sample in group_samples(list_files(path, problems))]
    if not any(".cls" in sample for sample in samples):
        return None
    classes = read_names(spec, tars)
    entries: list[tuple[Member, int]] = []
    for sample in samples:
        image = next((m for suffix, m in sample.items() if suffix in IMAGE_SUFFIXES), None)
        name = next(iter(sample.values())).name
        if image is None:
            problems.add("image_missing", name)
            continue
        text = read_member(sample[".cls"]).strip() if ".cls" in sample else b""
        if text.isdigit() and int(text) < len(classes):
            entries.append((image, int(text)))
        else:
            problems.add("class_unknown", image.name)
    if limit is not None and limit < len(entries):
        entries = [entries[i * len(entries) // limit] for i in range(limit)]
    return LabelledFiles(spec, entries, classes, problems)


def find_tars(pattern: str) -> list[str]:
    """Returns the tars that a folder holds, or a path or glob names, sorted.

    Raises:
      ValueError: the path does not exist.
    """
    tars = []
    for path in expand(pattern, "folders and .tar files"):
        inside = sorted(os.listdir(path)) if os.path.isdir(path) else []
        tars += [os.path.join(path, name) for name in inside] or [path]
    return [path for path in tars if path.lower().endswith(".tar") and os.path.isfile(path)]


def group_samples(members: Iterable[Member]) -> list[dict[str, Member]]:
    """Returns the files of each name but for the suffix: suffix -> member."""
    samples: dict[str, dict[str, Member]] = {}
    for member in members:
        stem, suffix = posixpath.splitext(member.name)
        samples.setdefault(stem, {})[suffix.lower()] = member
    return list(samples.values())


def read_names(spec: str, tars: Sequence[str]) -> tuple[str, ...]:
    """Returns the lines of classnames.txt beside the tars or in the folder above.

    Raises:
      ValueError: there is none.
    """
    beside = os.path.dirname(os.path.abspath(tars[0]))
    for folder in (beside, os.path.dirname(beside)):
        path = os.path.join(folder, _NAMES_FILE)
        if os.path.isfile(path):
            return tuple(line.strip() for line in read_lines(path) if line.strip())
    raise ValueError(
        f"{spec} has classes by number, which {_NAMES_FILE} must name: it does not exist in "
        f"{beside} or the folder above."
    )
