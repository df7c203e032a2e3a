"""Image-text pairs from a TFDS dataset of ArrayRecord shards, without TensorFlow.

Reads what curate/pack/ writes and any TFDS dataset with an encoded `image` and captions,
nested ones such as coco_captions' included. open_source.py is the way in.
"""

import glob
import os
import threading
from collections.abc import Mapping

from align_jax.data.sources.column_names import CAPTION_COLUMNS
from align_jax.data.sources.record import Record, weigh_captions
from align_jax.storage import identity
from align_jax.storage.problems import Problems

# What a packed dataset has: all captions of an image, and the column that each is from.
_PACKED = ("captions", "caption_columns")
_NESTED_CAPTIONS = ("text", "raw", "caption")
_KEYS = ("key", "image/filename", "filename", "file_name", "image/id", "image_id", "id")


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
        self._lock = threading.Lock()
        builder = _open_builder(folder)
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
        self._shards = [
            (shard.basename(), shard.skip, shard.take)
            for shard in builder.info.splits[split].file_instructions
        ]
        self._open(builder)
        self._length = min(len(self._records), limit or len(self._records))
        self.problems = Problems()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        """Returns a record with the encoded image; OSError if it is damaged."""
        if not -self._length <= index < self._length:
            raise IndexError(f"index {index} is out of range for {self.describe()}.")
        index %= self._length
        if self._records is None:
            with self._lock:
                if self._records is None:
                    self._open(_open_builder(self._folder))
        try:
            data = self._records[index]
        except RuntimeError as error:  # ArrayRecord's word for a damaged block
            raise OSError(f"{self._spec}: record {index} cannot be read: {error}") from error
        example = self._features.deserialize_example_np(data, decoders=self._decoders)
        texts = {name: _texts(example[name], inner) for name, inner in self._captions.items()}
        key = example[self._key] if self._key else index
        return Record(
            key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key),
            example["image"],
            *self._weigh(texts),
        )

    def captions(self, index: int) -> tuple[str, ...]:
        """Returns the captions of a record."""
        return self[index].captions

    def where(self, index: int) -> str:
        """Returns the shard that holds a record."""
        rest = index
        for name, skipped, length in self._shards:
            if rest < length:
                return f"{self._spec}: record {rest + skipped} of {name}"
            rest -= length
        raise IndexError(f"index {index} is out of range for {self.describe()}.")

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

    def __getstate__(self):
        state = self.__dict__.copy()
        for name in ("_lock", "_records", "_features", "_decoders"):
            state[name] = None
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def _find_features(self, features):
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

    def _weigh(self, texts):
        if self._weights is None:
            (captions,) = texts.values()
            return tuple(captions), (), ()
        if set(texts) == set(_PACKED):
            columns = {}
            for caption, column in zip(*map(texts.get, _PACKED), strict=True):
                columns.setdefault(column, []).append(caption)
            texts = columns
        return weigh_captions(texts, self._weights)

    def _find_text(self, name, feature):
        inner = getattr(feature, "feature", feature)  # a Sequence holds another feature
        if not hasattr(inner, "keys"):
            return None
        nested = next((text for text in _NESTED_CAPTIONS if text in inner.keys()), None)
        if nested is None:
            raise ValueError(
                f"{self._spec}: feature {name!r} has none of {', '.join(_NESTED_CAPTIONS)}."
            )
        return nested

    def _open(self, builder):
        import tensorflow_datasets as tfds

        names = {"image", *self._captions, *([self._key] if self._key else [])}
        self._features = tfds.features.FeaturesDict(
            {name: builder.info.features[name] for name in names}
        )
        self._decoders = {"image": tfds.decode.SkipDecoding()}
        # Set last: another thread may be waiting for it.
        self._records = builder.as_data_source(
            self._split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )


def _texts(value, nested):
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


def _open_builder(folder):
    # Imported late: TFDS costs a third of a second and most sources do not need it.
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(folder)
