"""The device mesh, shardings by path rules, and host batches as global arrays.

Axes are ("data", "fsdp"): the batch is split over both, large tensors also live split over "fsdp".
Their names appear in this file only.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
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
      ValueError: the sizes do not multiply to the number of devices, or the wires between them
        allow no such mesh.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1 and fsdp > 0 and len(devices) % fsdp == 0:
        data = len(devices) // fsdp
    if data * fsdp != len(devices) or fsdp < 1:
        raise ValueError(
            f"config.mesh.data={data} x config.mesh.fsdp={fsdp} is not the number of devices, "
            f"{len(devices)}; use config.mesh.data=-1 and a config.mesh.fsdp that divides it."
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if data % slices:
        raise ValueError(f"mesh.data={data} is not divisible by the {slices} slices.")
    shape = (data // slices, fsdp)
    try:
        grid = _device_grid(shape, slices, devices, split=False)
    except NotImplementedError:  # no product of whole axes of the torus
        try:
            grid = _device_grid(shape, slices, devices, split=True)
        except (NotImplementedError, ValueError, AssertionError) as error:
            raise ValueError(
                f"config.mesh.data={data} x config.mesh.fsdp={fsdp} cannot be laid over the "
                f"{len(devices)} {devices[0].device_kind} devices as they are wired: {error}"
            ) from error
    return Mesh(grid, (DATA, FSDP), axis_types=(AxisType.Auto, AxisType.Auto))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: the first dimension over both axes."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


@dataclasses.dataclass(frozen=True)
class Rows:
    """Keeps rows [B, ...] of activations on their devices; what `models.layers.Constrain` asks.

    Attributes:
      mesh: of the devices.
      native: whether training on CPUs may use the kernels of `models/native.py`.
    """

    mesh: Mesh
    native: bool = False

    @property
    def num_devices(self) -> int:
        return self.mesh.size

    @property
    def on_cpu(self) -> bool:
        return self.mesh.devices.flat[0].platform == "cpu"

    def __call__(self, x: Any) -> Any:
        """Returns a tree of arrays, each with the sharding of a batch."""
        return jax.lax.with_sharding_constraint(x, batch_sharding(self.mesh))

    def on_each_device(self, fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Returns `fn(whole, rows) -> rows`, run by each device on the rows that it holds.

        Gradients of `whole` are summed over the devices once, whatever loops `fn` has.
        """
        axes = (DATA, FSDP)

        def local(whole: Any, rows: Any) -> Any:
            # Varying from here on: else each use of it, in a loop too, would sum its gradient.
            return fn(jax.lax.pcast(whole, axes, to="varying"), rows)

        rows = PartitionSpec(axes)
        return jax.shard_map(
            local, mesh=self.mesh, in_specs=(PartitionSpec(), rows), out_specs=rows
        )


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


def process_rows(sharding: NamedSharding, batch_size: int, process: int) -> np.ndarray:
    """Returns which rows of a global batch the devices of a process hold, int64, ascending.

    On a TPU they are not one block: a mesh follows the wires between the chips, not the order of
    the hosts.

    Args:
      sharding: from `batch_sharding`.
      batch_size: B, a multiple of the devices.
      process: index of the process.
    """
    slices = sharding.devices_indices_map((batch_size,)).items()
    held = [rows for device, (rows,) in slices if device.process_index == process]
    return np.sort(np.concatenate([np.arange(batch_size)[rows] for rows in held]))


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Returns global arrays made of each process's own rows of the batch.

    Args:
      batch: arrays of the rows that `process_rows` names for this process, in that order.
      sharding: from `batch_sharding`.
    """
    own = len(next(iter(batch.values())))
    size = own // len(sharding.addressable_devices) * sharding.num_devices
    rows = process_rows(sharding, size, jax.process_index())

    def put(value: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            return value[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]

        return jax.make_array_from_callback((size, *value.shape[1:]), sharding, part)

    return {name: put(value) for name, value in batch.items()}


def _device_grid(
    shape: tuple[int, int], slices: int, devices: Sequence[jax.Device], *, split: bool
) -> np.ndarray:
    """Returns the devices [slices * data, fsdp], neighbours in it close to each other.

    Args:
      shape: (data, fsdp) of a slice.
      slices: number of them.
      devices: of all slices.
      split: whether an axis of the mesh may be a part of an axis of the torus.
    """
    if slices > 1:
        return mesh_utils.create_hybrid_device_mesh(
            shape, (slices, 1), devices, allow_split_physical_axes=split
        )
    if not split:  # what JAX does for the kind of device
        return jax.make_mesh(shape, (DATA, FSDP), devices=devices).devices
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
