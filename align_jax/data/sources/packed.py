"""Image-text pairs from a TFDS dataset of ArrayRecord shards, without TensorFlow.

Reads what curate/pack/ writes and any TFDS dataset with an encoded `image` and captions,
nested ones such as coco_captions' included. open_source.py is the way in.
"""

import bisect
import collections
import contextlib
import glob
import itertools
import os
import resource
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from align_jax.data.sources.column_names import CAPTION_COLUMNS
from align_jax.data.sources.record import Record, weigh_captions
from align_jax.storage import identity
from align_jax.storage.problems import Problems

if TYPE_CHECKING:
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader

# What a packed dataset has: all captions of an image, and the column that each is from.
_PACKED = ("captions", "caption_columns")
_NESTED_CAPTIONS = ("text", "raw", "caption")
_KEYS = ("key", "image/filename", "filename", "file_name", "image/id", "image_id", "id")


_MOST_OPEN = 512  # shards of a process; fewer where it may open few files
_readers: collections.OrderedDict[tuple[object, str], "ArrayRecordReader"] = (
    collections.OrderedDict()
)
_readers_lock = threading.Lock()


class ShardUnreadable(RuntimeError):
    """A whole shard cannot be read: no record can stand in for those that it holds."""


class TfdsPairs:
    """A PairSource over one split of a TFDS dataset."""

    def __init__(
        self,
        spec: str,
        folder: str,
        split: str,
        limit: int | None,
        weights: Mapping[str, float] | None = None,
    ):
        """Opens the split.

        Args:
          spec: names the source in messages.
          folder: holds dataset_info.json.
          split: a split or a slice of one, e.g. `train[:1000]`.
          limit: number of records to keep, or None for all.
          weights: caption feature, or column that was packed, -> weight (record.weigh_captions);
            None takes the first of column_names.CAPTION_COLUMNS that the dataset has.

        Raises:
          ValueError: no such split, no image or caption feature, or not ArrayRecord files.
        """
        self._spec, self._folder, self._split = spec, folder, split
        self._weights = weights
        self._lock, self._opened = threading.Lock(), object()
        builder = open_builder(folder)
        if split.split("[")[0] not in builder.info.splits:
            raise ValueError(
                f"{spec}: split {split!r} is not in {folder}; "
                f"it has {', '.join(sorted(builder.info.splits))}."
            )
        if builder.info.file_format.value != "array_record":
            raise ValueError(
                f"{folder} holds {builder.info.file_format.value} files, which allow no random "
                "access; prepare it with file_format='array_record'."
            )
        self._find_features(builder.info.features)
        instructions = builder.info.splits[split].file_instructions
        self._shards = [(shard.basename(), shard.skip, shard.take) for shard in instructions]
        self._sizes = [shard.examples_in_shard for shard in instructions]
        self._ends = list(itertools.accumulate(take for *_, take in self._shards))
        self._open(builder)
        length = self._ends[-1] if self._ends else 0
        self._length = min(length, limit or length)
        self.problems = Problems()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        """Returns a record with the encoded image.

        Raises:
          OSError: the record is damaged.
          ShardUnreadable: the shard is missing, damaged as a whole or cannot be opened.
        """
        example = self.example(index)
        texts = {name: _texts(example[name], inner) for name, inner in self._captions.items()}
        key = example[self._key] if self._key else index % self._length
        return Record(
            key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key),
            example["image"],
            *self._weigh(texts),
            _present({name: example[name] for name in self._metadata}),
        )

    def example(self, index: int) -> dict[str, Any]:
        """Returns the features in use of a record, the image encoded; errors as of an item."""
        if not -self._length <= index < self._length:
            raise IndexError(f"index {index} is out of range for {self.describe()}.")
        index %= self._length
        if self._features is None:
            with self._lock:
                if self._features is None:
                    self._open(open_builder(self._folder))
        number = bisect.bisect_right(self._ends, index)
        name, skipped, length = self._shards[number]
        path = os.path.join(self._folder, name)
        reader = _open_shard(self._opened, path, self._sizes[number])
        try:
            (data,) = reader.read([skipped + index - self._ends[number] + length])
        except RuntimeError as error:  # ArrayRecord's word for a damaged block
            raise OSError(f"{self._spec}: record {index} cannot be read: {error}") from error
        example = _read_plain(data, self._plain) if self._plain else None
        if example is None:
            example = self._features.deserialize_example_np(data, decoders=self._decoders)
        return example

    def captions(self, index: int) -> tuple[str, ...]:
        """Returns the captions of a record."""
        return self[index].captions

    def where(self, index: int) -> str:
        """Returns the shard that holds a record."""
        if not 0 <= index < self._ends[-1]:
            raise IndexError(f"index {index} is out of range for {self.describe()}.")
        number = bisect.bisect_right(self._ends, index)
        name, skipped, length = self._shards[number]
        place = skipped + index - self._ends[number] + length
        return f"{self._spec}: record {place} of {name}"

    def describe(self) -> str:
        """Returns the spec and the number of pairs."""
        return f"{self._spec}: {len(self)} pairs"

    def stamp(self) -> str:
        """Returns what identity.stamp does: shards in order, features read, records used."""
        shards = [os.path.join(self._folder, name) for name, *_ in self._shards]
        return identity.digest(
            [
                self._length,
                [[skipped, length] for _, skipped, length in self._shards],
                identity.of_files(shards),
                [sorted(self._captions), self._key, sorted((self._weights or {}).items())],
            ]
        )

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_lock", "_opened", "_features", "_decoders", "_plain"):
            state[name] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock, self._opened = threading.Lock(), object()

    def _find_features(self, features: "tfds.features.FeaturesDict") -> None:
        found = [name for name in CAPTION_COLUMNS if name in features][:1]
        names = found if self._weights is None else list(self._weights)
        if self._weights and not set(names) & set(features) and set(_PACKED) <= set(features):
            names = list(_PACKED)
        if "image" not in features or not names or not set(names) <= set(features):
            wanted = f"one of {', '.join(CAPTION_COLUMNS)}"
            raise ValueError(
                f"{self._spec} has features {', '.join(sorted(features))}; pairs need image and "
                f"{' and '.join(self._weights) if self._weights else wanted}."
            )
        # caption feature -> the text feature inside of it, or None
        self._captions = {name: self._find_text(name, features[name]) for name in names}
        self._key = next((name for name in _KEYS if name in features), None)
        others = set(features) - {"image", self._key, *_PACKED, *CAPTION_COLUMNS, *names}
        self._metadata = sorted(name for name in others if _is_scalar(features[name]))

    def _weigh(
        self, texts: dict[str, list[str]]
    ) -> tuple[tuple[str, ...], tuple[float, ...], tuple[str, ...]]:
        """Returns (captions, weights, columns) of a Record."""
        if self._weights is None:
            (captions,) = texts.values()
            return tuple(captions), (), ()
        if set(texts) == set(_PACKED):
            columns = {}
            for caption, column in zip(*map(texts.get, _PACKED), strict=True):
                columns.setdefault(column, []).append(caption)
            texts = columns
        return weigh_captions(texts, self._weights)

    def _find_text(self, name: str, feature: "tfds.features.FeatureConnector") -> str | None:
        inner = getattr(feature, "feature", feature)  # a Sequence holds another feature
        if not hasattr(inner, "keys"):
            return None
        nested = next((text for text in _NESTED_CAPTIONS if text in inner.keys()), None)
        if nested is None:
            raise ValueError(
                f"{self._spec}: feature {name!r} has none of {', '.join(_NESTED_CAPTIONS)}."
            )
        return nested

    def _open(self, builder: "tfds.core.DatasetBuilder") -> None:
        import tensorflow_datasets as tfds

        names = {"image", *self._captions, *([self._key] if self._key else []), *self._metadata}
        self._decoders = {"image": tfds.decode.SkipDecoding()}
        features = tfds.features.FeaturesDict({n: builder.info.features[n] for n in names})
        self._plain = _plain_fields(features)
        # Set last: another thread may be waiting for it.
        self._features = features


