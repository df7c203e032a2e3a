"""filter/metaclip.py against a direct reading of its algorithm, and the entries it looks for."""

import hashlib
import json
import math
import shutil
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers import error_of, real_data

from align_jax.cli import main as cli
from align_jax.curate.filter import metaclip

pytest.importorskip("ahocorasick_rs")

ENTRIES = (
    "cat",
    "a cat",
    "cat cat",
    "New York",
    "York",
    "naïve",
    "猫",
    "?",
    "it's",
    "U . S",
    "two  spaces",
    "a",
    "zebra",
)
TEXTS = [
    "a cat",
    "cat cat cat",
    "Cat",
    "cats",
    "(cat)",
    "cat, in New York!",
    "New\nYork\tcat\r\n",
    "New,York",
    "what?",
    "naïve naïve",
    "nai\u0308ve",
    "猫 一只猫",
    "it's a U.S.A",
    "two  spaces",
    "",
    None,
    " ",
    "a",
    "cat\x00cat \u2028 cat",
    "New York \U0001f389",
    *(f"York{mark}cat{mark}{mark}" for mark in ",.:;?!`'\"-_\t\n\r\v\xa0"),
]


def direct_reading(text, entries):
    """Indices of the entries that a text holds: the paper's algorithm 1, word for word."""
    spaced = f" {text or ''} "
    for mark in ",.:;?!`":
        spaced = spaced.replace(mark, f" {mark} ")
    for mark in "\t\n\r":
        spaced = spaced.replace(mark, " ")
    return [index for index, entry in enumerate(entries) if f" {entry} " in spaced]


def rows(texts, keys=None):
    keys = [f"k{index}" for index in range(len(texts))] if keys is None else keys
    return pa.record_batch({"key": pa.array(keys), "text": pa.array(texts, pa.string())})


def held(matches):
    tables = [metaclip.pq.read_table(part) for part in matches.parts]
    return [row for table in tables for row in table["entries"].to_pylist()]


def decisions(batches):
    return {row["key"]: row["keep"] for batch in batches for row in batch.to_pylist()}


def test_matching_equals_direct_reading_on_tricky_texts(tmp_path):
    matches = metaclip.match_entries([rows(TEXTS)], ENTRIES, tmp_path)
    expected = [direct_reading(text, ENTRIES) for text in TEXTS]
    assert held(matches) == expected
    assert expected[5] == [0, 3, 4] and expected[12] == [8, 9, 11]  # the oracle by hand
    counts = np.bincount(np.concatenate(expected).astype(int), minlength=len(ENTRIES))
    assert matches.counts.dtype == np.uint64 and matches.counts.tolist() == counts.tolist()
    assert matches.counts[1] == 1 and matches.counts[12] == 0
    assert matches.num_texts == len(TEXTS)
    assert matches.num_unmatched == sum(not ids for ids in expected)


def make_texts(num_texts, num_entries, rng):
    """Texts and entries of a Zipf vocabulary, with all that spacing has to treat."""
    words = [f"w{index:x}" for index in range(3000)] + ["naïve", "猫", "it's", "?", "C3-PO", "A."]
    weights = 1 / np.arange(1, len(words) + 1)
    joints = [" "] * 9 + [", ", ".", "  ", "\n", "!"]

    def phrase(num_words, marks):
        chosen = rng.choice(len(words), num_words, p=weights / weights.sum())
        return "".join(words[i] + marks[rng.integers(len(marks))] for i in chosen)

    texts = [phrase(rng.integers(0, 14), joints) for _ in range(num_texts)]
    entries = set()
    while len(entries) < num_entries:
        entries.add(phrase(rng.integers(1, 4), [" "]).strip())
    return texts, sorted(entries)


def test_matching_equals_direct_reading_on_generated_texts(tmp_path):
    texts, entries = make_texts(3000, 700, np.random.default_rng(0))
    matches = metaclip.match_entries([rows(texts)], entries, tmp_path)
    assert held(matches) == [direct_reading(text, entries) for text in texts]
    assert matches.counts.max() > 300 and (matches.counts == 0).any()


