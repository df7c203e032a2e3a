"""One unit of `align pack`: some records of a source become some shards, in any process.

The result depends on the unit and the settings alone, so units may be packed by any number of
workers, in any order, and again after a crash. Planning and putting together is in pack.py.
"""

import dataclasses
import io
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.core import example_serializer

from align_jax.curate.pack import joins, metadata
from align_jax.curate.pack.key_lists import KeyList
from align_jax.curate.workers import Unit, in_order
from align_jax.data import images
from align_jax.data.sources.open_source import PairSource
from align_jax.data.sources.record import UNUSABLE_REASONS, Record, hash_key, is_usable
from align_jax.storage import text, writing
from align_jax.storage.problems import reason_of

SKIP_REASONS = (
    *UNUSABLE_REASONS,
    "key_duplicate",
    "not_kept",
    "dropped_by_list",
    "join_missing",
)
KEYS_LISTED = 20  # of each reason, in the report
JPEG_QUALITY = 95  # of resized images, as in img2dataset

_Checked = tuple[str, str | None, bytes | None]  # key, reason to skip, serialized record


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all units of a run share.

    Attributes:
      folder: receives the shards and results of all units.
      shard_bytes: a shard is closed when it reaches this size, and at the end of its unit.
      num_threads: records read and checked at the same time.
      resize_px: (short side,) or (width, height) that longer ones shrink to; () leaves every
        byte as it is.
      keep: keys to write, with their captions where the list has texts; None for all.
      drop: lists of keys not to write.
      columns: metadata to write, name -> kind, see metadata.choose.
    """

    folder: str
    shard_bytes: int
    num_threads: int
    resize_px: Sequence[int] = ()
    keep: KeyList | None = None
    drop: tuple[KeyList, ...] = ()
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)


def features(columns: Mapping[str, str]) -> tfds.features.FeaturesDict:
    """Returns the features of a packed record, with those of metadata."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            # Of each caption, "" where the source has one column: sources.open_source chooses.
            "caption_columns": tfds.features.Sequence(tfds.features.Text()),
            "key": tfds.features.Text(),
            **metadata.features(columns),
        }
    )


def pack_unit(unit: Unit, settings: Settings) -> Iterator[int]:
    """Writes the shards of a unit and its result; yields 1 after each record.

    The result (`result_path`, `hashes_path`) appears last: where it is, the unit is complete.
    """
    source, records = unit.open()
    skipped: dict[str, int] = {}
    skipped_keys: dict[str, list[str]] = {}
    hashes: dict[int, None] = {}  # of the keys written, in order
    shards = ShardWriter(settings.folder, unit.number, settings.shard_bytes)
    identities = {
        keys.by: joins.Identities(unit.source, keys.by)
        for keys in (settings.keep, *settings.drop)
        if keys is not None and keys.by is not None
    }
    check = _Checker(source, settings, identities)
    for key, reason, data in in_order(check, records, settings.num_threads):
        if reason is None and (hashed := hash_key(key)) in hashes:
            reason = "key_duplicate"
        if reason is None:
            hashes[hashed] = None
            shards.write(data)
        else:
            count_skipped(skipped, skipped_keys, reason, [key])
        yield 1
    shards.close()
    path = hashes_path(settings.folder, unit.number)
    with writing.replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.fromiter(hashes, np.uint64, len(hashes)))
    result = {
        "records_read": len(records),
        "shard_lengths": shards.lengths,
        "shard_sizes": shards.sizes,
        "skipped": skipped,
        "skipped_keys": skipped_keys,
        "dropping": sorted(check.dropping),
    }
    if unit.stop is None:
        result["problems"] = source.problems.to_json()
    writing.write_json(result_path(settings.folder, unit.number), result, ensure_ascii=False)


def count_skipped(
    counts: dict[str, int],
    keys: dict[str, list[str]],
    reason: str,
    new_keys: list[str],
    number: int | None = None,
) -> None:
    """Adds `number` records (default: one a key) to `counts`, the first 20 keys to `keys`."""
    counts[reason] = counts.get(reason, 0) + (len(new_keys) if number is None else number)
    listed = keys.setdefault(reason, [])
    listed += new_keys[: KEYS_LISTED - len(listed)]


def shard_path(folder: str, unit: int, shard: int) -> str:
    """Returns the path of a unit's shard."""
    return os.path.join(folder, f"{unit:07d}-{shard:03d}.shard")


def hashes_path(folder: str, unit: int) -> str:
    """Returns the path of the hashed keys, uint64 in the order of the records written."""
    return os.path.join(folder, f"{unit:07d}.npy")


def result_path(folder: str, unit: int) -> str:
    """Returns the path of the counts of a unit."""
    return os.path.join(folder, f"{unit:07d}.json")


