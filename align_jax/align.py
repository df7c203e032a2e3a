"""`Align`: a trained model with its tokenizer and preprocessing, as one object."""

import os
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from align_jax import checkpoint, train_step, workdir
from align_jax import mesh as mesh_lib
from align_jax.data import images as images_lib
from align_jax.data.tokenizer import WordPieceTokenizer
from align_jax.models import dual_encoder


class Align:
    """Encodes images and texts to float32 embeddings [N, D] of unit norm.

    Args:
      model: the dual encoder.
      variables: {"params", "batch_stats"}; may be replaced by later ones of the same run.
      tokenizer: that the model was trained with.
      preprocessing: likewise.
      mesh: over which batches are split.
      batch_size: examples per call of the compiled model, rounded up to a multiple of the devices.
    """

    def __init__(
        self,
        model: dual_encoder.DualEncoder,
        variables: dual_encoder.Variables,
        tokenizer: WordPieceTokenizer,
        preprocessing: workdir.Preprocessing,
        mesh: Mesh,
        *,
        batch_size: int,
    ):
        self.variables = variables
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing
        self._rows = mesh_lib.batch_sharding(mesh)
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        shardings = jax.tree.map(lambda leaf: leaf.sharding, variables)
        self._embed_image, self._embed_text = train_step.compile_embed(model, shardings, mesh)

    @property
    def temperature(self) -> float:
        """The learned scalar that divides the cosine."""
        return float(self.variables["params"]["temperature"])

    def encode_image(self, images: Sequence) -> np.ndarray:
        """Returns z_image [N, D] of encoded bytes, paths, PIL images or uint8 RGB arrays.

        Raises:
          images.BadImage: (a ValueError) one of them cannot be decoded.
        """
        p = self.preprocessing
        views = (
            images_lib.eval_view(
                images_lib.decode_image(image),
                resize_px=p.resize_size,
                crop_px=p.image_size,
                method=p.resize,
            )
            for image in images
        )
        return self._encode(self._embed_image, ((view,) for view in views))

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Returns z_text [N, D] of texts, truncated to the model's number of tokens."""
        ids, mask = self.tokenizer.encode(list(texts), self.preprocessing.max_tokens)
        return self._encode(self._embed_text, zip(ids, mask, strict=True))

    def _encode(self, embed: Callable, examples: Iterable[tuple[np.ndarray, ...]]) -> np.ndarray:
        blocks, rows = [], []
        for row in examples:
            rows.append(row)
            if len(rows) == self._batch_size:
                blocks.append(self._call(embed, rows))
                rows = []
        if rows:
            blocks.append(self._call(embed, rows))
        if not blocks:
            raise ValueError("Nothing to encode: the input is empty.")
        return np.concatenate(blocks)

    def _call(self, embed, rows):
        count = len(rows)
        rows = rows + [rows[-1]] * (self._batch_size - count)  # one shape, one compilation
        arrays = []
        for column in zip(*rows, strict=True):
            value = np.stack(column)
            # Every process holds the whole batch here, so each takes its devices' rows of it.
            arrays.append(
                jax.make_array_from_callback(
                    value.shape, self._rows, lambda index, value=value: value[index]
                )
            )
        return np.asarray(embed(self.variables, *arrays))[:count]


def load_workdir(
    path: str | os.PathLike, *, step: int | None = None, batch_size: int = 64
) -> tuple[Align, int]:
    """Returns (model, step) from a training workdir.

    Args:
      path: workdir of `align train`.
      step: of the checkpoint; None takes the newest.
      batch_size: see `Align`.

    Raises:
      ValueError: no workdir, no such checkpoint, or files that do not belong together.
    """
    config = workdir.load_config(path)
    tokenizer, preprocessing = workdir.load(path)
    mesh = mesh_lib.make_mesh()
    model = dual_encoder.make_model(config.model, vocab_size=tokenizer.vocab_size)
    shapes = dual_encoder.abstract_variables(model)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        mesh_lib.infer_shardings(shapes, mesh),
    )
    folder = os.path.join(path, "checkpoints")
    if not os.path.isdir(folder):
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
    return Align(model, variables, tokenizer, preprocessing, mesh, batch_size=batch_size), step
