"""Pairs and labelled images whose bytes are files: in folders, zips and tars.

Three layouts: a caption table beside its images, samples of `key.jpg` + `key.txt`, and one folder
of images for each class. Everything is indexed when opened, so that what is missing is known (and
counted in `problems`) before a run starts. open_source.py is the way in.
"""

import collections
import glob
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from align_jax.data.sources.archives import (
    ARCHIVE_SUFFIXES,
    Member,
    index_files,
    list_files,
    read_member,
    stamp_members,
)
from align_jax.data.sources.record import LabelledImage, Record, hash_key
from align_jax.data.sources.tables import Row, parse_sidecar, read_table
from align_jax.storage import identity
from align_jax.storage.problems import Problems
from align_jax.storage.text import read_lines

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_NONE = np.zeros(0, np.uint64)


class FilePairs:
    """A PairSource over files in folders, zips and tars."""

    def __init__(
        self,
        spec: str,
        entries: list[tuple[str, Member, Row | Member]],
        problems: Problems,
        weights: Mapping[str, float] | None = None,
    ):
        """Keeps (key, image, table row or .txt / .json file with the captions).

        `weights` of the fields of the .json files: see tables.parse_sidecar.
        """
        self._spec = spec
        self._entries = entries
        self._weights = weights
        self.problems = problems

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Record:
        """Returns a record with the encoded image; OSError if its bytes cannot be read."""
        key, image, texts = self._entries[index]
        return Record(key, read_member(image), *self._captions(texts))

    def key(self, index: int) -> str:
        """Returns the key of a record without reading anything."""
        return self._entries[index][0]

    def captions(self, index: int) -> tuple[str, ...]:
        """Returns the captions of a record without reading its image."""
        return self._captions(self._entries[index][2])[0]

    def where(self, index: int) -> str:
        """Returns the file or archive, and the name in it, that holds the image of a record."""
        image = self._entries[index][1]
        inside = "" if image.kind == "file" else f" in {image.path}"
        return f"{self._spec}: {image.name if inside else image.path}{inside}"

    def describe(self) -> str:
        """Returns the spec and the number of pairs."""
        return f"{self._spec}: {len(self)} pairs"

    def slice(self, start: int, stop: int) -> "FilePairs":
        """Returns the pairs from `start` to `stop` as a source of their own, without problems."""
        return FilePairs(self._spec, self._entries[start:stop], Problems(), self._weights)

    def stamp(self) -> str:
        """Returns what identity.stamp does: keys, captions, and the content of the files."""
        texts = [texts for *_, texts in self._entries]
        return identity.digest(
            [
                identity.digest(key for key, *_ in self._entries),
                stamp_members(image for _, image, _ in self._entries),
                stamp_members(text for text in texts if isinstance(text, Member)),
                identity.digest(
                    (text.captions, text.weights, text.columns)
                    for text in texts
                    if isinstance(text, Row)
                ),
                sorted((self._weights or {}).items()),
            ]
        )

    def _captions(self, texts):
        if isinstance(texts, Row):
            return texts.captions, texts.weights, texts.columns
        text = read_member(texts).decode("utf-8", "replace")
        if texts.name.lower().endswith(".json"):
            return parse_sidecar(text, self._weights)
        return (text.strip(),), (), ()


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

    def stamp(self) -> str:
        """Returns what identity.stamp does: classes, labels, and the content of the files."""
        labels = identity.digest(label for _, label in self._entries)
        return identity.digest(
            [self.classes, labels, stamp_members(member for member, _ in self._entries)]
        )


