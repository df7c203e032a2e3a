"""The train step: a pure function, and the one place where what trains is jitted.

With `microbatches` the towers see a part of the batch at a time and are run again for their
gradient, while one loss sees the embeddings of the whole global batch: the numbers are those of the
full batch, the activations those of a part. Source: gradient caching (Gao et al. 2021), as a scan.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from align_jax import losses, state, trees
from align_jax import mesh as mesh_lib
from align_jax.models import classifier, dual_encoder

TrainStep = Callable[[state.TrainState, dict], tuple[state.TrainState, dict]]


def make_train_step(
    model: dual_encoder.DualEncoder,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    loss_fn: losses.LossFn,
    mesh: Mesh,
    config: ConfigDict,
) -> TrainStep:
    """Returns `train_step(state, batch) -> (state, metrics)`, pure and not yet jitted.

    Randomness depends on (seed, step, example index) alone. Metrics are float32 scalars; loss,
    temperature, logits and norms but `update_norm` are those *before* the update. Norms are over
    what learns; those of a tower, over it and its projection, are called `grad_norm/image` and so
    on. `embedding_norm/image` is the mean over the batch, before it is made unit norm, and
    `embedding_norm_max/image` the largest.

    Args:
      model: from `dual_encoder.make_model`.
      optimizer: of the `params` that learn; nothing is computed for the gradient of others.
      schedule: step -> learning rate, to report it.
      loss_fn: from `losses.make_loss`.
      mesh: over which the batch is split: `image` uint8 [B, H, W, 3] or
        `z_image` float32 [B, D], `ids` and `mask` int32
        [B, L], `index` int32 [B], and the hashes uint32 [B, 2] that the loss needs.
      config: group `train`: `seed` of dropout, stochastic depth and the choice of negatives, and
        `microbatches`, parts in which the towers see the batch. Each must hold whole BatchNorm
        groups and a multiple of the devices; loss, gradients and statistics stay those of one pass.
        And `ema_decay` of the averages, and `native_kernels`, see `models/native.py`.
    """
    pin = mesh_lib.Rows(mesh, native=config.native_kernels)

    def encode_part(variables: dual_encoder.Variables, part: dict) -> tuple:
        part = pin(part)
        z_image, z_text, _, norms, moments = dual_encoder.apply_towers(
            model, variables, part, train=True, keys=part["keys"], constrain=pin
        )
        return *pin((z_image, z_text, norms)), moments

    encode = _in_parts(encode_part, model, mesh, config.microbatches)

    def objective(
        variables: dual_encoder.Variables, batch: dict, keys: jax.Array
    ) -> tuple[jax.Array, losses.Parts, dict]:
        z_image, z_text, norms, moments = encode(variables, batch | {"keys": keys})
        loss, parts = loss_fn(z_image, z_text, variables["params"], batch, keys)
        parts |= {f"embedding_norm/{tower}": of.mean() for tower, of in norms.items()}
        parts |= {f"embedding_norm_max/{tower}": of.max() for tower, of in norms.items()}
        return loss, parts, moments

    return _make_step(model, optimizer, schedule, objective, config)


def make_classify_step(
    model: classifier.Classifier,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    loss_fn: Callable[[jax.Array, jax.Array], tuple[jax.Array, losses.Parts]],
    mesh: Mesh,
    config: ConfigDict,
) -> TrainStep:
    """Returns the train step of a classifier, see `make_train_step`.

    Args:
      model: from `classifier.make_classifier`.
      optimizer: of its `params`.
      schedule: as there.
      loss_fn: (logits [B, K], labels [B]) -> (loss [], {part: []}).
      mesh: as there; the batch is `image` uint8 [B, H, W, 3], `label` and `index` int32 [B].
      config: as there.
    """
    pin = mesh_lib.Rows(mesh, native=config.native_kernels)

    def score_part(variables: dual_encoder.Variables, part: dict) -> tuple:
        part = pin(part)
        logits, moments = classifier.train_scores(
            model, variables, part["image"], keys=part["keys"], constrain=pin
        )
        return pin(logits), moments

    score = _in_parts(score_part, model, mesh, config.microbatches)

    def objective(
        variables: dual_encoder.Variables, batch: dict, keys: jax.Array
    ) -> tuple[jax.Array, losses.Parts, dict]:
        logits, moments = score(variables, batch | {"keys": keys})
        return *loss_fn(logits, batch["label"]), moments

    return _make_step(model, optimizer, schedule, objective, config)


def _make_step(
    model: dual_encoder.Model,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    objective: Callable[..., tuple[jax.Array, losses.Parts, dict]],
    config: ConfigDict,
) -> TrainStep:
    """Returns the step of `objective(variables, batch, keys) -> (loss, parts, moments)`."""

    def train_step(s: state.TrainState, batch: dict) -> tuple[state.TrainState, dict]:
        keys = dual_encoder.example_keys(config.seed, s.step, batch["index"])

        def loss_of(learned: dict) -> tuple[jax.Array, tuple[losses.Parts, dict]]:
            params = trees.updated(s.params, learned)
            variables = {"params": params, "batch_stats": s.batch_stats}
            loss, parts, moments = objective(variables, batch, keys)
            return loss, (parts, moments)

        learned = dual_encoder.learned(model, s.params)
        (loss, (parts, moments)), gradients = jax.value_and_grad(loss_of, has_aux=True)(learned)
        updates, opt_state = optimizer.update(gradients, s.opt_state, learned)
        new_state = state.TrainState(
            step=s.step + 1,
            params=trees.updated(s.params, optax.apply_updates(learned, updates)),
            batch_stats=dual_encoder.update_batch_stats(model, s.variables(), moments),
            opt_state=opt_state,
            average=s.average,
        )
        if config.ema_decay:
            new_state = _move_average(new_state, config.ema_decay)
        metrics = {
            "loss": loss,
            **parts,
            **{name: s.params[name] for name in ("temperature", "bias") if name in s.params},
            "learning_rate": schedule(s.step),
            "grad_norm": optax.tree.norm(gradients),
            **_norms_by_part("grad_norm", gradients),
            **_norms_by_part("param_norm", learned),
            **_norms_by_part("update_norm", updates),
        }
        return new_state, metrics

    return train_step


def _norms_by_part(name: str, tree: dict) -> dict[str, jax.Array]:
    """Returns {"name/image": ..., "name/text": ...}: norms over each tower and its projection."""
    parts: dict[str, list[jax.Array]] = {}
    for path, leaf in trees.named_leaves(tree):
        part = path.removeprefix("lora/").split("/")[0].removesuffix("_projection")
        if part in ("image", "text", "head"):
            parts.setdefault(f"{name}/{part}", []).append(leaf)
    return {part: optax.tree.norm(leaves) for part, leaves in parts.items()}


def _move_average(s: state.TrainState, decay: float) -> state.TrainState:
    """Returns the state whose averages have taken its last values in.

    After update t the old average weighs min(decay, t / (9 + t)), so that a short run soon forgets
    its first weights. Source: `num_updates` of TensorFlow's ExponentialMovingAverage, by which
    EfficientNet averaged parameters and BatchNorm statistics (Tan & Le 2019, decay 0.9999).
    """
    updates = s.step.astype(jnp.float32)
    weight = jnp.minimum(decay, updates / (9.0 + updates))
    average = jax.tree.map(lambda a, x: a + (1.0 - weight) * (x - a), s.average, s.averaged())
    return dataclasses.replace(s, average=average)


def _in_parts(
    apply_part: Callable[..., tuple], model: dual_encoder.Model, mesh: Mesh, microbatches: int
) -> Callable[..., tuple]:
    """Returns a function of (variables, batch) that gives what `apply_part` gives of the batch.

    Args:
      apply_part: (variables, batch) -> (trees of arrays with a row for each example, and last
        BatchNorm moments).
      model: whose BatchNorm groups no part may cut.
      mesh: over which the batch is split.
      microbatches: parts.
    """
    if microbatches == 1:
        return apply_part

    rows = mesh_lib.batch_sharding(mesh)
    group = model.image.bn_group_size if model.image.bn_mode == "grouped" else 1

    def encode(variables: dual_encoder.Variables, batch: dict) -> tuple:
        size = batch["index"].shape[0]
        # Every device contributes to every part with its own rows, where its share of the batch
        # holds enough BatchNorm groups for that; else rows travel.
        shares = math.gcd(mesh.size, size // group // microbatches)

        def split(x: jax.Array) -> jax.Array:  # [B, ...] -> [parts, B / parts, ...]
            x = x.reshape(shares, microbatches, -1, *x.shape[1:]).swapaxes(0, 1)
            return x.reshape(microbatches, -1, *x.shape[3:])

        def merge(x: jax.Array) -> jax.Array:  # [parts, B / parts, ...] -> [B, ...]
            x = x.reshape(microbatches, shares, -1, *x.shape[2:]).swapaxes(0, 1)
            return jax.lax.with_sharding_constraint(x.reshape(size, *x.shape[3:]), rows)

        # prevent_cse guards against a merge of both passes, which a scan already rules out.
        @partial(jax.checkpoint, prevent_cse=False)
        def body(_: None, part: dict) -> tuple[None, tuple]:
            return None, apply_part(variables, part)

        names = ("image", "z_image", "ids", "mask", "keys")
        inputs = {name: split(batch[name]) for name in names if name in batch}
        _, (*arrays, moments) = jax.lax.scan(body, None, inputs)
        return *jax.tree.map(merge, arrays), jax.tree.map(lambda m: m.mean(0), moments)

    return encode


def compile_train_step(
    train_step: TrainStep, abstract: state.TrainState, mesh: Mesh, *, donate: bool = True
) -> TrainStep:
    """Returns the jitted train step: state kept in its shardings, batch over the mesh.

    Args:
      train_step: from `make_train_step`.
      abstract: from `state.abstract_state`.
      mesh: from `mesh.make_mesh`.
      donate: whether the new state takes the memory of the old one.
    """
    shardings = state.shardings_of(abstract)
    return jax.jit(
        train_step,
        in_shardings=(shardings, mesh_lib.batch_sharding(mesh)),
        out_shardings=(shardings, mesh_lib.replicated(mesh)),
        donate_argnums=(0,) if donate else (),
    )


def init_state(
    model: dual_encoder.Model,
    optimizer: optax.GradientTransformation,
    abstract: state.TrainState,
    *,
    seed: int,
) -> state.TrainState:
    """Returns the state at step 0, every tensor born in the sharding that `abstract` gives it."""
    shardings = state.shardings_of(abstract)
    variables = dual_encoder.init_variables(model, seed=seed, shardings=shardings.variables())
    init_optimizer = jax.jit(optimizer.init, out_shardings=shardings.opt_state)
    s = state.TrainState(
        step=jax.device_put(jnp.zeros((), jnp.int32), shardings.step),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=init_optimizer(dual_encoder.learned(model, variables["params"])),
    )
    return start_average(s, abstract)


def start_average(s: state.TrainState, abstract: state.TrainState) -> state.TrainState:
    """Returns the state with averages that are copies of its values, where `abstract` has any."""
    shardings = state.shardings_of(abstract)
    copy = jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=shardings.average)
    part = dataclasses.replace(s, average=shardings.average).averaged()
    return dataclasses.replace(s, average=copy(part) if part else {})
