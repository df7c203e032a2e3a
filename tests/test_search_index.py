"""The index against exact numpy; what it refuses; two processes, two models, reopening."""

import json
import os
import stat
import subprocess
import sys

import faiss
import numpy as np
import pytest
from helpers import environment
from search_helpers import DIM, FakeModel, exact, random_unit

import align_jax
from align_jax.search.index import Index, identity_of

NASTY = [
    'quote " and \' and ""',
    "back\\slash \\n \\",
    "emoji 😀 and כתב and \u202e",
    "line\nbreak\r\nand\ttab and \x00 and \x1b[31m",
    '" or 1 == 1 or key == "',
    "x" * 10_000,
    " ",
    "%_*",
]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "index"


def fill(index, count, seed=0, **columns):
    z = random_unit(count, seed=seed)
    index.add([f"k{i}" for i in range(count)], z, **columns)
    return z


def test_search_equals_exact_numpy(folder):
    with align_jax.open_index(folder, FakeModel()) as index:
        z = fill(index, 3000)
        index.flush()
    queries = random_unit(50, seed=1)
    expected = exact(queries, z, 10)
    with align_jax.open_index(folder) as index:
        # What the flush built in the background is complete after opening.
        (built,) = folder.rglob("*.idx")
        assert faiss.extract_index_ivf(faiss.read_index(str(built))).nlist == 1
        for hits, query, rows in zip(index.search(queries), queries, expected, strict=True):
            assert [hit.key for hit in hits] == [f"k{row}" for row in rows]
            np.testing.assert_allclose([hit.score for hit in hits], z[rows] @ query, atol=1e-6)


def test_rows_are_found_before_and_after_they_are_sealed_and_after_reopening(folder):
    z = random_unit(300)
    keys = [f"k{i}" for i in range(300)]

    def assert_whole(index):
        assert index.count() == 300
        assert [hits[0].key for hits in index.search(z, k=1)] == keys

    with align_jax.open_index(folder, FakeModel()) as index:
        index.add(keys[:150], z[:150])
        index.flush()
        index.add(keys[150:], z[150:])
        assert_whole(index)
    with align_jax.open_index(folder) as index:
        assert_whole(index)
        index.flush()
        assert_whole(index)


@pytest.mark.slow
def test_filters_that_keep_few_of_20000_rows_return_exactly_those_there_are(folder):
    count, queries = 20_000, random_unit(50, seed=1)
    rng = np.random.default_rng(2)
    kept = {f"of{size}": rng.choice(count, size, False) for size in (1000, 100, 20, 1)}
    chosen = {name: set(rows.tolist()) for name, rows in kept.items()}
    metadata = [{name: i in rows for name, rows in chosen.items()} for i in range(count)]
    with align_jax.open_index(folder, FakeModel()) as index:
        z = fill(index, count, metadata=metadata)
        index.flush()
        for name, rows in chosen.items():
            rows = np.array(sorted(rows))
            found = index.search(queries, k=30, filter={name: True})
            expected = rows[exact(queries, z[rows], min(30, len(rows)))]
            assert [[hit.key for hit in hits] for hits in found] == [
                [f"k{row}" for row in line] for line in expected
            ]


@pytest.mark.parametrize("index_type", ["IVF_FLAT", "HNSW"])
def test_selective_filters_return_all_there_are(folder, index_type):
    """HNSW of Milvus Lite returns fewer; they must be completed."""
    count, queries = 4000, random_unit(5, seed=1)
    kept = {"thousand": 1000, "hundred": 100, "twenty": 20, "one": 1}
    rng = np.random.default_rng(2)
    chosen = {name: set(rng.choice(count, size, False).tolist()) for name, size in kept.items()}
    metadata = [{name: i in rows for name, rows in chosen.items()} for i in range(count)]
    with align_jax.open_index(folder, FakeModel(), index_type=index_type) as index:
        z = fill(index, count, metadata=metadata)
        index.flush()
        for name, size in kept.items():
            assert index.count({name: True}) == size
            rows = np.array(sorted(chosen[name]))
            expected = rows[exact(queries, z[rows], 10)]
            found = index.search(queries, filter={name: True})
            assert all(len(hits) == min(10, size) for hits in found)
            if index_type == "IVF_FLAT" or size <= 20:
                assert [[hit.key for hit in hits] for hits in found] == [
                    [f"k{row}" for row in line] for line in expected
                ]


