"""The contrastive losses in ring form: neither B x B logits nor gathered embeddings on any device.

Texts travel around the mesh, a block a step, and meet the images that stay in tiles of at most
`tile_size`^2 logits. Statistics of their columns (running maximum, sum of exponentials) travel with
them, so one pass serves both directions; the gradient recomputes the tiles, and the gradient of the
texts follows them around. What the losses *are* stands in `losses.dense_loss`, not here.
Source: the ring, Zhai et al. 2023 (SigLIP), section 3.3; its softmax, a streaming log-sum-exp.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec


def ring_parts(
    z_image: jax.Array,
    z_text: jax.Array,
    temperature: jax.Array,
    hashes: tuple[jax.Array, ...],
    bias: jax.Array,
    *,
    mesh: Mesh,
    kind: str,
    label_smoothing: float,
    tile_size: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns the two scalars whose sum is the loss; differentiable once, in reverse mode.

    They are (image to text, text to image) of the softmax, (positive pairs, negative pairs) of the
    sigmoid loss.

    Args:
      z_image, z_text, temperature, hashes, bias: as in `losses.dense_loss`.
      mesh: over all of whose axes the batch is sharded.
      kind: "softmax" or "sigmoid".
      label_smoothing: of the softmax, in [0, 1).
      tile_size: rows and columns of a tile at most, >= 1; need not divide a device's share.
    """
    ring = _Ring(mesh, kind, label_smoothing, tile_size)
    temperature, bias = (jnp.asarray(scalar, jnp.float32) for scalar in (temperature, bias))
    return _parts(ring, z_image, z_text, temperature, bias, tuple(hashes))


class _Ring(NamedTuple):
    mesh: Mesh
    kind: str
    label_smoothing: float
    tile_size: int


# The custom gradient wraps shard_map, not the other way round: no collective is transposed, and
# what a replicated scalar's gradient sums over is written out.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _parts(ring, *args):
    return _parts_forward(ring, *args)[0]


def _parts_forward(ring, *args):
    row, everywhere = _specs(ring)
    parts, saved = jax.shard_map(
        partial(_local_parts, ring),
        mesh=ring.mesh,
        in_specs=(row, row, everywhere, everywhere, row),
        out_specs=(everywhere, row),
    )(*args)
    return parts, (args, saved)


def _parts_backward(ring, residuals, cotangents):
    args, saved = residuals
    row, everywhere = _specs(ring)
    gradients = jax.shard_map(
        partial(_local_gradients, ring),
        mesh=ring.mesh,
        in_specs=(row, row, everywhere, everywhere, row, row, everywhere),
        out_specs=(row, row, everywhere, everywhere),
    )(*args, saved, jnp.stack(cotangents))
    return *gradients, None  # the hashes have none


_parts.defvjp(_parts_forward, _parts_backward)


def _local_parts(ring, z_image, z_text, temperature, bias, hashes):
    """Returns both parts, and what their gradient needs of rows and columns: arrays [b]."""
    block = _Block(ring, len(z_image))
    images, texts, row_hashes = jax.tree.map(block.tiles, (z_image, z_text, hashes))
    positive = _dot("ntD,ntD->nt", images, texts) / temperature
    zeros = block.zeros(positive.shape)
    if ring.kind == "softmax":
        update = _update_softmax
        # The positive always takes part: from there on even a fully masked tile makes no NaN.
        rows = columns = jnp.stack([positive, zeros, zeros, zeros])
    else:
        update = partial(_update_sigmoid, bias)
        rows, columns = jnp.stack([zeros, zeros]), ()

    def meet(step, state):
        rows, columns, texts, hashes = state
        ahead = block.pass_on((texts, hashes))  # waits for nothing: may run beside the tiles

        def tile(k, state):
            i, j = divmod(k, block.num_tiles)
            logits = _dot("rD,cD->rc", images[i], texts[j]) / temperature
            masks = block.masks(step, i, j, row_hashes, hashes)
            found = update(logits, *masks, _take(state[0], i), _take(state[1], j))
            return _put(state[0], i, found[0]), _put(state[1], j, found[1])

        rows, columns = jax.lax.fori_loop(0, block.num_tiles**2, tile, (rows, columns))
        return rows, block.pass_on(columns), *ahead

    state = rows, columns, texts, row_hashes
    rows, columns, *_ = jax.lax.fori_loop(0, ring.mesh.size, meet, state)

    if ring.kind == "softmax":
        losses, saved = [], []
        for statistics in (rows, columns):
            maximum, total, sum_logits, count = map(block.untile, statistics)
            log_total, target = jnp.log(total), block.untile(positive)
            smoothing = ring.label_smoothing * (target - sum_logits / count)
            # Differences of logits first: what is left is as small as the loss.
            losses.append((maximum - target) + log_total + smoothing)
            saved += [maximum + log_total, ring.label_smoothing / count]
    else:
        losses, saved = map(block.untile, rows), []
    parts = tuple(block.psum(loss.sum()) / block.batch_size for loss in losses)
    return parts, tuple(saved)


