"""Random access to image-text pairs and labelled images: `open_source`, `open_labelled`.

A source is named by one string: a path, or `scenes`, and options after `?`, as in a URL. Relative
paths start at the current directory. Nothing is decoded here (images.py does), and a source can be
pickled and read from any thread or process.
"""

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from align_jax.data.sources import files, parquet
from align_jax.data.sources.classified_tars import open_classified_tars
from align_jax.data.sources.img2dataset import Img2Dataset, is_img2dataset
from align_jax.data.sources.karpathy import open_karpathy
from align_jax.data.sources.languages import open_language
from align_jax.data.sources.objectnet import open_objectnet
from align_jax.data.sources.packed import TfdsPairs, find_tfds_folder
from align_jax.data.sources.packed_labels import TfdsLabelled
from align_jax.data.sources.parquet import ParquetLabelled, ParquetPairs
from align_jax.data.sources.parts import Part
from align_jax.data.sources.record import LabelledImage, Record
from align_jax.data.sources.scenes import LabelledScenes, Scenes
from align_jax.data.sources.shards import Archives
from align_jax.data.sources.table_files import TABLE_SUFFIXES, open_table
from align_jax.storage import identity, writing
from align_jax.storage.problems import Problems

_ACCEPTED = (
    "'scenes?size=N', a TFDS or img2dataset folder, a caption table ("
    + " ".join(TABLE_SUFFIXES)
    + ") with "
    "?images=..., or a folder, .tar or .zip files of key.jpg + key.txt"
)
_ACCEPTED_LABELLED = (
    "'scenes?size=N&label=shape', or a folder, .zip or .tar with one folder of images a class"
)


class PairSource(Protocol):
    """Image-text pairs by index.

    Attributes:
      problems: what the store promises but does not hold, found when it was opened and not part
        of `len`: reason -> count.
    """

    problems: Problems

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def captions(self, index: int) -> tuple[str, ...]:
        """Returns the captions of a record; costs no more than it must."""
        ...

    def where(self, index: int) -> str:
        """Returns the file or shard that holds a record, for reports; reads nothing."""
        ...

    def describe(self) -> str:
        """Returns one line that names the source and its size, the same in every run."""


class LabelledSource(Protocol):
    """Labelled images by index; `classes[label]` is the name of a label; problems as of pairs."""

    classes: tuple[str, ...]
    problems: Problems

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> LabelledImage: ...

    def describe(self) -> str:
        """Returns one line that names the source and its size, the same in every run."""


