"""data/shards.py: parts opened one by one are what the whole is; equal hashes are found."""

import io
import tarfile

import numpy as np
import pytest
from helpers import snapshot
from PIL import Image

from align_jax.curate.pack.pack import pack
from align_jax.data.sources import shards
from align_jax.data.sources.open_source import open_source


def jpeg(shade):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 255 - shade)).save(file, "JPEG")
    return file.getvalue()


def write_tar(path, keys, suffixes=("jpg", "txt")):
    with tarfile.open(path, "w") as archive:
        for key in keys:
            files = {"jpg": jpeg(sum(map(ord, str(path) + key)) % 256), "txt": f"a {key}".encode()}
            for suffix in suffixes:
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(files[suffix])
                archive.addfile(info, io.BytesIO(files[suffix]))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write_tar(folder / "a.tar", ["0000", "0001", "0002", "own", "0001"])
    write_tar(folder / "b.tar", ["0000", "0001", "b"])
    write_tar(folder / "c.tar", ["0005"], suffixes=("jpg",))
    write_tar(folder / "d.tar", ["0001", "0006", "b"])
    (folder / "e.tar").write_bytes(b"")
    return folder


def test_parts_hold_what_the_whole_holds(folder):
    source = open_source(str(folder))
    whole = [source[index] for index in range(len(source))]
    parts = [part.open() for part in open_source(str(folder)).parts]
    assert [pairs[index] for pairs in parts for index in range(len(pairs))] == whole
    assert [record.key for record in whole] == [
        *("0000", "0001", "0002", "own"),
        *("b/0000", "b/0001", "b"),
        *("d/0001", "0006", "d/b"),
    ]
    assert [part.num_expected for part in source.parts] == [4, 3, 0, 3, 0]
    problems = {}
    for pairs in parts:
        for reason, count in pairs.problems.items():
            problems[reason] = problems.get(reason, 0) + count
    counts = {"key_duplicate": 1, "caption_missing": 1, "archive_unreadable": 1}
    assert problems == source.problems == counts


def test_pack_never_indexes_the_whole(folder, tmp_path):
    source = open_source(str(folder))
    for workers in (1, 2):
        report = pack(source, tmp_path / str(workers) / "out", num_workers=workers)
    assert source._pairs is None
    assert report["records_read"] == 10 and report["skipped"] == {}
    assert report["source_problems"] == source.problems
    packed = open_source(str(tmp_path / "1" / "out"))
    expected = [source[index] for index in range(len(source))]
    assert [packed[index] for index in range(len(packed))] == expected
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "2")


@pytest.mark.parametrize("at_once", [5, 64, 10_000])
def test_repeated_values_are_those_that_a_set_has_seen(monkeypatch, at_once):
    monkeypatch.setattr(shards, "_HASHES_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 300, size).astype(np.uint64) for size in (40, 0, 100, 1, 60)]
    arrays[2][:3] += np.uint64(2**63)
    seen, expected = set(), {}
    for number, array in enumerate(arrays):
        for row, value in enumerate(array.tolist()):
            if value in seen:
                expected.setdefault(number, []).append(row)
            seen.add(value)
    found = shards.find_repeated(arrays.__getitem__, len(arrays))
    assert {number: rows.tolist() for number, rows in found.items()} == expected
    assert shards.find_repeated(arrays.__getitem__, 0) == {}
