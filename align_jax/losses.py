"""Contrastive losses over the global batch: what they are, a dense and a row-sharded form; and the
cross-entropy of a classifier.

softmax (Jia et al. 2021, eq. 1-2) is the *sum*, not the mean, of image-to-text and text-to-image
cross-entropy with label smoothing. Smoothed cross-entropy is
`logsumexp - (1 - eps) * positive - eps * mean`, so no B x B target exists in any form. sigmoid is
SigLIP's (Zhai et al. 2023). Everything is float32 at full precision, on every platform. The third
form, which needs neither [B, B] nor gathered embeddings, is in `ring_loss` and builds on this file.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

FORMS = ("dense", "sharded", "ring")
# loss.kind -> names of the two parts whose sum is the loss
PARTS = {
    "softmax": ("loss_image_to_text", "loss_text_to_image"),
    "sigmoid": ("loss_positive", "loss_negative"),
}
# Largest of the logits that the loss sees, of positive pairs and of the negatives that take part
LARGEST = ("logit_max/positive", "logit_max/negative")
# loss.mask_duplicates -> arrays of the batch whose equality marks a false negative
DUPLICATES = {
    "none": (),
    "caption": ("caption_hash",),
    "image": ("image_hash",),
    "both": ("caption_hash", "image_hash"),
}

# loss.negatives -> number of halvings that leave this share of the batch as negatives
NEGATIVES = {1.0: 0, 0.5: 1, 0.25: 2}

Parts = dict[str, jax.Array]
LossFn = Callable[..., tuple[jax.Array, Parts]]
Gather = Callable[[jax.Array], jax.Array]


def make_loss(config: ConfigDict, mesh: Mesh) -> LossFn:
    """Returns `loss(z_image, z_text, params, batch, keys=None) -> (loss [], {part: []})`.

    All forms return the numbers of `dense_loss`, which says what the embeddings must be and what
    the dict holds. `params` holds the scalars `temperature` and, for the sigmoid loss, `bias`;
    `batch` the hashes that `mask_duplicates` names; `keys`, one per example [B], draw the negatives
    if not all take part.

    Args:
      config: group `loss`.
      mesh: over all of whose axes the batch is sharded in the "sharded" and "ring" forms.
    """
    form = _make_form(config, mesh)

    def loss_fn(
        z_image: jax.Array,
        z_text: jax.Array,
        params: dict[str, jax.Array],
        batch: dict[str, jax.Array],
        keys: jax.Array | None = None,
    ) -> tuple[jax.Array, Parts]:
        hashes = tuple(batch[name] for name in DUPLICATES[config.mask_duplicates])
        if NEGATIVES[config.negatives]:
            hashes += subset_hashes(keys, config.negatives)
        return form(z_image, z_text, params["temperature"], hashes, params.get("bias", 0.0))

    return loss_fn


def dense_loss(
    z_image: jax.Array,
    z_text: jax.Array,
    temperature: jax.Array,
    hashes: Sequence[jax.Array] = (),
    bias: jax.Array | float = 0.0,
    *,
    kind: str = "softmax",
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, Parts]:
    """Returns (loss [], {part: []}) from the B x B logits; names of the parts in `PARTS`.

    Beside the parts the dict holds `LARGEST`: without gradient, and -inf where there is no
    negative; the bias of the sigmoid loss is in them.

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
    check_sizes(z_image, z_text)
    losses, largest = _row_losses(
        (z_image, z_text, temperature, hashes, bias),
        kind=kind,
        label_smoothing=label_smoothing,
        first_row=0,
        gather=lambda x: x,
    )
    return total(kind, [loss.mean() for loss in losses], largest)


def sharded_loss(
    z_image: jax.Array,
    z_text: jax.Array,
    temperature: jax.Array,
    hashes: Sequence[jax.Array] = (),
    bias: jax.Array | float = 0.0,
    *,
    mesh: Mesh,
    kind: str = "softmax",
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, Parts]:
    """Returns what `dense_loss` does; each device holds only its [B / devices, B] rows.

    The columns' embeddings are all-gathered over the mesh; their gradients come back through a
    reduce-scatter, so negatives on other devices receive gradient (unlike per-device losses).
    Arguments as in `dense_loss`, plus the mesh over all of whose axes the batch is sharded.
    """
    check_sizes(z_image, z_text)
    axes = mesh.axis_names
    rows, replicated = PartitionSpec(axes), PartitionSpec()

    def local_parts(*local: Any) -> tuple[tuple, tuple]:
        losses, largest = _row_losses(
            local,
            kind=kind,
            label_smoothing=label_smoothing,
            first_row=jax.lax.axis_index(axes) * len(local[0]),
            gather=partial(jax.lax.all_gather, axis_name=axes, tiled=True),
        )
        parts = tuple(jax.lax.pmean(loss.mean(), axes) for loss in losses)
        return parts, tuple(jax.lax.pmax(logit, axes) for logit in largest)

    parts, largest = jax.shard_map(
        local_parts,
        mesh=mesh,
        in_specs=(rows, rows, replicated, rows, replicated),
        out_specs=replicated,
    )(z_image, z_text, temperature, tuple(hashes), jnp.asarray(bias, jnp.float32))
    return total(kind, parts, largest)