def _plain_fields(features: "tfds.features.FeaturesDict") -> dict[str, tuple[str, bool]]:
    """Returns feature -> (its field in a tf.train.Feature, whether it is a list).

    Empty if some are neither an image, a text, a list of texts nor a number: TFDS reads those.
    """
    found = {}
    for name, info in features.get_serialized_info().items():
        kind, dtype = type(features[name]).__name__, np.dtype(getattr(info, "np_dtype", "V"))
        if kind == "Sequence":
            kind = f"Sequence of {type(features[name].feature).__name__}"
        if kind in ("Image", "Text", "Sequence of Text") and dtype.kind == "O":
            found[name] = "bytes_list", kind.startswith("Sequence")
        elif kind in ("Tensor", "Scalar", "ClassLabel") and info.shape == () and dtype.kind in "if":
            found[name] = {"i": "int64_list", "f": "float_list"}[dtype.kind], False
        else:
            return {}
    return found


def _read_plain(data: bytes, fields: Mapping[str, tuple[str, bool]]) -> dict[str, Any] | None:
    """Returns what TFDS makes of a tf.train.Example, in a fifth of the time; None if it is odd."""
    from tensorflow_datasets.proto import tf_example_pb2

    stored, example = tf_example_pb2.Example.FromString(data).features.feature, {}
    for name, (field, is_list) in fields.items():
        if name not in stored or stored[name].WhichOneof("kind") != field:
            return None
        values = getattr(stored[name], field).value
        if is_list:
            example[name] = list(values)
        elif len(values) == 1:
            example[name] = values[0]
        else:
            return None
    return example


