"""Every rule of curation on a table whose answer is known, in DuckDB."""

import collections
import random

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curate_helpers import curate_table, read, reasons, write_preset

from align_jax.curate.filter import curate, ingest

TWO = ["some text", "other text"]


def size(pairs):
    return {
        "text": ["a b c"] * len(pairs),
        "width": [width for width, _ in pairs],
        "height": [height for _, height in pairs],
    }


def test_has_text_drops_blank_and_missing_texts(tmp_path):
    table = {"text": ["a", "", " \t\n", None, "\u3000\u00a0", "."]}
    assert reasons(tmp_path, table, "has_text()") == {i: "no_text" for i in (1, 2, 3, 4)}


def test_rows_of_every_file_are_dropped_where_they_are(tmp_path):
    """By rules about single rows, about groups, and about what the rules before have left."""
    texts = ["x", "y"], [], ["", "x", "z"], ["w", "once", "w", "twice", "twice"]
    sides = [9, 9], [], [9, 9, 9], [1, 1, 9, 9, 9]
    (tmp_path / "in").mkdir()
    for number, (text, side) in enumerate(zip(texts, sides, strict=True)):
        keys = pa.array([f"{number}-{row}" for row in range(len(text))], pa.string())
        side = pa.array(side, pa.int64())
        table = {"key": keys, "text": pa.array(text, pa.string()), "width": side, "height": side}
        pq.write_table(pa.table(table), tmp_path / "in" / f"{number}.parquet")
    calls = {
        "raw": ("has_text()", "repeated_text(at_most=1)", "short_side(at_least_px=5)"),
        "left": ("has_text()", "short_side(at_least_px=5)", "duplicates('text', 'text')"),
    }
    found = {}
    for name, chosen in calls.items():
        preset = write_preset(tmp_path / f"{name}.py", *chosen)
        curate.curate(str(tmp_path / "in"), tmp_path / name, preset=preset)
        dropped = read(tmp_path / name / "dropped.parquet")
        found[name] = {row["key"]: row["reason"] for row in dropped}
    repeated = ("0-0", "2-1", "3-0", "3-2", "3-3", "3-4")
    assert found["raw"] == dict.fromkeys(repeated, "repeated_text") | {
        "2-0": "no_text",
        "3-1": "short_side",
    }
    # 3-2 is no duplicate of 3-0, which is small
    short = dict.fromkeys(("3-0", "3-1"), "short_side")
    assert found["left"] == {"2-0": "no_text", "2-1": "duplicate", "3-4": "duplicate"} | short
    assert [row["key"] for row in read(tmp_path / "raw" / "kept.parquet")] == ["0-1", "2-2"]


def test_short_side_more_than_excludes_the_bound_and_at_least_includes_it(tmp_path):
    table = size([(200, 900), (201, 201), (900, 200), (199, 300), (None, 300), (0, 0)])
    more = reasons(tmp_path / "a", table, "short_side(more_than_px=200)")
    least = reasons(tmp_path / "b", table, "short_side(at_least_px=200)")
    assert sorted(more) == [0, 2, 3, 4, 5]
    assert sorted(least) == [3, 4, 5]


def test_aspect_ratio_below_excludes_the_bound_and_at_most_includes_it(tmp_path):
    table = size([(300, 100), (100, 300), (299, 100), (301, 100), (5, 0), (0, 0), (7, 7)])
    assert sorted(reasons(tmp_path / "a", table, "aspect_ratio(below=3)")) == [0, 1, 3, 4, 5]
    assert sorted(reasons(tmp_path / "b", table, "aspect_ratio(at_most=3)")) == [3, 4, 5]


def test_file_size_keeps_the_bound(tmp_path):
    table = {"text": ["a"] * 4, "file_bytes": [4999, 5000, 5001, None]}
    assert sorted(reasons(tmp_path, table, "file_size(at_least_bytes=5000)")) == [0, 3]


