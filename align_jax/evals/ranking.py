"""Ranks of the right candidates among all others: exact, over all devices, in tiles.

No matrix of all scores exists: blocks of one side stay on the devices, each with its own rows, and
the other side streams past them. A score is an integer, summed without rounding, so ranks depend
neither on devices, processes and tiles nor on the order in which hardware adds. What is ranked is
up to retrieval.py and zeroshot.py. Source: the splitting, Ozaki et al. 2012 (error-free products).
"""

from collections import deque
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from align_jax import encode
from align_jax import mesh as mesh_lib
from align_jax.run import multihost

# A component is four digits to base 256, -128 to 128: exact in bfloat16 and TF32, to which matrix
# units round their inputs. Sums of this many products of two digits are exact in float32.
_DIGITS = 4
_EXACT_COLUMNS = 1024

_BELOW_ALL = -(2.0**54)  # no score: its high word would be outside of what digits can add up to

# Rows per call: owners of each device in tiles, members of all devices in lengths of a tile.
_OWNER_TILES = 64
_MEMBER_TILES = 16


def pair_ranks(
    z_owner: np.ndarray,
    z_member: np.ndarray,
    owner: np.ndarray,
    *,
    mesh: Mesh | None = None,
    tile: int = 256,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns int64 ranks, 0 the best, of each owner's best member [N] and each member's owner [M].

    The rank of an owner's best member is the number of other owners' members that score at least as
    high with this owner; the rank of a member's owner is the number of other owners that score at
    least as high with this member. Ties thus count against the model. Scores are dot products, of
    unit vectors right to about 1e-9; equal vectors have equal scores.

    Every process of a run calls this with the same arguments and gets the same ranks. Memory beyond
    the arguments is a few numbers a row on the host, and on the devices one pair of blocks, whose
    size does not grow with N and M.

    Args:
      z_owner: [N, D] float32, finite, D at most 16,384.
      z_member: [M, D] float32, finite.
      owner: [M] int, row of z_owner that each member belongs to. An owner without members gets the
        rank M.
      mesh: over whose devices the work is split; all devices by default. Never changes a rank.
      tile: owners that meet members at once on a device. Never changes a rank.
    """
    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    owner_scale, member_scale = _scale(z_owner), _scale(z_member)
    scores = _pair_scores(z_owner, z_member, owner, owner_scale, member_scale)
    best = np.full(len(z_owner), _BELOW_ALL)
    np.maximum.at(best, owner, scores)

    tile, owner_rows, member_rows = _block_sizes(len(z_owner), len(z_member), mesh, tile)
    count = compile_counts(mesh, tile)
    owner_ranks = np.zeros(len(z_owner), np.int64)
    member_ranks = np.zeros(len(z_member), np.int64)

    def add(first_owner: int, first_member: int, counts: tuple[jax.Array, jax.Array]) -> None:
        owner_counts, member_counts = map(np.asarray, counts)
        here = owner_ranks[first_owner : first_owner + owner_rows]
        here += owner_counts[: len(here)]
        here = member_ranks[first_member : first_member + member_rows]
        here += member_counts[: len(here)]

    own_row = np.arange(len(z_owner))
    owner_blocks = partial(_blocks, z_owner, owner_scale, own_row, best, owner_rows, mesh)
    member_blocks = partial(_blocks, z_member, member_scale, owner, scores, member_rows, mesh)
    waiting = deque()
    calls = range(-(-len(z_owner) // owner_rows) * -(-len(z_member) // member_rows))
    with encode.progress_bar(calls, "blocks ranked", enabled=multihost.is_lead()) as progress:
        for first_owner, owners in owner_blocks():
            for first_member, members in member_blocks():
                waiting.append((first_owner, first_member, count(owners, members)))
                # Fetched one call late: the next blocks are prepared while the devices count.
                if len(waiting) > 1:
                    add(*waiting.popleft())
                progress.update()
        add(*waiting.popleft())
    return owner_ranks, member_ranks


class Rows(NamedTuple):
    """A block of owners or members, rows sharded over the devices.

    Attributes:
      z: [n, D] float32, scaled to components between -128 and 128.
      owner: [n] int32, -1 where the row is padding.
      high: [n] int32, the score to reach (floor of its 2**24th part).
      low: [n] int32, what is left of it.
    """

    z: Any
    owner: Any
    high: Any
    low: Any


def block_shapes(
    num_owners: int, num_members: int, dim: int, mesh: Mesh, tile: int = 256
) -> tuple[Rows, Rows]:
    """Returns shapes and shardings of what each call of `compile_counts` gets in `pair_ranks`."""
    rows = mesh_lib.batch_sharding(mesh)

    def shapes(size: int) -> Rows:
        words = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=rows)
        return Rows(jax.ShapeDtypeStruct((size, dim), jnp.float32, sharding=rows), *[words] * 3)

    _, owner_rows, member_rows = _block_sizes(num_owners, num_members, mesh, tile)
    return shapes(owner_rows), shapes(member_rows)


@cache
def compile_counts(mesh: Mesh, tile: int) -> Callable[[Rows, Rows], tuple[jax.Array, jax.Array]]:
    """Returns `count(owners, members)`, jitted: how often each row's score is reached, int32.

    The first result [n_owners] is by other owners' members, the second [n_members] by other owners.

    Args:
      mesh: over which the rows of both are sharded.
      tile: divides the number of owners on a device.
    """
    rows = PartitionSpec(mesh.axis_names)
    counts = jax.shard_map(
        partial(_local_counts, tile=tile, axes=mesh.axis_names),
        mesh=mesh,
        in_specs=(rows, rows),
        out_specs=(rows, PartitionSpec()),
    )
    sharded = mesh_lib.batch_sharding(mesh)
    return jax.jit(counts, in_shardings=(sharded, sharded), out_shardings=mesh_lib.replicated(mesh))


def _local_counts(
    owners: Rows, members: Rows, *, tile: int, axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """Returns counts of this device's owners [o] and of all members [m]."""
    gather = partial(jax.lax.all_gather, axis_name=axes, tiled=True)
    members = jax.tree.map(gather, members)
    member_digits = jnp.concatenate(_digits(members.z, jnp)[::-1], axis=1)  # [m, 4 D]

    def meet(part: Rows) -> tuple[jax.Array, jax.Array]:
        high, low = _words(jnp.concatenate(_digits(part.z, jnp), axis=1), member_digits)
        first, second = part.owner[:, None], members.owner
        is_wrong = (first != second) & (jnp.minimum(first, second) >= 0)  # [tile, m]

        def reaches(bound_high: jax.Array, bound_low: jax.Array) -> jax.Array:
            return (high > bound_high) | ((high == bound_high) & (low >= bound_low))

        reaches_best = is_wrong & reaches(part.high[:, None], part.low[:, None])
        reaches_own = is_wrong & reaches(members.high, members.low)
        return reaches_best.sum(1, dtype=jnp.int32), reaches_own.sum(0, dtype=jnp.int32)

    tiles = jax.tree.map(lambda x: x.reshape(-1, tile, *x.shape[1:]), owners)
    owner_counts, member_counts = jax.lax.map(meet, tiles)
    return owner_counts.reshape(-1), jax.lax.psum(member_counts.sum(0), axes)


def _words(left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns scores [t, m] as high * 2**24 + low, of digits side by side: [t, 4 D], [m, 4 D].

    Those on the right are in reverse order, so that one product of parts holds all pairs of digits
    of equal weight. Pairs of the lowest three weights are left out.
    """
    dim = left.shape[1] // _DIGITS
    levels = [
        _exact_dot(left[:, : (level + 1) * dim], right[:, (_DIGITS - 1 - level) * dim :])
        for level in range(_DIGITS)
    ]
    low, carry = 0, 0
    for place, level in enumerate(levels[:0:-1]):
        level += carry
        low += (level & 255) << (8 * place)
        carry = level >> 8
    return levels[0] + carry, low


def _exact_dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns int32 [t, m], the products of digits [t, K] and [m, K]."""
    total = 0
    for start in range(0, left.shape[1], _EXACT_COLUMNS):
        columns = slice(start, start + _EXACT_COLUMNS)
        # One pass of the matrix unit: its rounding of the inputs leaves digits as they are.
        products = jnp.einsum(
            "tK,mK->tm", left[:, columns], right[:, columns], precision=jax.lax.Precision.DEFAULT
        )
        total += products.astype(jnp.int32)
    return total


def _digits(x: Any, xp: Any) -> list:
    """Returns the digits of x, most significant first; every step but the last rint is exact."""
    digits = []
    for _ in range(_DIGITS):
        digits.append(xp.rint(x))
        x = (x - digits[-1]) * 256
    return digits


def _scale(z: np.ndarray) -> np.float32:
    """Returns the power of two, float32, that brings the components of z to within -128 and 128."""
    _, exponent = np.frexp(max(z.max(), -z.min()))
    return np.float32(2.0 ** (7 - int(exponent)))


def _pair_scores(
    z_owner: np.ndarray,
    z_member: np.ndarray,
    owner: np.ndarray,
    owner_scale: np.float32,
    member_scale: np.float32,
    chunk: int = 4096,
) -> np.ndarray:
    """Returns [M] float64: each member's score with its owner, the whole number of `_words`."""
    scores = np.zeros(len(owner))
    for start in range(0, len(owner), chunk):
        rows = slice(start, start + chunk)
        left = _digits(_scaled(z_owner[owner[rows]], owner_scale), np)
        right = _digits(_scaled(z_member[rows], member_scale), np)
        for level in range(_DIGITS):
            scores[rows] *= 256
            for place in range(level + 1):
                pair = left[place], right[level - place]
                scores[rows] += np.einsum("mD,mD->m", *pair, dtype=np.float64)
    return scores


def _scaled(z: np.ndarray, scale: np.float32) -> np.ndarray:
    return np.asarray(z, np.float32) * scale


def _blocks(
    z: np.ndarray,
    scale: np.float32,
    owner: np.ndarray,
    scores: np.ndarray,
    size: int,
    mesh: Mesh,
) -> Iterator[tuple[int, Rows]]:
    """Yields (first row, `Rows` of `size` rows); the last ones are padded."""
    sharding = mesh_lib.batch_sharding(mesh)

    def to_devices(x: np.ndarray) -> jax.Array:
        x = np.pad(x, [(0, size - len(x)), *[(0, 0)] * (x.ndim - 1)], constant_values=-1)
        # Every process holds the whole block here, so each takes its devices' rows of it.
        return jax.make_array_from_callback(x.shape, sharding, lambda rows: x[rows])

    for first in range(0, len(z), size):
        rows = slice(first, first + size)
        high = np.floor(scores[rows] / 2**24)
        words = owner[rows], high, scores[rows] - high * 2**24
        arrays = _scaled(z[rows], scale), *(word.astype(np.int32) for word in words)
        yield first, Rows(*map(to_devices, arrays))


def _block_sizes(num_owners: int, num_members: int, mesh: Mesh, tile: int) -> tuple[int, int, int]:
    """Returns (tile, owners a call, members a call), no larger than the inputs need."""
    most_members = max(_MEMBER_TILES * tile, mesh.size)
    tile = min(tile, -(-num_owners // mesh.size))
    owner_rows = _even_block(num_owners, _OWNER_TILES * tile * mesh.size, tile * mesh.size)
    return tile, owner_rows, _even_block(num_members, most_members, mesh.size)


def _even_block(count: int, most: int, multiple: int) -> int:
    """Returns the size of equal blocks of at most `most` rows, a multiple, that hold them all."""
    num_blocks = -(-count // most)
    return -(-count // (num_blocks * multiple)) * multiple