def test_texts_of_any_kind_come_back_equal_and_can_be_filtered_by(folder):
    columns = [{"note": text, "n": i} for i, text in enumerate(NASTY)]
    with align_jax.open_index(folder, FakeModel()) as index:
        z = random_unit(len(NASTY))
        index.add(NASTY, z, captions=NASTY, sources=NASTY, metadata=columns)
    with align_jax.open_index(folder) as index:
        for row, text in enumerate(NASTY):
            for field in ("key", "caption", "source", "note"):
                for condition in (text, {"in": [text, "other"]}, {"eq": text}):
                    (hit,) = index.search(z[row : row + 1], filter={field: condition})[0]
                    assert hit[0] == hit[3] == hit[4] == text
                    assert hit.metadata == columns[row]
        assert index.delete(NASTY[:4]) == 4
        assert index.delete(NASTY[:4]) == 0
        assert sorted(row.key for rows, _ in index.scan() for row in rows) == sorted(NASTY[4:])
        assert index.delete(filter={"note": {"in": NASTY[4:6]}}) == 2
        assert index.count() == 2


def test_adding_again_changes_only_what_has_changed(folder):
    with align_jax.open_index(folder, FakeModel()) as index:
        z = random_unit(20)
        keys = [f"k{i}" for i in range(20)]
        captions = [f"caption {i}" for i in range(20)]
        add = index.add
        assert add(keys, z, captions=captions) == {"added": 20, "updated": 0, "unchanged": 0}
        assert add(keys, z, captions=captions) == {"added": 0, "updated": 0, "unchanged": 20}
        captions[3] = "another"
        z[4] = z[5]
        assert add(keys, z, captions=captions) == {"added": 0, "updated": 2, "unchanged": 18}
        assert index.count() == 20
        (hit,) = index.search(z[3:4], k=1, filter={"key": "k3"})[0]
        assert hit.caption == "another"
        ((hit,),) = index.search(z[5:6], k=1, filter={"key": "k4"})
        assert hit.score == pytest.approx(1, abs=1e-6)


def test_deleted_rows_are_never_found_again(folder):
    with align_jax.open_index(folder, FakeModel()) as index:
        z = fill(index, 500)
        index.flush()
        gone = [f"k{i}" for i in range(0, 500, 5)]
        assert index.delete(gone) == 100
        assert index.count() == 400
    with align_jax.open_index(folder) as index:
        assert index.count() == 400
        found = index.search(z, k=20)
        assert not {hit.key for hits in found for hit in hits} & set(gone)
        assert all(len(hits) == 20 for hits in found)


def test_two_captions_of_one_picture_and_kinds_are_kept_apart(folder):
    with align_jax.open_index(folder, FakeModel()) as index:
        z = random_unit(4)
        index.add(["a", "b"], z[:2])
        index.add(["a#0", "a#1"], z[2:], kind="text", captions=["x", "y"])
        assert index.info()["rows_by_kind"] == {"image": 2, "text": 2}
        hits = index.search(z[:1], k=10, filter={"kind": "text"})[0]
        assert {(hit.key, hit.kind, hit.caption) for hit in hits} == {
            ("a#0", "text", "x"),
            ("a#1", "text", "y"),
        }


def test_another_model_is_refused_and_nothing_is_written(folder):
    with align_jax.open_index(folder, FakeModel("one")) as index:
        fill(index, 3)
    with pytest.raises(ValueError, match="0one .*/models/one.*, not of 0*two .*/models/two"):
        align_jax.open_index(folder, FakeModel("two"))
    with align_jax.open_index(folder) as index:
        assert index.count() == 3
        with pytest.raises(ValueError, match="holds embeddings of the model 0*one"):
            index.use_model(FakeModel("two"))


def test_folder_is_for_this_user_alone_and_says_what_it_is(folder):
    with align_jax.open_index(folder, FakeModel()) as index:
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        about = index.info()
    side = json.loads((folder / "align.json").read_text())
    assert side["fingerprint"] == about["fingerprint"] == FakeModel().fingerprint()
    assert side["dim"] == DIM and side["version"] == align_jax.__version__
    assert side["model"] == "/models/one" and about["is_exact"] and about["rows"] == 0


def test_no_port_is_opened(folder):
    def listening():
        with open("/proc/net/tcp") as ipv4, open("/proc/net/tcp6") as ipv6:
            return {line.split()[1] for file in (ipv4, ipv6) for line in file if " 0A " in line}

    if not os.path.exists("/proc/net/tcp6"):
        pytest.skip("no /proc")
    align_jax.open_index(folder / "warm", FakeModel()).close()
    before = listening()
    with align_jax.open_index(folder / "one", FakeModel()):
        assert not listening() - before


