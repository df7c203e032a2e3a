"""`ImageClassifier`: a trained classifier, its classes and preprocessing, as evaluators take it.

What `align.Align` is for a dual encoder: its embeddings are the pooled features of its tower, so
kNN, probe and few-shot work; it has no texts.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from align_jax import encode
from align_jax import mesh as mesh_lib
from align_jax.hf.processor import Preprocessing
from align_jax.models import classifier, dual_encoder
from align_jax.run import trained


class Origin(NamedTuple):
    """Where weights come from: name of the workdir, step of the checkpoint, config of the run."""

    name: str
    step: int
    config: Any


class ImageClassifier:
    """Scores and embeds images.

    Args:
      model: the classifier.
      variables: {"params", "batch_stats"}; may be replaced by later ones of the same run.
      classes: their names, by label.
      preprocessing: of images.
      mesh: over which batches are split.
      batch_size: most images per call of the compiled model, rounded up to a multiple of the
        devices.
      origin: for reports; None where the model is still being trained.
    """

    def __init__(
        self,
        model: classifier.Classifier,
        variables: dual_encoder.Variables,
        classes: Sequence[str],
        preprocessing: Preprocessing,
        mesh: Mesh,
        *,
        batch_size: int,
        origin: Origin | None = None,
    ):
        self.model = model
        self.variables = variables
        self.classes = tuple(classes)
        self.preprocessing = preprocessing
        self.origin = origin
        self._rows = mesh_lib.batch_sharding(mesh)
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        shardings = jax.tree.map(lambda leaf: leaf.sharding, variables)
        self._embed_image, _ = encode.compile_embed(model, shardings, mesh)
        self._scores = encode.compile_scores(model, shardings, mesh)

    def class_scores(self, images: Iterable, *, on_error: str = "raise") -> np.ndarray:
        """Returns logits [N, K] float32; arguments and errors as of `align.Align.encode_image`."""
        return self._run(self._scores, images, on_error)

    def encode_image(self, images: Iterable, *, on_error: str = "raise") -> np.ndarray:
        """Returns pooled features [N, C] float32 of unit norm, likewise."""
        return self._run(self._embed_image, images, on_error)

    def encode_text(self, texts: Iterable[str], **_: Any) -> NoReturn:
        """Raises ValueError: there is no text tower."""
        raise ValueError("a classifier has no text tower; evaluate it by type='classify'.")

    def fingerprint(self) -> str:
        """Returns 16 hex digits that identify weights, compute dtype and preprocessing."""
        return encode.fingerprint(self.model, self.variables, self.preprocessing)

    def _run(self, apply: Callable[..., jax.Array], images: Iterable, on_error: str) -> np.ndarray:
        batches = encode.image_batches(
            images,
            self.preprocessing,
            sharding=self._rows,
            batch_size=self._batch_size,
            on_error=on_error,
        )
        return encode.encode(
            partial(apply, self.variables),
            batches,
            sharding=self._rows,
            batch_size=self._batch_size,
            progress=encode.progress_bar(images, "images", enabled=self.origin is not None),
        )


def is_workdir(path: str | os.PathLike) -> bool:
    """Returns whether a path is the workdir of a classifier."""
    return (Path(path) / "checkpoints").is_dir() and trained.is_classifier(path)


def load(path: str | os.PathLike, *, step: int | None = None) -> ImageClassifier:
    """Returns the classifier of a workdir.

    Args:
      path: the workdir.
      step: of its checkpoint; None takes the newest.

    Raises:
      ValueError: files that are missing or damaged.
    """
    found = trained.load_trained(path, step=step)
    return ImageClassifier(
        found.model,
        found.variables,
        trained.workdir.read_classes(path),
        found.preprocessing,
        found.mesh,
        batch_size=found.config.eval.batch_size,
        origin=Origin(Path(path).resolve().name, found.step, found.config),
    )
