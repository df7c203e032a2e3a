"""The two base configs of the ablations, and how the point of a sweep is made from one of them.

A sweep is a folder `ablation_*` whose config.py lists points, each a few keys that differ from the
base. `paper` is the base of Jia et al. 2021, section 6; `smoke` is the size of a test, on a CPU.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from align_jax.config import default_config

# What the full sweeps read; edit these lines to your paths.
PAIRS = "data/pairs"  # packed pairs in random order, with a split "train"
CC3M = "data/cc3m"
MSCOCO = "data/mscoco?split=test"  # Karpathy's 5,000 images
TOKENIZER = "tokenizers/pairs"

# How the published values are written in each config.py: these three in one line.
MEASURES = "MSCOCO zero-shot R@1 image to text / text to image / ImageNet KNN R@1"

Points = Mapping[str, Mapping[str, Any]]


def make_config(point: str, points: Points, smoke_points: Points) -> ConfigDict:
    """Returns the config of `NAME`, a key of `points`, or of `smoke-NAME`, a key of `smoke_points`.

    Args:
      point: which.
      points: name -> {"group.key": value} over the paper's base config.
      smoke_points: the same over the smoke config.

    Raises:
      ValueError: there is no such point.
    """
    names = [*points, *(f"smoke-{name}" for name in smoke_points)]
    if point not in names:
        raise ValueError(f"point {point!r} is unknown; use one of {', '.join(names)}")
    smoke = point.startswith("smoke-")
    config = _smoke() if smoke else _paper()
    config.update_from_flattened_dict(
        smoke_points[point.removeprefix("smoke-")] if smoke else points[point]
    )
    return config


def _paper():
    c = default_config()  # batch, optimizer, loss, images and text are the paper's
    c.model.image.variant = "b5"
    c.model.text.variant = "base"
    c.model.embed_dim = 640
    c.model.remat = "block"
    c.model.scan_layers = True
    c.data.source = f"{PAIRS}?split=train"
    c.data.tokenizer = TOKENIZER
    c.data.num_workers = 16
    c.train.steps = 1_000_000  # 1.2 M are of the main results
    c.eval.evaluators.mscoco = {"type": "retrieval", "source": MSCOCO}
    return c


def _smoke():
    c = default_config()
    c.model.image.variant = "pico"
    c.model.image.drop_path_rate = 0.0
    c.model.text.variant = "tiny"
    c.model.text.dropout_rate = 0.0
    c.model.embed_dim = 64
    c.model.dtype = "float32"
    c.model.bn_decay = 0.9
    c.data.source = "scenes?size=2000&seed=1"
    c.data.image_size = 32
    c.data.resize_size = 32
    c.data.resize = "pil"
    c.data.flip = False  # captions say left and right
    c.data.max_tokens = 20
    c.data.vocab_size = 512
    c.optim.name = "adamw"
    c.optim.learning_rate = 3e-3
    c.optim.warmup_steps = 3
    c.optim.schedule = "cosine"
    c.optim.temperature = "log"
    c.loss.temperature_init = 0.07
    c.train.batch_size = 64
    c.train.steps = 30
    c.checkpoint.every_steps = 1000  # the last step is saved and evaluated anyway
    c.eval.every_steps = 1000
    c.log.every_steps = 10
    c.eval.evaluators.scenes = {"type": "retrieval", "source": "scenes?size=128&seed=1000003"}
    return c
