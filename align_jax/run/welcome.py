"""What a run says before its first step: what is trained on what, and the memory it needs."""

import math
import os
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from align_jax import trees
from align_jax.data.sources.open_source import PairSource
from align_jax.models import dual_encoder
from align_jax.run import multihost
from align_jax.state import TrainState


def welcome(
    config: ConfigDict,
    path: str | os.PathLike,
    mesh: Mesh,
    source: PairSource,
    model: dual_encoder.Model,
    abstract: TrainState,
    resume_step: int | None,
) -> None:
    """Prints model, devices, data and where the run starts, a line each.

    Args:
      config: of the run.
      path: its workdir.
      mesh: that it runs on.
      source: of its pairs, with what that could not give.
      model: of `abstract`.
      abstract: from `state.abstract_state`.
      resume_step: of the restored checkpoint; None where the run starts.
    """
    other = config.model.text.variant
    if config.task == "classify":
        other = f"head of {len(source.classes)} classes"
    image, text = (
        trees.count({k: v for k, v in abstract.params.items() if k.startswith(part)})
        for part in ("image", "head" if config.task == "classify" else "text")
    )
    multihost.log(
        f"{config.model.image.variant} + {other}: {image:,} + {text:,} parameters, "
        f"{config.model.dtype}"
    )
    learned = dual_encoder.learned(model, abstract.params)
    if model.lora or model.frozen:
        kind = f"LoRA of rank {config.lora.rank}: " if model.lora else ""
        multihost.log(
            f"{kind}{trees.count(learned):,} parameters in {len(jax.tree.leaves(learned))} tensors "
            "learn"
        )
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    multihost.log(
        f"{mesh.size} {mesh.devices.flat[0].device_kind} device(s), mesh {axes}; global batch "
        f"{config.train.batch_size}, {config.train.steps} steps"
    )
    group, each = config.model.bn_group_size, config.train.batch_size // mesh.size
    if config.model.bn_mode == "grouped" and each % group:
        multihost.log(
            f"config.model.bn_group_size={group} is more than whole groups of the {each} images of "
            "a device: every BatchNorm waits for other devices"
        )
    problems = f" ({source.problems})" if source.problems else ""
    multihost.log(f"{source.describe()}{problems}")
    started = "starting" if resume_step is None else f"continuing from step {resume_step} of"
    multihost.log(f"{started} {path}")


def memory_plan(compiled: Any, state: TrainState) -> str:
    """Returns a line on the bytes that a step needs on each device, before it has run.

    Args:
      compiled: the train step.
      state: its first argument.
    """
    parts = {"parameters": _held(state.variables()), "optimizer": _held(state.opt_state)}
    if state.average:
        parts["averages"] = _held(state.average)
    analysis = compiled.memory_analysis()
    if analysis is not None:  # not every platform has it
        parts["batch"] = analysis.argument_size_in_bytes - _held(state)
        parts["temporaries"] = analysis.temp_size_in_bytes
    text = ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in parts.items())
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return f"memory per device: {text}" + (f" of {limit / 2**20:,.0f} MiB" if limit else "")


def _held(tree: Any) -> int:
    """Bytes of a tree of arrays on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
