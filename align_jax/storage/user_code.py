"""Python files that users name: presets of rules, evaluators of their own."""

import importlib.util
import os
from types import ModuleType


def run_file(path: str | os.PathLike, name: str) -> ModuleType:
    """Returns a new module of this name, after the file has run in it.

    Bytecode is neither left beside the file nor taken from there: it may be of the file as it was.

    Raises:
      Exception: whatever the file raises; SyntaxError where it is no Python.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    with open(path, "rb") as file:
        exec(compile(file.read(), os.fspath(path), "exec"), module.__dict__)
    return module
