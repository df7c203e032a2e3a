"""Packing pairs into a TFDS dataset of ArrayRecord shards, without TensorFlow.

Encoded images are stored byte for byte; each is decoded once to know that it can be. The result
has random access (global shuffle, exact resume) and opens with `tfds.builder_from_directory` and
with data/sources.open_source.
"""

import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator

import grain
import numpy as np
import tensorflow_datasets as tfds
import tqdm
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from align_jax.data import images
from align_jax.data.sources import PairSource

SKIP_REASONS = (
    *images.BAD_IMAGE_REASONS,
    "caption_empty",
    "record_unreadable",
    "key_duplicate",
)
REPORT_FILE = "pack_report.json"
_DATASET = "pairs"
_INFO_FILE = "dataset_info.json"
_KEYS_LISTED = 20  # of each reason, in the report
_PROGRESS_EVERY_S = 10.0


def pack(
    source: PairSource,
    out_dir: str | os.PathLike,
    *,
    split: str = "train",
    shard_bytes: int = 256 * 2**20,
    num_threads: int = 8,
) -> dict:
    """Returns the report of writing `source` as one split of the TFDS dataset in `out_dir`.

    Each record has `image` (the encoded bytes as they are; arrays become PNG), `captions` (those
    that are not blank, in order) and `key`. Broken images, records without caption and repeated
    keys are skipped and counted. The data appears in `out_dir` only when it is complete; a second
    split is added to the same dataset by a second call. Memory holds a few records and all keys.

    Args:
      source: pairs to write, in their order.
      out_dir: new or empty folder, or one that an earlier call wrote.
      split: letters, digits and underscores; must not exist yet.
      shard_bytes: a shard is closed when it reaches this size.
      num_threads: records read and checked at the same time.

    Returns:
      What `pack_report.json` holds under `split`: `source`, `records_read`, `records_written`,
      `shards`, `bytes`, `skipped` (reason of SKIP_REASONS -> count), `skipped_keys` (reason ->
      first 20 keys) and `source_problems` (reason -> count, what was missing before reading).

    Raises:
      ValueError: the split exists, `out_dir` holds something else, or no record is usable.
    """
    if not re.fullmatch(r"\w+", split, re.ASCII):
        raise ValueError(f"split={split!r} must consist of letters, digits and underscores.")
    out_dir = os.path.abspath(out_dir)
    _check_out_dir(out_dir, split)
    temporary = os.path.join(os.path.dirname(out_dir), f".{os.path.basename(out_dir)}.{split}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    try:
        report = _write(source, temporary, split, shard_bytes, num_threads)
        _write_json(os.path.join(temporary, REPORT_FILE), {split: report})
        _publish(temporary, out_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _check_out_dir(out_dir, split):
    if not os.path.exists(out_dir):
        return
    if not os.path.isdir(out_dir):
        raise ValueError(f"{out_dir} is a file; name a folder.")
    if not os.listdir(out_dir):
        return
    if not os.path.exists(os.path.join(out_dir, _INFO_FILE)):
        raise ValueError(f"{out_dir} is not empty and holds no dataset; name a new folder.")
    info = tfds.builder_from_directory(out_dir).info
    if info.name != _DATASET or set(info.features) != set(_features()):
        raise ValueError(f"{out_dir} holds another kind of dataset; name a new folder.")
    if split in info.splits:
        raise ValueError(
            f"{out_dir} already has a split {split!r}; choose another split or folder."
        )


def _features():
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "key": tfds.features.Text(),
        }
    )


