"""`align bench search`: a folder index beside exact search in JAX and numpy.

All parts see the same vectors in the same run: unit vectors in 400 clusters of unequal sizes, with
a common mean, and queries from the same clusters that are not in the index. Times are of a single
query (median and 99th percentile) and of many in one call; CPU milliseconds count all threads, so
they can be compared on a busy machine.
"""

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from align_jax.evals.top_k import top_k
from align_jax.search.index import Identity, Index

K = 10
_NUM_CLUSTERS, _INNER_DIM = 400, 24

_Search = Callable[[np.ndarray], np.ndarray]  # queries [N, D] -> rows [N, K]


def measure_search(
    num_rows: int = 100_000, dim: int = 640, num_queries: int = 1000, num_single: int = 50
) -> dict[str, Any]:
    """Returns the report: settings, and `results`, one entry for numpy, JAX and the folder index.

    Args:
      num_rows: of the index, at least 10.
      dim: width of the vectors.
      num_queries: in one call.
      num_single: queries one by one, at most `num_queries`.

    Raises:
      ValueError: a number is too small.
      RuntimeError: the index fails.
    """
    least = {"--rows": (num_rows, K), "--dim": (dim, 1), "--queries": (num_queries, 1)}
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise ValueError(f"{name} {value} must be at least {smallest}.")
    z, queries = make_vectors(num_rows, dim, num_queries)
    right, _ = top_k(queries, z, K)  # compiles, too
    top_k(queries[:1], z, K)
    results = [
        _measure("numpy", num_single, queries, lambda q: _by_numpy(q, z), right),
        _measure("JAX, exact top_k", num_single, queries, lambda q: top_k(q, z, K)[0], right),
    ]
    folder = Path(tempfile.mkdtemp(prefix="align-search-"))
    try:
        results.append(_measure_index(folder / "index", z, num_single, queries, right))
    finally:
        shutil.rmtree(folder)
    sizes = {"rows": num_rows, "dim": dim, "k": K, "queries": num_queries, "single": num_single}
    return {**sizes, "cores": os.cpu_count(), "results": results}


def format_search(report: dict[str, Any]) -> str:
    """Returns the report as a table."""
    lines = [
        f"{report['rows']:,} rows of {report['dim']}, {report['k']} hits, {report['cores']} cores; "
        "milliseconds of a query",
        f"{'':18} one: CPU  p50  p99  {report['queries']:,} at once: CPU  wall  recall@10",
    ]
    for found in report["results"]:
        lines.append(
            f"{found['what']:18} {found['single_cpu_ms']:>8} {found['single_p50_ms']:>5}"
            f" {found['single_p99_ms']:>5} {found['bulk_cpu_ms']:>12} {found['bulk_wall_ms']:>6}"
            f" {found['recall']:>10.4f}"
        )
    built = report["results"][-1]
    lines.append(
        f"building the folder: {built['build_cpu_s']} s of CPU in {built['build_wall_s']} s, "
        f"{built['disk_mb']} MB on disk; opening and first query {built['open_s']} s; peak memory "
        f"of the whole run {built['peak_rss_mb']} MB"
    )
    return "\n".join(lines)


def make_vectors(num_rows: int, dim: int, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns unit vectors of the index [N, D] and of queries [Q, D], float32."""
    rng = np.random.default_rng(0)
    shares = np.arange(1, _NUM_CLUSTERS + 1) ** -1.0
    centres = rng.normal(size=(_NUM_CLUSTERS, dim)) + 0.7 * rng.normal(size=dim)
    spread = rng.normal(size=(_NUM_CLUSTERS, _INNER_DIM, dim)).astype(np.float32)
    parts = []
    cluster = rng.choice(_NUM_CLUSTERS, num_rows + num_queries, p=shares / shares.sum())
    for start in range(0, len(cluster), 4096):
        own = cluster[start : start + 4096]
        inside = rng.normal(size=(len(own), _INNER_DIM)).astype(np.float32)
        z = centres[own] + 0.12 * np.einsum("ni,nid->nd", inside, spread[own])
        parts.append((z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32))
    z = np.concatenate(parts)
    return z[:num_rows], z[num_rows:]


def _by_numpy(queries: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The rows of the best scores, in blocks of queries; ties in any order."""
    found = []
    for start in range(0, len(queries), 100):
        scores = queries[start : start + 100] @ z.T
        best = np.argpartition(-scores, K - 1, axis=1)[:, :K]
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1)
        found.append(np.take_along_axis(best, order, axis=1))
    return np.concatenate(found)


def _measure(
    name: str, num_single: int, queries: np.ndarray, search: _Search, right: np.ndarray
) -> dict[str, Any]:
    """Times and recall; `right` [N, K] are the rows of exact search."""
    walls = []
    cpu = time.process_time()
    for query in queries[:num_single]:
        wall = time.perf_counter()
        search(query[None])
        walls.append(1000 * (time.perf_counter() - wall))
    single_cpu = 1000 * (time.process_time() - cpu) / len(walls)
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


def _measure_index(
    folder: Path, z: np.ndarray, num_single: int, queries: np.ndarray, right: np.ndarray
) -> dict[str, Any]:
    """The same of an index in a folder, with what building and opening it costs."""
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

        found = _measure("folder index", num_single, queries, search, right)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        **found,
        **built,
        **opened,
        "disk_mb": round(size / 1e6),
        "peak_rss_mb": round(peak),
    }
