"""What an exported folder says of itself, and whether what was written computes the same."""

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from align_jax import __version__
from align_jax.align import Align
from align_jax.hf import processor
from align_jax.models import dual_encoder
from align_jax.storage import writing

DESCRIPTION = "export.json"
TOLERANCE = 1e-4  # largest difference of an embedding's element that passes

# Arrays -> z [B, D] float32.
Program = Callable[..., np.ndarray]


def write_description(
    folder: Path, model: Align, files: dict[str, str], token_dtype: str, **facts: Any
) -> None:
    """Writes export.json, and tokenizer and preprocessing in transformers' files.

    Args:
      folder: of the export.
      model: that is exported.
      files: "image" and "text" -> name of the file of its program.
      token_dtype: of the inputs of the text program.
      **facts: more, JSON values.
    """
    p, dim = model.preprocessing, model.model.embed_dim
    tokens = {
        "dtype": token_dtype,
        "shape": ["batch", "length"],
        "max_length": model.model.text.max_positions,
    }
    images = {"dtype": "uint8", "shape": ["batch", p.image_size, p.image_size, 3]}

    def output(name: str) -> dict:
        return {name: {"dtype": "float32", "shape": ["batch", dim], "norm": 1.0}}

    content = {
        "align_jax": __version__,
        "model": model.origin.name if model.origin else "",
        "fingerprint": model.fingerprint(),
        "temperature": model.temperature,
        **facts,
        "programs": {
            "image": {
                "file": files["image"],
                "inputs": {"images": images},
                "outputs": output("z_image"),
            },
            "text": {
                "file": files["text"],
                "inputs": {"ids": tokens, "mask": tokens},
                "outputs": output("z_text"),
            },
        },
        # What makes inputs of pictures and texts; the folder's other files say it to transformers.
        "preprocessing": {
            "resize": p.resize,
            "resize_size": p.resize_size,
            "image_size": p.image_size,
            "max_tokens": p.max_tokens,
            "pad_id": model.tokenizer.pad_id,
        },
    }
    processor.write_processor(folder, model.tokenizer, p)
    writing.write_text(folder / DESCRIPTION, json.dumps(content, indent=2) + "\n")


def largest_differences(
    model: Align, image_program: Program, text_program: Program
) -> dict[str, float]:
    """Returns {"image", "text"}: the largest difference of an element from the model's own.

    Args:
      model: what was exported.
      image_program: of uint8 [B, S, S, 3].
      text_program: of int32 ids and mask [B, L].
    """
    differences = {"image": 0.0, "text": 0.0}
    variables = jax.device_get(model.variables)
    embed_image, embed_text = (
        jax.jit(partial(embed, model.model))
        for embed in (dual_encoder.embed_image, dual_encoder.embed_text)
    )
    for images, ids, mask in _samples(model):
        for tower, embed, program, inputs in (
            ("image", embed_image, image_program, (images,)),
            ("text", embed_text, text_program, (ids, mask)),
        ):
            expected = np.asarray(embed(variables, *inputs))
            difference = float(np.abs(program(*inputs) - expected).max())
            if not difference <= differences[tower]:  # NaN is larger than every number
                differences[tower] = difference
    return differences


def check(differences: dict[str, float]) -> None:
    """Raises RuntimeError where a difference is above `TOLERANCE`."""
    for tower, difference in differences.items():
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"the {tower} program differs from the model by {difference:.1e}, more than "
                f"{TOLERANCE:g}; do not use it."
            )


def check_folder(folder: str | os.PathLike) -> None:
    """Raises ValueError if an export cannot go there: a file, or a folder with other files."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder.")
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a model; name another folder.")
    programs = (path.name for kind in ("image.*", "text.*") for path in folder.glob(kind))
    writing.check_alone(folder, {DESCRIPTION, *processor.FILES, *programs})


def _samples(model: Align) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (images, ids, mask) of several batch sizes and lengths."""
    p, text = model.preprocessing, model.model.text
    rng = np.random.default_rng(0)
    for batch, length in ((1, min(7, text.max_positions)), (3, text.max_positions)):
        images = rng.integers(0, 256, (batch, p.image_size, p.image_size, 3), np.uint8)
        ids = rng.integers(0, model.tokenizer.vocab_size, (batch, length)).astype(np.int32)
        kept = rng.integers(1, length + 1, (batch, 1))
        yield images, ids, (np.arange(length) < kept).astype(np.int32)
