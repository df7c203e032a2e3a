"""Fine-tunes the image tower on small pictures of few classes, on a laptop, by STAGE:TRAIN:TEST.

align train --config configs/finetune_small.py:head:pictures/train:pictures/test \
    --workdir runs/head --config.init_from=runs/mine
align train --config configs/finetune_small.py:full:pictures/train:pictures/test \
    --workdir runs/full --config.init_from=runs/head

STAGE is head (the tower is fixed), full (all layers, BatchNorm statistics frozen, from the head's
workdir) or scratch (all layers from nothing). TRAIN and TEST are folders, zips or tars of class
folders, or other labelled images ('all.zip?part=1/2', 'all.zip?part=2/2'). The recipe of
configs/finetune_classes.py scaled down: 48 px and no larger ones in evaluation, crops of at least a
quarter, batch 64, rates 0.1 and 0.01. The sizes of the model are those of configs/flickr8k.py;
change config.model to those of init_from. Published score: none, the data are yours; measured ones
in docs/evaluation.md.
"""

from ml_collections import ConfigDict

from align_jax.config import default_config

STAGES = ("head", "full", "scratch")


def get_config(argument: str = "head:data/train:data/test") -> ConfigDict:
    """Returns the config of STAGE:TRAIN:TEST.

    Raises:
      ValueError: it has another form.
    """
    stage, *sources = argument.split(":")
    if stage not in STAGES or len(sources) != 2:
        raise ValueError(f"{argument!r} must be STAGE:TRAIN:TEST, STAGE one of {', '.join(STAGES)}")
    train, test = sources
    c = default_config()
    c.task = "classify"
    c.model.image.variant = "nano"
    c.model.image.drop_path_rate = 0.0
    c.model.dtype = "float32"
    c.model.bn_decay = 0.9
    c.model.bn_group_size = 64  # the last maps of a 48-px image are 2 x 2
    c.model.bn_mode = "grouped" if stage == "scratch" else "frozen"
    c.data.source = train
    c.data.image_size = 48
    c.data.resize_size = 54
    c.data.resize = "pil"
    c.data.crop = "inception"
    c.data.crop_min_area = 0.25
    c.loss.label_smoothing = 0.0

    c.optim.name = "sgd"
    c.optim.learning_rate = 0.01 if stage == "full" else 0.1
    c.optim.warmup_steps = 0
    c.optim.schedule = "cosine"
    if stage == "head":
        c.optim.image_lr_multiplier = 0.0
    c.train.batch_size = 64
    c.train.steps = 600 if stage == "scratch" else 300  # as many in all
    c.checkpoint.every_steps = 300
    c.eval.every_steps = 300
    c.log.every_steps = 20
    c.eval.evaluators.test = {"type": "classify", "source": test}
    return c
