"""The configuration: every key with its default and meaning, loading, and validation.

An experiment file (`configs/*.py`) starts from `default_config()`, changes what it needs and
returns it. `validate` rejects unknown keys and impossible combinations before anything compiles.
"""

import difflib
import json
import math
import os
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags


def default_config() -> ConfigDict:
    """Returns the base configuration: the paper's recipe for EfficientNet-B7 + BERT-base.

    Source of the values: Jia et al. 2021; where the paper is silent, kakaobrain/coyo-align.
    """
    c = ConfigDict()

    c.model = model = ConfigDict()
    model.image = ConfigDict()
    model.image.variant = "b7"  # key of models/efficientnet.VARIANTS
    model.image.drop_path_rate = 0.2  # stochastic depth of the last block
    model.text = ConfigDict()
    model.text.variant = "base"  # key of models/bert.VARIANTS
    model.text.dropout_rate = 0.1
    model.text.max_positions = 512
    model.embed_dim = 640
    model.dtype = "bfloat16"  # of convolutions and matmuls: bfloat16 or float32
    model.padding = "hf"  # "hf" (Hugging Face, COYO) or "same" (TensorFlow's SAME)
    model.bn_mode = "grouped"  # "grouped", "global" or "frozen"
    model.bn_group_size = 16  # images per group, whatever the number of devices
    model.bn_decay = 0.99  # weight of the old running statistics
    model.remat = "none"  # "block": recompute activations block by block
    model.scan_layers = False  # compile equal blocks once; same numbers

    c.data = data = ConfigDict()
    data.source = ""  # see data/sources.open_source
    data.image_size = 289  # pixels, side of the crop the model sees
    data.resize_size = 346  # pixels, side before the crop
    data.resize = "tf"  # "tf" (COYO) or "pil" (Hugging Face processor)
    data.flip = True  # random horizontal flip
    data.max_tokens = 64
    data.tokenizer = ""  # folder or vocab.txt; "" trains one on the source's captions
    data.vocab_size = 100_000  # of the tokenizer to train
    data.num_threads = 8  # decode threads per process
    data.num_workers = 0  # decode processes; 0 decodes in threads only

    c.loss = loss = ConfigDict()
    loss.form = "sharded"  # "sharded" or "dense"
    loss.label_smoothing = 0.1
    loss.temperature_init = 1.0
    loss.mask_duplicates = "none"  # drop false negatives: "caption", "image" or "both"

    c.optim = optim = ConfigDict()
    optim.name = "lamb"  # "lamb", "adamw" or "lion"
    optim.learning_rate = 1e-3  # peak
    optim.warmup_steps = 10_000  # linear from 0; the first update has rate 0
    optim.schedule = "linear"  # decay to 0: "linear" or "cosine"
    optim.weight_decay = 1e-5
    optim.b1 = 0.9
    optim.b2 = 0.999
    optim.eps = 1e-6
    optim.clip_norm = 0.0  # global gradient norm; 0 does not clip
    # Regexes on parameter names. COYO: BatchNorm scale and bias neither decay nor take LAMB's trust
    # ratio; everything else, the temperature included, does both.
    optim.no_decay = ("_bn/",)
    optim.no_trust_ratio = ("_bn/",)
    # How the temperature T learns: "same" as every tensor (under LAMB one step changes it by a
    # factor of exactly 1 -+ rate, so short runs cannot reach 1/64); "log" (Adam on log T at
    # temperature_lr_multiplier x rate, stays positive); "fixed".
    optim.temperature = "same"
    optim.temperature_lr_multiplier = 1.0
    optim.image_lr_multiplier = 1.0  # 0 freezes the tower (locked-image tuning)
    optim.text_lr_multiplier = 1.0

    c.mesh = ConfigDict()
    c.mesh.data = -1  # -1: all devices that fsdp leaves
    c.mesh.fsdp = 1  # devices over which large parameters are split

    c.train = ConfigDict()
    c.train.batch_size = 16_384  # global, in pairs
    c.train.steps = 1_200_000
    c.train.seed = 0

    c.checkpoint = ConfigDict()
    c.checkpoint.every_steps = 5_000
    c.checkpoint.keep = 3

    c.eval = ConfigDict()
    c.eval.every_steps = 10_000
    c.eval.batch_size = 256
    # name -> {"type": "retrieval" | "zeroshot", "source": ..., ...}; see evals.make_evaluators
    c.eval.evaluators = ConfigDict()

    c.log = ConfigDict()
    c.log.every_steps = 100
    return c


def load_config(arguments: Sequence[str]) -> ConfigDict:
    """Returns the config of `--config FILE[:ARG] [--config.key=value ...]`, not yet validated.

    Raises:
      ValueError: no config, a file that cannot be loaded, an unknown key or a value of wrong type.
    """
    for argument in arguments:
        if argument.startswith("--config="):
            # Experiment files may start from one another: `from configs.x import get_config`.
            file = os.path.abspath(argument.removeprefix("--config=").split(":")[0])
            folder = os.path.dirname(os.path.dirname(file))
            if folder not in sys.path:
                sys.path.append(folder)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
    try:
        rest = values(["align", *arguments])
    except (flags.Error, KeyError, AttributeError, TypeError, OSError) as error:
        message = str(error).strip().strip("'\"").splitlines()
        raise ValueError(message[0] if message else repr(error)) from error
    if len(rest) > 1:
        raise ValueError(f"unrecognised argument {rest[1]!r}; overrides look like --config.a.b=1.")
    if values["config"].value is None:
        raise ValueError("--config is missing, e.g. --config configs/quickstart.py")
    return values["config"].value