def _write(source, folder, split, shard_bytes, num_threads):
    skipped: dict[str, int] = {}
    skipped_keys: dict[str, list[str]] = {}
    keys = set()
    shards = _Shards(folder, split, shard_bytes)
    records = grain.MapDataset.range(len(source)).map(_Checker(source, _features()))
    # Grain keeps the order of the source whatever the number of threads.
    records = records.to_iter_dataset(
        grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * num_threads)
    )
    for key, reason, data in _show_progress(records, len(source), f"pack {split}"):
        if reason is None and key in keys:
            reason = "key_duplicate"
        if reason is None:
            keys.add(key)
            shards.write(data)
        else:
            skipped[reason] = skipped.get(reason, 0) + 1
            listed = skipped_keys.setdefault(reason, [])
            if len(listed) < _KEYS_LISTED:
                listed.append(key)
    shard_lengths, num_bytes = shards.finish()
    if not keys:
        raise ValueError(f"{source.describe()} holds no usable record: skipped {skipped}.")
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=_DATASET, split=split, filetype_suffix="array_record"
    )
    info = tfds.core.SplitInfo(
        name=split,
        shard_lengths=shard_lengths,
        num_bytes=num_bytes,
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=_features(),
        split_infos=[info],
        version="1.0.0",
        check_data=False,
    )
    return {
        "source": source.describe(),
        "records_read": len(source),
        "records_written": len(keys),
        "shards": len(shard_lengths),
        "bytes": num_bytes,
        "skipped": skipped,
        "skipped_keys": skipped_keys,
        "source_problems": dict(source.problems),
    }


class _Checker:
    """Callable index -> (key, reason to skip or None, serialized record)."""

    def __init__(self, source, features):
        self._source = source
        self._features = features

    def __call__(self, index):
        key = f"record {index}"
        try:
            record = self._source[index]
            key = record.key
            captions = [caption for caption in record.captions if caption.strip()]
            if not captions:
                return key, "caption_empty", None
            images.decode_image(record.image)
        except images.BadImage as error:
            return key, error.reason, None
        except OSError:
            return key, "record_unreadable", None
        example = {"image": _encoded(record.image), "captions": captions, "key": key}
        example = self._features.encode_example(example)
        return key, None, self._features.serialize_example(example)


def _encoded(image):
    if not isinstance(image, np.ndarray):
        return image
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


class _Shards:
    """Writes records one after another into files of limited size."""

    def __init__(self, folder, split, shard_bytes):
        self._stem = os.path.join(folder, f"{_DATASET}-{split}.array_record")
        self._shard_bytes = shard_bytes
        self._writer = None
        self._lengths, self._sizes = [], []

    def write(self, data):
        if self._writer is None:
            # group_size 1: every record can be read alone, which a global shuffle needs.
            self._writer = ArrayRecordWriter(self._path(len(self._lengths)), "group_size:1")
            self._lengths.append(0)
            self._sizes.append(0)
        self._writer.write(data)
        self._lengths[-1] += 1
        self._sizes[-1] += len(data)
        if self._sizes[-1] >= self._shard_bytes:
            self._close()

    def finish(self):
        """Returns the records of each shard and all bytes; names the files "x of n"."""
        self._close()
        count = len(self._lengths)
        for shard in range(count):
            os.rename(self._path(shard), f"{self._stem}-{shard:05d}-of-{count:05d}")
        return self._lengths, sum(self._sizes)

    def _path(self, shard):
        return f"{self._stem}-{shard:05d}.part"

    def _close(self):
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _publish(temporary, out_dir):
    os.makedirs(out_dir, exist_ok=True)
    if not os.listdir(out_dir):
        os.rename(temporary, out_dir)
        return
    for name in (REPORT_FILE, _INFO_FILE):
        new, old = (_read_json(os.path.join(folder, name)) for folder in (temporary, out_dir))
        merged = old | new
        if name == _INFO_FILE:
            merged["splits"] = old["splits"] + new["splits"]
        _write_json(os.path.join(temporary, name), merged)
    # The list of splits last: until it is replaced, readers see the old ones only.
    for name in sorted(os.listdir(temporary), key=lambda name: name == _INFO_FILE):
        os.replace(os.path.join(temporary, name), os.path.join(out_dir, name))


def _read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _write_json(path, content):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)


def _show_progress(records: Iterable, total: int, title: str) -> Iterator:
    if sys.stderr.isatty():
        yield from tqdm.tqdm(records, desc=title, total=total, unit="pair")
        return
    start = last = time.monotonic()
    for done, record in enumerate(records, 1):
        yield record
        now = time.monotonic()
        if now - last >= _PROGRESS_EVERY_S:
            last = now
            rate = done / (now - start)
            left_min = (total - done) / rate / 60
            print(
                f"{title}: {done} of {total} pairs, {rate:.0f} pairs/s, {left_min:.1f} min left",
                file=sys.stderr,
                flush=True,
            )
