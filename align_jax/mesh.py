"""The device mesh, shardings by path rules, and host batches as global arrays.

Axes are ("data", "fsdp"): the batch is split over both, large tensors also live split over "fsdp".
Their names appear in this file only.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from align_jax import trees

DATA, FSDP = "data", "fsdp"

# Tensors below this many elements stay replicated: gathering them costs more than it saves.
FSDP_MIN_ELEMENTS = 2**16

# (regex on the path, "fsdp" or "replicate"); first match wins. XLA answers a depthwise kernel split
# by channels with a gather of the whole global batch.
PARAMETER_RULES = ((r"batch_stats|/depthwise/kernel$", "replicate"), (r".*", "fsdp"))


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over all devices of all processes.

    Devices of several TPU slices form a hybrid mesh: "data" crosses slices, "fsdp" never does.

    Args:
      data: size of the batch axis; -1 takes what is left.
      fsdp: size of the axis over which parameters are sharded.
      devices: to use instead, e.g. those of a topology that is not there.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1 and fsdp > 0 and len(devices) % fsdp == 0:
        data = len(devices) // fsdp
    if data * fsdp != len(devices) or fsdp < 1:
        raise ValueError(
            f"config.mesh.data={data} x config.mesh.fsdp={fsdp} is not the number of devices, "
            f"{len(devices)}; use config.mesh.data=-1 and a config.mesh.fsdp that divides it."
        )
    types = (AxisType.Auto, AxisType.Auto)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh((data, fsdp), (DATA, FSDP), axis_types=types, devices=devices)
    if data % slices:
        raise ValueError(f"mesh.data={data} is not divisible by the {slices} slices.")
    grid = mesh_utils.create_hybrid_device_mesh((data // slices, fsdp), (slices, 1), devices)
    return Mesh(grid, (DATA, FSDP), axis_types=types)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: the first dimension over both axes."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def infer_shardings(
    tree: Any, mesh: Mesh, rules: Sequence[tuple[str, str]] = PARAMETER_RULES
) -> Any:
    """Returns a tree of NamedSharding, by the first rule that matches each leaf's path.

    "fsdp" splits the largest dimension that the axis divides, if the tensor has at least
    `FSDP_MIN_ELEMENTS` elements and such a dimension exists. Optimizer moments match like the
    parameters they belong to, because paths end alike and shapes are equal.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s.
      mesh: from `make_mesh`.
      rules: ((regex, "fsdp" | "replicate"), ...).
    """
    size = mesh.shape[FSDP]

    def sharding(name: str, leaf: jax.ShapeDtypeStruct | jax.Array) -> NamedSharding:
        tactic = next(tactic for pattern, tactic in rules if re.search(pattern, name))
        elements = int(np.prod(leaf.shape, dtype=np.int64))
        divisible = [axis for axis, n in enumerate(leaf.shape) if n % size == 0]
        if tactic == "replicate" or size == 1 or elements < FSDP_MIN_ELEMENTS or not divisible:
            return replicated(mesh)
        largest = max(divisible, key=lambda axis: leaf.shape[axis])
        spec = [None] * len(leaf.shape)
        spec[largest] = FSDP
        return NamedSharding(mesh, PartitionSpec(*spec))

    return trees.map_named(sharding, tree)


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Returns global arrays made of each process's own rows of the batch.

    Args:
      batch: arrays whose first dimension is this process's share of the global batch.
      sharding: from `batch_sharding`.
    """
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }
