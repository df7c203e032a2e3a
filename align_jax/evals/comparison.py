"""Result files of several models side by side and beside published numbers, with a word where their
protocols differ."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from align_jax.evals import presets
from align_jax.storage import writing
from align_jax.storage.text import read_json

_RESULTS = Path("eval") / "align_eval.json"
_BOUNDS = ("_low", "_high")
# What says nothing of how good a model is.
_NO_SCORES = (
    "num_",
    "problems/",
    "l2",
    "chance",
    "_queries",
    "_pairs",
    "_missing",
    "_std",
    "_rank",
)
_COLORS = ("#1f6fb4", "#d1602c", "#3d8f4f", "#8a5fb0", "#b8912a", "#5b6770")


class Comparison(NamedTuple):
    """Columns: titles, and of each `<evaluator>/<metric>` -> value; rows: keys; and warnings.

    The first `num_models` columns are models, the others what was published.
    """

    titles: list[str]
    values: list[Mapping[str, float]]
    num_models: int
    keys: list[str]
    notes: list[str]
    warnings: dict[str, str]  # evaluator -> in what its protocols differ
    departures: dict[tuple[str, str], str]  # (publication, evaluator) -> likewise


def compare(paths: Sequence[str | os.PathLike]) -> Comparison:
    """Returns results side by side, and published ones of the same evaluators.

    Published are those of presets/published.json whose evaluator has the name and type of one here;
    where a model's protocol is not the published one (numbers of images, captions, classes and
    training images, prompts, arguments), `departures` says in what. Direction and k are in the
    names of the metrics.

    Args:
      paths: JSON files of `align eval`, or workdirs that have one.

    Raises:
      ValueError: a file that is missing or holds no results.
    """
    contents = [_read(Path(path)) for path in paths]
    titles = [_title(Path(path), content) for path, content in zip(paths, contents, strict=True)]
    protocols = [content["provenance"].get("protocols", {}) for content in contents]
    warnings = {}
    for name in dict.fromkeys(name for found in protocols for name in found):
        known = [found[name] for found in protocols if name in found]
        if len({protocol["fingerprint"] for protocol in known}) > 1:
            different = sorted({key for other in known[1:] for key in _differing(known[0], other)})
            warnings[name] = f"{name}: the protocols differ in {', '.join(different)}."
    values = [content["results"] for content in contents]
    keys = [k for k in dict.fromkeys(k for found in values for k in found) if not _is_bound(k)]
    names = list(dict.fromkeys(key.partition("/")[0] for key in keys))
    keys.sort(key=lambda key: (names.index(key.partition("/")[0]), _in_order(key)))
    notes = []
    departures = {}
    for published in presets.published():
        found = {
            f"{name}/{metric}": value
            for name, entry in published["results"].items()
            if any(p.get(name, {}).get("type") == entry["type"] for p in protocols)
            for metric, value in entry["metrics"].items()
        }
        if found := {key: value for key, value in found.items() if key in keys}:
            titles.append(published["title"])
            values.append(found)
            notes.append(f"{published['title']}: published, {published['source']}.")
            for name in dict.fromkeys(key.partition("/")[0] for key in found):
                wanted = published["results"][name].get("protocol", {})
                parts = [
                    f"{title}: {', '.join(differences)}"
                    for title, content, own in zip(titles, contents, protocols, strict=False)
                    if name in own
                    and (differences := _departures(name, wanted, own[name], content["results"]))
                ]
                if parts:
                    departures[published["title"], name] = (
                        f"{name}: not the protocol of {published['title']}: {'; '.join(parts)}."
                    )
    return Comparison(titles, values, len(contents), keys, notes, warnings, departures)


def to_markdown(comparison: Comparison) -> str:
    """Returns a table, a row a metric and a column a model or publication; intervals in brackets.

    Metrics of an evaluator whose protocols differ are marked by an asterisk, published numbers of
    another protocol by a dagger.
    """
    lines = [f"| metric | {' | '.join(comparison.titles)} |"]
    lines.append("|---" * (1 + len(comparison.titles)) + "|")
    for key in comparison.keys:
        mark = "*" if any(key.startswith(f"{name}/") for name in comparison.warnings) else ""
        name = key.partition("/")[0]
        cells = [
            _cell(found, key)
            + (" †" if key in found and (title, name) in comparison.departures else "")
            for title, found in zip(comparison.titles, comparison.values, strict=True)
        ]
        lines.append(f"| {key}{mark} | {' | '.join(cells)} |")
    notes = [f"\\* {warning}" for warning in comparison.warnings.values()]
    if any(_is_bound(key) for found in comparison.values for key in found):
        notes.append("In brackets: 95 % interval of resampled queries.")
    notes += comparison.notes + [f"† {text}" for text in comparison.departures.values()]
    return "\n".join([*lines, *[line for note in notes for line in ("", note)]]) + "\n"


def write_picture(path: str | os.PathLike, comparison: Comparison) -> None:
    """Draws the scores of all models and publications as a PNG: a panel an evaluator.

    Bars with the interval of a score where it has one. Counts are left out, and what has no score.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels: dict[str, list[str]] = {}
    for key in comparison.keys:
        name, _, metric = key.partition("/")
        if not (metric.endswith("_rank") or any(part in metric for part in _NO_SCORES)):
            panels.setdefault(name, []).append(key)
    columns = min(3, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    heights = [
        max(
            (len(keys) for keys in list(panels.values())[r * columns : (r + 1) * columns]),
            default=1,
        )
        for r in range(rows)
    ]
    bars = len(comparison.titles)
    size = 5.2 * columns, 1.0 + sum(0.9 + 0.13 * (bars + 1) * height for height in heights)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).flatten()
    for axes in all_axes[len(panels) :]:
        axes.set_axis_off()
    styles = [
        {
            "color": _COLORS[column % len(_COLORS)],
            "alpha": 1.0 if column < comparison.num_models else 0.55,
        }
        for column in range(bars)
    ]
    for axes, (name, keys) in zip(all_axes, panels.items(), strict=False):
        for column, found in enumerate(comparison.values):
            places = [(row, key) for row, key in enumerate(keys) if key in found]
            heights_of = [row + (column + 0.5) / (bars + 1) for row, _ in places]
            widths = [found[key] for _, key in places]
            errors = [
                (
                    max(0.0, found[key] - found.get(f"{key}_low", found[key])),
                    max(0.0, found.get(f"{key}_high", found[key]) - found[key]),
                )
                for _, key in places
            ]
            axes.barh(
                heights_of,
                widths,
                height=0.9 / (bars + 1),
                xerr=list(zip(*errors, strict=True)) if errors else None,
                error_kw={"elinewidth": 0.8, "ecolor": "0.2"},
                **styles[column],
            )
        mark = "*" if name in comparison.warnings else ""
        axes.set_title(f"{name}{mark}", fontsize=10)
        axes.set_yticks([row + 0.4 for row in range(len(keys))])
        axes.set_yticklabels([key.partition("/")[2] for key in keys], fontsize=7)
        axes.set_ylim(len(keys), -0.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        axes.tick_params(axis="x", labelsize=8)
    handles = [
        Patch(label=title, **style) for title, style in zip(comparison.titles, styles, strict=True)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, fontsize=9, frameon=False)
    with writing.replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png")


def _read(path: Path) -> dict[str, Any]:
    path = path / _RESULTS if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} does not exist; it is a JSON file of `align eval`.")
    content = read_json(path)
    if not isinstance(content, dict) or not {"results", "provenance"} <= set(content):
        raise ValueError(f"{path} holds no results of `align eval`.")
    return content


