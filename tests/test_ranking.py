"""Ranks against a double loop and float64, on any devices, processes and tiles; bounded memory."""

import itertools
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import environment
from test_multihost import free_address

from align_jax import mesh as mesh_lib
from align_jax.evals import ranking
from align_jax.evals.ranking import pair_ranks


def mesh_of(num_devices):
    return mesh_lib.make_mesh(devices=jax.devices()[:num_devices])


def unit(z):
    return (z / np.linalg.norm(z, axis=-1, keepdims=True)).astype(np.float32)


def random_pairs(num_owners, num_members, dim, noise=0.1, seed=0):
    """Unit vectors; every owner has a member, some have several, in random order."""
    rng = np.random.default_rng(seed)
    extra = rng.integers(0, num_owners, num_members - num_owners)
    owner = rng.permutation(np.concatenate([np.arange(num_owners), extra]))
    z_owner = unit(rng.normal(size=(num_owners, dim)))
    z_member = unit(z_owner[owner] + noise * rng.normal(size=(num_members, dim)))
    return z_owner, z_member, owner


def assert_same(found, expected):
    for ranks, want in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ranks, want)


def ranks_by_double_loop(scores, owner):
    """The definition, literally, on scores [N, M]."""
    num_owners, num_members = scores.shape
    owner_ranks, member_ranks = [], []
    for i in range(num_owners):
        ranks = []
        for j in range(num_members):
            if owner[j] == i:
                wrong = [m for m in range(num_members) if owner[m] != i]
                ranks.append(sum(scores[i, m] >= scores[i, j] for m in wrong))
        owner_ranks.append(min(ranks))
    for j in range(num_members):
        wrong = [n for n in range(num_owners) if n != owner[j]]
        member_ranks.append(sum(scores[n, j] >= scores[owner[j], j] for n in wrong))
    return owner_ranks, member_ranks


def ranks_in_float64(z_owner, z_member, owner):
    """All scores at once; those closer than 1e-12 are equal: BLAS sums equal rows unequally."""
    z_owner, z_member = z_owner.astype(np.float64), z_member.astype(np.float64)
    scores = z_owner @ z_member.T
    own = scores[owner, np.arange(len(owner))]
    best = np.full(len(z_owner), -np.inf)
    np.maximum.at(best, owner, own)
    is_wrong = np.arange(len(z_owner))[:, None] != owner
    owner_ranks = np.count_nonzero((scores >= best[:, None] - 1e-12) & is_wrong, axis=1)
    return owner_ranks, np.count_nonzero((scores >= own - 1e-12) & is_wrong, axis=0)


@pytest.mark.parametrize("num_devices, tile", [(1, 1), (1, 3), (1, 256), (8, 1), (8, 256)])
def test_ranks_equal_double_loop_with_planted_ties(num_devices, tile):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        # Components in quarters: dot products are exact, and ties frequent.
        z_owner = (rng.integers(-2, 3, (13, 4)) / 4).astype(np.float32)
        z_member = (rng.integers(-2, 3, (37, 4)) / 4).astype(np.float32)
        owner = rng.permutation(np.concatenate([np.arange(13), rng.integers(0, 13, 24)]))
        scores = z_owner.astype(np.float64) @ z_member.T.astype(np.float64)
        assert len(np.unique(scores)) < scores.size / 4
        found = pair_ranks(z_owner, z_member, owner, mesh=mesh_of(num_devices), tile=tile)
        assert_same(found, ranks_by_double_loop(scores, owner))


@pytest.mark.parametrize("dim", [7, 640])
def test_ranks_are_those_of_float64_on_any_devices_and_tiles(monkeypatch, dim):
    z_owner, z_member, owner = random_pairs(203, 611, dim, noise=1.0)
    z_owner[7], z_member[3] = z_owner[8], z_member[5]
    expected = ranks_in_float64(z_owner, z_member, owner)
    assert max(expected[0]) > 20 and min(expected[0]) == 0
    # A call takes at most 2 tiles of owners on each device, and members of 3 tiles.
    monkeypatch.setattr(ranking, "_OWNER_TILES", 2)
    monkeypatch.setattr(ranking, "_MEMBER_TILES", 3)
    for num_devices, tile in ((1, 256), (1, 40), (8, 256), (8, 7), (5, 11)):
        found = pair_ranks(z_owner, z_member, owner, mesh=mesh_of(num_devices), tile=tile)
        assert_same(found, expected)


