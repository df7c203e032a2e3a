"""Both towers as StableHLO programs with their weights, for CPU, CUDA and TPU, by `jax.export`."""

import dataclasses
import os
from functools import partial
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from align_jax.align import Align
from align_jax.export import package
from align_jax.models import dual_encoder
from align_jax.storage import writing

PLATFORMS = ("cpu", "cuda", "tpu")
FILES = {"image": "image.stablehlo", "text": "text.stablehlo"}


def write(model: Align, folder: str | os.PathLike) -> dict[str, float]:
    """Writes the programs and export.json; returns the largest difference of each, as run again.

    The batch is of any size, texts of any length up to the model's positions. What reads the files
    (`jax.export.deserialize`) is JAX of the same version or up to six months younger.

    Args:
      model: to export, in its own compute dtype.
      folder: to make.
    """
    folder = Path(folder)
    p, limit = model.preprocessing, model.model.text.max_positions
    # Constants of the programs, on no mesh; NumPy has no slices of a symbolic length.
    variables = dual_encoder.merge_lora(model.model, jax.device_get(model.variables))
    variables = jax.tree.map(jnp.asarray, variables)
    plain = dataclasses.replace(model.model, lora=None)
    (batch,) = jax.export.symbolic_shape("batch")
    rows, length = jax.export.symbolic_shape("batch, length", constraints=[f"length <= {limit}"])
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    arguments = {
        "image": (jax.ShapeDtypeStruct((batch, p.image_size, p.image_size, 3), jnp.uint8),),
        "text": (tokens, tokens),
    }
    towers = {"image": dual_encoder.embed_image, "text": dual_encoder.embed_text}
    folder.mkdir(parents=True, exist_ok=True)
    for name, embed in towers.items():
        program = jax.jit(partial(embed, plain, variables))
        exported = jax.export.export(program, platforms=PLATFORMS)(*arguments[name])
        writing.write_bytes(folder / FILES[name], exported.serialize())
    package.write_description(
        folder,
        model,
        FILES,
        "int32",
        format="stablehlo",
        platforms=list(PLATFORMS),
        jax=jax.__version__,
        dtype=np.dtype(model.model.image.dtype).name,
    )
    return package.largest_differences(model, *(_open(folder / FILES[name]) for name in towers))


def _open(file: Path) -> package.Program:
    exported = jax.export.deserialize(bytearray(file.read_bytes()))
    return lambda *arrays: np.asarray(exported.call(*arrays))
