"""data/sources/: archives, tables, files, TFDS folders."""

import io
import json
import pickle
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from align_jax.data.sources.open_source import InMemory, open_labelled, open_source
from align_jax.data.sources.record import Record


def jpeg(shade):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 255 - shade)).save(file, "JPEG")
    return file.getvalue()


def write_files(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_zip(path, files, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_samples(count, first=0):
    files = {}
    for index in range(first, first + count):
        files[f"{index:04d}.jpg"] = jpeg(index)
        files[f"{index:04d}.txt"] = f"caption {index}\n".encode()
    return files


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def all_records(source):
    return [source[index] for index in range(len(source))]


STORES = {
    "folder": write_files,
    "stored.zip": write_zip,
    "deflated.zip": lambda path, files: write_zip(path, files, zipfile.ZIP_DEFLATED),
    "x.tar": write_tar,
}


@pytest.mark.parametrize("store", STORES)
def test_samples_are_the_same_from_folder_zip_and_tar(tmp_path, store):
    STORES[store](tmp_path / store, write_samples(3))
    source = open_source(str(tmp_path / store))
    assert all_records(source) == [
        Record(f"{index:04d}", jpeg(index), (f"caption {index}",)) for index in range(3)
    ]
    assert source.problems == {}


@pytest.mark.parametrize("store", STORES)
def test_table_finds_its_images_in_folder_zip_and_tar(tmp_path, store):
    STORES[store](tmp_path / store, {"a.jpg": jpeg(1), "b.jpg": jpeg(2)})
    rows = [{"image": "b.jpg", "captions": ["zwölf", "二"]}, {"image": "a.jpg", "captions": ["a"]}]
    table = write_lines(tmp_path / "t.jsonl", rows)
    source = open_source(f"{table}?images={tmp_path / store}")
    assert all_records(source) == [
        Record("b.jpg", jpeg(2), ("zwölf", "二")),
        Record("a.jpg", jpeg(1), ("a",)),
    ]


TABLES = {
    "t.csv": 'Image,caption\na.jpg,"one, two"\na.jpg,three\nb.jpg,"say ""hi"""\n',
    "captions.txt": 'image,caption\na.jpg,"one, two"\na.jpg,three\nb.jpg,"say ""hi"""\n',
    "t.tsv": 'filepath\ttext\na.jpg\tone, two\na.jpg\tthree\nb.jpg\tsay "hi"\n',
    "pipes.csv": "image_name| number| comment\na.jpg| 0| one, two\na.jpg| 1| three\n"
    'b.jpg| 0| "say ""hi"""\n',
    "t.json": json.dumps(
        [
            {"file_name": "a.jpg", "text": ["one, two", "three"]},
            {"file_name": "b.jpg", "text": 'say "hi"'},
        ]
    ),
    "coco.json": json.dumps(
        {
            "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 9, "file_name": "b.jpg"}],
            "annotations": [
                {"id": 1, "image_id": 7, "caption": "one, two"},
                {"id": 2, "image_id": 9, "caption": 'say "hi"'},
                {"id": 3, "image_id": 7, "caption": "three"},
            ],
        }
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_table_formats_give_the_same_pairs_and_merge_rows_of_one_image(tmp_path, name):
    (tmp_path / name).write_text(TABLES[name])
    write_zip(tmp_path / "i.zip", {"a.jpg": jpeg(1), "b.jpg": jpeg(2)})
    source = open_source(f"{tmp_path / name}?images={tmp_path / 'i.zip'}")
    assert [(record.key, record.captions) for record in all_records(source)] == [
        ("a.jpg", ("one, two", "three")),
        ("b.jpg", ('say "hi"',)),
    ]
    assert source.problems == {}


def test_missing_images_are_counted_and_left_out(tmp_path):
    write_zip(tmp_path / "i.zip", {"a.jpg": jpeg(1)})
    rows = [{"image": f"{name}.jpg", "caption": name} for name in "xay"]
    table = write_lines(tmp_path / "t.jsonl", rows)
    source = open_source(f"{table}?images={tmp_path / 'i.zip'}")
    assert [record.key for record in all_records(source)] == ["a.jpg"]
    assert source.problems == {"image_missing": 2}
    assert source.problems.first == {"image_missing": "x.jpg"}


def test_malformed_rows_are_counted_and_left_out(tmp_path):
    write_zip(tmp_path / "i.zip", {"a.jpg": jpeg(1)})
    table = tmp_path / "t.jsonl"
    table.write_text('{"image": "a.jpg", "caption": "a"}\n{"image": \n[1]\n{"caption": "b"}\n')
    source = open_source(f"{table}?images={tmp_path / 'i.zip'}")
    assert len(source) == 1 and source.problems == {"row_malformed": 3}
    assert source.problems.first["row_malformed"].endswith("t.jsonl:2")


def test_csv_row_with_an_unquoted_comma_is_whole_or_malformed_not_cut(tmp_path):
    write_zip(tmp_path / "i.zip", {"a.jpg": jpeg(1), "b.jpg": jpeg(2)})
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,a dog, a cat\nb.jpg,b\n")
    source = open_source(f"{tmp_path / 't.csv'}?images={tmp_path / 'i.zip'}")
    assert [record.captions for record in all_records(source)] == [("a dog, a cat",), ("b",)]
    assert source.problems == {}
    (tmp_path / "t.csv").write_text("image,n,caption\na.jpg,0,a dog, a cat\nb.jpg,1,b\n")
    source = open_source(f"{tmp_path / 't.csv'}?images={tmp_path / 'i.zip'}")
    assert [record.captions for record in all_records(source)] == [("b",)]
    assert source.problems == {"row_malformed": 1}


def test_shard_column_says_which_archive_holds_the_image(tmp_path):
    for index in (1, 2):
        write_zip(tmp_path / f"s{index}.zip", {"a.jpg": jpeg(index)})
    rows = [
        {"image": "a.jpg", "shard": "s2.zip", "captions": ["two"]},
        {"image": "a.jpg", "shard": "s1.zip", "captions": ["one"]},
        {"image": "a.jpg", "shard": "s3.zip", "captions": ["three"]},
    ]
    table = write_lines(tmp_path / "t.jsonl", rows)
    source = open_source(f"{table}?images={tmp_path}/*.zip")
    assert all_records(source) == [
        Record("a.jpg", jpeg(2), ("two",)),
        Record("s1/a.jpg", jpeg(1), ("one",)),
    ]
    assert source.problems == {"shard_missing": 1}


def test_image_in_two_archives_without_shard_is_ambiguous(tmp_path):
    for index in (1, 2):
        write_zip(tmp_path / f"s{index}.zip", {"a.jpg": jpeg(index), f"b{index}.jpg": jpeg(3)})
    rows = [{"image": "a.jpg", "caption": "a"}, {"image": "b2.jpg", "caption": "b"}]
    table = write_lines(tmp_path / "t.jsonl", rows)
    source = open_source(f"{table}?images={tmp_path / 's1.zip'},{tmp_path / 's2.zip'}")
    assert [record.key for record in all_records(source)] == ["b2.jpg"]
    assert source.problems == {"image_ambiguous": 1}


def test_image_is_found_by_base_name_in_a_nested_archive(tmp_path):
    write_zip(tmp_path / "i.zip", {"train2017/a.jpg": jpeg(1)})
    table = write_lines(tmp_path / "t.jsonl", [{"image": "a.jpg", "caption": "a"}])
    assert open_source(f"{table}?images={tmp_path / 'i.zip'}")[0].image == jpeg(1)


def test_member_names_never_reach_the_file_system(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg(9))
    write_files(tmp_path / "images", {"a.jpg": jpeg(1)})
    rows = [{"image": name, "caption": "x"} for name in ("../secret.jpg", str(secret), "a.jpg")]
    table = write_lines(tmp_path / "t.jsonl", rows)
    source = open_source(f"{table}?images={tmp_path / 'images'}")
    assert [record.key for record in all_records(source)] == ["a.jpg"]
    write_tar(tmp_path / "x.tar", {"../../b.jpg": jpeg(2), "../../b.txt": b"b"})
    assert open_source(str(tmp_path / "x.tar"))[0].image == jpeg(2)


def test_truncated_tar_is_used_up_to_the_break_and_reported(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", write_samples(5))
    with tarfile.open(whole) as archive:
        cuts = {
            "inside data": archive.getmember("0003.jpg").offset_data + 10,
            "inside header": archive.getmember("0003.jpg").offset + 100,
            "between members": archive.getmember("0003.jpg").offset,
        }
    for name, size in cuts.items():
        cut = tmp_path / "cut.tar"
        cut.write_bytes(whole.read_bytes()[:size])
        source = open_source(str(cut))
        assert all_records(source) == all_records(open_source(f"{whole}?max=3")), name
        assert source.problems == {"tar_truncated": 1}, name


@pytest.mark.parametrize("garbage", [b"\0", b"\xff", b"7", b" "])
@pytest.mark.parametrize("last", ["header", "inside data", "members"])
def test_hole_in_a_tar_is_named_and_what_lies_behind_it_is_read(tmp_path, garbage, last):
    path = write_tar(tmp_path / "x.tar", write_samples(7))
    with tarfile.open(path) as archive:
        start = archive.getmember("0002.jpg").offset
        stop = {
            "header": start + 512,
            "inside data": archive.getmember("0003.jpg").offset_data + 10,
            "members": archive.getmember("0005.jpg").offset,  # no multiple of a record
        }[last]
        goes_on = archive.getmember("0002.txt" if last == "header" else "0003.txt").offset
    goes_on = stop if last == "members" else goes_on
    data = bytearray(path.read_bytes())
    data[start:stop] = garbage * (stop - start)
    path.write_bytes(data)
    source = open_source(str(path))
    num_lost = {"header": 1, "inside data": 2, "members": 3}[last]
    whole = [f"{number:04d}" for number in (0, 1, *range(2 + num_lost, 7))]
    assert [record.key for record in all_records(source)] == whole
    texts_left = {} if last == "members" else {"image_missing": 1}
    assert source.problems == {"tar_damaged": 1} | texts_left
    said = f"{path}: no header at byte {start:,}; bytes {start:,} to {goes_on:,} are not read"
    assert source.problems.first["tar_damaged"] == said


def test_hole_at_the_start_of_a_tar_costs_no_more_than_it_covers(tmp_path):
    path = write_tar(tmp_path / "x.tar", write_samples(3))
    path.write_bytes(b"\xee" * 512 + path.read_bytes()[512:])
    source = open_source(str(path))
    assert [record.key for record in all_records(source)] == ["0001", "0002"]
    assert source.problems == {"tar_damaged": 1, "image_missing": 1}


def test_unreadable_archive_among_others_is_counted(tmp_path):
    write_tar(tmp_path / "a.tar", write_samples(2))
    (tmp_path / "b.tar").write_bytes(b"not a tar" * 200)
    (tmp_path / "c.zip").write_bytes(b"PK not a zip")
    source = open_source(f"{tmp_path}/*.*")
    assert len(source) == 2 and source.problems == {"archive_unreadable": 2}


def test_samples_without_caption_or_image_are_counted(tmp_path):
    files = {"a.jpg": jpeg(1), "b.txt": b"b", "c.jpg": jpeg(3), "c.txt": b"c", "stats.json": b"{}"}
    source = open_source(str(write_zip(tmp_path / "x.zip", files)))
    assert [record.key for record in all_records(source)] == ["c"]
    assert source.problems == {"caption_missing": 1, "image_missing": 2}


def test_caption_in_json_is_used_without_txt(tmp_path):
    files = {"a.jpg": jpeg(1), "a.json": json.dumps({"url": "u", "caption": "from json"}).encode()}
    assert open_source(str(write_tar(tmp_path / "x.tar", files)))[0].captions == ("from json",)


def test_keys_stay_unique_when_shards_number_from_zero(tmp_path):
    for shard in "ab":
        write_tar(tmp_path / f"{shard}.tar", write_samples(2))
    keys = [record.key for record in all_records(open_source(str(tmp_path)))]
    assert keys == ["0000", "0001", "b/0000", "b/0001"]


def test_member_cut_off_after_opening_is_an_os_error(tmp_path):
    path = write_tar(tmp_path / "x.tar", write_samples(2))
    source = open_source(str(path))
    path.write_bytes(path.read_bytes()[:1024])
    with pytest.raises(OSError, match="ends inside 0001"):
        source[1]


def write_tfds(folder, features, examples, split="train"):
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(features)
    writer = ArrayRecordWriter(
        str(folder / f"web-{split}.array_record-00000-of-00001"), "group_size:1"
    )
    for example in examples:
        writer.write(features.serialize_example(features.encode_example(example)))
    writer.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="web", split=split, filetype_suffix="array_record"
    )
    info = tfds.core.SplitInfo(
        name=split, shard_lengths=[len(examples)], num_bytes=1, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=[info], version="1.0.0", check_data=False
    )
    return folder


TEXT, IMAGE = tfds.features.Text(), tfds.features.Image(shape=(None, None, 3))
TFDS_LAYOUTS = {
    "single": ({"caption": TEXT, "id": np.int64}, {"caption": "one", "id": 5}, ("one",), "5"),
    "list": ({"text": tfds.features.Sequence(TEXT)}, {"text": ["one", "二"]}, ("one", "二"), "0"),
    "coco": (
        {
            "captions": tfds.features.Sequence({"text": TEXT, "id": np.int64}),
            "image/filename": TEXT,
            "objects": tfds.features.Sequence({"area": np.float32}),
        },
        {
            "captions": [{"text": "one", "id": 1}, {"text": "two", "id": 2}],
            "image/filename": "a.jpg",
            "objects": [],
        },
        ("one", "two"),
        "a.jpg",
    ),
}


@pytest.mark.parametrize("layout", TFDS_LAYOUTS)
def test_tfds_caption_layouts_are_recognised(tmp_path, layout):
    features, example, captions, key = TFDS_LAYOUTS[layout]
    folder = write_tfds(
        tmp_path / "web" / "1.0.0", {"image": IMAGE, **features}, [{"image": jpeg(3), **example}]
    )
    for path in (folder, folder.parent, folder.parent.parent):
        source = open_source(str(path))
        assert all_records(source) == [Record(key, jpeg(3), captions)]


def test_tfds_errors_name_what_is_there(tmp_path):
    example = {"image": jpeg(1), "label": "x"}
    folder = write_tfds(tmp_path / "a", {"image": IMAGE, "label": TEXT}, [example])
    with pytest.raises(ValueError, match="has features image, label; pairs need image and one of"):
        open_source(str(folder))
    example = {"image": jpeg(1), "text": "x"}
    folder = write_tfds(tmp_path / "b", {"image": IMAGE, "text": TEXT}, [example])
    with pytest.raises(ValueError, match="split 'test' is not in .*; it has train"):
        open_source(f"{folder}?split=test")
    with pytest.raises(ValueError, match="several TFDS datasets"):
        open_source(str(tmp_path))


def test_damaged_tfds_record_is_an_os_error(tmp_path):
    features = {"image": IMAGE, "text": TEXT}
    noise = np.random.default_rng(0).bytes(200_000)
    folder = write_tfds(tmp_path / "b", features, [{"image": noise, "text": "x"}] * 3)
    (shard,) = folder.glob("*.array_record*")
    data = bytearray(shard.read_bytes())
    data[250_000:260_000] = bytes(10_000)
    shard.write_bytes(data)
    source = open_source(str(folder))
    assert source[0].image == noise
    with pytest.raises(OSError, match="record 1 cannot be read"):
        source[1]


def open_each_kind(tmp_path):
    write_zip(tmp_path / "i.zip", write_samples(6))
    rows = [{"image": f"{index:04d}.jpg", "captions": ["a", "b"]} for index in range(6)]
    table = write_lines(tmp_path / "t.jsonl", rows)
    examples = [{"image": jpeg(index), "text": str(index)} for index in range(6)]
    folder = write_tfds(tmp_path / "tfds", {"image": IMAGE, "text": TEXT}, examples)
    specs = (tmp_path / "i.zip", f"{table}?images={tmp_path / 'i.zip'}", folder)
    sources = [open_source(str(spec)) for spec in specs]
    return [*sources, InMemory(all_records(sources[0]))]


def test_pickled_source_reads_the_same(tmp_path):
    for source in open_each_kind(tmp_path):
        copy = pickle.loads(pickle.dumps(source))
        assert all_records(copy) == all_records(source)
        assert copy.describe() == source.describe()
        assert copy.problems == source.problems


def test_threads_read_the_same(tmp_path):
    for source in open_each_kind(tmp_path):
        expected = all_records(source)
        fresh = pickle.loads(pickle.dumps(source))  # its handles open inside the threads
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(fresh.__getitem__, list(range(6)) * 20))
        assert found == expected * 20


def test_max_keeps_the_first_pairs_and_a_large_max_all(tmp_path):
    specs = [source.describe().rsplit(":", 1)[0] for source in open_each_kind(tmp_path)[:3]]
    for spec in specs:
        joint = "&" if "?" in spec else "?"
        whole = all_records(open_source(spec))
        assert all_records(open_source(f"{spec}{joint}max=2")) == whole[:2]
        assert all_records(open_source(f"{spec}{joint}max=99")) == whole


@pytest.mark.parametrize("store", STORES)
def test_labelled_folders_take_their_names_from_the_tsv(tmp_path, store):
    files = {"n02/x.jpg": jpeg(1), "n01/y.jpg": jpeg(2), "n09/z.jpg": jpeg(3), "readme.md": b"-"}
    STORES[store](tmp_path / store, files)
    (tmp_path / "classes.tsv").write_text("0\tn01\tblack cat\n1\tn02\tdog\n")
    source = open_labelled(f"{tmp_path / store}?classes={tmp_path / 'classes.tsv'}")
    assert source.classes == ("black cat", "dog")
    found = {record.key: (record.image, record.label) for record in all_records(source)}
    assert found == {"n02/x.jpg": (jpeg(1), 1), "n01/y.jpg": (jpeg(2), 0)}
    assert source.problems == {"class_unknown": 1, "file_not_an_image": 1}


def test_labelled_folders_without_tsv_are_numbered_alphabetically(tmp_path):
    write_files(tmp_path / "set", {"dog/1.jpg": jpeg(1), "cat/2.jpg": jpeg(2), "cat/3.png": b"x"})
    source = open_labelled(str(tmp_path / "set"))
    assert source.classes == ("cat", "dog")
    assert [(record.key, record.label) for record in all_records(source)] == [
        ("cat/2.jpg", 0),
        ("cat/3.png", 0),
        ("dog/1.jpg", 1),
    ]


def test_labelled_max_keeps_all_classes(tmp_path):
    files = {f"c{index // 10}/{index}.jpg": jpeg(index) for index in range(50)}
    source = open_labelled(f"{write_zip(tmp_path / 'x.zip', files)}?max=10")
    labels = [record.label for record in all_records(source)]
    assert labels == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("{tmp}/nowhere", "nowhere does not exist; accepted: 'scenes"),
        ("{tmp}/nowhere.jsonl?images=x.zip", "nowhere.jsonl does not exist; accepted"),
        ("{tmp}/t.jsonl", "does not say where its images are"),
        ("{tmp}/t.jsonl?images={tmp}/nowhere.zip", "nowhere.zip does not exist; accepted: folders"),
        ("{tmp}/t.jsonl?image={tmp}/i.zip", "unknown option 'image'; known: images, captions, max"),
        ("{tmp}/i.zip?split=train", "unknown option 'split'; known: captions, max"),
        ("{tmp}/i.zip?max=0", "max=0 must be an integer of at least 1"),
        ("{tmp}/i.zip?max=all", "max=all must be"),
        ("{tmp}/i.zip?max", "option 'max' has no value"),
        ("{tmp}/i.zip?max=1&max=2", "gives the option 'max' twice"),
        ("{tmp}/i.zip", "holds no usable pair. caption_missing: 1 \\(first: .*i.zip: a\\)"),
        ("{tmp}/x.tar.gz", "x.tar.gz is of no known kind"),
        ("{tmp}/odd.jsonl?images={tmp}/i.zip", "no image column: it has bild, caption; recognised"),
        ("{tmp}/mute.jsonl?images={tmp}/i.zip", "no caption column: it has image; recognised are"),
        ("{tmp}/bad.json?images={tmp}/i.zip", "bad.json is not valid JSON"),
        ("scenes?seed=1", "needs a size"),
        ("scenes?size=ten", "size=ten must be"),
        ("scenes?size=5&colour=red", "unknown option 'colour'; known: size, seed"),
    ],
)
def test_bad_spec_is_one_clear_line(tmp_path, spec, words):
    write_zip(tmp_path / "i.zip", {"a.jpg": jpeg(1)})
    write_lines(tmp_path / "t.jsonl", [{"image": "a.jpg", "caption": "a"}])
    write_lines(tmp_path / "odd.jsonl", [{"bild": "a.jpg", "caption": "a"}])
    write_lines(tmp_path / "mute.jsonl", [{"image": "a.jpg"}])
    (tmp_path / "bad.json").write_text("[{")
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=words) as caught:
        open_source(spec.format(tmp=tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("{tmp}/nowhere", "nowhere does not exist; accepted: 'scenes"),
        ("{tmp}/i.zip?classes={tmp}/nowhere.tsv", "nowhere.tsv does not exist"),
        ("{tmp}/i.zip?classes={tmp}/gap.tsv", "must number its classes 0, 1, 2"),
        ("{tmp}/i.zip?classes={tmp}/odd.tsv", "must hold lines of index, folder and name"),
        ("{tmp}/i.zip", "holds no labelled image"),
        ("scenes?size=5", "needs a label"),
    ],
)
def test_bad_labelled_spec_is_one_clear_line(tmp_path, spec, words):
    write_zip(tmp_path / "i.zip", {"a.jpg": jpeg(1)})
    (tmp_path / "gap.tsv").write_text("0\ta\ta\n2\tb\tb\n")
    (tmp_path / "odd.tsv").write_text("a\t0\n")
    with pytest.raises(ValueError, match=words) as caught:
        open_labelled(spec.format(tmp=tmp_path))
    assert "\n" not in str(caught.value)
