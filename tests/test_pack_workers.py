"""curate/pack/: the same files from any number of workers, from Beam, and after a kill."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import align_command, environment, snapshot
from PIL import Image

from align_jax.curate.pack import finish as pack_finish
from align_jax.curate.pack import unit as pack_unit
from align_jax.curate.pack.pack import pack
from align_jax.data.sources import shards
from align_jax.data.sources.open_source import InMemory, open_source
from align_jax.data.sources.record import Record

OPTIONS = {"unit_records": 16, "shard_bytes": 6000}


def jpeg(shade):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 255 - shade)).save(file, "JPEG")
    return file.getvalue()


def make_records(count):
    """Returns records of which every tenth is empty and every seventh repeats an earlier key."""
    records = []
    for index in range(count):
        key = f"key{index // 2 if index % 7 == 6 else index}"
        image = b"" if index % 10 == 9 else jpeg(index % 256)
        records.append(Record(key, image, (f"caption {index}",)))
    return records


def first_usable(records):
    """Returns what a plain loop over the records keeps."""
    kept = {}
    for record in records:
        if record.image:
            kept.setdefault(record.key, record)
    return list(kept.values())


def read(folder):
    source = open_source(str(folder))
    return [source[index] for index in range(len(source))]


def write_folder(folder, count):
    folder.mkdir()
    for record in make_records(count):
        name = record.captions[0].replace(" ", "")
        (folder / f"{name}.jpg").write_bytes(record.image)
        (folder / f"{name}.txt").write_text(record.captions[0])
    return folder


def test_units_hold_what_a_plain_loop_keeps(tmp_path):
    records = make_records(100)
    report = pack(InMemory(records), tmp_path / "out", **OPTIONS)
    assert read(tmp_path / "out") == first_usable(records)
    assert report["skipped"] == {
        "image_empty": 10,
        "key_duplicate": 90 - len(first_usable(records)),
    }
    assert report["records_written"] + sum(report["skipped"].values()) == 100
    assert len(report["skipped_keys"]["key_duplicate"]) == report["skipped"]["key_duplicate"]


def test_report_without_shards_is_the_same_for_any_unit_size(tmp_path):
    reports = []
    for size in (1, 16, 1000):
        report = pack(InMemory(make_records(60)), tmp_path / str(size), unit_records=size)
        for name in ("shards", "skipped_keys"):
            del report[name]
        reports.append(report)
    assert reports[0] == reports[1] == reports[2]
    assert read(tmp_path / "1") == read(tmp_path / "16") == read(tmp_path / "1000")


def test_equal_keys_are_found_in_several_passes(tmp_path, monkeypatch):
    records = make_records(100)
    pack(InMemory(records), tmp_path / "one", **OPTIONS)
    monkeypatch.setattr(shards, "_HASHES_AT_ONCE", 7)
    pack(InMemory(records), tmp_path / "many", **OPTIONS)
    assert snapshot(tmp_path / "many") == snapshot(tmp_path / "one")


def test_unit_of_repeated_keys_only_leaves_no_shard(tmp_path):
    records = [Record(f"key{index % 16}", jpeg(index), ("a",)) for index in range(32)]
    report = pack(InMemory(records), tmp_path / "out", unit_records=16)
    assert report["shards"] == 1 and report["skipped"] == {"key_duplicate": 16}
    assert read(tmp_path / "out") == records[:16]


def test_files_are_the_same_for_any_number_of_workers(tmp_path):
    source = open_source(str(write_folder(tmp_path / "images", 100)))
    for name, options in {
        "one": {"num_workers": 1, "num_threads": 1},
        "threads": {"num_workers": 1, "num_threads": 8},
        "two": {"num_workers": 2, "num_threads": 2},
    }.items():
        pack(source, tmp_path / name / "out", **OPTIONS, **options)
    one = snapshot(tmp_path / "one")
    assert len(one) > 8
    assert snapshot(tmp_path / "threads") == one
    assert snapshot(tmp_path / "two") == one


@pytest.mark.slow
def test_beam_writes_the_same_files(tmp_path):
    pytest.importorskip("apache_beam")
    source = open_source(str(write_folder(tmp_path / "images", 100)))
    pack(source, tmp_path / "local" / "out", **OPTIONS)
    beam = "--runner=DirectRunner --direct_num_workers=1"
    pack(source, tmp_path / "beam" / "out", **OPTIONS, beam=beam)
    assert snapshot(tmp_path / "beam") == snapshot(tmp_path / "local")


class StopsAt(InMemory):
    """Fails once, at a record."""

    def __init__(self, records, stop):
        super().__init__(records)
        self.stop, self.read = stop, []

    def __getitem__(self, index):
        if index == self.stop:
            raise KeyboardInterrupt
        self.read.append(index)
        return super().__getitem__(index)


def test_interrupted_pack_goes_on_after_its_finished_units(tmp_path, capsys):
    records = make_records(100)
    pack(InMemory(records), tmp_path / "whole" / "out", **OPTIONS)
    source = StopsAt(records, stop=70)
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "again" / "out", **OPTIONS, num_threads=1)
    assert not (tmp_path / "again" / "out").exists()
    source = StopsAt(records, stop=None)
    pack(source, tmp_path / "again" / "out", **OPTIONS)
    assert sorted(source.read) == list(range(64, 100))
    assert "pack train: 4 of 7 units are there already" in capsys.readouterr().err
    assert snapshot(tmp_path / "again") == snapshot(tmp_path / "whole")


def test_other_options_or_source_start_afresh(tmp_path):
    for change in ({"resize_px": 4}, {"unit_records": 20}):
        source = StopsAt(make_records(100), stop=70)
        with pytest.raises(KeyboardInterrupt):
            pack(source, tmp_path / "out", **OPTIONS, num_threads=1)
        source = StopsAt(make_records(100), stop=50)
        with pytest.raises(KeyboardInterrupt):
            pack(source, tmp_path / "out", **(OPTIONS | change), num_threads=1)
        assert source.read[0] == 0
    images = write_folder(tmp_path / "images", 40)
    before = open_source(str(images)).stamp()
    assert open_source(str(images)).stamp() == before
    (images / "caption0.txt").rename(images / "caption0.json")
    assert open_source(str(images)).stamp() != before


@pytest.mark.parametrize("function", ["_place", "_copy_without", "_publish"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_pack_killed_while_it_finishes_goes_on(tmp_path, monkeypatch, function, when):
    records = make_records(100)
    pack(InMemory(records[:20]), tmp_path / "whole" / "out", split="dev")
    pack(InMemory(records), tmp_path / "whole" / "out", **OPTIONS)
    pack(InMemory(records[:20]), tmp_path / "again" / "out", split="dev")
    original = getattr(pack_finish, function)

    def killed(*args):
        if when == "after":
            original(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pack_finish, function, killed)
        with pytest.raises(KeyboardInterrupt):
            pack(InMemory(records), tmp_path / "again" / "out", **OPTIONS)
    if (function, when) == ("_publish", "after"):  # all was done but the clearing up
        with pytest.raises(ValueError, match="already has a split"):
            pack(InMemory(records), tmp_path / "again" / "out", **OPTIONS)
    else:
        pack(InMemory(records), tmp_path / "again" / "out", **OPTIONS)
    assert snapshot(tmp_path / "again") == snapshot(tmp_path / "whole")


def test_pack_killed_between_two_published_files_goes_on(tmp_path, monkeypatch):
    records = make_records(100)
    for folder in ("whole", "again"):
        pack(InMemory(records[:20]), tmp_path / folder / "out", split="dev")
    pack(InMemory(records), tmp_path / "whole" / "out", **OPTIONS)
    replace, moved = os.replace, []

    def killed(source, target):
        if os.path.dirname(target) == str(tmp_path / "again" / "out"):
            moved.append(target)
            if len(moved) == 5:
                raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            pack(InMemory(records), tmp_path / "again" / "out", **OPTIONS)
    assert [r.key for r in read(f"{tmp_path}/again/out?split=dev")]
    pack(InMemory(records), tmp_path / "again" / "out", **OPTIONS)
    assert snapshot(tmp_path / "again") == snapshot(tmp_path / "whole")


def test_second_pack_into_the_same_folder_is_refused_while_the_first_runs(tmp_path):
    class Nested(InMemory):
        def __getitem__(self, index):
            with pytest.raises(ValueError, match="out is in use by align pack, process"):
                pack(InMemory(make_records(1)), tmp_path / "out")
            return super().__getitem__(index)

    pack(Nested(make_records(3)), tmp_path / "out")
    assert len(read(tmp_path / "out")) == 3


def wait_until(condition, process, timeout_s=120):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


PACK = """
import sys
from align_jax.curate.pack.pack import pack
from align_jax.data.sources.open_source import open_source

