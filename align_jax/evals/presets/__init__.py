"""Class names, prompts and lists of classes that evaluations share, as data with their source."""

from functools import cache
from pathlib import Path
from typing import Any

from align_jax.storage.text import read_json

_SUBSETS = ("imagenet_a", "imagenet_r")
NAMES = ("imagenet", *_SUBSETS)


def imagenet_templates() -> tuple[str, ...]:
    """Returns CLIP's 80 prompts, each with `{}`."""
    return tuple(_imagenet()["templates"])


def class_names(preset: str) -> tuple[str, ...]:
    """Returns CLIP's names of the 1,000 classes of ImageNet, or of the 200 of ImageNet-A or -R.

    Labels are in the order of the wnids, that of sorted class folders. Two names are there twice
    (crane, maillot).

    Args:
      preset: one of NAMES.

    Raises:
      ValueError: another one.
    """
    if preset not in NAMES:
        raise ValueError(f"class_names={preset!r} is unknown; use one of: {', '.join(NAMES)}.")
    names = tuple(_imagenet()["names"])
    return tuple(names[i] for i in _imagenet()[preset]) if preset in _SUBSETS else names


@cache
def published() -> list[dict[str, Any]]:
    """Returns published numbers: `title`, `source` and `results`, name of an evaluator in
    configs/ -> its `type`, `metrics` and `protocol`: `counts`, metric -> the number published with
    (or several), `arguments`, `templates` (prompts, or how many), and `always`, what no evaluator
    here can do as published."""
    return read_json(Path(__file__).with_name("published.json"))


@cache
def _imagenet() -> dict[str, Any]:
    return read_json(Path(__file__).with_name("imagenet.json"))
