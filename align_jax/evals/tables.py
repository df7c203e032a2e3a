"""Text tables of results: the part that each evaluator brings, side by side where they agree."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from align_jax.storage.problems import Problems


def format_table(results: Mapping[str, float], evaluators: Iterable[Any] = ()) -> str:
    """Returns the results of `run_evaluators` as text tables, one for each kind of evaluator.

    Recalls and accuracies are in percent; each has the chance level of a random ranking beside it.
    Both are over what was evaluated; what was left out follows, a line an evaluator. Metrics of an
    evaluator without `table` are a row each.

    Args:
      results: `<name>/<metric>` -> value.
      evaluators: that gave them; results of others are shown plainly.
    """
    by_evaluator = {evaluator.name: evaluator for evaluator in evaluators}
    by_name: dict[str, dict[str, float]] = {}
    for key, value in results.items():
        name = _name_of(key, by_evaluator)
        by_name.setdefault(name, {})[key[len(name) + 1 :]] = value
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    notes = []
    for name, metrics in by_name.items():
        evaluator = by_evaluator.get(name)
        make = None if "failed" in metrics else getattr(evaluator, "table", None)
        header, *rows = make(metrics) if make else _plain(name, metrics)
        tables.setdefault(tuple(header), []).extend(rows)
        notes.append(_note(metrics, getattr(evaluator, "problems", None), name))
    parts = [align_columns([header, *rows]) for header, rows in tables.items()]
    notes = "\n".join(filter(None, notes))
    return "\n\n".join([*parts, notes] if notes else parts)


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
        return align_columns(rows)
    rows = [["", *(f"{place + 1}." for place in range(max_columns))]]
    for name, row in zip(names, probabilities, strict=True):
        best = sorted(range(len(labels)), key=lambda k: -row[k])[:max_columns]
        rows.append([name, *(f"{labels[k]} {row[k]:.4f}" for k in best)])
    return align_columns(rows)


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows of equal length as lines: the first column left, others right; a rule below the
    first row."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def _name_of(key: str, known: Iterable[str]) -> str:
    names = [name for name in known if key.startswith(f"{name}/")]
    if names:
        return max(names, key=len)
    name, is_problem, _ = key.partition("/problems/")
    return name if is_problem else key.rsplit("/", 1)[0]


def _plain(name: str, metrics: Mapping[str, float]) -> list[list[str]]:
    rows = [
        [name, metric, f"{value:,}" if isinstance(value, int) else f"{value:.4g}"]
        for metric, value in metrics.items()
        if not metric.startswith("problems/")
    ]
    return [["evaluator", "metric", "value"], *rows]


def _note(metrics: Mapping[str, float], problems: Problems | None, name: str) -> str:
    counts = {k.partition("/")[2]: v for k, v in metrics.items() if k.startswith("problems/")}
    if not counts:
        return ""
    # Those of an evaluator that was made anew do not belong to the results of an earlier run.
    text = "; ".join(f"{reason}: {count:,}" for reason, count in counts.items())
    text = problems if problems and dict(problems) == counts else text
    if not metrics.get("num_skipped"):
        return f"{name}: nothing left out; beside the data: {text}"
    return f"{name}: {metrics['num_skipped']:,} left out, the scores are over the rest: {text}"
