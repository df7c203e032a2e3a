"""Nearest neighbours at ImageNet's size: time and memory of `evals.top_k` on made embeddings.

    python experiments/benchmarks/neighbours.py [--queries 50000] [--rows 1280000] [--dim 640]

The rows are a memory-mapped file, as `align embed` writes them. Some queries are rows of it with a
little noise, whose nearest row is known: all must be found. Prints one line of JSON;
`anonymous_gib` is the most memory that is not pages of the file.
"""

import argparse
import json
import resource
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np

from align_jax.evals import top_k


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=50_000)
    parser.add_argument("--rows", type=int, default=1_280_000)
    parser.add_argument("--dim", type=int, default=640)
    parser.add_argument("--k", type=int, default=20)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        shape = (args.rows, args.dim)
        z_index = np.lib.format.open_memmap(f"{folder}/z.npy", "w+", np.float32, shape)
        for start in range(0, args.rows, 10_000):
            z_index[start : start + 10_000] = _unit(rng, min(10_000, args.rows - start), args.dim)
        z_query = _unit(rng, args.queries, args.dim)
        planted = rng.choice(args.rows, args.queries // 10, replace=False)
        z_query[: len(planted)] = z_index[planted] + 0.1 * z_query[: len(planted)]
        peak = _Peak()
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        indices, _ = top_k.top_k(z_query, z_index, args.k)
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        found = int((indices[: len(planted), 0] == planted).sum())
    flops = 2 * args.queries * args.rows * args.dim
    print(
        json.dumps(
            vars(args)
            | {
                "devices": f"{jax.device_count()} {jax.default_backend()}",
                "wall_s": round(wall_s, 1),
                "cpu_s": round(cpu_s, 1),
                "gflop_per_s": round(flops / wall_s / 1e9, 1),
                "anonymous_gib": round(peak.stop() / 2**20, 2),
                "peak_rss_gib": round(
                    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2
                ),
                "planted": len(planted),
                "found": found,
            }
        )
    )


def _unit(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    z = rng.standard_normal((rows, dim), np.float32)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


class _Peak:
    """The most anonymous memory of this process, in KiB, looked at twice a second."""

    def __init__(self) -> None:
        self._most, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            lines = Path("/proc/self/status").read_text().splitlines()
            now = next(line for line in lines if line.startswith("RssAnon:"))
            self._most = max(self._most, int(now.split()[1]))

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self._most


if __name__ == "__main__":
    main()
