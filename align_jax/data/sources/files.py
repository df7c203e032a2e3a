"""Pairs and labelled images whose bytes are files: in folders, zips and tars.

Three layouts: a caption table beside its images, samples of `key.jpg` + `key.txt`, and one folder
of images for each class. Everything is indexed when opened, so that what is missing is known (and
counted in `problems`) before a run starts. open_source.py is the way in.
"""

import collections
import functools
import itertools
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from align_jax.data.images import IMAGE_SUFFIXES
from align_jax.data.sources.archives import (
    ARCHIVE_SUFFIXES,
    Member,
    index_files,
    list_files,
    read_member,
    stamp_members,
)
from align_jax.data.sources.entry_file import Entry, keep_entries, stamp_files
from align_jax.data.sources.image_finder import ImageFinder, printable, short_names
from align_jax.data.sources.indexing import for_each
from align_jax.data.sources.record import KeyHashes, LabelledImage, Record, hash_key
from align_jax.data.sources.tables import Row, parse_sidecar, read_table
from align_jax.storage import identity
from align_jax.storage.paths import find_paths
from align_jax.storage.problems import Problems
from align_jax.storage.text import check_caption, read_caption, read_lines

_CAPTION_SUFFIXES = (".txt", ".json")
# Files that say something of a data set as a whole, in CLIP_benchmark's layout.
_SET_FILES = (
    "classnames.txt",
    "dataset_type.txt",
    "nshards.txt",
    "zeroshot_classification_templates.txt",
)
_NONE = np.zeros(0, np.uint64)


class FilePairs:
    """A PairSource over files in folders, zips and tars."""

    def __init__(
        self,
        spec: str,
        entries: Sequence[Entry],
        problems: Problems,
        weights: Mapping[str, float] | None = None,
        *,
        one_caption: bool = False,
    ):
        """Keeps (key, image, table row or .txt / .json file with the captions).

        `weights` of the fields of the .json files: see tables.parse_sidecar. `one_caption` takes a
        .txt for one caption, whose lines are otherwise one each.
        """
        self._spec = spec
        self._entries = entries
        self._weights, self._one_caption = weights, one_caption
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
        entries, one = self._entries[start:stop], self._one_caption
        return FilePairs(self._spec, entries, Problems(), self._weights, one_caption=one)

    def stamp(self) -> str:
        """Returns what identity.stamp does: keys, captions, and the content of the files."""
        return identity.digest(
            [
                identity.digest(key for key, *_ in self._entries),
                stamp_members(image for _, image, _ in self._entries),
                stamp_members(text for *_, text in self._entries if isinstance(text, Member)),
                identity.digest(
                    (text.captions, text.weights, text.columns)
                    for *_, text in self._entries
                    if isinstance(text, Row)
                ),
                sorted((self._weights or {}).items()),
            ]
        )

    def _captions(
        self, texts: Row | Member
    ) -> tuple[tuple[str, ...], tuple[float, ...], tuple[str, ...]]:
        if isinstance(texts, Row):
            return texts.captions, texts.weights, texts.columns
        text = read_caption(read_member(texts), texts.name)
        if texts.name.lower().endswith(".json"):
            return parse_sidecar(text, texts.name, self._weights)
        lines = [line.strip() for line in ([text] if self._one_caption else text.split("\n"))]
        return tuple(check_caption(line, texts.name) for line in lines if line), (), ()


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

    def key(self, index: int) -> str:
        """Returns the key of an image without reading it."""
        return self._entries[index][0].name

    def label(self, index: int) -> int:
        """Returns the label of an image without reading it."""
        return self._entries[index][1]

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

    def build(problems: Problems) -> Iterator[Entry]:
        yield from _find_rows(read_table(path, problems, weights), images, limit, problems)

    shares = sorted((weights or {}).items())
    stamp = stamp_files(["table", images, limit, shares], [path, *_patterns(images)])
    entries, problems = keep_entries(stamp, build)
    return FilePairs(spec, entries, problems)


def open_rows(
    spec: str, rows: Iterable[Row], images: str, limit: int | None, problems: Problems
) -> FilePairs:
    """Returns the pairs of rows of a table; for the arguments and problems see `open_table`.

    Raises:
      ValueError: a path that does not exist.
    """
    entries, found = keep_entries(None, lambda found: _find_rows(rows, images, limit, found))
    problems.merge(found)
    return FilePairs(spec, entries, problems)


