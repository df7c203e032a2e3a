"""Results in the JSON of LAION's CLIP_benchmark: a file an evaluator, as its `build` reads them.

Source: CLIP_benchmark 1.6, cli.py: accuracies and recalls from 0 to 1; its image_retrieval is text
to image. An evaluator says how its metrics are called there by `clip_benchmark(metrics)`.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from align_jax.storage import writing


def write_clip_benchmark(
    folder: str | os.PathLike,
    results: Mapping[str, float],
    evaluators: Iterable[Any],
    *,
    model: str,
    pretrained: str,
    language: str = "en",
) -> list[Path]:
    """Returns the files written, `<dataset>_<pretrained>_<model>_<language>_<task>.json`.

    Evaluators that CLIP_benchmark has no task for are left out.

    Args:
      folder: made where missing.
      results: of `run_evaluators`.
      evaluators: that gave them; their names become those of the data sets.
      model: name.
      pretrained: name of the weights.
      language: of the captions and prompts.
    """
    paths = []
    for evaluator in evaluators:
        if not hasattr(evaluator, "clip_benchmark"):
            continue
        start = f"{evaluator.name}/"
        metrics = {k[len(start) :]: v for k, v in results.items() if k.startswith(start)}
        task, values = evaluator.clip_benchmark(metrics)
        content = {
            "dataset": evaluator.name,
            "model": model,
            "pretrained": pretrained,
            "task": task,
            "metrics": values,
            "language": language,
        }
        name = "_".join((evaluator.name, pretrained, model, language, task))
        path = Path(folder) / f"{re.sub('[^A-Za-z0-9_.-]', '-', name)}.json"
        writing.write_json(path, content, sort_keys=True, allow_nan=False)
        paths.append(path)
    return paths


def renamed(metrics: Mapping[str, float], names: Mapping[str, str]) -> dict[str, float]:
    """Returns percentages of `metrics` from 0 to 1 under other names; those not there left out."""
    return {new: metrics[ours] / 100 for new, ours in names.items() if ours in metrics}
