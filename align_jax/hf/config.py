"""The config.json of a Hugging Face ALIGN model <-> the attributes of our dual encoder.

Tensors are `convert`'s business. Source: hf_align_parity 1.2 to 1.11 (transformers 4.57 and 5.x).
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from align_jax.data.tokenizer import quiet_transformers
from align_jax.models import bert, dual_encoder, efficientnet, layers
from align_jax.storage import text as text_lib

if TYPE_CHECKING:
    from transformers import AlignConfig, AlignTextConfig, AlignVisionConfig

# One column of the stage table each, in the order of `efficientnet.StageSpec`.
_STAGE_LISTS = (
    "kernel_sizes",
    "num_block_repeats",
    "in_channels",
    "out_channels",
    "expand_ratios",
    "strides",
)
_STEM_CHANNELS = 32  # before scaling, in every config
# Other names of functions in `layers.ACTIVATIONS`; the tanh form of GELU has five.
_ACTIVATION_NAMES = {
    "gelu_python": "gelu",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
}


def read_config(folder: str | os.PathLike) -> "AlignConfig":
    """Returns the configuration in the config.json of a folder.

    Raises:
      ValueError: one line with the file and what is wrong with it.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is no Hugging Face folder: it has no config.json.")
    content = text_lib.read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object.")
    try:
        return parse_config(content)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def parse_config(content: Mapping[str, Any]) -> "AlignConfig":
    """Returns the configuration that the content of a config.json gives.

    Args:
      content: of transformers 4.x or 5.x. Whole numbers may be written as floats and the reverse.

    Raises:
      ValueError: another kind of model, or a value of a type that no ALIGN model has.
    """
    if content.get("model_type") != "align":
        raise ValueError(
            f"config.json has model_type {content.get('model_type')!r}; only 'align' is read."
        )
    with quiet_transformers() as transformers:
        parts = {
            "text_config": transformers.AlignTextConfig,
            "vision_config": transformers.AlignVisionConfig,
        }
        content = _numbers(content, transformers.AlignConfig)
        for name, kind in parts.items():
            if isinstance(content.get(name), dict):
                content[name] = _numbers(content[name], kind)
        try:
            return transformers.AlignConfig.from_dict(content)
        except Exception as error:  # it has classes of its own for a value of a wrong type
            problem = " ".join(str(error).split())
            raise ValueError(f"config.json holds a value of a wrong type: {problem}.") from error


def model_from_hf(config: "AlignConfig", *, dtype: str = "float32") -> dual_encoder.DualEncoder:
    """Returns the dual encoder that a configuration describes, whatever its sizes.

    Args:
      config: of an `AlignModel`, see `parse_config`.
      dtype: of convolutions and matmuls, "float32" or "bfloat16".

    Raises:
      ValueError: a value that no ALIGN model can have.
    """
    image = _trunk(config.vision_config, dtype)
    encoder = _encoder(config.text_config, dtype)
    width = efficientnet.scale_stages(image.stages, image.width, image.depth, image.depth_divisor)[
        -1
    ].out_channels
    if width != config.projection_dim:
        raise ValueError(
            f"config.json: projection_dim={config.projection_dim} must be the width of the image "
            f"tower, {width} (last entry of vision_config.out_channels, scaled)."
        )
    return dual_encoder.DualEncoder(
        image=image,
        text=encoder,
        embed_dim=config.projection_dim,
        image_width=width,
        temperature_init=config.temperature_init_value,
    )


