"""The depthwise convolution of `depthwise.cc`, compiled on this machine, for training on CPUs.

The gradient of a depthwise kernel takes XLA as many passes over the maps as the kernel has taps;
here it is one. See docs/performance.md.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from align_jax.models import layers
from align_jax.storage import identity, writing

KEY = "config.train.native_kernels"

_SOURCE = Path(__file__).parent / "depthwise.cc"
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-w")
_SIZES, _STRIDES = (3, 5), (1, 2)
_FORWARD, _BY_INPUT, _BY_KERNEL = "DepthwiseForward", "DepthwiseByInput", "DepthwiseByKernel"


@functools.cache
def load(platform: str) -> None:
    """Compiles the kernels where that was not done before, and makes them known to XLA.

    They are kept in `$XDG_CACHE_HOME/align_jax` (`~/.cache/align_jax`), by what they depend on:
    source, compiler, flags, jax and the machine's instructions.

    Args:
      platform: of the devices that shall use them.

    Raises:
      ValueError: these are no CPUs, there is no C++ compiler, it fails, or what it made cannot be
        loaded.
    """
    if platform != "cpu":
        raise ValueError(
            f"{KEY}=True is for CPUs, and these devices are {platform}: leave it False."
        )
    built = _build()
    try:
        library = ctypes.CDLL(str(built))
    except OSError as error:
        raise ValueError(f"{KEY}=True: what was compiled cannot be loaded: {error}.") from None
    for name in (_FORWARD, _BY_INPUT, _BY_KERNEL):
        jax.ffi.register_ffi_target(
            f"align_jax_{name}", jax.ffi.pycapsule(getattr(library, name)), platform="cpu"
        )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise_conv(
    x: jax.Array, kernel: jax.Array, stride: int, padding: layers.Padding
) -> jax.Array:
    """As `layers.shifted_depthwise_conv`, up to rounding; what is not built here goes there.

    Args:
      x: [B, H, W, C].
      kernel: [k, k, 1, C]; k 3 or 5 and stride 1 or 2, both arrays float32, are built.
      stride, padding: of rows and columns.
    """
    if not _is_built(x, kernel, stride):
        return layers.shifted_depthwise_conv(x, kernel, stride, padding)
    like = jax.eval_shape(
        lambda *of: layers.shifted_depthwise_conv(*of, stride, padding), x, kernel
    )
    return _call(_FORWARD, like, x, kernel, stride=stride, padding=padding)


def _forward(
    x: jax.Array, kernel: jax.Array, stride: int, padding: layers.Padding
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return depthwise_conv(x, kernel, stride, padding), (x, kernel)


def _backward(
    stride: int, padding: layers.Padding, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def pull(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        conv = partial(layers.shifted_depthwise_conv, stride=stride, padding=padding)
        return jax.vjp(conv, x, kernel)[1](dy)

    x, kernel = residuals
    if not _is_built(x, kernel, stride):
        return pull(x, kernel, dy)
    like_x, like_kernel = jax.eval_shape(pull, x, kernel, dy)
    dx = _call(_BY_INPUT, like_x, kernel, dy, stride=stride, padding=padding)
    dkernel = _call(_BY_KERNEL, like_kernel, x, dy, stride=stride, padding=padding)
    return dx, dkernel


depthwise_conv.defvjp(_forward, _backward)


def _is_built(x: jax.Array, kernel: jax.Array, stride: int) -> bool:
    is_float32 = x.dtype == kernel.dtype == jnp.float32
    return is_float32 and kernel.shape[0] in _SIZES and stride in _STRIDES


def _call(
    name: str,
    like: jax.ShapeDtypeStruct,
    *arrays: jax.Array,
    stride: int,
    padding: layers.Padding,
) -> jax.Array:
    load("cpu")
    (top, _), (left, _) = padding
    numbers = {name: np.int64(n) for name, n in (("stride", stride), ("top", top), ("left", left))}
    return jax.ffi.ffi_call(f"align_jax_{name}", like)(*arrays, **numbers)


def _build() -> Path:
    """Returns the compiled kernels."""
    given = os.environ.get("CXX")
    names = [given] if given else ["c++", "g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise ValueError(
            f"{KEY}=True needs a C++ compiler, and there is no {' or '.join(names)} in PATH; "
            "install one, set CXX, or leave it False."
        )
    version = _run([compiler, "--version"])
    parts = (
        _SOURCE.read_text(encoding="utf-8"),
        version,
        *_FLAGS,
        jax.__version__,
        _instructions(),
    )
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    built = Path(base) / "align_jax" / f"depthwise-{key}.so"
    digest = built.with_suffix(".digest")  # loading a damaged library would kill the process
    whole = built.exists() and digest.exists()
    if not (whole and digest.read_bytes() == identity.of_content(built).encode()):
        with writing.replacing(built) as made:  # two may do so at once
            include = f"-I{jax.ffi.include_dir()}"
            _run([compiler, *_FLAGS, include, str(_SOURCE), "-o", str(made)])
            writing.write_text(digest, identity.of_content(made))
    return built


def _run(command: list[str]) -> str:
    """Returns what a compiler prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(f"{KEY}=True: {command[0]} cannot be run: {error.strerror}.") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise ValueError(f"{KEY}=True: {command[0]} fails: {lines[0]}")
    return done.stdout


def _instructions() -> str:
    """Returns what this machine's processor can do, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return os.uname().machine
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
