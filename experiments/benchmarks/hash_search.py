"""Exact search for near-duplicates inside a set of made hashes: pairs found, candidates, time.

python experiments/benchmarks/hash_search.py --rows 1000000 --rows 10000000 --memory 2

Of a thousandth of the hashes there are copies, 0 to 5 bits away (five kinds up to the limit of 4,
one beyond it). The time is that of `align decontaminate`, from table to list of keys to drop.
"""

import argparse
import itertools
import os
import resource
import tempfile
import time

import duckdb
import numpy as np
import pyarrow as pa
from pyarrow import parquet

from align_jax.curate.near_duplicates import inside
from align_jax.curate.near_duplicates.decontaminate import decontaminate

LIMIT = 4


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, action="append", required=True)
    parser.add_argument("--memory", type=float, default=2.0, help="GiB of DuckDB")
    parser.add_argument("--engine", default="duckdb")
    args = parser.parse_args()
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            _measure(rows, args, folder)


def _measure(rows: int, args: argparse.Namespace, folder: str) -> None:
    rng = np.random.default_rng(0)
    hashes, planted = make_hashes(rng, rows)
    path = os.path.join(folder, "train.parquet")

    texts = [f"{value:016x}" for value in hashes.tolist()]
    parquet.write_table(pa.table({"key": np.arange(rows).astype(str), "phash": texts}), path)
    del texts
    start, cpu_start = time.monotonic(), _cpu_s()
    out = os.path.join(folder, "out")
    report = decontaminate(path, [], out, engine=args.engine, memory_gib=args.memory)
    seconds, cpu = time.monotonic() - start, _cpu_s() - cpu_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    matches = parquet.read_table(os.path.join(out, "matches.parquet"))
    found = set(zip(matches["key"].to_pylist(), matches["match_key"].to_pylist(), strict=True))
    within = planted[: LIMIT + 1].reshape(-1, 2)
    missed = sum((str(copy), str(first)) not in found for copy, first in within.tolist())
    bands, shared = inside.choose_bands(rows, LIMIT)
    print(
        f"{rows:,} hashes, {bands} bands of which {shared} agree: {len(within):,} planted pairs, "
        f"{missed} missed; {report['dropped']:,} dropped; "
        f"{count_candidates(hashes, bands, shared):,} candidates; "
        f"{seconds:.0f} s, {cpu:.0f} s of CPU, peak {peak:.2f} GiB",
        flush=True,
    )


def make_hashes(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns hashes, uint64 [rows], and planted pairs of (copy, original), [LIMIT + 2, K, 2]."""
    hashes = rng.integers(0, 2**64, rows, np.uint64)
    count = rows // 1000
    planted = []
    for bits in range(LIMIT + 2):
        originals = np.arange(bits * count, (bits + 1) * count)
        copies = rows - 1 - originals
        flips = np.argsort(rng.random((count, 64)), axis=1)[:, :bits].astype(np.uint64)
        mask = np.bitwise_or.reduce(np.uint64(1) << flips, axis=1, initial=np.uint64(0))
        hashes[copies] = hashes[originals] ^ mask
        planted.append(np.stack([copies, originals], axis=1))
    return hashes, np.array(planted)


def count_candidates(hashes: np.ndarray, bands: int, shared: int) -> int:
    """Pairs that agree in a choice of bands, of all choices."""
    con = duckdb.connect()
    con.register("hashes", pa.table({"hash": hashes.view(np.int64)}))
    total = 0
    for chosen in itertools.combinations(inside.band_masks(bands), shared):
        mask = sum(chosen) - 2**64 * (sum(chosen) >> 63)
        groups = f"SELECT count(*) AS n FROM hashes GROUP BY hash & {mask}"
        ((pairs,),) = con.sql(f"SELECT sum(n * (n - 1) // 2) FROM ({groups})").fetchall()
        total += int(pairs)
    return total


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