def classify_loss(
    logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0
) -> tuple[jax.Array, Parts]:
    """Returns (mean cross-entropy [], {"accuracy": percent of the batch whose label is on top}).

    Args:
      logits: [B, K] float32.
      labels: int32 [B] in 0..K-1.
      label_smoothing: in [0, 1), spread uniformly over all K classes.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    positive = (1.0 - label_smoothing) * own + label_smoothing * logits.mean(1)
    loss = (jax.nn.logsumexp(logits, 1) - positive).mean()
    return loss, {"accuracy": 100.0 * (logits.argmax(1) == labels).mean()}


def subset_hashes(keys: jax.Array, negatives: float) -> tuple[jax.Array, ...]:
    """Returns hashes that leave each pair a random share of the others as negatives, in any form.

    A halving puts each pair into one of two halves by a coin; pairs of the same half are no
    negatives of each other. The share is thus met on average, and i meets j if and only if j meets
    i. The paper does not say how its subsets are drawn.

    Args:
      keys: one per pair [B], on which alone the coins depend.
      negatives: key of `NEGATIVES`.
    """
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 2**16)  # dropout draws from the key itself
    coins = jax.vmap(partial(jax.random.bits, shape=(NEGATIVES[negatives],)))(keys) & 1
    return tuple(jnp.stack([coin, coin], 1) for coin in coins.T)


def dot(subscripts: str, *operands: jax.Array) -> jax.Array:
    """Returns the einsum of the operands in float32, at full precision on every platform."""
    operands = (operand.astype(jnp.float32) for operand in operands)
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)


def are_duplicates(
    row_hashes: Sequence[jax.Array], column_hashes: Sequence[jax.Array]
) -> jax.Array:
    """Returns whether row and column agree in any of the hashes, uint32 [r, 2] and [c, 2]."""
    equal = [
        (rows[:, None, :] == columns[None, :, :]).all(-1)
        for rows, columns in zip(row_hashes, column_hashes, strict=True)
    ]
    return jnp.stack(equal).any(0)  # [r, c]


def sigmoid_losses(logits: jax.Array, positive: jax.Array) -> jax.Array:
    """Returns -log sigmoid(l * logit) [r, c], where l is 1 if the pair is positive, else -1."""
    return jax.nn.softplus(jnp.where(positive, -logits, logits))


def total(
    kind: str, parts: Sequence[jax.Array], largest: Sequence[jax.Array]
) -> tuple[jax.Array, Parts]:
    """Returns (sum of the two parts, these and the two largest logits by name)."""
    names = (*PARTS[kind], *LARGEST)
    return sum(parts), dict(zip(names, (*parts, *largest), strict=True))


def check_sizes(z_image: jax.Array, z_text: jax.Array) -> None:
    """Raises ValueError if the two sides are not equally many vectors of equal length."""
    if z_image.shape != z_text.shape:
        raise ValueError(
            f"z_image has shape {z_image.shape} and z_text {z_text.shape}; they must be equal."
        )


def _make_form(config: ConfigDict, mesh: Mesh) -> LossFn:
    """Returns a function of the arguments of `dense_loss` without its options."""
    options = {"kind": config.kind, "label_smoothing": config.label_smoothing}
    if config.form == "dense":
        return partial(dense_loss, **options)
    if config.form == "sharded":
        return partial(sharded_loss, mesh=mesh, **options)
    from align_jax import ring_loss  # it imports this file, whose definitions it computes

    return partial(ring_loss.ring_loss, mesh=mesh, tile_size=config.tile_size, **options)


def _row_losses(
    inputs: tuple, *, kind: str, label_smoothing: float, first_row: jax.Array | int, gather: Gather
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns the parts of the loss of each row, [b] and [b], and the largest logits, [] and [].

    Args:
      inputs: the arguments of `dense_loss`: b of the B rows of all that has rows.
      kind, label_smoothing: as there.
      first_row: of them, in the batch.
      gather: b rows [b, ...] -> the whole batch [B, ...].
    """
    z_image, z_text, temperature, hashes, bias = inputs
    z_image, z_text = z_image.astype(jnp.float32), z_text.astype(jnp.float32)
    all_texts = gather(z_text)  # [B, D]
    logits = dot("bD,BD->bB", z_image, all_texts) / temperature
    positive = first_row + jnp.arange(len(logits))[:, None] == jnp.arange(len(all_texts))  # [b, B]
    allowed = None  # all
    if hashes:
        allowed = positive | ~are_duplicates(hashes, [gather(h) for h in hashes])
    negative = ~positive if allowed is None else allowed & ~positive
    seen = logits + bias if kind == "sigmoid" else logits
    largest = tuple(
        jnp.max(jax.lax.stop_gradient(seen), where=pairs, initial=-jnp.inf)
        for pairs in (positive, negative)
    )
    if kind == "sigmoid":
        losses = sigmoid_losses(seen, positive)
        return (jnp.sum(losses, 1, where=positive), jnp.sum(losses, 1, where=negative)), largest

    target = dot("bD,bD->b", z_image, z_text) / temperature

    def cross_entropy(logits: jax.Array) -> jax.Array:
        spread = jnp.mean(logits, 1, where=allowed)
        lse = jax.nn.logsumexp(logits, 1, where=allowed)
        return lse - (1.0 - label_smoothing) * target - label_smoothing * spread

    of_texts = dot("bD,BD->bB", z_text, gather(z_image)) / temperature
    return (cross_entropy(logits), cross_entropy(of_texts)), largest