def hf_from_model(
    model: dual_encoder.DualEncoder, *, image_size: int, pad_token_id: int = 0
) -> "AlignConfig":
    """Returns the configuration that transformers 4.57 and 5.x read for this model.

    Args:
      model: the dual encoder. An image projection is folded, as in `convert.to_hf`.
      image_size: side of the crop that the model was trained with, pixels.
      pad_token_id: of the tokenizer; torch leaves this row of the embeddings as it is.

    Raises:
      ValueError: the format cannot describe the model; the reason.
    """
    if any(stage.fused for stage in model.image.stages):
        raise ValueError(
            "The Hugging Face format has no place for fused blocks; train with a "
            "model.image.variant of the first EfficientNet, such as 'nano' or 'b0'."
        )
    model = fold_image_projection(model)
    image, text = model.image, model.text
    if image.padding != "hf":
        raise ValueError(
            f"model.padding={image.padding!r} has no place in the Hugging Face format, whose "
            "convolutions pad as 'hf' does."
        )
    columns = zip(*(dataclasses.astuple(stage)[:-1] for stage in image.stages), strict=True)
    text_config = {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_dim,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "intermediate_size": text.feed_forward_dim or 4 * text.hidden_dim,
        "hidden_act": text.activation,
        "hidden_dropout_prob": text.dropout_rate,
        "attention_probs_dropout_prob": text.attention_dropout_rate,
        "max_position_embeddings": text.max_positions,
        "type_vocab_size": text.num_segments,
        "layer_norm_eps": text.norm_eps,
        "pad_token_id": pad_token_id,
    }
    vision_config = {
        "image_size": image_size,
        "width_coefficient": image.width,
        "depth_coefficient": image.depth,
        "depth_divisor": image.depth_divisor,
        **{name: list(column) for name, column in zip(_STAGE_LISTS, columns, strict=True)},
        "depthwise_padding": list(image.depthwise_padding),
        "squeeze_expansion_ratio": image.squeeze_ratio,
        "hidden_act": image.activation,
        # The side of its pooling window: any that covers the last map pools the whole of it.
        "hidden_dim": max(model.image_width, image_size),
        "pooling_type": image.pooling,
        "batch_norm_eps": image.bn_eps,
        "drop_connect_rate": image.drop_path_rate,
    }
    return parse_config(
        {
            "architectures": ["AlignModel"],
            "model_type": "align",
            "dtype": "float32",
            "projection_dim": model.embed_dim,
            "temperature_init_value": model.temperature_init,
            "text_config": text_config,
            "vision_config": vision_config,
        }
    )


def fold_image_projection(model: dual_encoder.DualEncoder) -> dual_encoder.DualEncoder:
    """Returns the model whose trunk ends in `embed_dim` channels; itself if it does already.

    The projection is linear, and so is everything after the last activation if the last stage is
    one block (which has no residual) and pooling is the mean: there it folds into that block's
    projecting convolution, exactly up to float rounding (`convert.to_hf` folds the tensors).

    Raises:
      ValueError: it does not fold; why.
    """
    if model.image_width == model.embed_dim:
        return model
    image = model.image
    problem = (
        f"The image projection ({model.image_width} -> {model.embed_dim}) has no place in the "
        "Hugging Face format, and cannot be folded into the trunk: "
    )
    if efficientnet.round_repeats(image.stages[-1].repeats, image.depth) != 1:
        raise ValueError(
            problem + "the last stage has residual blocks. Train with "
            f"model.embed_dim={model.image_width}, or an image tower with one last block (pico, "
            "nano, b0)."
        )
    if image.pooling != "mean":
        raise ValueError(problem + f"pooling is {image.pooling!r}, not 'mean'.")
    # The format gives channels before scaling.
    for channels in range(1, 2 + int((model.embed_dim + image.depth_divisor) / image.width)):
        if (
            efficientnet.round_filters(channels, image.width, image.depth_divisor)
            == model.embed_dim
        ):
            break
    else:
        raise ValueError(
            problem + f"no number of channels times width {image.width} rounds to "
            f"{model.embed_dim}. Use a model.embed_dim that is a multiple of {image.depth_divisor}."
        )
    last = dataclasses.replace(image.stages[-1], out_channels=channels)
    return model.clone(
        image=image.clone(stages=(*image.stages[:-1], last)), image_width=model.embed_dim
    )


