"""Depthwise convolution on this platform: XLA's grouped convolution against shifted multiply-adds.

    python experiments/benchmarks/depthwise.py

Both run in one process, by turns; the figure that counts is the ratio. It is why
`models/layers.depthwise_conv` takes the shifted form on CPU.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from align_jax.models import layers

CASES = (  # images, height and width in pixels, channels, kernel size, stride
    (16, 32, 96, 3, 1),
    (16, 32, 96, 5, 1),
    (16, 32, 96, 3, 2),
    (128, 16, 96, 5, 2),
    (128, 4, 576, 5, 1),
)
REPEATS = 10


def main():
    device = jax.devices()[0]
    print(f"{device.platform} ({device.device_kind}), jax {jax.__version__}; median of {REPEATS}")
    print(f"{'':<26}{'forward, ms':>24}{'backward, ms':>30}")
    print(f"{'images, size, channels':<26}" + 2 * f"{'native':>10}{'shifted':>8}{'ratio':>8}    ")
    for case in CASES:
        (f_native, b_native), (f_shifted, b_shifted) = (
            measure(layers.native_depthwise_conv, *case),
            measure(layers.shifted_depthwise_conv, *case),
        )
        images, size, channels, kernel_size, stride = case
        name = f"{images}, {size}, {channels}; {kernel_size}x{kernel_size}/{stride}"
        print(
            f"{name:<26}{f_native:>10.1f}{f_shifted:>8.1f}{f_native / f_shifted:>8.1f}    "
            f"{b_native:>10.1f}{b_shifted:>8.1f}{b_native / b_shifted:>8.1f}"
        )


def measure(conv, images, size, channels, kernel_size, stride):
    """Returns the milliseconds of a forward pass and of a forward and backward pass."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((images, size, size, channels)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((kernel_size, kernel_size, 1, channels)), x.dtype)
    padding = layers.conv_padding("hf", kernel_size, stride, (size, size))
    forward = jax.jit(lambda x, k: conv(x, k, stride, padding))
    backward = jax.jit(jax.grad(lambda x, k: jnp.square(conv(x, k, stride, padding)).sum(), (0, 1)))
    return median_ms(forward, x, kernel), median_ms(backward, x, kernel)


def median_ms(fn, *args):
    """Returns the median time of a call in milliseconds, the first (compiling) one left out."""
    jax.block_until_ready(fn(*args))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times))


if __name__ == "__main__":
    main()
