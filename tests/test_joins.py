"""Curated tables of COYO, LAION and DataComp joined to what img2dataset has downloaded."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curate_helpers import write_preset
from helpers import error_of, real_data
from test_img2dataset import write_shard

from align_jax.cli import main as cli
from align_jax.curate.filter import curate, lists
from align_jax.curate.pack.pack import pack
from align_jax.data.sources import subsets
from align_jax.data.sources.open_source import open_source

UIDS = [f"{n:015x}f{n * 7919:016x}" for n in range(6)]
# The forms in which the three publish their rows: name of the identity, its column, texts, scores.
FORMS = {
    "coyo": ("id", pa.array([2_048_796_393_000 + n for n in range(6)])),
    "laion": ("SAMPLE_ID", pa.array([1_581_282_014_547.0 + n for n in range(6)])),
    "datacomp": ("uid", pa.array(UIDS)),
}


def write_table(path, form, texts=None):
    """Writes six rows as COYO, LAION or DataComp have them; those of row 3 and 4 fail a rule."""
    name, values = FORMS[form]
    upper = form == "laion"
    columns = {
        name: values,
        "URL" if upper else "url": [f"https://x.org/{n}.jpg" for n in range(6)],
        "TEXT" if upper else "text": texts or [f"picture number {n}" for n in range(6)],
        "WIDTH" if upper else "width": [300] * 3 + [20] * 2 + [300],
        "HEIGHT" if upper else "height": [300] * 6,
    }
    pq.write_table(pa.table(columns), path)


def download(url_list, folder):
    """Plays img2dataset: shards of its own keys from a list, the last url failing."""
    rows = pq.read_table(url_list).to_pylist()
    write_shard(folder, 0, count=len(rows) - 1)
    side = pq.read_table(folder / "00000.parquet")
    for name in rows[0]:
        side = side.append_column(name, pa.array([row[name] for row in rows]))
    pq.write_table(side, folder / "00000.parquet")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("by", ["identity", "url"])
def test_curated_rows_are_downloaded_and_packed_by_id_or_url(tmp_path, form, by):
    write_table(tmp_path / "all.parquet", form)
    preset = write_preset(tmp_path / "p.py", "short_side(at_least_px=200)")
    arguments = (
        "--preset",
        preset,
        "--out",
        tmp_path / "cur",
        "--url-list",
        tmp_path / "u.parquet",
    )
    assert cli.main(["curate", *map(str, (tmp_path / "all.parquet", *arguments))]) == 0
    name = FORMS[form][0]
    urls = pq.read_table(tmp_path / "u.parquet")
    assert urls.column_names == ["url", "caption", name]
    assert urls["url"].to_pylist() == [f"https://x.org/{n}.jpg" for n in (0, 1, 2, 5)]
    download(tmp_path / "u.parquet", tmp_path / "shards")
    # Of the three downloads two are still wanted, one of them with two texts.
    kept = pq.read_table(tmp_path / "cur" / "kept.parquet").to_pylist()
    wanted = [kept[0], kept[2], kept[2] | {"text": "another text"}]
    pq.write_table(pa.Table.from_pylist(wanted), tmp_path / "keep.parquet")
    report = pack(
        open_source(str(tmp_path / "shards")),
        tmp_path / "out",
        keep=str(tmp_path / "keep.parquet"),
        keep_by=name if by == "identity" else "url",
        columns=["url"],
    )
    packed = open_source(str(tmp_path / "out"))
    records = [packed[index] for index in range(len(packed))]
    assert [record.key for record in records] == ["000000000", "000000002"]
    assert records[0].captions == ("picture number 0",)
    assert records[1].captions == ("picture number 2", "another text")
    assert records[1].metadata["url"] == "https://x.org/2.jpg"
    assert report["skipped"] == {"not_kept": 1}


def test_joined_list_drops_and_counts_records_that_cannot_be_joined(tmp_path):
    write_shard(tmp_path / "shards", 0, count=3, failed=())
    side = pq.read_table(tmp_path / "shards" / "00000.parquet")
    side = side.append_column("uid", pa.array([UIDS[0], None, UIDS[2]]))
    pq.write_table(side, tmp_path / "shards" / "00000.parquet")
    pq.write_table(pa.table({"key": [UIDS[2]]}), tmp_path / "list.parquet")
    source = open_source(str(tmp_path / "shards"))
    path = str(tmp_path / "list.parquet")
    kept = pack(source, tmp_path / "kept", keep=path, keep_by="uid")
    assert kept["skipped"] == {"not_kept": 1, "join_missing": 1}
    assert kept["problems"]["join_missing"]["count"] == 1
    dropped = pack(source, tmp_path / "dropped", drop=path, drop_by="UID")
    assert dropped["skipped"] == {"dropped_by_list": 1} and dropped["records_written"] == 2


def test_subset_files_are_those_of_datacomp(tmp_path):
    # As its baselines.py writes them and its resharder.py takes them.
    theirs = np.array(
        sorted((int(uid[:16], 16), int(uid[16:32], 16)) for uid in UIDS), np.dtype("u8,u8")
    )
    np.save(tmp_path / "theirs.npy", theirs)
    assert [u for batch in subsets.read_subset(tmp_path / "theirs.npy") for u in batch] == UIDS
    write_table(tmp_path / "all.parquet", "datacomp")
    preset = write_preset(tmp_path / "p.py", "short_side(at_least_px=200)")
    out, ours = tmp_path / "cur", tmp_path / "ours.npy"
    for _ in range(2):  # a finished curation writes it, too
        curate.curate(str(tmp_path / "all.parquet"), out, preset=preset, subset=str(ours))
        assert ours.read_bytes()[:6] == b"\x93NUMPY"
        assert np.load(ours).dtype == np.dtype("u8,u8")
        assert np.load(ours).tolist() == [theirs.tolist()[n] for n in (0, 1, 2, 5)]
        ours.unlink()
    np.save(ours, theirs[[2, 1]])
    write_shard(tmp_path / "shards", 0, count=6, failed=())
    side = pq.read_table(tmp_path / "shards" / "00000.parquet").append_column("uid", [UIDS])
    pq.write_table(side, tmp_path / "shards" / "00000.parquet")
    report = pack(open_source(str(tmp_path / "shards")), tmp_path / "out", keep=str(ours))
    assert report["records_written"] == 2
    packed = open_source(str(tmp_path / "out"))
    assert [packed[n].key for n in range(2)] == ["000000001", "000000002"]


def test_url_list_has_each_url_once_with_its_first_text(tmp_path):
    rows = {
        "url": ["a", "b", "a", None, ""],
        "text": ["1", "2", "3", "4", "5"],
        "key": list("vwxyz"),
    }
    for number, part in enumerate((slice(0, 2), slice(2, 5))):
        table = pa.table({name: values[part] for name, values in rows.items()})
        pq.write_table(table, tmp_path / f"{number}.parquet")
    kept = [str(tmp_path / f"{number}.parquet") for number in range(2)]
    assert lists.write_url_list(kept, tmp_path / "u.parquet", "id") == 2
    assert pq.read_table(tmp_path / "u.parquet").to_pydict() == {
        "url": ["a", "b"],
        "caption": ["1", "2"],
        "id": ["v", "w"],
    }
    assert len(list(tmp_path.iterdir())) == 3


def test_wrong_joins_are_one_line(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shard(tmp_path / "shards", 0)
    write_table(tmp_path / "t.parquet", "coyo")
    np.save("floats.npy", np.zeros(3))
    write_preset(tmp_path / "p.py", "has_text()")
    pq.write_table(pa.table({"text": ["a dog"]}), "bare.parquet")
    pack_ = ("pack", "shards", "--out", "out")
    curate_ = ("curate", "t.parquet", "--preset", "p.py", "--out", "cur")
    for arguments, message in (
        ((*pack_, "--keep-by", "uid"), "--keep-by uid needs --keep"),
        ((*pack_, "--keep", "t.parquet", "--keep-by", "uid"), "has no column 'uid'"),
        ((*pack_, "--keep", "t.parquet", "--keep-by", "id"), "save_additional_columns '[\"id\"]'"),
        ((*pack_, "--keep", "floats.npy"), "dtype u8,u8"),
        ((*curate_, "--subset", "s.txt"), "must end in .npy"),
        ((*curate_, "--url-list", "u.csv"), "--url-list u.csv must end in .parquet"),
        (
            ("curate", "bare.parquet", *curate_[2:5], "c", "--url-list", "u.parquet"),
            "has no column url",
        ),
    ):
        assert message in error_of(capfd, *arguments), message
    # No list takes the place of another file, least of all of the table that is read.
    before = Path("t.parquet").read_bytes()
    message = error_of(capfd, *curate_, "--url-list", "t.parquet")
    assert "--url-list t.parquet exists; name a new file." in message
    message = error_of(capfd, *curate_, "--subset", "floats.npy")
    assert "--subset floats.npy exists; name a new file." in message
    assert Path("t.parquet").read_bytes() == before and not Path("cur/kept.parquet").exists()
    # The result of the work before is there nevertheless.
    assert cli.main([*curate_, "--subset", "s.npy"]) == 2
    assert "is no uid of DataComp" in capfd.readouterr().err
    assert pq.read_table("cur/kept.parquet").num_rows == 6
    message = error_of(capfd, *curate_, "--url-list", "t.parquet")
    assert "t.parquet exists with other content; name a new file." in message
    assert Path("t.parquet").read_bytes() == before
    for _ in range(2):  # a finished curation writes the same list again
        assert cli.main([*curate_, "--url-list", "u.parquet"]) == 0


def test_laion_rows_come_back_from_their_downloads(tmp_path):
    laion = real_data("metadata") / "laion_10k.parquet"
    out, urls = tmp_path / "cur", tmp_path / "u.parquet"
    preset = write_preset(tmp_path / "p.py", "num_words(3, 20)")
    made = curate.curate(str(laion), out, preset=preset, url_list=str(urls))
    listed = pq.read_table(urls)
    assert len(set(listed["url"].to_pylist())) == len(listed) <= made["rows_kept"]
    folder = tmp_path / "shards"
    write_shard(folder, 0, count=40, failed=())
    side = pq.read_table(folder / "00000.parquet")
    side = side.append_column("url", listed["url"].combine_chunks()[:40])
    pq.write_table(side, folder / "00000.parquet")
    report = pack(
        open_source(str(folder)), tmp_path / "out", keep=str(out / "kept.parquet"), keep_by="url"
    )
    assert report["records_written"] == 40
    packed = open_source(str(tmp_path / "out"))
    assert [packed[n].captions[0] for n in range(40)] == listed["caption"].to_pylist()[:40]
