"""curate/score.py: cosines of pairs as columns, and the rules that filter by their rank."""

import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curate_helpers import reasons
from helpers import environment, error_of, make_pairs, snapshot

import align_jax
from align_jax.cli import main as cli
from align_jax.curate.scan import scan
from align_jax.curate.score import score
from align_jax.data.sources.open_source import open_source

PAIRS = "captions.jsonl?images=images"
PROMPTS = {"unwanted": ["a photo of a cat", "two red squares"], "nice": ["a dog"]}


@pytest.fixture(scope="module")
def model(tiny_hf):
    return align_jax.load(tiny_hf[0], batch_size=8)


@pytest.fixture
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cosines(model, names, texts):
    """In float64, one image and one text a call."""
    z_image = np.concatenate([model.encode_image([f"images/{name}"]) for name in names])
    z_text = np.concatenate([model.encode_text([text]) for text in texts])
    return (z_image.astype(np.float64) * z_text.astype(np.float64)).sum(axis=1)


def test_scores_are_the_cosines_of_images_and_texts(inside, model):
    make_pairs(inside, 7)
    made = score(open_source(PAIRS), "s.parquet", model, texts=PROMPTS, part_size=3)
    table = pq.read_table("s.parquet").to_pydict()
    assert [*table] == ["key", "text", "index", "similarity", "unwanted", "nice"]
    assert table["key"] == [f"{n}.jpg" for n in range(7) for _ in range(3)]
    assert table["index"] == [n for n in range(7) for _ in range(3)]
    wanted = cosines(model, table["key"], table["text"])
    np.testing.assert_allclose(table["similarity"], wanted, rtol=0, atol=1e-6)
    assert np.ptp(wanted) > 1e-3
    for name, texts in PROMPTS.items():
        each = [cosines(model, table["key"], [text] * 21) for text in texts]
        np.testing.assert_allclose(table[name], np.max(each, axis=0), rtol=0, atol=1e-6)
    assert made["rows"] == made["scored"] == 21 and made["problems"] == {}
    assert made["quantiles"]["similarity"]["0.5"] == round(float(np.median(wanted)), 4)


def test_rows_of_a_table_keep_order_and_columns(inside, model):
    make_pairs(inside, 5)
    (inside / "images" / "3.jpg").write_bytes(b"no image")
    keys = ["4.jpg", "0.jpg", "gone.jpg", "3.jpg", "4.jpg"]
    texts = ["a dog", "a cat", "a cow", "a cow", ""]
    table = {"uid": list("abcde"), "key": keys, "similarity": [9.0] * 5, "text": texts}
    for number, part in enumerate((slice(0, 2), slice(2, 5))):
        rows = {name: column[part] for name, column in table.items()}
        pq.write_table(pa.table(rows), f"t{number}.parquet")
    parts = ["t0.parquet", "t1.parquet"]
    made = score(open_source(PAIRS), "s.parquet", model, table=parts, texts={"nice": ["a dog"]})
    scored = pq.read_table("s.parquet").to_pydict()
    assert [*scored] == ["uid", "key", "similarity", "text", "nice"]
    assert scored["uid"] == table["uid"] and scored["key"] == keys
    wanted = cosines(model, keys[:2], texts[:2])
    np.testing.assert_allclose(scored["similarity"][:2], wanted, rtol=0, atol=1e-6)
    assert scored["similarity"][2:] == [None] * 3
    assert [value is None for value in scored["nice"]] == [False, False, True, True, False]
    counts = {reason: entry["count"] for reason, entry in made["problems"].items()}
    assert counts == {"record_missing": 1, "image_not_an_image": 1}
    assert (made["rows"], made["scored"]) == (5, 2)