def test_equal_embeddings_tie_wherever_they_lie():
    rng = np.random.default_rng(0)
    row = np.arange(120)
    z_owner = unit(rng.normal(size=(40, 640)))[row % 40]  # each owner three times
    z_member = unit(rng.normal(size=(40, 640)))[row % 40]
    expected = ranks_in_float64(z_owner, z_member, row)
    # Float32 products of equal rows may differ by rounding; the two twins must both count.
    assert expected[1].min() >= 2
    for num_devices, tile in ((1, 120), (1, 11), (8, 256)):
        assert_same(
            pair_ranks(z_owner, z_member, row, mesh=mesh_of(num_devices), tile=tile), expected
        )


def test_owner_without_members_gets_the_last_rank():
    z_owner, z_member, owner = random_pairs(6, 20, 8)
    owner = np.where(owner == 2, 1, owner)
    owner_ranks, member_ranks = pair_ranks(z_owner, z_member, owner)
    assert owner_ranks[2] == 20
    np.testing.assert_array_equal(member_ranks, ranks_in_float64(z_owner, z_member, owner)[1])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e5])
def test_ranks_do_not_depend_on_the_length_of_the_vectors(scale):
    z_owner, z_member, owner = random_pairs(50, 90, 16, noise=1.0)
    expected = ranks_in_float64(z_owner, z_member, owner)
    assert_same(pair_ranks(z_owner * np.float32(scale), z_member, owner), expected)


@pytest.mark.parametrize("dim", [3, 256, 1501])
def test_scores_are_summed_without_rounding(dim):
    rng = np.random.default_rng(0)
    left, right = rng.integers(-128, 129, (2, 4, 9, dim)).astype(np.float32)
    # The largest sums there can be, of either sign, and nearly so with an odd total.
    left[:, :2] = right[:, :2] = [[128.0], [127.0]]
    right[:, 2:4] = [[-128.0], [-127.0]]
    high, low = ranking._words(np.concatenate(left, 1), np.concatenate(right[::-1], 1))
    found = np.asarray(high, np.int64) * 2**24 + np.asarray(low)
    expected = sum(
        left[a].astype(np.int64) @ right[b].astype(np.int64).T * 256 ** (3 - a - b)
        for a, b in itertools.product(range(4), repeat=2)
        if a + b <= 3
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dim", [64, 640])
def test_scores_of_unit_vectors_are_right_to_1e_8(dim):
    z_owner, z_member, owner = random_pairs(2000, 5000, dim, noise=1.0)
    scales = ranking._scale(z_owner), ranking._scale(z_member)
    scores = ranking._pair_scores(z_owner, z_member, owner, *scales)
    found = scores / 2**24 / (float(scales[0]) * float(scales[1]))
    exact = np.einsum("mD,mD->m", z_owner[owner], z_member, dtype=np.float64)
    # What is left out are products below 2**-28 of the largest, with random signs.
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-8)


def test_memory_of_a_million_times_a_million_is_bounded():
    mesh = mesh_of(8)
    used = []
    for count in (200_000, 1_000_000):
        owners, members = ranking.block_shapes(count, count, 640, mesh)
        analysis = ranking.compile_counts(mesh, 256).lower(owners, members).compile()
        analysis = analysis.memory_analysis()
        used.append(analysis.temp_size_in_bytes + analysis.argument_size_in_bytes)
    # 1M x 640 float32 on each of 8 devices would be 305 MiB, the scores half a terabyte.
    assert max(used) < 256 * 2**20, used
    assert used[1] <= 1.1 * used[0]


def test_program_is_compiled_once_for_all_evaluations():
    ranking.compile_counts.cache_clear()  # other tests of this process have their own shapes
    pairs = random_pairs(30, 40, 8)
    pair_ranks(*pairs, tile=4)
    count = ranking.compile_counts(mesh_lib.make_mesh(), 4)
    compiled = count._cache_size()
    pair_ranks(*pairs, tile=4)
    assert count._cache_size() == compiled == 1


PROCESS = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1])
from align_jax.run import multihost
with multihost.processes(sys.argv[2], 2, int(sys.argv[3])):
    from align_jax.evals.ranking import pair_ranks
    from test_ranking import random_pairs
    ranks = pair_ranks(*random_pairs(203, 611, 64, noise=1.0), tile=16)
    np.savez(f"{sys.argv[4]}/{sys.argv[3]}.npz", *ranks)
"""


@pytest.mark.slow
def test_two_processes_get_the_ranks_of_one(tmp_path):
    address, env = free_address(), environment(JAX_NUM_CPU_DEVICES="4")
    command = [sys.executable, "-c", PROCESS, __file__.rpartition("/")[0], address]
    started = [subprocess.Popen([*command, str(i), tmp_path], env=env) for i in range(2)]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    expected = pair_ranks(*random_pairs(203, 611, 64, noise=1.0), mesh=mesh_of(1))
    for process in range(2):
        with np.load(tmp_path / f"{process}.npz") as found:
            assert_same(found.values(), expected)
