"""`align index` and `align search` as a user runs them: sources, reruns, kills, bad input."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import environment, error_of, run_align, write_table
from PIL import Image
from search_helpers import DIM, FakeModel, exact, rows_of, unit

import align_jax
from align_jax import align
from align_jax.cli import main as cli
from align_jax.data.sources.open_source import InMemory, open_source
from align_jax.data.sources.record import Record
from align_jax.search import ingest
from align_jax.search.index import Index


def run(capsys, *arguments):
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def model(project):
    return align.load(project / "run")


@pytest.fixture(autouse=True)
def loaded_once(project, model, monkeypatch):
    """Verbs of this process share the model of `project`, which is read once."""
    load = align.load

    def load_once(path, **options):
        return model if str(path) == str(project / "run") else load(path, **options)

    monkeypatch.setattr(align, "load", load_once)


@pytest.fixture(scope="module")
def photos(project, model, tmp_path_factory):
    """An index of 150 scenes and their captions, of the model of `project`."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    with align_jax.open_index(folder, model) as index:
        ingest.add(index, model, "scenes?size=150&seed=3", kind="both")
    return folder


def test_rows_of_pairs_are_images_and_captions(photos, model):
    source = ingest.open_source("scenes?size=150&seed=3")
    rows = rows_of(photos)
    images = [source[i] for i in range(150)]
    texts = {f"{r.key}#{n}": t for r in images for n, t in enumerate(r.captions) if t.strip()}
    assert set(rows) == {record.key for record in images} | set(texts)
    z = model.encode_image([record.image for record in images])
    for number, record in enumerate(images):
        row, vector = rows[record.key]
        assert (row.kind, row.source) == ("image", f"scenes?size=150&seed=3#{number}")
        assert row.caption == next(text for text in record.captions if text.strip())
        np.testing.assert_allclose(vector, z[number], atol=1e-6)
        if number < 3:
            picture = ingest.Pictures().read(row.key, row.source)
            np.testing.assert_array_equal(picture, record.image)
    for key, text in texts.items():
        assert rows[key][0].kind == "text" and rows[key][0].caption == text


def test_columns_of_a_record_come_along(monkeypatch):
    pairs = [
        Record("a", np.zeros((8, 8, 3), np.uint8), ("a cat",), metadata={"license": "CC", "n": 2}),
        Record("b", np.ones((8, 8, 3), np.uint8), ("a dog",)),
    ]
    monkeypatch.setattr(ingest, "open_source", lambda spec: InMemory(pairs))
    items = ingest.open_items("memory", "both")
    rows = [row for number in range(2) for row, _ in items.read(number)]
    assert [row.key for row in rows] == ["a", "a#0", "b", "b#0"]
    assert [row.metadata for row in rows] == [{"license": "CC", "n": 2}] * 2 + [{}] * 2


def test_found_is_what_exact_numpy_finds_both_ways(photos, model):
    rows = rows_of(photos)
    by_kind = {
        kind: [(key, z) for key, (row, z) in rows.items() if row.kind == kind]
        for kind in ("image", "text")
    }
    with align_jax.open_index(photos, model) as index:
        for asked, wanted in (("text", "image"), ("image", "text")):
            z_query = np.array([z for _, z in by_kind[asked][:100]])
            z_index = np.array([z for _, z in by_kind[wanted]])
            best = z_query.astype(np.float64) @ z_index.T
            found = index.search(z_query, k=10, filter={"kind": wanted})
            keys = [key for key, _ in by_kind[wanted]]
            for query, hits in enumerate(found):
                places = [keys.index(hit.key) for hit in hits]
                # Rows whose scores agree to 1e-6 may change places.
                wants = np.sort(best[query])[::-1][:10]
                np.testing.assert_allclose(best[query][places], wants, atol=1e-6)


