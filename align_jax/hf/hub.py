"""Models by name: a folder on this machine, or a repository of the Hugging Face hub."""

import json
import os
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from align_jax.storage import writing

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SMALL_FILES = ("*.json", "vocab.txt", "merges.txt", "*.model")
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # the first kind that is there


def find_folder(name_or_path: str | os.PathLike) -> Path:
    """Returns the folder of a model, downloading it where the name is a hub id.

    A folder of that name wins over the hub; what was downloaded before is not downloaded again.

    Args:
      name_or_path: a folder, or `owner/name`.

    Raises:
      ValueError: neither exists, or the hub cannot be reached.
    """
    writing.check_local(name_or_path, "model")
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file; name its folder.")
    if not _HUB_ID.fullmatch(str(name_or_path)):
        raise ValueError(
            f"{path} does not exist; name a workdir of `align train`, a Hugging Face folder or a "
            "hub id such as kakaobrain/align-base."
        )
    return _download(str(name_or_path))


def is_hugging_face(folder: Path) -> bool:
    """Returns whether config.json is that of a transformers model; ours has other groups."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool({"model_type", "architectures"} & config.keys())


def _download(name: str) -> Path:
    # Repositories may hold the weights of several frameworks, gigabytes each.
    try:
        for pattern in _WEIGHTS:
            folder = Path(
                huggingface_hub.snapshot_download(name, allow_patterns=[*_SMALL_FILES, pattern])
            )
            if any(folder.glob(pattern)):
                return folder
    except (RepositoryNotFoundError, GatedRepoError, HFValidationError) as error:
        raise ValueError(
            f"{name} is no folder here, and no model on the Hugging Face hub that you may read "
            f"({type(error).__name__})."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"{name} is no folder here, and the Hugging Face hub cannot be reached "
            f"({type(error).__name__}). Where there is a network, run `hf download {name} "
            "--local-dir DIR`; then copy DIR to this machine and name it instead."
        ) from error
    raise ValueError(f"{name} on the Hugging Face hub holds no {' or '.join(_WEIGHTS)}.")
