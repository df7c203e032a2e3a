"""Depthwise convolution on this platform: XLA's grouped convolution against shifted multiply-adds.

    python experiments/benchmarks/depthwise.py

Forward pass, and backward pass with two forms of the kernel's gradient: k*k reductions over the
whole batch, and the loop over blocks of images that the project takes on CPU. All in one process,
by turns; CPU milliseconds (the least of some calls), and the ratio to the project's.
"""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from align_jax.models import layers

CASES = (  # images, height and width in pixels, channels, kernel size, stride
    (64, 32, 48, 3, 1),
    (64, 16, 144, 5, 1),
    (32, 48, 96, 3, 2),
    (32, 24, 144, 5, 1),
    (32, 24, 240, 5, 2),
    (32, 6, 672, 5, 1),
)
REPEATS = 7


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def with_reductions(
    x: jax.Array, kernel: jax.Array, stride: int, padding: layers.Padding
) -> jax.Array:
    """As `layers.shifted_depthwise_conv`, each tap of the kernel's gradient a reduction."""
    return layers.shifted_depthwise_conv(x, kernel, stride, padding)


def _forward(x, kernel, stride, padding):
    return with_reductions(x, kernel, stride, padding), (x, kernel)


def _backward(stride, padding, residuals, dy):
    x, kernel = residuals
    size = kernel.shape[0]
    _, pull = jax.vjp(lambda x: layers.shifted_depthwise_conv(x, kernel, stride, padding), x)
    windows = layers._windows(x, size, stride, padding, dy.shape[1:3])
    dkernel = jnp.stack([(window * dy).sum((0, 1, 2)) for _, window in windows])
    return pull(dy)[0], dkernel.reshape(kernel.shape)


with_reductions.defvjp(_forward, _backward)


def main():
    device = jax.devices()[0]
    print(f"{device.platform} ({device.device_kind}), jax {jax.__version__}; CPU ms, and ratios")
    print(f"{'images, size, channels; kernel':<32}{'forward':>9}{'native':>15}", end="")
    print(f"{'backward':>12}{'reductions':>16}{'native':>15}")
    for case in CASES:
        ours, reductions, native = measure(
            *case, layers.shifted_depthwise_conv, with_reductions, layers.native_depthwise_conv
        )
        images, size, channels, kernel_size, stride = case
        name = f"{images}, {size}, {channels}; {kernel_size}x{kernel_size}/{stride}"
        forward, backward = ours
        columns = (native[0], forward), (reductions[1], backward), (native[1], backward)
        texts = [f"{ms:.1f} ({ms / base:.1f}x)" for ms, base in columns]
        print(f"{name:<32}{forward:>9.1f}{texts[0]:>15}{backward:>12.1f}{texts[1]:>16}", end="")
        print(f"{texts[2]:>15}", flush=True)


def measure(images, size, channels, kernel_size, stride, *convs) -> list[tuple[float, float]]:
    """Returns, for each form, the CPU milliseconds of a forward and of a backward pass."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((images, size, size, channels)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((kernel_size, kernel_size, 1, channels)), x.dtype)
    padding = layers.conv_padding("hf", kernel_size, stride, (size, size))
    dy = jnp.ones(jax.eval_shape(lambda: convs[0](x, kernel, stride, padding)).shape, x.dtype)
    calls = []
    for conv in convs:
        forward = jax.jit(lambda x, k, conv=conv: conv(x, k, stride, padding))
        backward = jax.jit(lambda x, k, dy, forward=forward: jax.vjp(forward, x, k)[1](dy))
        calls += [lambda f=forward: f(x, kernel), lambda f=backward: f(x, kernel, dy)]
    times = least_cpu_ms(calls)
    return list(zip(times[::2], times[1::2], strict=True))


def least_cpu_ms(calls: list[Callable[[], jax.Array]]) -> list[float]:
    """Returns the least CPU milliseconds of each call, made by turns; the first is not counted."""
    times = np.empty((REPEATS + 1, len(calls)))
    for turn in range(REPEATS + 1):
        for number, call in enumerate(calls):
            start = time.process_time()
            jax.block_until_ready(call())
            times[turn, number] = 1e3 * (time.process_time() - start)
    return times[1:].min(0).tolist()


if __name__ == "__main__":
    main()
