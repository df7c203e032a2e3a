"""Both towers as ONNX files, float32, by PyTorch's exporter from the model's Hugging Face form.

Going through `transformers.AlignModel` keeps batch and length symbolic and needs no other form of
our towers. Torch, transformers and ONNX Runtime are imported when an export begins: extra `onnx`.
"""

import contextlib
import importlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from align_jax.align import Align
from align_jax.data.tokenizer import quiet_transformers
from align_jax.export import package
from align_jax.storage import writing

if TYPE_CHECKING:
    import torch

FILES = {"image": "image.onnx", "text": "text.onnx"}
OPSET = 20


def write(model: Align, folder: str | os.PathLike) -> dict[str, float]:
    """Writes the programs and export.json; returns the largest difference of each, as run again.

    The image program takes uint8 `images` [batch, S, S, 3], the text program int64 `ids` and `mask`
    [batch, length] with a length up to the model's positions.

    Args:
      model: to export, in float32.
      folder: to make.

    Raises:
      ValueError: a model that computes in another dtype, or that the Hugging Face format has no
        place for.
    """
    if model.model.image.dtype != jnp.float32:
        raise ValueError("an ONNX export is float32; the model is to be loaded with that dtype.")
    import torch

    folder = Path(folder)
    with tempfile.TemporaryDirectory() as temporary:
        model.save(temporary)
        with quiet_transformers() as transformers:
            theirs = transformers.AlignModel.from_pretrained(temporary).eval()
    folder.mkdir(parents=True, exist_ok=True)
    size = model.preprocessing.image_size
    batch = torch.export.Dim("batch")
    length = torch.export.Dim("length", max=model.model.text.max_positions)
    # Two tensors: of one given twice, the exporter makes one input.
    ids, mask = torch.ones((2, 4), dtype=torch.long), torch.ones((2, 4), dtype=torch.long)
    image_tower, text_tower = _towers(theirs)
    pixels = torch.zeros((2, size, size, 3), dtype=torch.uint8)
    _export(folder / FILES["image"], image_tower, {"images": pixels}, ({0: batch},), "z_image")
    shapes = ({0: batch, 1: length},) * 2
    _export(folder / FILES["text"], text_tower, {"ids": ids, "mask": mask}, shapes, "z_text")
    package.write_description(
        folder, model, FILES, "int64", format="onnx", opset=OPSET, dtype="float32"
    )
    return package.largest_differences(
        model, _open(folder / FILES["image"]), _open(folder / FILES["text"])
    )


def check_packages() -> None:
    """Raises ValueError if a package that an export needs is missing."""
    for name in ("torch", "onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                f"--to onnx needs {name}; install it with `pip install 'align_jax[onnx]'`."
            ) from error


def _towers(model: "torch.nn.Module") -> tuple["torch.nn.Module", "torch.nn.Module"]:
    """Returns modules (images -> z_image, (ids, mask) -> z_text), unit norm."""
    import torch

    class Image(torch.nn.Module):
        """uint8 [B, S, S, 3] -> [B, D]."""

        def __init__(self) -> None:
            super().__init__()
            self.tower = model.vision_model

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            pixels = images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0
            return _unit_norm(self.tower(pixel_values=pixels).pooler_output)

    class Text(torch.nn.Module):
        """int64 [B, L] twice -> [B, D]."""

        def __init__(self) -> None:
            super().__init__()
            self.tower, self.projection = model.text_model, model.text_projection

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            states = self.tower(input_ids=ids, attention_mask=mask).last_hidden_state
            return _unit_norm(self.projection(states[:, 0]))

    # A new module is in training mode, and would put its children into it.
    return Image().eval(), Text().eval()


def _unit_norm(z: "torch.Tensor") -> "torch.Tensor":
    return z / z.square().sum(-1, keepdim=True).clamp_min(float(np.finfo(np.float32).tiny)).sqrt()


def _export(
    file: Path,
    tower: "torch.nn.Module",
    inputs: dict[str, "torch.Tensor"],
    shapes: tuple,
    output: str,
) -> None:
    import torch

    with writing.replacing(file) as temporary, _quiet():
        torch.onnx.export(
            tower,
            tuple(inputs.values()),
            temporary,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # The exporter tells of its own deprecations, and of every node that it renames.
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _open(file: Path) -> package.Program:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(*arrays: np.ndarray) -> np.ndarray:
        wide = [array if array.dtype == np.uint8 else array.astype(np.int64) for array in arrays]
        return session.run(None, dict(zip(names, wide, strict=True)))[0]

    return run
