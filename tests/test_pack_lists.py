"""curate/pack/pack.py: lists of keys to keep and to drop, kept texts, resizing."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from helpers import error_of
from PIL import Image

from align_jax.cli import main as cli
from align_jax.curate.pack import key_lists
from align_jax.curate.pack.pack import pack
from align_jax.data import images
from align_jax.data.sources.open_source import InMemory, open_source
from align_jax.data.sources.record import Record


def picture(width=8, height=8, shade=100, kind="JPEG", **options):
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, 0 * rows + shade], -1)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, kind, **options)
    return file.getvalue()


RECORDS = [Record(f"key{i}", picture(shade=i), (f"first {i}", f"second {i}")) for i in range(40)]


def write_keys(path, keys, **columns):
    pq.write_table(pa.table({"key": list(keys), **columns}), path)
    return str(path)


def read(folder):
    source = open_source(str(folder))
    return [source[index] for index in range(len(source))]


def test_kept_keys_are_written_and_others_counted(tmp_path):
    kept = write_keys(tmp_path / "kept.parquet", ["key30", "key2", "elsewhere", "key2"])
    report = pack(InMemory(RECORDS), tmp_path / "out", keep=kept)
    assert read(tmp_path / "out") == [RECORDS[2], RECORDS[30]]
    assert report["skipped"] == {"not_kept": 38}


def test_dropped_keys_are_left_out_also_of_the_kept(tmp_path):
    kept = write_keys(tmp_path / "kept.parquet", ["key1", "key2", "key3"])
    drop = write_keys(tmp_path / "drop.parquet", ["key2", "key7"])
    report = pack(InMemory(RECORDS), tmp_path / "out", keep=kept, drop=drop)
    assert [record.key for record in read(tmp_path / "out")] == ["key1", "key3"]
    assert report["skipped"] == {"not_kept": 36, "dropped_by_list": 2}


def test_records_of_any_drop_list_are_left_out(tmp_path):
    first = write_keys(tmp_path / "first.parquet", ["key2", "key7"])
    (tmp_path / "parts").mkdir()
    write_keys(tmp_path / "parts" / "a.parquet", ["key0"])
    write_keys(tmp_path / "parts" / "b.parquet", ["key1", "key7"])
    lists = [first, str(tmp_path / "parts")]
    report = pack(InMemory(RECORDS), tmp_path / "out", drop=lists)
    assert read(tmp_path / "out") == [RECORDS[i] for i in range(40) if i not in (0, 1, 2, 7)]
    assert report["skipped"] == {"dropped_by_list": 4}
    other = write_keys(tmp_path / "other.parquet", ["elsewhere"])
    with pytest.raises(ValueError, match=r"--drop .*other.parquet has no key in common"):
        pack(InMemory(RECORDS), tmp_path / "none", drop=[first, other])


def test_folder_of_what_curate_wrote_is_no_list(tmp_path):
    kept = write_keys(tmp_path / "kept.parquet", ["key1"])
    write_keys(tmp_path / "dropped.parquet", ["key0"], reason=["no_text"])
    for option in ("keep", "drop"):
        with pytest.raises(ValueError) as error:
            pack(InMemory(RECORDS), tmp_path / "out", **{option: str(tmp_path)})
        assert str(error.value) == (
            f"--{option} {tmp_path} holds tables with different columns: dropped.parquet has key, "
            "reason; kept.parquet has key. Name one of them, or a folder of parts of one table."
        )
    pack(InMemory(RECORDS), tmp_path / "out", keep=kept)
    assert read(tmp_path / "out") == [RECORDS[1]]


def test_kept_texts_replace_the_captions_in_their_order(tmp_path):
    kept = write_keys(
        tmp_path / "kept.parquet",
        ["key5", "key1", "key5", "key9", None],
        text=["zwölf", "one", "二", None, "nobody's"],
    )
    report = pack(InMemory(RECORDS), tmp_path / "out", keep=kept)
    assert [(record.key, record.captions) for record in read(tmp_path / "out")] == [
        ("key1", ("one",)),
        ("key5", ("zwölf", "二")),
    ]
    assert report["skipped"] == {"not_kept": 37, "caption_empty": 1}


def test_texts_of_a_drop_list_are_of_no_account(tmp_path):
    drop = write_keys(tmp_path / "drop.parquet", ["key0"], text=["x"])
    pack(InMemory(RECORDS), tmp_path / "out", drop=drop)
    assert read(tmp_path / "out") == RECORDS[1:]


def test_listed_records_are_not_read(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for record in RECORDS[:6]:
        (folder / f"{record.key}.jpg").write_bytes(record.image)
        (folder / f"{record.key}.txt").write_text(record.captions[0])
    kept = write_keys(tmp_path / "kept.parquet", ["key1", "key2"])
    source = open_source(str(folder))
    for name in ("key0", "key3", "key4", "key5"):
        (folder / f"{name}.jpg").unlink()
    report = pack(source, tmp_path / "out", keep=kept)
    assert report["skipped"] == {"not_kept": 4}


def test_large_list_equals_a_dict(tmp_path, monkeypatch):
    monkeypatch.setattr(key_lists, "_BATCH_ROWS", 1000)
    rng = np.random.default_rng(0)
    keys = [f"k{number}" for number in rng.integers(0, 3000, 10_000)]
    texts = [f"text {row} ä" for row in range(10_000)]
    path = write_keys(tmp_path / "kept.parquet", keys, text=texts)
    found = key_lists.write_key_list(
        path, [path], str(tmp_path / "list"), option="--keep", texts=True
    )
    expected = {}
    for key, text in zip(keys, texts, strict=True):
        expected.setdefault(key, []).append(text)
    for number in range(3100):
        key = f"k{number}"
        assert (key in found) == (key in expected)
        assert list(found.texts(key)) == expected.get(key, [])


def test_numbers_as_keys_are_the_strings_of_records(tmp_path):
    records = [Record(str(index), picture(), ("a",)) for index in range(5)]
    kept = write_keys(tmp_path / "kept.parquet", [3, 4, 50])
    pack(InMemory(records), tmp_path / "out", keep=kept)
    assert read(tmp_path / "out") == records[3:]


@pytest.mark.parametrize(
    ("option", "keys", "message"),
    [
        ("keep", ["no", "nay"], "--keep .* has no key in common with the source: it has for exam"),
        ("drop", ["no", "nay"], "--drop .* has no key in common with the source: it has for exam"),
        ("keep", [], "--keep .* is empty"),
    ],
)
def test_list_without_a_key_of_the_source_is_an_error(tmp_path, option, keys, message):
    path = write_keys(tmp_path / "list.parquet", pa.array(keys, pa.string()))
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(picture())
    (folder / "a.txt").write_text("a")
    for source in (InMemory(RECORDS), open_source(str(folder))):
        with pytest.raises(ValueError, match=message):
            pack(source, tmp_path / "out", **{option: path})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "list.parquet"]


def test_empty_drop_list_drops_nothing(tmp_path):
    path = write_keys(tmp_path / "drop.parquet", pa.array([], pa.string()))
    pack(InMemory(RECORDS), tmp_path / "out", drop=path)
    assert read(tmp_path / "out") == RECORDS


def test_wrong_arguments_are_one_line(inside, tmp_path, capfd):
    pq.write_table(pa.table({"id": ["a"], "text": ["b"]}), tmp_path / "odd.parquet")
    (tmp_path / "no.parquet").write_text("key\na\n")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (("--keep", "nowhere.parquet"), "--keep nowhere.parquet does not exist"),
        (("--keep", tmp_path / "odd.parquet"), "has no column 'key': it has id, text; give a"),
        (("--drop", tmp_path / "no.parquet"), "no.parquet is not a Parquet file"),
        (("--drop", tmp_path / "empty"), "empty holds no .parquet file of keys."),
        (("--workers", "0"), "--workers 0 must be at least 1."),
        (("--resize", "-4"), "--resize -4 must be at least 1."),
        (("--resize", "346x0"), "--resize 346x0 must be at least 1."),
        (("--resize", "3x4x5"), "--resize 3x4x5 must be PX or PXxPX, e.g. 346 or 346x346."),
    ):
        given = ("pack", "captions.jsonl?images=images", "--out", tmp_path / "out", *arguments)
        assert message in error_of(capfd, *given)


def test_options_of_which_one_counts_are_refused_a_second_time(capfd):
    for given, message in (
        (("pack", "x", "--keep", "a", "--keep", "b"), "--keep is given twice, a and b; see"),
        (
            ("curate", "x", "--preset", "coyo", "--preset", "align"),
            "--preset is given twice, coyo and align; --preset coyo+align keeps what both keep",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main([*given, "--out", "out"])
        assert stop.value.code == 2 and message in capfd.readouterr().err


def test_resize_shrinks_the_short_side_and_leaves_smaller_images_alone(tmp_path):
    sideways = Image.Exif()
    sideways[0x0112] = 6  # shown turned by a quarter
    records = [
        Record("wide", picture(300, 100), ("a",)),
        Record("tall", picture(99, 220, kind="PNG"), ("a",)),
        Record("turned", picture(400, 200, exif=sideways), ("a",)),
        Record("small", picture(400, 50), ("a",)),
        Record("exact", picture(64, 64, kind="PNG"), ("a",)),
        Record("pixels", np.full((128, 128, 3), 7, np.uint8), ("a",)),
    ]
    pack(InMemory(records), tmp_path / "out", resize_px=64)
    stored = {record.key: record.image for record in read(tmp_path / "out")}
    sizes = {key: images.decode_image(data).shape[1::-1] for key, data in stored.items()}
    assert sizes == {
        "wide": (192, 64),
        "tall": (64, 142),
        "turned": (64, 128),
        "small": (400, 50),
        "exact": (64, 64),
        "pixels": (64, 64),
    }
    assert stored["small"] == records[3].image and stored["exact"] == records[4].image
    for key in ("wide", "tall", "turned", "pixels"):
        assert Image.open(io.BytesIO(stored[key])).format == "JPEG"
    expected = Image.fromarray(images.decode_image(records[0].image)).resize((192, 64))
    difference = np.abs(images.decode_image(stored["wide"]).astype(int) - np.asarray(expected))
    assert difference.mean() < 2


def test_resize_to_width_and_height_shrinks_each_longer_side(tmp_path):
    sizes = {"both": (300, 100), "wide": (300, 50), "tall": (60, 90), "small": (64, 48)}
    records = [Record(key, picture(*size), ("a",)) for key, size in sizes.items()]
    pack(InMemory(records), tmp_path / "out", resize_px=(64, 48))
    stored = {record.key: record.image for record in read(tmp_path / "out")}
    found = {key: images.decode_image(data).shape[1::-1] for key, data in stored.items()}
    assert found == {"both": (64, 48), "wide": (64, 48), "tall": (60, 48), "small": (64, 48)}
    assert stored["small"] == records[3].image
    expected = io.BytesIO()
    squashed = Image.fromarray(images.decode_image(records[0].image)).resize(
        (64, 48), Image.Resampling.BICUBIC
    )
    squashed.save(expected, "JPEG", quality=95)
    assert stored["both"] == expected.getvalue()


def test_shrunk_images_are_bicubic_jpegs_of_quality_95(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    pack(InMemory([Record("noise", pixels, ("a",))]), tmp_path / "out", resize_px=30)
    expected = io.BytesIO()
    small = Image.fromarray(pixels).resize((45, 30), Image.Resampling.BICUBIC)
    small.save(expected, "JPEG", quality=95)
    assert read(tmp_path / "out")[0].image == expected.getvalue()


def test_packed_records_are_stored_one_by_one(tmp_path):
    pack(InMemory(RECORDS[:3]), tmp_path / "out")
    (shard,) = tmp_path.rglob("*.array_record*")
    reader = ArrayRecordReader(str(shard))
    assert "group_size:1," in f"{reader.writer_options_string()},"
    reader.close()
