"""What a configuration must not say, found before anything compiles: `validate`."""

import difflib
import math
import re
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from align_jax import losses
from align_jax.config import DURATIONS, check_keys, default_config, parse_duration
from align_jax.data import images
from align_jax.models import bert, classifier, dual_encoder, efficientnet, freeze, layers
from align_jax.storage import writing


def validate(config: ConfigDict, *, num_devices: int, num_processes: int = 1) -> None:
    """Raises ValueError, in one line that names the config path, if the config cannot work.

    Args:
      config: to check.
      num_devices: global number of devices.
      num_processes: that feed them.
    """
    check_keys(config, default_config(), "config")
    writing.check_local_values(config.to_dict(), "config")
    for path, allowed in _choices().items():
        _check_choice(config, path, allowed)
    for path in _POSITIVE:
        if not 0.0 < _number(config, path) < math.inf:
            raise ValueError(f"config.{path}={_get(config, path)} must be positive and finite.")
    for path in _RATES:
        if not 0.0 <= _get(config, path) < 1.0:
            raise ValueError(f"config.{path}={_get(config, path)} must lie in [0, 1).")
    for path in _NOT_NEGATIVE:
        if not 0.0 <= _number(config, path) < math.inf:
            raise ValueError(f"config.{path}={_get(config, path)} must be finite and not negative.")
    for path in ("optim.no_decay", "optim.no_trust_ratio", "optim.freeze", "lora.kernels"):
        _check_patterns(_get(config, path), path)
    if config.train.seed >= 2**32:
        raise ValueError(f"config.train.seed={config.train.seed} must be below 2**32.")
    _check_sources(config.data)
    _check_views(config.data)
    if config.task == "classify":
        _check_classify(config)
    if config.data.max_tokens < 3 or config.data.max_tokens > config.model.text.max_positions:
        raise ValueError(
            f"config.data.max_tokens={config.data.max_tokens} must lie in [3, "
            f"config.model.text.max_positions={config.model.text.max_positions}]."
        )
    if config.loss.kind == "sigmoid" and config.loss.label_smoothing:
        raise ValueError(
            f"config.loss.label_smoothing={config.loss.label_smoothing} is of the softmax; set it "
            "to 0 with config.loss.kind='sigmoid'."
        )
    if not math.isfinite(config.loss.bias_init):
        raise ValueError(f"config.loss.bias_init={config.loss.bias_init} must be finite.")
    _check_batch(config, num_devices, num_processes)
    if config.debug.nans and num_processes > 1:
        raise ValueError(
            f"config.debug.nans=True looks into one process, not {num_processes}; take the run up "
            "again with one, from the checkpoint before the NaN."
        )
    if config.lora.rank:
        _check_lora(config)
    _check_rates(config.optim)
    if all(type(_get(config, path)) is int for path in DURATIONS):
        _check_lengths(config)
    _check_learned(config)
    for name, entry in config.eval.evaluators.items():
        path = f"config.eval.evaluators.{name}.every_steps"
        every = entry.get("every_steps", 1)
        if parse_duration(every, path)[0] <= 0:
            raise ValueError(f"{path}={every!r} must be positive.")
    best = config.checkpoint.best
    evaluator, slash, metric = best.removeprefix("-").rpartition("/")
    if best and not (slash and metric and evaluator in config.eval.evaluators):
        names = ", ".join(config.eval.evaluators) or "none"
        raise ValueError(
            f"config.checkpoint.best={best!r} must be EVALUATOR/METRIC (or -EVALUATOR/METRIC, the "
            f"lowest) of config.eval.evaluators, which has: {names}."
        )
    if config.train.on_divergence == "rollback" and config.checkpoint.keep < 2:
        raise ValueError(
            "config.checkpoint.keep=1 with config.train.on_divergence='rollback': the newest "
            "checkpoint may be what made the loss diverge; keep 2 at least."
        )


