"""The one reader of tables, as pairs, vocab and curate see it: kind K3, one test a fault."""

import csv
import io
import json
import random

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align_jax.curate.filter.metadata_table import PROBLEMS, Metadata
from align_jax.data.sources import captions, separated, table_files, tables
from align_jax.storage import text
from align_jax.storage.problems import Problems


def pairs(path):
    problems = Problems()
    rows = tables.read_table(str(path), problems)
    return {row.image: row.captions for row in rows}, problems


def by_vocab(path):
    problems = Problems()
    batches = captions.read_captions(str(path), problems)
    return [caption for batch, _ in batches for caption in batch], problems


def by_curate(path):
    """[(key, caption)] of the rows that can be used, and the counts."""
    reader, rows, lost = Metadata(str(path), {}), [], 0
    for fields, problem in reader.batches():
        cells = zip(fields["key"][0].to_pylist(), fields["text"][0].to_pylist(), strict=True)
        rows += [cell for cell, bad in zip(cells, problem, strict=True) if bad < 0]
        lost += int((problem == PROBLEMS.index("row_malformed")).sum())
    counts = {"row_malformed": lost, "text_repaired": reader.repaired}
    return rows, {reason: count for reason, count in counts.items() if count}


def check_all(path, expected, problems):
    """All three readers give the captions {image: captions} and count the same problems."""
    found, counts = pairs(path)
    assert found == {name: tuple(texts) for name, texts in expected.items()}
    assert counts == problems
    flat = [caption for texts in expected.values() for caption in texts]
    assert by_vocab(path) == (flat, problems)
    rows, counts = by_curate(path)
    assert rows == [(name, caption) for name, texts in expected.items() for caption in texts]
    assert counts == problems


STRAY = """0.jpg,a dog
1.jpg,"Best" shirt
2.jpg,"unclosed quote
3.jpg,a cat
4.jpg,a bird
5.jpg,a "quoted" word
6.jpg,last one
"""


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_stray_quote_costs_no_other_line(tmp_path, ends):
    path = tmp_path / "t.csv"
    path.write_text(("image,caption\n" + STRAY).replace("\n", ends), newline="")
    expected = {
        "0.jpg": ["a dog"],
        "1.jpg": ['"Best" shirt'],
        "2.jpg": ['"unclosed quote'],
        "3.jpg": ["a cat"],
        "4.jpg": ["a bird"],
        "5.jpg": ['a "quoted" word'],
        "6.jpg": ["last one"],
    }
    check_all(path, expected, {})


@pytest.mark.parametrize("last", ['4.jpg,a 5"', '4.jpg,"', '4.jpg,""""', '4.jpg,"a ""b"""'])
def test_a_stray_quote_with_one_that_seems_to_close_it_costs_no_line(tmp_path, last):
    path = tmp_path / "t.csv"
    path.write_text(f'image,caption\n1.jpg,a\n2.jpg,"open\n3.jpg,b\n{last}\n5.jpg,c\n')
    found, problems = pairs(path)
    assert list(found) == ["1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg"] and not problems
    assert found["2.jpg"] == ('"open',) and found["3.jpg"] == ("b",)


def test_one_stray_quote_in_many_rows_loses_none(tmp_path):
    lines = [f'{i}.jpg,"a dog, number {i}"' for i in range(100_000)]
    lines[40_000] = '40000.jpg,"unclosed'
    (tmp_path / "t.csv").write_text("image,caption\n" + "\n".join(lines) + "\n")
    found, problems = pairs(tmp_path / "t.csv")
    assert len(found) == 100_000 and not problems
    assert found["40000.jpg"] == ('"unclosed',) and found["40001.jpg"] == ("a dog, number 40001",)


NASTY = [
    *("plain", "two\nlines", 'a "quoted" word, and\nanother', "\n\nstarts blank"),
    *('ends with quote"', '"all of it"', "comma, in it", "and, more\nlines, with, commas"),
    *(" spaces ", "lone \r return"),
    "猫\u2028\x85\x0b naïve",
    "x" * 100_000,
    "\n".join(["sixty lines, each with a comma"] * 60),
]


