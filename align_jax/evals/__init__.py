"""Evaluators: made from a plain config, run on a model, reported as a table and as JSON.

An evaluator is a class in a file of its own and a line in `TYPES`. It has a name and is called with
a model, which has `encode_image` (images to [N, D]) and `encode_text` (texts to [N, D]), both
float32 of unit norm. The training loop and the command line know none of them by name; how to add
one is in docs/evaluation.md. Writing metrics.jsonl is the training loop's task.
"""

import dataclasses
import difflib
import importlib
import inspect
import json
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from align_jax.evals.records import EncodeOnce
from align_jax.storage import identity, user_code, writing
from align_jax.storage.problems import Problems

# type in a config -> module:class below align_jax.evals, imported when it is used
TYPES = {
    "classify": "classify:Classify",
    "composed": "composed:Composed",
    "cxc": "cxc:Cxc",
    "eccv": "eccv:Eccv",
    "fewshot": "fewshot:FewShot",
    "knn": "knn:Knn",
    "multilabel": "multilabel:MultiLabel",
    "multilingual": "multilingual:Multilingual",
    "probe": "probe:Probe",
    "retrieval": "retrieval:Retrieval",
    "selection": "selection:Selection",
    "similarity": "similarity:Similarity",
    "vtab": "vtab:Vtab",
    "words": "similarity:Words",
    "zeroshot": "zeroshot:ZeroShot",
}


class Evaluator(Protocol):
    """What the training loop and `align eval` need of an evaluator.

    It may also have: `table(metrics)`, header and rows of its part of the table (rows of equal
    headers stand together; without it, each metric is a row); `write_plots(folder)`, pictures of
    its last call; `problems`, what its last call left out; `stamps`, what identifies its data,
    argument -> stamp; `check_classes(classes)`, see `check_classes`; `clip_benchmark(metrics)`,
    `mteb(metrics)` and `open_clip(metrics)`, its metrics in the files of these tools, see peers.py.
    """

    name: str

    def __call__(self, model: Any) -> dict[str, float]:
        """Returns metrics by name without prefix; accuracies and recalls in percent."""
        ...


def make_evaluators(config: Mapping[str, Mapping[str, Any]]) -> list[Evaluator]:
    """Returns the evaluators of a config `{name: {"type": ..., "source": ..., ...}}`, in its order.

    Args:
      config: for each name the `type` (one of `TYPES`, or `file.py:Class`) and that class's
        arguments. `every_steps` is for the loop of training and left alone here.

    Raises:
      ValueError: for an unknown type or argument, a missing argument, or a source that cannot be
        opened; the message names the evaluator.
    """
    return [make_evaluator(name, entry) for name, entry in config.items()]


def make_evaluator(name: str, entry: Mapping[str, Any]) -> Evaluator:
    """Returns one evaluator, see `make_evaluators`."""
    arguments = dict(entry)
    if "type" not in arguments:
        raise ValueError(f"Evaluator '{name}' needs 'type', one of: {', '.join(sorted(TYPES))}.")
    evaluator_type = arguments.pop("type")
    arguments.pop("every_steps", None)
    writing.check_local_values(arguments, f"Evaluator '{name}'")
    make = _find_class(evaluator_type)
    parameters = dict(inspect.signature(make).parameters)
    del parameters["name"]
    for argument in arguments:
        if argument not in parameters:
            problem = _unknown(f"argument of {evaluator_type}", argument, parameters)
            raise ValueError(f"Evaluator '{name}': {problem}")
        wanted = parameters[argument].annotation
        if not _fits(arguments[argument], wanted):
            wanted = getattr(wanted, "__name__", str(wanted))
            raise ValueError(
                f"Evaluator '{name}': {argument}={arguments[argument]!r} must be: {wanted}."
            )
    for parameter in parameters.values():
        if parameter.default is parameter.empty and parameter.name not in arguments:
            raise ValueError(f"Evaluator '{name}' needs '{parameter.name}'.")
    try:
        return make(name, **arguments)
    except (ValueError, TypeError) as error:  # a source that is neither text nor source, too
        raise ValueError(f"Evaluator '{name}': {error}") from error


def check_classes(evaluators: Iterable[Evaluator], classes: Sequence[str] | None) -> None:
    """Raises ValueError, with its name, if an evaluator cannot take a model of these classes.

    Args:
      evaluators: of which some have `check_classes`.
      classes: of a classifier; None: of a dual encoder.
    """
    for evaluator in evaluators:
        if hasattr(evaluator, "check_classes"):
            try:
                evaluator.check_classes(classes)
            except ValueError as error:
                raise ValueError(f"Evaluator '{evaluator.name}': {error}") from error


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of the annotated type; what cannot be told counts as fitting."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if annotation is int or annotation is float:
        number = int if annotation is int else (int, float)
        return isinstance(value, number) and not isinstance(value, bool)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        if isinstance(value, str) or not isinstance(value, Sequence):
            return False
        return all(_fits(item, arguments[0]) for item in value)
    if annotation in (inspect.Parameter.empty, Any) or not isinstance(annotation, type):
        return True
    if getattr(annotation, "_is_protocol", False):
        return not isinstance(value, str | int | float)
    return isinstance(value, annotation)


