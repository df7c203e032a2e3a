"""Optimizers and schedules: LAMB as in the paper, AdamW, Lion, SGD; masks by name, one rule per
tower.

The temperature is a scalar and has its own rule: see `optim.temperature` in `config.py`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from align_jax import trees

# What learns by a rule of its own.
DUAL_ENCODER = ("image", "text", "temperature")
CLASSIFIER = ("image", "head")


def make_schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """Returns step -> learning rate: linear warm-up from 0 to the peak, then decay to 0 at `steps`.

    With the schedule "steps" the rate is multiplied by `decay_factor` after each `decay_every` of
    the steps that warm-up leaves, and does not end at 0.

    Args:
      config: group `optim`.
      steps: length of the run.
    """
    warmup, peak = config.warmup_steps, config.learning_rate
    if config.schedule == "linear":
        decay = optax.linear_schedule(peak, 0.0, steps - warmup)
    elif config.schedule == "steps":
        factors: dict[int, float] = {}
        for count in range(1, math.ceil(1 / config.decay_every)):
            end = round(count * config.decay_every * (steps - warmup))
            factors[end] = factors.get(end, 1.0) * config.decay_factor
        decay = optax.piecewise_constant_schedule(peak, factors)
    else:
        decay = optax.cosine_decay_schedule(peak, steps - warmup)
    if warmup == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def make_optimizer(
    config: ConfigDict, schedule: optax.Schedule, parts: Sequence[str] = DUAL_ENCODER
) -> optax.GradientTransformation:
    """Returns the optimizer of those `params` of a dual encoder, or of a classifier, that learn.

    Args:
      config: group `optim`. `no_decay` and `no_trust_ratio` are regexes on parameter names.
      schedule: step -> learning rate, multiplied per tower by `image_lr_multiplier` and
        `text_lr_multiplier`.
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