def _local_gradients(ring, z_image, z_text, temperature, bias, hashes, saved, cotangents):
    """Returns gradients of sum(cotangents * parts) by z_image, z_text, temperature and bias."""
    block = _Block(ring, len(z_image))
    images, texts, row_hashes = jax.tree.map(block.tiles, (z_image, z_text, hashes))
    rows, columns = (), ()
    weights = cotangents / block.batch_size
    if ring.kind == "softmax":
        rows, columns = jnp.split(jnp.stack(list(map(block.tiles, saved))), 2)
        derivative = partial(_softmax_derivative, weights, ring.label_smoothing)
    else:
        derivative = partial(_sigmoid_derivative, weights, bias)

    def meet(step, state):
        d_images, d_bias, d_behind, *travelling = state
        texts, hashes, columns = travelling
        ahead = block.pass_on(travelling)
        d_behind = block.pass_on(d_behind)  # of the same texts, from the devices they have been on

        def tile(k, state):
            d_images, d_texts, d_bias = state
            i, j = divmod(k, block.num_tiles)
            logits = _dot("rD,cD->rc", images[i], texts[j]) / temperature
            masks = block.masks(step, i, j, row_hashes, hashes)
            d_logits = derivative(logits, *masks, _take(rows, i), _take(columns, j))
            return (
                d_images.at[i].add(_dot("rc,cD->rD", d_logits, texts[j])),
                d_texts.at[j].add(_dot("rc,rD->cD", d_logits, images[i])),
                d_bias + d_logits.sum(),
            )

        start = d_images, block.zeros(texts.shape), d_bias
        d_images, d_texts, d_bias = jax.lax.fori_loop(0, block.num_tiles**2, tile, start)
        return d_images, d_bias, d_behind + d_texts, *ahead

    zeros = block.zeros(images.shape)
    state = zeros, block.zeros(()), zeros, texts, row_hashes, columns
    d_images, d_bias, d_texts, *_ = jax.lax.fori_loop(0, ring.mesh.size, meet, state)
    d_image, d_text = (block.untile(d) / temperature for d in (d_images, block.pass_on(d_texts)))
    # The temperature divides every cosine, so its gradient is that of one factor on z_image.
    d_temperature = -block.psum(_dot("bD,bD->b", z_image, d_image).sum()) / temperature
    return (
        d_image.astype(z_image.dtype),
        d_text.astype(z_text.dtype),
        d_temperature,
        block.psum(d_bias) if ring.kind == "sigmoid" else jnp.zeros_like(bias),
    )


def _update_softmax(logits, positive, allowed, rows, columns):
    def stream(statistics, axis):
        """Statistics [4, t] of rows or columns: maximum, sum of exp(. - maximum), sum, count."""
        old, total, sum_logits, count = statistics
        maximum = jnp.maximum(old, jnp.max(logits, axis, where=allowed, initial=-jnp.inf))
        shifted = jnp.where(allowed, logits - jnp.expand_dims(maximum, axis), -jnp.inf)
        return jnp.stack(
            [
                maximum,
                total * jnp.exp(old - maximum) + jnp.exp(shifted).sum(axis),
                sum_logits + jnp.sum(logits, axis, where=allowed),
                count + allowed.sum(axis),
            ]
        )

    return stream(rows, 1), stream(columns, 0)


