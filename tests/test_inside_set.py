"""near_duplicates/inside.py: all pairs by joins of bands, groups of chains, engines, kills."""

import itertools
import math
import signal
import subprocess
import sys

import ibis
import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse
from helpers import environment, snapshot
from pyarrow import parquet

from align_jax.curate.filter import engines
from align_jax.curate.near_duplicates import inside
from align_jax.curate.near_duplicates.decontaminate import decontaminate


def make_hashes(count, seed=0):
    """Different hashes, of which every fourth is 1 to 17 bits from the one before."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, count, np.uint64)
    for row in range(1, count, 4):
        bits = rng.choice(64, rng.integers(1, 18), replace=False).astype(np.uint64)
        hashes[row] = hashes[row - 1] ^ np.bitwise_or.reduce(np.uint64(1) << bits)
    assert len(np.unique(hashes)) == count
    return hashes


def slow_pairs(hashes, limit):
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    return {(i, j) for i, j in zip(*np.nonzero(bits <= limit), strict=True) if i < j}


@pytest.fixture
def engine(tmp_path):
    engine = engines.open_engine("duckdb", str(tmp_path / "spill"), 0.5)
    yield engine
    engine.close()


def upload(engine, hashes):
    return engine.upload(pa.table({"row": np.arange(len(hashes)), "hash": hashes.view(np.int64)}))


def find_pairs(engine, table, bands, shared, limit):
    masks = inside.band_masks(bands)
    choices = itertools.combinations(range(bands), shared)
    joins = [inside.near_pairs(table, chosen, masks, limit) for chosen in choices]
    return [(row["i"], row["j"]) for row in engine.all(ibis.union(*joins))]


# Up to 4 bits with two bands that agree, more with one, and with none: all with all.
@pytest.mark.parametrize(
    ("limit", "shared"), [(d, 2 if d < 5 else 1) for d in range(17)] + [(4, 3), (7, 2), (16, 0)]
)
def test_joins_find_every_pair_once(engine, limit, shared):
    hashes = make_hashes(700, limit)
    bands = limit + shared
    found = find_pairs(engine, upload(engine, hashes), bands, shared, limit)
    assert len(found) == len(set(found))
    assert set(found) == slow_pairs(hashes, limit)
    assert len(found) >= 5 * limit  # of 175 planted ones


def test_bands_share_the_64_bits_and_fewer_of_them_would_lose_pairs(engine):
    for bands in range(1, 23):
        masks = inside.band_masks(bands)
        assert (
            sum(masks) == 2**64 - 1 and np.bitwise_or.reduce(np.array(masks, object)) == 2**64 - 1
        )
        assert {mask.bit_count() for mask in masks} <= {64 // bands, 64 // bands + 1}
    # Four bits in four bands of six leave two that agree, and no third one.
    hashes = np.array([0, 1 | 1 << 12 | 1 << 25 | 1 << 40], np.uint64)
    table = upload(engine, hashes)
    assert find_pairs(engine, table, 6, 2, 4) == [(0, 1)]
    assert find_pairs(engine, table, 6, 3, 4) == []


def test_the_choice_of_bands_follows_the_number_of_hashes():
    for limit, number in itertools.product(range(17), (1, 5_000, 10**6, 10**9)):
        bands, shared = inside.choose_bands(number, limit)
        assert bands - shared == limit
    assert inside.choose_bands(1_000, 8) == (8, 0)  # all with all
    chosen = [inside.choose_bands(10**power, 4) for power in range(3, 11)]
    assert chosen == sorted(chosen)
    assert {(6, 2), (7, 3), (8, 4)} <= set(chosen)
    assert [math.comb(*choice) for choice in ((6, 2), (7, 3), (8, 4))] == [15, 35, 70]


def test_groups_are_the_connected_components(engine, tmp_path):
    rng = np.random.default_rng(1)
    chain = np.array([2**n - 1 for n in range(64)], np.uint64)  # neighbours are one bit apart
    hashes = np.concatenate([chain, make_hashes(400), np.repeat(make_hashes(3, 5), 30)])
    hashes = hashes[rng.permutation(len(hashes))]
    groups = inside.find_groups(upload(engine, hashes), engine, str(tmp_path / "found"), 1)
    near = np.bitwise_count(hashes[:, None] ^ hashes[None, :]) <= 1
    _, labels = scipy.sparse.csgraph.connected_components(near, directed=False)
    first = {label: row for row, label in reversed(list(enumerate(labels)))}
    wanted = {row: first[label] for row, label in enumerate(labels) if first[label] != row}
    found = [(row["row"], row["first"]) for row in engine.all(groups)]
    assert len(found) == len(dict(found)) and dict(found) == wanted
    assert np.bincount(labels).max() >= 64


def test_no_pairs_are_no_groups(engine, tmp_path):
    hashes = np.array([0, 2**63, 2**40 - 1], np.uint64)
    groups = inside.find_groups(upload(engine, hashes), engine, str(tmp_path / "found"), 0)
    assert engine.all(groups) == []


def test_far_too_many_pairs_say_what_to_change(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(inside, "MAX_PAIRS", 1000)
    hashes = np.arange(256, dtype=np.uint64)
    with pytest.raises(ValueError, match=r"^More than [\d,]+ pairs of 256 hashes are within dist"):
        inside.find_groups(upload(engine, hashes), engine, str(tmp_path / "found"), 8)


@pytest.mark.parametrize("limit", [0, 4, 16])
def test_joins_are_valid_for_bigquery(limit):
    import sqlglot

    table = ibis.table({"row": "int64", "hash": "int64"}, "hashes")
    masks = inside.band_masks(limit + 2)
    query = inside.near_pairs(table, (0, 1), masks, limit)
    sql = str(ibis.to_sql(query, dialect="bigquery"))
    sqlglot.parse_one(sql, read="bigquery")
    assert "BIT_COUNT" in sql.upper()


def write_table(path, hashes):
    keys = [f"{row}.jpg" for row in range(len(hashes))]
    texts = [f"{value:016x}" for value in hashes.tolist()]
    parquet.write_table(pa.table({"key": keys, "phash": texts}), path)


@pytest.mark.slow
def test_spark_finds_the_groups_of_duckdb(tmp_path, monkeypatch):
    pytest.importorskip("pyspark")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inside, "choose_bands", lambda number, limit: (limit + 2, 2))
    hashes = np.concatenate([make_hashes(4000), np.repeat(make_hashes(3, 5), 50)])
    write_table("train.parquet", hashes)
    report = decontaminate("train.parquet", [], "duckdb")
    decontaminate("train.parquet", [], "spark", engine="spark://local")
    assert report["dropped"] > 300
    assert snapshot("spark") == snapshot("duckdb")


KILLED = """
import os, sys
from align_jax.curate.filter import engines
from align_jax.curate.near_duplicates import inside
from align_jax.curate.near_duplicates.decontaminate import decontaminate
inside.choose_bands = lambda number, limit: (limit + 2, 2)
left, write = [int(sys.argv[1])], engines.Engine.write
def counting(self, table, path):
    if not left[0]:
        self._write(table, path + ".half")
        os.kill(os.getpid(), 9)
    left[0] -= 1
    write(self, table, path)
engines.Engine.write = counting
decontaminate("train.parquet", [], "out")
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 5, 16, 17])  # unique hashes, joins, steps to groups
def test_sigkill_and_rerun_equal_an_undisturbed_search(tmp_path, monkeypatch, after):
    monkeypatch.chdir(tmp_path)
    write_table("train.parquet", np.concatenate([make_hashes(3000), make_hashes(400)]))
    decontaminate("train.parquet", [], "whole")

    def run(number):
        command = [sys.executable, "-c", KILLED, str(number)]
        return subprocess.run(command, env=environment(), check=False).returncode

    assert run(after) == -signal.SIGKILL
    assert not (tmp_path / "out" / "report.json").exists()
    assert run(-1) == 0
    assert snapshot("out") == snapshot("whole")
