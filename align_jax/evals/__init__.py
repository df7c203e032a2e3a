"""Evaluators: made from a plain config, run on a model, reported as a table and as JSON.

An evaluator is a name and a call from a model to metrics; the model has `encode_image` (images to
[N, D]) and `encode_text` (texts to [N, D]), both float32 of unit norm. Writing metrics.jsonl is the
training loop's task.
"""

import difflib
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from align_jax.evals.gallery import retrieval_gallery
from align_jax.evals.retrieval import Retrieval
from align_jax.evals.zeroshot import ZeroShot
from align_jax.storage import writing
from align_jax.storage.problems import Problems

__all__ = [
    "Evaluator",
    "Retrieval",
    "ZeroShot",
    "format_probabilities",
    "format_table",
    "make_evaluators",
    "problems_of",
    "retrieval_gallery",
    "run_evaluators",
    "write_json",
]

_TYPES = {"retrieval": Retrieval, "zeroshot": ZeroShot}


class Evaluator(Protocol):
    """What the training loop and `align eval` need of an evaluator."""

    name: str

    def __call__(self, model: Any) -> dict[str, float]:
        """Returns metrics by name without prefix; accuracies and recalls in percent."""
        ...


def make_evaluators(config: Mapping[str, Mapping[str, Any]]) -> list[Evaluator]:
    """Returns the evaluators of a config `{name: {"type": ..., "source": ..., ...}}`, in its order.

    Args:
      config: for each name the `type` (`retrieval` or `zeroshot`) and that class's arguments.

    Raises:
      ValueError: for an unknown type or argument, a missing argument, or a source that cannot be
        opened; the message names the evaluator.
    """
    evaluators = []
    for name, entry in config.items():
        arguments = dict(entry)
        if "type" not in arguments:
            raise ValueError(
                f"Evaluator '{name}' needs 'type', one of: {', '.join(sorted(_TYPES))}."
            )
        evaluator_type = arguments.pop("type")
        if evaluator_type not in _TYPES:
            raise ValueError(_unknown("evaluator", evaluator_type, _TYPES))
        make = _TYPES[evaluator_type]
        parameters = dict(inspect.signature(make).parameters)
        del parameters["name"]
        for argument in arguments:
            if argument not in parameters:
                problem = _unknown(f"argument of {evaluator_type}", argument, parameters)
                raise ValueError(f"Evaluator '{name}': {problem}")
        for parameter in parameters.values():
            if parameter.default is parameter.empty and parameter.name not in arguments:
                raise ValueError(f"Evaluator '{name}' needs '{parameter.name}'.")
        try:
            evaluators.append(make(name, **arguments))
        except ValueError as error:
            raise ValueError(f"Evaluator '{name}': {error}") from error
    return evaluators


def run_evaluators(evaluators: Sequence[Evaluator], model: Any) -> dict[str, float]:
    """Returns all metrics as `<name>/<metric>`.

    Raises:
      ValueError: if an evaluator raises it, with the evaluator's name.
      RuntimeError: if an evaluator fails otherwise, with its name.
    """
    results = {}
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


def format_table(
    results: Mapping[str, float], problems: Mapping[str, Problems] | None = None
) -> str:
    """Returns the results of `run_evaluators` as text tables, one for each kind of evaluator.

    Recalls and accuracies are in percent; each has the chance level of a random ranking beside it.
    Both are over what was evaluated; what was left out follows, a line an evaluator.

    Args:
      results: `<name>/<metric>` -> value.
      problems: from `problems_of`, to name the first of each kind.
    """
    by_name: dict[str, dict[str, float]] = {}
    for key, value in results.items():
        name, mark, metric = key.partition("/problems/")
        name, metric = (name, mark[1:] + metric) if mark else key.rsplit("/", 1)
        by_name.setdefault(name, {})[metric] = value
    retrieval = {name: m for name, m in by_name.items() if "image_to_text_r1" in m}
    zeroshot = {name: m for name, m in by_name.items() if "top1" in m}
    tables = []
    if retrieval:
        tables.append(_align_columns(_retrieval_rows(retrieval)))
    if zeroshot:
        tables.append(_align_columns(_zeroshot_rows(zeroshot)))
    notes = [_note(name, metrics, (problems or {}).get(name)) for name, metrics in by_name.items()]
    notes = "\n".join(filter(None, notes))
    return "\n\n".join([*tables, notes] if notes else tables)