def in_steps(config: ConfigDict, num_pairs: int | None) -> tuple[ConfigDict, list[str]]:
    """Returns the config with all durations in steps, and a line on each that had another unit.

    To the nearest step, but at least one where more than none is asked for.

    Args:
      config: validated.
      num_pairs: of its source, an epoch; None where that is not known.

    Raises:
      ValueError: epochs of a mixture or of an unknown source; durations that do not go together.
    """
    config, lines = config.copy_and_resolve_references(), []
    groups = {path: path.rpartition(".") for path in DURATIONS}
    groups |= {
        f"eval.evaluators.{name}.every_steps": (f"eval.evaluators.{name}", ".", "every_steps")
        for name, entry in config.eval.evaluators.items()
        if "every_steps" in entry
    }
    for path, (group, _, key) in groups.items():
        value = _get(config, path)
        if type(value) is int:
            continue
        number, unit = parse_duration(value, f"config.{path}")
        if unit == "epoch" and (config.data.mixture or num_pairs is None):
            why = "a mixture has epochs of each source" if num_pairs else "the data is not opened"
            raise ValueError(
                f"config.{path}={value!r}: {why}; give steps, or examples of the whole stream."
            )
        rows = {"step": config.train.batch_size, "example": 1, "epoch": num_pairs}[unit]
        steps = max(1, round(number * rows / config.train.batch_size)) if number else 0
        with _get(config, group).ignore_type():
            _get(config, group)[key] = steps
        lines.append(f"config.{path}: {value} are {steps} steps")
    _check_lengths(config)
    return config, lines


_POSITIVE = (
    "model.embed_dim",
    "model.text.max_positions",
    "model.bn_group_size",
    "data.vocab_size",
    "data.num_threads",
    "loss.tile_size",
    "loss.temperature_init",
    "optim.learning_rate",
    "optim.layer_decay",
    "optim.eps",
    "optim.decay_every",
    "lora.alpha",
    "train.batch_size",
    "train.steps",
    "train.microbatches",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "eval.every_steps",
    "eval.batch_size",
    "log.every_steps",
)
_RATES = (
    "model.image.drop_path_rate",
    "model.text.dropout_rate",
    "model.bn_decay",
    "loss.label_smoothing",
    "optim.b1",
    "optim.b2",
    "optim.decay_factor",
    "train.ema_decay",
)
_NOT_NEGATIVE = (
    "data.num_workers",
    "data.eval_image_size",
    "optim.warmup_steps",
    "optim.cooldown_steps",
    "optim.min_learning_rate",
    "optim.weight_decay",
    "optim.clip_norm",
    "optim.temperature_lr_multiplier",
    "optim.image_lr_multiplier",
    "optim.text_lr_multiplier",
    "lora.rank",
    "checkpoint.keep_every",
    "train.hang_s",
    "train.max_rollbacks",
    "train.seed",
    "train.spike",
)


def _choices() -> dict[str, tuple[Any, ...]]:
    return {
        "task": ("contrastive", "classify"),
        "init_towers": ("both", "image", "text"),
        "model.image.variant": tuple(efficientnet.VARIANTS),
        "model.text.variant": tuple(bert.VARIANTS),
        "model.dtype": ("bfloat16", "float32"),
        "model.padding": ("hf", "same"),
        "model.bn_mode": layers.BN_MODES,
        "model.remat": layers.REMAT,
        "data.resize": images.RESIZE_METHODS,
        "data.decode": images.DECODE_METHODS,
        "data.crop": images.CROPS,
        "loss.kind": tuple(losses.PARTS),
        "loss.form": losses.FORMS,
        "loss.mask_duplicates": tuple(losses.DUPLICATES),
        "loss.negatives": tuple(losses.NEGATIVES),
        "optim.name": ("lamb", "adamw", "lion", "sgd", "adafactor", "muon"),
        "optim.momentum_dtype": ("float32", "bfloat16"),
        "optim.schedule": ("linear", "cosine", "steps", "constant", "rsqrt"),
        "optim.temperature": ("same", "log", "fixed"),
        "train.on_divergence": ("stop", "rollback"),
    }


def _check_sources(data: ConfigDict) -> None:
    if bool(data.source) == bool(data.mixture):
        raise ValueError(
            f"config.data.source={data.source!r} and config.data.mixture of {len(data.mixture)} "
            "sources: give one of them, e.g. 'scenes?size=20000&seed=1'."
        )
    for name, entry in data.mixture.items():
        path = f"config.data.mixture.{name}"
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"{path}: names of a mixture are letters, digits and underscores.")
        if not entry.get("source"):
            raise ValueError(f"{path}.source is empty; name a dataset.")
        if not 0.0 < entry.get("weight", 1.0) < math.inf:
            raise ValueError(f"{path}.weight={entry.weight} must be positive and finite.")


