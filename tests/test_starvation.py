"""data/read_ahead.py: a loader that is stuck, slow or dead is named, and never waited for."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from test_pipeline import assert_same_batches, make_source, open_batches, take

from align_jax.curate.pack.pack import pack
from align_jax.data import mixture, read_ahead
from align_jax.data.sources.open_source import InMemory, open_source


class SlowSource(InMemory):
    """Every record takes a while."""

    def __getitem__(self, index):
        time.sleep(0.15)
        return super().__getitem__(index)


@pytest.fixture
def stuck_source(tmp_path, monkeypatch):
    """A folder of six pairs whose image 3.jpg is a pipe that nobody writes to."""
    monkeypatch.setattr(read_ahead, "LATE_S", 0.4)
    monkeypatch.setattr(read_ahead, "STUCK_S", 1.5)
    monkeypatch.setattr(read_ahead, "_POLL_S", 0.1)
    monkeypatch.setattr(read_ahead, "_CLOSE_S", 0.2)
    source, pipe = open_stuck(tmp_path / "pairs")
    yield source
    # Those who still wait for the pipe read its end, and later ones find no file.
    descriptor = os.open(pipe, os.O_RDWR)
    pipe.unlink()
    os.close(descriptor)


def open_stuck(folder):
    """Returns the open source and its file that became a pipe: storage that hung meanwhile."""
    folder.mkdir()
    for index in range(6):
        (folder / f"{index}.txt").write_text(f"caption {index}")
        pixels = np.full((8, 8, 3), index, np.uint8)
        (folder / f"{index}.ppm").write_bytes(b"P6 8 8 255\n" + pixels.tobytes())
        os.rename(folder / f"{index}.ppm", folder / f"{index}.bmp")
    source = open_source(str(folder))
    (folder / "3.bmp").unlink()
    os.mkfifo(folder / "3.bmp")
    return source, folder / "3.bmp"


def failure_of(batches, num_batches=8):
    """Returns the message and the seconds of the wait that failed."""
    for _ in range(num_batches):
        start_s = time.monotonic()
        try:
            next(batches)
        except RuntimeError as error:
            return str(error), time.monotonic() - start_s
    raise AssertionError(f"{num_batches} batches came without an error")


def test_stuck_thread_is_named_with_its_record_and_file(stuck_source, capfd):
    batches = open_batches(stuck_source, num_threads=3)
    message, waited_s = failure_of(batches)
    assert message.startswith("no training data for ") and "\n" not in message
    assert f"a data thread of pid {os.getpid()}, which is at row " in message
    assert f"record 3 of {stuck_source.describe().split(':')[0]}: " in message
    assert "/3.bmp; check the storage that it reads from. " in message
    assert 1.5 <= waited_s < 6
    reports = capfd.readouterr().err.splitlines()
    assert len(reports) == 2  # after 0.4 s and after 0.8 s
    assert all(r.startswith("waiting for data for ") and r.endswith("/3.bmp") for r in reports)
    assert list(batches) == []  # closed, without waiting


def test_source_of_a_mixture_is_named(stuck_source):
    mixed = mixture.Mixture({"web": stuck_source, "own": make_source()}, {"web": 1.0, "own": 1.0})
    message, _ = failure_of(open_batches(mixed), num_batches=20)
    assert "of web: " in message and "/3.bmp" in message


def test_stuck_worker_is_named_and_killed(stuck_source, monkeypatch):
    monkeypatch.setattr(read_ahead, "STUCK_S", 20.0)  # workers take a while to start
    batches = open_batches(stuck_source, num_workers=2, num_threads=1)
    first = next(batches)
    assert first.arrays["image"].shape == (2, 6, 6, 3)
    monkeypatch.setattr(read_ahead, "STUCK_S", 2.0)
    pids = {child.pid for child in multiprocessing.active_children()}
    message, _ = failure_of(batches)
    assert any(
        f"waits for data worker {number} (pid {pid}), which is at row " in message
        for number in range(2)
        for pid in pids
    )
    assert "/3.bmp" in message
    start_s = time.monotonic()
    batches.close()
    assert time.monotonic() - start_s < 10  # Grain alone gives each stuck worker 25 s
    assert not pids & {child.pid for child in multiprocessing.active_children()}


def test_killed_worker_is_named_at_once(capfd):
    batches = open_batches(SlowSource([make_source()[0]] * 8), num_workers=2, num_threads=1)
    next(batches)
    victim = read_pid(batches, worker=1)
    os.kill(victim, signal.SIGKILL)
    message, waited_s = failure_of(batches)
    assert message.startswith(f"data worker 1 (pid {victim}) died with exit code -9 (killed,")
    assert "config.data.num_workers" in message and "\n" not in message
    assert waited_s < 10
    assert list(batches) == []


def read_pid(batches, worker):
    while not (pid := batches._elements._board.pids()[worker]):
        time.sleep(0.05)
    return pid


def test_slow_source_is_reported_but_not_failed(monkeypatch, capfd):
    monkeypatch.setattr(read_ahead, "LATE_S", 0.3)
    monkeypatch.setattr(read_ahead, "STUCK_S", 0.5)
    monkeypatch.setattr(read_ahead, "_POLL_S", 0.05)
    source = SlowSource([make_source()[0]] * 8)
    batches = open_batches(source, batch_size=8, num_threads=1)  # 1.2 s a batch
    next(batches)
    batches.close()
    reports = capfd.readouterr().err.splitlines()
    assert 1 <= len(reports) <= 3
    assert "a data thread" in reports[0] and "of key0" in reports[0]


@pytest.mark.parametrize("end", ["fails", "late", pytest.param("closes", marks=pytest.mark.slow)])
def test_program_with_a_stuck_thread_ends_by_itself(tmp_path, end):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import pathlib, sys, time
        import test_starvation
        from align_jax.data import read_ahead
        read_ahead.STUCK_S = 1.0
        if sys.argv[2] == "late":  # the thread with the pipe begins when all is closed
            note = read_ahead.Board.note
            def note_late(self, step, *at):
                if step >= 2:
                    while not pathlib.Path("closed").exists():
                        time.sleep(0.01)
                note(self, step, *at)
            read_ahead.Board.note = note_late
        source, _ = test_starvation.open_stuck(pathlib.Path(sys.argv[1]))
        batches = test_starvation.open_batches(source, num_threads=3)
        next(batches)  # the pipe is in the third
        if sys.argv[2] == "fails":
            print(test_starvation.failure_of(batches)[0])
        else:
            batches.close()
            pathlib.Path("closed").touch()
        sys.exit(7)
        """)
    )
    path = [entry for entry in sys.path if entry]
    done = subprocess.run(
        [sys.executable, script, tmp_path / "pairs", end],
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join(path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 7 and done.stderr == ""
    assert done.stdout.startswith("no training data for " if end == "fails" else "")


@pytest.mark.parametrize("num_workers", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_fewer_shards_and_records_than_readers_changes_nothing(tmp_path, num_workers):
    pack(make_source(size=2), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "pack_report.json").read_text())["train"]["shards"] == 1
    source = open_source(str(tmp_path / "out"))
    expected = take(7, source, batch_size=4, num_threads=1)
    assert_same_batches(
        take(7, source, batch_size=4, num_threads=4, num_workers=num_workers), expected
    )
    parts = [take(7, source, batch_size=4, rows=[i]) for i in range(4)]
    for step, batch in enumerate(expected):
        ids = np.concatenate([part[step].arrays["ids"] for part in parts])
        np.testing.assert_array_equal(ids, batch.arrays["ids"])


def test_closed_iterator_leaves_neither_thread_nor_file(monkeypatch, tmp_path):
    monkeypatch.setattr(read_ahead.tempfile, "tempdir", str(tmp_path))
    before = threading.active_count()
    batches = open_batches(make_source(), num_threads=2)
    next(batches)
    assert len(list(tmp_path.iterdir())) == 1
    batches.close()
    assert list(tmp_path.iterdir()) == []
    deadline_s = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert threading.active_count() <= before