@pytest.mark.parametrize("separator", [",", ";", "|"])
@pytest.mark.parametrize("image_first", [True, False])
@pytest.mark.parametrize("block_bytes", [50, 2**22])
def test_files_of_pandas_come_back_whole(
    tmp_path, monkeypatch, separator, image_first, block_bytes
):
    monkeypatch.setattr(text, "_BLOCK_BYTES", block_bytes)
    frame = pd.DataFrame({"image": [f"{i}.jpg" for i in range(len(NASTY))], "caption": NASTY})
    frame["n"] = range(len(NASTY))
    names = ["image", "n", "caption"] if image_first else ["caption", "n", "image"]
    # Blanks around a caption do not count: pandas does not quote them.
    frame["caption"] = frame["caption"].str.strip(" ")
    path = tmp_path / "t.csv"
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        frame[names].to_csv(path, index=False, sep=separator, quoting=quoting)
        expected = {f"{i}.jpg": [caption.strip(" ")] for i, caption in enumerate(NASTY)}
        check_all(path, expected, {})


def test_random_rows_equal_those_of_the_csv_module(tmp_path):
    # Where all quotes are in their places, the csv module is the definition.
    rng = random.Random(0)
    for case in range(200):
        width = rng.randint(1, 4)
        delimiter = rng.choice(",;|")
        letters = ['"', delimiter, " ", "a", "b", "\n", "é", ""]
        cells = [
            ["".join(rng.choices(letters, k=rng.randint(0, 6))) for _ in range(width)]
            for _ in range(8)
        ]
        # No cell of names repeats the shape of another line's start: those lines are ambiguous.
        rows = [[f"http://{case}/{i}", *row] for i, row in enumerate(cells)]
        file = io.StringIO(newline="")
        csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows(rows)
        lines = file.getvalue().replace("\r\n", "\n").split("\n")
        splitter = separated.Splitter(delimiter, ["url", *"abcd"[:width]])
        assert splitter.split(lines, is_end=True).cells == rows


def test_more_lines_than_a_row_may_have_are_counted(tmp_path):
    caption = "\n".join(["one of many lines"] * 70)
    (tmp_path / "t.csv").write_text(f'image,n,caption\n1.jpg,0,"{caption}"\n2.jpg,1,after\n')
    found, problems = pairs(tmp_path / "t.csv")
    assert found["2.jpg"] == ("after",) and problems == {"row_malformed": 69}


def test_a_lone_carriage_return_is_white_space(tmp_path):
    for name, between in (("t.tsv", "\t"), ("t.csv", ",")):
        path = tmp_path / name
        path.write_bytes(
            f"image{between}caption\r\na.jpg{between}a\rdog\r\nb.jpg{between}c\n".encode()
        )
        check_all(path, {"a.jpg": ["a\rdog"], "b.jpg": ["c"]}, {})


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_a_caption_that_is_too_long_is_counted_and_reading_goes_on(tmp_path, suffix):
    limit = csv.field_size_limit()
    texts = ["before", "a, " * 43_690 + "a", "b" * 140_000, "after"]  # 131,071 and 140,000
    rows = [{"image": f"{i}.jpg", "caption": caption} for i, caption in enumerate(texts)]
    path = write_rows(tmp_path / f"t.{suffix}", rows)
    expected = {f"{i}.jpg": [texts[i]] for i in (0, 1, 3)}
    check_all(path, expected, {"row_malformed": 1})
    assert pairs(path)[1].first["row_malformed"].startswith(str(path))
    assert csv.field_size_limit() == limit


def write_rows(path, rows):
    suffix = path.suffix
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        frame = pd.DataFrame(rows)
        frame.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.parquet"])