def _check_views(data: ConfigDict) -> None:
    if data.crop == "random" and data.resize_size < data.image_size:
        raise ValueError(
            f"config.data.resize_size={data.resize_size} is smaller than the crop "
            f"config.data.image_size={data.image_size}."
        )
    evaluated = data.eval_image_size or data.image_size
    if data.resize_size < evaluated:
        raise ValueError(
            f"config.data.resize_size={data.resize_size} is smaller than the crop of evaluation, "
            f"{evaluated} (config.data.eval_image_size, or config.data.image_size where it is 0)."
        )
    for path in ("image_size", "eval_image_size"):
        if data[path] < 32 and (data[path] or path == "image_size"):
            raise ValueError(f"config.data.{path}={data[path]} is below the trunk's stride, 32.")
    if not 0.0 < data.crop_min_area <= 1.0:
        raise ValueError(f"config.data.crop_min_area={data.crop_min_area} must lie in (0, 1].")
    for path in ("color_jitter", "grayscale", "downscale"):
        if not 0.0 <= data[path] <= 1.0:
            raise ValueError(f"config.data.{path}={data[path]} must lie in [0, 1].")
    if data.crop == "inception" and data.decode != "full":
        raise ValueError(
            f"config.data.decode={data.decode!r} would leave too few pixels of small crops; use "
            "'full' with config.data.crop='inception'."
        )


def _check_classify(config: ConfigDict) -> None:
    # What means nothing to a classifier, and its value where nothing is asked for.
    of_pairs = {
        "init_towers": ("both", "image"),
        "data.mixture": ({},),
        "data.image_embeddings": ("",),
        "loss.kind": ("softmax",),
        "loss.mask_duplicates": ("none",),
        "loss.negatives": (1.0,),
        "optim.temperature": ("same", "log"),
        "optim.text_lr_multiplier": (1.0,),
        "lora.rank": (0,),
    }
    for path, allowed in of_pairs.items():
        value = _get(config, path)
        value = value.to_dict() if isinstance(value, ConfigDict) else value
        if value not in allowed:
            raise ValueError(
                f"config.{path}={value!r} has no meaning with config.task='classify'; leave it "
                f"{' or '.join(map(repr, allowed))}."
            )


def _check_batch(config: ConfigDict, num_devices: int, num_processes: int) -> None:
    batch, group = config.train.batch_size, config.model.bn_group_size
    if batch % num_devices:
        below = batch // num_devices * num_devices
        options = f"{below} or {below + num_devices}" if below else f"{num_devices}"
        raise ValueError(
            f"config.train.batch_size={batch} is not divisible by {num_devices} devices; "
            f"use {options}."
        )
    if batch % num_processes:
        raise ValueError(
            f"config.train.batch_size={batch} is not divisible by {num_processes} processes."
        )
    if config.model.bn_mode == "grouped" and batch % group:
        divisors = [n for n in range(2, min(batch, 64) + 1) if batch % n == 0]
        raise ValueError(
            f"config.model.bn_group_size={group} does not divide config.train.batch_size={batch}; "
            f"choose one of {divisors}."
        )
    parts = config.train.microbatches
    if parts > 1:
        if config.model.bn_mode == "global":
            raise ValueError(
                f"config.train.microbatches={parts} never sees the batch that "
                "config.model.bn_mode='global' normalises over; use 'grouped' or 'frozen'."
            )
        unit = math.lcm(num_devices, group if config.model.bn_mode == "grouped" else 1)
        if batch % (parts * unit):
            raise ValueError(
                f"config.train.microbatches={parts} does not cut config.train.batch_size={batch} "
                f"into parts divisible by {num_devices} devices and "
                f"config.model.bn_group_size={group}; use at most {max(1, batch // unit)}, and a "
                f"divisor of it."
            )
    if config.loss.form == "dense" and batch > 4096:
        raise ValueError(
            f"config.loss.form='dense' builds a {batch} x {batch} matrix; use 'sharded' or 'ring'."
        )


def _check_lengths(config: ConfigDict) -> None:
    """Raises ValueError if durations, all in steps, do not go together."""
    optim, steps = config.optim, config.train.steps
    if optim.warmup_steps + optim.cooldown_steps >= steps:
        cooldown = f" and cooldown_steps={optim.cooldown_steps}" if optim.cooldown_steps else ""
        raise ValueError(
            f"config.optim.warmup_steps={optim.warmup_steps}{cooldown} leaves nothing of "
            f"config.train.steps={steps}."
        )


