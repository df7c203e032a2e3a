"""curate/pack/pack.py: what is written, what is skipped, and who can read it."""

import io
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers import real_data
from PIL import Image

from align_jax.curate.pack import pack as pack_module
from align_jax.curate.pack.pack import pack
from align_jax.data import images
from align_jax.data.sources.open_source import InMemory, open_source
from align_jax.data.sources.record import Record
from align_jax.run import progress
from align_jax.storage.problems import Problems


def jpeg(shade):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 255 - shade)).save(file, "JPEG")
    return file.getvalue()


def make_records(count, first=0):
    return [
        Record(f"key{index}", jpeg(index % 256), (f"caption {index}", "ü"))
        for index in range(first, first + count)
    ]


def all_records(source):
    return [source[index] for index in range(len(source))]


def test_packed_records_are_read_back_byte_for_byte_in_order(tmp_path):
    records = make_records(40)
    report = pack(InMemory(records), tmp_path / "out", shard_bytes=4000)
    assert all_records(open_source(str(tmp_path / "out"))) == records
    assert report["records_written"] == 40 and report["skipped"] == {}
    assert report["shards"] == len(list((tmp_path / "out").glob("*.array_record*"))) > 3


def test_packed_dataset_opens_with_plain_tfds(tmp_path):
    records = make_records(5)
    pack(InMemory(records), tmp_path / "out", split="dev")
    builder = tfds.builder_from_directory(tmp_path / "out")
    assert builder.info.splits["dev"].num_examples == 5
    source = builder.as_data_source("dev", decoders={"image": tfds.decode.SkipDecoding()})
    for example, record in zip(source, records, strict=True):
        assert example["image"] == record.image
        assert example["key"].decode() == record.key
        assert tuple(caption.decode() for caption in example["captions"]) == record.captions
    assert builder.as_data_source("dev")[0]["image"].shape == (8, 8, 3)


def test_unusable_records_are_skipped_counted_and_listed(tmp_path):
    good = make_records(3)
    bad = [
        Record("cut", jpeg(1)[:-200], ("x",)),
        Record("html", b"<html>", ("x",)),
        Record("none", b"", ("x",)),
        Record("blank", jpeg(1), ("", " \n")),
        Record("key1", jpeg(9), ("the same key",)),
        *(Record(f"empty{index}", b"", ("x",)) for index in range(30)),
    ]
    report = pack(InMemory([good[0], *bad[:4], *good[1:], *bad[4:]]), tmp_path / "out")
    assert all_records(open_source(str(tmp_path / "out"))) == good
    assert report["records_read"] == 38 and report["records_written"] == 3
    assert report["skipped"] == {
        "image_truncated": 1,
        "image_not_an_image": 1,
        "image_empty": 31,
        "caption_empty": 1,
        "key_duplicate": 1,
    }
    assert set(report["skipped"]) <= set(pack_module.SKIP_REASONS)
    assert report["skipped_keys"]["key_duplicate"] == ["key1"]
    assert report["skipped_keys"]["image_empty"] == ["none", *(f"empty{i}" for i in range(19))]
    written = json.loads((tmp_path / "out" / "pack_report.json").read_text())
    assert written == {"train": report}


def test_blank_captions_beside_others_are_left_out(tmp_path):
    pack(InMemory([Record("k", jpeg(1), ("", "a", " "))]), tmp_path / "out")
    assert open_source(str(tmp_path / "out"))[0].captions == ("a",)


def test_problems_of_the_source_are_reported(tmp_path):
    source = InMemory(make_records(2))
    source.problems = Problems()
    source.problems.add("image_missing", "x.jpg", count=7)
    assert pack(source, tmp_path / "out")["source_problems"] == {"image_missing": 7}


