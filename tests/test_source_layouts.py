"""What people have on disk: odd names, links, shards, captions a line; each is used or counted."""

import functools
import io
import os
import struct
import tarfile
import threading
import zipfile

import pytest
from PIL import Image
from test_sources import write_files, write_tar

from align_jax import embed
from align_jax.curate.pack.pack import pack
from align_jax.data import images
from align_jax.data.sources.open_source import open_labelled, open_source


@functools.cache
def picture(shade=1, kind="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 90, 255 - shade)).save(file, kind)
    return file.getvalue()


def pairs(*stems, shade=1):
    files = {}
    for stem in stems:
        files |= {f"{stem}.jpg": picture(shade), f"{stem}.txt": f"a {stem}".encode()}
    return files


def keys(source):
    return [source[index].key for index in range(len(source))]


def embed_keys(spec):
    items = embed.open_images(str(spec))
    return [key for index in range(items.count) for key, _ in items.read(index)]


KINDS = {".avif": "AVIF", ".jfif": "JPEG", ".jpe": "JPEG", ".jp2": "JPEG2000", ".apng": "PNG"}


@pytest.mark.parametrize("suffix", [*KINDS, ".webp", ".GIF", ".tiff", ".bmp", ".ppm", ".mpo"])
def test_every_suffix_that_the_decoder_admits_is_an_image(tmp_path, suffix):
    kind = KINDS.get(suffix, suffix[1:].upper())
    write_files(tmp_path / "in" / "c", {f"a{suffix}": picture(1, kind), "a.txt": b"a picture"})
    path = str(tmp_path / "in")
    for source in (open_source(path), open_labelled(path)):
        assert images.decode_image(source[0].image).shape == (16, 16, 3)
    assert embed_keys(path) == [f"c/a{suffix}"]


def test_files_that_are_no_images_are_counted_by_pack_embed_and_labelled(tmp_path):
    files = {"a.jpg": picture(), "a.txt": b"a", "a.cls": b"3", "b.heic": b"ftyp", "b.txt": b"b"}
    files |= {"film.mp4": b"x", "Thumbs.db": b"y", "lone.txt": b"c"}
    folder = write_files(tmp_path / "in", files)
    wanted = {"file_not_an_image": 3, "image_missing": 1}
    source = open_source(str(folder))
    assert keys(source) == ["a"] and source.problems == wanted
    assert source.problems.first["file_not_an_image"] == f"{folder}: Thumbs.db"
    items = embed.open_images(str(folder))
    assert items.count == 1 and items.problems == wanted
    inside = {f"c/{name}": data for name, data in files.items()}
    labelled = open_labelled(str(write_files(tmp_path / "set", inside)))
    assert labelled.problems == {"file_not_an_image": 7}


def test_folder_of_archives_and_loose_images_is_refused_by_all(tmp_path):
    folder = write_files(tmp_path / "in", pairs("b"))
    write_tar(folder / "a.tar", pairs("a"))
    for open_it in (open_source, embed.open_images):
        with pytest.raises(ValueError, match=r"holds both archives \(a.tar\) and images \(b.jpg\)"):
            open_it(str(folder))
    assert keys(open_source(f"{folder}/*.tar")) == ["a"]


def test_files_beside_archives_are_counted_unless_they_belong_to_them(tmp_path):
    folder = tmp_path / "in"
    write_tar(folder / "0.tar", pairs("a"))
    write_tar(folder / "1.tar", pairs("b"))
    write_files(folder, {"0.parquet": b"", "nshards.txt": b"2", "notes.md": b""})
    write_files(folder, {".0.tar.part": b"", "dataset_type.txt": b"retrieval"})
    source = open_source(str(folder))
    assert source.folder_problems == {"file_not_an_image": 1, "name_hidden": 1}
    assert keys(source) == ["a", "b"] and source.problems == source.folder_problems
    report = pack(source, tmp_path / "out")
    assert report["source_problems"] == source.problems


def test_tars_one_after_another_are_read_on(tmp_path):
    parts = [write_tar(tmp_path / n, pairs(n)).read_bytes() for n in ("one", "two", "three")]
    both = tmp_path / "both.tar"
    both.write_bytes(b"".join(parts))
    source = open_source(str(both))
    assert keys(source) == ["one", "two", "three"] and source.problems == {}
    assert [source[index].captions for index in range(3)] == [("a one",), ("a two",), ("a three",)]
    both.write_bytes(parts[0] + parts[1][:700])
    source = open_source(str(both))
    assert keys(source) == ["one"] and source.problems["tar_truncated"] == 1
    both.write_bytes(parts[0] + b"no archive" * 200)
    assert open_source(str(both)).problems == {"tar_truncated": 1}


def damage_header(path, name, field):
    """Sets the size of a member, with a right checksum."""
    with tarfile.open(path) as archive:
        offset = archive.getmember(name).offset
    data = bytearray(path.read_bytes())
    data[offset + 124 : offset + 136] = field
    data[offset + 148 : offset + 156] = b" " * 8
    data[offset + 148 : offset + 156] = b"%06o\0 " % sum(data[offset : offset + 512])
    path.write_bytes(data)


@pytest.mark.parametrize("size", [-1, -512, -513, -4096, 2**62])
def test_tar_member_of_impossible_size_is_counted_and_the_next_ones_are_read(tmp_path, size):
    path = write_tar(tmp_path / "x.tar", pairs("a", "b", "c"))
    field = b"\xff" * 4 if size < 0 else b"\x80\0\0\0"
    damage_header(path, "b.jpg", field + struct.pack(">q", size))
    found = []
    thread = threading.Thread(target=lambda: found.append(open_source(str(path))), daemon=True)
    thread.start()
    thread.join(20)
    assert found, "hangs"
    assert keys(found[0]) == ["a", "c"]
    assert found[0].problems == {"tar_damaged": 1, "image_missing": 1}  # the latter of b.txt
    assert "b.jpg" in found[0].problems.first["tar_damaged"]


def test_long_name_of_negative_size_does_not_read_the_whole_file(tmp_path):
    path = write_tar(tmp_path / "x.tar", pairs("a") | {"n" * 150 + ".jpg": picture()})
    data = bytearray(path.read_bytes())
    start = data.index(b"././@PaxHeader") if b"PaxHeader" in data else data.index(b"././@LongLink")
    data[start + 124 : start + 136] = b"\xff" * 4 + struct.pack(">q", -4096)
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)
    source = open_source(str(path))
    assert keys(source) == ["a"]
    # The next header is that of the file, with the start of its name.
    assert source.problems == {"tar_damaged": 1, "file_not_an_image": 1}


