"""Trains a small ALIGN on Flickr8k from scratch: 6,000 images with 5 captions each.

align pack 'captions.jsonl?images=train.zip' --out data/flickr8k --split train
align pack 'dev.jsonl?images=dev.zip' --out data/flickr8k --split dev
align train --config configs/flickr8k.py --workdir runs/flickr8k

24 minutes on 2 busy CPU cores. R@10 on the 1,000 dev images: 8.5 % image to text, 8.9 % text to
image (chance 1 %). Published: none for so little data; zero-shot models trained at scale reach more
than 96 % on Flickr30K (Jia et al. 2021).
"""

from align_jax.config import default_config


def get_config():
    c = default_config()
    c.model.image.variant = "nano"
    c.model.image.drop_path_rate = 0.1
    c.model.text.variant = "tiny"
    c.model.text.dropout_rate = 0.1
    c.model.embed_dim = 256
    c.model.dtype = "float32"
    c.model.bn_decay = 0.95
    c.model.bn_group_size = 64  # the last maps of a 64-px image are 2 x 2

    c.data.source = "data/flickr8k?split=train"
    c.data.image_size = 64
    c.data.resize_size = 72
    c.data.resize = "pil"
    c.data.max_tokens = 24
    c.data.vocab_size = 4096

    c.optim.name = "adamw"
    c.optim.learning_rate = 3e-3
    c.optim.text_lr_multiplier = 0.5
    c.optim.b2 = 0.98
    c.optim.warmup_steps = 60
    c.optim.schedule = "cosine"
    c.optim.weight_decay = 0.1
    c.optim.no_decay = ("_bn/", "_norm/", "bias$")
    c.optim.temperature = "log"
    c.loss.temperature_init = 0.07
    c.loss.mask_duplicates = "both"

    c.train.batch_size = 256
    c.train.steps = 1000
    c.checkpoint.every_steps = 100
    c.eval.every_steps = 100
    c.log.every_steps = 10
    c.eval.evaluators.dev = {"type": "retrieval", "source": "data/flickr8k?split=dev"}
    return c
