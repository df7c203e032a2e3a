"""Presets: lists of rules with the thresholds of known data sets.

A preset is a Python file with `RULES`, a list of calls of align_jax.curate.filter.rules, and
optionally `NOT_COVERED`, what its source does beside. `--preset my_rules.py` takes a file of the
same shape, `--preset align+my_rules.py` the intersection.
"""

import dataclasses
import difflib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from align_jax.curate.filter.rule import Rule
from align_jax.storage import user_code

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
    """Returns the preset of that name, of that Python file, or `one+other` of several.

    Of several, a row stays if the rules of all keep it: they apply one after another, equal ones
    once. A rule about the rows that the rules before have left looks at what all those left. Where
    presets have different rules of one name, the reasons of the later ones begin with `preset:`.

    Raises:
      ValueError: no such preset, or the file is not one.
    """
    parts = [name] if Path(name).is_file() else name.split("+")
    presets = [_load_one(part) for part in parts]
    if len(presets) == 1:
        return presets[0]
    rules: list[Rule] = []
    for preset in presets:
        for rule in preset.rules:
            if any((rule.name, rule.keeps) == (other.name, other.keeps) for other in rules):
                continue
            if any(set(rule.reasons) & set(other.reasons) for other in rules):
                renamed = tuple(f"{preset.name}:{reason}" for reason in rule.reasons)
                rule = dataclasses.replace(rule, name=f"{preset.name}:{rule.name}", reasons=renamed)
            rules.append(rule)
    _check_reasons(name, rules)
    return Preset(
        "+".join(preset.name for preset in presets),
        tuple(rules),
        tuple(dict.fromkeys(text for preset in presets for text in preset.not_covered)),
        hashlib.sha256("".join(preset.digest for preset in presets).encode()).hexdigest(),
    )


def _check_reasons(name: str, rules: Sequence[Rule]) -> None:
    names = [reason for rule in rules for reason in rule.reasons]
    twice = sorted({reason for reason in names if names.count(reason) > 1})
    if twice:
        raise ValueError(f"--preset {name} has the rule {twice[0]} twice.")


def _load_one(name: str) -> Preset:
    path = _FOLDER / f"{name.replace('-', '_')}.py" if name in NAMES else Path(name)
    if not path.is_file() or path.suffix != ".py":
        close = difflib.get_close_matches(name, NAMES, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"--preset {name!r} is unknown.{hint} Known: {', '.join(NAMES)}, or a .py file."
        )
    code = path.read_bytes()
    try:
        module = user_code.run_file(path, f"preset_{path.stem}")
    except Exception as error:
        raise ValueError(f"--preset {name}: {type(error).__name__}: {error}") from error
    rules = getattr(module, "RULES", None)
    if not isinstance(rules, list | tuple) or not all(isinstance(rule, Rule) for rule in rules):
        raise ValueError(
            f"--preset {name} has no RULES, a list of calls of align_jax.curate.filter.rules."
        )
    _check_reasons(name, rules)
    not_covered = tuple(getattr(module, "NOT_COVERED", ()))
    return Preset(path.stem, tuple(rules), not_covered, hashlib.sha256(code).hexdigest())
