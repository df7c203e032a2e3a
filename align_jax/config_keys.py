"""Keys of a configuration against those that there are; what they mean is in config.py."""

import difflib
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict


def check_keys(config: ConfigDict, known: ConfigDict, path: str) -> None:
    """Raises ValueError if a config has other keys, or values of other types, than `known`.

    Args:
      config: to check.
      known: a config with every key.
      path: of both, for the message.
    """
    for key in config:
        check_known(key, known, path)
        value, default = config[key], known[key]
        if isinstance(default, ConfigDict) and not isinstance(value, ConfigDict):
            raise ValueError(f"{path}.{key}={value!r} must be a group of keys.")
        if key in ("evaluators", "mixture"):
            for name, entry in value.items():
                if not isinstance(entry, ConfigDict):
                    raise ValueError(f"{path}.{key}.{name}={entry!r} must be a group of keys.")
                if key == "mixture":
                    _check_entry(entry, f"{path}.{key}.{name}")
        elif isinstance(default, ConfigDict):
            check_keys(value, default, f"{path}.{key}")
        elif type(value) is not type(default):
            raise ValueError(wrong_type(f"{path}.{key}", value, default))
    missing = [key for key in known if key not in config]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; start from default_config().")


def check_known(key: str, known: Iterable[str], path: str) -> None:
    """Raises ValueError if the key is not known; names the one that is like it."""
    if key not in known:
        close = difflib.get_close_matches(key, list(known), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        names = ", ".join(sorted(known)) or "none; name it in the experiment file"
        raise ValueError(f"Unknown key {path}.{key}.{hint} Known: {names}.")


def wrong_type(path: str, value: Any, default: Any) -> str:
    """Returns the message about a value that is of another type than the default."""
    wanted = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "a text",
        tuple: "a tuple, e.g. \"('_bn/',)\"",
    }
    return f"{path}={value!r} must be {wanted.get(type(default), type(default).__name__)}."


def _check_entry(entry, path):
    known = {"source": "", "weight": 1.0}
    for key, value in entry.items():
        check_known(key, known, path)
        if type(value) is not type(known[key]) and not (key == "weight" and type(value) is int):
            raise ValueError(wrong_type(f"{path}.{key}", value, known[key]))
