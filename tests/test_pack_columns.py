"""Metadata columns survive packing: curate/pack/metadata.py, and Record.metadata of the result."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import error_of, make_pairs, snapshot

from align_jax.cli import main as cli
from align_jax.curate.pack.pack import pack
from align_jax.data.sources.open_source import InMemory, open_source

PAIRS = "captions.jsonl?images=images"


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """6 pairs, and a table of five of them that has more columns."""
    monkeypatch.chdir(tmp_path)
    make_pairs(tmp_path, 6)
    rows = {
        "key": ["4.jpg", "0.jpg", None, "2.jpg", "0.jpg", "3.jpg"],
        "text": ["four", "zero", "none", "two", "nought", "three"],
        "url": ["u4", "u0", "un", None, "again", "ü3"],
        "similarity": [0.5, 0.0, 9.0, 0.25, 9.0, None],
        "width": [40, 0, 9, 20, 9, None],
    }
    pq.write_table(pa.table(rows), "kept.parquet", row_group_size=2)
    return tmp_path


def read(folder):
    source = open_source(str(folder))
    return [source[index] for index in range(len(source))]


def test_columns_of_the_kept_table_become_features(inside):
    command = ["pack", PAIRS, "--keep", "kept.parquet", "--columns", "url, similarity,width"]
    for workers in ("1", "2"):
        assert cli.main([*command, "--out", workers + "/out", "--workers", workers]) == 0
    found = {record.key: record.metadata for record in read("1/out")}
    assert found == {
        "0.jpg": {"url": "u0", "similarity": 0.0, "width": 0},
        "2.jpg": {"similarity": 0.25, "width": 20},
        "3.jpg": {"url": "ü3", "width": -1},
        "4.jpg": {"url": "u4", "similarity": 0.5, "width": 40},
    }
    assert read("1/out")[0].captions == ("zero", "nought")
    assert snapshot("1") == snapshot("2")


def test_columns_pass_on_from_packed_and_parquet_sources(inside):
    kept = {"keep": "kept.parquet", "columns": ["url", "similarity", "width"]}
    pack(open_source(PAIRS), "one", **kept)
    pack(open_source("one"), "two", columns=["width", "url", "similarity"])
    assert read("two") == read("one")
    records = [InMemory(read("one"))[index] for index in range(4)]
    table = {"jpg": [r.image for r in records], "text": ["x"] * 4}
    table |= {"license": ["MIT", None, "CC", ""], "score": [1.5, 2.0, None, 3.0]}
    pq.write_table(pa.table(table), "images.parquet")
    pack(open_source("images.parquet"), "three", columns=["license", "score"])
    assert [record.metadata for record in read("three")] == [
        {"license": "MIT", "score": 1.5},
        {"score": 2.0},
        {"license": "CC"},
        {"score": 3.0},
    ]


def test_a_split_with_other_columns_is_refused(inside, capfd):
    pack(open_source(PAIRS), "out")
    command = ["pack", PAIRS, "--out", "out", "--split", "dev", "--keep", "kept.parquet"]
    message = error_of(capfd, *command, "--columns", "url")
    assert message.startswith("out holds another kind of dataset") or "out holds another" in message


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("licence", "--columns licence: neither the table of --keep nor the source has it; they "),
        ("key", "--columns key is taken: a packed dataset has image, captions, "),
    ],
)
def test_unknown_columns_are_one_line(inside, capfd, columns, message):
    command = ["pack", PAIRS, "--out", "out", "--keep", "kept.parquet", "--columns", columns]
    assert error_of(capfd, *command).startswith(message)
