"""The configuration: every key with its default and meaning, and loading.

An experiment file (`configs/*.py`) starts from `default_config()`, changes what it needs and
returns it. What cannot work is refused by config_checks.py before anything compiles.
"""

import ast
import difflib
import json
import os
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

from ml_collections import ConfigDict, FieldReference

from align_jax.storage.text import read_text

# Keys that count steps. Instead of an integer they may hold a text with a unit: "2 epochs",
# "1e6 examples", "100 steps"; see `config_checks.in_steps`.
DURATIONS = (
    "train.steps",
    "optim.warmup_steps",
    "optim.cooldown_steps",
    "checkpoint.every_steps",
    "checkpoint.keep_every",
    "eval.every_steps",
    "log.every_steps",
)
_DURATION = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?) *(step|epoch|example)s?")


def default_config() -> ConfigDict:
    """Returns the base configuration: the paper's recipe for EfficientNet-B7 + BERT-base.

    Source of the values: Jia et al. 2021; where the paper is silent, kakaobrain/coyo-align.
    """
    c = ConfigDict()

    def duration(steps: int) -> FieldReference:
        return FieldReference(steps, field_type=object)  # may become a text, see DURATIONS

    # "contrastive", or "classify": a linear head on the image tower learns the classes of
    # data.source, labelled images; see docs/finetuning.md.
    c.task = "contrastive"

    # Hub id, Hugging Face folder or workdir whose weights a new run starts from; "" for none.
    c.init_from = ""
    c.init_towers = "both"  # or "image" or "text": that tower alone, without its projection

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
    model.remat = "none"  # recompute activations: "dots" all but matmuls, "block" all of a block
    model.scan_layers = False  # compile equal blocks once; same numbers

    c.data = data = ConfigDict()
    data.source = ""  # see data/sources/open_source.py
    # Instead of a source, several: name -> {"source": ..., "weight": 1.0}; a batch holds rows of
    # each in proportion to the weights.
    data.mixture = ConfigDict()
    # Folder of `align embed` with embeddings of the source's images: a locked image side is then
    # not computed, and there is no crop and flip; "" for none.
    data.image_embeddings = ""
    data.image_size = 289  # pixels, side of the crop the model sees
    data.resize_size = 346  # pixels, side before the crop
    data.resize = "tf"  # "tf" (COYO) or "pil" (Hugging Face processor)
    data.decode = "full"  # "reduced": large JPEGs at 1/2 to 1/8 for training; needs "pil"
    # Of training: "random", image_size out of resize_size, or "inception", a part of random area
    # and shape, scaled to image_size. Evaluation takes the centre of resize_size.
    data.crop = "random"
    data.crop_min_area = 0.08  # of the "inception" crop, share of the image; the most is all
    data.color_jitter = 0.0  # of training: most change of brightness, contrast and saturation
    data.grayscale = 0.0  # share of the training images that lose their colours
    data.downscale = 0.0  # share of those that lose detail, reduced by up to two and enlarged
    data.eval_image_size = 0  # side of the crop in evaluation, pixels; 0: image_size
    data.flip = True  # random horizontal flip
    data.max_tokens = 64
    data.tokenizer = ""  # folder or vocab.txt; "" trains one on the source's captions
    data.vocab_size = 100_000  # of the tokenizer to train
    data.num_threads = 8  # decode threads per process
    data.num_workers = 0  # decode processes; 0 decodes in threads only

    c.loss = loss = ConfigDict()
    loss.kind = "softmax"  # "softmax" (ALIGN) or "sigmoid" (SigLIP)
    # Same numbers: "sharded" (a device's rows x the batch), "ring" (memory of a tile) or "dense".
    loss.form = "sharded"
    loss.tile_size = 1024  # rows and columns of a tile of the ring
    loss.label_smoothing = 0.1  # of the softmax; the sigmoid loss has none
    loss.temperature_init = 1.0
    loss.bias_init = -10.0  # of the sigmoid loss
    loss.mask_duplicates = "none"  # drop false negatives: "caption", "image" or "both"
    loss.negatives = 1.0  # share of the in-batch negatives, drawn anew each step: 1.0, 0.5, 0.25

    c.optim = optim = ConfigDict()
    # "lamb", "adamw", "lion", "sgd" (momentum b1), "adafactor" or "muon"
    optim.name = "lamb"
    optim.learning_rate = 1e-3  # peak
    optim.warmup_steps = duration(10_000)  # linear from 0; the first update has rate 0
    # After the warm-up: "linear" or "cosine" to min_learning_rate; "constant" or "rsqrt", which
    # cooldown_steps before the end begin to go there linearly (warm-up, stable, decay); or "steps":
    # times decay_factor after each decay_every.
    optim.schedule = "linear"
    optim.cooldown_steps = duration(0)
    optim.min_learning_rate = 0.0  # at the end
    optim.decay_every = 0.3  # of "steps", share of the run after warm-up
    optim.decay_factor = 0.2  # of "steps"
    optim.weight_decay = 1e-5
    optim.b1 = 0.9
    optim.b2 = 0.999
    optim.eps = 1e-6
    optim.momentum_dtype = "float32"  # of the first moment: "bfloat16" halves its memory
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
    # ((regex, multiplier), ...) on names of parameters: of the regexes found in one, the first.
    optim.lr_rules = ()
    optim.layer_decay = 1.0  # rate of a layer by that of the layer above it, down from projections
    # Regexes on names of parameters that stay as they are, at no cost; a tower of which nothing
    # learns is in eval mode.
    optim.freeze = ()

    # Instead of all weights, A and B of an adapter to `init_from`: kernels W + alpha / rank * A B.
    c.lora = lora = ConfigDict()
    lora.rank = 0  # 0: no adapter
    lora.alpha = 16.0
    # Regexes on names of dense layers and 1x1 convolutions, see `models/lora.matches`.
    lora.kernels = (r"/(query|value)/kernel$", r"/block\d+/(expand|project)/kernel$")

    c.mesh = ConfigDict()
    c.mesh.data = -1  # -1: all devices that fsdp leaves
    c.mesh.fsdp = 1  # devices over which large parameters are split

    c.train = ConfigDict()
    c.train.batch_size = 16_384  # global, in pairs
    c.train.steps = duration(1_200_000)
    c.train.native_kernels = False  # on CPUs: depthwise convolutions in C++, compiled on the spot
    c.train.microbatches = 1  # parts in which the towers see the batch; same numbers, less memory
    c.train.seed = 0
    # Weight of the old moving average of weights and BatchNorm statistics, which is then what is
    # evaluated, saved as the weights and used; 0 keeps none. EfficientNet: 0.9999.
    c.train.ema_decay = 0.0
    # What ends a run whose loss is not finite or has collapsed to chance: "stop", or "rollback",
    # which goes back to the last good checkpoint, leaves out the batches in between and goes on, at
    # most max_rollbacks times. It also does so where a loss is `spike` times the spread of recent
    # ones above their median, see run/divergence.py; 0 lets spikes be.
    c.train.on_divergence = "stop"
    c.train.max_rollbacks = 3
    c.train.spike = 10.0
    # Seconds after which a step, a batch or a save that gets no further ends the run, and silence
    # of another process does if it is less than 30 s, see run/watchdog.py; 0 for never.
    c.train.hang_s = 600.0

    c.checkpoint = ConfigDict()
    c.checkpoint.every_steps = duration(5_000)
    c.checkpoint.keep = 3  # newest
    # Those of steps that it divides stay for ever; 0 for none.
    c.checkpoint.keep_every = duration(0)
    # The one of the highest EVALUATOR/METRIC stays, of the lowest with a "-" before it, and every
    # evaluation is saved; "" for none.
    c.checkpoint.best = ""

    c.eval = ConfigDict()
    c.eval.every_steps = duration(10_000)
    c.eval.batch_size = 256
    # name -> {"type": "retrieval" | "classify", "source": ..., ...}; see evals.make_evaluators.
    # With "every_steps" of its own it runs at those instead; all run at the end.
    c.eval.evaluators = ConfigDict()

    c.log = ConfigDict()
    c.log.every_steps = duration(100)

    c.debug = ConfigDict()
    # Name the operation that gives the first NaN, and end the run, whatever on_divergence is; costs
    # memory for the state before the step. See run/nans.py.
    c.debug.nans = False
    return c


