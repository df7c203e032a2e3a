"""Contrastive losses over the global batch: a dense form (the oracle) and a row-sharded form.

Both compute the paper's loss (Jia et al. 2021, eq. 1-2): the *sum*, not the mean, of image-to-text
and text-to-image softmax cross-entropy with label smoothing. Smoothed cross-entropy is
`logsumexp - (1 - eps) * positive - eps * mean`, so no B x B target exists in any form. Everything
is float32 at full precision, on every platform.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

HIGHEST = jax.lax.Precision.HIGHEST

FORMS = ("dense", "sharded")
# loss.mask_duplicates -> arrays of the batch whose equality marks a false negative
DUPLICATES = {
    "none": (),
    "caption": ("caption_hash",),
    "image": ("image_hash",),
    "both": ("caption_hash", "image_hash"),
}

LossFn = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def make_loss(form: str, mesh: Mesh, *, label_smoothing: float) -> LossFn:
    """Returns `loss(z_image, z_text, temperature, hashes=()) -> (loss, parts)`.

    Args:
      form: one of `FORMS`.
      mesh: over all of whose axes the batch is sharded in the "sharded" form.
      label_smoothing: in [0, 1).
    """
    if form == "dense":
        return partial(dense_loss, label_smoothing=label_smoothing)
    return partial(sharded_loss, mesh=mesh, label_smoothing=label_smoothing)


def dense_loss(
    z_image: jax.Array,
    z_text: jax.Array,
    temperature: jax.Array,
    hashes: tuple[jax.Array, ...] = (),
    *,
    label_smoothing: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (loss [], {"loss_image_to_text", "loss_text_to_image"}) from the B x B logits.

    Args:
      z_image: [B, D] float32, unit norm; row i pairs with row i of z_text.
      z_text: [B, D] float32, unit norm.
      temperature: scalar > 0, divides the cosine.
      hashes: any number of uint32 [B, 2]. Columns other than the positive that agree with it in
        one of them (same caption, same image) are false negatives and leave the softmax.
      label_smoothing: in [0, 1), spread uniformly over the columns that take part.

    Raises:
      ValueError: the two batches differ in size.
    """
    _check_sizes(z_image, z_text)
    parts = [
        _row_losses(rows, columns, columns, temperature, hashes, hashes, 0, label_smoothing).mean()
        for rows, columns in ((z_image, z_text), (z_text, z_image))
    ]
    return _total(*parts)


def sharded_loss(
    z_image: jax.Array,
    z_text: jax.Array,
    temperature: jax.Array,
    hashes: tuple[jax.Array, ...] = (),
    *,
    mesh: Mesh,
    label_smoothing: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns what `dense_loss` does; each device holds only its [B / devices, B] rows.

    The columns' embeddings are all-gathered over the mesh; their gradients come back through a
    reduce-scatter, so negatives on other devices receive gradient (unlike per-device losses).
    Arguments as in `dense_loss`, plus the mesh over all of whose axes the batch is sharded.
    """
    _check_sizes(z_image, z_text)
    axes = mesh.axis_names
    rows_spec, replicated = PartitionSpec(axes), PartitionSpec()

    def local_loss(z_image, z_text, temperature, hashes):
        gather = partial(jax.lax.all_gather, axis_name=axes, tiled=True)
        all_hashes = tuple(gather(h) for h in hashes)
        first_row = jax.lax.axis_index(axes) * z_image.shape[0]
        parts = []
        for rows, columns in ((z_image, z_text), (z_text, z_image)):
            losses = _row_losses(
                rows,
                columns,
                gather(columns),
                temperature,
                hashes,
                all_hashes,
                first_row,
                label_smoothing,
            )
            parts.append(jax.lax.pmean(losses.mean(), axes))
        return tuple(parts)

    parts = jax.shard_map(
        local_loss,
        mesh=mesh,
        in_specs=(rows_spec, rows_spec, replicated, rows_spec),
        out_specs=replicated,
    )(z_image, z_text, temperature, tuple(hashes))
    return _total(*parts)


def _row_losses(
    z_rows, z_positives, z_columns, temperature, row_hashes, column_hashes, first_row, smoothing
):
    """Cross-entropy [b] of rows [b, D], each against its positive [b, D] and columns [B, D]."""
    logits = jnp.einsum("bD,BD->bB", z_rows, z_columns, precision=HIGHEST) / temperature
    positive = jnp.einsum("bD,bD->b", z_rows, z_positives, precision=HIGHEST) / temperature
    if row_hashes:
        row = first_row + jnp.arange(logits.shape[0])[:, None]
        excluded = jnp.zeros(logits.shape, bool)
        for rows, columns in zip(row_hashes, column_hashes, strict=True):
            excluded |= (rows[:, None, :] == columns[None, :, :]).all(-1)
        excluded &= row != jnp.arange(logits.shape[1])
        lse = jax.nn.logsumexp(logits, axis=1, where=~excluded)
        mean = jnp.mean(logits, axis=1, where=~excluded)
    else:
        lse = jax.nn.logsumexp(logits, axis=1)
        mean = logits.mean(1)
    return lse - (1.0 - smoothing) * positive - smoothing * mean


def _total(image_to_text, text_to_image):
    parts = {"loss_image_to_text": image_to_text, "loss_text_to_image": text_to_image}
    return image_to_text + text_to_image, parts


def _check_sizes(z_image, z_text):
    if z_image.shape != z_text.shape:
        raise ValueError(
            f"z_image has shape {z_image.shape} and z_text {z_text.shape}; they must be equal."
        )
