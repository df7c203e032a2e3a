"""Names and layouts of the Hugging Face ALIGN checkpoint (transformers `AlignModel`) and of ours.

Only the mapping lives here: reading and writing files does not. Source: hf_align_parity 1.10.
"""

from collections.abc import Mapping

import numpy as np

from align_jax import trees
from align_jax.models import dual_encoder, efficientnet

# Keys that hold nothing the model uses: counters, constant ids, and BERT's pooler.
IGNORED = ("num_batches_tracked", "position_ids", "token_type_ids", "text_model.pooler.")

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


def from_hf(
    tensors: Mapping[str, np.ndarray], model: dual_encoder.DualEncoder
) -> dual_encoder.Variables:
    """Returns our variables, float32 NumPy, from the tensors of a Hugging Face state dict.

    Args:
      tensors: name -> array, as `AlignModel.state_dict()` has them.
      model: of the same sizes.

    Raises:
      ValueError: missing, unexpected or misshapen tensors, all of them in one message.
    """
    shapes = dual_encoder.abstract_variables(model)
    keys = {name: hf_name(name, model) for name, _ in trees.named_leaves(shapes)}
    found = {}
    for name, leaf in trees.named_leaves(shapes):
        if keys[name] in tensors:
            found[name] = _to_ours(name, np.asarray(tensors[keys[name]]), len(leaf.shape))
    extra = {
        key: value
        for key, value in tensors.items()
        if key not in keys.values() and not any(part in key for part in IGNORED)
    }
    difference = trees.describe_difference(dict(trees.named_leaves(shapes)), found | extra)
    if difference:
        raise ValueError(f"The Hugging Face checkpoint does not fit the model: {difference}.")
    return trees.map_named(lambda name, _: found[name].astype(np.float32), shapes)


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
        repeats = [
            efficientnet.round_repeats(spec.repeats, model.image.depth)
            for spec in efficientnet.STAGES
        ]
        number = sum(repeats[: int(stage.removeprefix("stage")) - 1])
        number += int(block.removeprefix("block"))
        return f"vision_model.encoder.blocks.{number}.{_BLOCK[part]}.{suffix}"
    raise KeyError(f"The Hugging Face format has no place for {name}.")


def _to_ours(name: str, value: np.ndarray, rank: int) -> np.ndarray:
    if not name.endswith("/kernel"):
        return value
    if value.ndim == 2:  # Linear [out, in]
        return value.T
    value = value.transpose(2, 3, 1, 0)  # [out, in, k, k] -> [k, k, in, out]
    return value[0, 0] if rank == 2 else value
