"""The k nearest rows of an index for each query: exact, over all devices, in bounded memory.

The devices find a few more candidates than are asked for, by float32 scores whose error has a
bound; the host scores those without rounding and orders them. Where the bound cannot rule out that
a row beyond the candidates belongs to the result, as among many equal vectors, the host scores the
query against all rows. So a result depends neither on devices and processes nor on blocks.
"""

import math
from collections import deque
from collections.abc import Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from align_jax import encode
from align_jax import mesh as mesh_lib
from align_jax.run import multihost

_MARGIN = 32  # candidates beyond k
_QUERY_ROWS, _INDEX_ROWS = 512, 8192  # most of a call; index rows on each device
_HOST_NUMBERS = 2**22  # float64 at once


def top_k(
    z_query: np.ndarray,
    z_index: np.ndarray,
    k: int,
    *,
    exclude: np.ndarray | None = None,
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns indices, int64 [N, k], and scores, float32 [N, k], of the highest dot products.

    The highest comes first, and of equal ones that of the lower index. What is compared are sums
    without rounding, right to about 1e-10 for unit vectors; equal vectors have equal scores. Every
    process of a run calls this with the same arguments and gets the same result. Memory beyond the
    arguments is k + 32 numbers a query and blocks whose size does not grow with N and M.

    Args:
      z_query: [N, D] float32, finite, D at most 16,384.
      z_index: [M, D] float32, finite.
      k: from 1 to the number of rows that a query may get.
      exclude: [N] int, the row of z_index that each query must not get, itself for instance; -1
        where there is none.
      mesh: over whose devices the work is split; all devices by default. Never changes a result.

    Raises:
      ValueError: shapes disagree, an embedding is not finite, or k is out of range.
    """
    z_query, z_index, exclude = _checked(z_query, z_index, k, exclude)
    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    query_scale, index_scale = _scale(z_query), _scale(z_index)
    z_query = z_query * query_scale
    num_kept = min(k + _MARGIN, len(z_index))
    rows, bounds = _candidates(z_query, z_index, index_scale, exclude, num_kept, mesh)

    indices = np.empty((len(z_query), k), np.int64)
    scores = np.empty((len(z_query), k))
    step = max(1, _HOST_NUMBERS // (num_kept * z_index.shape[1]))
    for start in range(0, len(z_query), step):
        here = slice(start, start + step)
        found = _exact_scores(z_query[here, None], z_index[rows[here]] * index_scale)[:, 0]
        found[rows[here] < 0] = -np.inf
        indices[here], scores[here] = _best(rows[here], found, k)
    unsure = np.flatnonzero(scores[:, -1] <= bounds)
    for start in range(0, len(unsure), _QUERY_ROWS):
        here = unsure[start : start + _QUERY_ROWS]
        indices[here], scores[here] = _best_of_all(
            z_query[here], z_index, index_scale, exclude[here], k
        )
    return indices, (scores / (float(query_scale) * float(index_scale))).astype(np.float32)


class _Queries(NamedTuple):
    """A block of queries: z [q, D] float32; exclude [q] int32, a row of the index or -1."""

    z: Any
    exclude: Any


class _Index(NamedTuple):
    """A block of the index: z [m, D] float32; row [m] int32, -1 where it is padding."""

    z: Any
    row: Any


def _candidates(
    z_query: np.ndarray,
    z_index: np.ndarray,
    index_scale: np.float32,
    exclude: np.ndarray,
    num_kept: int,
    mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ascending rows, int64 [N, num_kept], and bounds [N] of the scores of all other rows.

    A row of -1 stands for none.
    """
    find = _compile_find(mesh, num_kept)
    rows = np.full((len(z_query), num_kept), -1, np.int64)
    approximate = np.full((len(z_query), num_kept), -np.inf, np.float32)

    def merge(here: slice, found: tuple[jax.Array, jax.Array]) -> None:
        values, found_rows = map(np.asarray, found)
        count = len(rows[here])
        values = np.concatenate([approximate[here], values[:count]], axis=1)
        found_rows = np.concatenate([rows[here], found_rows[:count]], axis=1)
        kept = np.argpartition(values, -num_kept, axis=1)[:, -num_kept:]
        approximate[here] = np.take_along_axis(values, kept, axis=1)
        rows[here] = np.take_along_axis(found_rows, kept, axis=1)

    query_rows, index_rows = _block_sizes(len(z_query), len(z_index), mesh)
    blocks = -(-len(z_query) // query_rows) * -(-len(z_index) // index_rows)
    index_blocks = _blocks(_Index, z_index, np.arange(len(z_index)), index_rows, mesh, index_scale)
    one = np.float32(1)
    waiting: deque = deque()
    with encode.progress_bar(range(blocks), "blocks searched", enabled=multihost.is_lead()) as bar:
        for _, index in index_blocks:
            for here, queries in _blocks(_Queries, z_query, exclude, query_rows, mesh, one):
                waiting.append((here, find(queries, index)))
                # Fetched one call late: the next blocks are prepared while the devices search.
                if len(waiting) > 1:
                    merge(*waiting.popleft())
                bar.update()
        merge(*waiting.popleft())

    lengths = _lengths(z_query, one) * _lengths(z_index, index_scale).max()
    # Twice what D roundings of float32 sums can add up to, and what `_exact_scores` leaves out.
    errors = z_query.shape[1] * (2.0**-23 * lengths + 2.0**-16)
    # Where there is room left, all rows are candidates.
    return np.sort(rows, axis=1), approximate.min(axis=1) + errors


@cache
def _compile_find(mesh: Mesh, num_kept: int) -> Any:
    """Returns `find(queries, index) -> scores float32, rows int32`, [q, candidates], jitted."""
    rows = PartitionSpec(mesh.axis_names)
    across = PartitionSpec(None, mesh.axis_names)
    find = jax.shard_map(
        partial(_find, num_kept=num_kept, axes=mesh.axis_names),
        mesh=mesh,
        in_specs=(rows, rows),
        out_specs=(across, across),
    )
    sharded = mesh_lib.batch_sharding(mesh)
    return jax.jit(find, in_shardings=(sharded, sharded), out_shardings=mesh_lib.replicated(mesh))


def _find(
    queries: _Queries, index: _Index, *, num_kept: int, axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """The best rows of this device's part of the index."""
    queries = jax.tree.map(partial(jax.lax.all_gather, axis_name=axes, tiled=True), queries)
    scores = jnp.einsum("qD,mD->qm", queries.z, index.z, precision=jax.lax.Precision.HIGHEST)
    allowed = (index.row >= 0) & (index.row != queries.exclude[:, None])
    scores = jnp.where(allowed, scores, -jnp.inf)
    scores, places = jax.lax.top_k(scores, min(num_kept, scores.shape[1]))
    return scores, jnp.where(scores > -jnp.inf, index.row[places], -1)


def _best_of_all(
    z_query: np.ndarray, z_index: np.ndarray, index_scale: np.float32, exclude: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    rows = np.full((len(z_query), k), -1)
    scores = np.full((len(z_query), k), -np.inf)
    step = max(1, _HOST_NUMBERS // max(_QUERY_ROWS, z_index.shape[1]))
    for start in range(0, len(z_index), step):
        found = _exact_scores(z_query, z_index[start : start + step] * index_scale)
        here = np.arange(start, start + found.shape[1])
        found[here == exclude[:, None]] = -np.inf
        better = np.flatnonzero((found > scores[:, -1:]).any(axis=0))
        here = np.broadcast_to(here[better], (len(rows), len(better)))
        rows, scores = _best(
            np.concatenate([rows, here], axis=1),
            np.concatenate([scores, found[:, better]], axis=1),
            k,
        )
    return rows, scores


def _best(rows: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k best of each line, sorted; equal ones stay in their order."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)


def _exact_scores(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Returns dot products [..., N, M] in float64 of scaled vectors: [..., N, D] and [..., M, D].

    Components become 16 binary digits and the 16 that follow them. Sums of products of those are
    exact in float64, in whichever order. Products of two following ones are left out.
    """
    left_high, left_low = _split(left)
    right_high, right_low = (np.swapaxes(part, -1, -2) for part in _split(right))
    return left_high @ right_high + (left_high @ right_low + left_low @ right_high)


def _split(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    z = z.astype(np.float64)
    high = np.rint(z * 2.0**8) / 2.0**8
    return high, np.rint((z - high) * 2.0**24) / 2.0**24


def _scale(z: np.ndarray) -> np.float32:
    """Returns the power of two that brings the components of z to within -128 and 128."""
    _, exponent = math.frexp(max(float(z.max(initial=0)), -float(z.min(initial=0))))
    return np.float32(2.0 ** (7 - exponent))


def _lengths(z: np.ndarray, scale: np.float32) -> np.ndarray:
    """Returns the norms [N] of scaled vectors."""
    lengths = np.empty(len(z))
    step = max(1, _HOST_NUMBERS // z.shape[1])
    for start in range(0, len(z), step):
        part = z[start : start + step] * scale
        lengths[start : start + step] = np.sqrt(np.einsum("nD,nD->n", part, part))
    return lengths


def _blocks(
    kind: type,
    z: np.ndarray,
    numbers: np.ndarray,
    size: int,
    mesh: Mesh,
    scale: np.float32,
) -> Iterator[tuple[slice, Any]]:
    """Yields (rows, `kind` of their scaled z and numbers on the devices); the last are padded."""
    sharding = mesh_lib.batch_sharding(mesh)

    def to_devices(x: np.ndarray) -> jax.Array:
        x = np.pad(x, [(0, size - len(x)), *[(0, 0)] * (x.ndim - 1)], constant_values=-1)
        # Every process holds the whole block here, so each takes its devices' rows of it.
        return jax.make_array_from_callback(x.shape, sharding, lambda rows: x[rows])

    for first in range(0, len(z), size):
        here = slice(first, first + size)
        yield here, kind(to_devices(z[here] * scale), to_devices(numbers[here].astype(np.int32)))


def _block_sizes(num_queries: int, num_rows: int, mesh: Mesh) -> tuple[int, int]:
    """Returns (queries, rows of the index) of a call; few different ones, so few are compiled."""
    query_rows = mesh.size
    while query_rows < min(num_queries, _QUERY_ROWS):
        query_rows *= 2
    index_rows = min(_INDEX_ROWS, -(-num_rows // mesh.size)) * mesh.size
    return query_rows, index_rows


def _checked(
    z_query: np.ndarray, z_index: np.ndarray, k: int, exclude: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    z_query, z_index = np.asarray(z_query, np.float32), np.asarray(z_index, np.float32)
    if z_query.ndim != 2 or z_index.ndim != 2 or z_query.shape[1] != z_index.shape[1]:
        raise ValueError(
            f"Embeddings must be [N, D] and [M, D]; got {list(z_query.shape)} for queries and "
            f"{list(z_index.shape)} for the index."
        )
    for name, z in (("query", z_query), ("row", z_index)):
        if not np.isfinite([z.min(initial=0), z.max(initial=0)]).all():
            bad = int(np.flatnonzero(~np.isfinite(z).all(axis=1))[0])
            raise ValueError(f"The embedding of {name} {bad} is not finite.")
    if exclude is None:
        exclude = np.full(len(z_query), -1)
    exclude = np.asarray(exclude)
    if exclude.shape != (len(z_query),) or exclude.dtype.kind not in "iu":
        raise ValueError(f"exclude must be [{len(z_query)}] integers; got {list(exclude.shape)}.")
    most = len(z_index) - bool((exclude >= 0).any())
    if not 1 <= k <= most:
        raise ValueError(f"k={k} must be between 1 and {most}, the rows that a query may get.")
    return z_query, z_index, exclude
