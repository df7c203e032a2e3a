"""Names and layouts of the Hugging Face ALIGN checkpoint (transformers `AlignModel`) and of ours.

Files are read and written by `weights_file`, sizes by `hf_config`. Source: hf_align_parity 1.10.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from align_jax import trees
from align_jax.hf import config as hf_config
from align_jax.hf import weights as weights_file
from align_jax.models import dual_encoder, efficientnet

# Constant ids that older versions of transformers stored; read by nobody, never written.
LEGACY = r"(^|\.)embeddings\.(position_ids|token_type_ids)$"
# What a checkpoint holds besides: counters of batches, and BERT's pooler, which ALIGN never uses.
_EXTRA = r"\.num_batches_tracked$|^text_model\.pooler\.dense\.(weight|bias)$"

_TEXT_LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "feed_forward": "intermediate.dense",
    "feed_forward_out": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
}
_BLOCK = {
    "expand": "expansion.expand_conv",
    "expand_bn": "expansion.expand_bn",
    "depthwise": "depthwise_conv.depthwise_conv",
    "depthwise_bn": "depthwise_conv.depthwise_norm",
    "squeeze/reduce": "squeeze_excite.reduce",
    "squeeze/expand": "squeeze_excite.expand",
    "project": "projection.project_conv",
    "project_bn": "projection.project_bn",
}
_TEXT_TOP = {
    "word_embeddings/embedding": "embeddings.word_embeddings.weight",
    "position_embeddings": "embeddings.position_embeddings.weight",
    "segment_embeddings": "embeddings.token_type_embeddings.weight",
    "embeddings_norm/scale": "embeddings.LayerNorm.weight",
    "embeddings_norm/bias": "embeddings.LayerNorm.bias",
}
_LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_STATISTIC = {"mean": "running_mean", "var": "running_var"}


@dataclasses.dataclass(frozen=True)
class HfCheckpoint:
    """A Hugging Face ALIGN folder, read.

    Attributes:
      model: of the sizes in its config.json.
      variables: {"params", "batch_stats"}, float32 NumPy.
      extras: tensors that the model does not use, by their Hugging Face names.
    """

    model: dual_encoder.DualEncoder
    variables: dual_encoder.Variables
    extras: dict[str, np.ndarray]

    @property
    def legacy_keys(self) -> tuple[str, ...]:
        """Names of tensors that only old versions of transformers wrote; `to_hf` drops them."""
        return tuple(key for key in self.extras if re.search(LEGACY, key))


def load_folder(path: str | os.PathLike, *, dtype: str = "float32") -> HfCheckpoint:
    """Returns the checkpoint in a Hugging Face folder (config.json and weights).

    Args:
      path: the folder; see `weights_file.FILES`.
      dtype: of convolutions and matmuls of `model`, "float32" or "bfloat16".

    Raises:
      ValueError: one line with the file and what is wrong with it.
    """
    path = Path(path)
    config = hf_config.read_config(path)
    try:
        model = hf_config.model_from_hf(config, dtype=dtype)
        variables, extras = from_hf(weights_file.read_tensors(path), model)
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error
    return HfCheckpoint(model, variables, extras)


def from_hf(
    tensors: Mapping[str, np.ndarray], model: dual_encoder.DualEncoder
) -> tuple[dual_encoder.Variables, dict[str, np.ndarray]]:
    """Returns (variables, extras) from the tensors of a Hugging Face state dict, as copies.

    Args:
      tensors: name -> array, as `AlignModel.state_dict()` has them.
      model: of the same sizes.

    Returns:
      variables: {"params", "batch_stats"}, float32 NumPy in C order.
      extras: what the model does not use, by name: counters, BERT's pooler, legacy ids. They make
        the way back exact (`to_hf`).

    Raises:
      ValueError: missing, unexpected and misshapen tensors, all of them in one message; or the
        model has an image projection, which the format lacks.
    """
    if model.image_width != model.embed_dim:
        raise ValueError(
            f"A Hugging Face checkpoint has no image projection: model.embed_dim={model.embed_dim} "
            f"must be the width of the image tower, {model.image_width}. (Each tower alone loads.)"
        )
    shapes = dual_encoder.abstract_variables(model)
    extras = {
        key: np.array(value)
        for key, value in tensors.items()
        if re.search(_EXTRA, key) or re.search(LEGACY, key)
    }
    rest = {key: value for key, value in tensors.items() if key not in extras}
    return _read(rest, shapes, model), extras


def image_from_hf(
    tensors: Mapping[str, np.ndarray], model: dual_encoder.DualEncoder
) -> dual_encoder.Variables:
    """Returns {"params": ..., "batch_stats": ...} of the image tower alone (subtrees "image").

    Args:
      tensors: of an `AlignModel` or an `AlignVisionModel`.
      model: whose image tower has the same sizes.

    Raises:
      ValueError: as `from_hf`.
    """
    if any(key.startswith("vision_model.") for key in tensors):
        found = {key: value for key, value in tensors.items() if key.startswith("vision_model.")}
    else:
        found = {f"vision_model.{key}": value for key, value in tensors.items()}
    found = {key: value for key, value in found.items() if not re.search(_EXTRA, key)}
    shapes = dual_encoder.abstract_variables(model)
    tree = {name: {"image": shapes[name]["image"]} for name in ("params", "batch_stats")}
    return {name: part["image"] for name, part in _read(found, tree, model).items()}


def text_from_bert(
    tensors: Mapping[str, np.ndarray], model: dual_encoder.DualEncoder
) -> dict[str, Any]:
    """Returns the parameters of the text tower alone (subtree "text").

    Args:
      tensors: of an `AlignModel`, an `AlignTextModel` or a plain BERT such as bert-base-uncased
        ("bert." or nothing before the names, "gamma" and "beta" in old ones). Heads are ignored.
      model: whose text tower has the same sizes.

    Raises:
      ValueError: as `from_hf`.
    """
    prefix = next(
        (p for p in ("text_model.", "bert.") if any(key.startswith(p) for key in tensors)), ""
    )
    found = {}
    for key, value in tensors.items():
        bare = key.removeprefix(prefix)
        if key.startswith(prefix) and bare.startswith(("embeddings.", "encoder.")):
            bare = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", bare))
            found[f"text_model.{bare}"] = value
    found = {key: value for key, value in found.items() if not re.search(LEGACY, key)}
    shapes = {"params": {"text": dual_encoder.abstract_variables(model)["params"]["text"]}}
    return _read(found, shapes, model)["params"]["text"]


def to_hf(
    variables: dual_encoder.Variables,
    model: dual_encoder.DualEncoder,
    extras: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Returns every tensor that transformers expects, by name (1394 for align-base).

    Linear and convolution weights are transposed views. An image projection is folded into the
    last block where that is exact (`hf_config.fold_image_projection`). The bias of the sigmoid
    loss is left out: the format has no place for it, and no embedding depends on it.

    Args:
      variables: {"params", "batch_stats"}.
      model: that they belong to.
      extras: from `from_hf`; pooler and counters that it lacks are written as zeros.

    Raises:
      ValueError: the image projection cannot be folded; the reason.
    """
    extras = extras or {}
    if model.image_width != model.embed_dim:
        variables, model = _fold(variables, model)
    tensors = {}
    for name, leaf in trees.named_leaves(variables):
        if name == "params/bias":  # of the sigmoid loss: not in the format, and no tower uses it
            continue
        tensors[hf_name(name, model)] = _to_theirs(name, np.asarray(leaf, np.float32))
    hidden = model.text.hidden_dim
    expected = {
        "text_model.pooler.dense.weight": np.zeros((hidden, hidden), np.float32),
        "text_model.pooler.dense.bias": np.zeros(hidden, np.float32),
    }
    for key in list(tensors):
        if key.endswith(".running_mean"):
            counter = key.removesuffix("running_mean") + "num_batches_tracked"
            expected[counter] = np.zeros((), np.int64)
    return tensors | {key: np.asarray(extras.get(key, zero)) for key, zero in expected.items()}