def test_two_columns_of_one_name_are_refused_in_one_line(tmp_path, name):
    path = tmp_path / name
    if name == "t.parquet":
        columns = [pa.array(["1.jpg"]), pa.array(["a"]), pa.array(["b"])]
        pq.write_table(pa.Table.from_arrays(columns, ["image", "caption", "caption"]), path)
    else:
        path.write_text(
            "image,caption,caption\n1,a,b\n".replace(",", "\t" if "tsv" in name else ",")
        )
    for read in (pairs, by_vocab, by_curate):
        with pytest.raises(
            ValueError, match="has two columns 'caption'; rename or remove"
        ) as error:
            read(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_nulls_among_captions_are_passed_over(tmp_path, suffix):
    rows = [
        {"image": "a.jpg", "captions": ["a dog", None]},
        {"image": "b.jpg", "captions": [None, "b", "c"]},
    ]
    path = write_rows(tmp_path / f"t.{suffix}", rows)
    check_all(path, {"a.jpg": ["a dog"], "b.jpg": ["b", "c"]}, {})


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_null_captions_are_none(tmp_path, suffix):
    rows = [{"image": f"{i}.jpg", "captions": c} for i, c in enumerate([["a"], None, [], [None]])]
    path = write_rows(tmp_path / f"t.{suffix}", rows)
    found, problems = pairs(path)
    assert found == {"0.jpg": ("a",), "1.jpg": (), "2.jpg": (), "3.jpg": ()} and not problems
    assert by_vocab(path) == (["a"], {})
    assert by_curate(path) == ([("0.jpg", "a"), *((f"{i}.jpg", None) for i in (1, 2, 3))], {})


def test_numbers_that_are_null_to_pandas_are_no_captions(tmp_path):
    rows = [{"image": "1.jpg", "caption": ["a", float("nan")]}, {"image": 2.0, "caption": "b"}]
    path = write_rows(tmp_path / "t.jsonl", rows)
    check_all(path, {"1.jpg": ["a"], "2": ["b"]}, {})


def test_quotes_between_tabs_are_letters(tmp_path):
    for name in ("t.tsv", "t.csv"):
        path = tmp_path / name
        path.write_text('image\tcaption\n1.jpg\t"all"\n2.jpg\t"open\n3.jpg\ta "b" c\n')
        check_all(path, {"1.jpg": ['"all"'], "2.jpg": ['"open'], "3.jpg": ['a "b" c']}, {})


@pytest.mark.parametrize("value", [5, 1.5, True, {"a": 1}, ["a", 5], ["a", ["b"]]])
def test_what_is_no_caption_is_counted(tmp_path, value):
    rows = [{"image": "a.jpg", "caption": "a"}, {"image": "b.jpg", "caption": value}]
    for suffix in ("jsonl", "json"):
        path = write_rows(tmp_path / f"t.{suffix}", rows)
        check_all(path, {"a.jpg": ["a"]}, {"row_malformed": 1})


@pytest.mark.parametrize("mark", ["\t", ";", "|", ","])
@pytest.mark.parametrize("name", ["t.csv", "captions.txt"])
def test_any_delimiter_is_found_by_the_header(tmp_path, mark, name):
    lines = ["image,number,caption", "a.jpg,1,a dog", "b.jpg,2,a cat"]
    (tmp_path / name).write_text("\n".join(line.replace(",", mark) for line in lines))
    check_all(tmp_path / name, {"a.jpg": ["a dog"], "b.jpg": ["a cat"]}, {})


def test_a_delimiter_inside_of_other_names_is_not_taken(tmp_path):
    (tmp_path / "t.csv").write_text("file_name;caption;note, if any\na.jpg;a dog, a cat;-\n")
    check_all(tmp_path / "t.csv", {"a.jpg": ["a dog, a cat"]}, {})


def test_unquoted_delimiters_of_a_caption_stay_in_it(tmp_path):
    rows = [
        "1000.jpg,A child, in a dress, climbs",
        "a b.png,two, words",
        'c.jpg,"one", two',
        "d.jpg,",
    ]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *rows]))
    expected = {
        "1000.jpg": ["A child, in a dress, climbs"],
        "a b.png": ["two, words"],
        "c.jpg": ['"one", two'],
        "d.jpg": [""],
    }
    check_all(tmp_path / "t.csv", expected, {})
    (tmp_path / "t.csv").write_text("caption,image\nA child, in a dress,1000.jpg\n")
    check_all(tmp_path / "t.csv", {"1000.jpg": ["A child, in a dress"]}, {})
    (tmp_path / "t.csv").write_text("caption\na dog, running\n")
    assert by_vocab(tmp_path / "t.csv") == (["a dog, running"], {})


