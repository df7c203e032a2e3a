"""align_jax: train, evaluate and use ALIGN (EfficientNet + BERT) in JAX. Importing it is free."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align_jax.align import Align
    from align_jax.search.index import Index

__version__ = "0.1.0"


def load(
    name_or_path: str | os.PathLike,
    *,
    dtype: str | None = None,
    batch_size: int | None = None,
    step: int | None = None,
    adapter: str | os.PathLike | None = None,
) -> "Align":
    """Returns a trained model from a workdir, a Hugging Face folder or the Hugging Face hub.

    Arguments and errors are those of `align_jax.align.load`; JAX is imported by the first call.
    """
    from align_jax import align

    return align.load(name_or_path, dtype=dtype, batch_size=batch_size, step=step, adapter=adapter)


def open_index(
    uri: str | os.PathLike, model: Any = None, *, index_type: str | None = None
) -> "Index":
    """Returns the vector index at `uri`; with a model, makes it where there is none.

    Arguments and errors are those of `align_jax.search.index.open_index`.
    """
    from align_jax.search import index

    return index.open_index(uri, model, index_type=index_type)
