"""embed.py and the verbs embed, classify, convert: shards, resumption, tables, bad input."""

import json
import os
import pickle
import shutil
import signal
import time
import zipfile

import numpy as np
import pyarrow
import pytest
from helpers import environment, error_of, run_align, snapshot, start_align, write_table
from PIL import Image
from pyarrow import parquet
from tiny_hf import IMAGE_SIZE
from transformers import AlignModel

import align_jax
from align_jax import embed
from align_jax.cli import main as cli
from align_jax.evals import tables
from align_jax.hf import processor
from align_jax.storage import writing


@pytest.fixture(scope="module")
def model(tiny_hf):
    return align_jax.load(tiny_hf[0], batch_size=16)


@pytest.fixture
def folder(tiny_hf, tmp_path, monkeypatch):
    """Current directory with 25 pictures in photos/ and the model in model/."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_hf[0], "model")
    make_photos(tmp_path / "photos", 25)
    return tmp_path


def make_photos(folder, count):
    rng = np.random.default_rng(0)
    for index in range(count):
        path = folder / f"{index % 3}" / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = rng.integers(0, 255, 3, np.uint8)
        Image.fromarray(np.zeros((36, 30, 3), np.uint8) + colour).save(path)


def read_npy(out):
    """Returns {key: row} of all shards, asserting that no key occurs twice."""
    rows = {}
    for path in sorted(out.glob("*.npy")):
        report, z = json.loads(path.with_suffix(".json").read_text()), np.load(path)
        assert z.dtype == np.float32 and len(report["keys"]) == len(z) == report["rows"]
        for key, row in zip(report["keys"], z, strict=True):
            assert key not in rows
            rows[key] = row
    return rows


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def test_shards_hold_every_image_once_with_its_embedding(model, folder):
    counts = embed.embed(model, embed.open_images("photos"), "out", shard_size=10)
    assert counts == {"rows": 25, "skipped": 0, "shards": 3, "shards_found": 0}
    rows = read_npy(folder / "out")
    assert list(rows) == names_in(folder / "photos")
    wanted = model.encode_image([folder / "photos" / key for key in rows])
    np.testing.assert_allclose(np.stack(list(rows.values())), wanted, atol=1e-6)


def test_parquet_holds_the_same_rows(model, folder):
    items = embed.open_images("photos")
    embed.embed(model, items, "a", shard_size=10)
    embed.embed(model, items, "b", shard_size=10, file_format="parquet")
    table = pyarrow.concat_tables(map(parquet.read_table, sorted((folder / "b").glob("*.parquet"))))
    rows = read_npy(folder / "a")
    assert table["key"].to_pylist() == list(rows)
    assert table["embedding"].type == pyarrow.list_(pyarrow.float32(), 32)
    np.testing.assert_array_equal(table["embedding"].to_pylist(), np.stack(list(rows.values())))


def test_rerun_makes_only_what_is_missing(model, folder):
    items = embed.open_images("photos")
    embed.embed(model, items, "out", shard_size=10)
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "out").iterdir()}
    wanted, first = read_npy(folder / "out"), (folder / "out" / "report.json").read_bytes()
    # What a kill between the two files of a shard, or in one of them, leaves.
    (folder / "out" / "00001.npy").rename(folder / "out" / f".00001.npy.{'0' * 32}.tmp")
    counts = embed.embed(model, items, "out", shard_size=10)
    assert (counts["rows"], counts["shards_found"]) == (25, 2)
    assert (folder / "out" / "report.json").read_bytes() == first
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted(before)
    for name in ("00000.npy", "00002.npy", "manifest.json"):
        assert (folder / "out" / name).stat().st_mtime_ns == before[name]
    found = read_npy(folder / "out")
    assert list(found) == list(wanted)
    np.testing.assert_array_equal(list(found.values()), list(wanted.values()))


def test_skipped_images_are_reported_with_the_reason(model, folder):
    (folder / "photos" / "0" / "0003.png").write_text("<html>")
    (folder / "photos" / "1" / "0004.png").write_bytes(b"")
    items = embed.open_images("photos")
    with pytest.raises(ValueError, match=r"^0/0003.png: Not an image .*--on-error skip leaves it"):
        embed.embed(model, items, "out", shard_size=10)
    counts = embed.embed(model, items, "out", shard_size=10, on_error="skip")
    assert counts == {"rows": 23, "skipped": 2, "shards": 3, "shards_found": 0}
    rows = read_npy(folder / "out")
    assert sorted({*names_in(folder / "photos")} - {*rows}) == ["0/0003.png", "1/0004.png"]
    wanted = model.encode_image([folder / "photos" / key for key in rows])
    np.testing.assert_allclose(np.stack(list(rows.values())), wanted, atol=1e-6)
    skipped = []
    for path in (folder / "out").glob("0*.json"):
        skipped += json.loads(path.read_text())["skipped"]
    assert ["1/0004.png", "image_empty", "The file is empty."] in skipped
    found = json.loads((folder / "out" / "report.json").read_text())["problems"]
    assert found["image_empty"] == {"count": 1, "first": "1/0004.png"}
    assert found["image_not_an_image"]["count"] == 1
    for path in (folder / "photos").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(RuntimeError, match="None of the 25 items can be read"):
        embed.embed(model, items, "none", on_error="skip")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: ("photos", {"shard_size": 5}), "shard_size=10, not 5; name another folder."),
        (lambda m: ("photos", {"file_format": "parquet"}), "file_format='npy', not 'parquet'"),
        (lambda m: ("photos/1", {}), "inputs='25 images "),
    ],
)
def test_folder_of_other_embeddings_is_refused(model, folder, change, message):
    embed.embed(model, embed.open_images("photos"), "out", shard_size=10)
    spec, options = change(model)
    with pytest.raises(ValueError) as error:
        embed.embed(model, embed.open_images(spec), "out", **({"shard_size": 10} | options))
    assert str(error.value).startswith("out holds embeddings with ") and message in str(error.value)


def test_replaced_inputs_of_the_same_names_and_number_are_refused_a_copy_goes_on(
    model, folder, capfd
):
    rows = [{"image": f"{n}/{n:04d}.png", "captions": [f"text {n}"]} for n in range(3)]
    write_table(folder / "t.jsonl", rows)
    (folder / "t.txt").write_text("one\ntwo\n")
    inputs = {
        "photos": lambda where: embed.open_images(f"{where}/photos"),
        "pairs": lambda where: embed.open_texts(f"{where}/t.jsonl?images={where}/photos"),
        "lines": lambda where: embed.open_texts(f"{where}/t.txt"),
    }
    for out, open_inputs in inputs.items():
        embed.embed(model, open_inputs(folder), out + "_z", shard_size=2)
    for name in ("photos", "t.jsonl", "t.txt"):
        os.renames(name, f"moved/{name}")  # and elsewhere
    for out, open_inputs in inputs.items():
        counts = embed.embed(model, open_inputs(folder / "moved"), out + "_z", shard_size=2)
        assert counts["shards_found"] == counts["shards"]
    rows[1]["captions"] = ["text 7"]
    write_table(folder / "moved" / "t.jsonl", rows)
    (folder / "moved" / "t.txt").write_text("one\n2wo\n")
    make_photos(folder / "other", 26)
    shutil.copy(folder / "other" / "1" / "0025.png", folder / "moved" / "photos" / "0" / "0003.png")
    before = snapshot(folder)
    for out, open_inputs in inputs.items():
        with pytest.raises(ValueError, match=f"{out}_z holds embeddings with inputs="):
            embed.embed(model, open_inputs(folder / "moved"), out + "_z", shard_size=2)
    assert snapshot(folder) == before


def test_manifest_of_an_older_version_opens_with_a_note(model, folder, capfd):
    embed.embed(model, embed.open_images("photos"), "out", shard_size=10)
    path = folder / "out" / "manifest.json"
    new = path.read_text()
    for old, code in (("25 images, names 0a1b", 0), ("24 images, names 0a1b", 2)):
        path.write_text(json.dumps(json.loads(new) | {"inputs": old}))
        command = ["embed", "--model", "model", "--images", "photos", "--out", "out"]
        assert cli.main([*command, "--shard-size", "10"]) == code
        printed = capfd.readouterr().err
        assert ("of a version that did not record what its inputs held" in printed) == (code == 0)
        assert (path.read_text() == new) == (code == 0)


def test_second_embed_into_one_folder_and_a_bucket_are_refused(model, folder):
    items = embed.open_images("photos")
    with writing.locked("out", "align embed"):
        with pytest.raises(ValueError, match=r"out is in use by align embed, process \d+ on "):
            embed.embed(model, items, "out")
    with pytest.raises(ValueError, match="--out gs://bucket/x: gs:// is not a file system here"):
        embed.embed(model, items, "gs://bucket/x")
    assert not os.path.exists("out") and not os.path.exists("gs:")


def test_folder_of_another_model_or_of_other_files_is_refused(model, folder, tiny_hf):
    items = embed.open_images("photos")
    embed.embed(model, items, "out")
    half = align_jax.load(tiny_hf[0], dtype="bfloat16")
    with pytest.raises(ValueError, match="out holds embeddings with model='"):
        embed.embed(half, items, "out")
    with pytest.raises(ValueError, match="photos holds other files; name a new folder."):
        embed.embed(model, items, "photos")


def test_keys_of_every_kind_of_source(model, folder):
    with zipfile.ZipFile("a.zip", "w") as archive:
        archive.write("photos/0/0000.png", "x/0.png")
        archive.writestr("notes.txt", "no image")
    shutil.copy("a.zip", "b.zip")
    rows = [{"image": "0/0000.png", "captions": ["a cat", "one cat"]}]
    write_table(folder / "table.jsonl", rows)

    def keys(items):
        return [key for index in range(items.count) for key, _ in items.read(index)]

    assert keys(embed.open_images("photos/0/0000.png")) == ["photos/0/0000.png"]
    assert keys(embed.open_images("photos/*/000[01].png")) == [
        "photos/0/0000.png",
        "photos/1/0001.png",
    ]
    assert keys(embed.open_images("a.zip")) == ["x/0.png"]
    assert keys(embed.open_images("*.zip")) == ["a.zip/x/0.png", "b.zip/x/0.png"]
    pairs = "table.jsonl?images=photos"
    assert keys(embed.open_images(pairs)) == ["0/0000.png"]
    assert keys(embed.open_texts(pairs)) == ["0/0000.png#0", "0/0000.png#1"]
    assert len(keys(embed.open_images("scenes?size=3"))) == 3
    (folder / "texts.txt").write_text("a cat\n\na dog\n")
    assert keys(embed.open_texts("texts.txt")) == ["1", "2", "3"]


def test_texts_are_embedded_with_line_numbers(model, folder):
    texts = [f"a cat number {n} " * (n % 5) for n in range(23)]
    (folder / "texts.txt").write_text("\n".join(texts))
    embed.embed(model, embed.open_texts("texts.txt"), "out", shard_size=10)
    rows = read_npy(folder / "out")
    assert list(rows) == [str(n) for n in range(1, 24)]
    np.testing.assert_allclose(list(rows.values()), model.encode_text(texts), atol=1e-5)


def test_other_texts_under_the_same_name_are_refused(model, folder):
    rows = [{"image": "0/0000.png", "captions": ["a cat", " "]}]
    rows += [{"image": "1/0001.png", "captions": [" "]}]
    write_table(folder / "t.jsonl", rows)
    spec = "t.jsonl?images=photos"
    counts = embed.embed(model, embed.open_texts(spec), "out")
    assert (counts["rows"], counts["skipped"]) == (1, 1)
    found = json.loads((folder / "out" / "report.json").read_text())["problems"]
    assert found["caption_empty"]["count"] == 1
    rows[0]["captions"] = ["a dog", " "]
    write_table(folder / "t.jsonl", rows)
    with pytest.raises(ValueError, match="out holds embeddings with inputs="):
        embed.embed(model, embed.open_texts(spec), "out")
    shutil.move("photos", "moved")
    shutil.move("t.jsonl", "u.jsonl")
    rows[0]["captions"] = ["a cat", " "]
    write_table(folder / "u.jsonl", rows)
    counts = embed.embed(model, embed.open_texts("u.jsonl?images=moved"), "out")
    assert counts["shards_found"] == 1


def test_parquet_without_pyarrow_says_what_to_install(monkeypatch):
    monkeypatch.setattr(embed.importlib.util, "find_spec", lambda name: None)
    embed.check_format("npy")
    with pytest.raises(ValueError, match=r"pip install 'align_jax\[parquet\]', or --format npy"):
        embed.check_format("parquet")


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["npy", "parquet"])
def test_killed_run_of_1000_images_loses_and_doubles_no_row(folder, tmp_path, file_format):
    make_photos(folder / "many", 1000)
    command = ("embed", "--model", "model", "--images", "many", "--out", "out")
    command += ("--shard-size", "60", "--format", file_format, "--batch-size", "16")
    env = environment(tmp_path / "cache")
    process = start_align(*command, cwd=folder, env=env)
    out = folder / "out"
    deadline_s = time.monotonic() + 120
    while len(list(out.glob(f"*.{file_format}"))) < 8 and time.monotonic() < deadline_s:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    found = len(list(out.glob(f"*.{file_format}")))
    assert 8 <= found < 17
    done = run_align(*command, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"out: 1,000 rows in 17 shards ({found} were there), 0 items left out\n"
    if file_format == "npy":
        keys = list(read_npy(out))
    else:
        tables = map(parquet.read_table, sorted(out.glob("*.parquet")))
        keys = pyarrow.concat_tables(tables)["key"].to_pylist()
    assert keys == names_in(folder / "many")
    assert not list(out.glob("*.tmp"))


def test_embed_verb_prints_counts_and_continues(folder, capsys):
    command = ["embed", "--model", "model", "--images", "photos", "--out", "out"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out == (
        "out: 25 rows in 1 shards (0 were there), 0 items left out\n"
    )
    assert cli.main(command) == 0
    assert "(1 were there)" in capsys.readouterr().out
    assert len(read_npy(folder / "out")) == 25


def test_classify_verb_prints_a_table_of_probabilities(model, folder, capsys):
    images = ["photos/0/0000.png", "photos/1/0001.png"]
    command = ["classify", *images, "--model", "model", "--labels", "cat, red square"]
    assert cli.main([*command, "--templates", "{}", "a photo of a {}"]) == 0
    header, line, *rows = capsys.readouterr().out.splitlines()
    assert header.split("  ")[-2:] == ["   cat", "red square"] or "red square" in header
    wanted = model.classify(images, ["cat", "red square"], ("{}", "a photo of a {}"))
    for row, image, probabilities in zip(rows, images, wanted, strict=True):
        name, *cells = row.split()
        assert name == image
        np.testing.assert_allclose([float(cell) for cell in cells], probabilities, atol=1e-4)


def test_many_labels_are_shown_best_first():
    labels = [f"label {n}" for n in range(9)]
    probabilities = np.array([[0, 0.1, 0.4, 0.05, 0.2, 0.05, 0.15, 0.03, 0.02]])
    _, _, row = tables.format_probabilities(["a.jpg"], labels, probabilities).splitlines()
    assert (
        row.split()
        == (
            "a.jpg label 2 0.4000 label 4 0.2000 label 6 0.1500 label 1 0.1000 label 3 0.0500 "
            "label 5 0.0500"
        ).split()
    )


def test_labels_may_come_from_a_file(folder, capsys):
    (folder / "labels.txt").write_text("cat\nred, or orange, square\n")
    command = ["classify", "photos/0/0000.png", "--model", "model", "--labels", "labels.txt"]
    assert cli.main(command) == 0
    assert "red, or orange, square" in capsys.readouterr().out.splitlines()[0]


def test_workdir_converts_to_a_folder_with_the_same_embeddings(inside, tmp_path, capsys):
    assert cli.main(["convert", "run", str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'hf'}\n"
    ours, theirs = align_jax.load("run"), align_jax.load(tmp_path / "hf")
    assert (ours.origin.name, ours.origin.step) == ("run", 10)
    images = [f"images/{n}.jpg" for n in range(4)]
    # The image projection was folded into the last block: other roundings.
    np.testing.assert_allclose(theirs.encode_image(images), ours.encode_image(images), atol=1e-5)
    texts = ["a red square", "one thing"]
    np.testing.assert_allclose(theirs.encode_text(texts), ours.encode_text(texts), atol=1e-6)
    assert theirs.preprocessing == ours.preprocessing
    card = (tmp_path / "hf" / "README.md").read_text()
    for fact in (
        "# run",
        "| data | `data?split=train` |",
        "| steps | 10 of 10 |",
        "| pairs seen | 80 |",
        "| global batch | 8 pairs |",
    ):
        assert fact in card
    _, info = AlignModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_folder_converts_to_the_same_tensors(folder):
    assert cli.main(["convert", "model", "again"]) == 0
    weights = "model.safetensors"
    first, second = align_jax.load("model"), align_jax.load("again")
    assert first.fingerprint() == second.fingerprint()
    assert cli.main(["convert", "again", "third"]) == 0
    assert (folder / "again" / weights).read_bytes() == (folder / "third" / weights).read_bytes()


def test_eval_takes_a_hugging_face_folder(folder, capsys):
    command = [
        "eval",
        "--model",
        "model",
        "--retrieval",
        f"scenes?size=8&image_size_px={IMAGE_SIZE}",
    ]
    assert cli.main(command) == 0
    assert "retrieval [%]" in capsys.readouterr().out
    assert not (folder / "model" / "eval").exists()
    assert cli.main([*command, "--out", "results.json"]) == 0
    assert "retrieval/mean_recall" in json.loads((folder / "results.json").read_text())["results"]


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


def pickled_code(folder):
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"temperature": Exploit()}))
        archive.writestr("archive/version", "3\n")


def legacy_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"temperature": Exploit()}))


def change_config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda f: truncate(f / "model.safetensors", 5000), ["model.safetensors", "truncated"]),
        (lambda f: truncate(f / "model.safetensors", 4), ["model.safetensors"]),
        (lambda f: truncate(f / "model.safetensors", 0), ["model.safetensors", "0 bytes"]),
        (lambda f: (f / "model.safetensors").write_text("<html>"), ["model.safetensors"]),
        (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors"]),
        (pickled_code, ["pytorch_model.bin"]),
        (legacy_pickle, ["pytorch_model.bin"]),
        (lambda f: (f / "config.json").write_text("<html>"), ["config.json cannot be used"]),
        (lambda f: (f / "config.json").unlink(), ["config.json is missing"]),
        (change_config(model_type="clip"), ["'clip'"]),
        (change_config(projection_dim=64), ["projection_dim"]),
        (change_config(text_config={"hidden_size": 48, "vocab_size": 200}), ["text_model"]),
        (lambda f: (f / "vocab.txt").write_text("") or (f / "tokenizer.json").unlink(), ["vocab"]),
        (lambda f: (f / "processor_config.json").write_text("{"), ["processor_config.json"]),
    ],
)
def test_damaged_model_is_one_line_and_runs_no_code(folder, capfd, damage, parts):
    damage(folder / "model")
    message = error_of(
        capfd, "classify", "photos/0/0000.png", "--model", "model", "--labels", "cat,dog"
    )
    for part in parts:
        assert part in message
    assert not (folder / "exploited").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("classify", "page.jpg", "--model", "model", "--labels", "a"), "page.jpg: Not an image "),
        (("classify", "none.jpg", "--model", "model", "--labels", "a"), "none.jpg: No such file "),
        (("classify", "page.jpg", "--model", "model", "--labels", ","), "--labels ',' names no "),
        (("classify", "page.jpg", "--model", "model", "--labels", "no.txt"), "no.txt: No such "),
        (("classify", "page.jpg", "--model", "none", "--labels", "a"), "none does not exist; name"),
        (("classify", "page.jpg", "--model", "page.jpg", "--labels", "a"), "page.jpg is a file; "),
        (("embed", "--model", "model", "--images", "none", "--out", "o"), "none does not exist; "),
        (("embed", "--model", "model", "--texts", "none.txt", "--out", "o"), "none.txt does not"),
        (
            ("embed", "--model", "photos", "--images", "photos", "--out", "o"),
            "photos is no model",
        ),
        (
            ("embed", "--model", "model", "--images", "photos", "--out", "page.jpg"),
            "page.jpg is a ",
        ),
        (("convert", "model", "page.jpg"), "page.jpg is a file; name a folder."),
        (("eval", "--model", "model"), "model has no evaluator to run: give --config, "),
    ],
)
def test_wrong_input_is_one_line(folder, capfd, arguments, message):
    (folder / "page.jpg").write_text("<html>404</html>")
    assert error_of(capfd, *arguments).startswith(message)


def test_conversion_over_a_workdir_is_refused(inside, capfd):
    assert error_of(capfd, "convert", "run", "run") == "run is a workdir; name another folder."


def test_conversion_keeps_files_of_others_and_goes_on_after_a_kill(folder, capfd):
    mine = folder / "mine"
    mine.mkdir()
    for name in ("README.md", "vocab.txt"):
        (mine / name).write_text("cut")
    assert "mine holds other files, README.md first;" in error_of(capfd, "convert", "model", "mine")
    (mine / "README.md").unlink()
    assert cli.main(["convert", "model", "mine"]) == 0
    ours = {*processor.FILES, "README.md", "model.safetensors", "config.json"}
    assert {*os.listdir(mine)} == ours
    shutil.rmtree(mine)


def test_conversion_over_a_model_is_refused_before_anything_is_read(folder, capfd):
    before = snapshot(folder / "model")
    said = "model holds a model already; name a new folder."
    assert error_of(capfd, "convert", "nothing", "model") == said
    assert snapshot(folder / "model") == before
