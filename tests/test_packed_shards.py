"""data/sources/packed.py over many shards: few open files; errors of a shard are fatal."""

import io
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers import environment, error_of
from PIL import Image

from align_jax.cli import main as cli
from align_jax.curate.pack.pack import pack
from align_jax.data.sources import packed
from align_jax.data.sources.open_source import InMemory, open_source
from align_jax.data.sources.record import Record

TEXT = tfds.features.Text()
IMAGES = tfds.features.Sequence(tfds.features.Image(shape=(8, 8, 3)))


def make_records(count):
    records = []
    for number in range(count):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (number % 256, 90, 9)).save(file, "PNG")
        records.append(Record(f"{number:05d}", file.getvalue(), (f"number {number}",)))
    return records


@pytest.fixture
def shards(tmp_path):
    """Records, and the folder where each of them is a shard of its own."""
    records = make_records(40)
    report = pack(InMemory(records), tmp_path / "data", shard_bytes=1)
    assert report["shards"] == 40
    return records, tmp_path / "data"


def read(source):
    return [source[index] for index in range(len(source))]


def test_readers_are_bounded_whatever_the_number_of_shards_and_threads(shards, monkeypatch):
    records, folder = shards
    monkeypatch.setattr(packed, "_MOST_OPEN", 3)
    packed._readers.clear()
    source = open_source(str(folder))
    before = len(os.listdir("/proc/self/fd"))
    assert read(source) == records
    assert len(packed._readers) == 3
    assert len(os.listdir("/proc/self/fd")) <= before + 4
    order = np.random.default_rng(0).integers(0, 40, 400).tolist()
    for copy in (source, pickle.loads(pickle.dumps(source))):
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(copy.__getitem__, order)) == [records[index] for index in order]
    assert len(packed._readers) == 3


def test_plain_records_are_read_as_by_tfds(tmp_path, monkeypatch):
    records = [
        Record("é", make_records(1)[0].image, ("a", "二"), metadata={"s": 0.1, "n": -5, "u": "x"}),
        Record("", make_records(1)[0].image, ("b",)),
    ]
    pack(InMemory(records), tmp_path / "data", columns=("s", "n", "u"))
    found, odd = open_source(str(tmp_path / "data")), open_source(str(tmp_path / "data"))
    assert set(found._plain) == {"image", "captions", "key", "s", "n", "u"}
    odd._plain = {}
    assert read(found) == read(odd) and found[0].metadata == {
        "s": np.float32(0.1),
        "n": -5,
        "u": "x",
    }
    # What is stored otherwise than the features say is left to TFDS and its errors.
    features = tfds.features.FeaturesDict({"n": np.int64, "t": tfds.features.Sequence(TEXT)})
    plain = packed._plain_fields(features)
    data = features.serialize_example(features.encode_example({"n": 3, "t": []}))
    assert packed._read_plain(data, plain) == {"n": 3, "t": []}
    other = tfds.features.FeaturesDict({"n": np.float32, "t": tfds.features.Sequence(TEXT)})
    data = other.serialize_example(other.encode_example({"n": 3, "t": []}))
    assert packed._read_plain(data, plain) is None
    for kind in (np.bool_, {"b": TEXT}, tfds.features.Sequence({"b": TEXT}), IMAGES):
        assert packed._plain_fields(tfds.features.FeaturesDict({"n": np.int64, "x": kind})) == {}


def test_slices_and_places_are_those_of_the_shards(shards):
    records, folder = shards
    source = open_source(f"{folder}?split=train[5:30]&max=20")
    assert read(source) == records[5:25]
    assert source.where(3).endswith("record 0 of pairs-train.array_record-00008-of-00040")


def change(folder, damage):
    path = sorted(folder.glob("*.array_record-*"))[7]
    damage(path)
    return path


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (os.remove, "cannot be opened: No such file or directory"),
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "holds 0 records, not 1"),
        (lambda path: path.write_bytes(b""), "holds 0 records, not 1"),
    ],
)
def test_shard_that_cannot_be_read_is_fatal_and_named(shards, tmp_path, capsys, damage, words):
    _, folder = shards
    path = change(folder, damage)
    source = open_source(str(folder))
    with pytest.raises(packed.ShardUnreadable, match=words) as caught:
        read(source)
    assert str(path) in str(caught.value)
    assert cli.main(["pack", str(folder), "--out", str(tmp_path / "out"), "--workers", "1"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("align: ") and path.name in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_1500_shards_are_read_with_256_open_files(tmp_path):
    records = make_records(1500)
    assert pack(InMemory(records), tmp_path / "data", shard_bytes=1)["shards"] == 1500
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from align_jax.data.sources.open_source import open_source
source = open_source({str(tmp_path / "data")!r})
for passes in range(2):
    keys = [source[(index * 7) % 1500].key for index in range(1500)]
    assert keys == [f"{{(index * 7) % 1500:05d}}" for index in range(1500)]
"""
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def test_soft_limit_is_raised_to_the_hard_one(shards):
    code = f"""
import resource
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
from align_jax.data.sources.open_source import open_source
open_source({str(shards[1])!r})[0]
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
"""
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def test_shard_size_is_an_option_in_mib(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (512, 512, 3), np.uint8)
        Image.fromarray(noise).save(f"in/{number}.png")
        (tmp_path / "in" / f"{number}.txt").write_text("noise")
    command = ["pack", "in", "--workers", "1"]
    for size, count in ((1, 2), (256, 1)):
        assert cli.main([*command, "--out", f"o{size}", "--shard-size", str(size)]) == 0
        assert len(list((tmp_path / f"o{size}").glob("*.array_record-*"))) == count
    message = error_of(capfd, *command, "--out", "no", "--shard-size", "0")
    assert message == "--shard-size 0 must be at least 1."
