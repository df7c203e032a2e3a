"""The end of `align pack`: equal keys of different units, the TFDS dataset, its publication.

Every step finds what an earlier, interrupted one has done, and does the rest.
"""

import json
import os
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from align_jax.curate.pack import unit as pack_unit
from align_jax.curate.pack.key_lists import KeyList
from align_jax.data.sources.open_source import PairSource
from align_jax.data.sources.shards import find_repeated
from align_jax.storage import writing
from align_jax.storage.problems import Problems, from_json
from align_jax.storage.problems import report as say_problems

REPORT_FILE = "pack_report.json"
_DATASET = "pairs"
_INFO_FILE = "dataset_info.json"


def check_out_dir(out_dir: str, split: str, staging: str, columns: Mapping[str, str]) -> None:
    """Raises ValueError unless `split` can be added to `out_dir`.

    Where the split is there, `staging` is what a call left that was killed while clearing up.
    """
    if not os.path.exists(out_dir):
        return
    if not os.path.isdir(out_dir):
        raise ValueError(f"{out_dir} is a file; name a folder.")
    if not os.listdir(out_dir):
        return
    if not os.path.exists(os.path.join(out_dir, _INFO_FILE)):
        raise ValueError(f"{out_dir} is not empty and holds no dataset; name a new folder.")
    info = tfds.builder_from_directory(out_dir).info
    features = pack_unit.features(columns)
    if info.name != _DATASET or repr(info.features) != repr(features):
        raise ValueError(
            f"{out_dir} holds another kind of dataset, with {', '.join(sorted(info.features))} and "
            f"not {', '.join(sorted(features))}; name a new folder."
        )
    if split in info.splits:
        shutil.rmtree(staging, ignore_errors=True)
        raise ValueError(
            f"{out_dir} already has a split {split!r}; choose another split or folder."
        )


def finish(
    source: PairSource,
    num_units: int,
    settings: pack_unit.Settings,
    staging: str,
    out_dir: str,
    split: str,
) -> dict:
    """Returns the report, see pack.pack; the dataset is in `out_dir` then.

    Raises:
      ValueError: nothing was written, or a list of keys had none in common with the source.
    """
    units = [read_json(pack_unit.result_path(settings.folder, n)) for n in range(num_units)]
    # Places of written records whose key an earlier unit has written.
    duplicates = find_repeated(
        lambda number: np.load(pack_unit.hashes_path(settings.folder, number)), num_units
    )
    skipped, skipped_keys = {}, {}
    missing = Problems()
    missing.merge(source.folder_problems if hasattr(source, "parts") else source.problems)
    shards = []
    for number, unit in enumerate(units):
        for reason, count in unit["skipped"].items():
            keys = unit["skipped_keys"][reason]
            pack_unit.count_skipped(skipped, skipped_keys, reason, keys, count)
        missing.merge(from_json(unit.get("problems", {})))
        first = 0
        for place, length in enumerate(unit["shard_lengths"]):
            path = pack_unit.shard_path(settings.folder, number, place)
            rows = duplicates.get(number, np.zeros(0, int)) - first
            rows = rows[(rows >= 0) & (rows < length)]
            first += length
            num_bytes = unit["shard_sizes"][place]
            if len(rows):
                keys, repeated_bytes = _read_keys(path, rows)
                pack_unit.count_skipped(skipped, skipped_keys, "key_duplicate", keys)
                num_bytes -= repeated_bytes
            if len(rows) < length:
                shards.append(_Shard(path, rows, length - len(rows), num_bytes))
    read = sum(unit["records_read"] for unit in units)
    dropping = {number for unit in units for number in unit["dropping"]}
    _check_usable(source, settings, read, shards, skipped, skipped_keys, dropping)
    problems = Problems()
    problems.merge(missing)
    for reason, count in skipped.items():
        if reason not in ("not_kept", "dropped_by_list"):
            problems.add(reason, skipped_keys[reason][0], count)
    report = {
        "source": source.describe(),
        "records_read": read,
        "records_written": sum(shard.length for shard in shards),
        "shards": len(shards),
        "bytes": sum(shard.num_bytes for shard in shards),
        "skipped": skipped,
        "skipped_keys": skipped_keys,
        "source_problems": dict(missing),
        "problems": say_problems(problems, source.describe()),
    }
    dataset = os.path.join(staging, "dataset")
    os.makedirs(dataset, exist_ok=True)
    _place(shards, dataset, split, pack_unit.features(settings.columns))
    writing.write_json(os.path.join(dataset, REPORT_FILE), {split: report}, ensure_ascii=False)
    _publish(dataset, out_dir)
    return report