@pytest.mark.slow
def test_matching_equals_direct_reading_on_100k_texts_and_10k_entries(tmp_path):
    texts, entries = make_texts(100_000, 10_000, np.random.default_rng(1))
    matches = metaclip.match_entries([rows(texts)], entries, tmp_path)
    for text, ids in zip(texts, held(matches), strict=True):
        assert ids == direct_reading(text, entries)


def test_matching_equals_direct_reading_on_web_texts(tmp_path):
    lines = real_data("metadata", "laion_10k.jsonl").read_text("utf-8").split("\n")[:1500]
    texts = [json.loads(line)["text"] for line in lines]
    words = sorted({word for text in texts for word in text.split()})[::10]
    matches = metaclip.match_entries([rows(texts)], words, tmp_path)
    assert held(matches) == [direct_reading(text, words) for text in texts]


def expected_kept(ids_of_rows, counts, cap):
    """P(keep) of each row: one minus the probability that none of its entries is drawn."""
    rates = [Fraction(cap, max(int(count), cap)) for count in counts]
    return np.array([float(1 - math.prod(1 - rates[i] for i in ids)) for ids in ids_of_rows])


def test_sampled_counts_are_within_three_standard_deviations_of_theory(tmp_path):
    texts, entries = make_texts(20_000, 300, np.random.default_rng(2))
    matches = metaclip.match_entries([rows(texts)], entries, tmp_path)
    cap = 50
    ids_of_rows = held(matches)
    p_keep = expected_kept(ids_of_rows, matches.counts, cap)
    head = int(matches.counts.argmax())
    of_head = np.array([ids == [head] for ids in ids_of_rows])
    assert of_head.sum() > 500 and matches.counts[head] > 20 * cap
    assert 0.05 < p_keep.mean() < 0.5
    groups = (np.full(len(texts), True), of_head, (0 < p_keep) & (p_keep < 0.5))
    scores = []
    for seed in range(20):
        batches = list(matches.sample(cap, seed))
        kept = np.concatenate([batch["keep"].to_numpy(zero_copy_only=False) for batch in batches])
        assert kept[p_keep == 1].all() and not kept[p_keep == 0].any()
        for group in groups:
            p = p_keep[group]
            scores.append((kept[group].sum() - p.sum()) / math.sqrt((p * (1 - p)).sum()))
    scores = np.array(scores).reshape(20, 3)
    assert np.abs(scores).max() < 3
    # Neither more nor less random than Bernoulli draws: standard scores of mean 0, variance 1.
    assert (np.abs(scores.mean(0)) < 3 / math.sqrt(20)).all()
    assert (scores.std(0) > 0.5).all() and (scores.std(0) < 1.6).all()


def test_draws_of_different_rows_entries_and_seeds_are_independent(tmp_path):
    texts = ["a"] * 4000 + ["b"] * 4000
    keys = [*range(4000)] * 2
    matches = metaclip.match_entries([rows(texts, keys)], ["a", "b"], tmp_path)
    kept = []
    for seed in (0, 1):
        batches = matches.sample(2000, seed)  # a half of each
        kept += np.split(np.concatenate([b["keep"].to_pylist() for b in batches]), 2)
    kept = np.array(kept)  # a of seed 0, b of seed 0, a of seed 1, b of seed 1
    for left in range(4):
        neighbours = (kept[left][1:] == kept[left][:-1]).mean()
        assert abs(neighbours - 0.5) < 3 * 0.5 / math.sqrt(3999)
        for right in range(left):
            assert abs((kept[left] == kept[right]).mean() - 0.5) < 3 * 0.5 / math.sqrt(4000)


