"""Hugging Face ALIGN models with random weights under which nothing vanishes, and their inputs."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB = 50
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Three short stages: two strides, a residual, kernels of 3 and 5, expansion by 1 and 4.
SMALL_VISION = {
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "in_channels": [32, 16, 24],
    "out_channels": [16, 24, 40],
    "kernel_sizes": [3, 5, 3],
    "strides": [1, 2, 2],
    "num_block_repeats": [1, 1, 2],
    "expand_ratios": [1, 4, 4],
    "hidden_dim": 160,
    "drop_connect_rate": 0.0,
}
SMALL_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    **NO_DROPOUT,
}

# name -> (projection_dim, changes of SMALL_TEXT, changes of SMALL_VISION)
CONFIGS = {
    # hf-tiny-v2/tiny-random-AlignModel, as hf_align_parity 1.11 has it
    "tiny-random": (
        64,
        {"intermediate_size": 37, "type_vocab_size": 16},
        {
            "width_coefficient": 2.0,
            "depth_coefficient": 3.1,
            "out_channels": [16, 24, 30],
            "kernel_sizes": [3, 3, 5],
            "strides": [1, 1, 2],
            "num_block_repeats": [1, 1, 2],
            "expand_ratios": [1, 6, 6],
            "hidden_act": "gelu",
        },
    ),
    # block 1 strides with a kernel of 5, block 2 with one of 3; 0 and 3 do not stride
    "symmetric-padding": (40, {}, {"depthwise_padding": [0, 1, 2, 3]}),
    "gelu-both-towers": (40, {"hidden_act": "gelu_new"}, {"hidden_act": "gelu"}),
    "max-pooling": (40, {"hidden_act": "relu"}, {"pooling_type": "max"}),
    "other-widths": (
        20,
        {
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "intermediate_size": 100,
            "max_position_embeddings": 17,
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-5,
        },
        {
            "width_coefficient": 0.5,
            "depth_coefficient": 1.4,
            "depth_divisor": 4,
            "squeeze_expansion_ratio": 0.5,
            "batch_norm_eps": 1e-5,
        },
    ),
}


def config_of(name):
    """Returns a transformers.AlignConfig; "align-base" has the sizes of kakaobrain/align-base."""
    if name == "align-base":
        vision = {"image_size": 289, "hidden_dim": 640}
        return transformers.AlignConfig(text_config={}, vision_config=vision, projection_dim=640)
    projection_dim, text, vision = CONFIGS[name]
    return transformers.AlignConfig(
        text_config=SMALL_TEXT | text,
        vision_config=SMALL_VISION | vision,
        projection_dim=projection_dim,
        temperature_init_value=0.3,
    )


def torch_model(name):
    """Returns an AlignModel in eval mode, every tensor of which matters (hf_align_parity 8).

    Hugging Face draws convolutions so small that features vanish: here they follow the fan-out,
    and the running statistics are off those of some images by N(0, 0.1) deviations and a factor in
    U(0.5, 1.5). Statistics that know nothing of the data make 55 blocks vanish or explode.
    """
    torch.manual_seed(0)
    model = transformers.AlignModel(config_of(name)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 4:
                out_channels = 1 if "depthwise" in key else parameter.shape[0]
                fan_out = out_channels * parameter.shape[2] * parameter.shape[3]
                parameter.normal_(0, (2 / fan_out) ** 0.5)
            elif key.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "norm.weight" in key.lower() or "_bn.weight" in key:
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 2 and "embeddings" not in key:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
        for block in model.vision_model.encoder.blocks:
            if block.projection.apply_dropout:  # residual: small, or depth amplifies rounding
                block.projection.project_bn.weight.mul_(0.1)
        norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        hooks = [norm.register_forward_pre_hook(_set_statistics) for norm in norms]
        model.vision_model(torch_inputs(make_batch(4, 192, seed=1))["pixel_values"])
    for hook in hooks:
        hook.remove()
    return model


def _set_statistics(norm, inputs):
    mean, var = inputs[0].mean((0, 2, 3)), inputs[0].var((0, 2, 3), unbiased=False)
    norm.running_mean.copy_(mean + 0.1 * var.sqrt() * torch.randn_like(mean))
    norm.running_var.copy_(var * (0.5 + torch.rand_like(var)))
    norm.num_batches_tracked.fill_(7)


def tensors_of(model):
    """Returns the state dict as NumPy copies."""
    return {key: tensor.detach().numpy().copy() for key, tensor in model.state_dict().items()}


def make_batch(batch, size_px, length=12, seed=0):
    """Returns a batch of unlike images (noise over a slope of a colour of its own) and captions."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 1, size_px)[:, None, None] * rng.uniform(-90, 90, (batch, 1, 1, 3))
    images = rng.uniform(90, 160, (batch, 1, 1, 3)) + slope
    images = images + rng.uniform(-60, 60, (batch, size_px, size_px, 3))
    lengths = rng.integers(3, length + 1, batch)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    return {
        "image": images.clip(0, 255).astype(np.uint8),
        "ids": (rng.integers(5, VOCAB, (batch, length)) * mask).astype(np.int32),
        "mask": mask,
        "index": np.arange(batch, dtype=np.int32),
    }


def torch_inputs(batch):
    """Returns the same batch as the keyword arguments of `AlignModel`."""
    pixels = torch.from_numpy(batch["image"].astype(np.float32) / 127.5 - 1)
    return {
        "input_ids": torch.from_numpy(batch["ids"]).long(),
        "attention_mask": torch.from_numpy(batch["mask"]).long(),
        "pixel_values": pixels.permute(0, 3, 1, 2),
    }
