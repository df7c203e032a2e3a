"""EfficientNet-B3 + BERT-mini on CC3M: the one published row that a single accelerator can repeat.

align train --config configs/cc3m_b3_mini.py --workdir runs/cc3m_b3_mini \
    --config.data.source='cc3m?split=train' --config.data.tokenizer=vocab.txt

100 k steps of 16,384 pairs, 1.7e19 FLOPs, TPU v3-128 for its authors; not run by this project.
Published: kakaobrain/coyo-align (86 % of CC3M): ImageNet KNN 46.2, MSCOCO R@1 21.2 / 17.0,
Flickr30K 42.8 / 35.0; Jia et al. 2021: 48.9, 22.1 / 17.3.
"""

from configs.align_b7_base import get_config as get_b7_config


def get_config():
    c = get_b7_config()
    c.model.image.variant = "b3"
    c.model.text.variant = "mini"
    c.train.steps = 100_000
    c.optim.learning_rate = 5e-3
    c.checkpoint.every_steps = 10_000  # their "epoch"
    c.data.tokenizer = "vocab.txt"  # BERT-uncased
    c.data.vocab_size = 30_522  # its size; a plan is made without the file
    return c
