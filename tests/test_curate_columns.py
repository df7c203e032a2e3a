"""Tables of known datasets are recognised by themselves; what is broken costs rows or one line."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curate_helpers import curate_table, read
from helpers import error_of, real_data

from align_jax.curate.filter import columns, curate, ingest
from align_jax.curate.filter.metadata_table import PROBLEMS

URL = "http://a.org/1.jpg"
COYO = {
    "id": [841814333321],
    "url": [URL],
    "text": ["A Pomsky dog"],
    "width": pa.array([1000], pa.int32()),
    "height": pa.array([988], pa.int32()),
    "image_phash": ["c9b6a7d8469c1959"],
    "text_length": [12],
    "word_count": [3],
    "clip_similarity_vitb32": pa.array([0.4375], pa.float32()),
    "clip_similarity_vitl14": pa.array([0.25], pa.float32()),
    "nsfw_score_opennsfw2": [0.25],
    "nsfw_score_gantman": [0.5],
    "watermark_score": [0.125],
    "aesthetic_score_laion_v2": [5.5],
}
LAION = {
    "SAMPLE_ID": [7.0],
    "URL": [URL],
    "TEXT": ["a dog"],
    "HEIGHT": [300],
    "WIDTH": [400.0],
    "LICENSE": ["?"],
    "NSFW": ["UNLIKELY"],
    "similarity": [0.375],
}
LAION_JOINED = {
    "URL": [URL],
    "TEXT": ["a dog"],
    "WIDTH": [400],
    "HEIGHT": [300],
    "similarity": [0.375],
    "hash": [-5],
    "punsafe": [0.25],
    "pwatermark": [0.5],
    "AESTHETIC_SCORE": [6.5],
    "LANGUAGE": ["en"],
}
DATACOMP = {
    "uid": ["f" * 32],
    "url": [URL],
    "text": ["a dog"],
    "original_width": [400],
    "original_height": [300],
    "clip_b32_similarity_score": [0.25],
    "clip_l14_similarity_score": [0.5],
    "face_bboxes": [[[0.0, 0.0, 1.0, 1.0]]],
    "sha256": ["ab"],
}
SCAN = {
    "key": ["k"],
    "text": ["a dog"],
    "width": [400],
    "height": [300],
    "file_bytes": [5000],
    "sha256": ["ab"],
    "phash": ["c9"],
}


def ingested(folder, source, chosen=None):
    files = ingest.find_files(str(source))
    present = ingest.present_columns(files, chosen or {})
    folder.mkdir(exist_ok=True)
    base = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in files])
    for number, path in enumerate(files):
        file = ingest.File(number, path, 1)
        list(ingest.write_part(file, chosen or {}, present, str(folder), base))
    rows = [row for part in sorted(folder.glob("*.parquet")) for row in read(part)]
    derived = ("row", "words", "num_words", "num_parts", "num_chars")
    sizes = [len(read(part)) for part in sorted(folder.glob("*.parquet"))]
    places = [(part << ingest.ROW_BITS) + row for part, n in enumerate(sizes) for row in range(n)]
    assert [row["row"] for row in rows] == places
    for row in rows:
        row["problem"] = row["problem"] is not None and PROBLEMS[row["problem"]]
    return [{n: v for n, v in row.items() if n not in derived and v} for row in rows]


def repaired(folder):
    return ingest.count_repaired(sorted(map(str, folder.glob("*.parquet"))))


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (
            COYO,
            {
                "key": "841814333321",
                "url": URL,
                "text": "A Pomsky dog",
                "width": 1000,
                "height": 988,
                "image_hash": "c9b6a7d8469c1959",
                "similarity": 0.4375,
                "similarity_l14": 0.25,
                "nsfw": 0.5,
                "watermark": 0.125,
                "aesthetic": 5.5,
            },
        ),
        (
            LAION,
            {
                "key": "7",
                "url": URL,
                "text": "a dog",
                "width": 400,
                "height": 300,
                "nsfw_tag": "UNLIKELY",
                "similarity": 0.375,
            },
        ),
        (
            LAION_JOINED,
            {
                "key": "table.parquet:0",
                "url": URL,
                "text": "a dog",
                "width": 400,
                "height": 300,
                "similarity": 0.375,
                "nsfw": 0.25,
                "watermark": 0.5,
                "aesthetic": 6.5,
                "language": "en",
            },
        ),
        (
            DATACOMP,
            {
                "key": "f" * 32,
                "url": URL,
                "text": "a dog",
                "width": 400,
                "height": 300,
                "similarity": 0.25,
                "similarity_l14": 0.5,
                "image_hash": "ab",
            },
        ),
        (
            SCAN,
            {
                "key": "k",
                "text": "a dog",
                "width": 400,
                "height": 300,
                "file_bytes": 5000,
                "image_hash": "c9",
            },
        ),
    ],
    ids=["coyo", "laion", "laion-joined", "datacomp", "scan"],
)
@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "jsonl"])
def test_known_schema_is_recognised_in_every_format(tmp_path, table, expected, suffix):
    path = tmp_path / f"table.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table(table), path)
    else:
        row = pa.table(table).to_pylist()[0]
        if suffix == "jsonl":
            path.write_text(json.dumps(row) + "\n")
        else:
            between = "," if suffix == "csv" else "\t"
            values = ["" if isinstance(v, list) else str(v) for v in row.values()]
            path.write_text(between.join(row) + "\n" + between.join(values) + "\n")
    (found,) = ingested(tmp_path / "parts", path)
    if suffix in ("csv", "tsv") and table is LAION:
        expected = expected | {"key": "7.0"}  # a text file says what it says
    if suffix != "parquet":
        expected = expected | {"key": expected["key"].replace(".parquet", f".{suffix}")}
    assert found == expected


def test_img2dataset_rows_that_were_not_downloaded_are_marked(tmp_path):
    table = {
        "url": [URL] * 3,
        "caption": ["a", "b", None],
        "key": ["000000000", "000000001", "000000002"],
        "status": ["success", "failed_to_download", "success"],
        "error_message": [None, "HTTP Error 404", None],
        "width": [256, None, 256],
        "height": [256, None, 256],
        "original_width": [640, None, 800],
        "original_height": [480, None, 600],
        "sha256": ["x", None, "y"],
    }
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.table(table), tmp_path / "shards" / "00000.parquet")
    (tmp_path / "shards" / "00000.tar").write_bytes(b"")
    (tmp_path / "shards" / "00000_stats.json").write_text("{}")
    first, second, third = ingested(tmp_path / "parts", tmp_path / "shards")
    assert (first["width"], first["height"]) == (640, 480)
    assert second["problem"] == "not_downloaded"
    assert "problem" not in third and "text" not in third


def test_tables_without_header_are_told_apart_by_where_the_url_is(tmp_path):
    (tmp_path / "cc3m.tsv").write_text(f'a "quoted dog\t{URL}\n')
    (tmp_path / "cc12m.tsv").write_text(f"{URL}\ta cat\n")
    assert ingested(tmp_path / "3", tmp_path / "cc3m.tsv") == [
        {"key": "cc3m.tsv:0", "url": URL, "text": 'a "quoted dog'}
    ]
    assert ingested(tmp_path / "12", tmp_path / "cc12m.tsv") == [
        {"key": "cc12m.tsv:0", "url": URL, "text": "a cat"}
    ]


def test_lists_of_captions_become_rows_of_one_key(tmp_path):
    rows = [{"image": "1.jpg", "captions": ["a", "b"]}, {"image": "2.jpg", "captions": []}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    for name in ("t.jsonl", "t.parquet"):
        found = ingested(tmp_path / f"{name}.parts", tmp_path / name)
        assert [(row["key"], row.get("text")) for row in found] == [
            ("1.jpg", "a"),
            ("1.jpg", "b"),
            ("2.jpg", None),
        ]


def test_columns_option_names_columns_before_the_known_ones(tmp_path):
    pq.write_table(pa.table({"text": ["no"], "alt": ["yes"], "w": [3]}), tmp_path / "t.parquet")
    chosen = columns.parse_columns("text=alt, width=w")
    assert ingested(tmp_path / "parts", tmp_path / "t.parquet", chosen) == [
        {"key": "t.parquet:0", "text": "yes", "width": 3}
    ]


def test_parts_of_a_folder_are_read_in_order_and_may_differ_in_columns(tmp_path):
    folder = tmp_path / "parts_in"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["b"]}), folder / "2.parquet")
    pq.write_table(pa.table({"TEXT": ["a"], "WIDTH": [5]}), folder / "1.parquet")
    (folder / "_SUCCESS").write_text("")
    assert ingested(tmp_path / "parts", folder) == [
        {"key": "1.parquet:0", "text": "a", "width": 5},
        {"key": "2.parquet:0", "text": "b"},
    ]


def test_broken_lines_are_marked_and_the_others_read(tmp_path):
    lines = [
        b'{"text": "good", "width": "12"}',
        b'{"text": "cut',
        b"",
        b"[1, 2]",
        b'{"text": "caf\xe9"}',
        b'{"text": "\\ud83d half"}',
        b'{"text": 5, "width": "many"}',
        b'{"width": 3}',
        b'{"text": "last", "width": 1e400}',
    ]
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines))
    found = ingested(tmp_path / "parts", tmp_path / "t.jsonl")
    assert [row.get("problem") for row in found] == [
        None,
        "row_malformed",
        "row_malformed",
        None,
        None,
        "row_malformed",
        None,
        None,
    ]
    assert found[0]["width"] == 12 and found[3]["text"] == "caf\ufffd"
    assert found[4]["text"] == "\ufffd half" and repaired(tmp_path / "parts") == 2
    assert [row["key"] for row in found] == [f"t.jsonl:{row}" for row in range(8)]


def test_broken_rows_of_csv_and_tsv_are_marked(tmp_path):
    csv_rows = b'url,text\nu1,"a, b"\nu2\nu3,c,d\nu4,"line\nbreak"\nu5,\xff\n'
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + csv_rows)
    (tmp_path / "t.tsv").write_bytes(b"url\ttext\nu1\ta\rb\nu2\nu3\tc\td\n\nu4\t\xff\n")
    found = ingested(tmp_path / "csv", tmp_path / "t.csv")
    problems = [None, "row_malformed", "row_malformed", None, None]
    assert [row.get("problem") for row in found] == problems
    assert [row["text"] for row in found] == ["a, b", "u2", "u3,c,d", "line\nbreak", "\ufffd"]
    assert repaired(tmp_path / "csv") == 1
    found = ingested(tmp_path / "tsv", tmp_path / "t.tsv")
    assert [row.get("problem") for row in found] == [None, "row_malformed", "row_malformed", None]
    assert found[3]["text"] == "\ufffd" and repaired(tmp_path / "tsv") == 1
    assert found[0]["text"] == "a\rb"


def test_invalid_utf8_inside_parquet_is_repaired_and_counted(tmp_path):
    raw = pa.array([b"good", b"\xff\xfe", None], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": text, "url": ["1", "2", "3"]}), tmp_path / "t.parquet")
    found = ingested(tmp_path / "parts", tmp_path / "t.parquet")
    assert [row.get("text") for row in found] == ["good", "\ufffd\ufffd", None]
    assert not any("problem" in row for row in found) and repaired(tmp_path / "parts") == 1


@pytest.mark.parametrize(
    ("name", "content", "arguments", "expected"),
    [
        ("t.csv", "a,b\n1,2\n", (), "t.csv has no text column: it has a, b; name it by --columns"),
        ("t.csv", "", (), "t.csv has no text column: it has none; name it by"),
        ("t.parquet", "nonsense, but long enough", (), "t.parquet is not a readable Parquet file"),
        ("t.csv", "text\n", (), "t.csv has no rows."),
        ("t.xml", "<a/>", (), "cannot read .xml; known are .parquet, .csv, .tsv, .jsonl."),
        ("t.tsv", f"a\tb\t{URL}\n", (), "t.tsv has no header and 3 columns; give it one"),
        (
            "t.csv",
            "text\na\n",
            ("--columns", "txt=a"),
            "unknown column 'txt'. Did you mean 'text'?",
        ),
        ("t.csv", "text\na\n", ("--columns", "text"), "'text' is not of the form ours=theirs."),
        ("t.csv", "text\na\n", ("--columns", "width=w"), "t.csv has no column 'w' (--columns"),
        ("t.csv", "text\na\n", ("--preset", "coyoo"), "'coyoo' is unknown. Did you mean 'coyo'?"),
        ("t.csv", "text\na\n", ("--preset", "my.py"), "--preset 'my.py' is unknown."),
        ("t.csv", "text\na\n", ("--preset", "bad.py"), "--preset bad.py: NameError: name 'rule'"),
        ("t.csv", "text\na\n", ("--preset", "none.py"), "--preset none.py has no RULES"),
        ("t.csv", "text\na\n", ("--preset", "metaclip"), "metaclip needs --metadata FILE"),
        (
            "t.csv",
            "text\na\n",
            ("--metadata", "t.csv"),
            "--metadata is of no use to --preset align",
        ),
        ("t.csv", "text\na\n", ("--engine", "flink"), "--engine 'flink' is unknown; use duckdb"),
        ("t.csv", "text\na\n", ("--memory", "0.1"), "--memory 0.1 is too little"),
        ("t.csv", "text\na\n", ("--seed", "-1"), "--seed -1 must be 0 to 2**63 - 1."),
        ("t.csv", "text\na\n", ("--out", "used"), "used is not empty and holds no result"),
        ("t.csv", "text\na\n", ("--out", "t.csv"), "t.csv is a file; name a folder."),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path, monkeypatch, capfd, name, content, arguments, expected
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(content)
    (tmp_path / "bad.py").write_text("RULES = [rule]")
    (tmp_path / "none.py").write_text("")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    preset = () if "--preset" in arguments else ("--preset", "align")
    options = [*preset, "--out", "out", *arguments]
    assert expected in error_of(capfd, "curate", name, *options)
    assert not (tmp_path / "out").exists()


def test_missing_and_mixed_sources_are_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    options = ["--preset", "align", "--out", "out"]
    assert "no.parquet: no such table" in error_of(capfd, "curate", "no.parquet", *options)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "a.csv").write_text("text\na\n")
    (tmp_path / "two" / "a.tsv").write_text("text\na\n")
    message = error_of(capfd, "curate", "two", *options)
    assert "two holds .csv and .tsv files; choose one kind by a glob." in message
    (tmp_path / "before").mkdir()
    for name in ("kept", "dropped"):
        pq.write_table(pa.table({"text": ["a"]}), tmp_path / "before" / f"{name}.parquet")
    for source in ("before", "before/*.parquet"):
        message = error_of(capfd, "curate", source, *options)
        assert f"{source} holds what `align curate` kept and what it dropped; name " in message
    assert message.endswith(os.path.join("before", "kept.parquet."))


def test_real_tables_are_recognised(tmp_path):
    laion = ingested(tmp_path / "laion", real_data("metadata", "laion_10k.parquet"))
    assert len(laion) == 10_000 and set(laion[0]) == {"key", "url", "text"}
    cc3m = ingested(tmp_path / "cc3m", real_data("metadata", "cc3m_val_text_rest.tsv"))
    assert len(cc3m) == 12_247 and cc3m[0]["url"].startswith("http")
    pairs = ingested(tmp_path / "pairs", real_data("cc3m", "train.jsonl"))
    assert len(pairs) == 10_000 and pairs[0]["key"].endswith(".jpg")
    assert not any("problem" in row for row in [*laion, *cc3m, *pairs])


def test_other_columns_are_carried_along_with_their_types(tmp_path):
    table = {
        "key": ["a", "b", "c"],
        "text": [["one", "two"], ["three"], ["four"]],
        "license": ["MIT", None, "CC"],
        "exif": [{"x": 1}] * 3,
        "views": [7, None, 9],
        "score": [0.5, 1.5, None],
        "Words": ["taken"] * 3,
        "odd name": ["left out"] * 3,
    }
    made, out = curate_table(tmp_path, table, "num_chars(at_least=4)")
    left_out = made["problems"]["column_left_out"]
    assert left_out["count"] == 3 and left_out["first"].endswith(": exif")
    kept = pq.read_table(out / "kept.parquet")
    assert kept.column_names == ["key", "text", "license", "views", "score"]
    assert kept.schema.field("views").type == pa.int64()
    assert kept.schema.field("score").type == pa.float64()
    assert kept.select(["key", "license", "views", "score"]).to_pylist() == [
        {"key": "b", "license": None, "views": None, "score": 1.5},
        {"key": "c", "license": "CC", "views": 9, "score": None},
    ]
    (tmp_path / "x.jsonl").write_text('{"text": "a b c", "license": "MIT", "views": 3}\n')
    made = curate.curate(
        str(tmp_path / "x.jsonl"), tmp_path / "two", preset=str(tmp_path / "preset.py")
    )
    assert made["rows_kept"] == 1
    row = pq.read_table(tmp_path / "two" / "kept.parquet").to_pylist()[0]
    assert (row["license"], row["views"]) == ("MIT", "3")