LOGGING = """
import logging, sys, align_jax
from align_jax.search.index import Identity, Index
handler = logging.FileHandler(sys.argv[1] + ".log")
logging.getLogger().addHandler(handler)
stream = handler.stream
with Index(sys.argv[1], Identity("f" * 16, 4)):
    logging.getLogger().warning("still here")
assert handler.stream is stream and not stream.closed and logging.getLogger().level == 30
"""


def test_logging_of_the_program_stays_as_it_is(tmp_path):
    command = [sys.executable, "-c", LOGGING, tmp_path / "index"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert (found.returncode, found.stderr) == (0, "")
    assert (tmp_path / "index.log").read_text() == "still here\n"


OTHER = """
import sys, align_jax
try:
    align_jax.open_index(sys.argv[1])
except ValueError as error:
    print(error)
    sys.exit(2)
"""


def test_second_process_is_told_who_has_the_index(folder):
    def other():
        command = [sys.executable, "-c", OTHER, folder]
        return subprocess.run(command, capture_output=True, text=True, env=environment())

    with align_jax.open_index(folder, FakeModel()) as index:
        fill(index, 3)
        with pytest.raises(ValueError, match=f"in use by .*process {os.getpid()} "):
            align_jax.open_index(folder)
        found = other()
        assert found.returncode == 2 and f"process {os.getpid()} " in found.stdout
        assert found.stderr == ""
        assert index.count() == 3
    assert other().returncode == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vectors": [[np.nan] * DIM]}, "k0: its vector is not finite"),
        ({"vectors": [[np.inf] + [0] * (DIM - 1)]}, "k0: its vector is not finite"),
        ({"vectors": [[0.5] + [0] * (DIM - 1)]}, "k0: its vector has norm 0.5, not 1"),
        ({"vectors": [[0] * DIM]}, "k0: its vector has norm 0, not 1"),
        ({"vectors": [[1, 0]]}, r"vectors are \[1, 2\]; this index takes \[1, 16\]"),
        ({"captions": ["ü" * 40_000]}, "k0: its caption has 80,000 bytes; at most 65,535 fit"),
        ({"sources": ["x" * 65_536]}, "k0: its source has 65,536 bytes"),
        ({"metadata": [{"x": "y" * 70_000}]}, "k0: its metadata has 70,"),
        ({"metadata": [{"x": float("nan")}]}, "k0: its metadata does not suit JSON"),
        ({"metadata": [{"x": {1}}]}, "k0: its metadata does not suit JSON"),
        ({"captions": ["\ud800"]}, "k0: its caption holds half a surrogate pair"),
        ({"keys": ["\udc00"]}, "its key holds half a surrogate pair"),
        ({"keys": [""]}, "A key is ''"),
        ({"keys": [7]}, "A key is 7"),
        ({"keys": ["x" * 70_000]}, "its key has 70,000 bytes"),
        ({"kind": "sound"}, "kind 'sound' is unknown; use image or text"),
        ({"captions": ["a", "b"]}, "zip"),
    ],
)
def test_row_that_cannot_be_kept_is_named(folder, change, message):
    good = {"keys": ["k0"], "vectors": random_unit(1)}
    with align_jax.open_index(folder, FakeModel()) as index:
        with pytest.raises(ValueError, match=message):
            index.add(**(good | change))
        assert index.count() == 0


def test_key_that_comes_twice_is_named(folder):
    with align_jax.open_index(folder, FakeModel()) as index:
        with pytest.raises(ValueError, match="k7: the key comes twice"):
            index.add(["k7", "k7"], random_unit(2))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": 0}, "k=0 must be between 1 and 16,384"),
        ({"k": 16_385}, "k=16385 must be between 1 and 16,384"),
        ({"vectors": np.full((1, DIM), np.nan)}, "query 0: its vector is not finite"),
        ({"vectors": np.ones((2, DIM))}, "query 0: its vector has norm 4, not 1"),
        ({"vectors": np.ones((2, 3))}, r"are \[2, 3\]; this index takes \[2, 16\]"),
        ({"vectors": None}, "needs an image or a text"),
        ({"vectors": None, "text": " "}, "' ' is no text to search by"),
        ({"vectors": None, "text": "a", "weight": float("nan")}, "weight=nan"),
        ({"filter": {"x": {"near": 3}}}, "filter x: 'near' is unknown"),
    ],
)
def test_bad_query_is_named(folder, change, message):
    with align_jax.open_index(folder, FakeModel()) as index:
        fill(index, 3)
        with pytest.raises(ValueError, match=message):
            index.search(**({"vectors": random_unit(1)} | change))