def test_names_of_images_are_normalised_in_every_verb(tmp_path):
    names = ["./a/1.jpg", "a//2.jpg", "a/./3.jpg", "a/b/../4.jpg", " 5.jpg ", "a\\6.jpg", "a/7.jpg"]
    rows = [{"image": name, "caption": "x"} for name in names]
    expected = {f"a/{i}.jpg": ["x"] for i in (1, 2, 3, 4)} | {"5.jpg": ["x"]}
    expected |= {"a/6.jpg": ["x"], "a/7.jpg": ["x"]}
    for suffix in ("jsonl", "parquet"):
        check_all(write_rows(tmp_path / f"t.{suffix}", rows), expected, {})
    assert tables.normalise_name("../1.jpg") == "../1.jpg"  # never another place
    assert tables.normalise_name("http://a.org//1.jpg") == "http://a.org//1.jpg"


LISTS = [["a", "b"], ["c", "d"]]


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.string()),
        pa.list_(pa.string(), 2),
        pa.large_list(pa.large_string()),
        pa.list_(pa.dictionary(pa.int32(), pa.string())),
        pa.list_(pa.binary()),
    ],
    ids=str,
)
def test_lists_of_captions_of_any_arrow_type(tmp_path, kind):
    lists = LISTS if kind != pa.list_(pa.binary()) else [[t.encode() for t in row] for row in LISTS]
    if pa.types.is_dictionary(kind.value_type):
        column = pa.ListArray.from_arrays([0, 2, 4], pa.array(list("abcd")).dictionary_encode())
    else:
        column = pa.array(lists, kind)
    table = pa.table({"image": ["1.jpg", "2.jpg"], "captions": column})
    pq.write_table(table, tmp_path / "t.parquet")
    check_all(tmp_path / "t.parquet", {"1.jpg": LISTS[0], "2.jpg": LISTS[1]}, {})


def test_columns_of_other_arrow_types_are_no_captions(tmp_path):
    values = {"caption": [5], "text": [{"a": 1}], "title": [[1.5]], "comment": ["yes"]}
    pq.write_table(pa.table({"image": ["1.jpg"], **values}), tmp_path / "t.parquet")
    check_all(tmp_path / "t.parquet", {"1.jpg": ["yes"]}, {})
    del values["comment"]
    pq.write_table(pa.table({"image": ["1.jpg"], **values}), tmp_path / "t.parquet")
    for read in (pairs, by_vocab, by_curate):
        with pytest.raises(ValueError, match=r"text \(struct<a: int64>\), title \(list<"):
            read(tmp_path / "t.parquet")


