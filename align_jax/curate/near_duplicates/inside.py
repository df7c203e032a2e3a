"""Near-duplicates inside one set of hashes, on an engine: exact, and far from all with all.

Two hashes that differ in at most d bits agree wholly in at least r of d + r bands of bits. So the
pairs are those of plain equi-joins, one for each choice of r bands, that are close enough: 6 bands
of which 2 agree (15 joins on 21 bits), 7 and 3 (35 joins on 27 bits) and 8 and 4 (70 joins on 32
bits) all find every pair up to 4 bits apart. Groups are the connected components of the pairs.

Written in Ibis: the same on DuckDB, Spark and BigQuery. Each join and each step towards the groups
is a stage on disk, complete or absent.

Sources: Manku, Jain, Das Sarma 2007 (blocks of bits); Kiveris et al. 2014, "Connected components in
MapReduce and beyond" (large and small stars).
"""

import itertools
import math
import os
import shutil

import ibis
import ibis.expr.types as ir

from align_jax.curate.filter.engines import Engine
from align_jax.data.perceptual_hash import MAX_PAIRS
from align_jax.run.progress import show_progress

_BITS = 64
_MOST_SHARED = 6  # bands that agree, at most: with d = 16, 74,613 joins
_COST_OF_CANDIDATE, _COST_OF_JOIN = 0.1, 1e5  # in rows of a join


@ibis.udf.scalar.builtin
def bit_count(value: int) -> int:
    """Returns the number of set bits; DuckDB, Spark and BigQuery call it so."""


def choose_bands(num_hashes: int, max_distance: int) -> tuple[int, int]:
    """Returns (number of bands, bands that agree) of the joins that cost least.

    All pairs up to (bands - agreeing) = `max_distance` bits apart are found, whatever the choice;
    none that agree means that all are compared with all. The estimate is of evenly spread hashes.
    """

    def cost(shared: int) -> float:
        joins = math.comb(max_distance + shared, shared)
        bits = _BITS * shared / (max_distance + shared) if shared else 0
        candidates = num_hashes / 2**bits
        rows = 1 + _COST_OF_CANDIDATE * candidates + _COST_OF_JOIN / max(1, num_hashes)
        return joins * rows

    shared = min(range(_MOST_SHARED + 1) if max_distance else (1,), key=cost)
    return max_distance + shared, shared