def _softmax_derivative(weights, smoothing, logits, positive, allowed, rows, columns):
    (row_lse, row_share), (column_lse, column_share) = rows[:, :, None], columns[:, None, :]
    d_logits = weights[0] * (jnp.exp(logits - row_lse) - row_share)
    d_logits += weights[1] * (jnp.exp(logits - column_lse) - column_share)
    d_logits -= jnp.where(positive, weights.sum() * (1.0 - smoothing), 0.0)
    return jnp.where(allowed, d_logits, 0.0)


def _update_sigmoid(bias, logits, positive, allowed, rows, columns):
    logits = logits + bias
    losses = jax.nn.softplus(jnp.where(positive, -logits, logits))
    sums = [jnp.sum(losses, 1, where=allowed & kind) for kind in (positive, ~positive)]
    return rows + jnp.stack(sums), columns


def _sigmoid_derivative(weights, bias, logits, positive, allowed, rows, columns):
    logits = logits + bias
    attract, repel = -weights[0] * jax.nn.sigmoid(-logits), weights[1] * jax.nn.sigmoid(logits)
    return jnp.where(allowed, jnp.where(positive, attract, repel), 0.0)


class _Block:
    """A device's share of the batch, inside shard_map: its tiles, and its place in the ring."""

    def __init__(self, ring, size):
        self.axes = ring.mesh.axis_names
        self.devices = ring.mesh.size
        self.size = size
        self.batch_size = size * self.devices
        self.num_tiles = -(-size // ring.tile_size)
        self.tile_size = -(-size // self.num_tiles)  # as equal as possible: little padding

    def tiles(self, array):
        """Returns array [b, ...] as [tiles, t, ...], padded with zeros."""
        padding = self.num_tiles * self.tile_size - self.size
        padded = jnp.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1)) if padding else array
        return padded.reshape(self.num_tiles, self.tile_size, *array.shape[1:])

    def untile(self, array):
        """Returns the inverse of `tiles`."""
        return array.reshape(-1, *array.shape[2:])[: self.size]

    def zeros(self, shape):
        return jax.lax.pcast(jnp.zeros(shape, jnp.float32), self.axes, to="varying")

    def psum(self, value):
        return jax.lax.psum(value, self.axes)

    def pass_on(self, tree):
        """Returns what the device before this one had; this one's goes to the device after it."""
        ring = [(device, (device + 1) % self.devices) for device in range(self.devices)]
        return jax.tree.map(lambda a: jax.lax.ppermute(a, self.axes, ring), tree)

    def masks(self, step, i, j, row_hashes, column_hashes):
        """Returns (positive, allowed), bool [t, t], of row tile i, column tile j."""
        row, column = (k * self.tile_size + jnp.arange(self.tile_size) for k in (i, j))
        row, column = row[:, None], column[None, :]
        positive = (row == column) & (step == 0)  # at first every device has its own texts
        excluded = jnp.zeros_like(positive)
        for rows, columns in zip(row_hashes, column_hashes, strict=True):
            excluded |= (rows[i][:, None, :] == columns[j][None, :, :]).all(-1)
        real = (row < self.size) & (column < self.size)
        return positive, real & (positive | ~excluded)


def _dot(subscripts, *operands):
    operands = (operand.astype(jnp.float32) for operand in operands)
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)


def _take(statistics, k):
    return jax.tree.map(lambda array: array[:, k], statistics)


def _put(statistics, k, values):
    return jax.tree.map(lambda array, value: array.at[:, k].set(value), statistics, values)


def _specs(ring):
    return PartitionSpec(ring.mesh.axis_names), PartitionSpec()