if __name__ == "__main__":
    pack(open_source(sys.argv[1]), sys.argv[2], unit_records=8, num_workers=int(sys.argv[3]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_pack_killed_with_sigkill_ends_as_if_it_had_not_been(tmp_path, workers):
    images = str(write_folder(tmp_path / "images", 600))
    (tmp_path / "pack.py").write_text(PACK)
    env = environment()

    def start(name):
        command = [sys.executable, tmp_path / "pack.py", images, tmp_path / name / "out", workers]
        return subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)

    for name in ("whole", "again"):
        (tmp_path / name).mkdir()
    assert start("whole").wait() == 0
    units = tmp_path / "again" / ".out.train.tmp" / "units"
    kept = 0
    for _ in range(3):
        process = start("again")
        # Wait for some more units of the 75, then kill without a chance to clear up.
        wanted = kept + 8
        wait_until(lambda at_least=wanted: len(list(units.glob("*.json"))) >= at_least, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kept = len(list(units.glob("*.json")))
        assert kept < 75 and not (tmp_path / "again" / "out").exists()
    before = {path: path.stat().st_mtime_ns for path in units.glob("*.json")}
    process = start("again")
    assert process.wait() == 0
    assert before and snapshot(tmp_path / "again") == snapshot(tmp_path / "whole")


def test_workers_end_when_their_parent_is_killed(tmp_path):
    images = str(write_folder(tmp_path / "images", 300))
    (tmp_path / "pack.py").write_text(PACK)
    command = [sys.executable, tmp_path / "pack.py", images, tmp_path / "out", "2"]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    units = tmp_path / ".out.train.tmp" / "units"
    wait_until(lambda: len(list(units.glob("*.json"))) >= 3, process)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    assert len(children) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline_s = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{child}") for child in children):
        assert time.monotonic() < deadline_s, "a worker outlived its parent"
        time.sleep(0.05)


def test_command_line_packs_with_workers(tmp_path):
    images = write_folder(tmp_path / "images", 12)
    done = subprocess.run(
        align_command("pack", images, "--out", tmp_path / "out", "--workers", "2"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["records_written"] == 11
    assert pack_unit.KEYS_LISTED == 20
