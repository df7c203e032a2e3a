"""Bytes that one block of EfficientNet-B7 moves on a TPU that is not here, by operation.

python experiments/benchmarks/tpu_block.py --stage 4 --topology v5e:2x2

Compiles forward and backward pass of the second block of a stage for the images of one chip, with
recomputation, once for all images at once and once for one BatchNorm group after the other, as
`model.remat=block` trains it. Needs the extra `tpu`; nothing runs. 15 to 50 s of one core each.
"""

import argparse
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp

from align_jax.models import efficientnet, layers
from align_jax.plan import aot
from align_jax.run import hlo

SIDES = (145, 73, 37, 19, 19, 10, 10)  # of the maps in each stage, for images of 289 px
GROUP = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, default=4, choices=range(1, 8))
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--images", type=int, default=256, help="of one chip")
    parser.add_argument("--top", type=int, default=12, help="operations to print")
    arguments = parser.parse_args()
    one = jax.sharding.SingleDeviceSharding(aot.topology_devices(arguments.topology)[0])
    for name, apply in (("all images at once", at_once), ("groups of 16", in_groups)):
        text, temporaries = compiled(apply, arguments.stage, arguments.images, one)
        program = hlo.parse(text)
        total = program.traffic_bytes / arguments.images
        print(f"{name}: {total / 1e6:.2f} MB an image, temporaries {temporaries / 2**20:.0f} MiB")
        table = Counter()
        for op in program.traffic:
            way = "backward" if "transpose(" in op.op_name else "forward"
            table[f"{op.kind}, {way}, {'/'.join(op.op_name.split('/')[-2:])}"] += op.bytes * op.runs
        for entry, size in table.most_common(arguments.top):
            print(f"  {size / arguments.images / 1e6:8.3f} {entry}")


def at_once(block, params, batch_stats, x, keys):
    return jax.checkpoint(partial(run, block, params, batch_stats), prevent_cse=False)(x, keys)


def in_groups(block, params, batch_stats, x, keys):
    @partial(jax.checkpoint, prevent_cse=False)
    def group(_, part):
        return None, run(block, params, batch_stats, *part)

    parts = [a.reshape(-1, GROUP, *a.shape[1:]) for a in (x, keys)]
    _, (y, moments) = jax.lax.scan(group, None, parts)
    return y.reshape(-1, *y.shape[2:]), jax.tree.map(lambda m: m.mean(0), moments)


def run(block, params, batch_stats, x, keys):
    variables = {"params": params, "batch_stats": batch_stats}
    (y, _), updated = block.apply(variables, x, (jnp.float32(0.1), keys), mutable=["batch_stats"])
    return y, updated["batch_stats"]


def compiled(apply, number, images, sharding):
    """Returns (text of the program, bytes of its temporaries)."""
    width, depth, table = efficientnet.VARIANTS["b7"]
    stage = efficientnet.scale_stages(table, width, depth)[number - 1]
    settings = efficientnet.Settings(
        "hf", "swish", 0.25, "grouped", GROUP, 1e-3, jnp.bfloat16, True, layers.unconstrained
    )
    block = efficientnet.MBConv(stage, False, False, settings)
    side = SIDES[number - 1]
    x = jax.ShapeDtypeStruct((images, side, side, stage.out_channels), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct((images, 2), jnp.uint32)
    variables = jax.eval_shape(
        lambda: block.init(jax.random.key(0), jnp.zeros(x.shape, x.dtype), (0.1, None))
    )

    def step(params, batch_stats, x, dy, keys):
        keys = jax.random.wrap_key_data(keys)
        y, vjp, moments = jax.vjp(
            lambda params, x: apply(block, params, batch_stats, x, keys), params, x, has_aux=True
        )
        # The gradient comes after the activations, as behind a loss.
        return y, *vjp((dy + y * jnp.bfloat16(0.01)).astype(dy.dtype)), moments

    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        (variables["params"], variables["batch_stats"], x, x, keys),
    )
    program = jax.jit(step).lower(*arguments).compile()
    return program.as_text(), program.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    main()