def test_scores_rerun_after_kill_9_are_the_bytes_of_an_undisturbed_run(inside, model, tiny_hf):
    make_pairs(inside, 8)
    score(open_source(PAIRS), "whole.parquet", model, part_size=2)
    code = (
        "import time; import align_jax; from align_jax.curate import score as s\n"
        "from align_jax.data.sources.open_source import open_source\n"
        "make = s._Scorer.records\n"
        "def slow(self, indices):\n    time.sleep(0.3)\n    return make(self, indices)\n"
        "s._Scorer.records = slow\n"
        f"model = align_jax.load({str(tiny_hf[0])!r}, batch_size=8)\n"
        f"s.score(open_source({PAIRS!r}), 'out.parquet', model, part_size=2)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment(JAX_NUM_CPU_DEVICES="8")
    )
    parts = inside / ".out.parquet.parts"
    deadline_s = time.monotonic() + 120
    while len(list(parts.glob("*.parquet"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.parquet")}
    assert 2 <= len(before) < 4 and not (inside / "out.parquet").exists()
    score(open_source(PAIRS), "out.parquet", model, part_size=2)
    assert (inside / "out.parquet").read_bytes() == (inside / "whole.parquet").read_bytes()
    assert not parts.exists()


def test_scan_is_scored_and_its_best_pairs_kept(inside, tiny_hf, capsys):
    make_pairs(inside, 6)
    scan(PAIRS, "scan.parquet")
    (inside / "prompts.txt").write_text("a photo of a cat\n\ntwo red squares\n")
    arguments = ["score", PAIRS, "--model", str(tiny_hf[0]), "--table", "scan.parquet"]
    arguments += ["--text", "unwanted=prompts.txt", "--out", "s.parquet"]
    assert cli.main(arguments) == 0
    table = pq.read_table("s.parquet")
    assert table.num_rows == 18 and table["unwanted"].null_count == 0
    (inside / "p.py").write_text(
        "from align_jax.curate.filter import rules\n"
        "RULES = [rules.top_share('similarity', 0.3, source='a test')]\n"
    )
    assert cli.main(["curate", "s.parquet", "--preset", "p.py", "--out", "cur"]) == 0
    kept = pq.read_table("cur/kept.parquet")["similarity"].to_pylist()
    values = -np.sort(-table["similarity"].to_numpy())
    assert len(kept) == (values >= values[int(18 * 0.3)]).sum()
    assert min(kept) == values[int(18 * 0.3)]


def test_top_share_keeps_what_datacomp_keeps(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 40, 101).astype(np.float32) / 7  # ties, no short decimals
    column = pa.array(values, mask=np.arange(101) % 10 == 3)
    found = reasons(
        tmp_path, {"text": ["a"] * 101, "similarity": column}, "top_share('similarity', 0.3)"
    )
    # get_threshold of its apply_filter.py: missing values are sorted to the end.
    given = np.where(np.arange(101) % 10 == 3, np.nan, values)
    threshold = -np.sort(-given)[int(101 * 0.3)]
    assert sorted(set(range(101)) - set(found)) == np.flatnonzero(given >= threshold).tolist()
    few = {"text": ["a"] * 3, "similarity": [None, None, 0.5]}
    assert sorted(reasons(tmp_path / "f", few, "top_share('similarity', 0.5)")) == [0, 1]


@pytest.mark.parametrize(("share", "stay"), [(0.3, 4), (0.28, 3), (0.01, 1), (0.99, 10)])
def test_top_share_of_ten_different_values_keeps_one_more_than_their_place(tmp_path, share, stay):
    values = [0.7, 0.1, 0.9, 0.3, 0.0, 0.5, 0.8, 0.2, 0.6, 0.4]
    table = {"text": ["a"] * 10, "similarity": values}
    found = reasons(tmp_path, table, f"top_share('similarity', {share})")
    # the value at place int(10 * share) from the highest, counted from 0, is the least that stays
    kept = [value for row, value in enumerate(values) if row not in found]
    assert sorted(kept) == sorted(values)[10 - stay :]


def test_wrong_scores_are_one_line(inside, capfd, tiny_hf):
    make_pairs(inside, 2)
    pq.write_table(pa.table({"key": ["0.jpg"]}), "t.parquet")
    (inside / "empty.txt").write_text("\n")
    before = ("score", PAIRS, "--model", tiny_hf[0], "--out", "s.parquet")
    for arguments, message in (
        (("--table", "t.parquet"), "--table t.parquet has no column text: it has key"),
        (("--table", "captions.jsonl"), "is no Parquet file"),
        (("--text", "nice"), "--text 'nice' is not of the form NAME=VALUE."),
        (("--text", "nice=empty.txt"), "column 'nice' has no text"),
        (("--column", "key"), "a column 'key' is there already"),
        (("--part-size", "0"), "--part-size 0 must be at least 1."),
    ):
        assert message in error_of(capfd, *before, *arguments)
    assert snapshot(".")
