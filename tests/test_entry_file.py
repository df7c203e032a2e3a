"""data/sources/entry_file.py and indexing.py: indexes on disk, shared, stale or cut off; memory."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
from helpers import environment

from align_jax.data.sources import entry_file, files, indexing
from align_jax.data.sources.archives import Member
from align_jax.data.sources.open_source import open_source
from align_jax.data.sources.record import KeyHashes
from align_jax.data.sources.tables import Row
from align_jax.storage import identity
from align_jax.storage.problems import Problems


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of indexes; every source is large enough for one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(entry_file, "_FEW", 3)
    return tmp_path / "cache" / "align_jax" / "indexes"


def write_tar(path, names):
    with tarfile.open(path, "w") as archive:
        for name in names:
            data = f"bytes of {name} in {path}".encode("utf-8", "surrogateescape")
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_shards():
    for shard in range(4):
        names = [f"{n:03d}{suffix}" for n in range(6) for suffix in (".jpg", ".txt")]
        write_tar(f"{shard}.tar", [*names, f"only-{shard}.jpg", f"b\udce9{shard}.png", ".hidden"])


def write_table():
    with zipfile.ZipFile("images.zip", "w") as archive:
        for number in range(8):
            archive.writestr(f"a/{number}.jpg", b"jpeg" * number)
    rows = [{"image": f"{n}.jpg", "captions": [f"a {n}", "b", "cut \ud83d"]} for n in range(9)]
    with open("rows.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def facts(source):
    count = len(source)
    return (
        [source[n] for n in range(count)],
        [source.captions(n) for n in range(count)],
        [source.where(n) for n in range(-count, 0)],
        source.problems.to_json(),
    )


@pytest.mark.parametrize(
    ("write", "spec"),
    [
        (write_shards, "*.tar"),
        (write_table, "rows.jsonl?images=images.zip"),
        (write_shards, "0.tar"),
    ],
)
def test_an_index_on_disk_gives_what_one_in_memory_does(cache, monkeypatch, write, spec):
    write()
    monkeypatch.setattr(entry_file, "_FEW", 1000)
    expected = open_source(spec)
    wanted, stamp = facts(expected), identity.stamp(expected)
    assert not list(cache.glob("*")) and wanted[3]
    monkeypatch.setattr(entry_file, "_FEW", 3)
    assert facts(open_source(spec)) == wanted
    assert len(list(cache.glob("*.entries"))) == 1
    monkeypatch.setattr(files, "for_each", None)  # nothing is indexed again
    again = open_source(spec)
    assert facts(again) == wanted and identity.stamp(again) == stamp
    assert facts(pickle.loads(pickle.dumps(again))) == wanted
    if spec == "0.tar":
        assert [record.key for record in again.slice(2, 5)] == [r.key for r in wanted[0][2:5]]


def test_an_index_of_changed_archives_is_not_used(cache):
    write_shards()
    before = facts(open_source("*.tar"))
    status = os.stat("2.tar")
    names = [f"{n:03d}{suffix}" for n in range(6) for suffix in (".jpg", ".txt")]
    write_tar("2.tar", [*names[::-1], "only-2.jpg", "b\udce9z.png", ".hidden"])
    assert os.path.getsize("2.tar") == status.st_size
    after = facts(open_source("*.tar"))
    assert after != before and after[0][0] == before[0][0]
    assert len(list(cache.glob("*.entries"))) == 2


def test_an_index_that_is_not_whole_is_made_again(cache):
    write_shards()
    wanted = facts(open_source("*.tar"))
    (path,) = cache.glob("*")
    whole = path.read_bytes()
    for broken in (b"", b"x", whole[:-1], whole[100:], whole[:-8] + b"OTHERFMT"):
        path.write_bytes(broken)
        assert facts(open_source("*.tar")) == wanted
        assert path.read_bytes() == whole


def test_the_limit_and_options_are_part_of_an_index(cache):
    write_shards()
    write_table()
    for spec in ("*.tar?max=5", "*.tar?max=7", "rows.jsonl?images=images.zip&max=4"):
        assert len(open_source(spec)) == int(spec[-1])
        assert len(open_source(spec)) == int(spec[-1])
    assert open_source("*.tar?max=7").problems == open_source("*.tar?max=8").problems


def test_indexes_of_folders_are_not_kept(cache, tmp_path):
    (tmp_path / "pairs").mkdir()
    for number in range(5):
        for suffix in (".jpg", ".txt"):
            (tmp_path / "pairs" / f"{number}{suffix}").write_text("x")
    source = open_source("pairs")
    assert len(source) == 5 and len(list(cache.glob("*"))) == 1
    assert source[4].image == b"x"
    del source
    assert not list(cache.glob("*"))
    (tmp_path / "pairs" / "3.jpg").unlink()
    assert len(open_source("pairs")) == 4


def test_old_indexes_are_removed_and_used_ones_stay(cache):
    write_shards()
    open_source("0.tar"), open_source("1.tar")
    for path in cache.glob("*"):
        os.utime(path, (0, 0))
    open_source("0.tar")  # used: young again
    open_source("2.tar")  # made: the time to look for old ones
    assert len(list(cache.glob("*"))) == 2


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    write_shards()
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    monkeypatch.setattr(entry_file.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    assert len(open_source("*.tar").captions(0)) == 1
    assert list((tmp_path / "temporary").rglob("*.entries"))


def test_processes_list_archives_as_one_does(monkeypatch):
    write_shards()
    paths = ["0.tar", "1.tar", "2.tar", "3.tar"] * 4
    wanted = list(map(os.path.getsize, paths))
    monkeypatch.setattr(indexing, "_PARALLEL_FROM_BYTES", 0)
    monkeypatch.setattr(indexing.os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert list(indexing.for_each(os.path.getsize, paths)) == wanted
    alone = next(iter(indexing.for_each(os.path.getsize, paths)))  # the others are ended
    assert alone == wanted[0]
    with pytest.raises(RuntimeError, match=r"^a process that lists archives ended at 0.tar \(code"):
        list(indexing.for_each(os._exit, paths))


@pytest.mark.slow
def test_two_processes_may_make_one_index_at_once(cache):
    write_shards()
    program = (
        "from align_jax.data.sources import entry_file; entry_file._FEW = 3\n"
        "from align_jax.data.sources.open_source import open_source\n"
        "for _ in range(20):\n"
        "    import glob, os; [os.unlink(p) for p in glob.glob('cache/*/*/*.entries')[:1]]\n"
        "    assert len(open_source('*.tar')) == 24\n"
    ).replace("[os.unlink(p)", "[entry_file._remove(p, os.getpid())")
    children = [
        subprocess.Popen([sys.executable, "-c", program], env=environment()) for _ in range(3)
    ]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert all(path.suffix == ".entries" for path in cache.iterdir())


def test_memory_of_a_pair_is_below_64_bytes(monkeypatch):
    monkeypatch.setattr(entry_file, "_FEW", 1000)
    count = 20_000

    def build(problems):
        for number in range(count):
            members = [
                Member("shard.tar", f"{number:09d}{suffix}", "tar", 512 * number, 20_000)
                for suffix in (".jpg", ".txt")
            ]
            yield f"{number:09d}", *members

    tracemalloc.start()
    entries, problems = entry_file.keep_entries("0" * 32, build)
    source = files.FilePairs("x", entries, problems)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == count and used / count < 64
    assert source.key(count - 1) == "000019999"


def test_rows_and_members_come_back_as_they_were():
    wanted = [
        ("k", Member("a.zip", "x/\udce9.jpg", "deflated", 2**40, 7), Row("x", "s", ("a", "b"))),
        ("l", Member("/f/1.jpg", "1.jpg", "file"), Row("", "", ("a",), (0.5,), ("alt",))),
        ("m", Member("b.tar", "1.jpg", "tar", 512, 3), Member("b.tar", "1.txt", "tar", 2048, 1)),
    ] * 2
    problems = Problems()
    problems.add("image_missing", "2.jpg", 3)

    def build(found):
        yield from wanted
        found.merge(problems)

    for _ in range(2):
        entries, found = entry_file.keep_entries("1" * 32, build)
        assert list(entries) == wanted and entries[:] == wanted
        assert [entries[n] for n in range(-6, 6)] == wanted * 2
        assert entries[1:5:2] == wanted[1:5:2] and entries[4:2] == []
        assert found == problems and found.first == problems.first
        with pytest.raises(IndexError):
            entries[6]


def test_key_hashes_remember_what_was_added():
    rng = np.random.default_rng(0)
    seen, slow = KeyHashes(np.array([5, 3], np.uint64)), {3, 5}
    for _ in range(60):
        some = rng.choice(3000, rng.integers(0, 90), replace=False).astype(np.uint64)
        assert seen.add(some).tolist() == [value in slow for value in some.tolist()]
        slow |= set(some.tolist())
    assert sum(map(len, seen._levels)) == len(slow) and len(seen._levels) < 12
