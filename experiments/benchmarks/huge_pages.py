"""Training step of the quickstart model on CPU with 4-KiB pages and with huge pages, by turns.

    python experiments/benchmarks/huge_pages.py

It is why `align` sets GLIBC_TUNABLES=glibc.malloc.hugetlb=1 on Linux: see `cli._use_huge_pages`.
"""

import os
import resource
import subprocess
import sys
import time

STEPS, ROUNDS = 10, 3


def main():
    print("pages        wall s/step  user  system  page faults/step")
    walls = {"4 KiB": [], "huge": []}
    for _ in range(ROUNDS):
        for name, setting in (("4 KiB", "glibc.malloc.hugetlb=0"), ("huge", HUGE)):
            env = os.environ | {"GLIBC_TUNABLES": setting}
            out = subprocess.run(
                [sys.executable, __file__, "child"], env=env, check=True, capture_output=True
            ).stdout.decode()
            wall, user, system, faults = map(float, out.split())
            walls[name].append(wall)
            print(f"{name:<12} {wall:>11.3f} {user:>5.3f} {system:>7.3f} {faults:>17,.0f}")
    ratio = min(walls["4 KiB"]) / min(walls["huge"])
    print(f"best of {ROUNDS}: {ratio:.2f} times faster with huge pages")


HUGE = "glibc.malloc.hugetlb=1"


def child():
    """Prints wall, user and system seconds and page faults of one step."""
    import jax
    import numpy as np

    from align_jax import mesh, train, train_step
    from configs import quickstart

    c = quickstart.get_config()
    m = mesh.make_mesh()
    model, optimizer, abstract, step = train.make_program(c, m, vocab_size=c.data.vocab_size)
    s = train_step.init_state(model, optimizer, abstract, seed=0)
    rng = np.random.default_rng(0)
    size, batch, length = c.data.image_size, c.train.batch_size, c.data.max_tokens
    arrays = {
        "image": rng.integers(0, 256, (batch, size, size, 3), np.uint8),
        "ids": rng.integers(5, c.data.vocab_size, (batch, length)).astype(np.int32),
        "mask": np.ones((batch, length), np.int32),
        "index": np.arange(batch, dtype=np.int32),
    }
    arrays = mesh.put_batch(arrays, mesh.batch_sharding(m))
    for _ in range(2):
        s, metrics = step(s, arrays)
    jax.block_until_ready(metrics)
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(STEPS):
        s, metrics = step(s, arrays)
    jax.block_until_ready(metrics)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    values = (
        wall,
        after.ru_utime - before.ru_utime,
        after.ru_stime - before.ru_stime,
        after.ru_minflt - before.ru_minflt,
    )
    print(*(value / STEPS for value in values))


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    child() if sys.argv[1:] == ["child"] else main()
