"""mesh.py on several TPU slices, whose devices are made up: which axis crosses slices."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from align_jax import mesh


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as a mesh asks for."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    client = None


def devices(slices, each):
    return [Device(s * each + i, s, s) for s in range(slices) for i in range(each)]


@pytest.mark.parametrize(("slices", "each", "fsdp"), [(2, 4, 4), (2, 4, 2), (4, 2, 2), (2, 4, 1)])
def test_data_crosses_slices_and_fsdp_never_does(slices, each, fsdp):
    made = mesh.make_mesh(fsdp=fsdp, devices=devices(slices, each))
    assert made.axis_names == ("data", "fsdp")
    assert dict(made.shape) == {"data": slices * each // fsdp, "fsdp": fsdp}
    in_slice = np.vectorize(lambda device: device.slice_index)(made.devices)
    assert (in_slice == in_slice[:, :1]).all()
    # Neighbours along "data" are of one slice as long as it lasts.
    assert (np.diff(in_slice[:, 0]) >= 0).all() and len(set(in_slice[:, 0])) == slices


def test_data_axis_that_does_not_divide_into_slices_is_refused():
    with pytest.raises(ValueError, match="mesh.data=1 is not divisible by the 2 slices"):
        mesh.make_mesh(data=1, fsdp=8, devices=devices(2, 4))


def test_large_tensors_are_split_along_their_largest_divisible_side_others_replicated():
    def spec(name, *shape):
        tree = {name: jax.ShapeDtypeStruct(shape, np.float32)}
        return mesh.infer_shardings(tree, made)[name].spec

    made = mesh.make_mesh(2, 4)
    assert spec("params/text/word_embeddings/embedding", 1000, 128) == PartitionSpec("fsdp", None)
    assert spec("opt_state/mu/text/query/kernel", 256, 1024) == PartitionSpec(None, "fsdp")
    assert spec("params/text/odd", 1001, 256) == PartitionSpec(None, "fsdp")
    assert spec("params/text/odder", 1001, 255) == PartitionSpec()
    assert spec("params/text/small", 256, 255) == PartitionSpec()
    assert spec("params/text/just", 256, 256) == PartitionSpec("fsdp", None)
    assert spec("params/image/stage1/block0/depthwise/kernel", 5, 5, 1, 4096) == PartitionSpec()
    assert spec("batch_stats/image/stage1/block0/bn/mean", 2**17) == PartitionSpec()