def test_images_inside_of_a_table_of_hugging_face_do_not_disturb(tmp_path):
    image = [{"bytes": b"\xff\xd8", "path": "1.jpg"}, {"bytes": b"\xff\xd8", "path": None}]
    table = pa.table({"image": image, "caption": ["a dog", "a cat"]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert by_vocab(tmp_path / "t.parquet") == (["a dog", "a cat"], {})
    reader = Metadata(str(tmp_path / "t.parquet"), {})
    ((fields, problem),) = reader.batches()
    assert fields["text"][0].to_pylist() == ["a dog", "a cat"] and (problem < 0).all()


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_broken_characters_are_repaired_and_counted(tmp_path, suffix):
    path = tmp_path / f"t.{suffix}"
    names, texts = ["1.jpg", "2.jpg"], [b"caf\xe9 noir", b"fine"]
    if suffix == "parquet":
        raw = pa.array(texts, pa.binary())
        broken = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
        pq.write_table(pa.table({"image": names, "caption": broken}), path)
    elif suffix in ("csv", "tsv"):
        mark = b"," if suffix == "csv" else b"\t"
        rows = [name.encode() + mark + caption for name, caption in zip(names, texts, strict=True)]
        path.write_bytes(b"\n".join([b"image" + mark + b"caption", *rows]))
    else:
        rows = [
            b'{"image": "%s", "caption": "%s"}' % (name.encode(), caption)
            for name, caption in zip(names, texts, strict=True)
        ]
        path.write_bytes(b"[" + b",".join(rows) + b"]" if suffix == "json" else b"\n".join(rows))
    expected = {"1.jpg": ["caf\ufffd noir"], "2.jpg": ["fine"]}
    check_all(path, expected, {"text_repaired": 1})


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_lone_surrogates_are_repaired_and_counted(tmp_path, suffix):
    rows = [
        {"image": "1.jpg", "captions": "cut emoji \ud83d"},
        {"image": "2.jpg", "captions": ["whole \U0001f600", "\udc00"]},
        {"image": "3.jpg", "captions": "whole \U0001f600"},
        {"image": "\ud800.jpg", "captions": "odd name"},
    ]
    expected = {
        "1.jpg": ["cut emoji \ufffd"],
        "2.jpg": ["whole \U0001f600", "\ufffd"],
        "3.jpg": ["whole \U0001f600"],
        "\ufffd.jpg": ["odd name"],
    }
    path = write_rows(tmp_path / f"t.{suffix}", rows)
    problems = {"text_repaired": 3}
    found, counts = pairs(path)
    assert found == {name: tuple(t) for name, t in expected.items()} and counts == problems
    assert by_curate(path)[1] == problems
    texts, counts = by_vocab(path)  # which does not read the names
    assert texts == [t for row in expected.values() for t in row] and counts == {"text_repaired": 2}


def test_a_line_beyond_the_limit_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(text, "_BLOCK_BYTES", 300)
    rows = [{"image": f"{i}.jpg", "caption": c} for i, c in enumerate(["a", "b" * 2000, "c"])]
    for suffix in ("csv", "tsv", "jsonl"):
        path = write_rows(tmp_path / f"t.{suffix}", rows)
        check_all(path, {"0.jpg": ["a"], "2.jpg": ["c"]}, {"row_malformed": 1})
    (tmp_path / "t.txt").write_text("a\n" + "b" * 2000 + "\nc\n")
    assert by_vocab(tmp_path / "t.txt") == (["a", "c"], {"row_malformed": 1})


def test_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    for name, content in (
        ("t.csv", "image,caption\na.jpg,x\n"),
        ("t.tsv", "image\tcaption\na.jpg\tx\n"),
        ("t.jsonl", '{"image": "a.jpg", "caption": "x"}\n'),
        ("t.json", '[{"image": "a.jpg", "caption": "x"}]'),
        ("captions.txt", "image,caption\na.jpg,x\n"),
        ("t.token", "a.jpg#0\tx\n"),
    ):
        (tmp_path / name).write_text("\ufeff" + content, "utf-8")
        check_all(tmp_path / name, {"a.jpg": ["x"]}, {})


def test_places_are_lines_of_text_and_rows_of_others(tmp_path):
    (tmp_path / "t.csv").write_text('image,n,caption\na.jpg,1,"two\nlines"\n\nbroken\nb.jpg,2,x\n')
    assert pairs(tmp_path / "t.csv")[1].first == {"row_malformed": f"{tmp_path}/t.csv:5"}
    (tmp_path / "t.json").write_text('[{"image": "a.jpg", "caption": "x"}, 5]')
    assert pairs(tmp_path / "t.json")[1].first == {"row_malformed": f"{tmp_path}/t.json[1]"}


def test_every_suffix_is_opened():
    assert table_files.TABLE_SUFFIXES == (
        *(".csv", ".tsv", ".txt", ".token"),
        *(".json", ".jsonl", ".parquet"),
    )


MIXED = [  # of several tables put together: (fields, captions)
    ({"captions": ["a dog", "one dog"]}, ["a dog", "one dog"]),
    ({"caption": "a cat"}, ["a cat"]),
    ({"captions": [], "caption": "a cow"}, ["a cow"]),
    ({"captions": None, "Text": "a fox"}, ["a fox"]),
    ({"captions": [" ", "\ufffd"], "caption": "a bee"}, ["a bee"]),
    ({"captions": ["an ant"], "caption": "not this"}, ["an ant"]),
]


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_rows_that_mix_names_of_the_caption_column_lose_none(tmp_path, suffix, first):
    mixed = MIXED[first : first + 1] * 100 + MIXED  # names are looked for in the first 100
    rows = [{"image": f"{n}.jpg", **fields} for n, (fields, _) in enumerate(mixed)]
    path = tmp_path / f"t.{suffix}"
    path.write_text("\n".join(map(json.dumps, rows)) if suffix == "jsonl" else json.dumps(rows))
    check_all(path, {f"{n}.jpg": texts for n, (_, texts) in enumerate(mixed)}, {})


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_columns_of_captions_stand_in_for_each_other(tmp_path, suffix):
    columns = {
        "image": ["1.jpg", "2.jpg", "3.jpg"],
        "title": ["not this", "not this", "a title"],
        "caption": ["a dog", "", " "],
        "text": ["not this", "a cat", None],
    }
    if suffix == "csv":
        pd.DataFrame(columns).to_csv(tmp_path / "t.csv", index=False)
    else:
        pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    check_all(
        tmp_path / f"t.{suffix}",
        {"1.jpg": ["a dog"], "2.jpg": ["a cat"], "3.jpg": ["a title"]},
        {},
    )
    kept = Metadata(str(tmp_path / f"t.{suffix}"), {})
    assert set(kept.others) == {"title"} and kept.left_out == []  # carried along as well


def test_what_is_no_text_is_malformed_unless_another_column_has_a_caption(tmp_path):
    rows = [{"image": "1.jpg", "caption": 5}, {"image": "2.jpg", "caption": 5, "text": "a dog"}]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    check_all(path, {"2.jpg": ["a dog"]}, {"row_malformed": 1})


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_control_characters_are_repaired_and_counted(tmp_path, suffix):
    texts = ["a\0dog", "a\x1b[1mcat", "a\x9bcow", "a fox"]
    rows = [{"image": f"{n}.jpg", "caption": one} for n, one in enumerate(texts)]
    path = tmp_path / f"t.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "jsonl":  # as they are, and as JSON spells them
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join([lines[0].replace("\\u0000", "\0"), *lines[1:]]))
    else:
        mark = "," if suffix == "csv" else "\t"
        lines = [mark.join(row.values()) for row in rows]
        path.write_text("\n".join([f"image{mark}caption", *lines]))
    expected = ["a\ufffddog", "a\ufffd[1mcat", "a\ufffdcow", "a fox"]
    check_all(path, {f"{n}.jpg": [one] for n, one in enumerate(expected)}, {"text_repaired": 3})


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_table_whose_lines_end_in_carriage_returns_is_refused_in_one_short_line(tmp_path, suffix):
    rows = ['{"image": "1.jpg", "caption": "a"}'] if suffix == "jsonl" else ["image,caption", "1,a"]
    path = tmp_path / f"t.{suffix}"
    path.write_bytes("\r".join(rows * 1000).encode())
    for read in (pairs, by_vocab, by_curate):
        with pytest.raises(ValueError) as caught:
            read(path)
        said = f"{path}: its lines end in \\r alone; save it with \\n or \\r\\n."
        assert str(caught.value) == said
