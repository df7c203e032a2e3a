"""data/sources/parquet.py: image bytes in Parquet as pairs and labelled images, in every verb."""

import io
import json
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from align_jax import embed
from align_jax.cli import main as cli
from align_jax.curate.pack.pack import pack
from align_jax.curate.scan import scan
from align_jax.data import pipeline, tokenizer
from align_jax.data.sources import parquet
from align_jax.data.sources.open_source import open_labelled, open_source
from align_jax.storage import identity


def picture(shade):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 90, 255 - shade)).save(file, "JPEG")
    return file.getvalue()


def write_hugging_face(folder, count=10, split="train", shards=2, row_group_size=3):
    """Writes what `datasets` does: images as struct, labels with names, captions as lists."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    info = {"label": {"names": ["cat", "dog", "bird"], "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": info}}).encode()}
    for shard in range(shards):
        numbers = range(shard * count // shards, (shard + 1) * count // shards)
        rows = {
            "image": [{"bytes": picture(n), "path": f"{n}.jpg"} for n in numbers],
            "caption": [[f"number {n}", f"no. {n}"] for n in numbers],
            "label": [n % 3 for n in numbers],
            "license": [f"CC {n}" if n else None for n in numbers],
            "score": [n / 4 if n else math.nan for n in numbers],
        }
        table = pa.table(rows).replace_schema_metadata(metadata)
        name = f"{split}-{shard:05d}-of-{shards:05d}.parquet"
        pq.write_table(table, folder / "data" / name, row_group_size=row_group_size)


def read(source):
    return [source[index] for index in range(len(source))]


def test_hugging_face_folder_is_a_source_of_pairs(tmp_path):
    write_hugging_face(tmp_path)
    for spec in (str(tmp_path), f"{tmp_path}?split=train", f"{tmp_path}/data/train-*.parquet"):
        source = open_source(spec)
        records = read(source)
        assert [record.image for record in records] == [picture(n) for n in range(10)]
        assert [r.captions for r in records] == [(f"number {n}", f"no. {n}") for n in range(10)]
        assert records[6].key == "train-00001-of-00002:1" == source.key(6)
        assert records[6].metadata == {"license": "CC 6", "score": 1.5, "label": 0}
        assert records[0].metadata == {"label": 0}
        assert source.captions(-1) == ("number 9", "no. 9") and source.problems == {}
        assert source.where(9).endswith(
            "row 4 of " + str(tmp_path / "data" / "train-00001-of-00002.parquet")
        )
    assert len(open_source(f"{tmp_path}?max=4")) == 4
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(copy.__getitem__, range(10))) == records
    stamp = identity.stamp(source)
    (tmp_path / "data").rename(tmp_path / "moved")
    assert identity.stamp(open_source(f"{tmp_path}/moved/train-*.parquet")) == stamp


def test_another_column_of_captions_stands_in_for_a_blank_one(tmp_path):
    rows = {
        "image": [{"bytes": picture(n), "path": ""} for n in range(3)],
        "caption": ["a dog", " ", None],
        "text": ["not this", "a cat", ""],
        "title": [None, None, "a cow"],
    }
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    assert [record.captions for record in read(source)] == [("a dog",), ("a cat",), ("a cow",)]
    assert source.captions(2) == ("a cow",) and source[2].metadata["title"] == "a cow"


def test_memory_is_bounded_by_the_row_groups_used_last(tmp_path, monkeypatch):
    write_hugging_face(tmp_path, row_group_size=1)
    monkeypatch.setattr(parquet, "_HELD_BYTES", 4 * len(picture(1)))
    parquet._held.clear()
    source = open_source(str(tmp_path))
    order = np.random.default_rng(0).integers(0, 10, 100).tolist()
    assert [source[index].image for index in order] == [picture(index) for index in order]
    assert sum(table.nbytes for table in parquet._held.values()) <= 4 * len(picture(1))


def test_several_splits_need_a_choice(tmp_path):
    write_hugging_face(tmp_path)
    write_hugging_face(tmp_path, 4, "test", shards=1)
    for spec in (str(tmp_path), f"{tmp_path}?split=dev"):
        with pytest.raises(ValueError, match=r"has the splits test, train; add \?split=NAME"):
            open_source(spec)
    assert len(open_source(f"{tmp_path}?split=test")) == 4


def test_labels_have_the_names_of_the_schema(tmp_path):
    write_hugging_face(tmp_path)
    source = open_labelled(f"{tmp_path}?split=train")
    assert source.classes == ("cat", "dog", "bird")
    assert [item.label for item in read(source)] == [n % 3 for n in range(10)]
    assert source[7].image == picture(7)
    assert [item.label for item in read(open_labelled(f"{tmp_path}?max=2"))] == [0, 2]


@pytest.mark.parametrize(
    ("labels", "classes", "found"),
    [
        (["b", None, "a"], ("a", "b"), [1, 0]),
        ([2, -1, 0], ("0", "1", "2"), [2, 0]),
    ],
)
def test_labels_without_names_and_rows_without_label(tmp_path, labels, classes, found):
    table = {"jpg": [picture(n) for n in range(3)], "cls": labels}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    source = open_labelled(str(tmp_path / "x.parquet"))
    assert source.classes == classes and [item.label for item in read(source)] == found
    assert [item.image for item in read(source)] == [picture(0), picture(2)]
    assert source.problems == {"class_unknown": 1}


def write_img2dataset(folder):
    folder.mkdir()
    status = ["success", "failed_to_download", "success", "failed_to_resize", "success"]
    rows = {
        "key": [f"00000000{n}" for n in range(5)],
        "caption": [f"number {n}" for n in range(5)],
        "url": [f"https://x.org/{n}" for n in range(5)],
        "jpg": [picture(n) if s == "success" else None for n, s in enumerate(status)],
        "status": status,
        "error_message": [None] * 5,
    }
    pq.write_table(pa.table(rows), folder / "00000.parquet", row_group_size=2)
    (folder / "00000_stats.json").write_text('{"successes": 3}')


def test_parquet_output_of_img2dataset_leaves_out_and_counts_what_failed(tmp_path):
    write_img2dataset(tmp_path / "in")
    source = open_source(str(tmp_path / "in"))
    records = read(source)
    assert [record.key for record in records] == ["000000000", "000000002", "000000004"]
    assert records[1].image == picture(2) and records[1].captions == ("number 2",)
    assert records[1].metadata == {"url": "https://x.org/2"}
    assert source.problems == {"status_failed_to_download": 1, "status_failed_to_resize": 1}


def test_damage_is_counted_and_a_missing_file_is_fatal(tmp_path):
    write_hugging_face(tmp_path, 12, shards=3)
    first, second, third = sorted((tmp_path / "data").iterdir())
    third.write_bytes(third.read_bytes()[:-10])
    source = open_source(str(tmp_path))
    assert len(source) == 8 and source.problems == {"table_unreadable": 1}
    second.unlink()
    assert source[0].image == picture(0)
    with pytest.raises(parquet.ShardUnreadable, match=second.name):
        source[5]


def test_pack_scan_train_embed_and_vocab_take_it(tmp_path, capsys):
    write_hugging_face(tmp_path / "in")
    spec = str(tmp_path / "in")
    report = pack(open_source(spec), tmp_path / "out", num_workers=2)
    assert report["records_written"] == 10 and report["skipped"] == {}
    packed = read(open_source(str(tmp_path / "out")))
    assert [r.image for r in packed] == [picture(n) for n in range(10)]
    assert scan(spec, tmp_path / "scan.parquet")["rows"] == 20
    items = embed.open_images(spec)
    assert items.count == 10 and items.read(3) == [("train-00000-of-00002:3", picture(3))]
    assert embed.open_texts(spec).read(3)[1] == ("train-00000-of-00002:3#1", "no. 3")
    assert cli.main(["vocab", spec, "--out", str(tmp_path / "words"), "--size", "100"]) == 0
    words = tokenizer.load_tokenizer(tmp_path / "words")
    data = pipeline_data()
    batches = pipeline.train_batches(open_source(spec), words, data, batch_size=5, seed=0)
    seen = np.concatenate([next(batches).arrays["index"] for _ in range(2)])
    batches.close()
    assert sorted(seen.tolist()) == list(range(10))


def pipeline_data():
    from align_jax import config

    data = config.default_config().data
    data.image_size, data.resize_size, data.resize, data.max_tokens = 16, 16, "pil", 8
    return data
