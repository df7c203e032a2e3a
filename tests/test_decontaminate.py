"""curate/near_duplicates/decontaminate.py: what matched, what to drop, and mistakes with sets."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from helpers import environment, error_of, make_pairs, real_data, snapshot, write_table
from PIL import Image
from pyarrow import parquet

from align_jax.cli import main as cli
from align_jax.curate.near_duplicates import image_sets, match_sheet, matches
from align_jax.curate.near_duplicates.decontaminate import decontaminate
from align_jax.curate.scan import scan
from align_jax.data.perceptual_hash import phash
from align_jax.data.sources.open_source import open_source


@pytest.fixture
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_hashes(name, hashes, key="key", column="phash"):
    keys, hashes = list(hashes), [f"{value:016x}" for value in hashes.values()]
    parquet.write_table(pa.table({key: keys, column: hashes}), name)


def read(name):
    return parquet.read_table(name).to_pylist()


def write_embeddings(folder, keys, z, file_format="npy", shard_size=2, **manifest):
    """Writes what `align embed` writes."""
    folder.mkdir()
    manifest = {"kind": "image", "model": "m", "file_format": file_format} | manifest
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for number, start in enumerate(range(0, len(keys), shard_size)):
        part, rows = keys[start : start + shard_size], z[start : start + shard_size]
        if file_format == "npy":
            np.save(folder / f"{number:05d}.npy", rows)
            (folder / f"{number:05d}.json").write_text(json.dumps({"keys": part}))
        else:
            values = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
            table = pa.table({"key": part, "embedding": values})
            parquet.write_table(table, folder / f"{number:05d}.parquet")


def test_matches_drops_and_report_of_made_hashes(inside):
    write_hashes("train.parquet", {"a": 0, "b": 0b111, "c": 2**60 - 1, "d": 2**63 + 7, "e": 2**32})
    write_hashes("x.parquet", {"x0": 0b1, "x1": 2**60 - 2})
    write_hashes("y.parquet", {7: 2**63 + 1}, key="id", column="image_phash")
    report = decontaminate("train.parquet", ["x.parquet", "y.parquet"], "out", max_distance=2)
    assert [list(row.values()) for row in read("out/matches.parquet")] == [
        ["a", "x.parquet", "x0", "phash", "as it is", 1, None],
        ["a", "y.parquet", "7", "phash", "as it is", 2, None],
        ["b", "x.parquet", "x0", "phash", "as it is", 2, None],
        ["c", "x.parquet", "x1", "phash", "as it is", 1, None],
        ["d", "y.parquet", "7", "phash", "as it is", 2, None],
        ["e", "x.parquet", "x0", "phash", "as it is", 2, None],
    ]
    assert read("out/drop.parquet") == [
        {"key": key, "reason": f"near_duplicate of {name}.parquet"}
        for key, name in (("a", "x"), ("b", "x"), ("c", "x"), ("d", "y"), ("e", "x"))
    ]
    assert (report["dropped"], report["kept"]) == (5, 0)
    assert [entry["pairs"] for entry in report["against"]] == [4, 2]
    assert [entry["train_images_matched"] for entry in report["against"]] == [4, 2]
    assert [entry["images_matched"] for entry in report["against"]] == [2, 1]
    assert report["against"][0]["scores"] == {"1": 2, "2": 2}
    assert json.loads((inside / "out" / "report.json").read_text()) == report


def test_groups_inside_one_set_keep_their_first(inside):
    chain = {"a": 2**40, "b": 0, "c": 0b111, "d": 0b111111, "e": 2**40, "f": 2**50 - 1, "g": 0}
    write_hashes("train.parquet", chain)
    report = decontaminate("train.parquet", [], "out", max_distance=3)
    rows = [(row["key"], row["match_key"], row["distance"]) for row in read("out/matches.parquet")]
    # a and b differ in one bit, and d is joined to b by c.
    assert rows == [("b", "a", 1), ("c", "a", 4), ("d", "a", 7), ("e", "a", 0), ("g", "a", 1)]
    assert (report["groups"], report["largest_group"], report["kept"]) == (1, 6, 2)


def test_hashes_match_other_sets_up_to_8_bits_by_default(inside):
    write_hashes("train.parquet", {f"{bits} bits": 2**bits - 1 for bits in range(12)})
    write_hashes("eval.parquet", {"x": 0})
    report = decontaminate("train.parquet", ["eval.parquet"], "out")
    assert [row["key"] for row in read("out/drop.parquet")] == [f"{n} bits" for n in range(9)]
    assert report["max_distance"] == 8
    assert report["against"][0]["scores"] == {f"{bits}": 1 for bits in range(9)}


def test_hashes_match_inside_a_set_up_to_4_bits_by_default(inside):
    # Pairs 3, 4, 5 and 6 bits apart, and 16 bits or more from each other.
    far = {bits: 0xFFFF << 16 * place for place, bits in enumerate((3, 4, 5, 6))}
    hashes = {f"{bits} a": value for bits, value in far.items()}
    hashes |= {f"{bits} b": value ^ (2**bits - 1 << 25) for bits, value in far.items()}
    write_hashes("train.parquet", hashes)
    report = decontaminate("train.parquet", [], "out")
    assert [row["key"] for row in read("out/drop.parquet")] == ["3 b", "4 b"]
    assert (report["max_distance"], report["scores"]) == (4, {"3": 1, "4": 1})


@pytest.mark.parametrize("against", [True, False])
def test_embeddings_match_above_a_cosine_of_0_975_by_default(inside, against, capfd):
    cosines = np.array([0.974, 0.976], np.float32)
    z = np.zeros((4, 6), np.float32)
    z[0, 0] = z[1, 2] = 1
    z[2, :2] = cosines[0], np.sqrt(1 - cosines[0] ** 2)
    z[3, 2:4] = cosines[1], np.sqrt(1 - cosines[1] ** 2)
    write_embeddings(inside / "eval", list("xy"), z[:2])
    write_embeddings(inside / "train", list("ab"), z[2:])
    write_embeddings(inside / "both", list("xyab"), z)
    report = decontaminate(*(("train", ["eval"]) if against else ("both", [])), "out")
    assert [row["key"] for row in read("out/drop.parquet")] == ["b"]
    assert report["min_cosine"] == 0.975
    line = f"1 of {2 if against else 4} images of {'train' if against else 'both'} match: that many"
    assert line in capfd.readouterr().err
    if against:  # of many images it is nothing to look at
        write_embeddings(inside / "many", list(map(str, range(30))), np.eye(30, 6, dtype="f"))
        decontaminate("many", ["eval"], "few")
        assert "that many" not in capfd.readouterr().err


def test_a_sheet_has_24_pairs_of_all_distances(inside):
    scores = np.repeat(np.array([0, 3, 8], np.uint8), (40, 30, 2))
    rows = np.arange(len(scores))
    keys = rows.astype(str).astype(object)
    found = matches.Matches(rows, keys, np.ones_like(rows), rows, keys, scores)
    output = matches.Output(inside, ["train", "eval"], "phash", matches.SHEET_PAIRS)
    output.write(iter([found[:35], found[35:]]))
    shown = output.spread()
    assert np.unique(shown.scores, return_counts=True)[1].tolist() == [11, 11, 2]
    assert shown.rows.tolist() == [*range(11), *range(40, 51), 70, 71]


def test_a_sheet_shows_whole_names_of_files():
    for key in ("short.jpg", "a/folder/with/a/rather/long/name/photo_of_the_beach_0001.jpg"):
        lines = match_sheet._lines_of(key)
        assert "".join(lines) == key and max(map(len, lines)) <= 20
    assert "".join(match_sheet._lines_of("x" * 300 + ".jpg")) == "..." + "x" * 93 + ".jpg"


def test_ten_thousand_blank_pictures_are_one_group(inside):
    write_hashes("train.parquet", {f"{n}": 2**63 for n in range(10_000)} | {"other": 2**40 - 1})
    report = decontaminate("train.parquet", [], "out")
    assert (report["dropped"], report["largest_group"]) == (9_999, 10_000)


def test_rows_of_one_image_are_one_image_and_rows_without_hash_are_counted(inside):
    table = {"key": ["a", "a", "b", "c"], "phash": ["0" * 16, "0" * 16, None, "f" * 16]}
    parquet.write_table(pa.table(table), "train-0.parquet")
    parquet.write_table(pa.table({"key": ["d"], "phash": ["0" * 16]}), "train-1.parquet")
    write_hashes("eval.parquet", {"x": 0})
    report = decontaminate("train-*.parquet", ["eval.parquet"], "out")
    assert report["train"] == {"name": "train-*.parquet", "images": 3, "without_hash": 1}
    assert [row["key"] for row in read("out/matches.parquet")] == ["a", "d"]


@pytest.mark.parametrize("file_format", ["npy", "parquet"])
def test_embeddings_are_compared_by_cosine(inside, file_format):
    z = np.eye(6, 8, dtype=np.float32)
    write_embeddings(inside / "train", list("abcdef"), z, file_format)
    close = z[[4, 2]] + np.float32(0.1) * z[[0, 1]]
    close /= np.linalg.norm(close, axis=1, keepdims=True)
    write_embeddings(inside / "eval", ["x", "y"], close, file_format)
    report = decontaminate("train", ["eval"], "out")
    rows = read("out/matches.parquet")
    assert [(row["key"], row["match_key"], row["distance"]) for row in rows] == [
        ("c", "y", None),
        ("e", "x", None),
    ]
    assert [row["cosine"] for row in rows] == pytest.approx([0.99504] * 2, abs=1e-5)
    assert report["method"] == "embedding" and report["against"][0]["scores"] == {"0.995": 2}
    z[3] = z[1]
    shutil.rmtree("train")
    write_embeddings(inside / "train", list("abcdef"), z, file_format)
    decontaminate("train", [], "inside")
    assert [(r["key"], r["match_key"]) for r in read("inside/matches.parquet")] == [("d", "b")]


def test_copies_of_real_images_are_found_and_others_are_not(inside):
    """Re-encoded, resized and slightly cropped copies of dev images among training images."""
    pairs = f"dev.jsonl?images={real_data('flickr8k', 'dev.zip')}&max=60"
    rows = real_data("flickr8k", "dev.jsonl").read_text().splitlines()
    (inside / "dev.jsonl").write_text("\n".join(rows) + "\n")
    scan(pairs, "eval.parquet")
    source = open_source(pairs)
    (inside / "images").mkdir()
    table, copied = [], []
    for number in range(60):
        image = Image.open(io.BytesIO(source[number].image))
        if number % 3 == 0:
            image = image.resize((96, 64), Image.Resampling.BICUBIC)
        elif number % 3 == 1:
            image = image.crop((1, 1, 127, 127))
        copied.append(f"copy{number}.jpg")
        image.save(inside / "images" / copied[-1], quality=60)
        table.append({"image": copied[-1], "captions": ["a"]})
    others = open_source(
        f"{real_data('cc3m', 'train.jsonl')}?images={real_data('cc3m', 'train-00000.zip')}&max=200"
    )
    for number in range(200):
        (inside / "images" / f"other{number}.jpg").write_bytes(others[number].image)
        table.append({"image": f"other{number}.jpg", "captions": ["a"]})
    write_table(inside / "train.jsonl", table)
    sets = ("train.jsonl?images=images", "--against", "eval.parquet")
    assert cli.main(["decontaminate", *sets, "--out", "out", "--sheet"]) == 0
    matched = read("out/matches.parquet")
    wanted = [(name, source[number].key) for number, name in enumerate(copied)]
    assert [(row["key"], row["match_key"]) for row in matched] == wanted
    with Image.open("out/sheet.png") as sheet:
        assert sheet.size[0] > 1000 and sheet.size[1] > 1000
    assert (inside / "out" / "scan-0.parquet").exists()


def make_copied_pairs(folder):
    """Writes pairs 0.jpg to 5.jpg, the last one a copy of the first; returns their spec."""
    make_pairs(folder, 6)
    shutil.copy(folder / "images" / "0.jpg", folder / "images" / "5.jpg")
    return "captions.jsonl?images=images"


def test_the_same_call_gives_the_same_bytes_and_continues_after_an_interruption(
    inside, monkeypatch
):
    pairs = make_copied_pairs(inside)
    decontaminate(pairs, [], "one", sheet=True)
    decontaminate(pairs, [], "two", sheet=True)
    files = snapshot("one")
    names = ["drop.parquet", "matches.parquet", "report.json", "scan-0.parquet", "sheet.png"]
    assert sorted(files) == names
    assert read("one/drop.parquet") == [{"key": "5.jpg", "reason": f"near_duplicate of {pairs}"}]
    assert snapshot("two") == files
    (inside / "two" / "report.json").unlink()
    (inside / "two" / "drop.parquet").write_bytes(b"cut")
    monkeypatch.setattr(image_sets, "scan", None)  # it is not scanned again
    decontaminate(pairs, [], "two", sheet=True)
    assert snapshot("two") == files


KILLED = """
import os, signal, sys
from align_jax.curate.near_duplicates.decontaminate import decontaminate