def _note(name: str, metrics: Mapping[str, float], problems: Problems | None) -> str:
    counts = {k.partition("/")[2]: v for k, v in metrics.items() if k.startswith("problems/")}
    if not counts:
        return ""
    text = problems or "; ".join(f"{reason}: {count:,}" for reason, count in counts.items())
    if not metrics["num_skipped"]:
        return f"{name}: nothing left out; beside the data: {text}"
    return f"{name}: {metrics['num_skipped']:,} left out, the scores are over the rest: {text}"


def format_probabilities(
    names: Sequence[str], labels: Sequence[str], probabilities: Any, *, max_columns: int = 6
) -> str:
    """Returns one line an image: its probability for each label, or its best few with names.

    Args:
      names: of N images.
      labels: C labels.
      probabilities: [N, C], 0 to 1; NaN in the rows of images that could not be read.
      max_columns: number of labels above which only the best of each image are shown.
    """
    if len(labels) <= max_columns:
        rows = [["", *labels]]
        rows += [
            [name, *(f"{p:.4f}" for p in row)]
            for name, row in zip(names, probabilities, strict=True)
        ]
        return _align_columns(rows)
    rows = [["", *(f"{place + 1}." for place in range(max_columns))]]
    for name, row in zip(names, probabilities, strict=True):
        best = sorted(range(len(labels)), key=lambda k: -row[k])[:max_columns]
        rows.append([name, *(f"{labels[k]} {row[k]:.4f}" for k in best)])
    return _align_columns(rows)


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


def _retrieval_rows(by_name: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    ks = (1, 5, 10)
    header = ["retrieval [%]"] + [f"I→T R@{k}" for k in ks] + [f"T→I R@{k}" for k in ks]
    rows = [[*header, "images", "captions", "skipped"]]
    for name, metrics in by_name.items():
        row = [name]
        for direction in ("image_to_text", "text_to_image"):
            row += [f"{metrics[f'{direction}_r{k}']:.1f}" for k in ks]
        num_images, num_captions = metrics["num_images"], metrics["num_captions"]
        row += [f"{num_images:,}", f"{num_captions:,}", f"{metrics.get('num_skipped', 0):,}"]
        rows.append(row)
        chances = [_chance(k, num_captions / num_images, num_captions) for k in ks]
        chances += [_chance(k, 1, num_images) for k in ks]
        rows.append(["  chance", *(f"{chance:.1f}" for chance in chances), "", "", ""])
    return rows


def _chance(k: int, num_right: float, num_candidates: int) -> float:
    """Percentage of random rankings with a right candidate among the first k."""
    miss = 1.0
    for drawn in range(min(k, num_candidates)):
        miss *= max(0.0, 1 - num_right / (num_candidates - drawn))
    return 100 * (1 - miss)


def _zeroshot_rows(by_name: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    header = ["zero-shot [%]", "top-1", "top-5", "mean per class"]
    rows = [[*header, "chance top-1", "classes", "images", "skipped"]]
    for name, metrics in by_name.items():
        top5 = f"{metrics['top5']:.1f}" if "top5" in metrics else "-"
        row = [name, f"{metrics['top1']:.1f}", top5, f"{metrics['mean_per_class']:.1f}"]
        row.append(f"{100 / metrics['num_classes']:.1f}")
        row += [f"{metrics[key]:,}" for key in ("num_classes", "num_images", "num_skipped")]
        rows.append(row)
    return rows


def _align_columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def _unknown(what: str, given: Any, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(str(given), known, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"Unknown {what} '{given}'.{hint} Known: {', '.join(sorted(known))}."
