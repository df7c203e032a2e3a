"""Depthwise convolutions in C++ against their definition in float64, and what building needs."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import environment, error_of, has_compiler, read_lines, run_align
from test_chunked_mbconv import CASES, ONE_DEVICE, errors, inputs, of_formula, of_module

from align_jax import mesh
from align_jax.models import layers, native

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.py"
SHAPES = [  # images, height, width, channels, kernel size, stride
    (1, 12, 9, 48, 3, 1),
    (2, 9, 12, 24, 3, 2),
    (2, 7, 7, 13, 5, 1),
    (3, 8, 7, 41, 5, 2),
    (2, 1, 1, 16, 5, 1),
    (2, 2, 2, 8, 3, 2),
    (2, 4, 3, 16, 5, 2),
    (1, 40, 40, 72, 3, 1),  # in several bands
    (1, 41, 40, 72, 5, 2),
]


def definition(x, kernel, dy, stride, padding):
    """Returns (y, dx, dkernel) in float64: y[i] is the sum of x[i * stride - before + r] * k[r]."""
    x, kernel, dy = (np.asarray(a, np.float64) for a in (x, kernel, dy))
    padded, size = np.pad(x, ((0, 0), *padding, (0, 0))), len(kernel)
    y, dpadded, dkernel = np.zeros_like(dy), np.zeros_like(padded), np.zeros_like(kernel)
    for row, column in np.ndindex(dy.shape[1:3]):
        top, left = stride * row, stride * column
        window = np.s_[:, top : top + size, left : left + size]
        y[:, row, column] = (padded[window] * kernel[:, :, 0]).sum((1, 2))
        dpadded[window] += dy[:, row, column][:, None, None] * kernel[:, :, 0]
        dkernel[:, :, 0] += (dy[:, row, column][:, None, None] * padded[window]).sum(0)
    (top, _), (left, _) = padding
    return y, dpadded[:, top : top + x.shape[1], left : left + x.shape[2]], dkernel


def results(conv, x, kernel, dy, stride, padding):
    """Returns (y, dx, dkernel)."""
    y, pull = jax.vjp(lambda x, kernel: conv(x, kernel, stride, padding), x, kernel)
    return y, *pull(dy)


def draw(shape, padding_of="hf", dtype=jnp.float32, seed=0):
    """Returns (x, kernel, dy, stride, padding)."""
    images, height, width, channels, size, stride = shape
    padding = layers.conv_padding(padding_of, size, stride, (height, width))
    rng = np.random.default_rng(seed)
    out = [
        (side + sum(of) - size) // stride + 1
        for side, of in zip((height, width), padding, strict=True)
    ]
    arrays = (
        jnp.asarray(rng.standard_normal(of), dtype)
        for of in (
            (images, height, width, channels),
            (size, size, 1, channels),
            (images, *out, channels),
        )
    )
    return *arrays, stride, padding


@pytest.mark.parametrize("padding", ["hf", "same"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_definition(shape, padding):
    drawn = draw(shape, padding)
    got = jax.jit(results, static_argnums=(0, 4, 5))(native.depthwise_conv, *drawn)
    for name, value, expected in zip(("y", "dx", "dkernel"), got, definition(*drawn), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(value, expected, rtol=0, atol=3e-6 * scale, err_msg=name)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (SHAPES[0], jnp.bfloat16),
        ((2, 9, 9, 8, 7, 1), jnp.float32),
        ((2, 9, 9, 8, 3, 3), jnp.float32),
    ],
)
def test_what_is_not_built_is_left_to_xla(shape, dtype):
    drawn = draw(shape, dtype=dtype)
    one, other = (
        results(conv, *drawn) for conv in (native.depthwise_conv, layers.shifted_depthwise_conv)
    )
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("case", CASES)
def test_a_block_is_that_of_the_formula(case):
    arguments = inputs(case)
    got = of_module(*arguments, constrain=dataclasses.replace(ONE_DEVICE, native=True))
    for name, error in errors(got, of_formula(*arguments)).items():
        assert error < 1e-4, name


def test_two_devices_give_the_numbers_of_one():
    arguments = inputs("residual")
    rows = mesh.Rows(mesh.make_mesh(2, 1, devices=jax.devices()[:2]), native=True)
    two, one = (of_module(*arguments, constrain=c) for c in (rows, ONE_DEVICE))
    for name, error in errors(two, one).items():
        assert error < 2e-5, name


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a new process, with an empty cache of kernels; the folder of the cache."""
    monkeypatch.setattr(native, "load", native.load.__wrapped__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache" / "align_jax"


def compiler(path, *lines):
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)
    return str(path)


