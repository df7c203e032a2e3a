"""data/img2dataset.py: its output folders as a source, whole and shard by shard."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import snapshot
from PIL import Image

from align_jax.curate.pack.pack import pack
from align_jax.data.sources.open_source import open_source
from align_jax.data.sources.record import Record


def jpeg(shade):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 255 - shade)).save(file, "JPEG")
    return file.getvalue()


def write_shard(folder, number, count=4, failed=("failed_to_download",), files=None):
    """Writes a shard as img2dataset does: a tar of samples, a table of all rows, stats."""
    folder.mkdir(exist_ok=True)
    stem = f"{number:05d}"
    keys = [f"{stem}{index:04d}" for index in range(count + len(failed))]
    with tarfile.open(folder / f"{stem}.tar", "w") as archive:
        for key in keys[:count]:
            side = json.dumps({"key": key, "caption": f"caption {key}", "url": "https://x.org"})
            for name, data in (
                files(key)
                if files
                else (
                    (f"{key}.jpg", jpeg(int(key) % 256)),
                    (f"{key}.txt", f"caption {key}".encode()),
                    (f"{key}.json", side.encode()),
                )
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    statuses = ["success"] * count + list(failed)
    pq.write_table(pa.table({"key": keys, "status": statuses}), folder / f"{stem}.parquet")
    stats = {"count": len(keys), "successes": count, "failed_to_download": len(failed)}
    (folder / f"{stem}_stats.json").write_text(json.dumps(stats))
    return [Record(key, jpeg(int(key) % 256), (f"caption {key}",)) for key in keys[:count]]


def read(folder):
    source = open_source(str(folder))
    return [source[index] for index in range(len(source))]


def test_finished_shards_are_read_in_order_and_failures_counted_by_status(tmp_path):
    records = write_shard(tmp_path / "in", 0, failed=["failed_to_download"] * 3)
    records += write_shard(tmp_path / "in", 1, failed=["failed_to_download", "failed_to_resize"])
    (tmp_path / "in" / "_tmp").mkdir()
    source = open_source(str(tmp_path / "in"))
    assert [source[index] for index in range(len(source))] == records
    assert source.problems == {"status_failed_to_download": 4, "status_failed_to_resize": 1}
    assert source.captions(5) == records[5].captions
    assert read(f"{tmp_path / 'in'}?max=3") == records[:3]


def test_pack_opens_shard_by_shard_and_counts_the_same(tmp_path):
    records = write_shard(tmp_path / "in", 0) + write_shard(tmp_path / "in", 1)
    source = open_source(str(tmp_path / "in"))
    report = pack(source, tmp_path / "out")
    assert source._pairs is None  # the folder as a whole was never indexed
    assert read(tmp_path / "out") == records
    assert report["records_read"] == 8 and report["shards"] == 2
    assert report["source_problems"] == {"status_failed_to_download": 2} == source.problems


def test_workers_write_the_same_files_from_shards(tmp_path):
    for number in range(3):
        write_shard(tmp_path / "in", number)
    source = open_source(str(tmp_path / "in"))
    for workers in (1, 2):
        pack(source, tmp_path / str(workers) / "out", num_workers=workers)
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "2")


@pytest.mark.parametrize("stats", [None, "", '{"successes": ', "[1]"])
def test_shard_without_whole_stats_is_unfinished(tmp_path, stats):
    records = write_shard(tmp_path / "in", 0)
    write_shard(tmp_path / "in", 1)
    (tmp_path / "in" / "00001_stats.json").unlink()
    if stats is not None:
        (tmp_path / "in" / "00001_stats.json").write_text(stats)
    source = open_source(str(tmp_path / "in"))
    assert source.folder_problems.first == {"shard_unfinished": str(tmp_path / "in" / "00001.tar")}
    report = pack(source, tmp_path / "out")
    assert read(tmp_path / "out") == records
    assert report["source_problems"]["shard_unfinished"] == 1
    with pytest.raises(ValueError, match="00001.tar is unfinished: 00001_stats.json is missing"):
        open_source(f"{tmp_path / 'in'}?unfinished=refuse")


def test_key_in_two_shards_is_one_key(tmp_path):
    records = write_shard(tmp_path / "in", 0)
    for suffix in (".tar", ".parquet", "_stats.json"):
        (tmp_path / "in" / f"00001{suffix}").write_bytes(
            (tmp_path / "in" / f"00000{suffix}").read_bytes()
        )
    report = pack(open_source(str(tmp_path / "in")), tmp_path / "out")
    assert read(tmp_path / "out") == records
    assert report["skipped"] == {"key_duplicate": 4}
    source = open_source(str(tmp_path / "in"))  # as other verbs see it
    assert len(source) == 4 and source.problems["key_duplicate"] == 4


def test_damaged_shards_lose_what_is_damaged_only(tmp_path):
    records = write_shard(tmp_path / "in", 0)
    for number in (1, 2, 3, 4):
        write_shard(tmp_path / "in", number)
    folder = tmp_path / "in"
    (folder / "00001.tar").write_bytes(b"")
    (folder / "00002.tar").write_bytes((folder / "00002.tar").read_bytes()[: 6 * 1024 + 100])
    (folder / "00003.parquet").write_bytes(b"PAR1 not")
    (folder / "00004.tar").unlink()
    source = open_source(str(folder))
    report = pack(source, tmp_path / "out")
    keys = [record.key for record in read(tmp_path / "out")]
    assert keys[:4] == [record.key for record in records]
    assert [key for key in keys if key.startswith("00001")] == []
    assert [key for key in keys if key.startswith("00002")] == ["000020000", "000020001"]
    assert len([key for key in keys if key.startswith("00003")]) == 4
    assert report["source_problems"] == {
        "status_failed_to_download": 3,
        "archive_unreadable": 1,
        "tar_truncated": 1,
        "side_table_unreadable": 1,
    }


def test_folder_per_shard_is_read_like_a_tar(tmp_path):
    records = write_shard(tmp_path / "in", 0)
    with tarfile.open(tmp_path / "in" / "00000.tar") as archive:
        archive.extractall(tmp_path / "in" / "00000", filter="data")
    (tmp_path / "in" / "00000.tar").unlink()
    assert read(tmp_path / "in") == records


def test_caption_field_is_chosen_as_in_other_sources(tmp_path):
    def files(key):
        side = {"caption": "", "long": f"long {key}"}
        return [(f"{key}.jpg", jpeg(1)), (f"{key}.json", json.dumps(side).encode())]

    write_shard(tmp_path / "in", 0, count=1, files=files)
    source = open_source(f"{tmp_path / 'in'}?captions=long")
    pack(source, tmp_path / "out")
    assert read(tmp_path / "out")[0].captions == ("long 000000000",)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("unfinished=maybe", "unfinished=maybe must be skip or refuse"),
        ("split=train", "unknown option 'split'; known: unfinished, captions, max"),
    ],
)
def test_bad_option_is_one_clear_line(tmp_path, option, message):
    write_shard(tmp_path / "in", 0)
    with pytest.raises(ValueError, match=message):
        open_source(f"{tmp_path / 'in'}?{option}")


def test_folder_of_unfinished_shards_only_says_so(tmp_path):
    write_shard(tmp_path / "in", 0)
    (tmp_path / "in" / "00000_stats.json").write_text("")
    with pytest.raises(ValueError, match="holds no finished shard. shard_unfinished: 1"):
        open_source(str(tmp_path / "in"))
