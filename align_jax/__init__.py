"""align_jax: train, evaluate and use ALIGN (EfficientNet + BERT) in JAX. Importing it is free."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from align_jax.align import Align

__version__ = "0.1.0"


def load(
    name_or_path: str | os.PathLike,
    *,
    dtype: str | None = None,
    batch_size: int | None = None,
    step: int | None = None,
) -> "Align":
    """Returns a trained model from a workdir, a Hugging Face folder or the Hugging Face hub.

    Arguments and errors are those of `align_jax.align.load`; JAX is imported by the first call.
    """
    from align_jax import align

    return align.load(name_or_path, dtype=dtype, batch_size=batch_size, step=step)
