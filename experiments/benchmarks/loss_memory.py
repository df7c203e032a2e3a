"""Memory of the loss forms, per device, by the compiled program's own analysis.

    python experiments/benchmarks/loss_memory.py

Compiles value and gradient of the softmax loss (float32 embeddings of width 640, captions masked)
for 8 fake CPU devices at several global batches; nothing is executed, no array is made. Temporaries
are what the program needs beside its arguments and results; a block is a device's share of one
side's embeddings.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp

DEVICES, DIM, BATCHES, MILLION = 8, 640, (16_384, 32_768, 65_536), 2**20
LIMIT = "ring: at most 1 GiB at 1,048,576 pairs"


def main():
    jax.config.update("jax_num_cpu_devices", DEVICES)
    print(f"jax {jax.__version__}, {DEVICES} fake CPU devices, D = {DIM}; MiB per device")
    print(f"{'form':<9}{'tile':>6}{'batch':>10}{'temporaries':>13}{'in blocks':>11}{'growth':>8}")
    held = True
    for form, tile_size in (("dense", None), ("sharded", None), ("ring", 1024), ("ring", 2048)):
        before = 0
        for batch in BATCHES if form != "ring" else (*BATCHES, MILLION):
            temporaries = temporary_bytes(form, batch, tile_size)
            growth = f"{temporaries / before:.2f}" if before else ""
            print(
                f"{form:<9}{tile_size or '':>6}{batch:>10,}{temporaries / 2**20:>13,.1f}"
                f"{temporaries / block_bytes(batch):>11.2f}{growth:>8}",
                flush=True,
            )
            before = temporaries
            held &= batch < MILLION or temporaries <= 2**30
    print(f"{LIMIT}: {'held' if held else 'NOT HELD'}")
    return 0 if held else 1


def temporary_bytes(form, batch, tile_size):
    """Returns the bytes of temporaries per device of the compiled value and gradient."""
    from align_jax import config, losses, mesh

    m = mesh.make_mesh()
    c = config.default_config().loss
    c.form, c.tile_size, c.mask_duplicates = form, tile_size or 1024, "caption"
    loss_fn = losses.make_loss(c, m)
    rows, everywhere = mesh.batch_sharding(m), mesh.replicated(m)
    z = jax.ShapeDtypeStruct((batch, DIM), jnp.float32, sharding=rows)
    temperature = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    hashes = {"caption_hash": jax.ShapeDtypeStruct((batch, 2), jnp.uint32, sharding=rows)}
    step = jax.jit(
        jax.value_and_grad(lambda *args: loss_fn(*args)[0], argnums=(0, 1, 2)),
        out_shardings=(everywhere, (rows, rows, {"temperature": everywhere})),
    )
    analysis = step.lower(z, z, {"temperature": temperature}, hashes).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def block_bytes(batch):
    """Returns the bytes of one device's share of one side's embeddings."""
    return batch // DEVICES * DIM * 4


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    sys.exit(main())