def open_source(spec: str) -> PairSource:
    """Returns the pairs that `spec` names.

    | spec | what |
    |---|---|
    | `scenes?size=20000&seed=1` | procedural scenes; also `image_size_px` |
    | `folder?split=train` | TFDS dataset of ArrayRecord files with an image and captions |
    | `captions.jsonl?images=a.zip,b.zip` | table (tables.read_table) + folders, zips or tars |
    | `data/train-*.parquet`, `folder?split=train` | Parquet with image bytes and captions |
    | `dataset_coco.json?images=coco&split=test` | Karpathy's splits; several as `train,restval` |
    | `captions.jsonl?lang=de&images=a.zip` | a field a language, XM3600's too; Multi30k's `data` |
    | `folder?unfinished=refuse` | output of img2dataset; by default unfinished shards are skipped |
    | `folder/*.tar`, `x.tar`, `x.zip`, `folder` | `key.jpg` + `key.txt` or `key.json` |

    `max=N` keeps the first N pairs of any but scenes. Paths of archives and images may be globs.
    `captions=alt_text:0.3,synthetic:0.7` takes the captions from these columns of a table, fields
    of each `key.json`, features of a TFDS dataset or columns that it was packed from. Training
    draws from a column with that relative probability, from the others where it is blank. Without
    a number, the weight is 1.

    Raises:
      ValueError: a path that does not exist, an unknown option or column, or no usable pair.
    """
    path, options = _parse(spec)
    weights = _caption_weights(spec, options)
    if path == "scenes":
        _check_options(spec, options, ("size", "seed", "image_size_px"))
        return Scenes(**_scene_options(spec, options))
    if "lang" in options:
        _check_options(spec, options, ("lang", "images", "max"))
        if "images" not in options:
            raise ValueError(f"{spec} does not say where its images are; add &images=.")
        images, lang = options["images"], options["lang"]
        source = open_language(spec, path, images, lang, _limit(spec, options))
    elif "images" not in options and (tables := _parquet_files(path, options)):
        _check_options(spec, options, ("split", "captions", "max"))
        source = ParquetPairs(spec, tables, _limit(spec, options), weights)
    elif os.path.splitext(path)[1].lower() in TABLE_SUFFIXES and not os.path.isdir(path):
        is_karpathy = path.lower().endswith(".json") and "split" in options
        _check_options(spec, options, ("images", "split" if is_karpathy else "captions", "max"))
        source = _open_table(spec, path, options, weights)
    elif os.path.isdir(path) and (folder := find_tfds_folder(path)):
        _check_options(spec, options, ("split", "captions", "max"))
        split = options.get("split", "train")
        source = TfdsPairs(spec, folder, split, _limit(spec, options), weights)
    elif is_img2dataset(path):
        _check_options(spec, options, ("unfinished", "captions", "max"))
        folder = Img2Dataset(spec, path, options.get("unfinished", "skip"), weights)
        if "max" not in options:
            return folder  # not asked for its length, for which it must index its shards
        source = folder.open(_limit(spec, options))
    else:
        paths = files.expand(path, _ACCEPTED)
        _check_options(spec, options, ("captions", "max"))
        problems = Problems()
        archives = files.archives_inside(paths, problems)
        if len(archives) > 1 and "max" not in options:
            return Archives(spec, archives, problems, weights)
        source = files.open_samples(spec, archives, _limit(spec, options), weights)
        source.problems.merge(problems)
    if len(source) == 0:
        raise ValueError(f"{spec} holds no usable pair. {source.problems}".strip())
    return source


def open_labelled(spec: str) -> LabelledSource:
    """Returns the labelled images that `spec` names.

    | spec | what |
    |---|---|
    | `scenes?size=512&seed=9&label=shape` | procedural scenes and one of their attributes |
    | `test.zip?classes=classes.tsv` | members `class/file`; TSV of index, folder, name |
    | `folder` | a sub-folder for each class, numbered in the order of their names |

    | `wds/test`, `wds/test/*.tar` | tars of `key.jpg` + `key.cls`, and `classnames.txt` |
    | `folder?split=test`, `test-*.parquet` | Parquet with image bytes and labels |
    | `folder?split=test&label=fine_label` | TFDS dataset of ArrayRecord files with a ClassLabel |
    | `objectnet-1.0/images?mappings=objectnet-1.0/mappings` | ObjectNet; also `border` (2 px) |

    `max=N` keeps N of the images, evenly spaced, so that all classes stay. `part=K/N` keeps of each
    class the K-th image and every N-th after it: `part=1/2` to learn from, `part=2/2` to test.

    Raises:
      ValueError: a path that does not exist, an unknown option, or no labelled image.
    """
    path, options = _parse(spec)
    if "part" in options:
        part = options.pop("part")
        rest = "&".join(f"{name}={value}" for name, value in options.items())
        return Part(spec, open_labelled(f"{path}?{rest}" if rest else path), part)
    if path == "scenes":
        _check_options(spec, options, ("size", "seed", "label", "image_size_px"))
        if "label" not in options:
            raise ValueError(f"{spec} needs a label, e.g. scenes?size=512&label=shape.")
        attribute = options.pop("label")
        return LabelledScenes(attribute=attribute, **_scene_options(spec, options))
    if tables := _parquet_files(path, options):
        _check_options(spec, options, ("split", "max"))
        return ParquetLabelled(spec, tables, _limit(spec, options))
    if os.path.isdir(path) and (folder := find_tfds_folder(path)):
        _check_options(spec, options, ("split", "label", "max"))
        split, limit = options.get("split", "train"), _limit(spec, options)
        return TfdsLabelled(spec, folder, split, limit, options.get("label"))
    paths = files.expand(path, _ACCEPTED_LABELLED)
    if "mappings" in options:
        _check_options(spec, options, ("mappings", "border", "max"))
        border = _integer(spec, "border", options.get("border", "2"), least=0)
        return open_objectnet(spec, paths, options["mappings"], border, _limit(spec, options))
    _check_options(spec, options, ("classes", "max"))
    if "classes" not in options:
        classified = open_classified_tars(spec, path, _limit(spec, options))
        if classified is not None and len(classified):
            return classified
    source = files.open_class_folders(spec, paths, options.get("classes"), _limit(spec, options))
    if len(source) == 0:
        raise ValueError(f"{spec} holds no labelled image. {source.problems}".strip())
    return source


