"""The paper's EfficientNet-B7 + BERT-base, with its recipe.

align train --config configs/align_b7_base.py --workdir /mnt/gcs/align_b7_base \
    --config.data.source='/mnt/gcs/pairs?split=train'

1.2 M steps of 16,384 pairs, 1.6e21 FLOPs: days on a large slice; not run by this project.
Published (Jia et al. 2021, ablations, 1 M steps): MSCOCO zero-shot R@1 55.4 image to text, 41.7
text to image; ImageNet KNN 69.3.
"""

from align_jax.config import default_config


def get_config():
    c = default_config()  # is this recipe; stated here once more where the paper states it
    c.model.image.variant = "b7"
    c.model.text.variant = "base"
    c.model.embed_dim = 640
    c.model.remat = "block"
    c.model.scan_layers = True
    c.optim.name = "lamb"
    c.optim.learning_rate = 1e-3
    c.optim.warmup_steps = 10_000
    c.optim.schedule = "linear"
    c.optim.weight_decay = 1e-5
    c.loss.label_smoothing = 0.1
    c.loss.temperature_init = 1.0
    c.train.batch_size = 16_384
    c.train.steps = 1_200_000
    c.data.image_size = 289
    c.data.resize_size = 346
    c.data.max_tokens = 64
    c.data.vocab_size = 100_000
    c.data.num_workers = 16
    return c
