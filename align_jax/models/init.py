"""Initial values of every tensor, drawn by name on the host.

A value depends on (seed, tensor name) alone: the same on every platform, mesh and process count,
with and without scanned blocks, and nothing compiles to draw it. The modules declare shapes only.
"""

import hashlib
import re
from collections.abc import Callable

import jax
import numpy as np
from jax.typing import DTypeLike

_TRUNCATED_STD = 0.87962566103423978  # of a standard normal truncated to [-2, 2]


def zeros(_key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Initialiser that the modules declare; `draw` replaces what it makes."""
    return jax.numpy.zeros(shape, dtype)


def draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Returns the initial float32 value of the tensor called `name`.

    Image tower: truncated normal of variance 2 / fan_out, as in Keras and COYO (a depthwise
    kernel [k, k, 1, C] has fan_out k * k). Text tower: normal of deviation 0.02. Projections:
    Xavier uniform. Scales and variances one, biases and means zero. A of an adapter: uniform up to
    1 / sqrt(fan_in), as in PEFT; B zero. Head of a classifier: zero, so that the first loss is
    ln C whatever the tower.

    Args:
      name: path such as "params/image/stage1/block0/project/kernel".
      shape: of the tensor.
      seed: >= 0.

    Raises:
      KeyError: no rule for this name.

    Source: hf_align_parity 1.8; Devlin et al. 2019.
    """
    rule = next((rule for pattern, rule in _RULES if re.search(pattern, name)), None)
    if rule is None:
        raise KeyError(f"models/init.py has no rule for the tensor {name}.")
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    rng = np.random.Generator(np.random.Philox(key=[seed, int.from_bytes(digest, "little")]))
    return np.asarray(rule(rng, shape), np.float32)


def _fan_out(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    fan_out = int(np.prod(shape[:-2])) * shape[-1]
    return _truncated_normal(rng, shape, np.sqrt(2.0 / fan_out) / _TRUNCATED_STD)


def _depthwise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return _truncated_normal(rng, shape, np.sqrt(2.0 / (shape[0] * shape[1])) / _TRUNCATED_STD)


def _truncated_normal(
    rng: np.random.Generator, shape: tuple[int, ...], deviation: float
) -> np.ndarray:
    """Returns normal values of which those beyond two deviations are drawn again."""
    values = rng.standard_normal(shape, np.float32)
    outside = np.abs(values) > 2.0
    while outside.any():
        values[outside] = rng.standard_normal(int(outside.sum()), np.float32)
        outside = np.abs(values) > 2.0
    return values * np.float32(deviation)


def _xavier(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    limit = np.sqrt(6.0 / (shape[0] + shape[1]))
    return rng.uniform(-limit, limit, shape)


def _uniform_fan_in(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    limit = 1.0 / np.sqrt(shape[0])
    return rng.uniform(-limit, limit, shape)


def _bert(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape, np.float32) * np.float32(0.02)


def _constant(value: float) -> Callable[..., np.ndarray]:
    return lambda rng, shape: np.full(shape, value, np.float32)


_RULES = (
    (r"^batch_stats/.*/mean$|/bias$", _constant(0.0)),
    (r"^batch_stats/.*/var$|/scale$", _constant(1.0)),
    (r"^params/lora/.*/a$", _uniform_fan_in),
    (r"^params/lora/.*/b$", _constant(0.0)),
    (r"^params/head/kernel$", _constant(0.0)),
    (r"_projection/kernel$", _xavier),
    (r"^params/image/.*/depthwise/kernel$", _depthwise),
    (r"^params/image/", _fan_out),
    (r"^params/text/", _bert),
)