def hf_name(name: str, model: dual_encoder.DualEncoder) -> str:
    """Returns the Hugging Face key of our tensor, e.g. of "params/text_projection/kernel".

    Raises:
      KeyError: the format has no such tensor (an image projection).
    """
    collection, name = name.split("/", 1)
    if name == "temperature":
        return name
    module, leaf = name.rsplit("/", 1)
    suffix = _STATISTIC[leaf] if collection == "batch_stats" else _LEAF.get(leaf)
    if module == "text_projection":
        return f"text_projection.{suffix}"
    if name.startswith("text/encoder/layer"):
        layer, part = module.removeprefix("text/encoder/layer").split("/", 1)
        return f"text_model.encoder.layer.{layer}.{_TEXT_LAYER[part]}.{suffix}"
    if name.startswith("text/"):
        return f"text_model.{_TEXT_TOP[name.removeprefix('text/')]}"
    if name.startswith("image/stem_"):
        part = {"stem_conv": "convolution", "stem_bn": "batchnorm"}[module.split("/")[1]]
        return f"vision_model.embeddings.{part}.{suffix}"
    if name.startswith("image/stage"):
        _, stage, block, part = module.split("/", 3)
        before = model.image.stages[: int(stage.removeprefix("stage")) - 1]
        number = sum(efficientnet.round_repeats(s.repeats, model.image.depth) for s in before)
        number += int(block.removeprefix("block"))
        return f"vision_model.encoder.blocks.{number}.{_BLOCK[part]}.{suffix}"
    raise KeyError(f"The Hugging Face format has no place for {name}.")


