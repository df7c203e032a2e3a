"""Pairs and labelled images whose bytes are files: in folders, zips and tars.

Three layouts: a caption table beside its images, samples of `key.jpg` + `key.txt`, and one folder
of images for each class. Everything is indexed when opened, so that what is missing is known (and
counted in `problems`) before a run starts. sources.py is the way in.
"""

import glob
import os
import posixpath

from align_jax.data.archives import ARCHIVE_SUFFIXES, Member, Problems, index_files, read_member
from align_jax.data.record import LabelledImage, Record
from align_jax.data.tables import parse_sidecar, read_table

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class FilePairs:
    """A PairSource over files in folders, zips and tars."""

    def __init__(
        self,
        spec: str,
        entries: list[tuple[str, Member, tuple[str, ...] | Member]],
        problems: Problems,
    ):
        """Keeps (key, image, captions or the .txt / .json file that holds them)."""
        self._spec = spec
        self._entries = entries
        self.problems = problems

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Record:
        """Returns a record with the encoded image; OSError if its bytes cannot be read."""
        key, image, _ = self._entries[index]
        return Record(key, read_member(image), self.captions(index))

    def captions(self, index: int) -> tuple[str, ...]:
        """Returns the captions of a record without reading its image."""
        captions = self._entries[index][2]
        return _read_captions(captions) if isinstance(captions, Member) else captions

    def describe(self) -> str:
        """Returns the spec and the number of pairs."""
        return f"{self._spec}: {len(self)} pairs"


class LabelledFiles:
    """LabelledImages over files in folders, zips and tars; `classes` names the labels."""

    def __init__(
        self,
        spec: str,
        entries: list[tuple[Member, int]],
        classes: tuple[str, ...],
        problems: Problems,
    ):
        """Keeps (image, label)."""
        self._spec = spec
        self._entries = entries
        self.classes = classes
        self.problems = problems

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> LabelledImage:
        """Returns the encoded image and its label; OSError if its bytes cannot be read."""
        member, label = self._entries[index]
        return LabelledImage(member.name, read_member(member), label)

    def describe(self) -> str:
        """Returns the spec and the numbers of images and classes."""
        return f"{self._spec}: {len(self)} images of {len(self.classes)} classes"


def open_table(spec: str, path: str, images: str, limit: int | None) -> FilePairs:
    """Returns the pairs of a caption table.

    Problems counted: those of the archives and of the table, `image_missing`, `image_ambiguous`
    (the name occurs in several archives and no `shard` column says which), `shard_missing`.

    Args:
      spec: names the source in messages.
      path: table, see tables.read_table.
      images: folders, zips and tars, comma-separated, globs allowed.
      limit: rows to use, or None for all.

    Raises:
      ValueError: a path that does not exist, a table without the needed columns.
    """
    problems = Problems()
    rows = read_table(path, problems)
    archives = [
        (file, index_files(file, problems))
        for pattern in images.split(",")
        for file in expand(pattern, "folders, .zip and .tar files of images")
    ]
    find = _ImageFinder(archives, problems)
    entries, keys = [], set()
    for row in rows:
        member = find(row.image, row.shard)
        if member is not None:
            entries.append((_unique_key(row.image, member, keys), member, row.captions))
    return FilePairs(spec, entries[:limit], problems)


def open_samples(spec: str, paths: list[str], limit: int | None) -> FilePairs:
    """Returns the pairs of files that share a name but for the suffix: image and .txt (or .json).

    Problems counted: those of the archives, `caption_missing`, `image_missing`.

    Args:
      spec: names the source in messages.
      paths: folders, zips and tars; of a folder that holds archives, those are read.
      limit: pairs to use, or None for all.
    """
    problems = Problems()
    entries, keys = [], set()
    for path in _archives_inside(paths):
        samples = {}
        for name, member in index_files(path, problems).items():
            stem, suffix = posixpath.splitext(name)
            kind = "image" if _is_image(name) else suffix.lower()
            samples.setdefault(stem, {}).setdefault(kind, member)
        for stem, files in samples.items():
            captions = files.get(".txt") or files.get(".json")
            if "image" in files and captions:
                key = _unique_key(stem, files["image"], keys)
                entries.append((key, files["image"], captions))
            elif "image" in files:
                problems.add("caption_missing", f"{path}: {stem}")
            elif captions:
                problems.add("image_missing", f"{path}: {stem}")
        if limit is not None and len(entries) >= limit:
            break
    return FilePairs(spec, entries[:limit], problems)


