"""Image-text pairs from a TFDS dataset of ArrayRecord shards, without TensorFlow.

Reads what curate/pack.py writes and any TFDS dataset with an encoded `image` and captions,
nested ones such as coco_captions' included. sources.open_source is the way in.
"""

import glob
import os
import threading

from align_jax.data.archives import Problems
from align_jax.data.record import Record
from align_jax.data.tables import CAPTION_COLUMNS

_NESTED_CAPTIONS = ("text", "raw", "caption")
_KEYS = ("key", "image/filename", "filename", "file_name", "image/id", "image_id", "id")


class TfdsPairs:
    """A PairSource over one split of a TFDS dataset."""

    def __init__(self, spec: str, folder: str, split: str, limit: int | None):
        """Opens the split.

        Args:
          spec: names the source in messages.
          folder: holds dataset_info.json.
          split: a split or a slice of one, e.g. `train[:1000]`.
          limit: number of records to keep, or None for all.

        Raises:
          ValueError: no such split, no image or caption feature, or not ArrayRecord files.
        """
        self._spec, self._folder, self._split = spec, folder, split
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
        captions = example[self._caption]
        if self._nested:
            captions = captions[self._nested]
        if isinstance(captions, bytes):
            captions = [captions]
        key = example[self._key] if self._key else index
        return Record(
            key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key),
            example["image"],
            tuple(caption.decode("utf-8", "replace") for caption in captions),
        )

    def captions(self, index: int) -> tuple[str, ...]:
        """Returns the captions of a record."""
        return self[index].captions

    def describe(self) -> str:
        """Returns the spec and the number of pairs."""
        return f"{self._spec}: {len(self)} pairs"

    def __getstate__(self):
        state = self.__dict__.copy()
        for name in ("_lock", "_records", "_features", "_decoders"):
            state[name] = None
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def _find_features(self, features):
        caption = next((name for name in CAPTION_COLUMNS if name in features), None)
        if "image" not in features or caption is None:
            raise ValueError(
                f"{self._spec} has features {', '.join(sorted(features))}; pairs need image and "
                f"one of {', '.join(CAPTION_COLUMNS)}."
            )
        feature = features[caption]
        inner = getattr(feature, "feature", feature)  # a Sequence holds another feature
        self._caption, self._nested = caption, None
        if hasattr(inner, "keys"):
            self._nested = next((name for name in _NESTED_CAPTIONS if name in inner.keys()), None)
            if self._nested is None:
                raise ValueError(
                    f"{self._spec}: feature {caption!r} has none of {', '.join(_NESTED_CAPTIONS)}."
                )
        self._key = next((name for name in _KEYS if name in features), None)

    def _open(self, builder):
        import tensorflow_datasets as tfds

        names = {"image", self._caption, *([self._key] if self._key else [])}
        self._features = tfds.features.FeaturesDict(
            {name: builder.info.features[name] for name in names}
        )
        self._decoders = {"image": tfds.decode.SkipDecoding()}
        # Set last: another thread may be waiting for it.
        self._records = builder.as_data_source(
            self._split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )


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
