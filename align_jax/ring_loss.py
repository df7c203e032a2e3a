"""The contrastive losses in ring form: neither B x B logits nor gathered embeddings on any device.

Texts travel around the mesh, from device to device, and meet the images that stay in tiles of at
most `tile_size`^2 logits. Statistics of their columns (running maximum, sum of exponentials) travel
with them, so one pass serves both directions; the gradient recomputes the tiles, and the gradient
of the texts follows them around. A device's texts go in rounds of `_ROUND_TILES` tiles, so that
what is under way is small beside the embeddings. What the losses *are* stands in `losses`.
Source: the ring, Zhai et al. 2023 (SigLIP), section 3.3; its softmax, a streaming log-sum-exp.

Shapes: b pairs on a device, in n tiles of t (n * t >= b, padded with zeros), of which g go in a
round; D is an embedding's.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from align_jax.losses import Parts, are_duplicates, check_sizes, dot, sigmoid_losses, total

Array = jax.Array

_ROUND_TILES = 16


def ring_loss(
    z_image: Array,
    z_text: Array,
    temperature: Array,
    hashes: tuple[Array, ...] = (),
    bias: Array | float = 0.0,
    *,
    mesh: Mesh,
    kind: str,
    label_smoothing: float,
    tile_size: int,
) -> tuple[Array, Parts]:
    """Returns what `losses.dense_loss` does; differentiable once, in reverse mode.

    Args:
      z_image, z_text, temperature, hashes, bias, kind, label_smoothing: as there.
      mesh: over all of whose axes the batch is sharded.
      tile_size: rows and columns of a tile at most, >= 1; need not divide a device's share.
    """
    check_sizes(z_image, z_text)
    ring = _Ring(mesh, kind, label_smoothing, tile_size)
    temperature, bias = (jnp.asarray(scalar, jnp.float32) for scalar in (temperature, bias))
    return total(kind, *_parts(ring, z_image, z_text, temperature, bias, tuple(hashes)))


class _Ring(NamedTuple):
    mesh: Mesh
    kind: str
    label_smoothing: float
    tile_size: int


# The custom gradient wraps shard_map, not the other way round: no collective is transposed, and
# what a replicated scalar's gradient sums over is written out.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _parts(ring: _Ring, *args: Any) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    return _parts_forward(ring, *args)[0]


def _parts_forward(ring: _Ring, *args: Any) -> tuple[tuple[tuple, tuple], tuple]:
    row, everywhere = _specs(ring)
    results, saved = jax.shard_map(
        partial(_local_parts, ring),
        mesh=ring.mesh,
        in_specs=(row, row, everywhere, everywhere, row),
        out_specs=(everywhere, row),
    )(*args)
    return results, (args, saved)


def _parts_backward(ring: _Ring, residuals: tuple, cotangents: tuple[tuple, tuple]) -> tuple:
    (args, saved), (cotangents, _) = residuals, cotangents  # the largest logits have no gradient
    row, everywhere = _specs(ring)
    gradients = jax.shard_map(
        partial(_local_gradients, ring),
        mesh=ring.mesh,
        in_specs=(row, row, everywhere, everywhere, row, row, everywhere),
        out_specs=(row, row, everywhere, everywhere),
    )(*args, saved, jnp.stack(cotangents))
    return *gradients, None  # the hashes have none


_parts.defvjp(_parts_forward, _parts_backward)


def _local_parts(
    ring: _Ring, z_image: Array, z_text: Array, temperature: Array, bias: Array, hashes: tuple
) -> tuple[tuple[tuple, tuple], tuple[Array, ...]]:
    """Returns (both parts, both largest logits), and what the gradient needs: arrays [b].

    Embeddings are [b, D], hashes uint32 [b, 2].
    """
    block = _Block(ring, len(z_image))
    images, texts, row_hashes = jax.tree.map(block.tiles, (z_image, z_text, hashes))  # [n, t, D]
    positive = dot("ntD,ntD->nt", images, texts) / temperature
    zeros = block.zeros(positive.shape)
    if ring.kind == "softmax":
        update = _update_softmax
        # The positive always takes part: from there on even a fully masked tile makes no NaN.
        rows = columns = jnp.stack([positive, zeros, zeros, zeros])  # [4, n, t]
    else:
        update = partial(_update_sigmoid, bias)
        rows, columns = jnp.stack([zeros, zeros]), ()  # [2, n, t]

    def meet(of_round: Array, step: Array, state: tuple) -> tuple:
        rows, columns, negative, texts, hashes = state
        ahead = block.pass_on((texts, hashes))  # needs no tile, so it may run beside them

        def tile(k: Array, state: tuple) -> tuple:
            i, j = divmod(k, block.round_tiles)
            logits = dot("rD,cD->rc", images[i], texts[j]) / temperature  # [t, t]
            is_positive, allowed = block.masks(of_round, step, i, j, row_hashes, hashes)
            found = update(logits, is_positive, allowed, _take(state[0], i), _take(state[1], j))
            largest = jnp.max(logits, where=allowed & ~is_positive, initial=-jnp.inf)
            rows, columns = _put(state[0], i, found[0]), _put(state[1], j, found[1])
            return rows, columns, jnp.maximum(state[2], largest)

        state = rows, columns, negative
        rows, columns, negative = jax.lax.fori_loop(0, block.met_tiles, tile, state)
        return rows, block.pass_on(columns), negative, *ahead

    def go_round(number: Array, state: tuple) -> tuple:
        rows, columns, negative = state
        travelling = block.part(texts, number), block.part(row_hashes, number)
        state = rows, block.part(columns, number, axis=1), negative, *travelling
        rows, part, negative, *_ = jax.lax.fori_loop(
            0, ring.mesh.size, partial(meet, number), state
        )
        return rows, block.put_part(columns, part, number, axis=1), negative

    state = rows, columns, block.zeros(()) - jnp.inf
    rows, columns, negative = jax.lax.fori_loop(0, block.num_rounds, go_round, state)

    if ring.kind == "softmax":
        losses, saved = [], []
        for statistics in (rows, columns):
            maximum, sum_exp, sum_logits, count = map(block.untile, statistics)  # [b] each
            log_sum, target = jnp.log(sum_exp), block.untile(positive)
            smoothing = ring.label_smoothing * (target - sum_logits / count)
            # Differences of logits first: what is left is as small as the loss.
            losses.append((maximum - target) + log_sum + smoothing)
            saved += [maximum + log_sum, ring.label_smoothing / count]
    else:
        losses, saved = map(block.untile, rows), []
    parts = tuple(block.psum(loss.sum()) / block.batch_size for loss in losses)
    largest = jnp.stack([block.untile(positive).max(), negative])
    largest = jax.lax.pmax(largest, block.axes) + (bias if ring.kind == "sigmoid" else 0.0)
    return (parts, tuple(largest)), tuple(saved)


def _local_gradients(
    ring: _Ring,
    z_image: Array,
    z_text: Array,
    temperature: Array,
    bias: Array,
    hashes: tuple,
    saved: tuple[Array, ...],
    cotangents: Array,
) -> tuple[Array, Array, Array, Array]:
    """Returns gradients of sum(cotangents * parts) by z_image, z_text, temperature and bias.

    As `_local_parts`, plus what that saved, arrays [b], and the cotangents [2].
    """
    block = _Block(ring, len(z_image))
    images, texts, row_hashes = jax.tree.map(block.tiles, (z_image, z_text, hashes))
    rows, columns = (), ()
    weights = cotangents / block.batch_size
    if ring.kind == "softmax":
        rows, columns = jnp.split(jnp.stack(list(map(block.tiles, saved))), 2)  # [2, n, t]
        derivative = partial(_softmax_derivative, weights, ring.label_smoothing)
    else:
        derivative = partial(_sigmoid_derivative, weights, bias)

    def meet(of_round: Array, step: Array, state: tuple) -> tuple:
        d_images, d_bias, d_behind, *travelling = state
        texts, hashes, columns = travelling
        ahead = block.pass_on(travelling)
        d_behind = block.pass_on(d_behind)  # of the same texts, from the devices they have been on

        def tile(k: Array, state: tuple) -> tuple:
            d_images, d_texts, d_bias = state
            i, j = divmod(k, block.round_tiles)
            logits = dot("rD,cD->rc", images[i], texts[j]) / temperature  # [t, t]
            masks = block.masks(of_round, step, i, j, row_hashes, hashes)
            d_logits = derivative(logits, *masks, _take(rows, i), _take(columns, j))
            d_cosines = d_logits / temperature
            return (
                d_images.at[i].add(dot("rc,cD->rD", d_cosines, texts[j])),
                d_texts.at[j].add(dot("rc,rD->cD", d_cosines, images[i])),
                d_bias + d_logits.sum(),
            )

        start = d_images, block.zeros(texts.shape), d_bias
        d_images, d_texts, d_bias = jax.lax.fori_loop(0, block.met_tiles, tile, start)
        return d_images, d_bias, d_behind + d_texts, *ahead

    def go_round(number: Array, state: tuple) -> tuple:
        d_images, d_texts, d_bias = state
        part = block.part(texts, number)
        travelling = part, block.part(row_hashes, number), block.part(columns, number, axis=1)
        state = d_images, d_bias, block.zeros(part.shape), *travelling
        d_images, d_bias, d_part, *_ = jax.lax.fori_loop(
            0, ring.mesh.size, partial(meet, number), state
        )
        return d_images, block.put_part(d_texts, block.pass_on(d_part), number), d_bias

    zeros = block.zeros(images.shape)
    d_images, d_texts, d_bias = jax.lax.fori_loop(
        0, block.num_rounds, go_round, (zeros, zeros, block.zeros(()))
    )
    d_image, d_text = map(block.untile, (d_images, d_texts))
    # The temperature divides every cosine, so its gradient is that of one factor on z_image.
    d_temperature = -block.psum(dot("bD,bD->b", z_image, d_image).sum()) / temperature
    return (
        d_image.astype(z_image.dtype),
        d_text.astype(z_text.dtype),
        d_temperature,
        block.psum(d_bias) if ring.kind == "sigmoid" else jnp.zeros_like(bias),
    )


# The four functions of a tile take logits [t, t], whether a pair is the positive and whether it
# takes part, bool [t, t], and what is known of its rows and of its columns.


def _update_softmax(
    logits: Array, positive: Array, allowed: Array, rows: Array, columns: Array
) -> tuple[Array, Array]:
    """Returns the statistics [4, t] of rows and columns with this tile in them.

    They are the maximum, the sum of exp(logit - maximum), the sum and the count of the logits.
    """

    def stream(statistics: Array, axis: int) -> Array:
        old, sum_exp, sum_logits, count = statistics
        maximum = jnp.maximum(old, jnp.max(logits, axis, where=allowed, initial=-jnp.inf))
        shifted = jnp.where(allowed, logits - jnp.expand_dims(maximum, axis), -jnp.inf)
        return jnp.stack(
            [
                maximum,
                sum_exp * jnp.exp(old - maximum) + jnp.exp(shifted).sum(axis),
                sum_logits + jnp.sum(logits, axis, where=allowed),
                count + allowed.sum(axis),
            ]
        )

    return stream(rows, 1), stream(columns, 0)


def _softmax_derivative(
    weights: Array,
    label_smoothing: float,
    logits: Array,
    positive: Array,
    allowed: Array,
    rows: Array,
    columns: Array,
) -> Array:
    """Returns d_logits [t, t]; rows and columns are [2, t]: log-sum-exp, label_smoothing / count.

    The weights [2] are those of a row's and of a column's cross-entropy.
    """
    (row_lse, row_share), (column_lse, column_share) = rows[:, :, None], columns[:, None, :]
    d_logits = weights[0] * (jnp.exp(logits - row_lse) - row_share)
    d_logits += weights[1] * (jnp.exp(logits - column_lse) - column_share)
    d_logits -= jnp.where(positive, weights.sum() * (1.0 - label_smoothing), 0.0)
    return jnp.where(allowed, d_logits, 0.0)


def _update_sigmoid(
    bias: Array, logits: Array, positive: Array, allowed: Array, rows: Array, columns: tuple
) -> tuple[Array, tuple]:
    """Returns the sums [2, t] of the rows' positive and negative losses; columns have none."""
    losses = sigmoid_losses(logits + bias, positive)
    sums = [jnp.sum(losses, 1, where=allowed & kind) for kind in (positive, ~positive)]
    return rows + jnp.stack(sums), columns


