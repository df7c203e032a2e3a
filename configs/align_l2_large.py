"""The paper's flagship: EfficientNet-L2 + BERT-large, 874 M parameters.

align train --config configs/align_l2_large.py --workdir /mnt/gcs/align_l2_large \
    --config.data.source='/mnt/gcs/pairs?split=train'

1.2 M steps of 16,384 pairs, 9.5e21 FLOPs, 1,024 TPU v3 cores in the paper; not run by this
project. Published (Jia et al. 2021): ImageNet zero-shot top-1 76.4; zero-shot R@1 image to text /
text to image: Flickr30K 88.6 / 75.7, MSCOCO 58.6 / 45.6.
"""

from configs.align_b7_base import get_config as get_b7_config


def get_config():
    c = get_b7_config()
    c.model.image.variant = "l2"
    c.model.text.variant = "large"
    c.mesh.fsdp = 8  # 13.4 of 16 GiB on 256 TPU v5e, see docs/pod_plans.md
    c.model.embed_dim = 1376  # the trunk's own width: no image projection
    return c
