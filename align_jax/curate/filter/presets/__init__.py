"""Presets: lists of rules with the thresholds of known data sets.

A preset is a Python file with `RULES`, a list of calls of align_jax.curate.filter.rules, and
optionally `NOT_COVERED`, what its source does beside. `--preset my_rules.py` takes a file of the
same shape.
"""

import difflib
import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

from align_jax.curate.filter.rules import Rule

_FOLDER = Path(__file__).parent
NAMES = tuple(
    sorted(path.stem.replace("_", "-") for path in _FOLDER.glob("*.py") if path.stem[0] != "_")
)


class Preset(NamedTuple):
    """Rules in the order in which they are applied."""

    name: str
    rules: tuple[Rule, ...]
    not_covered: tuple[str, ...]
    digest: str  # of the file


def load_preset(name: str) -> Preset:
    """Returns the preset of that name, or of that Python file.

    Raises:
      ValueError: no such preset, or the file is not one.
    """
    path = _FOLDER / f"{name.replace('-', '_')}.py" if name in NAMES else Path(name)
    if not path.is_file() or path.suffix != ".py":
        close = difflib.get_close_matches(name, NAMES, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"--preset {name!r} is unknown.{hint} Known: {', '.join(NAMES)}, or a .py file."
        )
    code = path.read_bytes()
    spec = importlib.util.spec_from_file_location(f"preset_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"--preset {name}: {type(error).__name__}: {error}") from error
    rules = getattr(module, "RULES", None)
    if not isinstance(rules, list | tuple) or not all(isinstance(rule, Rule) for rule in rules):
        raise ValueError(
            f"--preset {name} has no RULES, a list of calls of align_jax.curate.filter.rules."
        )
    names = [reason for rule in rules for reason in rule.reasons]
    twice = sorted({reason for reason in names if names.count(reason) > 1})
    if twice:
        raise ValueError(f"--preset {name} has the rule {twice[0]} twice.")
    not_covered = tuple(getattr(module, "NOT_COVERED", ()))
    return Preset(path.stem, tuple(rules), not_covered, hashlib.sha256(code).hexdigest())
