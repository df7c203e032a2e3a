"""PNG plots of a run, drawn from its metrics.jsonl: loss, temperature, recalls, zero-shot accuracy.

Uses Matplotlib's objects directly (no pyplot), so nothing global changes and no display is needed.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from align_jax.run.metrics import read_metrics
from align_jax.storage import writing

_RECALL_KS = (1, 5, 10)
_COLORS = ("#1f6fb4", "#d1602c", "#3d8f4f", "#8a5fb0", "#b8912a", "#5b6770")

_TWO = {"train/loss_image_to_text", "train/loss_text_to_image"}

_Series = tuple[list[int], list[float]]  # steps, values


def write_plots(
    workdir: str | os.PathLike, *, chance_loss: float | None = None, run_name: str | None = None
) -> list[Path]:
    """Returns the PNG files written to `workdir/plots`: loss, temperature, recall, zeroshot.

    A plot whose metrics are not in `workdir/metrics.jsonl` is not drawn.

    Args:
      chance_loss: loss of a model that cannot tell pairs apart, drawn as a dashed line; for the
        summed softmax loss over B pairs it is 2 ln B, for a classifier of K classes ln K.
      run_name: title of the plots; the folder's name by default.

    Raises:
      ValueError: if metrics.jsonl is missing or holds a line that is no metric line.
    """
    workdir = Path(workdir).resolve()
    metrics_path = workdir / "metrics.jsonl"
    if not metrics_path.is_file():
        raise ValueError(f"{metrics_path} does not exist; give the workdir of a run.")
    series = _read_series(metrics_path)
    run_name = run_name or workdir.name
    figures = {
        "loss": _plot_loss(series, run_name, chance_loss),
        "temperature": _plot_temperature(series, run_name),
        "recall": _plot_recall(series, run_name),
        "zeroshot": _plot_zeroshot(series, run_name),
    }
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            _widen_one_step(figure)
            path = workdir / "plots" / f"{name}.png"
            with writing.replacing(path) as temporary:
                figure.savefig(temporary, format="png")
            paths.append(path)
    return paths


def _read_series(path: Path) -> dict[str, _Series]:
    series: dict[str, _Series] = {}
    for line in read_metrics(path):
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float):
                steps, values = series.setdefault(key, ([], []))
                steps.append(line["step"])
                values.append(value)
    return series


def _plot_loss(
    series: dict[str, _Series], run_name: str, chance_loss: float | None
) -> Figure | None:
    labels = {
        "train/loss": "sum of both directions" if _TWO <= series.keys() else "loss",
        "train/loss_image_to_text": "image to text",
        "train/loss_text_to_image": "text to image",
    }
    if "train/loss" not in series:
        return None
    figure, (axes,) = _new_figure(f"{run_name}: training loss")
    for color, (key, label) in zip(_COLORS, labels.items(), strict=False):
        if key in series:
            width = 1.8 if key == "train/loss" else 1.0
            axes.plot(*series[key], color=color, linewidth=width, label=label)
    if chance_loss is not None:
        label = f"chance ({chance_loss:.2f})"
        axes.axhline(chance_loss, color="0.35", linestyle="--", linewidth=1, label=label)
    axes.set_ylabel("cross-entropy [nats]")
    axes.legend(frameon=False)
    return figure


def _plot_temperature(series: dict[str, _Series], run_name: str) -> Figure | None:
    if "train/temperature" not in series:
        return None
    figure, (axes,) = _new_figure(f"{run_name}: learned temperature")
    axes.plot(*series["train/temperature"], color=_COLORS[0], linewidth=1.8)
    axes.set_ylabel("temperature (divides the cosine)")
    return figure


def _plot_recall(series: dict[str, _Series], run_name: str) -> Figure | None:
    names = sorted({k.rsplit("/", 1)[0] for k in series if k.endswith("/image_to_text_r1")})
    if not names:
        return None
    directions = {"image_to_text": "image → text", "text_to_image": "text → image"}
    figure, panels = _new_figure(f"{run_name}: retrieval recall", num_panels=2)
    styles = ("-", "--", ":", "-.")
    for axes, (direction, title) in zip(panels, directions.items(), strict=True):
        for index, name in enumerate(names):
            for color, k in zip(_COLORS, _RECALL_KS, strict=False):
                key = f"{name}/{direction}_r{k}"
                if key not in series:
                    continue
                label = f"R@{k}" if len(names) == 1 else f"{_short(name)} R@{k}"
                style = styles[index % len(styles)]
                axes.plot(*series[key], style, color=color, marker="o", markersize=3, label=label)
        axes.set_title(title, fontsize=11)
        axes.set_ylim(0, 101)
    panels[0].set_ylabel(f"recall [%] on {', '.join(_short(name) for name in names)}")
    panels[1].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _plot_zeroshot(series: dict[str, _Series], run_name: str) -> Figure | None:
    keys = sorted(key for key in series if key.endswith("/top1"))
    if not keys:
        return None
    figure, (axes,) = _new_figure(f"{run_name}: classification")
    for index, key in enumerate(keys):
        name = key.rsplit("/", 1)[0]
        color = _COLORS[index % len(_COLORS)]
        axes.plot(*series[key], color=color, marker="o", markersize=3, label=_short(name))
        if f"{name}/num_classes" in series:
            chance = 100 / series[f"{name}/num_classes"][1][-1]
            axes.axhline(chance, color=color, linestyle="--", linewidth=1, alpha=0.6)
    axes.set_ylim(0, 101)
    axes.set_ylabel("top-1 accuracy [%], dashed: chance")
    axes.legend(frameon=False)
    return figure


def _new_figure(title: str, num_panels: int = 1) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(7 if num_panels == 1 else 10, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    panels = figure.subplots(1, num_panels, sharey=True, squeeze=False)[0]
    for axes in panels:
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _widen_one_step(figure: Figure) -> None:
    """Where all points are of one step, shows that step alone and not thousandths of it."""
    for axes in figure.axes:
        steps = {step for line in axes.lines if len(line.get_xdata()) for step in _steps(line)}
        if len(steps) == 1:
            axes.set_xlim(min(steps) - 1, max(steps) + 1)
            axes.set_xticks(list(steps))


def _steps(line: Line2D) -> Sequence[float]:
    is_level = line.get_transform() != line.axes.transData  # spans the axes, as chance does
    return [] if is_level else line.get_xdata()


def _short(name: str) -> str:
    return name.removeprefix("eval/")
