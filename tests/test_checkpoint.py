"""Checkpoints (run/checkpoint.py, run/packed.py): small tensors, counts, other meshes."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import read_checkpoint
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from align_jax import mesh as mesh_lib
from align_jax.run import packed
from align_jax.run.checkpoint import Checkpointer
from align_jax.state import TrainState

DATA = {"dropped": np.array([5, 7], np.int64)}


@pytest.fixture
def state():
    return TrainState(
        step=jax.numpy.int32(3),
        params={"w": jax.numpy.ones(2)},
        batch_stats={},
        opt_state={"m": jax.numpy.zeros(2)},
    )


def test_counts_that_are_longer_now_begin_at_zero(tmp_path, state):
    checkpoints = Checkpointer(tmp_path / "c", keep=1)
    checkpoints.save(state, {"dropped": np.array([5, 7], np.int64)})
    checkpoints.wait()
    _, data = checkpoints.restore(3, state, {"dropped": np.zeros(4, np.int64)})
    assert data["dropped"].tolist() == [5, 7, 0, 0]
    _, data = checkpoints.restore(3, state, {"dropped": np.zeros(2, np.int64)})
    assert data["dropped"].tolist() == [5, 7]
    with pytest.raises(ValueError, match="does not fit the model"):
        checkpoints.restore(3, state, {"dropped": np.zeros(1, np.int64)})
    checkpoints.close()


@dataclasses.dataclass(frozen=True)
class Moments:
    mu: dict
    nu: tuple


jax.tree_util.register_dataclass(Moments, ["mu", "nu"], [])


def mixed_state(mesh: jax.sharding.Mesh) -> TrainState:
    """Of many dtypes and sizes, each with bits of its own; `embed` and `wide` may be sharded."""
    random = np.random.default_rng(0)
    sharded = NamedSharding(mesh, PartitionSpec("fsdp"))
    whole = mesh_lib.replicated(mesh)

    def draw(*shape, dtype=np.float32, sharding=whole):
        return jax.device_put(random.normal(size=shape).astype(dtype), sharding)

    params = {
        "embed": {"embedding": draw(1024, 65, sharding=sharded)},
        "wide": {"kernel": draw(8, 4, sharding=sharded), "bias": draw(4, dtype=jnp.bfloat16)},
        "nothing": draw(0, 3),
        "temperature": draw(),
    }
    return TrainState(
        step=jax.device_put(np.int32(7), whole),
        params=params,
        batch_stats={"bn": {"mean": draw(5), "var": jnp.full(5, np.nan, device=whole)}},
        opt_state=(
            Moments(mu={"a.b": draw(2, 2)}, nu=(draw(3), draw(256, 256, sharding=whole))),
            jax.device_put(np.uint32(3), whole),
        ),
    )


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )


def assert_same_state(found: TrainState, state: TrainState) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        assert (left.dtype, left.shape, left.sharding) == (right.dtype, right.shape, right.sharding)
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


@pytest.mark.parametrize("saved, read", [(1, 1), (1, 4), (4, 1), (4, 4)])
def test_state_is_the_same_on_another_mesh(tmp_path, saved, read):
    states = {fsdp: mixed_state(mesh_lib.make_mesh(fsdp=fsdp)) for fsdp in (1, 4)}
    (tmp_path / "run").mkdir()
    checkpoints = Checkpointer(tmp_path / "run" / "checkpoints", keep=1)
    checkpoints.save(states[saved], DATA)
    checkpoints.wait()
    found, data = checkpoints.restore(7, abstract(states[read]), {"dropped": np.zeros(2, np.int64)})
    assert_same_state(found, states[read])
    assert data["dropped"].tolist() == [5, 7]
    weights = checkpoints.restore_weights(7, abstract(states[read]).served())
    for left, right in zip(
        jax.tree.leaves(weights), jax.tree.leaves(states[read].served()), strict=True
    ):
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()
    checkpoints.close()
    named = read_checkpoint(tmp_path / "run", 7)  # by Orbax and numpy
    assert named["training/opt_state/0/mu/a.b"].shape == (2, 2)
    assert {f"weights/params/{n}" for n in ("nothing", "temperature", "wide/bias")} < named.keys()


def test_what_is_small_and_whole_is_one_array():
    mesh = mesh_lib.make_mesh(fsdp=4)
    state = mixed_state(mesh)
    named = {f"{i}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}
    large, small = packed.pack(named)
    assert sorted(leaf.shape for leaf in large.values()) == [(8, 4), (1024, 65)]  # both sharded
    assert small["bytes"].dtype == small["index"].dtype == np.uint8
    unpacked = packed.unpack(small)
    assert unpacked.keys() | large.keys() == named.keys()
    for name, array in unpacked.items():
        assert (array.dtype, array.shape) == (named[name].dtype, named[name].shape)
        assert array.tobytes() == np.asarray(named[name]).tobytes()
    one_more = jax.device_put(np.zeros(65_537, np.float32), mesh_lib.replicated(mesh))
    assert packed.pack({"x": one_more})[0].keys() == {"x"}
    assert packed.pack({"x": one_more[1:]})[0].keys() == set()
    like = jax.ShapeDtypeStruct((2,), jnp.bfloat16, sharding=mesh_lib.replicated(mesh))
    assert packed.placed(np.float32([1.5, 2.5]), like).dtype == jnp.bfloat16


def test_checkpoint_of_an_earlier_version_opens(tmp_path):
    state = mixed_state(mesh_lib.make_mesh())
    del state.params["nothing"]  # which they could not hold
    writer = ocp.training.Checkpointer(tmp_path / "c")
    training = {"step": state.step, "opt_state": state.opt_state}
    writer.save_checkpointables(7, {"weights": state.served(), "training": training, "data": DATA})
    writer.close()
    checkpoints = Checkpointer(tmp_path / "c", keep=1)
    found, data = checkpoints.restore(7, abstract(state), {"dropped": np.zeros(2, np.int64)})
    assert_same_state(found, state)
    other = dataclasses.replace(abstract(state), batch_stats={})
    with pytest.raises(ValueError, match="not fit the model: 2 unexpected: batch_stats/bn/mean, "):
        checkpoints.restore(7, other, DATA)
    checkpoints.close()


def test_lost_item_or_other_tensor_is_named(tmp_path):
    state = mixed_state(mesh_lib.make_mesh())
    checkpoints = Checkpointer(tmp_path / "c", keep=1)
    checkpoints.save(state, DATA)
    checkpoints.wait()
    other = abstract(state)
    other.batch_stats["bn"]["mean"] = jax.ShapeDtypeStruct((6,), np.float32)
    message = r"not fit the model: 1 of other shape: batch_stats/bn/mean is \(5,\), .* \(6,\)"
    with pytest.raises(ValueError, match=message):
        checkpoints.restore(7, other, DATA)
    for item in ("weights", "small", "data"):
        shutil.move(tmp_path / "c/7" / item, tmp_path / "aside")
        with pytest.raises(ValueError, match=f"c/7 is damaged: its '{item}' cannot be read"):
            checkpoints.restore(7, abstract(state), DATA)
        shutil.move(tmp_path / "aside", tmp_path / "c/7" / item)
    checkpoints.restore(7, abstract(state), DATA)
    checkpoints.close()