def _read(
    tensors: Mapping[str, np.ndarray],
    shapes: dual_encoder.Variables,
    model: dual_encoder.DualEncoder,
) -> dual_encoder.Variables:
    """Returns `shapes` filled from `tensors`, which must be exactly those needed."""
    expected = {}
    for name, leaf in trees.named_leaves(shapes):
        theirs = _to_theirs(name, np.broadcast_to(np.float32(0), leaf.shape))
        expected[hf_name(name, model)] = theirs
    difference = trees.describe_difference(
        expected, dict(tensors), limit=len(expected) + len(tensors)
    )
    if difference:
        raise ValueError(f"The Hugging Face checkpoint does not fit the model: {difference}.")

    def fill(name: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        value = _to_ours(name, tensors[hf_name(name, model)], len(leaf.shape))
        return np.array(value, np.float32, order="C")  # a copy: the file may be replaced

    return trees.map_named(fill, shapes)


def _fold(
    variables: dual_encoder.Variables, model: dual_encoder.DualEncoder
) -> tuple[dual_encoder.Variables, dual_encoder.DualEncoder]:
    """Returns (variables, model) with the image projection in the last block's convolution."""
    folded = hf_config.fold_image_projection(model)
    params, stats = variables["params"], variables["batch_stats"]
    stage = f"stage{len(model.image.stages)}"
    block, moments = params["image"][stage]["block0"], stats["image"][stage]["block0"]

    def double(leaf: np.ndarray | jax.Array) -> np.ndarray:
        return np.asarray(leaf, np.float64)

    mean, var = (double(moments["project_bn"][name]) for name in ("mean", "var"))
    norm = {name: double(leaf) for name, leaf in block["project_bn"].items()}
    outer = {name: double(leaf) for name, leaf in params["image_projection"].items()}
    factor = norm["scale"] / np.sqrt(var + model.image.bn_eps)
    kernel = (double(block["project"]["kernel"]) * factor) @ outer["kernel"]
    bias = (norm["bias"] - mean * factor) @ outer["kernel"] + outer["bias"]
    # A normalisation that does nothing: its variance and eps add up to one.
    one = np.ones(model.embed_dim)
    new_block = block | {"project": {"kernel": kernel}, "project_bn": {"scale": one, "bias": bias}}
    new_moments = moments | {"project_bn": {"mean": 0 * one, "var": one - model.image.bn_eps}}

    def with_block(tree: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
        return tree | {"image": tree["image"] | {stage: {"block0": block}}}

    params = {name: leaf for name, leaf in params.items() if name != "image_projection"}
    return {
        "params": with_block(params, new_block),
        "batch_stats": with_block(stats, new_moments),
    }, folded


def _to_ours(name: str, value: np.ndarray, rank: int) -> np.ndarray:
    if not name.endswith("/kernel"):
        return value
    if value.ndim == 2:  # Linear [out, in]
        return value.T
    value = value.transpose(2, 3, 1, 0)  # [out, in, k, k] -> [k, k, in, out]
    return value[0, 0] if rank == 2 else value


def _to_theirs(name: str, value: np.ndarray) -> np.ndarray:
    if not name.endswith("/kernel"):
        return value
    if value.ndim == 4:  # [k, k, in, out] -> [out, in, k, k]
        return value.transpose(3, 2, 0, 1)
    # [in, out] -> [out, in, 1, 1] of a convolution, [out, in] of Linear
    return value.T[:, :, None, None] if "/image/" in name else value.T
