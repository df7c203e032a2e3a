"""Prompt templates for zero-shot classification, as data, and reading them from a file.

`{}` stands for the class name. CLIP's 80 ImageNet prompts are in presets/.
"""

from collections.abc import Sequence
from pathlib import Path

from align_jax.evals import presets
from align_jax.storage.text import read_json, read_lines

SIMPLE = ("a photo of a {}.",)

# For pictures that are no photographs (drawings, procedural scenes) and for web-like captions.
GENERIC = ("{}", "a {}", "one {}", "a picture of a {}", "an image with a {}", "this is a {}.")

_NAMED = {"simple": SIMPLE, "generic": GENERIC}


def load_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Returns checked templates, each with `{}` for the class name.

    Args:
      templates: the templates themselves; or `simple`, `generic` or `imagenet80`; or the path of
        a .txt file with one template a line; or of a .json file with a list. A .json file of
        several named lists, as CLIP_benchmark publishes with `{c}` for the class name, is given as
        `path:name`.

    Raises:
      ValueError: if the file or the list in it is missing, or a template has no `{}`.
    """
    if templates == "imagenet80":
        return presets.imagenet_templates()
    if isinstance(templates, str):
        loaded = _NAMED[templates] if templates in _NAMED else _read_templates(templates)
    else:
        loaded = tuple(templates)
    if not loaded:
        raise ValueError("No prompt template was given; give one, such as 'a photo of a {}.'.")
    for template in loaded:
        if not isinstance(template, str) or "{}" not in template:
            raise ValueError(f"Template {template!r} has no {{}} to put the class name at.")
    return loaded


def _read_templates(spec: str) -> tuple[str, ...]:
    file_name, list_name = spec, None
    if ".json:" in spec:
        file_name, _, list_name = spec.rpartition(":")
    path = Path(file_name)
    if path.suffix not in (".json", ".txt"):
        raise ValueError(
            f"Templates {spec!r} are neither {' nor '.join(map(repr, _NAMED))} nor a .json or .txt "
            "file; for one template of your own give a tuple with it."
        )
    if not path.is_file():
        raise ValueError(f"Template file {file_name} does not exist.")
    if path.suffix == ".txt":
        return tuple(line.strip() for line in read_lines(path) if line.strip())
    content = read_json(path)
    if isinstance(content, dict):
        if list_name not in content:
            raise ValueError(
                f"Template file {file_name} holds named lists; give {file_name}:NAME with one of: "
                f"{', '.join(content)}."
            )
        content = content[list_name]
    if not isinstance(content, list):
        raise ValueError(f"Template file {file_name} must hold a list of strings.")
    return tuple(str(template).replace("{c}", "{}") for template in content)
