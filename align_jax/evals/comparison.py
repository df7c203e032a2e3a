"""Result files of several models side by side, with a word where their protocols differ."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align_jax.storage.text import read_json

_RESULTS = Path("eval") / "align_eval.json"


def compare(paths: Sequence[str | os.PathLike]) -> tuple[str, list[str]]:
    """Returns a Markdown table, a row a metric and a column a file, and warnings.

    A warning names an evaluator whose protocols differ between files, and in what. Metrics of such
    an evaluator are marked by an asterisk.

    Args:
      paths: JSON files of `align eval`, or workdirs that have one; two or more.

    Raises:
      ValueError: a file that is missing or holds no results.
    """
    if len(paths) < 2:
        raise ValueError("A report compares two or more results; name their JSON files.")
    contents = [_read(Path(path)) for path in paths]
    columns = [_title(Path(path), content) for path, content in zip(paths, contents, strict=True)]
    warnings, marked = [], set()
    names = dict.fromkeys(n for c in contents for n in c["provenance"].get("protocols", {}))
    for name in names:
        found = [c["provenance"].get("protocols", {}).get(name) for c in contents]
        known = [protocol for protocol in found if protocol]
        if len({protocol["fingerprint"] for protocol in known}) > 1:
            marked.add(name)
            different = sorted({key for other in known[1:] for key in _differing(known[0], other)})
            warnings.append(f"{name}: the protocols differ in {', '.join(different)}.")
    lines = [f"| metric | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for key in dict.fromkeys(key for content in contents for key in content["results"]):
        mark = "*" if any(key.startswith(f"{name}/") for name in marked) else ""
        cells = [_cell(content["results"].get(key)) for content in contents]
        lines.append(f"| {key}{mark} | {' | '.join(cells)} |")
    notes = [f"\\* {warning}" for warning in warnings]
    return "\n".join([*lines, *([""] + notes if notes else [])]) + "\n", warnings


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


def _differing(left: dict[str, Any], right: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(left.keys() | right.keys()):
        a, b = left.get(key), right.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differing(a, b, f"{prefix}{key}.")
        elif a != b and key != "fingerprint":
            found.append(prefix + key)
    return found


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