def _sigmoid_derivative(
    weights: Array,
    bias: Array,
    logits: Array,
    positive: Array,
    allowed: Array,
    rows: tuple,
    columns: tuple,
) -> Array:
    """Returns d_logits [t, t]; the weights [2] are those of a positive and of a negative pair."""
    logits = logits + bias
    attract, repel = -weights[0] * jax.nn.sigmoid(-logits), weights[1] * jax.nn.sigmoid(logits)
    return jnp.where(allowed, jnp.where(positive, attract, repel), 0.0)


class _Block:
    """A device's share of the batch, inside shard_map: its tiles, and its place in the ring."""

    def __init__(self, ring: _Ring, size: int):
        self.axes = ring.mesh.axis_names
        self.devices = ring.mesh.size
        self.size = size
        self.batch_size = size * self.devices
        num_tiles = -(-size // ring.tile_size)
        self.num_rounds = -(-num_tiles // _ROUND_TILES)
        self.round_tiles = -(-num_tiles // self.num_rounds)
        self.num_tiles = self.num_rounds * self.round_tiles
        self.tile_size = -(-size // self.num_tiles)  # as equal as possible: little padding
        self.met_tiles = self.num_tiles * self.round_tiles  # of logits, a step of a round

    def tiles(self, array: Array) -> Array:
        """Returns array [b, ...] as [n, t, ...], padded with zeros."""
        padding = self.num_tiles * self.tile_size - self.size
        padded = jnp.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1)) if padding else array
        return padded.reshape(self.num_tiles, self.tile_size, *array.shape[1:])

    def untile(self, array: Array) -> Array:
        """Returns the inverse of `tiles`: [n, t, ...] -> [b, ...]."""
        return array.reshape(-1, *array.shape[2:])[: self.size]

    def part(self, tree: Any, number: Array, axis: int = 0) -> Any:
        """Returns the g tiles of a round, of arrays whose `axis` has n tiles."""
        first, count = number * self.round_tiles, self.round_tiles
        return jax.tree.map(
            lambda a: jax.lax.dynamic_slice_in_dim(a, first, count, axis=axis), tree
        )

    def put_part(self, tree: Any, part: Any, number: Array, axis: int = 0) -> Any:
        """Returns the arrays with the g tiles of a round replaced."""
        first = number * self.round_tiles
        return jax.tree.map(
            lambda a, tiles: jax.lax.dynamic_update_slice_in_dim(a, tiles, first, axis), tree, part
        )

    def zeros(self, shape: tuple[int, ...]) -> Array:
        return jax.lax.pcast(jnp.zeros(shape, jnp.float32), self.axes, to="varying")

    def psum(self, value: Array) -> Array:
        return jax.lax.psum(value, self.axes)

    def pass_on(self, tree: Any) -> Any:
        """Returns what the device before this one had; this one's goes to the device after it."""
        ring = [(device, (device + 1) % self.devices) for device in range(self.devices)]
        return jax.tree.map(lambda a: jax.lax.ppermute(a, self.axes, ring), tree)

    def masks(
        self,
        of_round: Array,
        step: Array,
        i: Array,
        j: Array,
        row_hashes: tuple,
        column_hashes: tuple,
    ) -> tuple[Array, Array]:
        """Returns (positive, allowed), bool [t, t], of row tile i, column tile j of a round.

        Hashes are [n, t, 2] and [g, t, 2]; the columns' are those that have travelled `step`
        devices far.
        """
        places = i, of_round * self.round_tiles + j
        row, column = (k * self.tile_size + jnp.arange(self.tile_size) for k in places)
        row, column = row[:, None], column[None, :]
        positive = (row == column) & (step == 0)  # at first every device has its own texts
        allowed = (row < self.size) & (column < self.size)
        if row_hashes:
            found = are_duplicates([h[i] for h in row_hashes], [h[j] for h in column_hashes])
            allowed &= positive | ~found
        return positive, allowed


def _take(statistics: Any, k: Array) -> Any:
    """Returns those of tile k: [s, n, t] -> [s, t]; of nothing, nothing."""
    return jax.tree.map(lambda array: array[:, k], statistics)


def _put(statistics: Any, k: Array, values: Any) -> Any:
    """Returns the statistics [s, n, t] with values [s, t] for tile k."""
    return jax.tree.map(lambda array, value: array.at[:, k].set(value), statistics, values)


def _specs(ring: _Ring) -> tuple[PartitionSpec, PartitionSpec]:
    """Returns the specs of rows split over the mesh, and of what every device holds whole."""
    return PartitionSpec(ring.mesh.axis_names), PartitionSpec()
