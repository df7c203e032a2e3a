"""Caption tables in Parquet; the other formats are tested in test_sources.py."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from align_jax.curate.pack.pack import pack
from align_jax.data.sources import table_files
from align_jax.data.sources.open_source import open_source


def jpeg(shade):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 255 - shade)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.jpg").write_bytes(jpeg(ord(name)))
    return folder


@pytest.mark.parametrize("batch_rows", [1, 2, 1000])
def test_rows_are_read_in_batches_and_merged(tmp_path, images, monkeypatch, batch_rows):
    monkeypatch.setattr(table_files, "BATCH_ROWS", batch_rows)
    table = {
        "File_Name": ["b.jpg", "a.jpg", "b.jpg", None, "c.jpg"],
        "TEXT": ["zwölf", "one", "二", "no image", None],
        "width": [8] * 5,
    }
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    source = open_source(f"{tmp_path}/t.parquet?images={images}")
    assert [(source[i].key, source[i].captions) for i in range(len(source))] == [
        ("b.jpg", ("zwölf", "二")),
        ("a.jpg", ("one",)),
        ("c.jpg", ()),
    ]
    assert source.problems == {"row_malformed": 1}
    assert source.problems.first["row_malformed"].endswith("t.parquet[3]")


def test_lists_of_captions_and_chosen_columns_are_read(tmp_path, images):
    table = {"image": ["a.jpg"], "captions": [["one", "two"]], "synthetic": ["three"]}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    spec = f"{tmp_path}/t.parquet?images={images}"
    assert open_source(spec)[0].captions == ("one", "two")
    assert open_source(f"{spec}&captions=synthetic")[0].captions == ("three",)


def test_images_inside_of_the_table_are_not_read(tmp_path, images):
    table = {
        "image": pa.array([{"bytes": b"x" * 100, "path": None}]),
        "file_name": ["a.jpg"],
        "raw": pa.array([b"x" * 100]),
        "text": ["one"],
    }
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    assert open_source(f"{tmp_path}/t.parquet?images={images}")[0].key == "a.jpg"


def test_kept_table_of_curate_is_a_caption_table_too(tmp_path, images):
    pq.write_table(pa.table({"key": ["c.jpg"], "text": ["kept"]}), tmp_path / "kept.parquet")
    report = pack(open_source(f"{tmp_path}/kept.parquet?images={images}"), tmp_path / "out")
    assert report["records_written"] == 1
    assert open_source(str(tmp_path / "out"))[0].captions == ("kept",)


def test_file_that_is_no_parquet_is_one_clear_line(tmp_path, images):
    (tmp_path / "t.parquet").write_text("image,caption\na.jpg,one\n")
    with pytest.raises(ValueError, match="t.parquet is not a readable Parquet file"):
        open_source(f"{tmp_path}/t.parquet?images={images}")
    pq.write_table(pa.table({"bild": ["a.jpg"], "text": ["one"]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="no image column: it has bild, text; recognised"):
        open_source(f"{tmp_path}/t.parquet?images={images}")