class InMemory:
    """A PairSource over a list of Records."""

    def __init__(self, records: Iterable[Record]):
        """Keeps the records."""
        self._records = list(records)
        self.problems = Problems()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._records[index]

    def captions(self, index: int) -> tuple[str, ...]:
        """Returns the captions of a record."""
        return self._records[index].captions

    def where(self, index: int) -> str:
        """Returns the key of a record."""
        return self._records[index].key

    def stamp(self) -> str:
        """Returns what identity.stamp does: all records, their pixels or bytes included."""
        return identity.digest(
            (r.key, r.captions, r.weights, r.columns, hashlib.sha256(r.image).hexdigest())
            for r in self._records
        )

    def describe(self) -> str:
        """Returns the number of pairs."""
        return f"in memory: {len(self)} pairs"


def _parse(spec: str) -> tuple[str, dict[str, str]]:
    if os.path.exists(spec):
        return spec, {}
    writing.check_local(spec, "source")
    path, _, query = spec.partition("?")
    options = {}
    for part in filter(None, query.split("&")):
        name, _, value = part.partition("=")
        if not value:
            raise ValueError(f"{spec}: option {part!r} has no value; options look like ?max=100.")
        if name in options:
            raise ValueError(f"{spec} gives the option {name!r} twice.")
        options[name] = value
    return path, options


def _parquet_files(path: str, options: dict[str, str]) -> list[str]:
    is_file = path.lower().endswith(parquet.SUFFIX)
    if not is_file and (not os.path.isdir(path) or find_tfds_folder(path)):
        return []
    return parquet.find_files(path, options.get("split"))


def _check_options(spec: str, options: Iterable[str], known: Sequence[str]) -> None:
    for name in options:
        if name not in known:
            raise ValueError(f"{spec} has an unknown option {name!r}; known: {', '.join(known)}.")


def _limit(spec: str, options: Mapping[str, str]) -> int | None:
    return _integer(spec, "max", options["max"], least=1) if "max" in options else None


def _caption_weights(spec: str, options: Mapping[str, str]) -> dict[str, float] | None:
    if "captions" not in options:
        return None
    weights = {}
    for part in options["captions"].split(","):
        name, _, number = part.partition(":")
        try:
            weight = float(number or 1.0)
        except ValueError:
            weight = 0.0
        if not name or name in weights or not 0 < weight < math.inf:
            raise ValueError(
                f"{spec}: captions={options['captions']} must name columns, each once, with "
                "positive weights, e.g. captions=alt_text:0.3,synthetic:0.7."
            )
        weights[name] = weight
    return weights


def _scene_options(spec: str, options: dict[str, str]) -> dict[str, int]:
    if "size" not in options:
        raise ValueError(f"{spec} needs a size, e.g. scenes?size=20000&seed=1.")
    return {
        name: _integer(spec, name, value, least=0 if name == "seed" else 1)
        for name, value in ({"seed": "0"} | options).items()
    }


def _integer(spec: str, name: str, value: str, least: int) -> int:
    if not value.isdecimal() or int(value) < least:
        raise ValueError(f"{spec}: {name}={value} must be an integer of at least {least}.")
    return int(value)


def _open_table(
    spec: str, path: str, options: Mapping[str, str], weights: Mapping[str, float] | None
) -> files.FilePairs:
    if not os.path.isfile(path):
        raise ValueError(f"{path} does not exist; accepted: {_ACCEPTED}.")
    if "images" not in options:
        open_table(path)  # if it cannot be read, that is what to say
        raise ValueError(
            f"{spec} does not say where its images are; add ?images= and a folder, .zip or .tar "
            "(several with commas)."
        )
    limit = _limit(spec, options)
    if "split" in options:
        return open_karpathy(spec, path, options["images"], options["split"], limit)[0]
    return files.open_table(spec, path, options["images"], limit, weights)
