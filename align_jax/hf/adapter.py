"""LoRA adapters as folders in PEFT's format, for `transformers.AlignModel` and for ours.

A folder holds adapter_config.json, adapter_model.safetensors and, of ours, align_base.json with the
fingerprint of the weights that were adapted. Source: the files of peft 0.21.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from align_jax import trees
from align_jax.hf import convert
from align_jax.hf import weights as weights_file
from align_jax.models import dual_encoder, lora
from align_jax.storage import text, writing

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "align_base.json"

_PREFIX = "base_model.model."
_TENSOR = re.compile(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight")
# Settings under which a tensor means something else, and the values that leave it as it is.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "lora_bias": (False,),
}


def write_adapter(
    folder: str | os.PathLike,
    model: dual_encoder.DualEncoder,
    variables: dual_encoder.Variables,
    *,
    base: str,
) -> None:
    """Writes A and B of an adapted model so that PEFT loads them on the saved base.

    Args:
      folder: to make.
      model: with `lora`.
      variables: of it.
      base: hub id or folder of the adapted model, for the reader.

    Raises:
      ValueError: the model has no adapter, or adapts a kernel that the format has no place for.
    """
    if model.lora is None:
        raise ValueError("the model has no adapter: it was trained with config.lora.rank=0.")
    tensors, modules = {}, []
    for layer, pair in lora.factors_of(variables["params"]).items():
        module = _module(layer, model)
        modules.append(module)
        for factor, array in (("A", pair["a"]), ("B", pair["b"])):
            array = np.asarray(array, np.float32).T  # [rank, in] and [out, rank]
            if layer.startswith("image/"):
                array = array[:, :, None, None]
            tensors[f"{_PREFIX}{module}.lora_{factor}.weight"] = array
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": model.lora.rank,
        "lora_alpha": model.lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "bias": "none",
        "inference_mode": True,
    }
    folder = Path(folder)
    described = {"fingerprint": base_fingerprint(model, variables), "base": base}
    folder.mkdir(parents=True, exist_ok=True)
    weights_file.write_safetensors(folder / WEIGHTS, tensors)
    writing.write_text(folder / BASE, json.dumps(described, indent=2) + "\n")
    writing.write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def read_adapter(
    folder: str | os.PathLike,
    model: dual_encoder.DualEncoder,
    variables: dual_encoder.Variables,
) -> tuple[lora.Lora, dict]:
    """Returns (lora, params): how the model is to be adapted, and its parameters with A and B.

    Args:
      folder: of ours or of PEFT.
      model: the base, without `lora`.
      variables: of it.

    Raises:
      ValueError: no adapter of LoRA, one of another base, or one that does more than add A B to
        kernels of the model.
    """
    folder = Path(folder)
    config = _read_config(folder)
    _check_base(folder, model, variables)
    found = _read_factors(folder, config, model, variables["params"])
    ranks = {pair["a"].shape[1] for pair in found.values()}
    rank = ranks.pop() if len(ranks) == 1 else config["r"]
    scale = _scale(config, "", rank)
    factors = {}
    for layer, pair in found.items():
        own = _scale(config, _module(layer, model), pair["a"].shape[1])
        # The model has one scale for all kernels.
        b = pair["b"] if own == scale else pair["b"] * np.float32(own / scale)
        factors[layer] = {"a": pair["a"], "b": b}
    kernels = tuple(f"^{re.escape(layer)}/kernel$" for layer in factors)
    adapted = lora.with_factors(variables["params"], factors)
    return lora.Lora(rank, scale * rank, kernels), adapted


def base_fingerprint(model: dual_encoder.DualEncoder, variables: dual_encoder.Variables) -> str:
    """Returns 16 hex digits that identify the weights without the adapter, as they are saved.

    A workdir, and the Hugging Face folder that it is converted to, have the same.

    Raises:
      ValueError: the format has no place for the weights, see `convert.to_hf`.
    """
    plain = variables | {"params": lora.base_of(variables["params"])}
    digest = hashlib.sha256()
    for name, array in sorted(convert.to_hf(plain, model).items()):
        digest.update(f"{name} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:16]


def _module(layer: str, model: dual_encoder.DualEncoder) -> str:
    """Returns the name of our layer in transformers."""
    # A projection that is not there is folded into the last convolution of the trunk.
    folded = ("image_projection", f"image/stage{len(model.image.stages)}/block0/project")
    if model.image_width != model.embed_dim and layer in folded:
        raise ValueError(
            f"an adapter of {layer} cannot be saved: the Hugging Face format has no image "
            f"projection (model.embed_dim={model.embed_dim} is not the width of the image tower, "
            f"{model.image_width}). Leave it out of config.lora.kernels, or save the merged model."
        )
    return convert.hf_name(f"params/{layer}/kernel", model).removesuffix(".weight")


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    for needed in (file, folder / WEIGHTS):
        if not needed.is_file():
            raise ValueError(f"{folder} is no adapter in PEFT's format: it has no {needed.name}.")
    config = text.read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}, not an object.")
    for key, plain in _PLAIN.items():
        value = config.get(key, plain[0] if key != "peft_type" else None)
        if value not in plain:
            raise ValueError(f"{file}: {key}={value!r} is not read; only {plain[0]!r} is.")
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{file}: {key}={value!r} must be a positive number.")
    return config


def _check_base(
    folder: Path, model: dual_encoder.DualEncoder, variables: dual_encoder.Variables
) -> None:
    file = folder / BASE
    if not file.is_file():  # written by PEFT
        return
    content = text.read_json(file)
    content = content if isinstance(content, dict) else {}
    wanted, own = content.get("fingerprint"), base_fingerprint(model, variables)
    if wanted != own:
        raise ValueError(
            f"{folder} adapts {content.get('base') or 'another model'}, whose weights have the "
            f"fingerprint {wanted}; those of the given model have {own}."
        )


def _read_factors(
    folder: Path, config: Mapping[str, Any], model: dual_encoder.DualEncoder, params: dict
) -> dict[str, dict[str, np.ndarray]]:
    """Returns {our layer: {"a": [in, rank], "b": [rank, out]}}."""
    file = folder / WEIGHTS
    layers = {}
    for name, leaf in trees.named_leaves(params):
        if name.endswith("/kernel") and len(leaf.shape) == 2:
            layer = name.removesuffix("/kernel")
            try:
                layers[_module(layer, model)] = layer, leaf.shape
            except ValueError:  # it has no name there
                continue
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, array in weights_file.read_tensors(file).items():
        match = _TENSOR.fullmatch(name)
        if match is None or match[1] not in layers:
            raise ValueError(
                f"{file}: the tensor {name} adapts no dense layer or 1x1 convolution of the model."
            )
        layer, (inputs, outputs) = layers[match[1]]
        width = inputs if match[2] == "A" else outputs
        axis = 1 if match[2] == "A" else 0
        if array.ndim not in (2, 4) or array.shape[2:] not in ((), (1, 1)):
            raise ValueError(f"{file}: the tensor {name} {array.shape} is no matrix.")
        if array.shape[axis] != width:
            raise ValueError(
                f"{file}: the tensor {name} is {array.shape}, but the layer of the model has "
                f"{width} {'inputs' if axis else 'outputs'}."
            )
        matrix = np.array(array.reshape(array.shape[:2]).T, np.float32, order="C")
        found.setdefault(layer, {})[match[2].lower()] = matrix
    if not found:
        raise ValueError(f"{file} holds no tensor.")
    for layer, pair in found.items():
        if len(pair) < 2 or pair["a"].shape[1] != pair["b"].shape[0]:
            raise ValueError(f"{file}: A and B of {_module(layer, model)} do not fit each other.")
    return found


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Returns the factor of A B of a module; of "" that of modules without one of their own."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if module and re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