def test_pixel_arrays_are_stored_without_loss(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    pack(InMemory([Record("k", pixels, ("a",))]), tmp_path / "out")
    stored = open_source(str(tmp_path / "out"))[0].image
    np.testing.assert_array_equal(images.decode_image(stored), pixels)


def test_second_split_joins_the_same_dataset(tmp_path):
    train, dev = make_records(6), make_records(3, first=100)
    pack(InMemory(train), tmp_path / "out", split="train")
    pack(InMemory(dev), tmp_path / "out", split="dev")
    assert all_records(open_source(f"{tmp_path / 'out'}?split=train")) == train
    assert all_records(open_source(f"{tmp_path / 'out'}?split=dev")) == dev
    assert set(json.loads((tmp_path / "out" / "pack_report.json").read_text())) == {"train", "dev"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_existing_split_is_an_error_and_stays(tmp_path):
    records = make_records(2)
    pack(InMemory(records), tmp_path / "out")
    with pytest.raises(ValueError, match="already has a split 'train'"):
        pack(InMemory(make_records(3)), tmp_path / "out")
    assert all_records(open_source(str(tmp_path / "out"))) == records


def test_folder_with_other_files_is_an_error(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no dataset"):
        pack(InMemory(make_records(1)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("split", ["", "a-b", "train[:5]", "../x"])
def test_odd_split_name_is_an_error(tmp_path, split):
    with pytest.raises(ValueError, match="letters, digits and underscores"):
        pack(InMemory(make_records(1)), tmp_path / "out", split=split)


def test_nothing_usable_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="no usable record: skipped {'image_empty': 1}"):
        pack(InMemory([Record("a", b"", ("x",))]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_pack_leaves_the_old_dataset_and_no_rest(tmp_path):
    class Interrupted(InMemory):
        def __getitem__(self, index):
            if index == 30:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    records = make_records(2)
    pack(InMemory(records), tmp_path / "out")
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(KeyboardInterrupt):
        pack(Interrupted(make_records(60)), tmp_path / "out", split="dev")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert all_records(open_source(str(tmp_path / "out"))) == records


def test_progress_is_one_line_a_period_when_stderr_is_no_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_EVERY_S", 0.0)
    pack(InMemory(make_records(3)), tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[1].startswith("pack train: 2 of 3 pairs, ")


def test_packing_and_reading_import_no_tensorflow(tmp_path):
    code = (
        "import sys; from align_jax.curate.pack.pack import pack; "
        "from align_jax.data.sources.open_source import InMemory, open_source; "
        "from align_jax.data.sources.record import Record; import numpy as np; "
        "pack(InMemory([Record('k', np.zeros((8, 8, 3), np.uint8), ('a',))]), sys.argv[1]); "
        "assert open_source(sys.argv[1])[0].key == 'k'; "
        "assert not {'tensorflow', 'torch', 'jax'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_real_dev_split_survives_packing(tmp_path):
    folder = real_data("flickr8k")
    source = open_source(f"{folder}/dev.jsonl?images={folder}/dev.zip&max=50")
    report = pack(source, tmp_path / "out", split="dev")
    assert report["records_written"] == 50
    assert all_records(open_source(f"{tmp_path / 'out'}?split=dev")) == all_records(source)


def test_real_tars_survive_packing(tmp_path):
    source = open_source(f"{real_data('wds_sample')}/*.tar")
    report = pack(source, tmp_path / "out", shard_bytes=2**20)
    assert (report["records_written"], report["shards"]) == (512, 4)
    assert all_records(open_source(str(tmp_path / "out"))) == all_records(source)


def test_real_crawl_failures_are_counted_by_reason(tmp_path):
    path = real_data("metadata", "crawl_failures.zip")
    table = tmp_path / "t.jsonl"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    table.write_text("".join(json.dumps({"image": n, "caption": "x"}) + "\n" for n in names))
    source = open_source(f"{table}?images={path}")
    report = pack(source, tmp_path / "out")
    assert report["records_written"] + sum(report["skipped"].values()) == len(source)
    assert report["skipped"]["image_not_an_image"] > 20
