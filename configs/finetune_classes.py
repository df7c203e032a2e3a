"""Fine-tunes the image tower for classification with the paper's recipes, by name.

align train --config configs/finetune_classes.py:flowers_head --workdir runs/flowers_head \
    --config.init_from=kakaobrain/align-base
align train --config configs/finetune_classes.py:flowers --workdir runs/flowers \
    --config.init_from=runs/flowers_head

First the head on the fixed tower (NAME_head), then all layers, from the head's workdir. Names:
imagenet, flowers, pets, cars, food. Data are labelled images, see docs/evaluation.md. The
recipe (Jia et al. 2021, section 5.3): SGD with momentum 0.9; ImageNet 0.1 and then 0.01 (the tower
a tenth), times 0.2 every 30 of 100 epochs, batch 1,024, no decay, 289 px in training and 360 in
evaluation, then 475 and 600; the others 1e-2 and then 1e-3, cosine over 20,000 steps, batch 256,
decay 1e-5, BatchNorm statistics frozen, 289 and 360 px. Inception crops, mirrored; one central crop
of 0.875 of the side in evaluation.

Published, for L2: ImageNet 85.5 (head), 88.64 (all), Flowers 99.65, Pets 96.19, Cars 96.13, Food
95.88, means of three runs (train.seed). Not run by this project: it has neither weights nor
pictures.
"""

from ml_collections import ConfigDict

from align_jax.config import default_config

# name -> folder of a TFDS dataset below data/, splits to learn from and to test
SETS = {
    "imagenet": ("imagenet2012", "train", "validation"),
    "flowers": ("oxford_flowers102", "train", "test"),
    "pets": ("oxford_iiit_pet", "train", "test"),
    "cars": ("cars196", "train", "test"),
    "food": ("food101", "train", "validation"),
}
IMAGENET_STEPS = 100 * 1_281_167 // 1024


def get_config(recipe: str = "imagenet_head") -> ConfigDict:
    """Returns the config of NAME_head or NAME.

    Raises:
      ValueError: there is no such recipe.
    """
    name, head_only = recipe.removesuffix("_head"), recipe.endswith("_head")
    if name not in SETS:
        known = ", ".join(f"{name}_head, {name}" for name in SETS)
        raise ValueError(f"there is no recipe {recipe!r}; known: {known}.")
    is_imagenet = name == "imagenet"
    folder, train, test = SETS[name]

    c = default_config()
    c.task = "classify"
    c.model.bn_mode = "grouped" if is_imagenet else "frozen"
    c.data.source = f"data/{folder}?split={train}"
    c.data.crop = "inception"
    is_large = is_imagenet and not head_only
    c.data.image_size, c.data.eval_image_size = (475, 600) if is_large else (289, 360)
    c.data.resize_size = round(c.data.eval_image_size / 0.875)
    c.data.resize = "pil"
    c.loss.label_smoothing = 0.0

    c.optim.name = "sgd"
    c.optim.b1 = 0.9
    c.optim.warmup_steps = 0
    if is_imagenet:
        c.optim.learning_rate = 0.1 if head_only else 0.01
        c.optim.image_lr_multiplier = 0.1
        c.optim.schedule = "steps"
        c.optim.decay_every, c.optim.decay_factor = 0.3, 0.2
        c.optim.weight_decay = 0.0
        c.train.batch_size, c.train.steps = 1024, IMAGENET_STEPS
    else:
        c.optim.learning_rate = 1e-2 if head_only else 1e-3
        c.optim.schedule = "cosine"
        c.optim.weight_decay = 1e-5
        c.train.batch_size, c.train.steps = 256, 20_000
    if head_only:
        c.optim.image_lr_multiplier = 0.0  # the tower is fixed, in eval mode
    if is_large:
        c.model.remat, c.model.scan_layers = "block", True
    c.eval.evaluators.test = {"type": "classify", "source": f"data/{folder}?split={test}"}
    return c
