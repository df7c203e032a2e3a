"""Counts in a checkpoint (run/checkpoint.py): a version that counts more reasons opens it."""

import jax
import numpy as np
import pytest

from align_jax.run.checkpoint import Checkpointer
from align_jax.state import TrainState


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