def open_class_folders(
    spec: str, paths: list[str], classes_tsv: str | None, limit: int | None
) -> LabelledFiles:
    """Returns the images of `class/file` names with their classes.

    Problems counted: those of the archives, `class_unknown` (a folder that the TSV does not name).

    Args:
      spec: names the source in messages.
      paths: folders, zips and tars.
      classes_tsv: lines of index, folder, name; None numbers the folders alphabetically.
      limit: images to use, evenly spaced so that all classes stay; None for all.

    Raises:
      ValueError: a TSV that does not exist or is not numbered 0, 1, 2, ...
    """
    problems = Problems()
    members = [m for path in paths for m in index_files(path, problems).values()]
    members = [(posixpath.basename(posixpath.dirname(m.name)), m) for m in members]
    members = [(folder, member) for folder, member in members if _is_image(member.name)]
    if classes_tsv is not None:
        classes, label_of = _read_classes(classes_tsv)
    else:
        classes = tuple(sorted({folder for folder, _ in members if folder}))
        label_of = {name: label for label, name in enumerate(classes)}
    entries = []
    for folder, member in members:
        if folder in label_of:
            entries.append((member, label_of[folder]))
        else:
            problems.add("class_unknown", member.name)
    if limit is not None and limit < len(entries):
        entries = [entries[i * len(entries) // limit] for i in range(limit)]
    return LabelledFiles(spec, entries, classes, problems)


def expand(pattern: str, accepted: str) -> list[str]:
    """Returns the folders and archives that a path or glob pattern names, sorted.

    Raises:
      ValueError: there are none, or one is neither folder, zip nor tar; says what is `accepted`.
    """
    paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise ValueError(f"{pattern} does not exist; accepted: {accepted}.")
    for path in paths:
        if not os.path.isdir(path) and not path.lower().endswith(ARCHIVE_SUFFIXES):
            raise ValueError(f"{path} is of no known kind; accepted: {accepted}.")
    return paths


class _ImageFinder:
    """Finds a table's image names: in the named archive, or by full or else by base name in all."""

    def __init__(self, archives, problems):
        self._problems = problems
        self._by_shard = {}
        self._by_name, self._by_base_name = {}, {}
        for path, index in archives:
            base = posixpath.basename(path.rstrip("/"))
            self._by_shard[base] = self._by_shard[posixpath.splitext(base)[0]] = index
            for name, member in index.items():
                self._by_name.setdefault(name, []).append(member)
                self._by_base_name.setdefault(posixpath.basename(name), []).append(member)

    def __call__(self, image, shard):
        if shard:
            if shard not in self._by_shard:
                self._problems.add("shard_missing", shard)
                return None
            hits = [self._by_shard[shard][image]] if image in self._by_shard[shard] else []
        else:
            hits = self._by_name.get(image) or self._by_base_name.get(posixpath.basename(image), [])
        if len(hits) == 1:
            return hits[0]
        self._problems.add("image_ambiguous" if hits else "image_missing", image)
        return None


def _is_image(name):
    return name.lower().endswith(IMAGE_SUFFIXES)


def _archives_inside(paths):
    for path in paths:
        inside = [
            os.path.join(path, name)
            for name in sorted(os.listdir(path) if os.path.isdir(path) else ())
            if name.lower().endswith(ARCHIVE_SUFFIXES)
        ]
        yield from inside or [path]


def _unique_key(key, member, taken):
    # Shards may number their samples from 0 again.
    if key in taken:
        key = f"{posixpath.splitext(posixpath.basename(member.path))[0]}/{key}"
    taken.add(key)
    return key


def _read_captions(member):
    text = read_member(member).decode("utf-8", "replace")
    if member.name.lower().endswith(".json"):
        return tuple(parse_sidecar(text))
    return (text.strip(),)


def _read_classes(path):
    if not os.path.isfile(path):
        raise ValueError(f"{path} does not exist; classes= is a TSV of index, folder and name.")
    with open(path, encoding="utf-8-sig") as file:
        rows = [line.rstrip("\r\n").split("\t") for line in file if line.strip()]
    if any(len(row) < 3 or not row[0].isdecimal() for row in rows):
        raise ValueError(f"{path} must hold lines of index, folder and name, separated by tabs.")
    names = {int(row[0]): row[2] for row in rows}
    if sorted(names) != list(range(len(rows))):
        raise ValueError(f"{path} must number its classes 0, 1, 2, ... without gaps or repeats.")
    return tuple(names[i] for i in range(len(rows))), {row[1]: int(row[0]) for row in rows}
