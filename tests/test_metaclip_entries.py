"""filter/metadata_entries.py: the entries that MetaCLIP looks for, made and read."""

import json
import os

import pytest

from align_jax.cli import main as cli
from align_jax.curate.filter import metadata_entries


@pytest.mark.parametrize("name", ["entries.txt", "entries.json"])
def test_read_entries_leaves_out_blank_and_repeated_ones_and_says_so(tmp_path, name):
    given = ["New York", "", "naïve", "cat", " ", "cat"]
    path = tmp_path / name
    text = json.dumps(given) if name.endswith("json") else "\r\n".join(given) + "\n"
    path.write_text(text, "utf-8-sig", newline="")
    said = []
    assert metadata_entries.read_entries(path, log=said.append) == ("New York", "naïve", "cat")
    (line,) = said
    assert line.endswith("left out 2 blank and 1 repeated metadata entries; 3 remain")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.txt", b"\n \n", "holds no metadata entry"),
        ("e.txt", b"\ncaf\xe9\n", "e.txt:2 is not UTF-8"),
        ("e.json", b'["a",', "e.json is not valid JSON"),
        ("e.json", b'{"a": 1}', "must hold one JSON list of strings"),
        ("e.json", b'["a", 1]', "must hold one JSON list of strings"),
    ],
)
def test_read_entries_of_unusable_file_names_it(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        metadata_entries.read_entries(tmp_path / name)
    assert name in str(caught.value)


def test_pmi_worked_example():
    # "a b" 8 times, a 16 times, b 4 times in 64 words: log2(8 * 64 / (16 * 4)) = 3 bits.
    assert metadata_entries.pmi(8, 16, 4, 64) == 3.0


@pytest.fixture
def dumps(tmp_path):
    licence = "  1 This software and database is being provided to you\n"
    synsets = {
        "noun": "00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which\n"
        "00009999 03 n 02 Physical_Entity 0 thing 1 000 | x\n"
        "00011111 15 n 02 St._Louis 0 Gateway_City 0 000 | x\n",
        "verb": "00001740 29 v 04 breathe 0 take_a_breath 0 respire 0 suspire 3 000 00 | x\n",
        "adj": "00014490 00 s 01 galore(ip) 0 001 & 00013887 a 0000 | x\n",
        "adv": "00001740 02 r 01 thing 0 000 | x\n00001837 02 r 01 entity 2 000 | x\n",
    }
    for part, lines in synsets.items():
        (tmp_path / f"data.{part}").write_text(licence + lines)
    counts = {"the": 2**29, "thing": 500, ",": 2000, "of": 500, "rare": 99, "x": 1, "y": 2}
    counts["rest"] = 2**31 - sum(counts.values())  # so that there are 2**31 words
    write_counts(tmp_path / "unigrams.tsv", counts)
    # PMI 30 needs n_xy / (n_x n_y) >= 1 / 2: "x y" has log2(1 * 2**31 / 2) = 30, "of rare" less.
    write_counts(tmp_path / "bigrams.tsv", {"the thing": 400, "x y": 1, "of rare": 99, "x x": 1})
    views = {"Main_Page": 900, "Talk:Main_Page": 900, "Old_page": 69, "Page": 70, "-": 400}
    write_counts(tmp_path / "views.tsv", views)
    return tmp_path


def write_counts(path, counts):
    path.write_text("".join(f"{text}\t{count}\n" for text, count in counts.items()))


def build(folder, **options):
    tables = {
        "unigrams": folder / "unigrams.tsv",
        "bigrams": folder / "bigrams.tsv",
        "page_views": folder / "views.tsv",
    }
    return metadata_entries.build_entries(**{"wordnet_dir": folder, **tables, **options})


def test_build_entries_worked_example(dumps):
    entries = build(dumps)
    assert entries[:100] == tuple(str(number) for number in range(100))
    assert entries[100:105] == ("entity", "physical entity", "st", "breathe", "galore")
    assert entries[105:] == ("thing", "rest", "the", "of", "x x", "x y", "Main Page", "Page")


def test_build_entries_stops_at_the_budget(dumps):
    assert build(dumps, budget=107) == build(dumps)[:107]
    assert build(dumps, budget=0) == ()


def test_build_entries_of_some_sources_has_only_those(dumps):
    assert build(dumps, wordnet_dir=None, bigrams=None, page_views=None)[100:] == (
        *("rest", "the", "of", "thing"),
    )


def test_build_entries_of_wordnet_gives_as_many_as_the_paper():
    folder = "/usr/share/wordnet"
    if not os.path.isdir(folder):
        pytest.skip(f"{folder} is not there; it comes with Debian's wordnet-base")
    # Xu et al. 2023 table 1: 500,000 - 251,465 - 100,646 - 61,235.
    assert len(metadata_entries.build_entries(wordnet_dir=folder)) == 86_654


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.verb", None, "data.verb does not exist; name the folder of WordNet"),
        ("data.verb", "breathe v 4\n", "data.verb:1 is no synset of WordNet"),
        ("unigrams.tsv", None, "unigrams.tsv does not exist; name a TSV file"),
        ("unigrams.tsv", "the 5\n", "unigrams.tsv:1 is not a text, a tab and a count"),
        ("views.tsv", "Page\t5\nPage\t-5\n", "views.tsv:2 is not a text, a tab and a count"),
        ("bigrams.tsv", "the\t5\n", "'the' is no pair of words"),
        ("bigrams.tsv", "the cat\t5\n", "'cat' of 'the cat' is not among the unigrams"),
    ],
)
def test_build_entries_of_unusable_dump_names_file_and_line(dumps, name, content, message):
    (dumps / name).unlink()
    if content is not None:
        (dumps / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        build(dumps)


def test_build_entries_of_bigrams_without_unigrams_says_what_is_missing(dumps):
    with pytest.raises(ValueError, match="Bigrams need the counts of their words"):
        build(dumps, unigrams=None)


def test_sum_page_views_passes_over_rare_hours_and_other_wikis():
    lines = ["en Cat 60 0\n", "en Cat 49 0\n", "de Cat 90 0\n", "en Cat 50 0\n", "en Dog x 0\n", ""]
    assert metadata_entries.sum_page_views(lines) == {"Cat": 110}


def test_align_entries_writes_what_build_entries_builds(dumps, tmp_path, capsys, monkeypatch):
    out = tmp_path / "entries.txt"
    arguments = ["entries", "--unigrams", str(dumps / "unigrams.tsv"), "--out", str(out)]
    assert cli.main([*arguments, "--budget", "101"]) == 0
    built = metadata_entries.build_entries(unigrams=dumps / "unigrams.tsv", budget=101)
    assert metadata_entries.read_entries(out) == built and len(built) == 101
    assert cli.main(arguments) == 2
    assert "entries.txt exists; name a new file." in capsys.readouterr().err
