"""storage/identity.py: equal data have one stamp wherever they lie, other data another one."""

import io
import json
import os
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from align_jax.curate.pack import pack
from align_jax.data import mixture
from align_jax.data.sources import open_source as sources
from align_jax.data.sources.record import Record
from align_jax.storage import identity


def bitmap(seed):
    """An image whose file has the same size for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "BMP")
    return file.getvalue()


def make(folder, seeds=range(6), captions=None):
    """One set of pairs in each layout; captions of one length."""
    captions = captions or [f"caption {seed}" for seed in range(len(seeds))]
    (folder / "images").mkdir(parents=True)
    (folder / "samples").mkdir()
    (folder / "classes" / "a").mkdir(parents=True)
    rows = []
    with (
        tarfile.open(folder / "one.tar", "w") as tar,
        zipfile.ZipFile(folder / "one.zip", "w") as archive,
    ):
        for number, seed in enumerate(seeds):
            data = bitmap(seed)
            (folder / "images" / f"{number}.bmp").write_bytes(data)
            (folder / "classes" / "a" / f"{number}.bmp").write_bytes(data)
            rows.append({"image": f"{number}.bmp", "caption": captions[number]})
            for suffix, content in (("bmp", data), ("txt", captions[number].encode())):
                name = f"{number}.{suffix}"
                (folder / "samples" / name).write_bytes(content)
                archive.writestr(name, content)
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    shutil.copy(folder / "one.tar", folder / "two.tar")
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack.pack(sources.open_source(f"{folder}/samples"), folder / "packed")
    return folder


LAYOUTS = {
    "table": "{}/table.jsonl?images={}/images",
    "samples": "{}/samples",
    "tar": "{}/one.tar",
    "zip": "{}/one.zip",
    "tars": "{}/*.tar",
    "packed": "{}/packed?split=train",
}


def stamp(folder, layout):
    return identity.stamp(sources.open_source(LAYOUTS[layout].format(folder, folder)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("data") / "a")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_elsewhere_and_later_have_the_same_stamp(layout, folder, tmp_path, monkeypatch):
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    for path in copy.rglob("*"):
        os.utime(path, (1e9, 1e9))
    assert stamp(copy, layout) == stamp(folder, layout)
    monkeypatch.chdir(copy.parent)
    assert stamp("elsewhere", layout) == stamp(folder, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_images_of_the_same_number_and_size_have_another_stamp(layout, folder, tmp_path):
    other = make(tmp_path / "b", seeds=[0, 1, 2, 99, 4, 5])
    assert stamp(other, layout) != stamp(folder, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_caption_of_the_same_length_has_another_stamp(layout, folder, tmp_path):
    captions = [f"caption {seed}" for seed in (0, 1, 2, 9, 4, 5)]
    other = make(tmp_path / "b", captions=captions)
    assert stamp(other, layout) != stamp(folder, layout)


def test_options_that_change_the_records_change_the_stamp(folder):
    specs = [
        f"{folder}/table.jsonl?images={folder}/images",
        f"{folder}/table.jsonl?images={folder}/images&max=5",
        f"{folder}/table.jsonl?images={folder}/images&captions=caption:2",
        f"{folder}/packed",
        f"{folder}/packed?split=train[1:]",
        f"{folder}/packed?max=5",
        "scenes?size=6",
        "scenes?size=6&seed=1",
        "scenes?size=6&image_size_px=32",
    ]
    assert len({identity.stamp(sources.open_source(spec)) for spec in specs}) == len(specs)


def test_mixtures_differ_by_weights_names_and_data():
    a, b = sources.open_source("scenes?size=6"), sources.open_source("scenes?size=7")
    stamps = {
        identity.stamp(mixture.Mixture(sources_of, weights))
        for sources_of, weights in (
            ({"a": a, "b": b}, {"a": 1, "b": 1}),
            ({"a": a, "b": b}, {"a": 1, "b": 2}),
            ({"a": b, "b": a}, {"a": 1, "b": 1}),
            ({"a": a, "c": b}, {"a": 1, "c": 1}),
        )
    }
    assert len(stamps) == 4


def test_labelled_images_differ_by_pixels_and_classes(folder, tmp_path):
    def labelled(path):
        return identity.stamp(sources.open_labelled(f"{path}/classes"))

    shutil.copytree(folder, tmp_path / "same")
    other = make(tmp_path / "b", seeds=[0, 1, 2, 99, 4, 5])
    renamed = shutil.copytree(folder, tmp_path / "c")
    (renamed / "classes" / "a").rename(renamed / "classes" / "b")
    assert labelled(tmp_path / "same") == labelled(folder)
    assert len({labelled(folder), labelled(other), labelled(renamed)}) == 3


def test_records_in_memory_differ_by_every_field():
    pixels = np.zeros((2, 2, 3), np.uint8)
    records = [
        Record("k", b"1", ("a",)),
        Record("l", b"1", ("a",)),
        Record("k", b"2", ("a",)),
        Record("k", pixels, ("a",)),
        Record("k", pixels + 1, ("a",)),
        Record("k", b"1", ("b",)),
        Record("k", b"1", ("a",), (0.5,)),
        Record("k", b"1", ("a",), (), ("alt",)),
    ]
    assert len({identity.stamp(sources.InMemory([record])) for record in records}) == len(records)


def test_a_byte_in_a_block_of_a_large_file_changes_its_digest(tmp_path):
    size = 16 * 2**20
    path = tmp_path / "large"
    path.write_bytes(bytes(size))
    before = identity.of_files([path])
    assert identity.of_files([path, path]) != before
    for place in (0, 2**14 - 1, size - 1, size - 2**14, (size - 2**14) // 15 * 7 + 5):
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(b"x")
        assert identity.of_files([path]) != before
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(b"\0")
        assert identity.of_files([path]) == before
    assert (
        identity.of_content(path) != identity.of_content(tmp_path / "missing.py")
        if ((tmp_path / "missing.py").write_text("x"))
        else False
    )


def test_files_of_equal_blocks_and_other_sizes_differ(tmp_path):
    for size in (2**20, 2**21):
        (tmp_path / f"{size}").write_bytes(bytes(size))
    assert identity.of_files([tmp_path / f"{2**20}"]) != identity.of_files([tmp_path / f"{2**21}"])


def test_a_digest_tells_where_values_end_and_reads_lists_as_tuples():
    assert identity.digest(["ab", "c"]) != identity.digest(["a", "bc"])
    assert identity.digest([("a", "b")]) == identity.digest([["a", "b"]])
    assert identity.digest([1]) != identity.digest(["1"])
    assert identity.digest(["\ud83d"]) != identity.digest(["?"])
