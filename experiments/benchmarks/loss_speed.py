"""Time of the ring loss beside plain matrix products of as many FLOPs, by turns.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python experiments/benchmarks/loss_speed.py

Value and gradient of the softmax loss (float32 embeddings of width 640, captions masked) on fake
CPU devices: 8 B^2 D FLOPs, in two products of the kind [t, D] x [D, t] (the logits, computed again
for the gradient) and two of [t, t] x [t, D]. The plain products are those four at t = 4,096 on one
device that has all cores. Prints the least time of each and their ratio.
"""

import argparse
import sys
import time
from pathlib import Path

import jax

DIM, SIDE = 640, 4096


def main() -> None:
    """Prints a line for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[16_384, 65_536])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--tile", type=int, default=1024)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.devices)
    print(
        f"jax {jax.__version__}, {args.devices} fake CPU devices, tiles of {args.tile}, D = {DIM}"
    )
    for batch in args.batches:
        flops = 8 * batch**2 * DIM
        ring, plain = ring_step(batch, args.tile), plain_products(flops)
        seconds(ring), seconds(plain)  # compiles
        times = [(seconds(ring), seconds(plain)) for _ in range(args.rounds)]
        ring_s, plain_s = (min(column) for column in zip(*times, strict=True))
        print(
            f"{batch:,} pairs: ring {ring_s:.2f} s ({flops / ring_s / 1e9:.0f} GFLOP/s), plain "
            f"{plain_s:.2f} s ({flops / plain_s / 1e9:.0f}); {plain_s / ring_s:.2f} of plain speed",
            flush=True,
        )


def ring_step(batch: int, tile: int):
    """Returns a function of nothing that computes value and gradients of so many pairs."""
    from align_jax import config, losses, mesh

    m = mesh.make_mesh()
    c = config.default_config().loss
    c.form, c.tile_size, c.mask_duplicates = "ring", tile, "caption"
    loss_fn = losses.make_loss(c, m)
    rows = mesh.batch_sharding(m)
    keys = jax.random.split(jax.random.key(0), 3)
    z_image, z_text = (jax.random.normal(key, (batch, DIM)) / DIM**0.5 for key in keys[:2])
    hashes = jax.random.bits(keys[2], (batch, 2))
    z_image, z_text, hashes = jax.device_put((z_image, z_text, hashes), rows)
    step = jax.jit(
        jax.value_and_grad(
            lambda *z: loss_fn(*z, {"temperature": 0.1}, {"caption_hash": hashes})[0], (0, 1)
        )
    )
    return lambda: step(z_image, z_text)


def plain_products(flops: int):
    """Returns a function of nothing that makes matrix products of so many FLOPs."""
    a = jax.random.normal(jax.random.key(1), (SIDE, DIM))
    square = jax.random.normal(jax.random.key(2), (SIDE, SIDE))
    products = [jax.jit(lambda x, y: x @ y.T), jax.jit(lambda x, y: x @ y)]
    count = round(flops / (4 * 2 * SIDE**2 * DIM))

    def run():
        for _ in range(count):
            logits = products[0](a, a), products[0](a, a)
            result = logits, products[1](square, a), products[1](square, a)
            jax.block_until_ready(result)
        return result

    return run


def seconds(function) -> float:
    """Returns how long a call takes."""
    start_s = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start_s


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