def _open_shard(source: object, path: str, num_records: int) -> "ArrayRecordReader":
    """Returns a reader of a shard; a process holds the ones used last, of all its sources.

    A reader that falls out of them is closed when nobody reads from it any more.
    """
    key = source, path
    with _readers_lock:
        if key in _readers:
            _readers.move_to_end(key)
            return _readers[key]
    # Imported late, as TFDS is.
    from array_record.python.array_record_module import ArrayRecordReader

    most = _most_open()
    try:
        os.close(os.open(path, os.O_RDONLY))  # the reader itself would say nothing
        reader = ArrayRecordReader(
            path, options="readahead_buffer_size:0", file_reader_buffer_size=2**15
        )
        found = reader.num_records()
    except (OSError, RuntimeError) as error:
        raise ShardUnreadable(f"{path} cannot be opened: {_why(error)}.") from error
    if found != num_records:
        raise ShardUnreadable(
            f"{path} holds {found} records, not {num_records} as its dataset_info.json says: the "
            "shard is damaged or incomplete; put it back or pack again."
        )
    with _readers_lock:
        reader = _readers.setdefault(key, reader)
        while len(_readers) > most:
            _readers.popitem(last=False)
    return reader


def _most_open() -> int:
    """Returns how many shards may be open; raises the limit of open files as far as allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_OPEN if soft == resource.RLIM_INFINITY else min(_MOST_OPEN, max(8, soft // 4))


def _why(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _is_scalar(feature: "tfds.features.FeatureConnector") -> bool:
    return getattr(feature, "shape", None) == () and np.dtype(feature.np_dtype).kind in "iufO"


def _present(values: Mapping[str, Any]) -> dict[str, str | int | float]:
    """Returns plain values; those that stand for none, "" and NaN, are left out."""
    found = {}
    for name, value in values.items():
        value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        value = value.item() if isinstance(value, np.generic) else value
        if value != "" and value == value:
            found[name] = value
    return found


def _texts(value: bytes | np.ndarray | Mapping[str, np.ndarray], nested: str | None) -> list[str]:
    """The captions of a record: a text, [N] texts, or [N] texts in the feature `nested`."""
    values = value[nested] if nested else value
    values = [values] if isinstance(values, bytes) else values
    return [text.decode("utf-8", "replace") for text in values]


def find_tfds_folder(path: str) -> str | None:
    """Returns the folder at or up to two levels below `path` with dataset_info.json, or None.

    Raises:
      ValueError: there are several, e.g. versions.
    """
    found = []
    for level in ("", "*", os.path.join("*", "*")):
        pattern = os.path.join(glob.escape(path), level, "dataset_info.json")
        found = sorted(os.path.dirname(file) for file in glob.glob(pattern))
        if found:
            break
    if len(found) > 1:
        raise ValueError(f"{path} holds several TFDS datasets; name one: {', '.join(found)}.")
    return found[0] if found else None


def open_builder(folder: str) -> "tfds.core.DatasetBuilder":
    """Returns the builder of a prepared dataset."""
    # Imported late: TFDS costs a third of a second and most sources do not need it.
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(folder)
