"""The nearest rows against float64 numpy: on any devices, blocks and processes, with ties."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import environment
from test_multihost import free_address

from align_jax import mesh as mesh_lib
from align_jax.evals import top_k as top_k_lib
from align_jax.evals.top_k import top_k


def mesh_of(num_devices):
    return mesh_lib.make_mesh(devices=jax.devices()[:num_devices])


def unit(z):
    return (z / np.linalg.norm(z, axis=-1, keepdims=True)).astype(np.float32)


def random_unit(count, dim, seed=0):
    return unit(np.random.default_rng(seed).normal(size=(count, dim)))


def by_sorting(z_query, z_index, k, exclude=None, decimals=12):
    """Oracle: all scores in float64; those that agree to 1e-12 are equal (BLAS rounds)."""
    scores = np.round(z_query.astype(np.float64) @ z_index.astype(np.float64).T, decimals)
    if exclude is not None:
        scores[exclude >= 0, exclude[exclude >= 0]] = -np.inf
    order = np.lexsort((np.broadcast_to(np.arange(len(z_index)), scores.shape), -scores))[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


def assert_found(found, expected):
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[0].dtype == np.int64 and found[1].dtype == np.float32
    np.testing.assert_allclose(found[1], expected[1], rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("num_devices", [1, 5, 8])
@pytest.mark.parametrize("blocks", [(512, 8192), (8, 16)])
def test_nearest_are_those_of_sorting_all_in_float64(monkeypatch, num_devices, blocks):
    z_query, z_index = random_unit(37, 640), random_unit(413, 640, seed=1)
    monkeypatch.setattr(top_k_lib, "_QUERY_ROWS", blocks[0])
    monkeypatch.setattr(top_k_lib, "_INDEX_ROWS", blocks[1])
    for k in (1, 10, 100, 413):
        found = top_k(z_query, z_index, k, mesh=mesh_of(num_devices))
        assert_found(found, by_sorting(z_query, z_index, k))


@pytest.mark.parametrize("num_devices", [1, 8])
def test_of_equal_scores_the_lower_index_comes_first(num_devices):
    rng = np.random.default_rng(0)
    # Components in quarters: scores are exact, and few different ones exist.
    z_query = (rng.integers(-2, 3, (23, 4)) / 4).astype(np.float32)
    z_index = (rng.integers(-2, 3, (900, 4)) / 4).astype(np.float32)
    for k in (1, 7, 200):
        found = top_k(z_query, z_index, k, mesh=mesh_of(num_devices))
        assert_found(found, by_sorting(z_query, z_index, k))


def test_where_all_vectors_are_equal_the_first_are_found(monkeypatch):
    z = np.repeat(random_unit(1, 64), 3000, axis=0)
    monkeypatch.setattr(top_k_lib, "_HOST_NUMBERS", 2**15)
    indices, scores = top_k(z[:5], z, 40)
    np.testing.assert_array_equal(indices, np.tile(np.arange(40), (5, 1)))
    np.testing.assert_allclose(scores, 1, atol=1e-6)


def test_copies_beyond_the_candidates_are_ordered_too():
    """100 copies of the best row and 100 of another, spread out: more than candidates hold."""
    rng = np.random.default_rng(0)
    z_index = random_unit(2000, 32)
    places = rng.permutation(2000)
    z_index[places[:100]], z_index[places[100:200]] = z_index[7], z_index[8]
    z_query = np.stack([z_index[7], z_index[8]])
    for num_devices in (1, 8):
        found = top_k(z_query, z_index, 50, mesh=mesh_of(num_devices))
        assert_found(found, by_sorting(z_query, z_index, 50))


def test_differences_below_float32_are_seen():
    """Rows whose scores differ by 1e-9, too little for a sum in float32, are in the right order."""
    query = unit(np.ones((1, 256)))
    z_index = np.repeat(query, 300, axis=0)
    steps = np.random.default_rng(0).permutation(300)
    for row, step in enumerate(steps):
        z_index[row, : step % 256] += np.float32(2.0**-27)  # one unit in the last place
        z_index[row, 0] += np.float32(2.0**-27) * (step // 256)
    exact = z_index.astype(np.float64) @ query[0].astype(np.float64)
    assert np.unique(exact).size > 200 and np.unique(exact.astype(np.float32)).size < 20
    for num_devices in (1, 8):
        indices, _ = top_k(query, z_index, 20, mesh=mesh_of(num_devices))
        np.testing.assert_array_equal(indices[0], np.lexsort((np.arange(300), -exact))[:20])


def test_excluded_row_is_never_found():
    z = random_unit(60, 16)
    exclude = np.where(np.arange(60) % 3, np.arange(60), -1)
    for k in (1, 10, 59):
        found = top_k(z, z, k, exclude=exclude)
        assert_found(found, by_sorting(z, z, k, exclude))
    assert (top_k(z, z, 1)[0][:, 0] == np.arange(60)).all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e5])
def test_length_of_the_vectors_only_scales_the_scores(scale):
    z_query, z_index = random_unit(20, 16), random_unit(300, 16, seed=1)
    indices, scores = top_k(z_query * np.float32(scale), z_index, 10)
    expected = by_sorting(z_query, z_index, 10)
    np.testing.assert_array_equal(indices, expected[0])
    np.testing.assert_allclose(scores / scale, expected[1], rtol=1e-6, atol=1e-6)


def test_program_is_compiled_for_few_numbers_of_queries():
    top_k_lib._compile_find.cache_clear()  # other tests of this process have their own shapes
    z_index = random_unit(300, 16)
    top_k(random_unit(100, 16), z_index, 5)
    find = top_k_lib._compile_find(mesh_lib.make_mesh(), 5 + top_k_lib._MARGIN)
    compiled = find._cache_size()
    for count in range(65, 129):
        top_k(random_unit(count, 16), z_index, 5)
    assert find._cache_size() == compiled == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.zeros((2, 3)), np.zeros((5, 4)), 1), "got [2, 3] for queries and [5, 4] for the"),
        ((np.zeros(3), np.zeros((5, 3)), 1), "got [3] for queries"),
        ((np.zeros((2, 3)), np.zeros((5, 3)), 6), "k=6 must be between 1 and 5"),
        ((np.zeros((2, 3)), np.zeros((5, 3)), 0), "k=0 must be between 1 and 5"),
        ((np.array([[0, 1], [0, np.nan]]), np.zeros((5, 2)), 1), "query 1 is not finite"),
        ((np.zeros((1, 1)), np.array([[0], [1], [np.inf]]), 1), "row 2 is not finite"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        top_k(*arguments)


def test_k_counts_the_excluded_row():
    z = random_unit(5, 4)
    with pytest.raises(ValueError, match="k=5 must be between 1 and 4"):
        top_k(z, z, 5, exclude=np.arange(5))


PROCESS = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1])
from align_jax.run import multihost
with multihost.processes(sys.argv[2], 2, int(sys.argv[3])):
    from align_jax.evals.top_k import top_k
    from test_top_k import random_unit
    found = top_k(random_unit(203, 64), random_unit(611, 64, seed=1), 10)
    np.savez(f"{sys.argv[4]}/{sys.argv[3]}.npz", *found)
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    address, env = free_address(), environment(JAX_NUM_CPU_DEVICES="4")
    command = [sys.executable, "-c", PROCESS, __file__.rpartition("/")[0], address]
    started = [subprocess.Popen([*command, str(i), tmp_path], env=env) for i in range(2)]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    expected = top_k(random_unit(203, 64), random_unit(611, 64, seed=1), 10, mesh=mesh_of(1))
    for process in range(2):
        with np.load(tmp_path / f"{process}.npz") as found:
            for array, want in zip(found.values(), expected, strict=True):
                np.testing.assert_array_equal(array, want)