def open_table(
    spec: str,
    path: str,
    images: str,
    limit: int | None,
    weights: Mapping[str, float] | None = None,
) -> FilePairs:
    """Returns the pairs of a caption table.

    Problems counted: those of the archives and of the table, `image_missing`, `image_ambiguous`
    (the name occurs in several archives and no `shard` column says which), `shard_missing`.

    Args:
      spec: names the source in messages.
      path: table, see tables.read_table.
      images: folders, zips and tars, comma-separated, globs allowed.
      limit: rows to use, or None for all.
      weights: of the caption columns, see tables.read_table.

    Raises:
      ValueError: a path that does not exist, a table without the needed columns.
    """
    problems = Problems()
    rows = read_table(path, problems, weights)
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
            entries.append((_unique_key(_text(row.image), member, keys), member, row))
    return FilePairs(spec, entries[:limit], problems)


def open_samples(
    spec: str,
    paths: list[str],
    limit: int | None,
    weights: Mapping[str, float] | None = None,
    *,
    global_keys: bool = False,
    taken: np.ndarray = _NONE,
) -> FilePairs:
    """Returns the pairs of files that share a name but for the suffix: image and .txt (or .json).

    A name that an archive holds twice belongs to a second pair of the same key.

    Problems counted: those of the archives, `caption_missing`, `image_missing`.

    Args:
      spec: names the source in messages.
      paths: folders, zips and tars; of a folder that holds archives, those are read.
      limit: pairs to use, or None for all.
      weights: of the fields of the .json files, which are then the only ones with captions.
      global_keys: whether a name that occurs in several archives is one key; otherwise the name of
        the archive is put in front of it from the second one on.
      taken: record.hash_key of keys that earlier archives have, uint64.
    """
    problems = Problems()
    entries, keys, earlier = [], set(), set(taken.tolist())
    for path in archives_inside(paths):
        samples, seen, key_of = {}, collections.Counter(), {}
        for member in list_files(path, problems):
            stem, suffix = posixpath.splitext(member.name)
            kind = "image" if _is_image(member.name) else suffix.lower()
            samples.setdefault((stem, seen[member.name]), {}).setdefault(kind, member)
            seen[member.name] += 1
        for (stem, _), files in samples.items():
            captions = (None if weights else files.get(".txt")) or files.get(".json")
            if "image" in files and captions:
                if stem not in key_of:
                    key = _text(stem)
                    if earlier and hash_key(key) in earlier:
                        keys.add(key)
                    key_of[stem] = key if global_keys else _unique_key(key, files["image"], keys)
                entries.append((key_of[stem], files["image"], captions))
            elif "image" in files:
                problems.add("caption_missing", f"{path}: {stem}")
            elif captions:
                problems.add("image_missing", f"{path}: {stem}")
        if limit is not None and len(entries) >= limit:
            break
    return FilePairs(spec, entries[:limit], problems, weights)


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


def archives_inside(paths: Sequence[str]) -> Iterator[str]:
    """Yields the paths, in place of a folder that holds archives these."""
    for path in paths:
        inside = [
            os.path.join(path, name)
            for name in sorted(os.listdir(path) if os.path.isdir(path) else ())
            if name.lower().endswith(ARCHIVE_SUFFIXES)
        ]
        yield from inside or [path]


def _text(name):
    # Names need not be UTF-8 (tar) nor free of lone surrogates (JSON); keys are written as UTF-8.
    return name.encode("utf-8", "backslashreplace").decode()


def _unique_key(key, member, taken):
    # Shards may number their samples from 0 again.
    if key in taken:
        return f"{_text(posixpath.splitext(posixpath.basename(member.path))[0])}/{key}"
    taken.add(key)
    return key


def _read_classes(path):
    if not os.path.isfile(path):
        raise ValueError(f"{path} does not exist; classes= is a TSV of index, folder and name.")
    rows = [line.split("\t") for line in read_lines(path) if line.strip()]
    if any(len(row) < 3 or not row[0].isdecimal() for row in rows):
        raise ValueError(f"{path} must hold lines of index, folder and name, separated by tabs.")
    names = {int(row[0]): row[2] for row in rows}
    if sorted(names) != list(range(len(rows))):
        raise ValueError(f"{path} must number its classes 0, 1, 2, ... without gaps or repeats.")
    return tuple(names[i] for i in range(len(rows))), {row[1]: int(row[0]) for row in rows}