def _numbers(content: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Returns the content with 2 as 2.0 and 2.0 as 2 where the configuration wants it so."""
    kinds = {field.name: field.type for field in dataclasses.fields(kind)}
    content = dict(content)
    for name, value in content.items():
        if kinds.get(name) is float and type(value) is int:
            content[name] = float(value)
        elif kinds.get(name) is int and isinstance(value, float) and value.is_integer():
            content[name] = int(value)
    return content


def _trunk(c: "AlignVisionConfig", dtype: str) -> efficientnet.EfficientNet:
    lengths = {name: len(getattr(c, name)) for name in _STAGE_LISTS}
    if len(set(lengths.values())) != 1 or not c.strides:
        raise ValueError(f"config.json: the lists of vision_config differ in length: {lengths}.")
    _only("vision_config.num_channels", [c.num_channels], (3,))
    _only("vision_config.pooling_type", [c.pooling_type], ("mean", "max"))
    _only("vision_config.strides", c.strides, (1, 2))
    even = [size for size in c.kernel_sizes if size % 2 == 0]
    if even:
        raise ValueError(f"config.json: vision_config.kernel_sizes holds {even[0]}; only odd ones.")
    rows = zip(*(getattr(c, name) for name in _STAGE_LISTS), strict=True)
    stages = tuple(efficientnet.StageSpec(*row) for row in rows)
    trunk = efficientnet.EfficientNet(
        c.width_coefficient,
        c.depth_coefficient,
        stages=stages,
        depth_divisor=c.depth_divisor,
        squeeze_ratio=c.squeeze_expansion_ratio,
        pooling=c.pooling_type,
        depthwise_padding=tuple(c.depthwise_padding),
        activation=_activation("vision_config", c.hidden_act),
        drop_path_rate=float(c.drop_connect_rate),
        bn_eps=c.batch_norm_eps,
        dtype=jnp.dtype(dtype),
    )
    scaled = efficientnet.scale_stages(stages, trunk.width, trunk.depth, trunk.depth_divisor)
    channels = efficientnet.round_filters(_STEM_CHANNELS, trunk.width, trunk.depth_divisor)
    for number, stage in enumerate(scaled):
        if stage.in_channels != channels:
            raise ValueError(
                f"config.json: vision_config.in_channels[{number}] scales to {stage.in_channels} "
                f"channels, but {channels} come from the layer before."
            )
        channels = stage.out_channels
    return trunk


def _encoder(c: "AlignTextConfig", dtype: str) -> bert.Bert:
    kind = getattr(c, "position_embedding_type", "absolute")
    _only("text_config.position_embedding_type", [kind], ("absolute",))
    if c.hidden_size % c.num_attention_heads:
        raise ValueError(
            f"config.json: text_config.hidden_size={c.hidden_size} is no multiple of "
            f"num_attention_heads={c.num_attention_heads}."
        )
    return bert.Bert(
        c.vocab_size,
        c.num_hidden_layers,
        c.hidden_size,
        c.num_attention_heads,
        feed_forward_dim=c.intermediate_size,
        max_positions=c.max_position_embeddings,
        num_segments=c.type_vocab_size,
        activation=_activation("text_config", c.hidden_act),
        norm_eps=c.layer_norm_eps,
        dropout_rate=float(c.hidden_dropout_prob),
        attention_dropout_rate=float(c.attention_probs_dropout_prob),
        dtype=jnp.dtype(dtype),
    )


def _activation(group: str, name: str) -> str:
    name = _ACTIVATION_NAMES.get(name, name)
    _only(f"{group}.hidden_act", [name], (*layers.ACTIVATIONS, *_ACTIVATION_NAMES))
    return name


def _only(key: str, values: Iterable[int | str], allowed: Sequence[int | str]) -> None:
    for value in values:
        if value not in allowed:
            options = ", ".join(map(str, allowed))
            raise ValueError(f"config.json: {key} holds {value!r}; only {options} can be read.")
