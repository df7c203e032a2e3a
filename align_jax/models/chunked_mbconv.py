"""An MBConv block in train mode for CPUs: a few images at a time, so that they stay in the cache.

On a CPU a block costs what the traffic of its expanded maps costs. XLA runs one operation after the
other over the whole batch, keeps several versions of a map for the backward pass, and computes
chains of cheap operations anew for each of their consumers. Here a pass is a loop over chunks of
images, cut only where BatchNorm must have seen its whole group:

    forward    x -> h (expand)    h -> d (depthwise)    d -> p (squeeze-excite, project)
    backward   d, p, dy -> g      h, d, g -> g'         x, h, g' -> dx

g and g' are gradients at the results of BatchNorm. Kept for the backward pass are x, h, d and p.
Same numbers as `efficientnet.MBConv`, up to rounding.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from align_jax.models import layers, native

# Of the expanded maps of a chunk; with what is computed from them they fill a core's L2 cache.
_CHUNK_BYTES = 512 * 1024

Norm = tuple[jax.Array, jax.Array]  # mean and variance, or two sums, float32 [groups or chunks, C]


@dataclasses.dataclass(frozen=True)
class Block:
    """What does not change from step to step.

    Attributes:
      stride, padding: of the depthwise convolution.
      activation: key of `layers.ACTIVATIONS`.
      group: images of a BatchNorm group; divides the batch.
      eps: of BatchNorm.
      dtype: of activations and products.
      native: whether depthwise convolutions are those of `native`.
    """

    stride: int
    padding: layers.Padding
    activation: str
    group: int
    eps: float
    dtype: jnp.dtype
    native: bool = False

    def dense(self, kernel: jax.Array, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        y = layers.matmul(x, kernel.astype(self.dtype))
        return y if bias is None else y + bias.astype(self.dtype)

    def activate(self, x: jax.Array) -> jax.Array:
        return layers.ACTIVATIONS[self.activation](x)

    def normalise(self, params: dict, x: jax.Array, mean: jax.Array, var: jax.Array) -> jax.Array:
        factor = jax.lax.rsqrt(var + self.eps) * params["scale"]
        return ((x.astype(jnp.float32) - mean) * factor + params["bias"]).astype(self.dtype)

    def enter(self, params: dict, h: jax.Array, *norm: jax.Array) -> jax.Array:
        """Returns what the depthwise convolution reads; without `expand` h is that."""
        return self.activate(self.normalise(params["expand_bn"], h, *norm)) if norm else h

    def depthwise(self, kernel: jax.Array, x: jax.Array) -> jax.Array:
        conv = native.depthwise_conv if self.native else layers.shifted_depthwise_conv
        return conv(x, kernel.astype(self.dtype), self.stride, self.padding)

    def project(self, params: dict, x: jax.Array) -> jax.Array:
        x = self.activate(x)
        s = x.astype(jnp.float32).mean((1, 2)).astype(x.dtype)
        reduce, expand = params["squeeze"]["reduce"], params["squeeze"]["expand"]
        s = self.activate(self.dense(reduce["kernel"], s, reduce["bias"]))
        s = jax.nn.sigmoid(self.dense(expand["kernel"], s, expand["bias"]))
        return self.dense(params["project"]["kernel"], x * s[:, None, None, :])

    def input_gradient(
        self, params: dict, x: jax.Array, g: jax.Array, norm: Norm, means: Norm
    ) -> jax.Array:
        """Returns the gradient at x of a chunk, g the one at `normalise(x)`.

        `means` are those over the group of g and of g times the normalised x.
        """
        (mean, var), (mean_g, mean_gx) = norm, means
        inverse = jax.lax.rsqrt(var + self.eps)
        normalised = (x.astype(jnp.float32) - mean) * inverse
        dx = g.astype(jnp.float32) - mean_g - normalised * mean_gx
        return (dx * (inverse * params["scale"])).astype(self.dtype)

    def gradient_sums(self, x: jax.Array, g: jax.Array, norm: Norm) -> Norm:
        """Returns the sums over a chunk that `input_gradient` needs, and the parameters."""
        g = g.astype(jnp.float32)
        centred = x.astype(jnp.float32) - norm[0]
        inverse = jax.lax.rsqrt(norm[1] + self.eps)
        return g.sum((0, 1, 2)), (g * centred).sum((0, 1, 2)) * inverse


def run(
    block: Block, constrain: layers.Constrain, params: dict, x: jax.Array
) -> tuple[jax.Array, dict]:
    """As `mbconv`, each device on the groups that it holds."""
    block = dataclasses.replace(block, native=constrain.native)

    def local(params: dict, x: jax.Array) -> tuple[jax.Array, dict]:
        y, moments = mbconv(block, params, x)
        return y, jax.tree.map(lambda m: m[None], moments)

    y, moments = constrain.on_each_device(local)(params, x)
    return y, jax.tree.map(lambda m: m.mean(0), moments)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def mbconv(block: Block, params: dict, x: jax.Array) -> tuple[jax.Array, dict]:
    """Returns (maps [B, H', W', out] before drop path and residual, moments of the batch).

    The moments are those of `layers.GroupedBatchNorm`, float32 [C], and have no gradient.

    Args:
      block: its constants.
      params: of an `efficientnet.MBConv`.
      x: [B, H, W, in] in the block's dtype.
    """
    return _forward(block, params, x)[0]


def _forward(block: Block, params: dict, x: jax.Array) -> tuple[tuple[jax.Array, dict], tuple]:
    loop = _Loop(block, params, x)
    norms: dict[str, Norm] = {}
    h = x
    if "expand" in params:
        kernel = params["expand"]["kernel"]
        with jax.named_scope("expand"):
            h, norms["expand_bn"] = loop.with_moments(lambda x: block.dense(kernel, x), x)

    def depthwise(h: jax.Array, *norm: jax.Array) -> jax.Array:
        return block.depthwise(params["depthwise"]["kernel"], block.enter(params, h, *norm))

    with jax.named_scope("depthwise"):
        d, norms["depthwise_bn"] = loop.with_moments(depthwise, h, *norms.get("expand_bn", ()))

    def project(d: jax.Array, *norm: jax.Array) -> jax.Array:
        return block.project(params, block.normalise(params["depthwise_bn"], d, *norm))

    with jax.named_scope("project"):
        p, norms["project_bn"] = loop.with_moments(project, d, *norms["depthwise_bn"])

    def normalise(_: None, p: jax.Array, *norm: jax.Array) -> tuple[None, jax.Array]:
        return None, block.normalise(params["project_bn"], p, *norm)

    _, y = loop.run(normalise, None, p, *norms["project_bn"])
    moments = {
        name: {"mean": mean.mean(0), "var": var.mean(0)} for name, (mean, var) in norms.items()
    }
    return (loop.join(y), moments), (params, x, h, d, p, norms)


def _backward(
    block: Block, residuals: tuple, cotangents: tuple[jax.Array, dict]
) -> tuple[dict, jax.Array]:
    params, x, h, d, p, norms = residuals
    dy, _ = cotangents
    loop = _Loop(block, params, x)
    gradients: dict[str, dict] = {}

    def means_of_group(name: str, sums: Norm, maps: jax.Array) -> Norm:
        """Of a BatchNorm, from the sums of the chunks; keeps the gradients of its parameters."""
        total, total_x = (loop.per_group(a) for a in sums)
        gradients[name] = {"scale": total_x.sum(0), "bias": total.sum(0)}
        count = block.group * maps.shape[1] * maps.shape[2]
        return total / count, total_x / count

    def sums_of_dy(_: None, p: jax.Array, dy: jax.Array, *norm: jax.Array) -> tuple[None, Norm]:
        return None, block.gradient_sums(p, dy, norm)

    _, sums = loop.run(sums_of_dy, None, p, dy, *norms["project_bn"])
    p_means = means_of_group("project_bn", sums, p)
    ends = {name: params[name] for name in ("squeeze", "project")}

    def project(total: dict, d: jax.Array, p: jax.Array, dy: jax.Array, *rows: jax.Array) -> tuple:
        d_norm, p_norm, p_means = rows[:2], rows[2:4], rows[4:]
        dp = block.input_gradient(params["project_bn"], p, dy, p_norm, p_means)
        normalised = block.normalise(params["depthwise_bn"], d, *d_norm)
        part, g = jax.vjp(block.project, ends, normalised)[1](dp)
        return jax.tree.map(jnp.add, total, part), (g, block.gradient_sums(d, g, d_norm))

    rows = (*norms["depthwise_bn"], *norms["project_bn"], *p_means)
    part, (g, sums) = loop.run(project, _zeros(ends), d, p, dy, *rows)
    gradients |= part
    d_means = means_of_group("depthwise_bn", sums, d)
    kernel = params["depthwise"]["kernel"]

    def depthwise(
        total: jax.Array, h: jax.Array, d: jax.Array, g: jax.Array, *rows: jax.Array
    ) -> tuple:
        d_norm, d_means, h_norm = rows[:2], rows[2:4], rows[4:]
        dd = block.input_gradient(params["depthwise_bn"], d, g, d_norm, d_means)
        if not h_norm:
            part, dx = jax.vjp(block.depthwise, kernel, h)[1](dd)
            return total + part, dx
        normalised = block.normalise(params["expand_bn"], h, *h_norm)
        entered, activation_pull = jax.vjp(block.activate, normalised)
        part, da = jax.vjp(block.depthwise, kernel, entered)[1](dd)
        (g,) = activation_pull(da)
        return total + part, (g, block.gradient_sums(h, g, h_norm))

    rows = (*norms["depthwise_bn"], *d_means, *norms.get("expand_bn", ()))
    part, results = loop.run(depthwise, _zeros(kernel), h, d, loop.join(g), *rows)
    gradients["depthwise"] = {"kernel": part}
    if "expand" not in params:
        return gradients, loop.join(results)
    g, sums = results
    h_means = means_of_group("expand_bn", sums, h)
    kernel = params["expand"]["kernel"]

    def expand(
        total: jax.Array, x: jax.Array, h: jax.Array, g: jax.Array, *rows: jax.Array
    ) -> tuple:
        dh = block.input_gradient(params["expand_bn"], h, g, rows[:2], rows[2:])
        part, dx = jax.vjp(block.dense, kernel, x)[1](dh)
        return total + part, dx

    rows = (*norms["expand_bn"], *h_means)
    part, dx = loop.run(expand, _zeros(kernel), x, h, loop.join(g), *rows)
    gradients["expand"] = {"kernel": part}
    return gradients, loop.join(dx)


mbconv.defvjp(_forward, _backward)


def _zeros(tree: dict | jax.Array) -> dict | jax.Array:
    return jax.tree.map(jnp.zeros_like, tree)


class _Loop:
    """Runs passes over a batch, some images of one BatchNorm group at a time."""

    def __init__(self, block: Block, params: dict, x: jax.Array):
        channels = params["depthwise"]["kernel"].shape[-1]
        image_bytes = x.shape[1] * x.shape[2] * channels * x.dtype.itemsize
        size = max(1, min(block.group, _CHUNK_BYTES // image_bytes))
        while block.group % size:
            size -= 1
        self._size, self._count = size, x.shape[0] // size
        self._groups = x.shape[0] // block.group

    def run(self, body: Callable, carry: Any, *arrays: jax.Array) -> tuple:
        """Scans over chunks of maps [B, H, W, C], with the row of its group of those [groups, C].

        Returns (carry, results of the chunks).
        """
        parts = [
            a.reshape(self._count, self._size, *a.shape[1:])
            if a.ndim == 4
            else jnp.repeat(a, self._count // self._groups, 0)
            for a in arrays
        ]
        return jax.lax.scan(lambda carry, part: body(carry, *part), carry, parts)

    def join(self, maps: jax.Array) -> jax.Array:
        return maps.reshape(-1, *maps.shape[2:])

    def per_group(self, sums: jax.Array) -> jax.Array:
        return sums.reshape(self._groups, -1, sums.shape[-1]).sum(1)

    def with_moments(self, fn: Callable, *arrays: jax.Array) -> tuple[jax.Array, Norm]:
        """Returns (fn of the chunks [B, ...], its mean and variance in each group)."""

        def body(_: None, *part: jax.Array) -> tuple:
            y = fn(*part)
            y32 = y.astype(jnp.float32)
            mean = y32.mean((0, 1, 2))
            return None, (y, mean, jnp.square(y32 - mean).mean((0, 1, 2)))

        _, (y, means, variances) = self.run(body, None, *arrays)
        means, variances = (a.reshape(self._groups, -1, a.shape[-1]) for a in (means, variances))
        mean = means.mean(1)
        # Chunks are equally large: the variance of a group is theirs and that of their means.
        var = variances.mean(1) + jnp.square(means - mean[:, None]).mean(1)
        return self.join(y), (mean, var)
