"""Trains a small ALIGN from scratch on real pairs: photos, web images, emoji; an hour on two cores.

experiments/real_pairs/prepare.sh DATA data/real_pairs
align train --config configs/real_pairs.py --workdir runs/real_pairs

Sets packed elsewhere: `--config configs/real_pairs.py:FOLDER`. 56 minutes on 2 quiet CPU cores.
R@10 on the 1,000 images of Flickr8k dev, image to text and text to image: 20.7 and 19.0 % with seed
0, 20.7 and 20.2 % with seed 1, 20.6 and 19.8 % with seed 2 (chance 1 %); what else it can and
cannot do, and what was tried: experiments/real_pairs/report.md. Published: none for so little data;
models trained at scale reach more than 96 % zero-shot on Flickr30K (Jia et al. 2021).
"""

from align_jax.config import default_config


def get_config(root: str = "data/real_pairs"):
    root = root or "data/real_pairs"
    c = default_config()
    c.model.image.variant = "fused-nano"
    c.model.image.drop_path_rate = 0.0
    c.model.text.variant = "tiny"
    c.model.text.dropout_rate = 0.1
    c.model.embed_dim = 256
    c.model.dtype = "float32"
    c.model.bn_decay = 0.95
    c.model.bn_group_size = 64  # the last maps of a 48-px image are 2 x 2

    # Rows of each 10: photos with five captions each, web images with one, emoji with two.
    c.data.mixture.flickr8k = {"source": f"{root}/flickr8k?split=train", "weight": 6.0}
    c.data.mixture.cc3m = {"source": f"{root}/cc3m?split=train", "weight": 3.0}
    c.data.mixture.emoji = {"source": f"{root}/emoji?split=train", "weight": 1.0}
    c.data.image_size = 48
    c.data.resize_size = 56
    c.data.resize = "pil"
    c.data.crop = "inception"  # every image comes a hundred times
    c.data.crop_min_area = 0.4
    c.data.max_tokens = 20
    c.data.vocab_size = 4096
    c.data.num_threads = 2

    c.optim.name = "adamw"
    c.optim.learning_rate = 2e-3
    c.optim.b2 = 0.98
    c.optim.warmup_steps = 200
    c.optim.schedule = "cosine"
    c.optim.weight_decay = 0.1
    c.optim.no_decay = ("_bn/", "_norm/", "bias$")
    c.optim.temperature = "log"
    c.loss.temperature_init = 0.07
    c.loss.label_smoothing = 0.0
    c.loss.mask_duplicates = "both"  # five captions an image, keywords that many emoji share

    c.train.batch_size = 256
    c.train.steps = 6_000
    c.checkpoint.every_steps = 1_000
    c.eval.every_steps = 1_000
    c.log.every_steps = 25
    c.eval.evaluators.dev = {"type": "retrieval", "source": f"{root}/flickr8k?split=dev"}
    c.eval.evaluators.emoji = {"type": "retrieval", "source": f"{root}/emoji?split=openmoji"}
    return c
