"""What a workdir has learned: the model of a checkpoint, for use, evaluation and new runs."""

import dataclasses
import os
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from align_jax import mesh as mesh_lib
from align_jax.data.tokenizer import Tokenizer
from align_jax.hf.processor import Preprocessing
from align_jax.models import classifier, dual_encoder
from align_jax.run import checkpoint, workdir


@dataclasses.dataclass(frozen=True)
class Trained:
    """A checkpoint's model.

    Attributes:
      model: the dual encoder, or a classifier.
      variables: {"params", "batch_stats"}, on all devices.
      tokenizer: that it was trained with; a classifier has none.
      preprocessing: likewise.
      mesh: of all devices.
      step: of the checkpoint.
      config: of the run.
    """

    model: dual_encoder.Model
    variables: dual_encoder.Variables
    tokenizer: Tokenizer | None
    preprocessing: Preprocessing
    mesh: Mesh
    step: int
    config: ConfigDict


def is_classifier(path: str | os.PathLike) -> bool:
    """Returns whether a workdir is that of a classifier (config.task)."""
    return workdir.load_config(path).task == "classify"


def load_trained(
    path: str | os.PathLike, *, dtype: str | None = None, step: int | None = None
) -> Trained:
    """Returns the model of a workdir.

    Args:
      path: the workdir.
      dtype: of convolutions and matmuls, "float32" or "bfloat16"; None takes that of the run.
      step: of the checkpoint; None takes the newest.

    Raises:
      ValueError: no workdir, none of its checkpoints, or files that do not belong together.
    """
    path = Path(path)
    config = workdir.load_config(path)
    tokenizer, preprocessing = workdir.load(path)
    if dtype is not None:
        config.model.dtype = dtype
    mesh = mesh_lib.make_mesh()
    if tokenizer is None:
        model = classifier.make_classifier(config.model, len(workdir.read_classes(path)))
    else:
        model = dual_encoder.make_model(
            config.model, config.loss, vocab_size=tokenizer.vocab_size, lora=config.lora
        )
    shapes = dual_encoder.abstract_variables(model)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        mesh_lib.infer_shardings(shapes, mesh),
    )
    folder = path / "checkpoints"
    if not folder.is_dir():
        raise ValueError(f"{path} holds no checkpoint yet; run `align train` longer.")
    checkpoints = checkpoint.Checkpointer(folder)
    try:
        steps = checkpoints.steps()
        if not steps:
            raise ValueError(f"{path} holds no checkpoint yet; run `align train` longer.")
        if step is not None and step not in steps:
            raise ValueError(f"{path} has no checkpoint of step {step}; it has {steps}.")
        step = steps[-1] if step is None else step
        variables = checkpoints.restore_weights(step, abstract)
    finally:
        checkpoints.close()
    return Trained(model, variables, tokenizer, preprocessing, mesh, step, config)
