"""Optimizers and schedules: LAMB as in the paper, AdamW, Lion, SGD, Adafactor, Muon; rules by name.

The temperature is a scalar and has its own rule: see `optim.temperature` in `config.py`.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from ml_collections import ConfigDict

from align_jax import trees

# What learns by a rule of its own.
DUAL_ENCODER = ("image", "text", "temperature")
CLASSIFIER = ("image", "head")


def make_schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """Returns step -> learning rate: linear warm-up from 0 to the peak, then one of five courses.

    "linear" and "cosine" fall to `min_learning_rate` at `steps`. "constant" stays and "rsqrt" falls
    as one over the root of the step until `cooldown_steps` before the end, from where both go
    linearly to `min_learning_rate`.

    With the schedule "steps" the rate is multiplied by `decay_factor` after each `decay_every` of
    the steps that warm-up leaves, and does not end at 0.

    Args:
      config: group `optim`.
      steps: length of the run.
    """
    warmup, peak, least = config.warmup_steps, config.learning_rate, config.min_learning_rate
    cooldown = config.cooldown_steps
    stable = steps - warmup - cooldown
    if config.schedule == "linear":
        parts = [optax.linear_schedule(peak, least, steps - warmup)]
    elif config.schedule == "cosine":
        parts = [optax.cosine_decay_schedule(peak, steps - warmup, least / peak)]
    elif config.schedule == "steps":
        factors: dict[int, float] = {}
        for count in range(1, math.ceil(1 / config.decay_every)):
            at = round(count * config.decay_every * (steps - warmup))
            factors[at] = factors.get(at, 1.0) * config.decay_factor
        parts = [optax.piecewise_constant_schedule(peak, factors)]
    else:
        course, end = optax.constant_schedule(peak), peak
        if config.schedule == "rsqrt":
            start = max(warmup, 1)
            end = peak * math.sqrt(start / (start + stable))

            def course(step: jax.Array) -> jax.Array:
                return peak * jnp.sqrt(start / (start + step))

        parts = [course]
        if cooldown:
            parts.append(optax.linear_schedule(end, least, cooldown))
    ends = [warmup + stable] if len(parts) > 1 else []
    if warmup:
        parts, ends = [optax.linear_schedule(0.0, peak, warmup), *parts], [warmup, *ends]
    return optax.join_schedules(parts, ends) if ends else parts[0]


def make_optimizer(
    config: ConfigDict, schedule: optax.Schedule, parts: Sequence[str] = DUAL_ENCODER
) -> optax.GradientTransformation:
    """Returns the optimizer of those `params` of a dual encoder, or of a classifier, that learn.

    Args:
      config: group `optim`. `no_decay` and `no_trust_ratio` are regexes on parameter names.
      schedule: step -> learning rate, multiplied per tower by `image_lr_multiplier` and
        `text_lr_multiplier`, per layer by powers of `layer_decay`, and by `lr_rules`.
      parts: `DUAL_ENCODER` or `CLASSIFIER`.

    Source: LAMB, You et al. 2020, with the masks of kakaobrain/coyo-align: BatchNorm scale and bias
    take a plain Adam update, all other tensors decay and take the trust ratio.
    """
    rules = {
        "image": _rule(config, schedule, config.image_lr_multiplier),
        "text": _rule(config, schedule, config.text_lr_multiplier),
        "temperature": _temperature_rule(config, schedule),
        "head": _rule(config, schedule, 1.0),
    }
    rules = {part: rules[part] for part in parts}
    optimizer = optax.partition(rules, lambda params: trees.map_named(_label, params))
    if config.lr_rules or config.layer_decay != 1.0:
        optimizer = optax.chain(optimizer, _scale_by_name(config))
    if config.clip_norm:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    return optimizer


def in_log_space(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns a transformation that applies `inner` to the logarithm of positive parameters.

    `inner` sees the gradient with respect to log p and its update u makes p <- p * exp(u), so that
    p stays positive and moves by the same factor at every magnitude.
    """

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        log_gradients = jax.tree.map(lambda g, p: g * p, gradients, params)
        steps, state = inner.update(log_gradients, state, jax.tree.map(jnp.log, params))
        return jax.tree.map(lambda u, p: p * jnp.expm1(u), steps, params), state

    return optax.GradientTransformation(inner.init, update)


def _label(name: str, _: jax.Array) -> str:
    """Returns the rule that a parameter learns by."""
    if name == "bias":  # of the sigmoid loss: learns as any tensor of the text side does
        return "text"
    if name == "temperature":
        return name
    return name.removeprefix("lora/").split("/")[0].split("_")[0]