def _check_rates(optim: ConfigDict) -> None:
    if optim.cooldown_steps and optim.schedule not in ("constant", "rsqrt"):
        raise ValueError(
            f"config.optim.cooldown_steps={optim.cooldown_steps} is of the schedules 'constant' "
            f"and 'rsqrt', not of {optim.schedule!r}."
        )
    if optim.min_learning_rate and not optim.cooldown_steps:
        if optim.schedule not in ("linear", "cosine"):
            raise ValueError(
                f"config.optim.min_learning_rate={optim.min_learning_rate} is reached at the end "
                f"of a cool-down; {optim.schedule!r} needs config.optim.cooldown_steps."
            )
    if optim.min_learning_rate > optim.learning_rate:
        raise ValueError(
            f"config.optim.min_learning_rate={optim.min_learning_rate} is above "
            f"config.optim.learning_rate={optim.learning_rate}."
        )
    for rule in optim.lr_rules:
        if not (
            isinstance(rule, tuple)
            and len(rule) == 2
            and isinstance(rule[0], str)
            and isinstance(rule[1], int | float)
            and 0 < rule[1] < math.inf
        ):
            raise ValueError(
                f"config.optim.lr_rules holds {rule!r}, not (regex, multiplier above 0); what is "
                "not to learn is named by config.optim.freeze."
            )
    _check_patterns([pattern for pattern, _ in optim.lr_rules], "optim.lr_rules")


def _check_lora(config: ConfigDict) -> None:
    on = f"config.lora.rank={config.lora.rank}"
    if not config.init_from or config.init_towers != "both":
        raise ValueError(
            f"{on} adapts a trained model; name it by config.init_from, with "
            "config.init_towers='both'."
        )
    # An adapter has no place for what else would change.
    if config.model.bn_mode != "frozen" or config.optim.temperature != "fixed":
        raise ValueError(
            f"{on} trains nothing but the adapter; set config.model.bn_mode='frozen' and "
            "config.optim.temperature='fixed'."
        )
    if config.optim.name == "lamb":
        raise ValueError(
            f"{on} starts with matrices of zeros, which config.optim.name='lamb', whose steps are "
            "proportional to a tensor's norm, hardly moves; use 'adamw' or 'lion'."
        )
    if not config.lora.kernels:
        raise ValueError(
            "config.lora.kernels=() names no kernel; config.lora.rank=0 is no adapter."
        )


def _check_learned(config: ConfigDict) -> None:
    frozen, cached = freeze.make_frozen(config.optim), config.data.image_embeddings
    ruled = [pattern for pattern, _ in config.optim.lr_rules]
    if not (frozen or ruled or config.lora.rank or cached):
        return
    # Either raises where a regex is found nowhere. No name depends on the vocabulary.
    if config.task == "classify":
        model = classifier.make_classifier(config.model, num_classes=2)
    else:
        model = dual_encoder.make_model(config.model, config.loss, vocab_size=1, lora=config.lora)
    shapes = dual_encoder.abstract_variables(model)
    freeze.check_found(frozen, shapes["params"], "optim.freeze")
    learned = freeze.learned(frozen, model.lora, shapes["params"])
    if not learned:
        raise ValueError(
            "config.optim freezes all: by freeze, image_lr_multiplier, text_lr_multiplier and "
            "temperature nothing is left to learn."
        )
    freeze.check_found(ruled, learned, "optim.lr_rules")
    of_image = [name for name in (learned | learned.get("lora", {})) if name.startswith("image")]
    if cached and of_image:
        raise ValueError(
            f"config.data.image_embeddings={cached} stand for an image tower and projection that "
            f"do not learn, but {of_image[0]} does; set config.optim.image_lr_multiplier=0."
        )
    if cached and config.data.mixture:
        raise ValueError(
            f"config.data.image_embeddings={cached} are those of one config.data.source; pack the "
            "sources of config.data.mixture into one."
        )


def _check_patterns(patterns: Iterable[str], path: str) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"config.{path} holds {pattern!r}, no regular expression: {error}."
            ) from error


def _check_choice(config: ConfigDict, path: str, allowed: Iterable[Any]) -> None:
    value = _get(config, path)
    if value in allowed:
        return
    names = [str(choice) for choice in allowed]
    close = difflib.get_close_matches(str(value), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"config.{path}={value!r} is unknown.{hint} Known: {', '.join(names)}.")


def _number(config: ConfigDict, path: str) -> float:
    """Returns the value of a number, of a duration in whatever unit it has."""
    value = _get(config, path)
    return parse_duration(value, f"config.{path}")[0] if path in DURATIONS else value


def _get(config: ConfigDict, path: str) -> Any:
    for key in path.split("."):
        config = config[key]
    return config
