"""Contrastive losses over the global batch: what they are, a dense and a row-sharded form.

softmax (Jia et al. 2021, eq. 1-2) is the *sum*, not the mean, of image-to-text and text-to-image
cross-entropy with label smoothing. Smoothed cross-entropy is
`logsumexp - (1 - eps) * positive - eps * mean`, so no B x B target exists in any form. sigmoid is
SigLIP's (Zhai et al. 2023). Everything is float32 at full precision, on every platform. The third
form, which needs neither [B, B] nor gathered embeddings, is in `ring_loss`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from align_jax import ring_loss

HIGHEST = jax.lax.Precision.HIGHEST

FORMS = ("dense", "sharded", "ring")
# loss.kind -> names of the two parts whose sum is the loss
PARTS = {
    "softmax": ("loss_image_to_text", "loss_text_to_image"),
    "sigmoid": ("loss_positive", "loss_negative"),
}
# loss.mask_duplicates -> arrays of the batch whose equality marks a false negative
DUPLICATES = {
    "none": (),
    "caption": ("caption_hash",),
    "image": ("image_hash",),
    "both": ("caption_hash", "image_hash"),
}

# loss.negatives -> number of halvings that leave this share of the batch as negatives
NEGATIVES = {1.0: 0, 0.5: 1, 0.25: 2}

LossFn = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def make_loss(
    form: str,
    mesh: Mesh,
    *,
    kind: str = "softmax",
    label_smoothing: float = 0.0,
    tile_size: int = 1024,
) -> LossFn:
    """Returns `loss(z_image, z_text, temperature, hashes=(), bias=0.0) -> (loss, parts)`.

    All forms take the arguments of `dense_loss` and return its numbers.

    Args:
      form: one of `FORMS`.
      mesh: over all of whose axes the batch is sharded in the "sharded" and "ring" forms.
      kind: key of `PARTS`.
      label_smoothing: in [0, 1); the sigmoid loss has none.
      tile_size: of the "ring" form, whose memory beyond the embeddings is a few [tile, tile].
    """
    options = {"kind": kind, "label_smoothing": label_smoothing}
    if form == "dense":
        return partial(dense_loss, **options)
    if form == "sharded":
        return partial(sharded_loss, mesh=mesh, **options)
    return partial(_ring_loss, mesh=mesh, tile_size=tile_size, **options)


def dense_loss(
    z_image: jax.Array,
    z_text: jax.Array,
    temperature: jax.Array,
    hashes: tuple[jax.Array, ...] = (),
    bias: jax.Array | float = 0.0,
    *,
    kind: str = "softmax",
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (loss [], {part: []}) from the B x B logits; names of the parts in `PARTS`.

    The sigmoid loss is the sum over pairs of -log sigmoid(l * (cosine / temperature + bias)) over
    B, where l is 1 for a positive pair and -1 for any other.

    Args:
      z_image: [B, D], unit norm; row i pairs with row i of z_text. Computed with in float32.
      z_text: [B, D], unit norm.
      temperature: scalar > 0, divides the cosine.
      hashes: any number of uint32 [B, 2]. Columns other than the positive that agree with it in
        one of them (same caption, same image) are false negatives and leave the loss.
      bias: scalar, added to the logits of the sigmoid loss; the softmax cannot see one.
      kind: key of `PARTS`.
      label_smoothing: of the softmax, in [0, 1), spread uniformly over the columns that take part.

    Raises:
      ValueError: the two batches differ in size.
    """
    z_image, z_text = _checked(z_image, z_text)
    if kind == "sigmoid":
        losses = _sigmoid_losses(z_image, z_text, temperature, bias, hashes, hashes, 0)
        return _total(kind, [loss.mean() for loss in losses])
    parts = [
        _row_losses(rows, columns, columns, temperature, hashes, hashes, 0, label_smoothing).mean()
        for rows, columns in ((z_image, z_text), (z_text, z_image))
    ]
    return _total(kind, parts)