def test_decisions_do_not_depend_on_order_batches_threads_or_order_of_entries(
    tmp_path, monkeypatch
):
    texts, entries = make_texts(2000, 100, np.random.default_rng(3))
    whole = rows(texts)
    first = decisions(metaclip.keep_table([whole], entries, 10, 7, tmp_path / "a", num_threads=1))
    assert 200 < sum(first.values()) < 1800
    monkeypatch.setattr(metaclip, "_ROWS_PER_PART", 300)
    monkeypatch.setattr(metaclip, "_ROWS_PER_SEARCH", 70)
    shuffled = whole.take(np.random.default_rng(4).permutation(2000))
    pieces = [shuffled[start : start + 113] for start in range(0, 2000, 113)]
    again = metaclip.keep_table(pieces, entries[::-1], 10, 7, tmp_path / "b", num_threads=4)
    assert decisions(again) == first
    assert decisions(metaclip.keep_table([whole], entries, 10, 8, tmp_path / "a")) != first


def test_every_text_of_a_key_has_draws_of_its_own(tmp_path):
    texts = [f"a cat {caption}" for _ in range(10_000) for caption in range(5)]
    keys = [key for key in range(10_000) for _ in range(5)]
    kept = pa.Table.from_batches(
        metaclip.keep_table([rows(texts, keys)], ["cat"], 5_000, 0, tmp_path)
    )
    kept = kept.filter(kept["keep"])
    # p = 0.1 a text: 50,000 p rows, of 10,000 (1 - 0.9**5) = 4,095 images
    assert abs(len(kept) - 5000) < 3 * math.sqrt(50_000 * 0.1 * 0.9)
    found = len(set(kept["key"].to_pylist()))
    assert abs(found - 4095.1) < 3 * math.sqrt(10_000 * 0.40951 * 0.59049)
    # and rows of the same key and text share one decision
    twice = metaclip.keep_table([rows(["cat"] * 400, [*range(200)] * 2)], ["cat"], 100, 0, tmp_path)
    keep = np.concatenate([batch["keep"].to_pylist() for batch in twice])
    assert (keep[:200] == keep[200:]).all() and 0 < keep.sum() < 400


def draw_in_whole_numbers(key, text, entry, seed):
    """The random number in [0, 1) of a row and an entry, without NumPy: blake2b, splitmix64."""
    salt = seed.to_bytes(8, "little")
    row = hashlib.blake2b(text.encode(), digest_size=8).digest() + key.encode()
    hashes = [hashlib.blake2b(t, digest_size=8, salt=salt).digest() for t in (row, entry.encode())]
    x = sum(int.from_bytes(h, "little") for h in hashes) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift)) * factor % 2**64
    return Fraction((x ^ (x >> 31)) >> 11, 2**53)


def test_decisions_are_the_same_on_every_platform(tmp_path):
    # First output of splitmix64 of seed 0, as published by its author.
    (mixed,) = metaclip._mix(np.array([0x9E3779B97F4A7C15], np.uint64))
    assert mixed == 0xE220A8397B1DCDAF
    table = metaclip.keep_table([rows(["cat"] * 16)], ["cat"], 6, 3, tmp_path)
    kept = [key for key, keep in decisions(table).items() if keep]
    draws = [draw_in_whole_numbers(f"k{i}", "cat", "cat", 3) for i in range(16)]
    expected = [f"k{i}" for i, draw in enumerate(draws) if draw * 16 < 6]
    assert kept == expected
    # Written down: other draws would keep other rows of sets that users have published.
    assert kept == ["k0", "k3", "k14"]


def test_keep_table_yields_every_row_in_order_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(metaclip, "_ROWS_PER_PART", 8)
    batch = rows(["cat"] * 20 + ["dog", None], list(range(100, 122)))
    batches = list(metaclip.keep_table([batch[:5], batch[5:]], ["cat"], 1, 0, tmp_path))
    table = pa.Table.from_batches(batches)
    assert table.column_names == ["key", "keep", "reason"]
    assert table["key"].to_pylist() == list(range(100, 122))
    assert table["reason"].to_pylist()[-2:] == ["no_entry", "no_entry"]
    for keep, reason in zip(table["keep"].to_pylist(), table["reason"].to_pylist(), strict=True):
        assert (reason is None) == keep
    assert {reason for reason in table["reason"].to_pylist()[:20]} <= {None, "not_sampled"}