def open_samples(
    spec: str,
    paths: Sequence[str],
    limit: int | None,
    weights: Mapping[str, float] | None = None,
    *,
    img2dataset: bool = False,
    names: Sequence[str] | None = None,
    taken: np.ndarray = _NONE,
) -> FilePairs:
    """Returns the pairs of files that share a name but for the suffix: image and .txt (or .json).

    Problems counted: those of `archives.list_files`, `caption_missing`, `image_missing`,
    `file_not_an_image` (of a name that is no pair's), `key_duplicate` (the first pair of a key is
    used: a name that an archive holds twice, or that `img2dataset` has in several archives).

    Args:
      spec: names the source in messages.
      paths: folders, zips and tars, see `archives_inside`.
      limit: pairs to use, or None for all.
      weights: of the fields of the .json files, which are then the only ones with captions.
      img2dataset: whether a name that occurs in several archives is one key and a .txt one caption;
        otherwise the name of the archive is put in front of it from the second one on, and each
        line of a .txt is a caption.
      names: of the archives, for that; by default their `short_names`.
      taken: record.hash_key of keys that earlier archives have, uint64.
    """
    names = names or short_names(paths)
    job = functools.partial(_list_samples, json_only=bool(weights))

    def build(problems: Problems) -> Iterator[Entry]:
        seen = KeyHashes(taken)
        for path, name, found in zip(paths, names, for_each(job, paths), strict=True):
            samples, hashes, own = found
            problems.merge(own)
            for (key, *sample), again in zip(samples, seen.add(hashes).tolist(), strict=True):
                if again and img2dataset:
                    problems.add("key_duplicate", f"{path}: {key}")
                    continue
                if again:  # shards may number their samples from 0 again
                    key = f"{name}/{key}"
                    seen.add(np.array([hash_key(key)], np.uint64))
                yield key, *sample

    what = ["samples", bool(weights), img2dataset, limit, list(names), taken.tolist()]
    stamp = stamp_files(what, paths)
    entries, problems = keep_entries(stamp, lambda found: itertools.islice(build(found), limit))
    return FilePairs(spec, entries, problems, weights, one_caption=img2dataset)


def hash_samples(paths: Sequence[str], weights: Mapping[str, float] | None) -> Iterator[np.ndarray]:
    """Yields the record.hash_key of the keys of each archive, see `open_samples`, uint64."""
    yield from for_each(functools.partial(_hash_samples, json_only=bool(weights)), paths)


def list_images(paths: Sequence[str], problems: Problems) -> list[tuple[str, Member]]:
    """Returns (path, member) of all images in folders, zips and tars, whatever lies beside them.

    Args:
      paths: see `archives_inside`.
      problems: receives those of `archives.list_files`, `image_missing` (a .txt or .json file
        without image) and `file_not_an_image`.
    """
    found = []
    for path in paths:
        others: dict[str, dict[str, Member]] = {}
        stems = set()
        members = {member.name: member for member in list_files(path, problems)}
        for member in members.values():
            stem, suffix = posixpath.splitext(member.name)
            if _is_image(member.name):
                stems.add(stem)
                found.append((path, member))
            else:
                others.setdefault(stem, {})[suffix.lower()] = member
        for stem, files in others.items():
            if stem not in stems:
                _count_without_image(f"{path}: {stem}", files, problems)
    return found