name, when, train, against = sys.argv[1:]
replace = os.replace

def rename(source, target):
    if when == "before" and os.path.basename(target) == name:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
    if when == "after" and os.path.basename(target) == name:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = rename
decontaminate(train, [against], "out", sheet=True)
"""


@pytest.mark.slow
def test_killed_searches_against_a_set_end_with_the_bytes_of_an_undisturbed_one(inside):
    make_copied_pairs(inside)
    train, against = "captions.jsonl?images=images", "captions.jsonl?images=images&max=3"
    decontaminate(train, [against], "whole", sheet=True)
    killed = [("scan-0.parquet", "before"), ("config.json", "before"), ("copies-1.u64", "after")]
    killed += [("matches.parquet", "after"), ("sheet.png", "before"), ("report.json", "before")]
    for name, when in [*killed, ("report.json", "after"), ("", "never")]:
        command = [sys.executable, "-c", KILLED, name, when, train, against]
        code = subprocess.run(command, env=environment(), check=False).returncode
        assert code == (-signal.SIGKILL if name else 0), (name, when)
    assert snapshot("out") == snapshot("whole")


def test_finished_call_given_again_returns_its_report_another_is_refused(inside, monkeypatch):
    for name in ("train", "eval", "other"):
        write_hashes(f"{name}.parquet", {"a": 0, "b": 2**63})
    made = decontaminate("train.parquet", ["eval.parquet"], "whole")
    remove = shutil.rmtree

    def stop(path, **options):
        if os.path.exists("out/report.json"):
            raise KeyboardInterrupt
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        decontaminate("train.parquet", ["eval.parquet"], "out")
    monkeypatch.setattr(shutil, "rmtree", remove)
    before = snapshot("out")
    for train, against, options in (
        ("train.parquet", "eval.parquet", {"max_distance": 2}),
        ("train.parquet", "other.parquet", {}),
        ("scenes?size=100000", "eval.parquet", {}),  # which is not scanned first
    ):
        with pytest.raises(ValueError, match="holds the report of another call; name a new"):
            decontaminate(train, [against], "out", **options)
    assert snapshot("out") == before
    for _ in range(2):
        assert decontaminate("train.parquet", ["eval.parquet"], "out") == made
        assert snapshot("out") == snapshot("whole")
    write_hashes("eval.parquet", {"a": 1})
    (inside / "cut").mkdir()
    (inside / "cut" / "report.json").write_text('{"call": ')
    with pytest.raises(ValueError, match=r"^cut/report.json is not valid JSON"):
        decontaminate("train.parquet", ["eval.parquet"], "cut")
    with pytest.raises(ValueError, match="holds the report of another call"):
        decontaminate("train.parquet", ["eval.parquet"], "out")


def test_wrong_sets_are_one_line(inside, capfd):
    write_hashes("train.parquet", {"a": 0})
    write_hashes("laion.parquet", {"a": 0}, column="hash")
    parquet.write_table(pa.table({"key": ["a"], "phash": ["12"]}), "wrong.parquet")
    (inside / "text.parquet").write_text("no Parquet")
    z = np.eye(3, dtype=np.float32)
    write_embeddings(inside / "z", list("abc"), z)
    write_embeddings(inside / "other", list("abc"), z, model="n")
    write_embeddings(inside / "texts", list("abc"), z, kind="text")
    write_embeddings(inside / "gap", list("abc"), z)
    (inside / "gap" / "00000.npy").unlink()
    (inside / "done").mkdir()
    (inside / "done" / "report.json").write_text("{}")

    def error(*arguments, out="out"):
        return error_of(capfd, "decontaminate", *arguments, "--out", out)

    assert error("nowhere.parquet") == (
        "nowhere.parquet does not exist; name a table with perceptual hashes."
    )
    assert error("laion.parquet").startswith(
        "laion.parquet needs a column key or id or uid and a perceptual hash in phash or "
        "image_phash or image_hash; it has key, hash. `align scan`"
    )
    assert error("wrong.parquet").startswith("'12' is no perceptual hash; ")
    assert error("text.parquet").startswith("text.parquet is not a Parquet file: ")
    assert error("train.parquet", "--against", "train.parquet") == (
        "A set is named twice; each --against must be another one."
    )
    assert error("train.parquet", out="done") == (
        "done holds the report of another call; name a new folder."
    )
    assert error("train.parquet", "--max-distance", "20") == (
        "--max-distance 20 must be 0 to 16 of the 64 bits."
    )
    assert error("z", "--min-cosine", "1.5").startswith("--min-cosine 1.5 must lie between 0 and 1")
    assert error("train.parquet", "--sheet") == (
        "--sheet needs a table of `align scan`, which train.parquet is not."
    )
    assert error("z", "--against", "train.parquet").startswith("z holds embeddings and another set")
    assert error("z", "--sheet").startswith("--sheet needs scans: ")
    assert error("z", "--against", "other") == "other and z are embedded by different models."
    assert error("texts") == "texts holds embeddings of texts, not of images."
    assert error("gap") == "gap misses shards; run `align embed` again, it continues."
    assert error("nowhere").startswith("nowhere does not exist; accepted: ")
    write_hashes("eval.parquet", {"b": 0})
    for arguments, option, search in (
        (("z", "--max-distance", "4"), "--max-distance 4", "embeddings inside one set"),
        (("train.parquet", "--min-cosine", "0.9"), "--min-cosine 0.9", "hashes inside one set"),
        (("train.parquet", "--as-is"), "--as-is", "hashes inside one set"),
        (("z", "--as-is"), "--as-is", "embeddings inside one set"),
        (
            ("train.parquet", "--against", "eval.parquet", "--min-cosine", "0.9"),
            "--min-cosine 0.9",
            "hashes against other sets",
        ),
    ):
        assert error(*arguments) == f"{option} is of no use to a search by {search}."


def test_the_scan_of_another_source_is_not_used(inside):
    make_pairs(inside, 3)
    (inside / "out").mkdir()
    scan("scenes?size=3", "out/scan-0.parquet")
    with pytest.raises(ValueError, match="^out/scan-0.parquet is a scan of scenes.size=3, not of "):
        decontaminate("captions.jsonl?images=images", [], "out")


def test_a_sheet_of_a_changed_source_says_so(inside):
    scan(make_copied_pairs(inside), "train.parquet")
    rows = (inside / "captions.jsonl").read_text().splitlines(keepends=True)
    (inside / "captions.jsonl").write_text("".join(rows[::-1]))
    with pytest.raises(ValueError, match="has changed since it was scanned: 0.jpg is where 5.jpg"):
        decontaminate("train.parquet", [], "out", sheet=True)


def test_flat_images_of_any_size_are_near_duplicates():
    assert phash(np.full((40, 60, 3), 255, np.uint8)) == phash(np.full((9, 9, 3), 250, np.uint8))