@pytest.mark.parametrize(
    ("call", "column", "gone"),
    [
        ("nsfw(at_most=0.5)", "punsafe", [2, 3, 4]),
        ("watermark(at_most=0.5)", "pwatermark", [2, 3, 4]),
        ("aesthetic(at_least=0.5)", "aesthetic_score", [0, 3, 4]),
        ("similarity(at_least=0.5)", "clip_b32_similarity_score", [0, 3, 4]),
        (
            "similarity(at_least=0.5, column='similarity_l14')",
            "clip_l14_similarity_score",
            [0, 3, 4],
        ),
    ],
)
def test_score_rules_keep_the_bound_and_drop_missing_scores(tmp_path, call, column, gone):
    table = {"text": ["a"] * 5, column: [0.25, 0.5, 0.75, None, float("nan")]}
    assert sorted(reasons(tmp_path, table, call)) == gone


def test_nsfw_takes_the_larger_of_coyos_two_scores(tmp_path):
    table = {
        "text": ["a"] * 4,
        "nsfw_score_opennsfw2": [0.1, 0.9, 0.1, None],
        "nsfw_score_gantman": [0.1, 0.1, 0.9, 0.2],
    }
    assert sorted(reasons(tmp_path, table, "nsfw(at_most=0.5)")) == [1, 2]


def test_nsfw_tag_drops_laions_tag_and_keeps_rows_without_one(tmp_path):
    table = {"text": ["a"] * 4, "NSFW": ["UNLIKELY", "NSFW", "UNSURE", None]}
    assert sorted(reasons(tmp_path, table, "nsfw_tag()")) == [1]


def test_language_keeps_the_named_codes(tmp_path):
    table = {"text": ["a"] * 4, "LANGUAGE": ["en", "de", None, "eng"]}
    assert sorted(reasons(tmp_path, table, "language('en', 'eng')")) == [1, 2]


def test_word_bounds_count_parts_between_any_white_space(tmp_path):
    texts = ["a b", "a b c", " a\u00a0b\n\nc\t", "a\u200bb c", " ".join("x" * 20), "x " * 21]
    assert sorted(reasons(tmp_path, {"text": texts}, "num_words(3, 20)")) == [0, 3, 5]


def test_length_bounds_count_code_points_after_white_space_is_collapsed(tmp_path):
    texts = ["abcde", "abcdef", "abc   de", "éééééé", "日本語日本", "x" * 9, "x" * 10, "  abcde  "]
    assert sorted(reasons(tmp_path, {"text": texts}, "num_chars(6, 9)")) == [0, 4, 6, 7]


def test_texts_per_image_counts_different_texts_of_an_image(tmp_path):
    table = {
        "url": ["a", "a", "a", "b", "b", "b", "c"],
        "text": ["1", "2", "3", "1", "1", "2", "4"],
    }
    assert sorted(reasons(tmp_path, table, "texts_per_image(at_most=2)")) == [0, 1, 2]


def test_images_per_text_counts_different_images_by_hash_before_url(tmp_path):
    table = {
        "url": list("abcdefg"),
        "phash": ["1", "2", "3", "4", "4", "4", "5"],
        "text": ["x", "x", "x", "y", "y", "y", "X"],
    }
    assert sorted(reasons(tmp_path, table, "images_per_text(at_most=2)")) == [0, 1, 2]


def test_an_image_is_the_first_of_hash_url_and_key_that_the_row_has(tmp_path):
    rows = [
        ("h", "u1", "k1"),
        ("h", "u2", "k2"),  # the image of the hash above
        (None, "u3", "k3"),
        (None, "u3", "k4"),  # that of the url above
        ("", "", "k5"),  # an empty string is no value
        ("", "u4", "k7"),
        (None, None, "k5"),  # that of the key above
        (None, None, "k6"),
        (None, None, None),  # two that nothing tells apart are two
        (None, None, ""),
    ]
    hashes, urls, keys = zip(*rows, strict=True)
    table = {"phash": hashes, "url": urls, "key": keys, "text": ["x"] * len(rows)}
    for at_most, kept in ((6, 0), (7, len(rows))):  # h, u3, k5, u4, k6, and two
        made, _ = curate_table(
            tmp_path / f"{at_most}", table, f"images_per_text(at_most={at_most})"
        )
        assert made["rows_kept"] == kept
    table["text"] = [f"text {row}" for row in range(len(rows))]
    made, _ = curate_table(tmp_path / "texts", table, "texts_per_image(at_most=1)")
    assert made["rows_kept"] == 4  # u4, k6 and the last two