def sharded_loss(
    z_image: jax.Array,
    z_text: jax.Array,
    temperature: jax.Array,
    hashes: tuple[jax.Array, ...] = (),
    bias: jax.Array | float = 0.0,
    *,
    mesh: Mesh,
    kind: str = "softmax",
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns what `dense_loss` does; each device holds only its [B / devices, B] rows.

    The columns' embeddings are all-gathered over the mesh; their gradients come back through a
    reduce-scatter, so negatives on other devices receive gradient (unlike per-device losses).
    Arguments as in `dense_loss`, plus the mesh over all of whose axes the batch is sharded.
    """
    z_image, z_text = _checked(z_image, z_text)
    axes = mesh.axis_names
    rows_spec, replicated = PartitionSpec(axes), PartitionSpec()

    def local_loss(z_image, z_text, temperature, bias, hashes):
        gather = partial(jax.lax.all_gather, axis_name=axes, tiled=True)
        all_hashes = tuple(gather(h) for h in hashes)
        first_row = jax.lax.axis_index(axes) * z_image.shape[0]
        if kind == "sigmoid":
            losses = _sigmoid_losses(
                z_image, gather(z_text), temperature, bias, hashes, all_hashes, first_row
            )
        else:
            losses = [
                _row_losses(
                    rows,
                    columns,
                    gather(columns),
                    temperature,
                    hashes,
                    all_hashes,
                    first_row,
                    label_smoothing,
                )
                for rows, columns in ((z_image, z_text), (z_text, z_image))
            ]
        return tuple(jax.lax.pmean(loss.mean(), axes) for loss in losses)

    parts = jax.shard_map(
        local_loss,
        mesh=mesh,
        in_specs=(rows_spec, rows_spec, replicated, replicated, rows_spec),
        out_specs=replicated,
    )(z_image, z_text, temperature, jnp.asarray(bias, jnp.float32), tuple(hashes))
    return _total(kind, parts)


def subset_hashes(keys: jax.Array, negatives: float) -> tuple[jax.Array, ...]:
    """Returns hashes that leave each pair a random share of the others as negatives, in any form.

    A halving puts each pair into one of two halves by a coin; pairs of the same half are no
    negatives of each other. The share is thus met on average, and i meets j if and only if j meets
    i. The paper does not say how its subsets are drawn.

    Args:
      keys: one per pair [B], of which the coins depend alone.
      negatives: key of `NEGATIVES`.
    """
    coins = jax.vmap(partial(jax.random.bits, shape=(NEGATIVES[negatives],)))(keys) & 1
    return tuple(jnp.stack([coin, coin], 1) for coin in coins.T)


def _ring_loss(z_image, z_text, temperature, hashes=(), bias=0.0, *, kind, **options):
    _check_sizes(z_image, z_text)
    parts = ring_loss.ring_parts(z_image, z_text, temperature, hashes, bias, kind=kind, **options)
    return _total(kind, parts)


def _row_losses(
    z_rows, z_positives, z_columns, temperature, row_hashes, column_hashes, first_row, smoothing
):
    """Cross-entropy [b] of rows [b, D], each against its positive [b, D] and columns [B, D]."""
    logits = jnp.einsum("bD,BD->bB", z_rows, z_columns, precision=HIGHEST) / temperature
    positive = jnp.einsum("bD,bD->b", z_rows, z_positives, precision=HIGHEST) / temperature
    if row_hashes:
        excluded = _duplicates(row_hashes, column_hashes) & ~_positives(logits.shape, first_row)
        lse = jax.nn.logsumexp(logits, axis=1, where=~excluded)
        mean = jnp.mean(logits, axis=1, where=~excluded)
    else:
        lse = jax.nn.logsumexp(logits, axis=1)
        mean = logits.mean(1)
    return lse - (1.0 - smoothing) * positive - smoothing * mean


def _sigmoid_losses(z_rows, z_columns, temperature, bias, row_hashes, column_hashes, first_row):
    """Losses [b] of the positive and [b] of the negative pairs of rows [b, D], columns [B, D]."""
    logits = jnp.einsum("bD,BD->bB", z_rows, z_columns, precision=HIGHEST) / temperature + bias
    positives = _positives(logits.shape, first_row)
    negatives = ~positives
    if row_hashes:
        negatives &= ~_duplicates(row_hashes, column_hashes)
    losses = jax.nn.softplus(jnp.where(positives, -logits, logits))
    return tuple(jnp.sum(losses, 1, where=pairs) for pairs in (positives, negatives))


def _positives(shape, first_row):
    return first_row + jnp.arange(shape[0])[:, None] == jnp.arange(shape[1])


def _duplicates(row_hashes, column_hashes):
    """Whether row and column agree in any of the hashes: bool [b, B]."""
    equal = [
        (rows[:, None, :] == columns[None, :, :]).all(-1)
        for rows, columns in zip(row_hashes, column_hashes, strict=True)
    ]
    return jnp.stack(equal).any(0)


def _total(kind, parts):
    return sum(parts), dict(zip(PARTS[kind], parts, strict=True))


def _checked(z_image, z_text):
    _check_sizes(z_image, z_text)
    return z_image.astype(jnp.float32), z_text.astype(jnp.float32)


def _check_sizes(z_image, z_text):
    if z_image.shape != z_text.shape:
        raise ValueError(
            f"z_image has shape {z_image.shape} and z_text {z_text.shape}; they must be equal."
        )
