"""A workdir's self-description: config, tokenizer, preprocessing, and the refusal of a mismatch.

config.json          the run's configuration
tokenizer/           Hugging Face tokenizer files
preprocessing.json   image size, resize, tokens, and the tokenizer's fingerprint
classes.json         of a classifier, instead of tokenizer/: the names of its classes
source.txt           what the training data says of itself, and its stamp (storage/identity.py)
history.jsonl        what happened to the run (history.py)
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from align_jax import config as config_lib
from align_jax.data import tokenizer as tokenizer_lib
from align_jax.data.sources.classes import Classes
from align_jax.data.sources.open_source import PairSource
from align_jax.data.sources.record import is_usable
from align_jax.hf.processor import Preprocessing
from align_jax.run import history
from align_jax.storage import identity, writing
from align_jax.storage.problems import Problems, reason_of

# Keys that may differ between the parts of one run: they change neither the numbers nor the data.
# `train.steps` may grow (the schedule then stretches); what is listed as a prefix covers its group.
FREE_KEYS = (
    "checkpoint.",
    "data.num_threads",
    "data.num_workers",
    "data.source",  # compared by stamp instead, as are those of a mixture
    "data.tokenizer",  # compared by fingerprint instead
    "debug.",
    "eval.",
    "log.",
    "loss.form",
    "loss.tile_size",
    "mesh.",
    "model.remat",
    "model.scan_layers",
    "train.hang_s",
    "train.max_rollbacks",
    "train.microbatches",
    "train.native_kernels",
    "train.on_divergence",
    "train.spike",
    "train.steps",
)
# Groups of keys that may also differ where a run is taken up again from an earlier step.
RESUME_KEYS = ("optim.",)


_MIXTURE_SOURCE = re.compile(r"data\.mixture\..+\.source")
_COUNT = re.compile(r"(\d+) (?:procedural pairs|pairs|archives|img2dataset shards)")
_STAMP = "stamp "
_CLASSES = "classes.json"


def open_for_training(
    workdir: str | os.PathLike,
    config: ConfigDict,
    source: PairSource | Classes,
    *,
    log: Callable[[str], None] = print,
    resume_from: int | None = None,
) -> tuple[tokenizer_lib.Tokenizer | None, Preprocessing]:
    """Returns (tokenizer, preprocessing) of a new or continued run; a classifier has no tokenizer.

    Writes a new run's tokenizer, or classes, and preprocessing; `write_config` then makes it a
    workdir.

    Args:
      workdir: folder of the run.
      config: validated.
      source: whose captions a tokenizer is trained on, if `data.tokenizer` is empty.
      log: prints a line.
      resume_from: step of the checkpoint to go on from, with another optimizer's settings if those
        of the config are others; None goes on from the newest.

    Raises:
      ValueError: the workdir belongs to a run with another config, tokenizer, preprocessing or
        other pairs, or has no checkpoint of that step.
    """
    workdir = Path(workdir)
    if resume_from is not None and not is_run(workdir):
        raise ValueError(f"--resume-from {resume_from}: no run was started in {workdir} yet.")
    if is_run(workdir):
        changed = _check_same_run(workdir, config, RESUME_KEYS if resume_from is not None else ())
        _check_same_data(workdir, source, log)
        tokenizer, preprocessing = load(workdir)
        if tokenizer is not None:
            _check_same_tokenizer(workdir, config.data.tokenizer, tokenizer)
        if resume_from is not None:
            went = history.go_back(workdir, resume_from, config.to_dict(), changed)
            log(_describe_return(resume_from, changed) if went else _ALREADY.format(resume_from))
    elif any((workdir / "checkpoints").glob("[0-9]*")):
        raise ValueError(
            f"{workdir} holds checkpoints but no config.json; put that file back or use another "
            "--workdir."
        )
    else:
        if config.task == "classify":
            tokenizer = None
        elif config.data.tokenizer:
            tokenizer = tokenizer_lib.load_tokenizer(config.data.tokenizer)
        else:
            log(f"training a WordPiece vocabulary on the captions of {source.describe()}")
            tokenizer = tokenizer_lib.train_wordpiece(
                captions(source, Problems()), vocab_size=config.data.vocab_size
            )
        preprocessing = _describe(config, tokenizer)
        workdir.mkdir(parents=True, exist_ok=True)
        if tokenizer is None:
            writing.write_json(workdir / _CLASSES, source.classes, ensure_ascii=False)
        else:
            tokenizer.save(workdir / "tokenizer")
        writing.write_text(
            workdir / "preprocessing.json", json.dumps(dataclasses.asdict(preprocessing))
        )
        _write_source(workdir, source.describe(), source)
    return tokenizer, preprocessing


def is_run(workdir: str | os.PathLike) -> bool:
    """Returns whether a run was started in the folder: what it is made from lies there then."""
    return (Path(workdir) / "config.json").exists()


def logged_every(workdir: str | os.PathLike) -> int:
    """Returns the steps between the training lines that the run has written, 1 if none."""
    return load_config(workdir).log.every_steps if is_run(workdir) else 1


def write_config(workdir: str | os.PathLike, config: ConfigDict) -> None:
    """Writes config.json: from now on the folder is that of a run with this config.

    Call it when nothing can be wrong with the config any more: a mistake is not to be remembered.
    """
    writing.write_text(Path(workdir) / "config.json", config_lib.to_json(config))


def load(
    workdir: str | os.PathLike,
) -> tuple[tokenizer_lib.Tokenizer | None, Preprocessing]:
    """Returns (tokenizer, preprocessing) of an existing workdir; a classifier has no tokenizer.

    Raises:
      ValueError: files are missing or damaged, or they do not belong to the same run.
    """
    workdir = Path(workdir)
    config = load_config(workdir)
    if config.task == "classify":
        read_classes(workdir)
    tokenizer, preprocessing = read(workdir)
    if tokenizer is None and config.task != "classify":
        raise ValueError(
            f"{workdir} contradicts itself: config.task={config.task!r} by config.json, but "
            f"{_CLASSES} is there; put the run's own files back."
        )
    if tokenizer is not None and tokenizer.fingerprint() != preprocessing.tokenizer_fingerprint:
        raise ValueError(
            f"{workdir / 'tokenizer'} has fingerprint {tokenizer.fingerprint()}, but the run was "
            f"trained with {preprocessing.tokenizer_fingerprint}; put that tokenizer back."
        )
    for name, value in dataclasses.asdict(_describe(config, tokenizer)).items():
        before = getattr(preprocessing, name)
        if value != before:
            raise ValueError(
                f"{workdir} contradicts itself: {name} is {before!r} by preprocessing.json, "
                f"{value!r} by config.json and tokenizer; put the run's own files back."
            )
    return tokenizer, preprocessing


def read(
    workdir: str | os.PathLike,
) -> tuple[tokenizer_lib.Tokenizer | None, Preprocessing]:
    """Returns (tokenizer, preprocessing) as they lie there, of a run that may have no config yet.

    Raises:
      ValueError: files are missing or damaged.
    """
    tokenizer = None
    if not (Path(workdir) / _CLASSES).is_file():
        tokenizer = tokenizer_lib.load_tokenizer(Path(workdir) / "tokenizer")
    return tokenizer, _read_preprocessing(Path(workdir) / "preprocessing.json")


def load_config(workdir: str | os.PathLike) -> ConfigDict:
    """Returns the config of an existing workdir.

    Raises:
      ValueError: there is none, or it is damaged.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{workdir} is no workdir: config.json is missing; name a folder of `align train`."
        )
    try:
        return config_lib.from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def read_classes(workdir: str | os.PathLike) -> tuple[str, ...]:
    """Returns the names of the classes of a classifier's workdir.

    Raises:
      ValueError: the file is missing or damaged.
    """
    path = Path(workdir) / _CLASSES
    try:
        names = json.loads(path.read_text("utf-8"))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("it holds no list of names.")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    return tuple(names)


