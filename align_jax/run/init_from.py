"""Weights that a new run starts from: `config.init_from`, for fine-tuning and locked-image tuning.

Reads workdirs, Hugging Face ALIGN and plain BERT; where they come from is hub.py's business, what
their tensors are called convert.py's. A resumed run never gets here.
"""

import json
from collections.abc import Container

import jax
import numpy as np
from ml_collections import ConfigDict

from align_jax import trees
from align_jax.data.tokenizer import load_tokenizer
from align_jax.hf import convert, hub
from align_jax.hf import weights as weights_file
from align_jax.models import classifier, dual_encoder, lora
from align_jax.run import multihost
from align_jax.run.trained import load_trained

# config.init_towers -> subtrees; None is everything, projections and temperature included.
TOWERS = {"both": None, "image": ("image",), "text": ("text",)}


def with_tokenizer(config: ConfigDict) -> ConfigDict:
    """Returns the config with data.tokenizer set to that of `config.init_from`.

    Raises:
      ValueError: there is no such model, or the config names a tokenizer with other words: the
        text tower would read every word as another.
    """
    folder = hub.find_folder(config.init_from)
    path = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    own = load_tokenizer(path)
    if config.data.tokenizer:
        given = load_tokenizer(config.data.tokenizer)
        if given.fingerprint() != own.fingerprint():
            raise ValueError(
                f"config.data.tokenizer={config.data.tokenizer} has fingerprint "
                f"{given.fingerprint()}, but config.init_from={config.init_from} was trained with "
                f"{own.fingerprint()}; leave config.data.tokenizer empty."
            )
    config = config.copy_and_resolve_references()
    config.data.tokenizer = str(path)
    return config


def start_from(
    name: str,
    towers: str,
    model: dual_encoder.Model,
    variables: dual_encoder.Variables,
) -> dual_encoder.Variables:
    """Returns the variables with those of one or both towers taken from another model.

    A classifier takes the image tower and, from a classifier unless `towers` is "image", the head.

    BatchNorm statistics come along as running statistics and move by `config.model.bn_decay`
    (transformers' fine-tuning replaces them almost wholly at each step: hf_align_parity 1.5).

    Args:
      name: hub id, Hugging Face folder (ALIGN, or BERT for the text tower) or workdir.
      towers: key of `TOWERS`. A single tower comes without its projection.
      model: that is to be trained.
      variables: fresh ones of it; their shardings are kept, and A and B of an adapter.

    Raises:
      ValueError: no such model, or its tensors have other names or shapes, all of them named.
    """
    parts = TOWERS[towers]
    found = dict(trees.named_leaves(_read(name, towers, model)))
    if isinstance(model, classifier.Classifier):
        has_head = any(path.startswith("params/head/") for path in found)
        parts = ("image", "head") if parts is None and has_head else ("image",)
        head = " and head" if "head" in parts else "; the head is new"
        multihost.log(f"starting from {name}: image tower{head}")
    else:
        multihost.log(f"starting from {name} ({towers})")
    found = {path: value for path, value in found.items() if _is_part(path, parts)}
    base = variables | {"params": lora.base_of(variables["params"])}
    wanted = {path: leaf for path, leaf in trees.named_leaves(base) if _is_part(path, parts)}
    if "params/bias" not in found:  # of the sigmoid loss; models trained by softmax have none
        wanted.pop("params/bias", None)
    difference = trees.describe_difference(wanted, found)
    if difference:
        raise ValueError(
            f"config.init_from={name} does not fit config.model (config.init_towers={towers!r}): "
            f"{difference}."
        )

    def take(path: str, leaf: jax.Array) -> jax.Array:
        if path not in wanted:
            return leaf
        value = np.asarray(found[path], leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])

    return trees.map_named(take, variables)


def _read(name: str, towers: str, model: dual_encoder.Model) -> dual_encoder.Variables:
    folder = hub.find_folder(name)
    if hub.is_hugging_face(folder):
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind == "align":
            return convert.load_folder(folder).variables
        if towers != "text":
            raise ValueError(
                f"config.init_from={name} is a {kind!r} model; only config.init_towers='text' can "
                "start from it."
            )
        return {
            "params": {"text": convert.text_from_bert(weights_file.read_tensors(folder), model)}
        }
    found = load_trained(folder)
    return dual_encoder.merge_lora(found.model, jax.device_get(found.variables))


def _is_part(path: str, subtrees: Container[str] | None) -> bool:
    return subtrees is None or path.split("/")[1] in subtrees