def _title(path: Path, content: dict[str, Any]) -> str:
    origin = content["provenance"]
    name, step = origin.get("workdir") or path.stem, origin.get("step")
    return f"{name}" if step is None else f"{name}, step {step}"


def _departures(
    name: str, wanted: Mapping[str, Any], protocol: Mapping[str, Any], results: Mapping[str, float]
) -> list[str]:
    """Returns in what a result was measured otherwise than `wanted`: see presets.published."""
    found = [wanted["always"]] if "always" in wanted else []
    for key, values in wanted.get("counts", {}).items():
        values = values if isinstance(values, list) else [values]
        value = results.get(f"{name}/{key}")
        if value not in values:
            ours = "not known" if value is None else f"{value:,}"
            found.append(f"{key} {ours}, there {' or '.join(f'{v:,}' for v in values)}")
    arguments = protocol.get("arguments", {})
    for key, value in wanted.get("arguments", {}).items():
        if key in arguments and arguments[key] != value:
            found.append(f"{key}={arguments[key]!r}, there {value!r}")
    if "templates" in wanted:
        ours, theirs = (_prompts(one.get("templates")) for one in (arguments, wanted))
        if ours != theirs and not (theirs == 1 and len(ours) == 1):
            count = theirs if isinstance(theirs, int) else len(theirs)
            other = "other ones" if len(ours) == count else f"there {count}"
            found.append(f"{len(ours)} prompt(s), {other}")
    return found


def _prompts(templates: Any) -> Any:
    """Returns the prompts that an argument names; a number of unknown ones as it is."""
    if templates == "imagenet80":
        templates = presets.imagenet_templates()
    return templates if isinstance(templates, int) else tuple(templates or ())


def _differing(left: dict[str, Any], right: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(left.keys() | right.keys()):
        a, b = left.get(key), right.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differing(a, b, f"{prefix}{key}.")
        elif a != b and key != "fingerprint":
            found.append(prefix + key)
    return found


def _in_order(key: str) -> tuple[bool, list[tuple[int, str]]]:
    """Sorts scores before counts, and numbers in names as numbers: r5 before r10."""
    parts = re.split(r"(\d+)", key)
    is_count = "/num_" in key or "/problems/" in key
    return is_count, [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


def _is_bound(key: str) -> bool:
    return key.endswith(_BOUNDS)


def _cell(found: Mapping[str, float], key: str) -> str:
    value = found.get(key)
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    text = f"{value:.2f}"
    bounds = [found.get(key + bound) for bound in _BOUNDS]
    return text if None in bounds else f"{text} [{bounds[0]:.1f}, {bounds[1]:.1f}]"