def test_kernels_are_built_once_for_each_compiler(fresh, monkeypatch, tmp_path):
    real = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    counted = f'echo "$@" >> {tmp_path}/calls', f'exec {real} "$@"'
    monkeypatch.setenv("CXX", compiler(tmp_path / "one", *counted))
    assert native._build() == native._build()
    assert sum("-shared" in call for call in (tmp_path / "calls").read_text().splitlines()) == 1
    version = 'case "$1" in --version) echo another; exit 0;; esac'
    monkeypatch.setenv("CXX", compiler(tmp_path / "two", version, *counted))
    native._build()
    endings = sorted(path.suffix for path in fresh.iterdir())
    assert endings == [".digest", ".digest", ".so", ".so"]  # and nothing unfinished


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "config.train.native_kernels=True needs a C++ compiler, and there is no "),
        (("echo 'x.cc:1: fatal error: no such file' >&2", "exit 1"), "fatal error: no such file"),
        (("exit 3",), "fails: no message"),
    ],
)
def test_a_compiler_that_is_missing_or_fails_is_one_line(
    fresh, monkeypatch, tmp_path, capfd, lines, message
):
    name = str(tmp_path / "none") if lines is None else compiler(tmp_path / "bad", *lines)
    monkeypatch.setenv("CXX", name)
    monkeypatch.chdir(tmp_path)
    change = "--config.train.native_kernels=True"
    error = error_of(capfd, "train", "--config", QUICKSTART, "--workdir", "run", change)
    assert message in error and name in error and error.startswith("config.train.native_kernels")
    assert not list(fresh.glob("*"))


def test_damaged_kernels_are_built_again(fresh):
    built = native._build()
    content = built.read_bytes()
    built.write_bytes(content[:1000])
    assert native._build() == built and len(built.read_bytes()) == len(content)


def test_what_cannot_be_loaded_is_named(fresh, monkeypatch, tmp_path):
    makes_text = 'while [ "$1" != -o ]; do shift; done; echo text > "$2"'
    version = 'case "$1" in --version) exit 0;; esac'
    monkeypatch.setenv("CXX", compiler(tmp_path / "odd", version, makes_text))
    with pytest.raises(ValueError, match="native_kernels=True: what was compiled cannot be loaded"):
        native.load("cpu")


def test_devices_that_are_no_cpus_are_refused():
    message = "config.train.native_kernels=True is for CPUs, and these devices are tpu"
    with pytest.raises(ValueError, match=message):
        native.load("tpu")


@pytest.mark.slow
def test_a_run_begins_with_native_kernels_and_goes_on_without(tmp_path):
    env = environment(tmp_path / "compiled") | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = ("train", "--config", QUICKSTART, "--workdir", "run", "--config.optim.warmup_steps=1")
    source = "--config.data.source=scenes?size=256&seed=1"
    for steps, changes in ((2, ("--config.train.native_kernels=True",)), (4, ())):
        change = f"--config.train.steps={steps}"
        done = run_align(*command, source, change, *changes, cwd=tmp_path, env=env, timeout_s=900)
        assert done.returncode == 0, done.stderr
        assert read_lines(tmp_path / "run/metrics.jsonl")[-1]["step"] == steps
    assert len(list((tmp_path / "cache/align_jax").glob("depthwise-*.so"))) == 1
