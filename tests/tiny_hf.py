"""A tiny random Hugging Face ALIGN model in a folder, made by transformers and our processor."""

import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AlignConfig, AlignModel

from align_jax.data import tokenizer
from align_jax.hf import processor

CAPTIONS = ["a photo of a cat", "a photo of a dog", "two red squares and circles on a mat"] * 3
IMAGE_SIZE, RESIZE_SIZE = 33, 40


def make_folder(folder, *, own_tokenizer=True):
    """Writes the folder as transformers 5 does; returns the model, in eval mode.

    Without `own_tokenizer`, the tokenizer's files are in the folder already, and stay.
    """
    if own_tokenizer:
        tokens = tokenizer.train_wordpiece(CAPTIONS, 200)
    else:
        tokens = tokenizer.load_tokenizer(folder)
    config = AlignConfig(
        text_config={
            "vocab_size": tokens.vocab_size,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 37,
            "max_position_embeddings": 64,
        },
        vision_config={
            "width_coefficient": 1.0,
            "depth_coefficient": 1.0,
            "image_size": IMAGE_SIZE,
            "in_channels": [32, 16, 24],
            "out_channels": [16, 24, 32],
            "kernel_sizes": [3, 3, 5],
            "strides": [1, 2, 2],
            "num_block_repeats": [1, 1, 2],
            "expand_ratios": [1, 6, 6],
            "hidden_dim": 64,
        },
        projection_dim=32,
        temperature_init_value=0.05,
    )
    torch.manual_seed(0)
    model = AlignModel(config)
    with torch.no_grad():
        for module in model.modules():  # else features of random weights vanish
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.weight.normal_(0, 0.3)
        # transformers takes the statistics of the newest batch nearly whole: features that differ.
        colours = torch.rand(64, 3, 1, 1) * 2 - 1
        noise = torch.rand(64, 3, IMAGE_SIZE, IMAGE_SIZE) * torch.rand(64, 1, 1, 1)
        for _ in range(2):
            model.vision_model(colours + noise)
    model.eval()
    model.save_pretrained(folder)
    sizes = (IMAGE_SIZE, RESIZE_SIZE, "pil", 64, tokens.vocab_size, tokens.fingerprint())
    with tempfile.TemporaryDirectory() as written:
        processor.write_processor(written, tokens, processor.Preprocessing(*sizes))
        for file in Path(written).iterdir():
            if own_tokenizer or "processor" in file.name:
                shutil.copy(file, folder)
    return model