def run_evaluators(evaluators: Sequence[Evaluator], model: Any) -> dict[str, float]:
    """Returns all metrics as `<name>/<metric>`.

    Images that several evaluators want, from sources of equal data, are embedded once.

    Raises:
      ValueError: if an evaluator raises it, with the evaluator's name.
      RuntimeError: if an evaluator fails otherwise, with its name.
    """
    results = {}
    if len(evaluators) > 1:
        model = EncodeOnce(model)
    for evaluator in evaluators:
        try:
            metrics = evaluator(model)
        except ValueError as error:
            raise ValueError(f"Evaluator '{evaluator.name}': {error}") from error
        except Exception as error:
            raise RuntimeError(
                f"Evaluator '{evaluator.name}' failed: {type(error).__name__}: {error}"
            ) from error
        results |= {f"{evaluator.name}/{metric}": value for metric, value in metrics.items()}
    return results


def problems_of(evaluators: Sequence[Evaluator]) -> dict[str, Problems]:
    """Returns what each evaluator left out in its last call, with the first of each kind."""
    return {e.name: e.problems for e in evaluators if getattr(e, "problems", None)}


def write_plots(evaluators: Iterable[Evaluator], folder: str | os.PathLike) -> None:
    """Lets those evaluators that have pictures of their last call write them into a folder."""
    for evaluator in evaluators:
        if hasattr(evaluator, "write_plots"):
            evaluator.write_plots(Path(folder))


def protocols(
    config: Mapping[str, Mapping[str, Any]], evaluators: Iterable[Evaluator], model: Any
) -> dict[str, dict[str, Any]]:
    """Returns for each evaluator what its numbers depend on besides weights, and a `fingerprint`.

    Type, arguments (given or by default), the stamps of the data in place of paths, and the model's
    preprocessing with its tokenizer. Numbers of different fingerprints cannot be compared.

    Args:
      config: that the evaluators were made from.
      evaluators: in its order.
      model: with `preprocessing`.
    """
    found = {}
    for evaluator in evaluators:
        entry = config[evaluator.name]
        bound = inspect.signature(_find_class(entry["type"])).parameters.values()
        arguments = {p.name: entry.get(p.name, p.default) for p in bound if p.name != "name"}
        arguments |= getattr(evaluator, "stamps", {})
        content = {
            "type": entry["type"],
            "arguments": arguments,
            "preprocessing": dataclasses.asdict(model.preprocessing),
        }
        text = json.dumps(content, sort_keys=True, default=str)
        found[evaluator.name] = content | {"fingerprint": identity.digest([text])[:16]}
    return found


def write_json(
    path: str | os.PathLike,
    results: Mapping[str, float],
    provenance: Mapping[str, Any],
    problems: Mapping[str, Problems] | None = None,
) -> None:
    """Writes `{"provenance": ..., "results": {"<name>/<metric>": ...}}`, whole or not at all.

    Where there are problems, `"problems": {"<name>": {"<reason>": {"count": ..., "first": ...}}}`.

    Args:
      results: what `run_evaluators` returns.
      provenance: what was evaluated (workdir or folder, step, config, versions); must suit JSON.
      problems: from `problems_of`.
    """
    content = {"provenance": dict(provenance), "results": dict(results)}
    if problems:
        content["problems"] = {name: found.to_json() for name, found in problems.items()}
    writing.write_json(path, content, sort_keys=True, allow_nan=False)


def _find_class(evaluator_type: str) -> Callable[..., Evaluator]:
    module_name, _, class_name = str(TYPES.get(evaluator_type, evaluator_type)).rpartition(":")
    if evaluator_type in TYPES:
        return getattr(importlib.import_module(f"align_jax.evals.{module_name}"), class_name)
    if not module_name.endswith(".py"):
        raise ValueError(_unknown("evaluator", evaluator_type, TYPES))
    if not os.path.isfile(module_name):
        raise ValueError(f"{module_name} of evaluator type {evaluator_type!r} does not exist.")
    try:
        return getattr(user_code.run_file(module_name, Path(module_name).stem), class_name)
    except Exception as error:
        raise ValueError(f"{module_name}: {type(error).__name__}: {error}") from error


def _unknown(what: str, given: Any, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(str(given), known, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"Unknown {what} '{given}'.{hint} Known: {', '.join(sorted(known))}."
