"""Every preset against the published rules: order, thresholds, sources, and rows at each bound."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align_jax.curate.filter import curate as curate_lib
from align_jax.curate.filter.presets import NAMES, load_preset

# preset -> (reason, what stays, where that is published), in the order in which rules apply.
PUBLISHED = {
    # Jia et al. 2021 (2102.05918), section 3: "remove pornographic images and keep only images
    # whose shorter dimension is larger than 200 pixels and aspect ratio is smaller than 3. Images
    # with more than 1000 associated alt-texts are discarded"; "exclude alt-texts that are shared by
    # more than 10 images", "any rare token (outside of 100 million most frequent unigrams and
    # bigrams from the raw dataset)", "too short (<3 unigrams) or too long (>20 unigrams)".
    "align": [
        ("no_text", "a text that is not blank", "a pair needs a text"),
        ("nsfw", "nsfw <= 0.5", "Jia et al. 2021, section 3"),
        ("nsfw_tag", "tag is not NSFW", "Jia et al. 2021, section 3"),
        ("short_side", "shorter side > 200 px", "Jia et al. 2021, section 3"),
        ("aspect_ratio", "aspect ratio < 3", "Jia et al. 2021, section 3"),
        ("texts_per_image", "image has <= 1000 different texts", "Jia et al. 2021, section 3"),
        ("shared_text", "text is shared by <= 10 images", "Jia et al. 2021, section 3"),
        ("num_words", "3 to 20 unigrams", "Jia et al. 2021, section 3"),
        (
            "rare_token",
            "every unigram and bigram is among the 100000000 most frequent of the raw data",
            "Jia et al. 2021, section 3",
        ),
    ],
    # README of kakaobrain/coyo-dataset, "Data Filtering".
    "coyo": [
        ("no_text", "a text that is not blank", "a pair needs a text"),
        ("file_size", "file >= 5000 bytes", "COYO-700M README"),
        ("aspect_ratio", "aspect ratio <= 3", "COYO-700M README"),
        ("short_side", "shorter side >= 200 px", "COYO-700M README"),
        ("nsfw", "nsfw <= 0.5", "COYO-700M README"),
        ("language", "language en", "COYO-700M README"),
        ("num_chars", "6 to 1000 characters", "COYO-700M README"),
        ("num_words", "3 to 256 words between spaces", "COYO-700M README"),
        (
            "repeated_text",
            "text (white space collapsed) occurs <= 10 times",
            "COYO-700M README, after white space is collapsed and trimmed",
        ),
        (
            "duplicate",
            "first row of its (image_hash, text (white space collapsed)), of the rows left by the "
            "rules before",
            "COYO-700M README: pHash and text",
        ),
    ],
    # Schuhmann et al. 2021 (2111.02114), section 2.
    "laion": [
        ("no_text", "a text that is not blank", "a pair needs a text"),
        ("num_chars", ">= 5 characters", "Schuhmann et al. 2021 (LAION-400M), section 2"),
        ("file_size", "file >= 5000 bytes", "Schuhmann et al. 2021 (LAION-400M), section 2"),
        ("similarity", "similarity >= 0.3", "Schuhmann et al. 2021 (LAION-400M), section 2"),
        ("language", "language en", "Schuhmann et al. 2021 (LAION-400M), section 2"),
        (
            "duplicate",
            "first row of its (url, text), of the rows left by the rules before",
            "Schuhmann et al. 2021 (LAION-400M), section 2",
        ),
    ],
    # load_uids_with_basic_filter_helper of mlfoundations/datacomp; Gadre et al. 2023 (2304.14108).
    "datacomp-basic": [
        ("no_text", "a text that is not blank", "a pair needs a text"),
        ("language", "language en", "Gadre et al. 2023, basic filter: fastText"),
        (
            "num_words",
            ">= 3 words between spaces",
            "Gadre et al. 2023, basic filter: more than 2 words",
        ),
        ("num_chars", ">= 6 characters", "Gadre et al. 2023, basic filter: more than 5 char"),
        ("aspect_ratio", "aspect ratio <= 3", "Gadre et al. 2023, basic filter"),
        ("short_side", "shorter side >= 200 px", "Gadre et al. 2023, basic filter"),
    ],
    # Xu et al. 2023 (2309.16671), algorithm 1: t = 20,000 for 400 M pairs.
    "metaclip": [
        ("no_text", "a text that is not blank", "a pair needs a text"),
        ("language", "language en", "MetaCLIP repository, crawl filters"),
        ("nsfw", "nsfw <= 0.5", "MetaCLIP repository, crawl filters"),
        (
            "duplicate",
            "first row of its (url, text), of the rows left by the rules before",
            "MetaCLIP repository, crawl filters",
        ),
        (
            "metaclip",
            "holds a metadata entry; entries found more than 20000 times are sampled",
            "Xu et al. 2023, algorithm 1",
        ),
    ],
    # Chuang et al. 2025 (2507.22062): entries, counts and caps of each language.
    "metaclip2": [
        ("no_text", "a text that is not blank", "a pair needs a text"),
        ("nsfw", "nsfw <= 0.5", "MetaCLIP repository, crawl filters"),
        (
            "duplicate",
            "first row of its (url, text), of the rows left by the rules before",
            "MetaCLIP repository, crawl filters",
        ),
        (
            "metaclip",
            "holds a metadata entry; entries beyond a tail of 0.055 are sampled",
            "Chuang et al. 2025",
        ),
    ],
    # baselines.py and apply_filter.py of mlfoundations/datacomp.
    "datacomp-clip": [
        (
            "similarity_l14_share",
            "similarity_l14 among the highest 30 %",
            "Gadre et al. 2023, clip_score_l14_30_percent",
        ),
    ],
    "datacomp-text": [
        ("no_text", "a text that is not blank", "a pair needs a text"),
        ("language", "language en", "Gadre et al. 2023, text_based: fastText"),
        ("text_based", "holds a word whose first synset is listed", "Gadre et al. 2023"),
    ],
    "datacomp-image": [
        ("no_text", "a text that is not blank", "a pair needs a text"),
        ("language", "language en", "Gadre et al. 2023, image_based: fastText"),
        ("num_words", ">= 2 words between spaces", "Gadre et al. 2023, image_based: more than one"),
        ("num_chars", ">= 6 characters", "Gadre et al. 2023, image_based: more than 5 char"),
        (
            "image_based",
            "one of 100000 clusters of images that a target image is nearest to",
            "Gadre et al. 2023, image_based",
        ),
    ],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_rules_their_order_thresholds_and_sources_are_the_published_ones(name):
    rules = load_preset(name).rules
    expected = [(reason, keeps) for reason, keeps, _ in PUBLISHED[name]]
    assert [(rule.name, rule.keeps) for rule in rules] == expected
    for rule, (_, _, source) in zip(rules, PUBLISHED[name], strict=True):
        assert rule.source.startswith(source)


def test_every_preset_is_in_the_table():
    assert sorted(PUBLISHED) == list(NAMES)


WORDS = "one red car stands here"
SCORES = ("nsfw_score_opennsfw2", "nsfw_score_gantman")
LANGUAGE = [({"language": "de"}, "language"), ({"language": None}, "language")]
NSFW = [
    *(({score: 0.51}, "nsfw") for score in SCORES),
    ({SCORES[0]: None, SCORES[1]: None}, "nsfw"),
]
BLANK = [({"text": " \u3000"}, "no_text"), ({"text": None}, "no_text")]
# What a row that passes every rule is changed to -> the reason, None where it stays.
AT_THE_BOUNDS = {
    "align": [
        *BLANK,
        *NSFW,
        ({"NSFW": "NSFW"}, "nsfw_tag"),
        ({"NSFW": "UNSURE"}, None),
        ({"NSFW": None}, None),
        ({"width": 200, "height": 300}, "short_side"),
        ({"width": 300, "height": 200}, "short_side"),
        ({"width": 201, "height": 602}, None),
        ({"width": 300, "height": 900}, "aspect_ratio"),
        ({"width": 900, "height": 300}, "aspect_ratio"),
        ({"text": "two words"}, "num_words"),
        ({"text": "now three words"}, None),
        ({"text": "w " * 20}, None),
        ({"text": "w " * 21}, "num_words"),
        ({"language": "de"}, None),
        ({"file_bytes": 10, "similarity": 0.0}, None),
    ],
    "coyo": [
        *BLANK,
        *NSFW,
        *LANGUAGE,
        ({"file_bytes": 4999}, "file_size"),
        ({"width": 199, "height": 300}, "short_side"),
        ({"width": 200, "height": 600}, None),
        ({"width": 601, "height": 200}, "aspect_ratio"),
        ({"text": "a b c"}, "num_chars"),
        ({"text": "a b  c\n"}, "num_chars"),
        ({"text": "ab c d"}, None),
        ({"text": "a b " + "c" * 996}, None),
        ({"text": "a b " + "c" * 997}, "num_chars"),
        ({"text": "two words"}, "num_words"),
        ({"text": "v " * 256}, None),
        ({"text": "v " * 257}, "num_words"),
        ({"NSFW": "NSFW", "similarity": 0.0}, None),
    ],
    "laion": [
        *BLANK,
        *LANGUAGE,
        ({"text": "abcd"}, "num_chars"),
        ({"text": "abcde"}, None),
        ({"file_bytes": 4999}, "file_size"),
        ({"similarity": 0.2999}, "similarity"),
        ({"similarity": None}, "similarity"),
        ({"width": 10, "height": 900, SCORES[0]: 1.0, "NSFW": "NSFW"}, None),
    ],
    "datacomp-basic": [
        *BLANK,
        *LANGUAGE,
        ({"text": "two words"}, "num_words"),
        ({"text": "a b cd"}, None),
        ({"text": "a b c"}, "num_chars"),
        ({"width": 199, "height": 300}, "short_side"),
        ({"width": 200, "height": 600}, None),
        ({"width": 200, "height": 601}, "aspect_ratio"),
        ({"file_bytes": 10, "similarity": 0.0, SCORES[0]: 1.0, "NSFW": "NSFW"}, None),
    ],
    "metaclip": [
        *BLANK,
        *NSFW,
        *LANGUAGE,
        ({"text": "one Car stands here"}, "no_entry"),
        ({"text": "car"}, None),
        ({"width": 10, "file_bytes": 10, "similarity": 0.0, "NSFW": "NSFW"}, None),
    ],
}


def row_at_every_bound(number):
    """A row that every preset keeps, with values at the inclusive bounds."""
    return {
        "key": f"{number:06d}",
        "url": f"http://x.org/{number}",
        "phash": f"{number:016x}",
        "text": f"{WORDS} {number}",
        "width": 300,
        "height": 300,
        "file_bytes": 5000,
        "nsfw_score_opennsfw2": 0.5,
        "nsfw_score_gantman": 0.5,
        "NSFW": "UNLIKELY",
        "similarity": 0.3,
        "language": "en",
    }


def reasons_of(folder, preset, changes):
    """The reason of each row of a table made by changing good rows; None for a row that stays."""
    table = [row_at_every_bound(number) | change for number, change in enumerate(changes)]
    pq.write_table(pa.Table.from_pylist(table), folder / "table.parquet")
    (folder / "entries.txt").write_text("car\n")
    metadata = str(folder / "entries.txt") if preset == "metaclip" else None
    made = curate_lib.curate(
        str(folder / "table.parquet"), folder / "out", preset=preset, metadata=metadata
    )
    assert not [rule["name"] for rule in made["rules"] if "not_applied" in rule]
    dropped = pq.read_table(folder / "out" / "dropped.parquet")
    found = dict(zip(dropped["key"].to_pylist(), dropped["reason"].to_pylist(), strict=True))
    return [found.get(row["key"]) for row in table]


@pytest.mark.parametrize("name", AT_THE_BOUNDS)
def test_rows_at_and_beyond_each_bound(tmp_path, name):
    cases = [({}, None), *AT_THE_BOUNDS[name]]
    found = reasons_of(tmp_path, name, [change for change, _ in cases])
    for (change, expected), reason in zip(cases, found, strict=True):
        assert reason == expected, change
    own = {reason for reason, _, _ in PUBLISHED[name]} - {"metaclip"}
    groups = {"texts_per_image", "shared_text", "rare_token", "repeated_text", "duplicate"}
    assert {reason for _, reason in cases if reason} - {"no_entry"} == own - groups


def test_align_drops_images_of_1001_texts_and_texts_of_11_images(tmp_path):
    changes = [{"phash": "a" * 16}] * 1000 + [{"phash": "b" * 16}] * 1001
    changes += [{"text": "ten images have this"}] * 10 + [{"text": "eleven images have this"}] * 11
    expected = [None] * 1000 + ["texts_per_image"] * 1001 + [None] * 10 + ["shared_text"] * 11
    assert reasons_of(tmp_path, "align", changes) == expected


def test_coyo_collapses_white_space_before_it_counts_and_compares_texts(tmp_path):
    changes = [{"text": "a red car"}] * 10 + [{"text": "a  red car"}] * 10
    changes += [{"text": text} for text in ("a blue car", " a\u00a0blue\ncar", "\u3000a blue car")]
    changes += [{"text": "a green car"}] * 10 + [{"text": "A green car"}] * 10
    same = {"phash": "c" * 16}
    changes += [same | {"text": text} for text in ("an old car", "an\told  car ", "An old car")]
    expected = ["repeated_text"] * 20 + [None] * 23 + [None, "duplicate", None]
    assert reasons_of(tmp_path, "coyo", changes) == expected


@pytest.mark.parametrize("name", ["laion", "metaclip"])
def test_laion_and_metaclip_drop_pairs_of_equal_url_and_text(tmp_path, name):
    same = {"url": "http://y.org", "text": "a car"}
    changes = [same, same, same | {"text": "a  car"}]
    changes += [same | {"url": None}] * 2 + [same | {"url": ""}] * 2  # no url, no duplicate
    assert reasons_of(tmp_path, name, changes) == [None, "duplicate", *[None] * 5]


def test_metaclip_samples_entries_found_more_than_20_000_times(tmp_path):
    found = reasons_of(tmp_path, "metaclip", [{"text": f"car {n}"} for n in range(25_000)])
    assert set(found) == {None, "not_sampled"}
    assert abs(found.count(None) - 20_000) < 3 * (25_000 * 0.8 * 0.2) ** 0.5