def test_each_line_of_a_text_file_is_a_caption(tmp_path):
    text = b"one dog\r\n two dogs \n\n three, dogs\n"
    write_tar(tmp_path / "test" / "0.tar", {"a.webp": picture(1, "WEBP"), "a.txt": text})
    write_files(tmp_path / "test", {"dataset_type.txt": b"retrieval", "nshards.txt": b"1"})
    source = open_source(str(tmp_path / "test"))
    assert source[0].captions == ("one dog", "two dogs", "three, dogs")
    assert source.problems == {}


def test_text_file_of_img2dataset_is_one_caption(tmp_path):
    write_tar(tmp_path / "in" / "00000.tar", {"0.jpg": picture(), "0.txt": b"two\nlines"})
    write_files(tmp_path / "in", {"00000_stats.json": b'{"successes": 1}'})
    source = open_source(str(tmp_path / "in"))
    assert source[0].captions == ("two\nlines",)
    pack(source, tmp_path / "out")
    assert open_source(str(tmp_path / "out"))[0].captions == ("two\nlines",)


def table(folder, *names):
    rows = "".join(f'{{"image": "{name}", "caption": "{name}"}}\n' for name in names)
    (folder / "t.jsonl").write_text(rows)
    return folder / "t.jsonl"


def zip_of(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_absent_image_never_gets_the_picture_of_another_folder(tmp_path):
    zip_of(tmp_path / "i.zip", {"dogs/1.jpg": picture(1), "cats/2.jpg": picture(2)})
    names = ["cats/1.jpg", "cats/2.jpg", "1.jpg", "data/dogs/1.jpg", "ogs/1.jpg", "x/3.jpg"]
    source = open_source(f"{table(tmp_path, *names)}?images={tmp_path / 'i.zip'}")
    found = {key: source[place].image for place, key in enumerate(keys(source))}
    assert found == {
        "cats/2.jpg": picture(2),
        "1.jpg": picture(1),
        "data/dogs/1.jpg": picture(1),
    }
    assert source.problems == {"image_missing": 3}
    assert source.problems.first["image_missing"] == "cats/1.jpg"


@pytest.mark.parametrize("name", ["./a/1.jpg", "a//1.jpg", "a/../a/1.jpg", "/data/a/1.jpg"])
def test_spelling_of_a_path_in_a_table_does_not_matter(tmp_path, name):
    write_files(tmp_path / "im", {"a/1.jpg": picture(1), "b/1.jpg": picture(2)})
    source = open_source(f"{table(tmp_path, name)}?images={tmp_path / 'im'}")
    assert source[0].image == picture(1)


def test_equal_shard_names_need_their_folder(tmp_path):
    for number, folder in enumerate("ab"):
        write_tar(tmp_path / folder / "0.tar", {"1.jpg": picture(number)})
    rows = [("b/0.tar", 1), ("a/0", 0), ("0.tar", None)]
    text = "".join(f'{{"image": "1.jpg", "shard": "{s}", "caption": "{s}"}}\n' for s, _ in rows)
    (tmp_path / "t.jsonl").write_text(text)
    source = open_source(f"{tmp_path / 't.jsonl'}?images={tmp_path}/*/0.tar")
    assert [source[place].image for place in range(2)] == [picture(1), picture(0)]
    assert len(source) == 2 and source.problems == {"shard_ambiguous": 1}


def test_path_that_exists_is_no_pattern(tmp_path):
    folder = tmp_path / "set [v2] ?max=1"
    write_tar(folder / "x [1].tar", pairs("a"))
    write_tar(folder / "y.tar", pairs("b"))
    assert keys(open_source(str(folder))) == ["a", "b"]
    assert keys(open_source(str(folder / "x [1].tar"))) == ["a"]
    assert keys(open_source(f"{tmp_path}/set*/*.tar")) == ["a", "b"]
    assert embed_keys(folder / "x [1].tar") == ["a.jpg"]
    images_of = open_source(f"{table(tmp_path, 'a.jpg')}?images={folder / 'x [1].tar'}")
    assert keys(images_of) == ["a.jpg"]


def test_existing_folder_of_a_pattern_is_taken_as_it_is(tmp_path):
    write_tar(tmp_path / "set [v2]" / "x.tar", pairs("a"))
    assert keys(open_source(f"{tmp_path}/set [v2]/*.tar")) == ["a"]
    assert embed_keys(f"{tmp_path}/set [v2]/*.tar") == ["a.jpg"]


def test_equal_keys_of_shards_in_several_folders_stay_apart(tmp_path):
    for number, job in enumerate("abc"):
        write_tar(tmp_path / "jobs" / job / "00000.tar", pairs("0", "1", shade=number))
    wanted = ["0", "1", "b/00000/0", "b/00000/1", "c/00000/0", "c/00000/1"]
    source = open_source(f"{tmp_path}/jobs/*/00000.tar")
    assert keys(source) == wanted
    report = pack(source, tmp_path / "out")
    packed = open_source(str(tmp_path / "out"))
    assert report["skipped"] == {} and keys(packed) == wanted
    assert [packed[place].image for place in (0, 2, 4)] == [picture(n) for n in range(3)]
    (tmp_path / "jobs").rename(tmp_path / "elsewhere")
    assert keys(open_source(f"{tmp_path}/elsewhere/*/00000.tar")) == wanted


def test_equal_names_of_a_table_in_shards_of_several_folders_stay_apart(tmp_path):
    rows = ""
    for job in "abc":
        write_tar(tmp_path / job / "0.tar", {"1.jpg": picture(ord(job))})
        rows += f'{{"image": "1.jpg", "shard": "{job}/0.tar", "caption": "{job}"}}\n'
    (tmp_path / "t.jsonl").write_text(rows)
    source = open_source(f"{tmp_path / 't.jsonl'}?images={tmp_path}/*/0.tar")
    assert keys(source) == ["1.jpg", "b/0/1.jpg", "c/0/1.jpg"]


def test_hidden_names_are_left_out_and_counted(tmp_path):
    files = {"cat/1.jpg": picture(), "dog/2.jpg": picture(), "dog/._2.jpg": b"Mac"}
    files |= {".ipynb_checkpoints/1.jpg": picture(), "__MACOSX/x/1.jpg": b"", ".DS_Store": b""}
    source = open_labelled(str(write_files(tmp_path / "set", files)))
    assert source.classes == ("cat", "dog") and len(source) == 2
    assert source.problems == {"name_hidden": 4}
    source = open_labelled(str(zip_of(tmp_path / "set.zip", files)))
    assert source.classes == ("cat", "dog") and source.problems == {"name_hidden": 4}
    assert embed_keys(tmp_path / "set") == ["cat/1.jpg", "dog/2.jpg"]
    hidden = {".b.jpg": b"", ".b.txt": b"", ".git/c.jpg": picture()}
    write_files(tmp_path / "in", pairs("a") | hidden)
    source = open_source(str(tmp_path / "in"))
    assert keys(source) == ["a"] and source.problems == {"name_hidden": 3}


def test_linked_folders_are_followed_once_and_loops_are_counted(tmp_path):
    write_files(tmp_path / "elsewhere", {"1.jpg": picture(1), "2.jpg": picture(2)})
    write_files(tmp_path / "set" / "dog", {"3.jpg": picture(3)})
    os.symlink(tmp_path / "elsewhere", tmp_path / "set" / "cat")
    os.symlink("..", tmp_path / "set" / "dog" / "up")
    os.symlink(tmp_path / "elsewhere", tmp_path / "set" / "puss")
    os.symlink("nowhere.jpg", tmp_path / "set" / "dog" / "4.jpg")
    os.mkfifo(tmp_path / "set" / "dog" / "5.jpg")
    source = open_labelled(str(tmp_path / "set"))
    assert source.classes == ("cat", "dog")
    assert keys(source) == ["cat/1.jpg", "cat/2.jpg", "dog/3.jpg"]
    assert source.problems == {"link_repeated": 2, "file_unreadable": 2}


def test_numeric_class_folders_are_sorted_as_numbers(tmp_path):
    write_files(tmp_path, {f"{n}/x.jpg": picture(n) for n in range(12)})
    source = open_labelled(str(tmp_path))
    assert source.classes == tuple(map(str, range(12)))
    assert [(source[place].key, source[place].label) for place in (1, 2)] == [
        ("1/x.jpg", 1),
        ("10/x.jpg", 10),
    ]