def load_config(file: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Returns the config that an experiment file makes, overridden, locked, not yet validated.

    Args:
      file: path of a Python file with `get_config()`, or `PATH:ARG` to call `get_config(ARG)`.
      overrides: `--config.a.b=value`; the value is read as the type that the key has.

    Raises:
      ValueError: a file that cannot be loaded, an unknown key or a value of another type.
    """
    path, _, argument = file.partition(":")
    # Experiment files may start from one another: `from configs.x import get_config`.
    folder = os.path.dirname(os.path.dirname(os.path.abspath(path)))
    if folder not in sys.path:
        sys.path.append(folder)
    config = _run_file(path, [argument] if argument else [])
    _complete_mixture(config)
    config = config.copy_and_resolve_references()
    for override in overrides:
        name, equals, text = override.partition("=")
        if not name.startswith("--config.") or not equals:
            raise ValueError(
                f"Unrecognised argument {override!r}; overrides look like --config.train.steps=200."
            )
        _override(config, name.removeprefix("--config.").split("."), text)
    return config.lock()


def to_json(config: ConfigDict) -> str:
    """Returns the config as indented JSON with sorted keys; tuples become lists."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """Returns the config that `to_json` wrote; lists become tuples again.

    Keys that came to be after it was written have their defaults, which keep what was done before.

    Raises:
      ValueError: not JSON, or other keys than a config has.
    """

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tuples(item) for key, item in value.items()}
        return tuple(tuples(item) for item in value) if isinstance(value, list) else value

    content = tuples(json.loads(text))
    if not isinstance(content, dict):
        raise ValueError("it holds no groups of keys.")
    config, defaults = ConfigDict(content), default_config()
    _complete(config, defaults)
    check_keys(config, defaults, "config")
    return config


def check_keys(config: ConfigDict, known: ConfigDict, path: str) -> None:
    """Raises ValueError if a config has other keys, or values of other types, than `known`.

    Args:
      config: to check.
      known: a config with every key.
      path: of both, for the message.
    """
    for key in config:
        _check_known(key, known, path)
        value, default = config[key], known[key]
        if isinstance(default, ConfigDict) and not isinstance(value, ConfigDict):
            raise ValueError(f"{path}.{key}={value!r} must be a group of keys.")
        if key in ("evaluators", "mixture"):
            for name, entry in value.items():
                if not isinstance(entry, ConfigDict):
                    raise ValueError(f"{path}.{key}.{name}={entry!r} must be a group of keys.")
                if key == "mixture":
                    _check_entry(entry, f"{path}.{key}.{name}")
        elif isinstance(default, ConfigDict):
            check_keys(value, default, f"{path}.{key}")
        elif _is_duration(f"{path}.{key}"):
            parse_duration(value, f"{path}.{key}")
        elif type(value) is not type(default):
            raise ValueError(_wrong_type(f"{path}.{key}", value, default))
    missing = [key for key in known if key not in config]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; start from default_config().")


def parse_duration(value: Any, path: str) -> tuple[float, str]:
    """Returns (number, "step", "epoch" or "example") of a value that counts steps.

    Raises:
      ValueError: it is neither an integer nor a text of a number and a unit.
    """
    if type(value) is int:
        return value, "step"
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if not match:
        raise ValueError(
            f"{path}={value!r} must be an integer, or a text such as '2 epochs' or '1e6 examples'."
        )
    return float(match[1]), match[2]


def _is_duration(path: str) -> bool:
    path = path.removeprefix("config.")
    return path in DURATIONS or re.fullmatch(r"eval\.evaluators\.[^.]+\.every_steps", path)


def _complete(config: ConfigDict, defaults: ConfigDict) -> None:
    """Gives keys that are missing their defaults."""
    for key, default in defaults.items():
        if key not in config:
            config[key] = default
        elif isinstance(default, ConfigDict) and isinstance(config[key], ConfigDict):
            _complete(config[key], default)


def _complete_mixture(config: ConfigDict) -> None:
    # A weight may be left out or be an integer; an override needs a number to replace. What is
    # wrong otherwise stays as it is, for `validate` to refuse.
    data = config.get("data")
    mixture = data.get("mixture") if isinstance(data, ConfigDict) else None
    for entry in mixture.values() if isinstance(mixture, ConfigDict) else ():
        if isinstance(entry, ConfigDict) and type(entry.get("weight", 1)) is int:
            with entry.unlocked(), entry.ignore_type():
                entry.weight = float(entry.get("weight", 1))


def _run_file(path: str, arguments: Sequence[str]) -> ConfigDict:
    """Returns what `get_config` of the file does."""
    try:
        code = compile(read_text(path), path, "exec")
        content = {"__name__": "config", "__file__": path}
        exec(code, content)
        config = content["get_config"](*arguments) if "get_config" in content else None
    except OSError as error:
        if error.filename != path:
            raise
        raise ValueError(f"--config {path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # whatever a mistake in the file raises
        reason = error
        while isinstance(reason, Exception) and reason.args:  # str(KeyError) would be quoted
            reason = reason.args[0]
        raise ValueError(
            f"--config {_where(path, error)}: {type(error).__name__}: {reason}"
        ) from error
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"--config {path} must define get_config() that returns a ConfigDict; start from "
            "align_jax.config.default_config()."
        )
    return config


def _where(path: str, error: Exception) -> str:
    """Returns the path, with the line of the error where that is in the file."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"{path}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    return f"{path}:{lines[-1]}" if lines else path


def _override(config: ConfigDict, keys: Sequence[str], text: str) -> None:
    path = "config"
    for key in keys[:-1]:
        _check_known(key, config, path)
        config, path = config[key], f"{path}.{key}"
        if not isinstance(config, ConfigDict):
            raise ValueError(f"{path} holds a value, no keys; set it by --{path}=...")
    _check_known(keys[-1], config, path)
    path, default = f"{path}.{keys[-1]}", config[keys[-1]]
    if isinstance(default, ConfigDict):
        raise ValueError(f"{path}={text} is a group of keys; set one, e.g. --{path}.KEY=...")
    with config.ignore_type():  # _parse has looked at it
        config[keys[-1]] = _parse(path, text, default)


def _parse(path: str, text: str, default: Any) -> Any:
    """Returns the text as a value of the type that the default has."""
    if _is_duration(path):
        value = int(text) if re.fullmatch(r"[+-]?\d+(_\d+)*", text) else text
        parse_duration(value, path)
        return value
    if isinstance(default, str):
        return text
    try:
        if isinstance(default, float):
            value = float(text)
        else:
            value = ast.literal_eval(text.capitalize() if isinstance(default, bool) else text)
    except (ValueError, SyntaxError):
        value = text
    if type(value) is not type(default):
        raise ValueError(_wrong_type(path, value, default))
    return value


def _check_known(key: str, known: Iterable[str], path: str) -> None:
    """Raises ValueError if the key is not known; names the one that is like it."""
    if key not in known:
        close = difflib.get_close_matches(key, list(known), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        names = ", ".join(sorted(known)) or "none; name it in the experiment file"
        raise ValueError(f"Unknown key {path}.{key}.{hint} Known: {names}.")


def _wrong_type(path: str, value: Any, default: Any) -> str:
    """Returns the message about a value that is of another type than the default."""
    wanted = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "a text",
        tuple: "a tuple, e.g. \"('_bn/',)\"",
    }
    return f"{path}={value!r} must be {wanted.get(type(default), type(default).__name__)}."


def _check_entry(entry: ConfigDict, path: str) -> None:
    known = {"source": "", "weight": 1.0}
    for key, value in entry.items():
        _check_known(key, known, path)
        if type(value) is not type(known[key]) and not (key == "weight" and type(value) is int):
            raise ValueError(_wrong_type(f"{path}.{key}", value, known[key]))
