"""Layers that both towers share: grouped batch normalisation, convolutions, per-example dropout.

Every source of randomness takes one key per example, so that a run draws the same numbers on any
number of devices, processes and microbatches. Nothing here knows about meshes.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from align_jax.models import init

Padding = tuple[tuple[int, int], tuple[int, int]]  # ((top, bottom), (left, right)) zeros

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "swish": nn.silu,
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
}


class Constrain(Protocol):
    """Knows on which devices the rows of activations [B, ...] lie (`mesh.Rows`)."""

    num_devices: int
    on_cpu: bool  # whether these are CPUs
    native: bool  # whether kernels compiled for them may be used, see `native`

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x with its sharding pinned to that.

        Without it XLA splits the work of a scanned block like its parameters, and gathers
        activations instead.
        """

    def on_each_device(self, fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Returns `fn(whole, rows) -> rows`, run by each device on the rows that it holds.

        Gradients of `whole` are summed over the devices once, whatever loops `fn` has.
        """


class _OneDevice:
    num_devices = 1
    on_cpu = False  # unknown: nothing is chosen for a platform
    native = False

    def __call__(self, x: jax.Array) -> jax.Array:
        return x

    def on_each_device(self, fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        return fn


unconstrained = _OneDevice()  # what to pass where one device holds the batch


REMAT = ("none", "dots", "block")
BN_MODES = ("grouped", "global", "frozen")


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Returns the precision under which float32 really is float32 on TPUs and GPUs too."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns x [..., in] times kernel [in, out].

    Autodiff's gradient of the kernel makes XLA write x transposed on CPUs before it multiplies.
    """
    precision = matmul_precision(x.dtype)
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision=precision)


def _matmul_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple]:
    return matmul(x, kernel), (x, kernel)


