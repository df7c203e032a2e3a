"""storage/writing.py: files whole or not at all, one process in a folder, paths of buckets."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from align_jax.storage import writing

PACKAGE = Path(writing.__file__).parents[1]

HOLD = """
import sys, time
from align_jax.storage import writing
with writing.locked(sys.argv[1], "align test"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_file_appears_whole_and_in_a_new_folder(tmp_path):
    path = tmp_path / "a" / "b.json"
    writing.write_json(path, {"x": "ä"}, ensure_ascii=False)
    assert path.read_text("utf-8") == '{\n  "x": "ä"\n}\n'
    assert [entry.name for entry in path.parent.iterdir()] == ["b.json"]


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x"
    writing.write_text(path, "old")
    with pytest.raises(RuntimeError), writing.replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_the_bytes_are_on_disk_before_the_name_is(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def replaced(source, target):
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    writing.write_bytes(tmp_path / "x", b"1")
    file, rename, folder = calls
    assert file.startswith(".x.") and rename == "replace" and folder == tmp_path.name


def test_half_surrogates_become_the_replacement_character(tmp_path):
    writing.write_text(tmp_path / "x", "cut \ud83d\r\n")
    assert (tmp_path / "x").read_bytes() == b"cut ?\r\n"


def test_a_link_is_followed_and_a_device_written_directly(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    writing.write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "file").read_text() == "x"
    writing.write_text("/dev/null", "x")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("path", ["gs://bucket/x", "s3://b", "file:///tmp/x", "hdfs://a/b"])
def test_a_path_with_a_scheme_is_refused_and_makes_no_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scheme = path.partition(":")[0]
    for write in (
        lambda: writing.check_local(path, "--out"),
        lambda: writing.write_text(path, "x"),
        lambda: writing.locked(path, "x").__enter__(),
    ):
        with pytest.raises(ValueError, match=f"{path}: {scheme}:// is not a file system"):
            write()
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="is not a file system"):
        writing.check_local(Path("gs://bucket/x"), "--out")  # which is gs:/bucket/x by now
    for local in ("C:/x", "/gs://x", "./gs://x", Path("x"), "a:b/c"):
        writing.check_local(local, "--out")


def test_second_process_gets_a_line_that_names_the_first_and_touches_nothing(tmp_path):
    folder = tmp_path / "run"
    first = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"held\n"
    before = sorted(os.listdir(folder))
    with pytest.raises(ValueError) as info, writing.locked(folder, "align other"):
        pass
    assert f"align test, process {first.pid} on {os.uname().nodename}" in str(info.value)
    assert "\n" not in str(info.value)
    assert sorted(os.listdir(folder)) == before == ["lock"]
    first.kill()  # a dead owner's lock is free
    first.wait()
    with writing.locked(folder, "align other"):
        assert f"process {os.getpid()} " in (folder / "lock").read_text()
    assert not (folder / "lock").exists()


def test_locks_exclude_threads_and_never_two_at_once(tmp_path):
    inside, most, done = [], [], []

    def work():
        for _ in range(50):
            while True:
                try:
                    with writing.locked(tmp_path, "x"):
                        inside.append(1)
                        most.append(len(inside))
                        inside.pop()
                        break
                except ValueError:
                    time.sleep(0)
        done.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 4 and max(most) == 1 and len(most) == 200


def test_a_lock_leaves_no_empty_folder_and_clears_up_what_the_killed_left(tmp_path):
    with writing.locked(tmp_path / "a" / "b", "x"):
        pass
    assert os.listdir(tmp_path) == []
    (tmp_path / "plots").mkdir()
    left = [
        writing.temporary_path(tmp_path / "a"),
        writing.temporary_path(tmp_path / "plots" / "b"),
    ]
    for path in (*left, tmp_path / "own.tmp"):
        path.write_text("x")
    with writing.locked(tmp_path, "x"):
        assert sorted(os.listdir(tmp_path)) == ["lock", "own.tmp", "plots"]
        assert os.listdir(tmp_path / "plots") == []


def test_a_full_disk_is_found_in_causes_groups_and_texts(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped = ValueError("orbax")
    wrapped.__cause__ = full
    grouped = ExceptionGroup("saving", [RuntimeError("x"), wrapped])
    text = ValueError("RESOURCE_EXHAUSTED: write: [OS error 28: ENOSPC No space left on device]")
    for error in (full, wrapped, grouped, text):
        line = str(writing.explain_full_disk(error, tmp_path / "run" / "x"))
        assert f"{tmp_path / 'run' / 'x'} cannot be written: no space left (" in line
        assert "MiB free" in line
    assert writing.explain_full_disk(ValueError("space"), tmp_path) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_really_full_disk_keeps_the_old_file(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk])
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        writing.write_text(disk / "x", "old")
        with pytest.raises(OSError) as info:
            writing.write_bytes(disk / "x", bytes(2**20))
        assert "0.1 MiB free" in str(writing.explain_full_disk(info.value, disk))
        assert (disk / "x").read_text() == "old" and os.listdir(disk) == ["x"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    code = (
        "import sys, itertools\nfrom align_jax.storage import writing\n"
        "for n in itertools.count():\n"
        "    writing.write_json(sys.argv[1], [n] * 20000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, path])
    for _ in range(20):
        while not path.exists():
            time.sleep(0.01)
        values = json.loads(path.read_text())
        assert len(values) == 20000 and len(set(values)) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(set(json.loads(path.read_text()))) == 1