class Colours(FakeModel):
    """Pictures become unit vectors by their pixels, as texts do by their letters."""

    def encode_image(self, images, *, on_error="raise"):
        pixels = (image() if callable(image) else image for image in images)
        small = np.stack([p[::8, ::8].ravel() for p in pixels]).astype(np.float64)
        mixed = (small - 128) @ np.random.default_rng(0).normal(size=(small.shape[1], DIM))
        return unit(mixed)


def test_a_thousand_scenes_both_ways_equal_exact_numpy_for_200_queries(tmp_path):
    source, asked = open_source("scenes?size=1000&seed=7"), open_source("scenes?size=200&seed=8")
    model = Colours()
    z_image = model.encode_image([source[row].image for row in range(1000)])
    texts = [text for row in range(1000) for text in source.captions(row) if text.strip()]
    z_text = model.encode_text(texts)
    queries = model.encode_image([asked[row].image for row in range(200)])
    words = [text for row in range(200) for text in asked.captions(row) if text.strip()][:200]
    with align_jax.open_index(tmp_path / "index", model) as index:
        counts = ingest.add(index, model, "scenes?size=1000&seed=7", kind="both")
        assert counts["added"] == 1000 + len(texts)
        for query, kind, z in (
            (queries, "text", z_text),
            (model.encode_text(words), "image", z_image),
        ):
            answers = index.search(query, k=10, filter={"kind": kind})
            cosines = query.astype(np.float64) @ z.T
            best = -np.sort(-cosines, axis=1)[:, :10]
            for hits, row, wanted in zip(answers, cosines, best, strict=True):
                # Captions that are equal share their score: the rows of the first may differ.
                np.testing.assert_allclose([hit.score for hit in hits], wanted, atol=2e-6)
                if kind == "image":
                    places = [int(hit.key.rpartition("_")[2]) for hit in hits]
                    np.testing.assert_allclose(row[places], wanted, atol=2e-6)
                else:
                    own = {text: score for text, score in zip(texts, row, strict=True)}
                    found = [own[hit.caption] for hit in hits]
                    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_adding_again_embeds_nothing(photos, model, monkeypatch):
    before = rows_of(photos)
    for name in ("encode_image", "encode_text"):
        monkeypatch.setattr(model, name, None)
    with align_jax.open_index(photos, model) as index:
        counts = ingest.add(index, model, "scenes?size=150&seed=3", kind="both")
    assert counts == {"added": 0, "updated": 0, "unchanged": len(before), "problems": {}}


@pytest.fixture
def pairs(tmp_path):
    """A folder with captions.jsonl and images/."""
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(6):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(
            tmp_path / "images" / f"{number}.png"
        )
        rows.append({"image": f"{number}.png", "captions": [f"thing {number}"]})
    write_table(tmp_path / "captions.jsonl", rows)
    return tmp_path


def test_changed_captions_and_pictures_are_updated(pairs, model, project, capsys, monkeypatch):
    monkeypatch.chdir(pairs)
    spec, where = "captions.jsonl?images=images", ("--index", "index")
    add = ("index", "add", spec, "--model", project / "run", *where)
    assert "6 rows added, 0 updated, 0 unchanged, 6 in all" in run(capsys, *add)
    before = rows_of("index")
    Image.new("RGB", (40, 40), "red").save("images/2.png")
    text = (pairs / "captions.jsonl").read_text().replace("thing 4", "thing four")
    (pairs / "captions.jsonl").write_text(text)
    assert "0 rows added, 2 updated, 4 unchanged, 6 in all" in run(capsys, *add)
    after = rows_of("index")
    assert after["4.png"][0].caption == "thing four"
    (changed,) = (key for key in after if (before[key][1] != after[key][1]).any())
    assert changed == "2.png"
    # The source is found from any folder.
    assert before["0.png"][0].source.startswith(f"{pairs}/captions.jsonl?images={pairs}/images#")
    monkeypatch.chdir("/")
    picture = ingest.Pictures().read("2.png", after["2.png"][0].source)
    np.testing.assert_array_equal(picture, np.full((40, 40, 3), [255, 0, 0]))


