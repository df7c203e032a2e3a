"""Search in a folder index beside exact search in JAX and numpy: time, memory, disk, recall.

Run: python experiments/benchmarks/search.py --rows 100000 --dim 640 --out search.json

All parts see the same vectors in the same run: unit vectors in 400 clusters of unequal sizes, with
a common mean, and queries from the same clusters that are not in the index. Times are of a single
query (median and 99th percentile) and of 1,000 in one call; CPU milliseconds count all threads, so
they can be compared on a busy machine.
"""

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from align_jax.evals.top_k import top_k
from align_jax.search.index import Identity, Index

K = 10


def main() -> None:
    """Prints a table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=640)
    parser.add_argument("--single", type=int, default=50, help="queries one by one")
    parser.add_argument("--queries", type=int, default=1000, help="in one call")
    parser.add_argument("--out", help="JSON")
    args = parser.parse_args()
    z, queries = make_vectors(args.rows, args.dim, args.queries)
    right, _ = top_k(queries, z, K)  # compiles, too
    top_k(queries[:1], z, K)
    rows = [
        measure("numpy", args, queries, lambda q: by_numpy(q, z), right),
        measure("JAX, exact top_k", args, queries, lambda q: top_k(q, z, K)[0], right),
    ]
    folder = Path(tempfile.mkdtemp(prefix="align-search-"))
    try:
        rows.append(measure_index(folder / "index", z, args, queries, right))
    finally:
        shutil.rmtree(folder)
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if args.out:
        report = {"rows": args.rows, "dim": args.dim, "cores": os.cpu_count(), "results": rows}
        Path(args.out).write_text(json.dumps(report, indent=2) + "\n")


def make_vectors(num_rows: int, dim: int, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns unit vectors of the index and of queries, float32."""
    rng = np.random.default_rng(0)
    num_clusters, inner = 400, 24
    shares = np.arange(1, num_clusters + 1) ** -1.0
    centres = rng.normal(size=(num_clusters, dim)) + 0.7 * rng.normal(size=dim)
    spread = rng.normal(size=(num_clusters, inner, dim)).astype(np.float32)
    parts = []
    cluster = rng.choice(num_clusters, num_rows + num_queries, p=shares / shares.sum())
    for start in range(0, len(cluster), 4096):
        own = cluster[start : start + 4096]
        inside = rng.normal(size=(len(own), inner)).astype(np.float32)
        z = centres[own] + 0.12 * np.einsum("ni,nid->nd", inside, spread[own])
        parts.append((z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32))
    z = np.concatenate(parts)
    return z[:num_rows], z[num_rows:]


def by_numpy(queries: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Returns the rows of the best scores, in blocks of queries; ties in any order."""
    found = []
    for start in range(0, len(queries), 100):
        scores = queries[start : start + 100] @ z.T
        best = np.argpartition(-scores, K, axis=1)[:, :K]
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1)
        found.append(np.take_along_axis(best, order, axis=1))
    return np.concatenate(found)


def measure(name: str, args: argparse.Namespace, queries: np.ndarray, search, right) -> dict:
    """Returns times of `search(queries) -> rows [N, K]`, and its recall."""
    walls = []
    cpu = time.process_time()
    for query in queries[: args.single]:
        wall = time.perf_counter()
        search(query[None])
        walls.append(1000 * (time.perf_counter() - wall))
    single_cpu = 1000 * (time.process_time() - cpu) / args.single
    cpu, wall = time.process_time(), time.perf_counter()
    found = search(queries)
    return {
        "what": name,
        "single_cpu_ms": round(single_cpu, 1),
        "single_p50_ms": round(float(np.percentile(walls, 50)), 1),
        "single_p99_ms": round(float(np.percentile(walls, 99)), 1),
        "bulk_cpu_ms": round(1000 * (time.process_time() - cpu) / len(queries), 2),
        "bulk_wall_ms": round(1000 * (time.perf_counter() - wall) / len(queries), 2),
        "recall": float(
            np.mean([len(set(a) & set(b)) / K for a, b in zip(found, right, strict=True)])
        ),
    }


def measure_index(folder: Path, z: np.ndarray, args, queries, right) -> dict:
    """Returns the same of an index in a folder, with what building and opening it costs."""
    identity = Identity("0" * 16, z.shape[1])
    cpu, wall = time.process_time(), time.perf_counter()
    with Index(str(folder), identity) as index:
        for start in range(0, len(z), 1000):
            part = z[start : start + 1000]
            index.add([str(start + row) for row in range(len(part))], part)
        index.flush()
    built = {
        "build_wall_s": round(time.perf_counter() - wall, 1),
        "build_cpu_s": round(time.process_time() - cpu, 1),
    }
    wall = time.perf_counter()
    with Index(str(folder)) as index:
        index.search(queries[:1], k=K)
        opened = {"open_s": round(time.perf_counter() - wall, 1)}

        def search(some: np.ndarray) -> np.ndarray:
            return np.array([[int(hit.key) for hit in hits] for hits in index.search(some, k=K)])

        found = measure("folder index", args, queries, search, right)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        **found,
        **built,
        **opened,
        "disk_mb": round(size / 1e6),
        "peak_rss_mb_of_the_whole_run": round(peak),
    }


if __name__ == "__main__":
    main()