def open_class_folders(
    spec: str,
    paths: list[str],
    classes: str | tuple[tuple[str, ...], dict[str, int]] | None,
    limit: int | None,
) -> LabelledFiles:
    """Returns the images of `class/file` names with their classes.

    Problems counted: those of `archives.list_files`, `file_not_an_image`, `class_unknown` (an image
    in no folder, or in one that the TSV does not name).

    Args:
      spec: names the source in messages.
      paths: folders, zips and tars.
      classes: TSV with lines of index, folder, name; or (names, folder -> label); None numbers the
        folders in the order of their names, which is that of the numbers where all are numbers.
      limit: images to use, evenly spaced so that all classes stay; None for all.

    Raises:
      ValueError: a TSV that does not exist or is not numbered 0, 1, 2, ...
    """
    problems = Problems()
    members = []
    for member in (m for path in paths for m in _last_of_each(list_files(path, problems))):
        if _is_image(member.name):
            members.append((posixpath.basename(posixpath.dirname(member.name)), member))
        else:
            problems.add("file_not_an_image", f"{member.path}: {member.name}")
    if classes is None:
        names = tuple(_sorted_classes({folder for folder, _ in members if folder}))
        label_of = {name: label for label, name in enumerate(names)}
    else:
        names, label_of = _read_classes(classes) if isinstance(classes, str) else classes
    entries = []
    for folder, member in members:
        if folder in label_of:
            entries.append((member, label_of[folder]))
        else:
            problems.add("class_unknown", member.name)
    if limit is not None and limit < len(entries):
        entries = [entries[i * len(entries) // limit] for i in range(limit)]
    return LabelledFiles(spec, entries, names, problems)


def expand(pattern: str, accepted: str) -> list[str]:
    """Returns the folders and archives that a path or glob pattern names, sorted.

    Raises:
      ValueError: there are none, or one is neither folder, zip nor tar; says what is `accepted`.
    """
    paths = find_paths(pattern)
    if not paths:
        raise ValueError(f"{pattern} does not exist; accepted: {accepted}.")
    for path in paths:
        if not os.path.isdir(path) and not path.lower().endswith(ARCHIVE_SUFFIXES):
            raise ValueError(f"{path} is of no known kind; accepted: {accepted}.")
    return paths


def archives_inside(paths: Sequence[str], problems: Problems) -> list[str]:
    """Returns the paths, in place of a folder that holds archives these.

    Args:
      paths: folders and archives.
      problems: receives `name_hidden` and `file_not_an_image` of a folder of archives, but for
        files about the set as a whole or about one of the archives (00000.parquet of 00000.tar).

    Raises:
      ValueError: a folder holds both archives and images: which of them are meant?
    """
    found = []
    for path in paths:
        names = sorted(os.listdir(path)) if os.path.isdir(path) else []
        inside = [n for n in names if n.lower().endswith(ARCHIVE_SUFFIXES) and n[0] != "."]
        found += [os.path.join(path, name) for name in inside] or [path]
        if not inside:
            continue
        stems = {posixpath.splitext(name)[0] for name in inside}
        loose = Problems()
        for member in list_files(path, loose):
            if _is_image(member.name):
                raise ValueError(
                    f"{path} holds both archives ({inside[0]}) and images ({member.name}); move "
                    f"one kind elsewhere, or name the archives: '{path}/*"
                    f"{posixpath.splitext(inside[0])[1]}'."
                )
            stem = member.name.partition(".")[0].removesuffix("_stats")
            if stem not in stems and member.name not in _SET_FILES:
                loose.add("file_not_an_image", member.path)
        problems.merge(loose)
    return found


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _count_without_image(name: str, files: Mapping[str, Member], problems: Problems) -> None:
    """Counts the files of one name without image once: as what is there in place of it."""
    other = next((suffix for suffix in files if suffix not in _CAPTION_SUFFIXES), None)
    if other is None:
        problems.add("image_missing", name)
    else:
        problems.add("file_not_an_image", name + other)


def _last_of_each(members: Iterable[Member]) -> Iterable[Member]:
    return {member.name: member for member in members}.values()


def _sorted_classes(names: Iterable[str]) -> list[str]:
    names = sorted(names)
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    return names


def _patterns(images: str) -> list[str]:
    return [images] if os.path.exists(images) else images.split(",")


def _find_rows(
    rows: Iterable[Row], images: str, limit: int | None, problems: Problems
) -> Iterator[Entry]:
    """Yields the entries of up to `limit` rows, of all of which the problems are counted."""
    paths = [
        file
        for pattern in _patterns(images)
        for file in expand(pattern, "folders, .zip and .tar files of images")
    ]
    archives = []
    for path, (index, own) in zip(paths, for_each(_index, paths), strict=True):
        archives.append((path, index))
        problems.merge(own)
    find = ImageFinder(archives, problems)
    names, keys, count = short_names(paths), set(), 0
    for row in rows:
        found = find(row.image, row.shard)
        if found is not None:
            place, member = found
            key = printable(row.image)
            if key in keys:
                key = f"{names[place]}/{key}"
            keys.add(key)
            if limit is None or count < limit:
                yield key, member, row
            count += 1


def _index(path: str) -> tuple[dict[str, Member], Problems]:
    problems = Problems()
    return index_files(path, problems), problems


def _list_samples(path: str, json_only: bool) -> tuple[list[Entry], np.ndarray, Problems]:
    """Returns the pairs of an archive or folder, each key once, and the hashes of their keys."""
    problems = Problems()
    samples, seen, own = {}, collections.Counter(), {}
    for member in list_files(path, problems):
        stem, suffix = posixpath.splitext(member.name)
        kind = "image" if _is_image(member.name) else suffix.lower()
        samples.setdefault((stem, seen[member.name]), {}).setdefault(kind, member)
        seen[member.name] += 1
    for (stem, _), files in samples.items():
        captions = (None if json_only else files.get(".txt")) or files.get(".json")
        if "image" in files and captions:
            key = printable(stem)
            if key in own:
                problems.add("key_duplicate", f"{path}: {stem}")
            else:
                own[key] = (key, files["image"], captions)
        elif "image" in files:
            problems.add("caption_missing", f"{path}: {stem}")
        else:
            _count_without_image(f"{path}: {stem}", files, problems)
    return list(own.values()), np.fromiter(map(hash_key, own), np.uint64, len(own)), problems


def _hash_samples(path: str, json_only: bool) -> np.ndarray:
    return _list_samples(path, json_only)[1]


def _read_classes(path: str) -> tuple[tuple[str, ...], dict[str, int]]:
    if not os.path.isfile(path):
        raise ValueError(f"{path} does not exist; classes= is a TSV of index, folder and name.")
    rows = [line.split("\t") for line in read_lines(path) if line.strip()]
    if any(len(row) < 3 or not row[0].isdecimal() for row in rows):
        raise ValueError(f"{path} must hold lines of index, folder and name, separated by tabs.")
    names = {int(row[0]): row[2] for row in rows}
    if sorted(names) != list(range(len(rows))):
        raise ValueError(f"{path} must number its classes 0, 1, 2, ... without gaps or repeats.")
    return tuple(names[i] for i in range(len(rows))), {row[1]: int(row[0]) for row in rows}