def test_pictures_without_captions_and_texts_without_pictures(
    pairs, model, project, capsys, monkeypatch
):
    monkeypatch.chdir(pairs)
    (pairs / "words.txt").write_text("red\nblue\n")
    common = ("--model", project / "run", "--index", "index")
    assert "6 rows added" in run(capsys, "index", "add", "images", *common)
    out = run(capsys, "index", "add", "words.txt", "--kind", "text", *common)
    assert "2 rows added" in out and "8 in all" in out
    rows = rows_of("index")
    assert rows["1"][0].caption == "red" and rows["1"][0].kind == "text"
    row = rows["3.png"][0]
    picture = ingest.Pictures().read("3.png", row.source)
    np.testing.assert_array_equal(picture, np.asarray(Image.open("images/3.png")))


@pytest.mark.parametrize("file_format", ["npy", "parquet"])
def test_shards_of_align_embed_give_the_same_rows(
    file_format, pairs, model, project, capsys, monkeypatch
):
    monkeypatch.chdir(pairs)
    spec, run_ = "captions.jsonl?images=images", project / "run"
    (pairs / "images" / "1.png").write_bytes(b"no image")
    skip = ("--on-error", "skip")
    made = ("--out", "shards", "--format", file_format, "--shard-size", "4")
    run(capsys, "embed", "--model", run_, "--images", spec, *made, *skip)
    out = run(capsys, "index", "add", "shards", "--model", run_, "--index", "a")
    assert "5 rows added" in out
    out = run(capsys, "index", "add", spec, "--model", run_, "--index", "b", *skip)
    assert "5 rows added" in out and "left out: " in out and "1.png" in out
    left, right = rows_of("a"), rows_of("b")
    assert left.keys() == right.keys()
    for key, (row, z) in left.items():
        assert row == right[key][0]
        np.testing.assert_allclose(z, right[key][1], atol=1e-6)
    # Without its source, a shard still gives keys and vectors.
    (pairs / "captions.jsonl").unlink()
    (pairs / "shards" / "source.txt").unlink()
    run(capsys, "index", "add", "shards", "--model", run_, "--index", "c")
    assert rows_of("c").keys() == left.keys()


def test_shards_of_another_model_are_refused(pairs, monkeypatch):
    monkeypatch.chdir(pairs)
    (pairs / "shards").mkdir()
    manifest = {"kind": "image", "model": "f" * 16, "file_format": "npy", "shard_size": 4}
    (pairs / "shards" / "manifest.json").write_text(json.dumps(manifest))
    with align_jax.open_index("index", FakeModel()) as index:
        with pytest.raises(ValueError, match="embeddings of the model f{16}, the index of 0*one"):
            ingest.add(index, FakeModel(), "shards")


