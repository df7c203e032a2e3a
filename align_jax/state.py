"""The training state and its abstract form (shapes, shardings), which init and restore share."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from align_jax import mesh as mesh_lib
from align_jax import trees
from align_jax.models import dual_encoder


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "batch_stats", "opt_state", "average"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run carries from step to step, as a pytree.

    Attributes:
      step: int32 [], number of updates made; the only counter, it also gives the data position.
      params: float32 tensors; which of them learn, `dual_encoder.learned` says.
      batch_stats: running BatchNorm statistics, float32.
      opt_state: of the optimizer, for those that learn.
      average: {"params", "batch_stats"}: moving averages of those that learn and of the statistics
        (`config.train.ema_decay`), float32; empty where none are kept.
    """

    step: jax.Array
    params: dict
    batch_stats: dict
    opt_state: Any
    average: dict = dataclasses.field(default_factory=dict)

    def variables(self) -> dual_encoder.Variables:
        return {"params": self.params, "batch_stats": self.batch_stats}

    def served(self) -> dual_encoder.Variables:
        """Returns the variables that are evaluated and used: averages, where there are any."""
        return trees.updated(self.variables(), self.average) if self.average else self.variables()

    def averaged(self) -> dict:
        """Returns the last values of what `average` is of; empty where none are kept."""
        return trees.shared(self.variables(), self.average) if self.average else {}


def abstract_state(
    model: dual_encoder.Model,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    average: bool = False,
) -> TrainState:
    """Returns the state as `jax.ShapeDtypeStruct`s with shardings; computes nothing."""
    variables = dual_encoder.abstract_variables(model)
    learned = dual_encoder.learned(model, variables["params"])
    shapes = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=jax.eval_shape(optimizer.init, learned),
        average=variables | {"params": learned} if average else {},
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        mesh_lib.infer_shardings(shapes, mesh),
    )


def shardings_of(abstract: Any) -> Any:
    """Returns the tree of shardings of a tree of `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)
