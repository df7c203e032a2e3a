"""curate/scan.py: the metadata table of sources of every kind, and what it survives."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile

import imagehash
import numpy as np
import pytest
from helpers import environment, error_of, make_pairs, real_data, snapshot, write_table
from PIL import ExifTags, Image
from pyarrow import parquet
from test_img2dataset import write_shard

from align_jax.cli import main as cli
from align_jax.curate import scan_unit
from align_jax.curate.pack.pack import pack
from align_jax.curate.scan import open_any, read_report, scan
from align_jax.data.sources import open_source as sources
from align_jax.storage import writing

PAIRS = "captions.jsonl?images=images"


@pytest.fixture
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def jpeg(image, **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", **options)
    return file.getvalue()


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


def test_each_caption_is_a_row_with_the_facts_of_its_image(inside):
    written = make_pairs(inside, 7)
    report = scan(PAIRS, "out.parquet", part_size=3)
    rows = parquet.read_table("out.parquet").to_pylist()
    wanted = []
    for index, row in enumerate(written):
        data = (inside / "images" / row["image"]).read_bytes()
        for caption in row["captions"]:
            wanted.append(
                {
                    "key": row["image"],
                    "text": caption,
                    "index": index,
                    "width": 56,
                    "height": 48,
                    "file_bytes": len(data),
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "phash": str(imagehash.phash(Image.open(io.BytesIO(data)))),
                }
            )
    assert rows == wanted
    assert report["images"] == 7 and report["rows"] == 21 and report["unusable"] == {}
    assert read_report("out.parquet") == report
    assert parquet.ParquetFile("out.parquet").num_row_groups == 3


def test_keys_are_those_that_pack_writes(inside):
    make_pairs(inside, 5)
    scan(PAIRS, "source.parquet")
    pack(sources.open_source(PAIRS), "packed")
    scan("packed?split=train", "packed.parquet")
    tables = [parquet.read_table(name) for name in ("source.parquet", "packed.parquet")]
    assert tables[0].to_pylist() == tables[1].to_pylist()


def test_tars_and_scenes_are_scanned(inside):
    scan(f"{real_data('wds_sample')}/*.tar?max=20", "tars.parquet")
    keys = parquet.read_table("tars.parquet")["key"].to_pylist()
    assert keys == [f"{number:09d}" for number in range(20)]
    scan("scenes?size=4&seed=1", "scenes.parquet")
    table = parquet.read_table("scenes.parquet")
    assert table["file_bytes"].null_count == len(table) >= 4
    assert len(set(table["sha256"].to_pylist())) == 4


def test_labelled_images_have_their_class_as_text(inside):
    for name in ("cat/0.jpg", "cat/1.jpg", "dog/0.jpg"):
        path = inside / "pets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(noise(20, 30)))
    report = scan("pets", "out.parquet", labelled=True)
    table = parquet.read_table("out.parquet").to_pydict()
    assert table["text"] == ["cat", "cat", "dog"]
    assert table["key"] == ["cat/0.jpg", "cat/1.jpg", "dog/0.jpg"]
    assert report["labelled"]


def test_damaged_images_and_blank_captions_are_counted_and_never_fatal(inside):
    (inside / "images").mkdir()
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    files = {
        "good.jpg": jpeg(noise(20, 30)),
        "turned.jpg": jpeg(noise(20, 30), exif=turned),
        "empty.jpg": b"",
        "page.jpg": b"<html>not found</html>",
        "cut.jpg": jpeg(noise(200, 300))[:2000],
        "pixel.jpg": jpeg(noise(1, 1)),
    }
    for name, data in files.items():
        (inside / "images" / name).write_bytes(data)
    rows = [{"image": name, "captions": ["a", "  ", "b"]} for name in files]
    rows[0]["captions"] = [" ", ""]
    rows[1]["captions"] = ["half \ud83d of a pair"]
    rows.append({"image": "missing.jpg", "captions": ["a"]})
    write_table(inside / "captions.jsonl", rows)
    report = scan(PAIRS, "out.parquet", part_size=2)
    table = parquet.read_table("out.parquet").to_pydict()
    assert table["key"] == ["good.jpg", "turned.jpg"]
    assert table["text"] == ["", "half \ufffd of a pair"]
    assert (table["width"], table["height"]) == ([30, 20], [20, 30])
    reasons = {"image_empty": 1, "image_not_an_image": 1, "image_truncated": 1}
    assert report["unusable"] == reasons | {"image_too_small": 1}
    assert report["unusable_keys"]["image_not_an_image"] == ["page.jpg"]
    missing = {"image_missing": 1, "text_repaired": 1}
    assert report["source_problems"] == missing
    counts = {reason: entry["count"] for reason, entry in report["problems"].items()}
    assert counts == reasons | missing | {"image_too_small": 1, "caption_empty": 1}
    assert report["problems"]["caption_empty"]["first"] == "good.jpg"


def test_real_crawl_failures_are_counted_by_the_reasons_of_their_list(inside):
    archive = real_data("metadata", "crawl_failures.zip")
    listed = real_data("metadata", "crawl_failures.tsv").read_text().splitlines()
    listed = [line.split("\t") for line in listed[1:]]
    with zipfile.ZipFile(archive) as opened:
        by_base = {name.rsplit("/", 1)[-1]: name for name in opened.namelist()}
    rows = [{"image": by_base[line[0]], "captions": ["x"]} for line in listed]
    write_table(inside / "captions.jsonl", rows)
    report = scan(f"captions.jsonl?images={archive}", "out.parquet")
    assert report["images"] + sum(report["unusable"].values()) == len(listed)
    assert report["unusable"]["image_empty"] == sum(line[1] == "empty" for line in listed)
    decoded = parquet.read_table("out.parquet").to_pydict()
    sizes = {line[0]: (int(line[3]), int(line[4])) for line in listed}
    for key, *size in zip(decoded["key"], decoded["width"], decoded["height"], strict=True):
        assert sizes[key.rsplit("/", 1)[-1]] == tuple(size)


def test_a_source_without_a_usable_image_is_an_error_and_leaves_nothing(inside):
    (inside / "images").mkdir()
    (inside / "images" / "a.jpg").write_bytes(b"")
    write_table(inside / "captions.jsonl", [{"image": "a.jpg", "captions": ["a"]}])
    with pytest.raises(ValueError, match="holds no usable image: {'image_empty': 1}.$"):
        scan(PAIRS, "out.parquet")
    assert sorted(path.name for path in inside.iterdir()) == ["captions.jsonl", "images"]


def test_a_rerun_after_kill_9_gives_the_bytes_of_an_uninterrupted_run(inside):
    make_pairs(inside, 40)
    scan(PAIRS, "whole.parquet", part_size=6)
    code = (
        "import time, sys; from align_jax.curate import scan_unit as u, scan as s\n"
        "read = u._Reader.__call__\n"
        "def slow(self, index):\n    time.sleep(0.1)\n    return read(self, index)\n"
        "u._Reader.__call__ = slow\n"
        f"s.scan({PAIRS!r}, 'out.parquet', part_size=6, num_threads=2)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=environment())
    parts = inside / ".out.parquet.parts"
    deadline_s = time.monotonic() + 120
    while len(list(parts.glob("*.parquet"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (inside / "out.parquet").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.parquet")}
    assert 2 <= len(kept) < 7
    written = []
    write = scan_unit.write_part
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_unit, "write_part", lambda *part: written.append(part) or write(*part))
        scan(PAIRS, "out.parquet", part_size=6)
    assert len(written) == 7 - len(kept)
    assert (inside / "out.parquet").read_bytes() == (inside / "whole.parquet").read_bytes()
    assert not parts.exists()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_around_the_last_rename_leaves_nothing_beside_the_result(inside, when):
    make_pairs(inside, 4)
    before = set(inside.iterdir())
    code = (
        "import os, signal; from align_jax.curate import parts, scan as s\n"
        "def move(source, target):\n"
        "    last = str(source).endswith('result.tmp')\n"
        f"    if not last or {when!r} == 'after':\n        os.replace(source, target)\n"
        "    if last:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "parts.writing.move = move\n"
        f"s.scan({PAIRS!r}, 'out.parquet')"
    )
    process = subprocess.run([sys.executable, "-c", code], env=environment())
    assert process.returncode == -9
    parts = inside / ".out.parquet.parts"
    made = {inside / "out.parquet"} if when == "after" else set()
    assert set(inside.iterdir()) - before == {parts, *made}
    if when == "before":
        scan(PAIRS, "out.parquet")
    else:
        with pytest.raises(ValueError, match="^out.parquet exists; name a new file.$"):
            scan(PAIRS, "out.parquet")
    assert set(inside.iterdir()) - before == {inside / "out.parquet"}


def test_parts_of_another_source_are_not_used(inside):
    make_pairs(inside, 12)
    parts = inside / ".out.parquet.parts"
    parts.mkdir()
    (parts / "source.json").write_text('{"spec": "another"}')
    (parts / "000000.parquet").write_bytes(b"nothing")
    report = scan(PAIRS, "out.parquet", part_size=6)
    assert report["images"] == 12


def test_align_scan_prints_the_report(inside, capsys):
    make_pairs(inside, 4)
    assert cli.main(["scan", PAIRS, "--out", "out.parquet"]) == 0
    assert json.loads(capsys.readouterr().out) == read_report("out.parquet")


def test_image_whose_key_an_earlier_one_has_has_no_rows(inside):
    with tarfile.open("twice.tar", "w") as archive:
        for seed, key in enumerate("aabcab"):
            for name, data in (("jpg", jpeg(noise(20, 30, seed))), ("txt", b"one\ntwo")):
                data = b"" if name == "jpg" and not seed else data
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    for part_size in (2, 10):
        report = scan("twice.tar", f"{part_size}.parquet", part_size=part_size)
        table = parquet.read_table(f"{part_size}.parquet").to_pydict()
        # The first pair of a key stands for it, also where its image cannot be read, in all verbs.
        assert table["key"] == [key for key in "bc" for _ in range(2)]
        assert table["index"] == [1, 1, 2, 2]
        assert (report["images"], report["rows"]) == (2, 4)
        assert report["unusable"] == {"image_empty": 1}
        assert report["problems"]["key_duplicate"] == {"count": 3, "first": "twice.tar: a"}


def test_killed_scan_is_not_continued_on_other_data_but_is_on_a_copy(inside):
    make_pairs(inside, 12)
    scan(PAIRS, "wanted.parquet", part_size=6)
    shutil.copytree("images", "others")
    for path in (inside / "images").iterdir():
        path.write_bytes(jpeg(noise(20, 30, int(path.stem))))
    _stop_after_one_part()
    assert list((inside / ".out.parquet.parts").glob("*.parquet"))
    shutil.move("images", "moved")
    shutil.move("others", "images")
    before = snapshot(inside)
    message = error_of_scan(PAIRS, part_size=6)
    assert "holds an unfinished scan of other input (stamp changed); remove that folder" in message
    elsewhere = "captions.jsonl?images=moved"
    assert "(part_size changed)" in error_of_scan(elsewhere, part_size=7)
    assert snapshot(inside) == before
    scan(elsewhere, "out.parquet", part_size=6)
    scan(elsewhere, "whole.parquet", part_size=6)
    assert (inside / "out.parquet").read_bytes() == (inside / "whole.parquet").read_bytes()
    shutil.rmtree("moved")
    scan(PAIRS, "anew.parquet", part_size=6)
    assert parquet.read_table("anew.parquet").equals(parquet.read_table("wanted.parquet"))


def error_of_scan(spec, **options):
    with pytest.raises(ValueError) as info:
        scan(spec, "out.parquet", **options)
    return str(info.value)


def test_second_scan_into_one_file_is_refused(inside):
    make_pairs(inside, 4)
    with writing.locked(".out.parquet.parts", "align scan"):
        assert "out.parquet is in use by align scan, process " in error_of_scan(PAIRS)
    assert scan(PAIRS, "out.parquet")["images"] == 4


def _stop_after_one_part():
    write, done = scan_unit.write_part, []

    def stop(*part):
        if done:
            raise KeyboardInterrupt
        done.append(part)
        write(*part)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scan_unit, "write_part", stop)
        scan(PAIRS, "out.parquet", part_size=6)


def test_wrong_scan_arguments_are_one_line(inside, capfd):
    (inside / "there.parquet").write_bytes(b"")
    message = error_of(capfd, "scan", "scenes?size=4", "--out", "there.parquet")
    assert message == "there.parquet exists; name a new file."
    message = error_of(capfd, "scan", "nowhere", "--out", "out.parquet")
    assert message.startswith("nowhere does not exist; accepted: ")


def test_labelled_images_say_where_they_are(inside):
    (inside / "set" / "dog").mkdir(parents=True)
    (inside / "set" / "dog" / "a.jpg").write_bytes(jpeg(noise(20, 30, 0)))
    source = open_any("set", labelled=True)
    assert source.where(0) == f"{source.describe()}: dog/a.jpg"
    assert open_any("scenes?size=4&label=shape", labelled=True).where(3).endswith("image 3")


def write_shards(folder, count=3, **columns):
    """Writes shards of four pairs as img2dataset does, with tables that have more columns."""
    for number in range(count):
        write_shard(folder, number)
        side = parquet.read_table(folder / f"{number:05d}.parquet")
        captions = [f"caption {key}" for key in side["key"].to_pylist()]
        for name, value in {"caption": captions, "width": 8, "height": 8, **columns}.items():
            values = value if isinstance(value, list) else [value] * len(side)
            side = side.append_column(name, [values])
        parquet.write_table(side, folder / f"{number:05d}.parquet")


def test_files_are_the_same_for_any_number_of_workers(inside):
    make_pairs(inside, 14)
    for workers in (1, 2):
        scan(PAIRS, f"{workers}.parquet", part_size=3, num_workers=workers)
    assert (inside / "1.parquet").read_bytes() == (inside / "2.parquet").read_bytes()


@pytest.mark.slow
def test_shards_are_the_same_on_workers_and_on_beam(inside):
    pytest.importorskip("apache_beam")
    write_shards(inside / "shards")
    beam = {"beam": "--runner=DirectRunner"}
    for name, options in (("1", {}), ("2", {"num_workers": 2}), ("b", beam)):
        scan("shards", f"{name}.parquet", **options)
    whole = (inside / "1.parquet").read_bytes()
    assert whole == (inside / "2.parquet").read_bytes() == (inside / "b.parquet").read_bytes()


def test_shards_are_units_whose_rows_are_numbered_through(inside):
    write_shards(inside / "shards")
    report = scan("shards", "out.parquet")
    table = parquet.read_table("out.parquet")
    assert table["index"].to_pylist() == list(range(12))
    assert table["key"].to_pylist()[4:6] == ["000010000", "000010001"]
    assert parquet.ParquetFile("out.parquet").num_row_groups == 3
    assert report["records_read"] == 12
    assert report["source_problems"] == {"status_failed_to_download": 3}
    assert report["problems"]["status_failed_to_download"]["count"] == 3


def test_tables_beside_shards_are_used_in_place_of_images(inside):
    hashes = [f"{n:064x}" for n in range(5)]
    write_shards(inside / "shards", sha256=hashes, phash=[f"{n:016x}" for n in range(5)])
    scan("shards", "read.parquet")
    for path in (inside / "shards").glob("*.tar"):
        path.write_bytes(b"no image is looked at")
    report = scan("shards", "reused.parquet", reuse=True)
    read, reused = (parquet.read_table(f"{name}.parquet") for name in ("read", "reused"))
    same = ["key", "text", "index", "width", "height"]
    assert reused.select(same).equals(read.select(same))
    assert reused["sha256"].to_pylist() == hashes[:4] * 3
    assert reused["phash"].to_pylist()[:2] == ["0" * 16, "0" * 15 + "1"]
    assert report["source_problems"] == {"status_failed_to_download": 3}
    assert reused["file_bytes"].null_count == 12


def test_tables_that_do_not_serve_are_refused(inside, capfd):
    make_pairs(inside, 2)
    write_shard(inside / "shards", 0)
    for source, message in (
        (PAIRS, "--reuse is for folders of img2dataset; captions.jsonl"),
        ("shards", "00000.parquet has no column width; scan without it."),
    ):
        line = error_of(capfd, "scan", source, "--out", "o.parquet", "--reuse", "--workers", "1")
        assert message in line
    message = error_of(capfd, "scan", PAIRS, "--out", "o.parquet", "--workers", "0")
    assert message == "--workers 0 must be at least 1."