def to_json(config: ConfigDict) -> str:
    """Returns the config as indented JSON with sorted keys; tuples become lists."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """Returns the config that `to_json` wrote; lists become tuples again."""

    def tuples(value):
        if isinstance(value, dict):
            return {key: tuples(item) for key, item in value.items()}
        return tuple(tuples(item) for item in value) if isinstance(value, list) else value

    return ConfigDict(tuples(json.loads(text)))


def validate(config: ConfigDict, *, num_devices: int, num_processes: int = 1) -> None:
    """Raises ValueError, in one line that names the config path, if the config cannot work.

    Args:
      config: to check.
      num_devices: global number of devices.
      num_processes: that feed them.
    """
    _check_keys(config, default_config(), "config")
    for path, allowed in _choices().items():
        _check_choice(config, path, allowed)
    for path in _POSITIVE:
        if not _get(config, path) > 0:
            raise ValueError(f"config.{path}={_get(config, path)} must be positive.")
    for path in _RATES:
        if not 0.0 <= _get(config, path) < 1.0:
            raise ValueError(f"config.{path}={_get(config, path)} must lie in [0, 1).")
    for path in _NOT_NEGATIVE:
        if not 0.0 <= _get(config, path) < math.inf:
            raise ValueError(f"config.{path}={_get(config, path)} must not be negative.")
    if not config.data.source:
        raise ValueError(
            "config.data.source is empty; name a dataset, e.g. 'scenes?size=20000&seed=1'."
        )
    if config.data.resize_size < config.data.image_size:
        raise ValueError(
            f"config.data.resize_size={config.data.resize_size} is smaller than the crop "
            f"config.data.image_size={config.data.image_size}."
        )
    if config.data.image_size < 32:
        raise ValueError(
            f"config.data.image_size={config.data.image_size} is below the trunk's stride, 32."
        )
    if config.data.max_tokens < 3 or config.data.max_tokens > config.model.text.max_positions:
        raise ValueError(
            f"config.data.max_tokens={config.data.max_tokens} must lie in [3, "
            f"config.model.text.max_positions={config.model.text.max_positions}]."
        )
    _check_batch(config, num_devices, num_processes)
    if config.optim.warmup_steps >= config.train.steps:
        raise ValueError(
            f"config.optim.warmup_steps={config.optim.warmup_steps} leaves nothing of "
            f"config.train.steps={config.train.steps}."
        )
    if config.optim.image_lr_multiplier == 0 and config.model.bn_mode != "frozen":
        raise ValueError(
            "config.optim.image_lr_multiplier=0 locks the image tower, but its BatchNorm "
            "statistics would still move; set config.model.bn_mode='frozen'."
        )


_POSITIVE = (
    "model.embed_dim",
    "model.text.max_positions",
    "model.bn_group_size",
    "data.vocab_size",
    "data.num_threads",
    "loss.temperature_init",
    "optim.learning_rate",
    "optim.eps",
    "train.batch_size",
    "train.steps",
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
)
_NOT_NEGATIVE = (
    "data.num_workers",
    "optim.warmup_steps",
    "optim.weight_decay",
    "optim.clip_norm",
    "optim.temperature_lr_multiplier",
    "optim.image_lr_multiplier",
    "optim.text_lr_multiplier",
    "train.seed",
)


def _choices() -> dict[str, tuple[str, ...]]:
    # Imported late: this module is read by tools that never build a model.
    from align_jax import losses
    from align_jax.models import bert, efficientnet, layers

    return {
        "model.image.variant": tuple(efficientnet.VARIANTS),
        "model.text.variant": tuple(bert.VARIANTS),
        "model.dtype": ("bfloat16", "float32"),
        "model.padding": ("hf", "same"),
        "model.bn_mode": layers.BN_MODES,
        "model.remat": ("none", "block"),
        "data.resize": ("pil", "tf"),
        "loss.form": losses.FORMS,
        "loss.mask_duplicates": tuple(losses.DUPLICATES),
        "optim.name": ("lamb", "adamw", "lion"),
        "optim.schedule": ("linear", "cosine"),
        "optim.temperature": ("same", "log", "fixed"),
    }


def _check_batch(config, num_devices, num_processes):
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
    if config.loss.form == "dense" and batch > 4096:
        raise ValueError(
            f"config.loss.form='dense' builds a {batch} x {batch} matrix; use 'sharded'."
        )


def _check_keys(config, known, path):
    for key in config:
        if key not in known:
            close = difflib.get_close_matches(key, list(known), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"Unknown key {path}.{key}.{hint} Known: {', '.join(sorted(known))}.")
        if isinstance(known[key], ConfigDict) and key != "evaluators":
            if not isinstance(config[key], ConfigDict):
                raise ValueError(f"{path}.{key}={config[key]!r} must be a group of keys.")
            _check_keys(config[key], known[key], f"{path}.{key}")
    missing = [key for key in known if key not in config]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; start from default_config().")


def _check_choice(config, path, allowed):
    value = _get(config, path)
    if value in allowed:
        return
    close = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"config.{path}={value!r} is unknown.{hint} Known: {', '.join(allowed)}.")


def _get(config, path):
    for key in path.split("."):
        config = config[key]
    return config
