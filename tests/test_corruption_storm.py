"""Hostile input to `align pack`: every kind of damage is counted exactly, none of it is fatal."""

import contextlib
import csv
import importlib
import io
import json
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import CONFIG, environment, read_lines, real_data, run_align, snapshot
from PIL import Image

from align_jax import config, embed
from align_jax.cli import main as cli
from align_jax.curate.filter.curate import curate
from align_jax.curate.near_duplicates.decontaminate import decontaminate
from align_jax.curate.pack.pack import pack
from align_jax.curate.scan import scan
from align_jax.data import images, pipeline, tokenizer
from align_jax.data.sources import archives
from align_jax.data.sources.open_source import InMemory, open_source
from align_jax.data.sources.record import Record
from align_jax.evals import run_evaluators
from align_jax.evals.retrieval import Retrieval

pytestmark = pytest.mark.filterwarnings(  # pytest undoes ours
    "ignore::PIL.Image.DecompressionBombWarning"
)
BENCHMARKS = Path(__file__).parents[1] / "experiments" / "benchmarks"


@pytest.fixture
def storm(monkeypatch):
    """The module that makes storms."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("corruption_storm")


def jpeg(seed=0, size=(48, 40)):
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    pixels = rng.integers(0, 256, (size[1] // 4, size[0] // 4, 3), np.uint8)
    Image.fromarray(pixels).resize(size).save(file, "JPEG")
    return file.getvalue()


def make_samples(storm, count):
    return [
        storm.Sample(f"{index:09d}", jpeg(index), f"caption number {index}".encode())
        for index in range(count)
    ]


def read(folder):
    source = open_source(str(folder))
    return [source[index] for index in range(len(source))]


def write_tar(path, members):
    """Writes (TarInfo or name, data) members."""
    with tarfile.open(path, "w") as archive:
        for info, data in members:
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
            if data is not None:
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data or b""))
    return path


def test_storm_drops_what_was_damaged_and_nothing_else(tmp_path, storm):
    samples = make_samples(storm, 20 * len(storm.KINDS) * 2)
    stormy, expected = storm.damage(samples)  # 5 %, each kind twice
    storm.write_shards(str(tmp_path / "in"), stormy, shard_size=64)
    report = pack(open_source(str(tmp_path / "in")), tmp_path / "out")
    assert Counter(report["skipped"]) + Counter(report["source_problems"]) == expected
    assert report["records_read"] == len(samples) - expected["key_duplicate"]
    damaged = {
        place
        for number, place in enumerate(range(10, len(samples), 20))
        if list(storm.KINDS.values())[number % len(storm.KINDS)][1] is not None
    }
    records = read(tmp_path / "out")
    assert [record.key for record in records] == [
        sample.key for place, sample in enumerate(stormy) if place not in damaged
    ]
    for record in records:
        assert images.decode_image(record.image).shape[2] == 3


@pytest.mark.parametrize("kind", ["img2dataset", "tars", "folder", "zip"])
def test_each_store_counts_the_same(tmp_path, storm, kind):
    samples = make_samples(storm, 5 * len(storm.KINDS))
    kinds = [name for name in storm.KINDS if kind in ("img2dataset", "tars") or name != "key twice"]
    stormy, expected = storm.damage(samples, every=5, kinds=kinds)
    files = [(f"{s.key}.jpg", s.image) for s in stormy] + [
        (f"{s.key}.txt", s.caption) for s in stormy
    ]
    path = tmp_path / "in"
    if kind == "img2dataset":
        storm.write_shards(str(path), stormy, shard_size=1000)
    elif kind == "tars":
        path.mkdir()
        write_tar(path / "a.tar", files)
    elif kind == "zip":
        path = tmp_path / "in.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files:
                archive.writestr(name, data)
    else:
        path.mkdir()
        for name, data in files:
            (path / name).write_bytes(data)
    problems = pack(open_source(str(path)), tmp_path / "out")["problems"]
    assert {reason: entry["count"] for reason, entry in problems.items()} == expected


# What a verb looks at decides what it can see.
IMAGES = ("image_empty", "image_not_an_image", "image_truncated", "image_too_large")
IMAGES += ("image_too_small", "image_damaged")
CAPTIONS = ("caption_empty", "caption_not_utf8")
PAIRS = ("pack", "scan", "curate", "decontaminate", "train", "eval")
SEEN = dict.fromkeys(PAIRS, (*IMAGES, *CAPTIONS, "key_duplicate")) | {
    "embed images": (*IMAGES, "caption_not_utf8", "key_duplicate"),
    "embed texts": (*CAPTIONS, "key_duplicate"),
    "vocab": (*CAPTIONS, "key_duplicate"),
}


class Colours:
    """A model for evaluators and embeddings: mean colours and numbers of letters."""

    class model:
        embed_dim = 2

    def fingerprint(self):
        return "colours"

    def encode_image(self, images, on_error="raise"):
        rows = []
        for read in images:
            try:
                rows.append(read().mean())
            except ValueError:
                assert on_error == "skip"
                rows.append(0.0)
        return self.encode_text(["x" * int(row) for row in rows])

    def encode_text(self, texts):
        angle = np.array([len(text) for text in texts], np.float32) / 300
        return np.stack([np.cos(angle), np.sin(angle)], 1)


def train_problems(source, words):
    """Returns the different keys that an epoch of training drops, and what the source misses."""
    data = config.default_config().data
    data.image_size, data.resize_size, data.resize, data.max_tokens = 16, 16, "pil", 8
    dropped = {}
    batches = pipeline.train_batches(source, words, data, batch_size=1, seed=0)
    with contextlib.closing(batches):
        for _ in range(len(source)):
            for reason, key in next(batches).dropped_keys.items():
                dropped.setdefault(reason, set()).add(key)
    return {reason: len(keys) for reason, keys in dropped.items()} | dict(source.problems)


def test_every_verb_counts_16_kinds_of_damage_by_the_same_reasons(tmp_path, storm, capsys):
    samples = make_samples(storm, 10 * len(storm.KINDS))
    stormy, expected = storm.damage(samples, every=5)
    spec = str(tmp_path / "in")
    storm.write_shards(spec, stormy, shard_size=64)
    table = tmp_path / "in" / "00000.parquet"
    pq.write_table(pa.table({"status": ["success"] * 60 + ["failed_to_download"] * 4}), table)
    missing = {"status_failed_to_download": 4}
    assert sum(reason is not None for _, reason in storm.KINDS.values()) == 10
    assert len(storm.KINDS) == 16

    def counts(problems):
        return {reason: entry["count"] for reason, entry in problems.items()}

    found = {"pack": counts(pack(open_source(spec), tmp_path / "packed")["problems"])}
    found["scan"] = counts(scan(spec, tmp_path / "scan.parquet")["problems"])
    (tmp_path / "rules.py").write_text(
        "from align_jax.curate.filter import rules\n"
        "RULES = [rules.short_side(at_least_px=1, source='a test')]\n"
    )
    made = curate(
        str(tmp_path / "scan.parquet"), tmp_path / "curated", preset=str(tmp_path / "rules.py")
    )
    found["curate"] = counts(made["problems"])
    report = decontaminate(spec, [], tmp_path / "matched", max_distance=0)
    found["decontaminate"] = counts(report["train"]["problems"])
    words = tokenizer.train_wordpiece([sample.caption.decode() for sample in samples], 100)
    found["train"] = train_problems(open_source(spec), words)
    evaluator = Retrieval("storm", spec)
    metrics = run_evaluators([evaluator], Colours())
    prefix = "storm/problems/"
    found["eval"] = {k[len(prefix) :]: n for k, n in metrics.items() if k.startswith(prefix)}
    assert metrics["storm/num_skipped"] == sum(found["eval"].values())
    for kind, items in (
        ("embed images", embed.open_images(spec)),
        ("embed texts", embed.open_texts(spec)),
    ):
        embed.embed(Colours(), items, tmp_path / kind, on_error="skip")
        found[kind] = counts(json.loads((tmp_path / kind / "report.json").read_text())["problems"])
    said = (tmp_path / "embed texts" / "report.json").read_text()
    assert json.loads(said)["skipped"] == sum(found["embed texts"].values())
    capsys.readouterr()
    command = ["vocab", spec, "--out", str(tmp_path / "words"), "--size", "100"]
    assert cli.main(command) == 0
    line = next(li for li in capsys.readouterr().err.splitlines() if li.startswith(f"{spec}: "))
    found["vocab"] = counts(
        json.loads((tmp_path / "words" / "report.json").read_text())["problems"]
    )
    assert found["vocab"] == {r: int(n) for r, n in re.findall(r"(\w+): (\d+) \(first: ", line)}
    wanted = {
        verb: {reason: expected[reason] for reason in reasons} | missing
        for verb, reasons in SEEN.items()
    }
    assert found == wanted


def test_training_batches_of_a_packed_storm_drop_nothing(tmp_path, storm):
    stormy, _ = storm.damage(make_samples(storm, 160), every=5)
    storm.write_shards(str(tmp_path / "in"), stormy, shard_size=64)
    pack(open_source(str(tmp_path / "in")), tmp_path / "out")
    source = open_source(str(tmp_path / "out"))
    words = tokenizer.train_wordpiece((r.captions[0] for r in read(tmp_path / "out")), 200)
    data = config.default_config().data
    data.image_size, data.resize_size, data.resize, data.max_tokens = 24, 32, "pil", 8
    batches = pipeline.train_batches(source, words, data, batch_size=16, seed=0)
    for _ in range(2 * len(source) // 16):
        batch = next(batches)
        assert batch.dropped == {} and batch.arrays["image"].shape == (16, 24, 24, 3)
    batches.close()


@pytest.mark.slow
def test_training_on_a_packed_storm_runs(tmp_path, storm):
    stormy, expected = storm.damage(make_samples(storm, 320))
    storm.write_shards(str(tmp_path / "in"), stormy, shard_size=64)
    env = environment(cache=tmp_path / "cache")
    done = run_align("pack", "in", "--out", "data", cwd=tmp_path, env=env)
    problems = json.loads(done.stdout)["problems"]
    assert {reason: entry["count"] for reason, entry in problems.items()} == expected
    done = run_align("vocab", "data", "--out", "tokenizer", "--size", "200", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    (tmp_path / "config.py").write_text(CONFIG)
    arguments = ("--config", "config.py:plain", "--workdir", "run", "--config.train.steps=6")
    done = run_align("train", *arguments, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    losses = [
        line["train/loss"]
        for line in read_lines(tmp_path / "run" / "metrics.jsonl")
        if "train/loss" in line
    ]
    assert len(losses) == 6 and np.isfinite(losses).all()


def test_hostile_names_links_and_devices_touch_no_file(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg(1))
    members = []
    good = ["../../up.jpg", "/abs.jpg", f"{secret}", "a/./b/../c.jpg", "C:\\x.jpg", "~/home.jpg"]
    for number, name in enumerate(good):
        members += [(name, jpeg(number + 10)), (f"{os.path.splitext(name)[0]}.txt", b"a caption")]
    for name, kind in (
        ("link.jpg", tarfile.SYMTYPE),
        ("hard.jpg", tarfile.LNKTYPE),
        ("null.jpg", tarfile.CHRTYPE),
        ("disk.jpg", tarfile.BLKTYPE),
        ("pipe.jpg", tarfile.FIFOTYPE),
        ("sparse.jpg", tarfile.GNUTYPE_SPARSE),
        ("folder.jpg", tarfile.DIRTYPE),
    ):
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.devmajor, info.devminor = kind, str(secret), 1, 3
        members += [(info, None), (f"{os.path.splitext(name)[0]}.txt", b"no image of its own")]
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "x.tar", members)
    before = snapshot(tmp_path)
    report = pack(open_source(str(tmp_path / "in")), tmp_path / "out")
    records = read(tmp_path / "out")
    assert [record.key for record in records] == [os.path.splitext(name)[0] for name in good]
    assert [record.image for record in records] == [jpeg(n + 10) for n in range(len(good))]
    assert report["source_problems"] == {"image_missing": 7}
    after = snapshot(tmp_path)
    assert {name for name in after if not name.startswith("out/")} == before.keys()
    assert not (tmp_path.parent / "up.jpg").exists() and not Path("/abs.jpg").exists()


def test_names_that_are_no_utf_8_are_written_as_text(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for stem in ("caf\udce9", "caf\udcea", "zwölf"):  # surrogates stand for bytes E9 and EA
            for suffix, data in ((".jpg", jpeg(1)), (".txt", b"a caption")):
                info = tarfile.TarInfo(stem + suffix)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    pack(open_source(str(folder)), tmp_path / "out")
    assert [record.key for record in read(tmp_path / "out")] == [
        "caf\\udce9",
        "caf\\udcea",
        "zwölf",
    ]


def test_captions_of_any_json_are_handled(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    captions = {
        "good": b'{"caption": "fine"}',
        "lone": b'{"caption": "half \\ud83d"}',
        "deep": b'{"caption": ' + b"[" * 100_000,
        "number": b'{"caption": 5}',
        "digits": b'{"caption": ' + b"9" * 5000 + b"}",
        "list": b'{"caption": ["", "one", "\\ud83d"]}',
        "latin": b'{"caption": "caf\xe9"}',
        "array": b"[1, 2]",
        "binary": b"\x00\xff" * 50,
    }
    for name, text in captions.items():
        (folder / f"{name}.jpg").write_bytes(jpeg(1))
        (folder / f"{name}.json").write_bytes(text)
    report = pack(open_source(str(folder)), tmp_path / "out")
    found = {record.key: record.captions for record in read(tmp_path / "out")}
    assert found == {"good": ("fine",), "lone": ("half \ufffd",), "list": ("one",)}
    assert report["skipped"] == {"caption_not_utf8": 2, "caption_empty": 4}


def test_damaged_archives_are_counted_beside_whole_ones(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    pairs = [(f"a{n}.{s}", d) for n in range(4) for s, d in (("jpg", jpeg(n)), ("txt", b"text"))]
    whole = write_tar(folder / "a.tar", pairs).read_bytes()
    (folder / "b.tar").write_bytes(b"")
    (folder / "c.tar").write_bytes(b"<html>404</html>")
    (folder / "d.tar").write_bytes(whole[: len(whole) // 2])
    (folder / "e.zip").write_bytes(b"")
    (folder / "f.tar").write_bytes(bytes(10_240))  # an empty archive, which is whole
    with zipfile.ZipFile(folder / "g.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("g.jpg", bytes(1000) + jpeg(1))
        archive.writestr("g.txt", b"a caption")
    data = bytearray((folder / "g.zip").read_bytes())
    start = 30 + len("g.jpg")
    data[start : start + 8] = b"\xff" * 8
    (folder / "g.zip").write_bytes(data)
    report = pack(open_source(str(folder)), tmp_path / "out")
    assert report["source_problems"]["archive_unreadable"] == 3
    assert report["source_problems"]["tar_truncated"] == 1
    assert report["skipped"] == {"record_unreadable": 1}
    keys = [record.key for record in read(tmp_path / "out")]
    assert keys[:4] == ["a0", "a1", "a2", "a3"] and keys[4:] == [
        f"d/a{n}" for n in range(len(keys) - 4)
    ]


def test_files_that_claim_or_unfold_to_gigabytes_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 100_000)
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", bytes(10_000_000))
        archive.writestr("bomb.txt", b"a caption")
        archive.writestr("good.jpg", jpeg(1))
        archive.writestr("good.txt", b"a caption")
    info = tarfile.TarInfo("huge.jpg")
    write_tar(
        tmp_path / "in.tar",
        [(info, bytes(200_000)), ("huge.txt", b"a"), ("z.jpg", jpeg(2)), ("z.txt", b"z")],
    )
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "large.jpg").write_bytes(bytes(200_000))
    (tmp_path / "folder" / "large.txt").write_bytes(b"a")
    report = pack(open_source(f"{tmp_path}/in.*"), tmp_path / "out")
    assert report["skipped"] == {"record_unreadable": 2} and report["records_written"] == 2
    with pytest.raises(ValueError, match="no usable record: skipped {'record_unreadable': 1}"):
        pack(open_source(str(tmp_path / "folder")), tmp_path / "other")


@pytest.mark.parametrize("seed", range(20))
def test_tar_with_random_damage_is_never_fatal(tmp_path, seed):
    rng = np.random.default_rng(seed)
    pairs = [(f"{n}.{s}", d) for n in range(8) for s, d in (("jpg", jpeg(n)), ("txt", b"text"))]
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "a.tar", [("good.jpg", jpeg(99)), ("good.txt", b"good")])
    data = bytearray(write_tar(tmp_path / "in" / "b.tar", pairs).read_bytes())
    with tarfile.open(tmp_path / "in" / "b.tar") as archive:
        headers = [info.offset for info in archive]
    for start in rng.choice(headers, 3, replace=False).tolist():
        # Damage with a right checksum gets past the first test of a header.
        field, length = [(0, 100), (124, 12), (156, 1), (257, 8)][rng.integers(4)]
        data[start + field : start + field + length] = rng.bytes(length)
        data[start + 148 : start + 156] = b" " * 8
        checksum = sum(data[start : start + 512])
        data[start + 148 : start + 156] = b"%06o\0 " % checksum
    (tmp_path / "in" / "b.tar").write_bytes(data)
    pack(open_source(str(tmp_path / "in")), tmp_path / "out")
    assert read(tmp_path / "out")[0].key == "good"


def test_bomb_is_refused_before_a_pixel_is_decoded(tmp_path):
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:29] = header
    data[29:33] = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    records = [Record("bomb", bytes(data), ("x",)), Record("good", jpeg(1), ("x",))]
    report = pack(InMemory(records), tmp_path / "out")
    assert report["skipped"] == {"image_too_large": 1}


def test_real_crawl_failures_in_good_data_are_counted_by_kind(tmp_path, storm):
    path = real_data("metadata", "crawl_failures.zip")
    with open(real_data("metadata", "crawl_failures.tsv"), newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    with zipfile.ZipFile(path) as archive:
        failures = {row["file"]: archive.read(row["file"]) for row in rows}
    samples = make_samples(storm, 19 * len(failures))
    mixed = []
    for number, (name, data) in enumerate(failures.items()):
        mixed += samples[19 * number : 19 * number + 19]
        mixed.append(storm.Sample(os.path.splitext(name)[0], data, b"a caption"))
    storm.write_shards(str(tmp_path / "in"), mixed, shard_size=700)
    report = pack(open_source(str(tmp_path / "in")), tmp_path / "out")
    kinds = [row["kind"] for row in rows]
    skipped = report["skipped"]
    assert skipped["image_empty"] == kinds.count("empty")
    assert skipped["image_too_small"] == kinds.count("tiny")
    unusable = skipped["image_not_an_image"] + skipped.get("image_truncated", 0)
    unusable += skipped.get("image_damaged", 0)
    assert unusable == kinds.count("undecodable")
    assert sum(skipped.values()) + report["records_written"] == len(mixed)
    usable = len(rows) - sum(kinds.count(kind) for kind in ("empty", "tiny", "undecodable"))
    assert report["records_written"] == len(samples) + usable
