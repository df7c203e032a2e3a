"""Results in the files of other evaluation tools: LAION's CLIP_benchmark, MTEB, open_clip.

An evaluator says how its metrics are called there: `clip_benchmark(metrics)` returns a task and its
metrics, `mteb(metrics)` returns task suffix -> scores (or several, with their `hf_subset`),
`open_clip(metrics)` a line. Those that a tool has nothing for are left out of its files. All
numbers there are from 0 to 1.

Sources: CLIP_benchmark 1.6, cli.py (its image_retrieval is text to image); the task files of
embeddings-benchmark/results; open_clip 3, train.py (`results.jsonl`).
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from align_jax.storage import writing

FORMATS = ("clip_benchmark", "mteb", "open_clip")

# MTEB's codes of languages and scripts, those of XM3600, by the codes of data sets.
LANGUAGES = dict(
    pair.split(":")
    for pair in (
        "ar:ara-Arab bn:ben-Beng cs:ces-Latn da:dan-Latn de:deu-Latn el:ell-Grek en:eng-Latn "
        "es:spa-Latn fa:fas-Arab fi:fin-Latn fil:fil-Latn fr:fra-Latn he:heb-Hebr hi:hin-Deva "
        "hr:hrv-Latn hu:hun-Latn id:ind-Latn it:ita-Latn ja:jpn-Jpan ko:kor-Hang mi:mri-Latn "
        "nl:nld-Latn no:nor-Latn pl:pol-Latn pt:por-Latn quz:quz-Latn ro:ron-Latn ru:rus-Cyrl "
        "sv:swe-Latn sw:swa-Latn te:tel-Telu th:tha-Thai tr:tur-Latn uk:ukr-Cyrl vi:vie-Latn "
        "zh:zho-Hans"
    ).split()
)


def write(
    form: str,
    folder: str | os.PathLike,
    results: Mapping[str, float],
    evaluators: Iterable[Any],
    *,
    model: str,
    pretrained: str,
    language: str = "en",
) -> list[Path]:
    """Returns the files written.

    Args:
      form: one of FORMATS.
      folder: made where missing.
      results: of `run_evaluators`.
      evaluators: that gave them; their names become those of the data sets.
      model: name.
      pretrained: name of the weights.
      language: of the captions and prompts.
    """
    parts = []
    for evaluator in evaluators:
        start = f"{evaluator.name}/"
        if hasattr(evaluator, form):
            metrics = {k[len(start) :]: v for k, v in results.items() if k.startswith(start)}
            parts.append((evaluator.name, getattr(evaluator, form)(metrics)))
    files = {
        "clip_benchmark": _clip_benchmark_files,
        "mteb": _mteb_files,
        "open_clip": _open_clip_file,
    }[form](parts, model, pretrained, language)
    paths = []
    for name, content in files.items():
        path = Path(folder) / re.sub("[^A-Za-z0-9_.-]", "-", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            writing.write_text(path, "".join(json.dumps(line) + "\n" for line in content))
        else:
            writing.write_json(path, content, sort_keys=True, allow_nan=False)
        paths.append(path)
    return paths


def renamed(metrics: Mapping[str, float], names: Mapping[str, str]) -> dict[str, float]:
    """Returns percentages of `metrics` from 0 to 1 under other names; those not there left out."""
    return {new: metrics[ours] / 100 for new, ours in names.items() if ours in metrics}


_Parts = list[tuple[str, Any]]


def _clip_benchmark_files(
    parts: _Parts, model: str, pretrained: str, language: str
) -> dict[str, dict[str, Any]]:
    files = {}
    for dataset, (task, values) in parts:
        name = "_".join((dataset, pretrained, model, language, task)) + ".json"
        files[name] = {
            "dataset": dataset,
            "model": model,
            "pretrained": pretrained,
            "task": task,
            "metrics": values,
            "language": language,
        }
    return files


def _mteb_files(
    parts: _Parts, model: str, pretrained: str, language: str
) -> dict[str, dict[str, Any]]:
    files = {}
    place = {"hf_subset": "default", "languages": [LANGUAGES.get(language, language)]}
    for dataset, tasks in parts:
        for suffix, scores in tasks.items():
            subsets = scores if isinstance(scores, list) else [scores | place]
            files[f"{dataset}{suffix}.json"] = {
                "dataset_revision": pretrained,
                "task_name": f"{dataset}{suffix}",
                "mteb_version": None,  # not its program
                "evaluation_time": None,
                "kg_co2_emissions": None,
                "scores": {"test": subsets},
            }
    return files


def _open_clip_file(
    parts: _Parts, model: str, pretrained: str, language: str
) -> dict[str, list[dict[str, Any]]]:
    about = {"model": model, "pretrained": pretrained}
    return {"results.jsonl": [{"dataset": name} | about | line for name, line in parts]}