def test_search_by_words_needs_the_model(folder):
    align_jax.open_index(folder, FakeModel()).close()
    with align_jax.open_index(folder) as index:
        with pytest.raises(ValueError, match="needs the model"):
            index.search(text="red")


def test_search_by_words_and_pictures_finds_what_their_vectors_do(folder):
    model = FakeModel()
    with align_jax.open_index(folder, model) as index:
        words = ["red", "blue", "car", "boat"]
        index.add(words, model.encode_text(words), kind="text", captions=words)
        assert index.search(text="car", k=1)[0].key == "car"
        assert len(index.search(text="car")) == 4
        z = {word: model.encode_text([word])[0] for word in words}
        picture = model.encode_image(["p.jpg"])[0]
        for query, expected in (
            ({"image": "p.jpg"}, picture),
            ({"image": "p.jpg", "text": "car"}, picture + 2 * z["car"]),
            ({"image": "p.jpg", "add": ["car"], "weight": 3}, picture + 3 * z["car"]),
            ({"image": "p.jpg", "remove": ["car"]}, picture - 2 * z["car"]),
            (
                {"image": "p.jpg", "add": ["blue"], "remove": ["red"]},
                picture + z["blue"] - z["red"],
            ),
            (
                {"text": "car", "add": ["blue", "boat"], "remove": ["red"], "weight": 0.5},
                z["car"] + 0.5 * (z["blue"] + z["boat"] - z["red"]),
            ),
        ):
            expected = expected / np.linalg.norm(expected)
            hits = index.search(**query)
            for hit in hits:
                assert hit.score == pytest.approx(float(z[hit.key] @ expected), abs=1e-6)


def test_delete_without_a_condition_is_refused(folder):
    with align_jax.open_index(folder, FakeModel()) as index:
        fill(index, 3)
        for bad in ({"filter": {}}, {"filter": {"x": {}}}, {"keys": "k1"}):
            with pytest.raises(ValueError):
                index.delete(**bad)
        assert index.count() == 3


@pytest.mark.parametrize(
    "uri, message",
    [
        ("missing", "missing holds no index; make one with `align index add`"),
        ("file.txt", "file.txt is a file; an index is a folder"),
        ("other", "other holds no index"),
        ("gs://bucket/x", "gs:// is not a file system here"),
    ],
)
def test_place_without_an_index_is_named_and_left_alone(tmp_path, monkeypatch, uri, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("hello")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file.txt").write_text("hello")
    with pytest.raises(ValueError, match=message):
        align_jax.open_index(uri)
    if uri == "other":
        with pytest.raises(ValueError, match="other holds other files"):
            align_jax.open_index(uri, FakeModel())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file.txt", "file.txt", "other"]


def test_unknown_index_type_is_named(folder):
    with pytest.raises(ValueError, match="'PQ' is unknown; use one of: IVF_FLAT, HNSW"):
        align_jax.open_index(folder, FakeModel(), index_type="PQ")
    align_jax.open_index(folder, FakeModel()).close()
    with pytest.raises(ValueError, match="is an index of type IVF_FLAT"):
        align_jax.open_index(folder, FakeModel(), index_type="HNSW")


def test_server_that_is_not_there_is_one_line(capfd):
    with pytest.raises(RuntimeError, match="http://127.0.0.1:9: ") as raised:
        Index("http://user:secret@127.0.0.1:9", identity_of(FakeModel()))
    assert "secret" not in str(raised.value)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.skipif("ALIGN_MILVUS_URI" not in os.environ, reason="names no Milvus server")
def test_server_finds_what_exact_search_finds():
    uri = os.environ["ALIGN_MILVUS_URI"] + f"#test_{os.getpid()}"
    with align_jax.open_index(uri, FakeModel()) as index:
        z = fill(index, 2000, metadata=[{"even": i % 2 == 0} for i in range(2000)])
        index.flush()
        assert index.count() == 2000 and not index.info()["is_exact"]
        expected = exact(z[:50], z, 10)
        found = [[hit.key for hit in hits] for hits in index.search(z[:50])]
        same = [len(set(a) & {f"k{i}" for i in b}) for a, b in zip(found, expected, strict=True)]
        assert np.mean(same) >= 9.5
        assert len(index.search(z[:1], filter={"key": "k3"})[0]) == 1
        assert index.delete(filter={"even": True}) == 1000
        assert index.delete([f"k{i}" for i in range(2000)]) == 1000