def _matmul_backward(residuals: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    rows_x, rows_dy = (a.reshape(-1, a.shape[-1]) for a in (x, dy))
    dkernel = jax.lax.dot_general(
        rows_x, rows_dy, (((0,), (0,)), ((), ())), precision=matmul_precision(x.dtype)
    )
    return matmul(dy, kernel.T), dkernel


matmul.defvjp(_matmul_forward, _matmul_backward)


def dense_product(constrain: Constrain) -> Callable | None:
    """Returns the `dot_general` of an nn.Dense layer: `matmul` on CPUs, else None, flax's own."""
    return _dense_matmul if constrain.on_cpu else None


def _dense_matmul(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    return matmul(x, kernel)


class GroupedBatchNorm(nn.Module):
    """Batch normalisation whose statistics cover fixed groups of images, never "a device".

    In train mode the batch [B, H, W, C] is normalised in groups of `group_size` consecutive images
    and the collection `batch_stats` is overwritten with the *batch moments* (mean over groups of
    each group's mean and biased variance). The caller blends them into the running statistics,
    once a step (`dual_encoder.update_batch_stats`), which also makes microbatches exact.

    Attributes:
      mode: "grouped"; "global" (one group: the whole batch); "frozen" (running statistics in
        train mode too, left as they are).
      group_size: images in a group; must divide B in train mode.
      eps: added to the variance. 1e-3 in every EfficientNet.
      train: batch moments if True, running statistics if False.

    Input and output are [B, H, W, C] in any float dtype; statistics, scale and bias are float32.

    Source: virtual batches of 16, kakaobrain/coyo-align; they reproduce the 16 images per core of
    Jia et al. 2021. Differs from COYO: groups are consecutive images, not strided ones.
    """

    mode: str
    group_size: int
    train: bool
    eps: float = 1e-3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", init.zeros, (channels,), jnp.float32)
        bias = self.param("bias", init.zeros, (channels,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.zeros, (channels,), jnp.float32)

        if not self.train or self.mode == "frozen" or self.is_initializing():
            factor = scale * jax.lax.rsqrt(running_var.value + self.eps)
            shift = bias - running_mean.value * factor
            return (x.astype(jnp.float32) * factor + shift).astype(x.dtype)

        batch = x.shape[0]
        size = batch if self.mode == "global" else self.group_size
        if batch % size:
            raise ValueError(f"bn_group_size={size} does not divide the batch of {batch} images.")
        # f32 and two passes: a bf16 or E[x^2]-E[x]^2 variance loses digits on large maps.
        grouped = x.astype(jnp.float32).reshape(batch // size, size, *x.shape[1:])
        mean = grouped.mean((1, 2, 3), keepdims=True)  # [G, 1, 1, 1, C]
        centred = grouped - mean
        var = jnp.square(centred).mean((1, 2, 3), keepdims=True)
        running_mean.value = mean.mean((0, 1, 2, 3))
        running_var.value = var.mean((0, 1, 2, 3))
        normalised = centred * (jax.lax.rsqrt(var + self.eps) * scale) + bias
        return normalised.reshape(x.shape).astype(x.dtype)


class DepthwiseConv(nn.Module):
    """Depthwise convolution without bias: [B, H, W, C] -> [B, H', W', C].

    Attributes:
      kernel_size: odd, in pixels.
      stride: 1 or 2.
      padding: ((top, bottom), (left, right)) zeros.
      dtype: of the computation; the kernel [k, k, 1, C] is float32.
    """

    kernel_size: int
    stride: int
    padding: Padding
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, 1, x.shape[-1])
        kernel = self.param("kernel", init.zeros, shape, jnp.float32).astype(self.dtype)
        return depthwise_conv(x, kernel, self.stride, self.padding)


def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """Returns the depthwise convolution of x [B, H, W, C] with kernel [k, k, 1, C].

    The platform is chosen when the program is lowered, not by the host's default device: on CPU a
    sum of shifted products, 3 to 33 times faster than XLA's grouped convolution on two cores
    (`experiments/benchmarks/depthwise.py`); elsewhere the native convolution. Same sums, so equal
    up to float rounding.
    """
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: shifted_depthwise_conv(x, kernel, stride, padding),
        default=lambda x, kernel: native_depthwise_conv(x, kernel, stride, padding),
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def shifted_depthwise_conv(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding
) -> jax.Array:
    """As `depthwise_conv`, as k*k shifted multiply-adds.

    Its gradient by x is again such a sum, over the dilated gradient: what autodiff makes of the
    slices (k*k padded and added arrays) is several times slower on CPU.
    """
    size = kernel.shape[0]
    height = (x.shape[1] + sum(padding[0]) - size) // stride + 1
    width = (x.shape[2] + sum(padding[1]) - size) // stride + 1
    y = jnp.zeros((), x.dtype)
    for (row, column), window in _windows(x, size, stride, padding, (height, width)):
        y = y + window * kernel[row, column, 0]
    return y


def _windows(
    x: jax.Array, size: int, stride: int, padding: Padding, out_size: tuple[int, int]
) -> Iterator[tuple[tuple[int, int], jax.Array]]:
    """Yields ((row, column), the pixels [B, H', W', C] that this tap of the kernel meets)."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = (stride * (n - 1) + 1 for n in out_size)
    for row, column in itertools.product(range(size), repeat=2):
        yield (row, column), x[:, row : row + rows : stride, column : column + columns : stride]


def _shifted_forward(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return shifted_depthwise_conv(x, kernel, stride, padding), (x, kernel)


def _shifted_backward(
    stride: int, padding: Padding, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of x [B, H, W, C] and kernel [k, k, 1, C]; dy is [B, H', W', C]."""
    x, kernel = residuals
    size = kernel.shape[0]

    def adjoint(
        axis: int,
    ) -> tuple[int, int, int]:  # (low, high, interior) zeros that make dy's windows those of dx
        low = size - 1 - padding[axis - 1][0]
        dilated = (dy.shape[axis] - 1) * stride + 1
        return low, x.shape[axis] + size - 1 - low - dilated, stride - 1

    zero = jnp.zeros((), dy.dtype)
    dilated = jax.lax.pad(dy, zero, ((0, 0, 0), adjoint(1), adjoint(2), (0, 0, 0)))
    dx = shifted_depthwise_conv(dilated, kernel[::-1, ::-1], 1, ((0, 0), (0, 0)))
    windows = _windows(x, size, stride, padding, dy.shape[1:3])
    dkernel = jnp.stack([(window * dy).sum((0, 1, 2)) for _, window in windows])
    return dx, dkernel.reshape(kernel.shape)


shifted_depthwise_conv.defvjp(_shifted_forward, _shifted_backward)


def native_depthwise_conv(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding
) -> jax.Array:
    """As `depthwise_conv`, by XLA's grouped convolution."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        precision=matmul_precision(x.dtype),
    )


def conv_padding(padding: str, kernel_size: int, stride: int, size_px: tuple[int, int]) -> Padding:
    """Returns ((top, bottom), (left, right)) zeros of a strided convolution.

    Args:
      padding: "hf": the Hugging Face / COYO graph, (k//2 - 1, k//2) at stride 2 whatever the
        parity of the input; "same": TensorFlow's SAME, which differs from it on odd inputs.
      kernel_size: odd, in pixels.
      stride: 1 or 2.
      size_px: (height, width) of the input.

    Raises:
      ValueError: another `padding`.

    Source: hf_align_parity 1.4.
    """
    if padding not in ("hf", "same"):
        raise ValueError(f"model.padding={padding!r}; use 'hf' or 'same'.")
    half = kernel_size // 2
    if stride == 1:
        return ((half, half), (half, half))
    if padding == "hf":
        return ((half - 1, half), (half - 1, half))
    pads = []
    for size in size_px:
        total = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
        pads.append((total // 2, total - total // 2))
    return (pads[0], pads[1])


def split_keys(keys: jax.Array | None, count: int) -> tuple[jax.Array | None, ...] | jax.Array:
    """Returns `count` keys [count, B] made of per-example keys [B]; of None, as many Nones."""
    if keys is None:
        return (None,) * count
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)


def dropout(x: jax.Array, rate: float | jax.Array, keys: jax.Array | None) -> jax.Array:
    """Returns x [B, ...] with elements zeroed with probability `rate`, the rest scaled up.

    Args:
      x: [B, ...] float.
      rate: probability of dropping, in [0, 1).
      keys: one typed PRNG key per example [B]; None turns dropout off.
    """
    return _drop(x, rate, keys, x.shape[1:])


def drop_path(x: jax.Array, rate: float | jax.Array, keys: jax.Array | None) -> jax.Array:
    """Returns x [B, ...] with whole examples zeroed with probability `rate` (stochastic depth).

    Source: Huang et al. 2016; per example as in the original EfficientNet. (Differs from the
    Hugging Face port, whose "drop connect" drops single elements.)
    """
    return _drop(x, rate, keys, (1,) * (x.ndim - 1))


def _drop(
    x: jax.Array, rate: float | jax.Array, keys: jax.Array | None, shape: tuple[int, ...]
) -> jax.Array:
    """Returns x [B, ...] with what one draw of this shape per example decides."""
    if keys is None or (isinstance(rate, float) and rate == 0.0):
        return x
    keep_rate = jnp.float32(1.0) - rate
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, keep_rate, shape))(keys)
    return jnp.where(keep, x / keep_rate.astype(x.dtype), jnp.zeros((), x.dtype))


def remat(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """Returns the block, changed to compute activations again in the backward pass.

    Args:
      block: class of a module.
      policy: one of `REMAT`. "none" keeps all activations; "block" only the block's input (those of
        the image tower then also run in parts of the batch, see `efficientnet.EfficientNet`);
        "dots" also the results of matrix products (dense layers and 1x1 convolutions), so that
        only cheap operations run twice.
    """
    if policy == "none":
        return block
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    # prevent_cse would hinder XLA; inside of a scan or a block there is nothing to merge.
    return nn.remat(block, prevent_cse=False, policy=keep)


def stack_blocks(names: tuple[str, ...], stacked: str) -> tuple[Callable, Callable]:
    """Returns (stack, unstack) for `nn.map_variables`: children `names` <-> one child `stacked`.

    They let a scanned run of equal blocks keep one tensor per block in its variables, so that
    conversion, masks and LAMB's per-tensor norms see the same tree with and without scanning.
    """

    def stack(collections: dict) -> dict:
        return {name: gather(tree) for name, tree in collections.items()}

    def gather(tree: dict) -> dict:
        rest = {name: child for name, child in tree.items() if name not in names}
        blocks = [tree[name] for name in names if name in tree]
        if blocks:
            rest[stacked] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
        return rest

    def unstack(collections: dict) -> dict:
        return {name: scatter(tree) for name, tree in collections.items()}

    def scatter(tree: dict) -> dict:
        rest = {name: child for name, child in tree.items() if name != stacked}
        if stacked in tree:
            for i, name in enumerate(names):
                rest[name] = jax.tree.map(lambda leaf, i=i: leaf[i], tree[stacked])
        return rest

    return stack, unstack