def no_common_key(option: str, keys: KeyList, example: str) -> str:
    """Returns the message about a list that has no key in common with the source."""
    theirs = f", the source for example {example!r}" if example else ""
    return (
        f"--{option} {keys.path} has no key in common with the source: it has for example "
        f"{keys.example!r}{theirs}; give a table made from this source, or join by what both have: "
        f"--{option}-by uid, id, url."
    )


def read_json(path: str) -> dict[str, Any]:
    """Returns the content of a JSON file."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


class _Shard(NamedTuple):
    path: str  # as its unit wrote it
    rows: np.ndarray  # int64 [n], to leave out
    length: int  # records without those
    num_bytes: int


def _read_keys(path: str, rows: np.ndarray) -> tuple[list[str], int]:
    """Returns the keys and the bytes of the records `rows`, int64 [n], of a shard."""
    features = tfds.features.FeaturesDict({"key": tfds.features.Text()})
    reader = ArrayRecordReader(path)
    keys, num_bytes = [], 0
    for row in rows.tolist():
        (data,) = reader.read([row])
        num_bytes += len(data)
        keys.append(features.deserialize_example_np(data)["key"].decode())
    reader.close()
    return keys, num_bytes


def _check_usable(
    source: PairSource,
    settings: pack_unit.Settings,
    read: int,
    shards: list[_Shard],
    skipped: dict[str, int],
    skipped_keys: dict[str, list[str]],
    dropping: set[int],
) -> None:
    not_kept = skipped.get("not_kept", 0) + skipped.get("join_missing", 0)
    if read and not_kept == read:
        example = next(iter(skipped_keys.get("not_kept", [])), "")
        raise ValueError(no_common_key("keep", settings.keep, example))
    if not shards:
        raise ValueError(f"{source.describe()} holds no usable record: skipped {skipped}.")
    for number, keys in enumerate(settings.drop):
        if keys.size and number not in dropping:
            raise ValueError(no_common_key("drop", keys, ""))


def _place(
    shards: list[_Shard], dataset: str, split: str, features: tfds.features.FeaturesDict
) -> None:
    """Gives the shards their names in the dataset and writes its metadata."""
    template = tfds.core.ShardedFileTemplate(
        data_dir=dataset, dataset_name=_DATASET, split=split, filetype_suffix="array_record"
    )
    for number, shard in enumerate(shards):
        path = str(template.sharded_filepath(shard_index=number, num_shards=len(shards)))
        if len(shard.rows):
            if not os.path.exists(path):
                _copy_without(shard, path)
        elif os.path.exists(shard.path):  # else an interrupted call has moved it already
            writing.move(shard.path, path)
    info = tfds.core.SplitInfo(
        name=split,
        shard_lengths=[shard.length for shard in shards],
        num_bytes=sum(shard.num_bytes for shard in shards),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=dataset,
        features=features,
        split_infos=[info],
        version="1.0.0",
        check_data=False,
    )


def _copy_without(shard: _Shard, path: str) -> None:
    temporary = str(writing.temporary_path(shard.path))
    left_out = set(shard.rows.tolist())
    reader, writer = ArrayRecordReader(shard.path), pack_unit.open_shard(temporary)
    for row in range(reader.num_records()):
        if row not in left_out:
            writer.write(reader.read([row])[0])
    writer.close()
    reader.close()
    writing.move(temporary, path)


def _publish(dataset: str, out_dir: str) -> None:
    os.makedirs(out_dir, exist_ok=True)
    if not os.listdir(out_dir):
        writing.move(dataset, out_dir)
        return
    for name in (REPORT_FILE, _INFO_FILE):
        new, old = (read_json(os.path.join(folder, name)) for folder in (dataset, out_dir))
        merged = old | new
        if name == _INFO_FILE:
            merged["splits"] = old["splits"] + new["splits"]
        writing.write_json(os.path.join(dataset, name), merged, ensure_ascii=False)
    # The list of splits last: until it is replaced, readers see the old ones only.
    for name in sorted(os.listdir(dataset), key=lambda name: name == _INFO_FILE):
        writing.move(os.path.join(dataset, name), os.path.join(out_dir, name))