@pytest.mark.parametrize("own", ["url", "key", None])
def test_rows_without_hash_are_images_of_their_own(tmp_path, own):
    table = {"phash": pa.nulls(20, pa.string()), "text": ["one text of many"] * 20}
    if own:
        table[own] = [f"{own}{row}" for row in range(20)]
    made, _ = curate_table(tmp_path, table, "images_per_text(at_most=10)")
    assert made["rows_kept"] == 0


def test_collapsed_texts_are_equal_whatever_white_space_they_hold(tmp_path):
    spaces = (
        "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000"
    )
    texts = [f"{space}A{space}{space}b{space}" for space in spaces] + ["A b", "a b", "A\u200bb"]
    least = len(spaces)
    calls = f"repeated_text(at_most={least}, collapse=True)", "has_text()"
    found = reasons(tmp_path / "1", {"text": texts}, *calls)
    assert sorted(found) == [*range(least + 1)]
    assert not reasons(tmp_path / "2", {"text": texts}, f"repeated_text(at_most={least + 1})")
    table = {"text": texts, "url": ["u"] * len(texts)}
    found = reasons(tmp_path / "3", table, "duplicates('url', 'text', collapse=True)")
    assert sorted(found) == [*range(1, least + 1)]
    assert not reasons(tmp_path / "4", table, "duplicates('url', 'text')")


def test_repeated_text_counts_rows_of_the_exact_text(tmp_path):
    table = {"text": ["x", "x", "x", "X", "x ", "y", "y"], "url": ["a"] * 7}
    assert sorted(reasons(tmp_path, table, "repeated_text(at_most=2)")) == [0, 1, 2]


def test_group_rules_count_the_raw_data_and_the_first_failed_rule_is_the_reason(tmp_path):
    table = {"text": ["x x x", "x x x", "x x x", "y"], **{"width": [9, 300, 300, 9]}}
    table["height"] = table["width"]
    found = reasons(tmp_path, table, "short_side(at_least_px=10)", "repeated_text(at_most=2)")
    assert found == {
        0: "short_side",
        1: "repeated_text",
        2: "repeated_text",
        3: "short_side",
    }


def test_duplicates_keep_the_first_row_that_the_rules_before_leave(tmp_path):
    table = {
        "text": ["x", "x", "x", "y", "x", "x"],
        "phash": ["1", "1", "1", "1", None, None],
        "width": [9, 300, 300, 300, 300, 300],
        "height": [300] * 6,
    }
    calls = "short_side(at_least_px=10)", "duplicates('image_hash', 'text')"
    assert reasons(tmp_path, table, *calls) == {0: "short_side", 2: "duplicate"}


def test_rare_tokens_rank_unigrams_and_bigrams_together(tmp_path):
    # a: 5, b: 4, "a b": 4, c: 1, "a c": 1
    texts = ["a b", "A b", "a  B", "a b", "a c", "b a"[:1] + "", ""]
    texts[5] = "a"
    table = {"text": texts}
    assert sorted(reasons(tmp_path / "3", table, "rare_tokens(top=3)")) == [4]
    assert sorted(reasons(tmp_path / "2", table, "rare_tokens(top=2)")) == [4]  # b ties with "a b"
    assert sorted(reasons(tmp_path / "1", table, "rare_tokens(top=1)")) == [0, 1, 2, 3, 4]
    assert not reasons(tmp_path / "5", table, "rare_tokens(top=5)")


