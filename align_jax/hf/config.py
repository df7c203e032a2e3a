"""The config.json of a Hugging Face ALIGN model <-> the attributes of our dual encoder.

Tensors are `convert`'s business. Source: hf_align_parity 1.2 to 1.11 (transformers 4.57 and 5.x).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from align_jax.models import bert, dual_encoder, efficientnet, layers

# What transformers assumes where the file is silent: newer files hold only what differs.
_TEXT_DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
}
_VISION_DEFAULTS = {
    "num_channels": 3,
    "width_coefficient": 2.0,
    "depth_coefficient": 3.1,
    "depth_divisor": 8,
    "kernel_sizes": (3, 3, 5, 3, 5, 5, 3),
    "in_channels": (32, 16, 24, 40, 80, 112, 192),
    "out_channels": (16, 24, 40, 80, 112, 192, 320),
    "depthwise_padding": (),
    "strides": (1, 2, 2, 2, 1, 2, 1),
    "num_block_repeats": (1, 2, 2, 3, 3, 4, 1),
    "expand_ratios": (1, 6, 6, 6, 6, 6, 6),
    "squeeze_expansion_ratio": 0.25,
    "hidden_act": "swish",
    "pooling_type": "mean",
    "batch_norm_eps": 1e-3,
    "drop_connect_rate": 0.2,
}
_TOP_DEFAULTS = {"projection_dim": 640, "temperature_init_value": 1.0}

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


def model_from_hf(config: Mapping[str, Any], *, dtype: str = "float32") -> dual_encoder.DualEncoder:
    """Returns the dual encoder that a config.json describes, whatever its sizes.

    Args:
      config: the parsed config.json of an `AlignModel`, of transformers 4.x or 5.x.
      dtype: of convolutions and matmuls, "float32" or "bfloat16".

    Raises:
      ValueError: another kind of model, or a value that no ALIGN model can have.
    """
    if config.get("model_type") != "align":
        raise ValueError(
            f"config.json has model_type {config.get('model_type')!r}; only 'align' is read."
        )
    text = _TEXT_DEFAULTS | dict(config.get("text_config") or {})
    vision = _VISION_DEFAULTS | dict(config.get("vision_config") or {})
    top = _TOP_DEFAULTS | dict(config)
    try:
        image = _trunk(vision, dtype)
        encoder = _encoder(text, dtype)
        width = efficientnet.scale_stages(
            image.stages, image.width, image.depth, image.depth_divisor
        )[-1].out_channels
        model = dual_encoder.DualEncoder(
            image=image,
            text=encoder,
            embed_dim=int(top["projection_dim"]),
            image_width=width,
            temperature_init=float(top["temperature_init_value"]),
        )
    except TypeError as error:
        raise ValueError(f"config.json holds a value of a wrong type: {error}.") from error
    if width != model.embed_dim:
        raise ValueError(
            f"config.json: projection_dim={model.embed_dim} must be the width of the image tower, "
            f"{width} (last entry of vision_config.out_channels, scaled)."
        )
    return model


def hf_from_model(model: dual_encoder.DualEncoder, *, image_size: int) -> dict[str, Any]:
    """Returns the contents of the config.json that transformers 4.57 and 5.x read for this model.

    Args:
      model: the dual encoder. An image projection is folded, as in `convert.to_hf`.
      image_size: side of the crop that the model was trained with, pixels.

    Raises:
      ValueError: the format cannot describe the model; the reason.
    """
    model = fold_image_projection(model)
    image, text = model.image, model.text
    if image.padding != "hf":
        raise ValueError(
            f"model.padding={image.padding!r} has no place in the Hugging Face format, whose "
            "convolutions pad as 'hf' does."
        )
    columns = zip(*(dataclasses.astuple(stage) for stage in image.stages), strict=True)
    width = model.image_width
    stages = efficientnet.scale_stages(image.stages, image.width, image.depth, image.depth_divisor)
    return {
        "architectures": ["AlignModel"],
        "model_type": "align",
        "dtype": "float32",
        "initializer_range": 0.02,
        "projection_dim": model.embed_dim,
        "temperature_init_value": model.temperature_init,
        "text_config": {
            "model_type": "align_text_model",
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
            "initializer_range": 0.02,
            "pad_token_id": 0,
        },
        "vision_config": {
            "model_type": "align_vision_model",
            "num_channels": 3,
            "image_size": image_size,
            "width_coefficient": image.width,
            "depth_coefficient": image.depth,
            "depth_divisor": image.depth_divisor,
            **{name: list(column) for name, column in zip(_STAGE_LISTS, columns, strict=True)},
            "depthwise_padding": list(image.depthwise_padding),
            "squeeze_expansion_ratio": image.squeeze_ratio,
            "hidden_act": image.activation,
            # The side of its pooling window: any that covers the last map pools the whole of it.
            "hidden_dim": max(width, image_size),
            "pooling_type": image.pooling,
            "initializer_range": 0.02,
            "batch_norm_eps": image.bn_eps,
            "batch_norm_momentum": 0.99,
            "drop_connect_rate": image.drop_path_rate,
            "num_hidden_layers": sum(stage.repeats for stage in stages),
        },
    }


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


def _trunk(c: Mapping[str, Any], dtype: str) -> efficientnet.EfficientNet:
    lengths = {name: len(c[name]) for name in _STAGE_LISTS}
    if len(set(lengths.values())) != 1 or not c["strides"]:
        raise ValueError(f"config.json: the lists of vision_config differ in length: {lengths}.")
    _only("vision_config.num_channels", [c["num_channels"]], (3,))
    _only("vision_config.pooling_type", [c["pooling_type"]], ("mean", "max"))
    _only("vision_config.strides", c["strides"], (1, 2))
    even = [size for size in c["kernel_sizes"] if size % 2 == 0]
    if even:
        raise ValueError(f"config.json: vision_config.kernel_sizes holds {even[0]}; only odd ones.")
    stages = tuple(
        efficientnet.StageSpec(*(int(value) for value in row))
        for row in zip(*(c[name] for name in _STAGE_LISTS), strict=True)
    )
    trunk = efficientnet.EfficientNet(
        float(c["width_coefficient"]),
        float(c["depth_coefficient"]),
        stages=stages,
        depth_divisor=int(c["depth_divisor"]),
        squeeze_ratio=float(c["squeeze_expansion_ratio"]),
        pooling=c["pooling_type"],
        depthwise_padding=tuple(int(block) for block in c["depthwise_padding"]),
        activation=_activation("vision_config", c["hidden_act"]),
        drop_path_rate=float(c["drop_connect_rate"]),
        bn_eps=float(c["batch_norm_eps"]),
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


def _encoder(c: Mapping[str, Any], dtype: str) -> bert.Bert:
    _only("text_config.position_embedding_type", [c["position_embedding_type"]], ("absolute",))
    if c["hidden_size"] % c["num_attention_heads"]:
        raise ValueError(
            f"config.json: text_config.hidden_size={c['hidden_size']} is no multiple of "
            f"num_attention_heads={c['num_attention_heads']}."
        )
    return bert.Bert(
        int(c["vocab_size"]),
        int(c["num_hidden_layers"]),
        int(c["hidden_size"]),
        int(c["num_attention_heads"]),
        feed_forward_dim=int(c["intermediate_size"]),
        max_positions=int(c["max_position_embeddings"]),
        num_segments=int(c["type_vocab_size"]),
        activation=_activation("text_config", c["hidden_act"]),
        norm_eps=float(c["layer_norm_eps"]),
        dropout_rate=float(c["hidden_dropout_prob"]),
        attention_dropout_rate=float(c["attention_probs_dropout_prob"]),
        dtype=jnp.dtype(dtype),
    )


def _activation(group: str, name: str) -> str:
    name = _ACTIVATION_NAMES.get(name, name)
    _only(f"{group}.hidden_act", [name], (*layers.ACTIVATIONS, *_ACTIVATION_NAMES))
    return name


def _only(key: str, values, allowed: tuple) -> None:
    for value in values:
        if value not in allowed:
            options = ", ".join(map(str, allowed))
            raise ValueError(f"config.json: {key} holds {value!r}; only {options} can be read.")
