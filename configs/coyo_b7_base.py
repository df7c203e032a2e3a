"""COYO-ALIGN: EfficientNet-B7 + BERT-base on COYO-700M, as kakaobrain/coyo-align trained it.

align train --config configs/coyo_b7_base.py --workdir /mnt/gcs/coyo_b7_base \
    --config.data.source='/mnt/gcs/coyo?split=train' --config.data.tokenizer=vocab.txt

300 k steps of 65,536 pairs, about 8 days on TPU v3-512 for its authors; not run by this project. It
fits 256 TPU v5e in one part (docs/pod_plans.md); fewer chips want config.train.microbatches.
Published (their README): ImageNet KNN 68.6; zero-shot R@1 image to text / text to image:
Flickr30K 88.1 / 73.2, MSCOCO 61.2 / 43.1.
"""

from configs.align_b7_base import get_config as get_b7_config


def get_config():
    c = get_b7_config()
    c.train.batch_size = 65_536
    c.train.steps = 300_000
    c.optim.learning_rate = 2e-3
    c.optim.warmup_steps = 40_000
    c.checkpoint.every_steps = 2_500  # their "epoch"
    c.data.tokenizer = "vocab.txt"  # BERT-uncased
    c.data.vocab_size = 30_522  # its size; a plan is made without the file
    return c