class ShardWriter:
    """Writes records one after another into files of limited size.

    Attributes:
      lengths: records of each shard.
      sizes: bytes of the records of each shard.
    """

    def __init__(self, folder: str, unit: int, shard_bytes: int):
        self._folder, self._unit, self._shard_bytes = folder, unit, shard_bytes
        self._writer = None
        self.lengths: list[int] = []
        self.sizes: list[int] = []

    def write(self, data: bytes) -> None:
        """Adds a serialized record."""
        if self._writer is None:
            self._temporary = writing.temporary_path(shard_path(self._folder, self._unit, 0))
            self._writer = open_shard(str(self._temporary))
            self.lengths.append(0)
            self.sizes.append(0)
        self._writer.write(data)
        self.lengths[-1] += 1
        self.sizes[-1] += len(data)
        if self.sizes[-1] >= self._shard_bytes:
            self.close()

    def close(self) -> None:
        """Ends the shard; the next record starts another."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            path = shard_path(self._folder, self._unit, len(self.lengths) - 1)
            writing.move(self._temporary, path)


def open_shard(path: str) -> ArrayRecordWriter:
    """Returns a writer of records that can each be read alone, which a global shuffle needs."""
    return ArrayRecordWriter(path, "group_size:1")


class _Checker:
    """Callable index -> (key, reason to skip or None, serialized record).

    Attributes:
      dropping: numbers of the lists of `drop` that had a key so far.
    """

    def __init__(
        self, source: PairSource, settings: Settings, identities: Mapping[str, joins.Identities]
    ):
        self._source = source
        self._settings = settings
        self.dropping: set[int] = set()
        self._identities = identities  # name of metadata -> who has which
        self._features = features(settings.columns)
        self._serializer = example_serializer.ExampleSerializer(
            self._features.get_serialized_info()
        )

    def __call__(self, index: int) -> _Checked:
        key = f"record {index}"
        settings = self._settings
        try:
            record = None
            if hasattr(self._source, "key"):  # known before the image is read
                key = self._source.key(index)
            if not hasattr(self._source, "key") or any(
                names.needs_record for names in self._identities.values()
            ):
                record = self._source[index]
                key = record.key
            dropping = [n for n in range(len(settings.drop)) if self._is_dropped(n, key, record)]
            if dropping:
                self.dropping.update(dropping)
                return key, "dropped_by_list", None
            listed = key
            if settings.keep is not None:
                listed = self._listed(settings.keep, key, record)
                if listed is None:
                    return key, "join_missing", None
                if listed not in settings.keep:
                    return key, "not_kept", None
            record = record or self._source[index]
            captions, columns = record.captions, record.columns
            if settings.keep is not None and settings.keep.has_texts:
                captions, columns = settings.keep.texts(listed), ()
            columns = columns or [""] * len(captions)
            texts = [pair for pair in zip(captions, columns, strict=True) if is_usable(pair[0])]
            if not texts:
                return key, "caption_empty", None
            pixels = images.decode_image(record.image)
        except (images.BadImage, OSError) as error:
            return key, reason_of(error), None
        image = _encoded(record.image, pixels, settings.resize_px)
        captions, columns = zip(*texts, strict=True)
        captions = [text.clean(caption) for caption in captions]
        example = {"image": image, "captions": captions, "caption_columns": columns, "key": key}
        if settings.columns:
            kept = settings.keep.values(listed) if settings.keep is not None else {}
            example |= metadata.values(settings.columns, kept, record.metadata)
        example = self._serializer.get_tf_example(self._features.encode_example(example))
        # Features are a protobuf map; its order would otherwise differ between processes.
        return key, None, example.SerializeToString(deterministic=True)

    def _is_dropped(self, number: int, key: str, record: Record | None) -> bool:
        keys = self._settings.drop[number]
        listed = self._listed(keys, key, record)
        return listed is not None and listed in keys

    def _listed(self, keys: KeyList, key: str, record: Record | None) -> str | None:
        """What a list has in place of the key of a record; None if the record has no such thing."""
        if keys.by is None:
            return key
        names = self._identities[keys.by]
        return names.of(record) if names.needs_record else names.known(key)


def _encoded(image: bytes | np.ndarray, pixels: np.ndarray, resize_px: Sequence[int]) -> bytes:
    """The file to write of an image, of which `pixels`, uint8 [H, W, 3], are decoded."""
    size = _shrunk(pixels.shape[1::-1], resize_px)
    if size != pixels.shape[1::-1]:
        smaller = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        return _file_of(smaller, "JPEG", quality=JPEG_QUALITY)
    if isinstance(image, np.ndarray):
        return _file_of(Image.fromarray(image), "PNG")
    return image


def _shrunk(size: tuple[int, int], resize_px: Sequence[int]) -> tuple[int, int]:
    """Returns the (width, height) to write, see `Settings`."""
    if len(resize_px) == 1 and min(size) > resize_px[0]:
        scale = resize_px[0] / min(size)
        return tuple(max(resize_px[0], round(side * scale)) for side in size)
    if len(resize_px) == 2:
        return tuple(map(min, size, resize_px))
    return size


def _file_of(image: Image.Image, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