def _rule(
    config: ConfigDict, schedule: optax.Schedule, multiplier: float
) -> optax.GradientTransformation:
    dtype = config.momentum_dtype
    if config.name == "sgd":
        direction = optax.trace(config.b1, accumulator_dtype=dtype)
    elif config.name == "lion":
        direction = optax.scale_by_lion(config.b1, config.b2, mu_dtype=dtype)
    elif config.name == "adafactor":
        direction = _adafactor(config)
    elif config.name == "muon":
        direction = _muon(config)
    else:
        direction = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=dtype)
    parts = [direction]
    if config.weight_decay:
        decay = optax.add_decayed_weights(config.weight_decay, _unless(config.no_decay))
        # Of SGD the decay is a part of the gradient, so the momentum sees it too.
        parts.insert(0 if config.name == "sgd" else 1, decay)
    if config.name == "lamb":
        mask = _unless(config.no_trust_ratio)
        parts.append(optax.masked(optax.scale_by_trust_ratio(), mask))
    parts.append(_scale_by_rate(schedule, multiplier))
    return optax.chain(*parts)


def _adafactor(config: ConfigDict) -> optax.GradientTransformation:
    """Factored second moments with updates clipped at RMS 1, and a first moment if `b1` is not 0.

    The rate is not relative to the size of a parameter. Source: Shazeer and Stern 2018, in the form
    of Zhai et al. 2022 (scaling vision transformers).
    """
    parts = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
    if config.b1:
        parts.append(
            optax.ema(config.b1, debias=False, accumulator_dtype=jnp.dtype(config.momentum_dtype))
        )
    return optax.chain(*parts)


def _muon(config: ConfigDict) -> optax.GradientTransformation:
    """Orthogonalised momentum (0.95) for matrices inside the towers, Adam for all else.

    Updates of a matrix are scaled to the RMS of 0.2 that those of AdamW have: one learning rate and
    decay serve both. Source: Jordan et al. 2024; Liu et al. 2025.
    """

    def kind(name: str, leaf: jax.Array) -> str:
        in_tower = re.search("^(image|text)/.*/kernel$", name)
        return "matrix" if in_tower and len(leaf.shape) == 2 else "other"

    def to_rms(updates: Any) -> Any:
        return jax.tree.map(lambda u: 0.2 * math.sqrt(max(u.shape)) * u, updates)

    def all_matrices(updates: Any) -> Any:
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), updates)

    dtype = config.momentum_dtype
    matrix = optax.chain(
        optax.contrib.scale_by_muon(
            eps=config.eps, mu_dtype=dtype, weight_dimension_numbers=all_matrices
        ),
        optax.stateless(lambda updates, _: to_rms(updates)),
    )
    other = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=dtype)
    return optax.partition(
        {"matrix": matrix, "other": other}, lambda params: trees.map_named(kind, params)
    )


def _scale_by_name(config: ConfigDict) -> optax.GradientTransformation:
    """Multiplies updates by `lr_rules` and `layer_decay`; that of the temperature stays."""

    def update(updates: Any, _: Any) -> Any:
        names = " ".join(name for name, _ in trees.named_leaves(updates))
        top = 1 + max(map(int, re.findall(r"text/encoder/layer(\d+)/", names)), default=0)

        def multiplier(name: str) -> float:
            if name in ("temperature", "bias"):
                return 1.0
            below = _layers_below(name.removeprefix("lora/"), top)
            given = (value for pattern, value in config.lr_rules if re.search(pattern, name))
            return next(given, 1.0) * config.layer_decay**below

        return trees.map_named(lambda name, u: multiplier(name) * u, updates)

    return optax.stateless(update)


def _layers_below(name: str, text_layers: int) -> int:
    """Returns how many layers a parameter is below the projection of its tower."""
    if name.startswith(("image_projection/", "text_projection/", "head/")):
        return 0
    if name.startswith("image/"):  # seven stages over the stem
        stage = re.match(r"image/stage(\d)/", name)
        return 8 - (int(stage[1]) if stage else 0)
    layer = re.match(r"text/encoder/layer(\d+)/", name)
    return text_layers - int(layer[1]) if layer else text_layers + 1


def _temperature_rule(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    multiplier = config.temperature_lr_multiplier
    if config.temperature == "same":
        return _rule(config, schedule, multiplier)
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    return in_log_space(optax.chain(adam, _scale_by_rate(schedule, multiplier)))


def _scale_by_rate(schedule: optax.Schedule, multiplier: float) -> optax.GradientTransformation:
    return optax.scale_by_learning_rate(lambda step: multiplier * schedule(step))


def _unless(patterns: Sequence[str]) -> Callable[[Any], Any]:
    """Returns a mask: params -> tree of False where a pattern is found in the name."""
    return lambda params: trees.map_named(
        lambda name, _: not trees.match_any(patterns, name), params
    )
