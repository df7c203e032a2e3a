"""Low-rank adaptation (LoRA): kernels W + alpha / rank * A B of which only A and B are trained.

`params` of an adapted model have one more subtree, `lora`, with A [in, rank] and B [rank, out] at
the path of each adapted kernel: `lora/text/encoder/layer0/query/a`. A kernel is adapted by being
replaced before the towers see it, so that every path through them works as it does without.
Source: Hu et al. 2021.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from align_jax import trees

_SUBTREE = "lora"


@dataclasses.dataclass(frozen=True)
class Lora:
    """What is adapted, and how.

    Attributes:
      rank: of A B.
      alpha: A B is scaled by alpha / rank.
      kernels: regexes on names such as "text/encoder/layer0/query/kernel", see `matches`.
    """

    rank: int
    alpha: float
    kernels: tuple[str, ...]


def make_lora(config: ConfigDict) -> Lora | None:
    """Returns what the group `lora` of a validated config describes; None at rank 0."""
    return Lora(config.rank, config.alpha, tuple(config.kernels)) if config.rank else None


def matches(lora: Lora, params: dict) -> dict[str, Any]:
    """Returns {name: leaf} of the kernels [in, out] in which a regex is found.

    Dense layers and 1x1 convolutions have such a kernel; other convolutions are not adapted.

    Args:
      lora: whose regexes.
      params: arrays or shapes.

    Raises:
      ValueError: a regex is found in no name.
    """
    known = {
        name: leaf
        for name, leaf in trees.named_leaves(base_of(params))
        if name.endswith("/kernel") and len(leaf.shape) == 2
    }
    for pattern in lora.kernels:
        if not any(trees.match_any([pattern], name) for name in known):
            raise ValueError(
                f"config.lora.kernels: {pattern!r} is in the name of none of the {len(known)} "
                f"matrices, such as {', '.join(sorted(known)[:: max(1, len(known) // 3)][:3])}."
            )
    return {name: leaf for name, leaf in known.items() if trees.match_any(lora.kernels, name)}


def with_shapes(lora: Lora, params: dict) -> dict:
    """Returns shapes of the parameters with those of A and B, float32.

    Raises:
      ValueError: see `matches`.
    """
    flat = {}
    for name, leaf in matches(lora, params).items():
        inputs, outputs = leaf.shape
        flat[name.removesuffix("/kernel")] = {
            "a": jax.ShapeDtypeStruct((inputs, lora.rank), jnp.float32),
            "b": jax.ShapeDtypeStruct((lora.rank, outputs), jnp.float32),
        }
    return with_factors(params, flat)


def with_factors(params: dict, factors: dict[str, dict]) -> dict:
    """Returns the parameters with {name of a layer: {"a", "b"}} as the subtree `lora`."""
    return params | {_SUBTREE: trees.nested(factors)}


def factors_of(params: dict) -> dict[str, dict]:
    """Returns {name of a layer: {"a", "b"}}, the inverse of `with_factors`; {} where none are."""
    found: dict[str, dict] = {}
    for name, leaf in trees.named_leaves(params.get(_SUBTREE, {})):
        layer, factor = name.rsplit("/", 1)
        found.setdefault(layer, {})[factor] = leaf
    return found


def base_of(params: dict) -> dict:
    """Returns the parameters without A and B."""
    return {name: tree for name, tree in params.items() if name != _SUBTREE}


def merge(lora: Lora | None, params: dict) -> dict:
    """Returns the parameters of a model without `lora` that computes the same.

    Where B is zero, the kernels are bitwise those of the base.
    """
    if lora is None:
        return params
    scale = jnp.float32(lora.alpha / lora.rank)

    def adapt(tree: dict, factors: dict) -> dict:
        if "kernel" in tree:
            a, b = factors["a"], factors["b"]
            change = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
            return tree | {"kernel": tree["kernel"] + scale * change}
        return tree | {name: adapt(tree[name], part) for name, part in factors.items()}

    return adapt(base_of(params), params[_SUBTREE])


def is_factor(name: str) -> bool:
    """Returns whether the name is that of an A or B."""
    return name.startswith(f"{_SUBTREE}/")