def captions(source: PairSource, problems: Problems, records: range | None = None) -> Iterator[str]:
    """Yields the usable captions of a source, in order.

    Args:
      source: is read once.
      problems: receives records without any, and those that cannot be read.
      records: which ones, all by default.
    """
    for index in range(len(source)) if records is None else records:
        reason = "caption_empty"
        try:
            if usable := [text for text in source.captions(index) if is_usable(text)]:
                yield from usable
                continue
        except OSError as error:
            reason = reason_of(error)
        problems.add(reason, source.where(index))


def _read_preprocessing(path: Path) -> Preprocessing:
    try:
        return Preprocessing(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:  # no file, not JSON, other keys
        raise ValueError(f"{path} cannot be used: {error}") from error


def _describe(config: ConfigDict, tokenizer: tokenizer_lib.Tokenizer | None) -> Preprocessing:
    return Preprocessing(
        image_size=config.data.eval_image_size or config.data.image_size,
        resize_size=config.data.resize_size,
        resize=config.data.resize,
        max_tokens=config.data.max_tokens if tokenizer else 0,
        vocab_size=tokenizer.vocab_size if tokenizer else 0,
        tokenizer_fingerprint=tokenizer.fingerprint() if tokenizer else "",
    )


_ALREADY = "--resume-from {}: done by this command before; going on from the newest checkpoint"


def _describe_return(step: int, changed: Mapping[str, Any]) -> str:
    values = "; ".join(f"config.{key}={now!r}, was {was!r}" for key, (was, now) in changed.items())
    return (
        f"back to step {step} ({values or 'same config'}); later checkpoints and the metric lines "
        "are in set_aside/"
    )


def _check_same_run(workdir: Path, config: ConfigDict, may_change: tuple[str, ...]) -> dict:
    """Returns key -> [before, now] of what differs, and refuses what must not."""
    changed = {}
    before = _flatten(load_config(workdir).to_dict())
    now = _flatten(config_lib.from_json(config_lib.to_json(config)).to_dict())
    for key in sorted(before | now):
        if before.get(key) == now.get(key):
            continue
        changed[key] = [before.get(key), now.get(key)]
        if not (key.startswith(FREE_KEYS + may_change) or _MIXTURE_SOURCE.fullmatch(key)):
            back = ", go on from a checkpoint by --resume-from STEP," * key.startswith(RESUME_KEYS)
            raise ValueError(
                f"config.{key}={now.get(key)!r}, but the run in {workdir} was started with "
                f"{before.get(key)!r}; change it back{back} or use another --workdir."
            )
    if config.train.steps < before["train.steps"]:
        raise ValueError(
            f"config.train.steps={config.train.steps}, but the run in {workdir} was started with "
            f"{before['train.steps']}; it may only grow."
        )
    return changed


def _check_same_data(
    workdir: Path, source: PairSource | Classes, log: Callable[[str], None]
) -> None:
    """Refuses other data: the order of the pairs would be another one. The path may be another."""
    try:
        before, *rest = (workdir / "source.txt").read_text("utf-8").splitlines()
    except FileNotFoundError:
        return
    if rest:
        same = rest[0] == _STAMP + identity.stamp(source)
    else:
        same = _COUNT.findall(before) == _COUNT.findall(source.describe())
        log(
            f"{workdir} is of a version that did not record what the training data held: only "
            "their number could be compared."
        )
    if not same:
        described = source.describe()
        content = " with other content" if described == before else ""
        raise ValueError(
            f"the training data is now '{described}'{content}, but the run in {workdir} was "
            f"started on '{before}'; put that data back or use another --workdir."
        )
    if not rest:
        _write_source(workdir, before, source)


def _write_source(workdir: Path, described: str, source: PairSource | Classes) -> None:
    writing.write_text(workdir / "source.txt", f"{described}\n{_STAMP}{identity.stamp(source)}\n")


def _check_same_tokenizer(workdir: Path, given: str, tokenizer: tokenizer_lib.Tokenizer) -> None:
    # The run has its own copy: the one that it was started with may be gone.
    if not given or (given == load_config(workdir).data.tokenizer and not Path(given).exists()):
        return
    fingerprint = tokenizer_lib.load_tokenizer(given).fingerprint()
    if fingerprint != tokenizer.fingerprint():
        raise ValueError(
            f"config.data.tokenizer={given} has fingerprint {fingerprint}, but the run in "
            f"{workdir} uses {tokenizer.fingerprint()}; use that one or another --workdir."
        )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
