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


def made_order(processes, each):
    """Devices of which neighbours belong to other processes, as on a TPU."""
    return [Device(p * each + i, 0, p) for i in range(each) for p in range(processes)]


@pytest.mark.parametrize(("fsdp", "processes", "each"), [(1, 2, 4), (2, 2, 4), (4, 4, 2)])
def test_rows_of_a_process_are_those_that_its_devices_hold(fsdp, processes, each):
    order = made_order(processes, each)
    sharding = mesh.batch_sharding(mesh.make_mesh(fsdp=fsdp, devices=order))
    size = 3 * len(order)
    seen = []
    for process in range(processes):
        rows = mesh.process_rows(sharding, size, process)
        # By hand: the device at place k holds rows 3k, 3k + 1, 3k + 2.
        places = [k for k, device in enumerate(order) if device.process_index == process]
        assert rows.tolist() == [3 * k + i for k in places for i in range(3)]
        assert np.diff(rows).max() > 1  # no block
        seen += rows.tolist()
    assert sorted(seen) == list(range(size))


def test_global_row_i_is_row_i_on_devices_in_any_order():
    order = [jax.devices()[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)]
    made = jax.sharding.Mesh(np.array(order).reshape(4, 2), ("data", "fsdp"))
    batch = {"image": np.arange(96).reshape(16, 6), "index": np.arange(16)}
    arrays = mesh.put_batch(batch, mesh.batch_sharding(made))
    for name, value in batch.items():
        np.testing.assert_array_equal(arrays[name], value)
        held = {shard.device: np.asarray(shard.data) for shard in arrays[name].addressable_shards}
        for place, device in enumerate(order):
            np.testing.assert_array_equal(held[device], value[2 * place : 2 * place + 2])


def test_mesh_that_the_wires_forbid_is_split_or_one_line(monkeypatch):
    def forbid(shape, axes, devices):
        raise NotImplementedError("Failed to find assignment")

    monkeypatch.setattr(jax, "make_mesh", forbid)
    assert dict(mesh.make_mesh(fsdp=4, devices=devices(1, 8)).shape) == {"data": 2, "fsdp": 4}
    monkeypatch.setattr(mesh.mesh_utils, "create_device_mesh", lambda *a, **k: forbid(*a, 0))
    with pytest.raises(ValueError, match=r"config.mesh.data=2 x config.mesh.fsdp=4 cannot be laid"):
        mesh.make_mesh(fsdp=4, devices=devices(1, 8))


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