def test_keep_table_of_rare_entries_keeps_all_and_of_no_rows_nothing(tmp_path):
    table = metaclip.keep_table([rows(["cat"] * 20)], ["cat"], 20, 0, tmp_path)
    assert all(decisions(table).values())
    assert list(metaclip.keep_table([], ["cat"], 20, 0, tmp_path)) == []
    assert list(tmp_path.iterdir()) == []  # parts of other rows are gone


def test_killed_matching_resumes_and_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(metaclip, "_ROWS_PER_PART", 100)
    texts, entries = make_texts(1000, 50, np.random.default_rng(5))
    batch = rows(texts)
    whole = metaclip.match_entries([batch], entries, tmp_path / "whole")
    searched = []
    make_search = metaclip._make_search

    def count_searches(entries):
        search = make_search(entries)
        return lambda texts: searched.append(len(texts)) or search(texts)

    monkeypatch.setattr(metaclip, "_make_search", count_searches)

    def broken():
        yield batch[:650]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        metaclip.match_entries(broken(), entries, tmp_path / "killed")
    assert sum(searched) == 600
    searched.clear()
    resumed = metaclip.match_entries([batch[:333], batch[333:]], entries, tmp_path / "killed")
    assert sum(searched) == 400
    assert resumed.counts.tolist() == whole.counts.tolist()
    for left, right in zip(resumed.parts, whole.parts, strict=True):
        assert left.read_bytes() == right.read_bytes()

    searched.clear()
    texts[250] = "another text"
    metaclip.match_entries([rows(texts)], entries, tmp_path / "killed")
    assert sum(searched) == 100  # the part with the changed row
    searched.clear()
    metaclip.match_entries([rows(texts)], [*entries[1:], "another"], tmp_path / "killed")
    assert sum(searched) == 1000


def test_choose_cap_worked_example():
    counts = np.array([4, 0, 10, 1, 3, 2, 0])  # shares from below: .05 .15 .3 .5 1
    for tail_share, cap in ((0.05, 1), (0.06, 1), (0.15, 2), (0.28, 3), (0.45, 4), (1.0, 10)):
        assert metaclip.choose_cap(counts, tail_share) == cap


@pytest.mark.parametrize(
    ("counts", "tail_share", "message"),
    [
        ([1], 0, "tail_share=0 must be above 0"),
        ([1], 1.5, "tail_share=1.5 must be above 0 and at most 1"),
        ([0, 0], 0.5, "No text holds an entry"),
    ],
)
def test_choose_cap_of_unusable_input_is_one_clear_line(counts, tail_share, message):
    with pytest.raises(ValueError, match=message):
        metaclip.choose_cap(np.array(counts), tail_share)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entries": []}, "There are no metadata entries"),
        ({"entries": ["cat", "dog", "cat"]}, "Metadata entry 'cat' occurs more than once"),
        ({"entries": ["cat", " "]}, "Metadata entry ' ' is blank"),
        ({"entries": ["a\tb"]}, "holds a tab or line break"),
        ({"cap": 0}, "cap=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be 0 to"),
        ({"batches": [pa.record_batch({"key": [1], "TEXT": ["a"]})]}, "no column 'text', only key"),
        ({"batches": [rows(["a"], [None])]}, "1 keys of a batch are null"),
        (
            {"batches": [pa.record_batch({"key": [1], "text": [["a"]]})]},
            "Column 'text' of type list<.*> is no text",
        ),
    ],
)
def test_keep_table_of_unusable_input_is_one_clear_line(tmp_path, change, message):
    arguments = {"batches": [rows(["a"])], "entries": ["a"], "cap": 1, "seed": 0} | change
    with pytest.raises(ValueError, match=message) as caught:
        list(metaclip.keep_table(**arguments, stage_dir=tmp_path))
    assert "\n" not in str(caught.value)