def test_row_that_cannot_be_used_stops_or_is_counted(pairs, model, project, capsys, monkeypatch):
    monkeypatch.chdir(pairs)
    (pairs / "images" / "3.png").write_bytes(b"no image")
    rows = [json.loads(line) for line in (pairs / "captions.jsonl").read_text().splitlines()]
    rows[4]["captions"] = ["x" * 70_000]
    write_table(pairs / "captions.jsonl", rows)
    add = ("index", "add", "captions.jsonl?images=images", "--model", project / "run")
    assert cli.main([str(part) for part in (*add, "--index", "index")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "4.png" in line and "70,000 bytes" in line and "--on-error skip" in line
    out = run(capsys, *add, "--index", "index", "--on-error", "skip")
    assert "4 rows added" in out and "4 in all" in out
    assert "first: 3.png" in out and "first: 4.png" in out


def test_key_that_a_source_gives_twice_loses_no_row_in_silence(tmp_path, model, monkeypatch):
    picture = np.zeros((8, 8, 3), np.uint8)
    records = [Record("a", picture, ("x",)), Record("b", picture, ("y",))]
    source = InMemory([*records, Record("a", picture, ("z",))])
    monkeypatch.setattr(ingest, "open_source", lambda spec: source)
    with align_jax.open_index(tmp_path / "index", model) as index:
        with pytest.raises(ValueError, match=r"a \(key_duplicate; --on-error skip"):
            ingest.add(index, model, "pairs")
        counts = ingest.add(index, model, "pairs", on_error="skip")
        assert counts["problems"] == {"key_duplicate": 1} and index.count() == 2
        assert index.search(image=picture, k=1, filter={"key": "a"})[0].caption == "x"


def test_search_prints_what_it_finds(photos, model, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = ingest.open_source("scenes?size=150&seed=3")[5]
    Image.fromarray(record.image).save("scene.png")
    rows = rows_of(photos)
    images = {key: z for key, (row, z) in rows.items() if row.kind == "image"}
    z = {text: model.encode_text([text])[0] for text in ("red", "blue", "a star")}
    picture = model.encode_image(["scene.png"])[0]
    common = ("--index", photos, "-k", 4, "--json")
    for query, vector in (
        (("--text", "a star"), z["a star"]),
        (("--image", "scene.png"), picture),
        (("--image", "scene.png", "--text", "red"), picture + 2 * z["red"]),
        (
            ("--image", "scene.png", "--add", "red", "--remove", "blue", "--weight", "0.5"),
            picture + 0.5 * (z["red"] - z["blue"]),
        ),
    ):
        hits = json.loads(run(capsys, "search", *common, *query))
        keys, best = zip(*images.items(), strict=True)
        (order,) = exact(unit(vector)[None], np.array(best), 4)
        scores = np.array(best)[order] @ unit(vector)
        np.testing.assert_allclose([hit["score"] for hit in hits], scores, atol=1e-6)
        assert all(hit["kind"] == "image" and hit["source"] for hit in hits)
    hits = json.loads(run(capsys, "search", *common, "--text", "red", "--kind", "text"))
    assert {hit["kind"] for hit in hits} == {"text"} and hits[0]["caption"]
    only = ("--filter", "key in scene_3_7,scene_3_8")
    hits = json.loads(run(capsys, "search", *common, "--text", "red", *only))
    assert {hit["key"] for hit in hits} == {"scene_3_7", "scene_3_8"}
    out = run(capsys, "search", "--index", photos, "--text", "red", "--gallery", "out/found.png")
    assert "wrote out/found.png" in out and len(out.splitlines()) == 12
    sheet = np.asarray(Image.open("out/found.png"))
    found = json.loads(run(capsys, "search", *common, "--text", "red"))[0]
    first = Image.fromarray(ingest.Pictures().read(found["key"], found["source"]))
    first = np.asarray(first.resize((148, 148), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(sheet[72 : 72 + 148, 342 : 342 + 148], first)


def test_recall_is_one_for_each_kind_of_query(photos, capsys):
    out = run(capsys, "index", "recall", "--index", photos, "--queries", 50)
    assert len(out.splitlines()) == 4
    for kind in ("text to image", "image to text", "image to image", "text to text"):
        assert f"{kind}  recall@10 1.0000  queries 50".replace(" ", "") in out.replace(" ", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("index add scenes --model m --index i --kind x", "argument --kind: invalid choice: 'x'"),
        ("index info", "the following arguments are required: --index"),
        ("search --index i -k ten", "argument -k: invalid int value: 'ten'"),
        ("search --index i --colour red", "unrecognised argument '--colour' of search"),
        ("bench index", "argument what: invalid choice: 'index'"),
    ],
)
def test_options_that_are_wrong_are_one_line(capfd, arguments, message):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments.split())
    (line,) = capfd.readouterr().err.splitlines()
    assert caught.value.code == 2 and line.startswith(f"align: {message}") and "--help" in line


def test_recall_of_no_hits_is_refused(photos, capfd):
    assert cli.main(["index", "recall", "--index", str(photos), "-k", "0"]) == 2
    assert "k=0 must be between 1 and 16,384" in capfd.readouterr().err


def test_recall_sees_what_an_index_loses(photos, monkeypatch):
    from align_jax.search.recall import measure_recall

    with Index(str(photos)) as index:
        whole = index.search
        monkeypatch.setattr(index, "search", lambda z, **how: [h[1:] for h in whole(z, **how)])
        found = measure_recall(index, 20)
    assert found["text to image"]["recall"] == pytest.approx(0.9)
    # An image finds itself first, and that is not counted.
    assert found["image to image"]["recall"] == pytest.approx(1.0)


def test_captions_are_the_queries_where_there_are_no_texts(tmp_path, model, capsys):
    with align_jax.open_index(tmp_path / "index", model) as index:
        ingest.add(index, model, "scenes?size=40&seed=3")
    out = run(capsys, "index", "recall", "--index", tmp_path / "index", "--queries", 30)
    assert "text to image  recall@10 1.0000  queries 30" in out


def test_copy_is_whole_and_a_rerun_adds_nothing(photos, tmp_path, capsys):
    to = tmp_path / "copy"
    before = rows_of(photos)
    for _ in range(2):
        out = run(capsys, "index", "copy", "--index", photos, "--to", to)
        assert f"{len(before):,} rows" in out
    after = rows_of(to)
    assert after.keys() == before.keys()
    for key, (row, z) in after.items():
        assert row == before[key][0]
        np.testing.assert_array_equal(z, before[key][1])
    with Index(str(photos)) as old, Index(str(to)) as new:
        assert old.identity == new.identity


def test_delete_by_file_and_by_filter(tmp_path, model, capsys):
    folder = tmp_path / "index"
    with align_jax.open_index(folder, model) as index:
        ingest.add(index, model, "scenes?size=20&seed=3", kind="both")
        texts = index.count({"kind": "text"})
    (tmp_path / "keys.txt").write_text("scene_3_1\nscene_3_2\nnobody\n")
    out = run(capsys, "index", "delete", "--index", folder, "--keys", tmp_path / "keys.txt")
    assert "2 rows deleted" in out
    out = run(capsys, "index", "delete", "--index", folder, "--filter", "kind=text")
    assert f"{texts} rows deleted" in out
    assert "rows           18" in run(capsys, "index", "info", "--index", folder)
    assert cli.main(["index", "delete", "--index", str(folder), "--filter", "knd=text"]) == 0
    said = "no row passes the filter on knd; fields of the first rows: key, kind, caption, source."
    assert capsys.readouterr().err.strip() == said


def test_few_rows_are_indexed_without_a_word_of_the_library(tmp_path):
    program = (
        "import sys, numpy as np\n"
        "from align_jax.search.index import Identity, Index\n"
        "with Index(sys.argv[1], Identity('0' * 16, 4)) as index:\n"
        "    index.add(['a', 'b'], np.eye(4, dtype=np.float32)[:2])\n"
        "    index.flush()\n"
        "    assert index.search(np.eye(4, dtype=np.float32)[1:2], k=1)[0][0].key == 'b'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "index")],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_large_folders_are_warned_of_and_refused(tmp_path, model, capsys, monkeypatch, project):
    add = ("index", "add", "scenes?size=20&seed=3", "--model", project / "run")
    monkeypatch.setattr(ingest, "LITE_MOST_ROWS", 20)
    monkeypatch.chdir(tmp_path)
    assert cli.main([str(part) for part in (*add, "--index", "index")]) == 2
    assert "20 rows; Milvus Lite is refused 20 and more" in capsys.readouterr().err
    monkeypatch.setattr(ingest, "LITE_COSTLY_ROWS", 15)
    assert cli.main([str(part) for part in (*add, "--index", "index", "--force")]) == 0
    assert "align index copy --index index --to http://host:19530" in capsys.readouterr().err


def test_foreign_model_changes_nothing(photos, tiny_hf, capsys, monkeypatch):
    monkeypatch.chdir(photos.parent)
    before = rows_of(photos)
    add = ("index", "add", "scenes?size=2", "--model", tiny_hf[0], "--index", "photos")
    for verb in (add, ("search", "--text", "a", "--model", tiny_hf[0], "--index", "photos")):
        assert cli.main([str(part) for part in verb]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        with Index("photos") as index:
            assert index.identity.fingerprint in line
        assert align.load(tiny_hf[0]).fingerprint() in line
    assert len(rows_of(photos)) == len(before)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("index", "info", "--index", "none"), "none holds no index; make one with"),
        (("index", "recall", "--index", "none"), "none holds no index"),
        (("index", "delete", "--index", "none", "--filter", "a=1"), "none holds no index"),
        (("index", "delete", "--index", "none"), "--keys FILE or --filter field=value"),
        (("index", "delete", "--index", "none", "--keys", "k.txt"), "k.txt: No such file"),
        (("index", "copy", "--index", "none", "--to", "b"), "none holds no index"),
        (("index", "copy", "--index", "none", "--to", "./none"), "--to ./none is the index itself"),
        (("search", "--index", "none", "--text", "a"), "none holds no index"),
        (("search", "--index", "none"), "--image FILE, --text TEXT, or both"),
        (("search", "--index", "none", "--image", "x.jpg"), "--image x.jpg does not exist"),
        (
            ("search", "--index", "none", "--image", "config.py", "--gallery", "./config.py"),
            "--gallery ./config.py is the picture of --image",
        ),
        (("search", "--index", "none", "--text", "a", "-k", "0"), "k=0 must be between 1 and"),
        (("search", "--index", "none", "--text", "a", "--filter", "x"), "--filter x is unknown"),
        (
            ("search", "--index", "none", "--text", "a", "--filter", '{"x": {"near": 1}}'),
            "filter x: 'near' is unknown",
        ),
        (("index", "add", "none.zip", "--model", "run", "--index", "i"), "none.zip"),
        (("index", "add", "w.txt", "--model", "run", "--index", "i"), "add --kind text"),
        (
            ("index", "add", "scenes?size=3", "--model", "nobody/nothing", "--index", "i"),
            "nobody/nothing",
        ),
        (
            (*"index add scenes?size=3 --model run --index i --index-type PQ".split(),),
            "index type 'PQ' is unknown; use one of: IVF_FLAT, HNSW",
        ),
        (
            (*"index add scenes?size=3 --model run --index other".split(),),
            "other holds other files; name a new folder",
        ),
        (
            (*"index add scenes?size=3 --model run --index config.py".split(),),
            "config.py is a file; an index is a folder",
        ),
    ],
)
def test_bad_input_is_one_line(inside, capfd, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (inside / "other").mkdir(exist_ok=True)
    (inside / "other" / "note.txt").write_text("mine")
    (inside / "w.txt").write_text("red\n")
    assert message in error_of(capfd, *arguments)


def test_server_that_does_not_answer_is_one_line(capfd):
    assert cli.main(["index", "info", "--index", "http://127.0.0.1:9"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("align: http://127.0.0.1:9: ")


def test_second_process_is_refused_and_works_afterwards(photos, tmp_path):
    env = environment()
    with Index(str(photos), work="align index add"):
        found = run_align("index", "info", "--index", photos, cwd=tmp_path, env=env)
        assert found.returncode == 2 and found.stdout == ""
        (line,) = found.stderr.splitlines()
        assert f"in use by align index add, process {os.getpid()} on" in line
    found = run_align("index", "info", "--index", photos, cwd=tmp_path, env=env)
    assert found.returncode == 0 and found.stderr == "" and "is_exact       True" in found.stdout
