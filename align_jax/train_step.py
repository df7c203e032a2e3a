"""The training and embedding steps: pure functions, and the one place where anything is jitted."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from align_jax import losses, state
from align_jax import mesh as mesh_lib
from align_jax.models import dual_encoder

TrainStep = Callable[[state.TrainState, dict], tuple[state.TrainState, dict]]


def make_train_step(
    model: dual_encoder.DualEncoder,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    loss_fn: losses.LossFn,
    mesh: Mesh,
    *,
    seed: int,
    bn_decay: float,
    mask_duplicates: str = "none",
) -> TrainStep:
    """Returns `train_step(state, batch) -> (state, metrics)`, pure and not yet jitted.

    Randomness depends on (seed, step, example index) alone. Metrics are float32 scalars; loss,
    temperature and gradient norm are those *before* the update.

    Args:
      model: from `dual_encoder.make_model`.
      optimizer: of `params`.
      schedule: step -> learning rate, to report it.
      loss_fn: from `losses.make_loss`.
      mesh: over which the batch is split: `image` uint8 [B, H, W, 3], `ids` and `mask` int32
        [B, L], `index` int32 [B], and the hashes uint32 [B, 2] that `mask_duplicates` needs.
      seed: of dropout and stochastic depth.
      bn_decay: weight of the old BatchNorm statistics.
      mask_duplicates: key of `losses.DUPLICATES`.
    """
    update_stats = partial(dual_encoder.update_batch_stats, decay=bn_decay)
    rows = mesh_lib.batch_sharding(mesh)

    def train_step(s: state.TrainState, batch: dict) -> tuple[state.TrainState, dict]:
        keys = dual_encoder.example_keys(seed, s.step, batch["index"])
        hashes = tuple(batch[name] for name in losses.DUPLICATES[mask_duplicates])

        def loss_of(params):
            variables = {"params": params, "batch_stats": s.batch_stats}
            z_image, z_text, temperature, moments = dual_encoder.apply_towers(
                model, variables, batch, train=True, keys=keys
            )
            z_image = jax.lax.with_sharding_constraint(z_image, rows)
            z_text = jax.lax.with_sharding_constraint(z_text, rows)
            loss, parts = loss_fn(z_image, z_text, temperature, hashes)
            return loss, (parts, temperature, moments)

        (loss, (parts, temperature, moments)), gradients = jax.value_and_grad(
            loss_of, has_aux=True
        )(s.params)
        updates, opt_state = optimizer.update(gradients, s.opt_state, s.params)
        frozen = model.image.bn_mode == "frozen"
        new_state = state.TrainState(
            step=s.step + 1,
            params=optax.apply_updates(s.params, updates),
            batch_stats=s.batch_stats if frozen else update_stats(s.batch_stats, moments),
            opt_state=opt_state,
        )
        metrics = {
            "loss": loss,
            **parts,
            "temperature": temperature,
            "learning_rate": schedule(s.step),
            "grad_norm": optax.tree.norm(gradients),
        }
        return new_state, metrics

    return train_step


def compile_train_step(train_step: TrainStep, abstract: state.TrainState, mesh: Mesh) -> TrainStep:
    """Returns the jitted train step: state donated and kept in its shardings, batch over the mesh.

    Args:
      train_step: from `make_train_step`.
      abstract: from `state.abstract_state`.
      mesh: from `mesh.make_mesh`.
    """
    shardings = state.shardings_of(abstract)
    return _jit(
        train_step,
        in_shardings=(shardings, mesh_lib.batch_sharding(mesh)),
        out_shardings=(shardings, mesh_lib.replicated(mesh)),
        donate_argnums=(0,),
    )


def init_state(
    model: dual_encoder.DualEncoder,
    optimizer: optax.GradientTransformation,
    abstract: state.TrainState,
    *,
    seed: int,
) -> state.TrainState:
    """Returns the state at step 0, every tensor born in the sharding that `abstract` gives it."""
    shardings = state.shardings_of(abstract)
    variables = dual_encoder.init_variables(model, seed=seed, shardings=shardings.variables())
    return state.TrainState(
        step=jax.device_put(jnp.zeros((), jnp.int32), shardings.step),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=_jit(optimizer.init, out_shardings=shardings.opt_state)(variables["params"]),
    )


def compile_embed(
    model: dual_encoder.DualEncoder, variable_shardings: Any, mesh: Mesh
) -> tuple[Callable, Callable]:
    """Returns (embed_image(variables, images), embed_text(variables, ids, mask)), jitted.

    Images are uint8 [B, H, W, 3], ids and mask int32 [B, L], with B divisible by the devices;
    results are replicated float32 [B, D], unit norm, eval mode.
    """
    rows, everywhere = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)
    return (
        _jit(
            partial(dual_encoder.embed_image, model),
            in_shardings=(variable_shardings, rows),
            out_shardings=everywhere,
        ),
        _jit(
            partial(dual_encoder.embed_text, model),
            in_shardings=(variable_shardings, rows, rows),
            out_shardings=everywhere,
        ),
    )


def _jit(fn: Callable, **shardings) -> Callable:
    return jax.jit(fn, **shardings)
