"""Ranking a million images against a million captions: time, host memory, device memory.

    python experiments/benchmarks/retrieval.py [--rows 50000] [--dim 64]

Ranks random pairs (rows x rows, both directions) on the accelerators of this machine, or on its CPU
as one device, and scales the time to 1M x 1M. Then the memory of a device for 1M x 1M by the
compiled program's own analysis, on the accelerators or on 8 fake CPU devices; nothing of that is
executed. Host memory is the peak beyond what the embeddings take.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import jax
import numpy as np

MILLION = 1_000_000
LIMIT_MIB = 256


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=64)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    from align_jax import mesh

    on_cpu = jax.default_backend() == "cpu"
    measure(args.rows, args.dim, mesh.make_mesh(devices=jax.devices()[:1] if on_cpu else None))
    most = max(device_mib(rows, dim) for dim in (64, 640) for rows in (100_000, MILLION))
    print(f"at most {LIMIT_MIB} MiB a device: {'held' if most <= LIMIT_MIB else 'NOT HELD'}")
    return 0 if most <= LIMIT_MIB else 1


def measure(rows, dim, mesh):
    from align_jax.evals import ranking

    rng = np.random.default_rng(0)
    z_image, z_text = (rng.standard_normal((rows, dim), np.float32) for _ in range(2))
    for z in (z_image, z_text):
        z /= np.linalg.norm(z, axis=1, keepdims=True)
    z_text += 0.5 * z_image
    z_text /= np.linalg.norm(z_text, axis=1, keepdims=True)
    own = np.arange(rows)
    few = 4 * mesh.size
    ranking.pair_ranks(z_image[:few], z_text[:few], own[:few], mesh=mesh)  # starts everything
    before_mib = peak_mib()
    start_s = time.perf_counter()
    image_ranks, text_ranks = ranking.pair_ranks(z_image, z_text, own, mesh=mesh)
    took_s = time.perf_counter() - start_s
    device = mesh.devices.flat[0].device_kind
    print(f"jax {jax.__version__}, {mesh.size} x {device}, D = {dim}")
    print(
        f"{rows:,} x {rows:,}: {took_s:.1f} s with compilation, {rows**2 / took_s / 1e9:.2f}e9 "
        f"scores/s; 1M x 1M: {took_s * (MILLION / rows) ** 2 / 3600:.2f} h"
    )
    print(f"mean ranks {image_ranks.mean():.1f}, {text_ranks.mean():.1f}")
    print(
        f"peak host memory {peak_mib():,.0f} MiB, of it {peak_mib() - before_mib:,.0f} by ranking; "
        f"all scores would be {rows**2 * 4 / 2**20:,.0f} MiB"
    )


def device_mib(rows, dim):
    """Returns MiB of arguments and temporaries a device, for rows x rows, and prints them."""
    from align_jax import mesh
    from align_jax.evals import ranking

    m = mesh.make_mesh()
    shapes = ranking.block_shapes(rows, rows, dim, m)
    analysis = ranking.compile_counts(m, 256).lower(*shapes).compile().memory_analysis()
    parts = analysis.argument_size_in_bytes / 2**20, analysis.temp_size_in_bytes / 2**20
    print(
        f"{rows:>9,} x {rows:>9,}, D = {dim:>3}, {m.size} devices: blocks {parts[0]:5.1f} MiB, "
        f"temporaries {parts[1]:5.1f} MiB a device"
    )
    return sum(parts)


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    sys.exit(main())