def band_masks(num_bands: int) -> list[int]:
    """Returns the bits of each band as a number of 64 bits."""
    edges = [_BITS * number // num_bands for number in range(num_bands + 1)]
    return [2**high - 2**low for low, high in itertools.pairwise(edges)]


def near_pairs(hashes: ir.Table, chosen: tuple[int, ...], masks: list[int], limit: int) -> ir.Table:
    """Returns the pairs (i, j) of rows i < j that agree in the chosen bands and are close.

    Those that also agree in an earlier choice of bands are left to it, so that none comes twice.

    Args:
      hashes: `row` and `hash`, int64; all hashes differ.
      chosen: numbers of the bands, ascending; () pairs all with all.
      masks: see `band_masks`.
      limit: bits in which they may differ.
    """
    shared = _literal(sum(masks[band] for band in chosen))
    left = hashes.select(i="row", x="hash", band=hashes.hash & shared)
    right = left.select(j="i", y="x", band="band")
    pairs = left.join(right, [left.band == right.band, left.i < right.j])
    differing = pairs.x ^ pairs.y
    earlier = [band for band in range(max(chosen, default=0)) if band not in chosen]
    first = [(differing & _literal(masks[band])) != 0 for band in earlier]
    return pairs.filter(bit_count(differing) <= limit, *first).select("i", "j")


def find_groups(hashes: ir.Table, engine: Engine, folder: str, max_distance: int) -> ir.Table:
    """Returns `row` and `first`, the first row of its group, of all rows that are not that first.

    Args:
      hashes: `row` and `hash`, int64.
      engine: which has them.
      folder: keeps what is found on the way; a later call goes on with it.
      max_distance: bits, 0 to perceptual_hash.MAX_DISTANCE.

    Raises:
      ValueError: far too many pairs for groups that mean anything.
    """

    def stage(name: str, table: ir.Table) -> ir.Table:
        path = os.path.join(folder, f"{name}.parquet")
        if not os.path.exists(path):
            engine.write(table, path)
        return engine.read(path)

    os.makedirs(folder, exist_ok=True)
    unique = stage("unique", hashes.group_by("hash").aggregate(row=hashes.row.min()))
    num_unique = engine.first(unique.aggregate(number=unique.count()))["number"]
    num_bands, shared = choose_bands(num_unique, max_distance)
    masks = band_masks(num_bands)
    choices = list(itertools.combinations(range(num_bands), shared))
    parts, num_pairs = [], 0
    for number, bands in enumerate(show_progress(choices, len(choices), "compare hashes", "join")):
        part = stage(f"pairs-{number:05d}", near_pairs(unique, bands, masks, max_distance))
        num_pairs += engine.first(part.aggregate(number=part.count()))["number"]
        if num_pairs > max(MAX_PAIRS, 2 * num_unique):
            raise ValueError(
                f"More than {num_pairs:,} pairs of {num_unique:,} hashes are within distance "
                f"{max_distance}; choose a smaller one."
            )
        parts.append(part)
    # Equal hashes are chained to the first: a blank picture may occur ten thousand times.
    again = hashes.join(unique.select("hash", first="row"), "hash")
    again = again.filter(again.row > again.first).select(child="row", parent="first")
    pairs = ibis.union(*(part.select(child="j", parent="i") for part in parts), again)
    return _connect(pairs, engine, folder)


def _connect(pairs: ir.Table, engine: Engine, folder: str) -> ir.Table:
    """Returns `row` and `first` of the components of edges `child` > `parent`."""
    edges, number = pairs, max(_numbers(folder), default=0)
    while True:
        path = os.path.join(folder, f"edges-{number:05d}.parquet")
        if not os.path.exists(path):
            engine.write(edges, path)
        for old in range(number):
            _remove(os.path.join(folder, f"edges-{old:05d}.parquet"))
        edges = engine.read(path)
        # Stars: nothing has two parents, and no parent has one itself.
        counts = edges.aggregate(edges=edges.count(), children=edges.child.nunique())
        found = engine.first(counts)
        inner = edges.semi_join(edges.select(child="parent").distinct(), "child")
        if found["edges"] == found["children"]:
            if not engine.first(inner.aggregate(number=inner.count()))["number"]:
                return edges.select(row="child", first="parent")
        edges = _small_star(_large_star(edges))
        number += 1


def _large_star(edges: ir.Table) -> ir.Table:
    """Joins the larger neighbours of each row to the smallest of it and all its neighbours."""
    both = edges.select(row="child", near="parent")
    both = both.union(edges.select(row="parent", near="child"))
    low = both.group_by("row").aggregate(low=both.near.min())
    low = low.select("row", low=ibis.least(low.low, low.row))
    met = both.join(low, "row")
    return met.filter(met.near > met.row).select(child="near", parent="low").distinct()


def _small_star(edges: ir.Table) -> ir.Table:
    """Joins each row and its smaller neighbours to the smallest of these."""
    low = edges.group_by("child").aggregate(low=edges.parent.min())
    met = edges.join(low, "child")
    met = met.filter(met.parent != met.low).select(child="parent", parent="low")
    return met.union(low.select(child="child", parent="low")).distinct()


def _numbers(folder: str) -> list[int]:
    return [int(name[6:11]) for name in os.listdir(folder) if name.startswith("edges-")]


def _remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.remove(path)


def _literal(bits: int) -> ir.IntegerScalar:
    """64 bits as the engines' signed integer."""
    return ibis.literal(bits - 2**64 if bits >> 63 else bits, "int64")
