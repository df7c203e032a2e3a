"""The `captions=` option of a source: which columns a record's captions are from, how weighted."""

import pytest
from test_sources import (
    IMAGE,
    TEXT,
    all_records,
    jpeg,
    write_files,
    write_lines,
    write_tfds,
    write_zip,
)

from align_jax.curate.pack.pack import pack
from align_jax.data.sources.open_source import open_source
from align_jax.data.sources.record import Record, weigh_captions

ROWS = [
    {"image": "a.jpg", "Alt": "a dog", "synthetic": ["one dog", "a dog runs"]},
    {"image": "b.jpg", "Alt": "  ", "synthetic": "a cat"},
    {"image": "c.jpg", "Alt": "a cow", "synthetic": ""},
]
OPTION = "captions=alt:0.3,synthetic:0.7"
# What training draws for each image, and how often.
EXPECTED = [
    {("alt", "a dog"): 0.3, ("synthetic", "one dog"): 0.35, ("synthetic", "a dog runs"): 0.35},
    {("synthetic", "a cat"): 0.7},
    {("alt", "a cow"): 0.3},
]


def drawn(record):
    texts = zip(record.columns, record.captions, strict=True)
    return dict(zip(texts, record.weights, strict=True))


@pytest.fixture
def table(tmp_path):
    """A table of ROWS beside its images."""
    write_zip(tmp_path / "i.zip", {f"{name}.jpg": jpeg(i) for i, name in enumerate("abc")})
    return f"{write_lines(tmp_path / 't.jsonl', ROWS)}?images={tmp_path / 'i.zip'}"


def test_blank_captions_and_missing_columns_get_no_weight():
    columns = {"a": ["x", " ", "y"], "b": [""]}
    assert weigh_captions(columns, {"b": 5.0, "a": 3.0, "c": 1.0}) == (
        ("x", "y"),
        (1.5, 1.5),
        ("a", "a"),
    )


def test_columns_of_a_table_are_weighted(table):
    source = open_source(f"{table}&{OPTION}")
    assert [drawn(record) for record in all_records(source)] == EXPECTED
    assert source.captions(1) == ("a cat",)


def test_columns_of_rows_about_the_same_image_share_their_weight(tmp_path, table):
    write_lines(tmp_path / "t.jsonl", [*ROWS, {"image": "c.jpg", "alt": "a bull"}])
    assert drawn(open_source(f"{table}&{OPTION}")[2]) == {
        ("alt", "a cow"): 0.15,
        ("alt", "a bull"): 0.15,
    }


def test_fields_of_json_files_are_weighted(tmp_path):
    files = {"a.jpg": jpeg(1), "a.txt": b"unused", "a.json": b'{"alt": "x", "Synthetic": "y"}'}
    write_files(tmp_path / "folder", files)
    assert drawn(open_source(f"{tmp_path / 'folder'}?captions=alt:1,synthetic:3")[0]) == {
        ("alt", "x"): 1.0,
        ("synthetic", "y"): 3.0,
    }
    assert open_source(str(tmp_path / "folder"))[0] == Record("a", jpeg(1), ("unused",))


def test_features_of_a_tfds_dataset_are_weighted(tmp_path):
    example = {"image": jpeg(3), "alt": "x", "synthetic": "y", "text": "z"}
    features = {"image": IMAGE, "alt": TEXT, "synthetic": TEXT, "text": TEXT}
    folder = write_tfds(tmp_path / "web", features, [example, example | {"alt": ""}])
    source = open_source(f"{folder}?captions=synthetic:2,alt")
    assert drawn(source[0]) == {("synthetic", "y"): 2.0, ("alt", "x"): 1.0}
    assert drawn(source[1]) == {("synthetic", "y"): 2.0}
    assert source.where(1).endswith(": record 1 of web-train.array_record-00000-of-00001")
    assert (
        open_source(f"{folder}?split=train[1:]")
        .where(0)
        .endswith(": record 1 of " + "web-train.array_record-00000-of-00001")
    )
    assert open_source(str(folder))[0].captions == ("z",)


def test_packed_columns_can_be_weighted_anew(tmp_path, table):
    pack(open_source(f"{table}&captions=synthetic,alt"), tmp_path / "out")
    source = open_source(f"{tmp_path / 'out'}?{OPTION}")
    assert [drawn(record) for record in all_records(source)] == EXPECTED
    assert drawn(open_source(f"{tmp_path / 'out'}?captions=alt")[0]) == {("alt", "a dog"): 1.0}
    plain = open_source(str(tmp_path / "out"))[0]
    assert plain.captions == ("one dog", "a dog runs", "a dog") and not plain.weights


@pytest.mark.parametrize(
    "option", ["alt:0", "alt:-1", "alt:x", "alt,alt:2", "alt,", ":1", "alt:inf"]
)
def test_bad_weights_are_refused_in_one_line(table, option):
    with pytest.raises(ValueError, match="must name columns, each once, with positive weights"):
        open_source(f"{table}&captions={option}")


def test_unknown_columns_are_refused_with_those_that_are_there(tmp_path, table):
    with pytest.raises(ValueError, match="has no column 'nope': it has image, Alt, synthetic"):
        open_source(f"{table}&captions=alt,nope")
    folder = write_tfds(tmp_path / "web", {"image": IMAGE, "text": TEXT}, [])
    with pytest.raises(
        ValueError, match="has features image, text; pairs need image and text and x"
    ):
        open_source(f"{folder}?captions=text,x")