def rare_rows(texts, top):
    """The definition, slowly."""
    tokens = []
    for text in texts:
        words = text.lower().split()
        tokens.append(words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)])
    counts = collections.Counter(token for row in tokens for token in row)
    least = sorted(counts.values(), reverse=True)[:top][-1]
    return [row for row, found in enumerate(tokens) if any(counts[t] < least for t in found)]


@pytest.mark.parametrize("top", [3, 20, 100, 300, 10_000])
def test_rare_tokens_equal_a_slow_count(tmp_path, top):
    rng = random.Random(top)
    words = ["é", "É", "ß", "x"] + [f"w{i}" for i in range(30)]
    weights = [1 / (1 + rank) for rank in range(len(words))]
    texts = [" ".join(rng.choices(words, weights, k=rng.randrange(1, 6))) for _ in range(300)]
    found = reasons(tmp_path, {"text": texts}, f"rare_tokens(top={top})")
    assert sorted(found) == rare_rows(texts, top)


def test_group_rules_tell_texts_apart_that_share_a_hash_in_duckdb(tmp_path):
    texts = ["word1020 word1666"] * 3 + ["word1027 word1636"]
    same = duckdb.connect().execute(f"SELECT hash('{texts[0]}') = hash('{texts[3]}')").fetchall()
    assert same == [(True,)], "another pair is needed to test this"
    found = {}
    for call in ("rare_tokens(top=3)", "repeated_text(at_most=2)", "repeated_text(at_most=3)"):
        found[call] = sorted(reasons(tmp_path / call, {"text": texts}, call))
    assert list(found.values()) == [[3], [0, 1, 2], []]


def test_domains_match_subdomains_but_not_longer_names(tmp_path):
    urls = [
        "http://bad.com/x",
        "https://img.bad.com:80/x",
        "http://notbad.com/x",
        "http://BAD.com?x",
        "http://user@bad.com/",
        "http://a.co.uk/",
        "no url",
        None,
    ]
    table = {"text": ["a"] * len(urls), "url": urls}
    (tmp_path / "list.txt").write_text("# mine\nbad.com\nco.uk # all of it\n")
    listed = f"'{tmp_path}/list.txt'"
    assert sorted(reasons(tmp_path / "a", table, f"domains({listed})")) == [0, 1, 3, 4, 5]
    allow = reasons(tmp_path / "b", table, f"domains({listed}, allow=True)")
    assert sorted(allow) == [2, 6, 7]


def test_urls_are_compared_as_written(tmp_path):
    table = {"text": TWO, "url": ["http://a/1", "http://a/2"]}
    assert sorted(reasons(tmp_path, table, "urls(['http://a/2', 'http://b'])")) == [1]


def test_rule_without_its_column_is_not_applied_and_the_report_says_so(tmp_path):
    calls = "short_side(at_least_px=9)", "nsfw(at_most=0.5)", "images_per_text(at_most=1)"
    table = {"text": TWO, "height": [1, 2]}
    report, _ = curate_table(tmp_path, table, *calls, "num_chars(at_least=1)")
    assert [rule["not_applied"] for rule in report["rules"][:3]] == [
        "no column width",
        "no column nsfw",
        "no column image_hash, url or key",
    ]
    assert report["rows_kept"] == 2
    page = (tmp_path / "out" / "report.md").read_text()
    assert "not applied: no column width" in page


def test_preset_of_which_no_rule_can_be_applied_is_refused(tmp_path):
    message = "no rule of --preset .* can be applied .*: no column nsfw\\), so all rows would"
    with pytest.raises(ValueError, match=message):
        curate_table(tmp_path, {"text": TWO}, "nsfw(at_most=0.5)")
    assert not (tmp_path / "out").exists()


def test_normalise_equals_python_on_every_kind_of_white_space_and_letter(tmp_path):
    spaces = (
        "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000"
    )
    texts = [f"{s}A{s}{s}É ß{s}" for s in spaces] + ["plain Ascii  two", "x", "", "Ωmega Привет"]
    expected = [" ".join(text.split()).lower() for text in texts]
    assert ingest.normalise(pa.array(texts)).to_pylist() == expected
