"""Which parameters learn: what is frozen is split off before anything is differentiated.

One rule for locked towers (a multiplier of 0), a fixed temperature, `optim.freeze` and adapters, of
which only the factors learn.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from align_jax import trees
from align_jax.models import lora as lora_lib


def make_frozen(config: ConfigDict) -> tuple[str, ...]:
    """Returns regexes on names of parameters that do not learn, of the group `optim`."""
    patterns = tuple(config.freeze)
    if config.image_lr_multiplier == 0:
        patterns += (r"^(lora/)?image(_projection)?/",)
    if config.text_lr_multiplier == 0:
        patterns += (r"^(lora/)?text(_projection)?/|^bias$",)
    if config.temperature == "fixed":
        patterns += ("^temperature$",)
    return patterns


def learned(frozen: Sequence[str], lora: lora_lib.Lora | None, params: dict) -> dict:
    """Returns the part of the parameters, or of shapes like them, that learns.

    Args:
      frozen: from `make_frozen`.
      lora: of an adapted model: its factors alone can learn.
      params: of the model.
    """

    def learns(name: str) -> bool:
        if lora and not lora_lib.is_factor(name):
            return False
        return not trees.match_any(frozen, name)

    return trees.select(params, learns)


def check_found(patterns: Sequence[str], params: dict, path: str) -> None:
    """Raises ValueError, naming the config path, if a regex is found in the name of no parameter.

    Args:
      patterns: the regexes.
      params: arrays or shapes.
      path: of the key that holds them.
    """
    names = [name for name, _ in trees.named_leaves(params)]
    for pattern in patterns:
        if not any(trees.match_any([pattern], name) for name in names):
            raise ValueError(
                f"config.{path}: {pattern!r} is in the name of none of the {len(names)} "
                f"parameters, such as {', '.join(names[:: max(1, len(names) // 3)][:3])}."
            )