def test_entries_and_caps_of_each_language_are_its_own(tmp_path):
    entries = {"en": ("cat", "dog", "mat"), "de": ("Hund", "mat", "Katze"), "fr": ("chat",)}
    languages = ["en"] * 60 + ["de"] * 40 + ["ja"] * 3 + [None]
    texts = (
        ["a cat"] * 50
        + ["a dog"] * 6
        + ["mat"] * 4
        + ["mat cat"] * 30
        + ["Hund"] * 8
        + ["Katze"] * 2
    )
    texts += ["cat Hund"] * 4
    batch = rows(texts).append_column("language", pa.array(languages, pa.string()))
    matches = metaclip.match_entries([batch[:33], batch[33:]], entries, tmp_path)
    german, english = ("de\tHund", "de\tmat", "de\tKatze"), ("en\tcat", "en\tdog", "en\tmat")
    assert matches.entries == (*german, *english, "fr\tchat")
    assert matches.counts.tolist() == [8, 30, 2, 50, 6, 4, 0]
    assert matches.num_unmatched == 4  # languages without entries
    # cap 6 leaves 10 of 60 English matches to the tail; nearest to 1/6 is 10 of 40 in German.
    assert metaclip.choose_caps(matches, 6, None) == {"de": 8, "en": 6, "fr": 1}
    assert metaclip.choose_caps(matches, None, 1.0) == {"de": 30, "en": 50, "fr": 1}
    caps = {"de": 8, "en": 6, "fr": 1}
    kept = decisions(matches.sample(caps, 0))
    assert all(kept[f"k{n}"] for n in (*range(50, 60), *range(90, 100)))  # of rare entries
    assert 0 < sum(kept[f"k{n}"] for n in range(50)) < 20
    assert 2 < sum(kept[f"k{n}"] for n in range(60, 90)) < 20
    # English alone is what it is without the others, but for its draws.
    alone = metaclip.match_entries([rows(texts[:60])], entries["en"], tmp_path / "en")
    assert alone.counts.tolist() == matches.counts[3:6].tolist()
    with pytest.raises(ValueError, match="give --tail"):
        metaclip.choose_caps(metaclip.match_entries([batch], {"de": ("Hund",)}, tmp_path), 6, None)


def curate_cats(folder, *options):
    (folder / "entries.txt").write_text("cat\nmat\n")
    texts = [f"a cat {n}" for n in range(300)] + [f"mat {n}" for n in range(30)]
    table = {"key": [str(n) for n in range(330)], "text": texts, "language": ["en"] * 330}
    pa.parquet.write_table(pa.table(table), folder / "t.parquet")
    given = ["t.parquet", "--preset", "metaclip", "--metadata", "entries.txt", "--out", "out"]
    assert cli.main(["curate", *given, *options]) == 0
    return json.loads((folder / "out" / "report.json").read_text())


def test_cap_and_tail_of_the_command_replace_the_preset_s(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    made = curate_cats(tmp_path, "--cap", "30")
    assert made["notes"] == {"metaclip_caps": {"": 30}}
    assert made["rules"][-1]["keeps"].endswith("entries found more than 30 times are sampled")
    assert abs(made["rows_kept"] - 60) < 3 * (300 * 0.1 * 0.9) ** 0.5
    shutil.rmtree("out")
    assert curate_cats(tmp_path, "--tail", "0.1")["notes"] == {"metaclip_caps": {"": 30}}
    start = ("curate", "t.parquet", "--out", "other", "--preset")
    given = (*start, "metaclip", "--metadata", "entries.txt")
    for arguments, message in (
        ((*given, "--cap", "0"), "--cap 0 is out of range"),
        ((*given, "--tail", "0"), "--tail 0.0 is out of range"),
        ((*given, "--tail", "0.1", "--cap", "3"), "--cap 3 and --tail 0.1 say the same"),
        ((*start, "align", "--cap", "3"), "--cap 3 is of no use to --preset align."),
        ((*given, "--file", "x=t.parquet"), "--file x=t.parquet is of no use"),
        ((*start, "datacomp-text", "--file", "wnids=t.parquet"), "needs --file wordnet=PATH"),
    ):
        assert message in error_of(capfd, *arguments)
