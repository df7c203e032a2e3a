"""Which tower is worth its size? See README.md here.

python experiments/sweep.py experiments/ablation_backbones --workdir runs/backbones
"""

from ablation_base import make_config


def _grid(images, texts):
    return {
        f"{image}-{text}": {"model.image.variant": image, "model.text.variant": text}
        for image in images
        for text in texts
    }


POINTS = _grid(("b1", "b3", "b5", "b7", "l2"), ("mini", "medium", "base", "large"))
SMOKE_POINTS = _grid(("pico", "nano"), ("tiny", "mini"))
PUBLISHED = {"b5-base": "51.7 / 37.5 / 64.6", "b7-base": "55.4 / 41.7 / 69.3"}
PUBLISHED |= {"b3-mini": "37.4 / 24.5 / 56.5"}


def get_config(point=""):
    return make_config(point, POINTS, SMOKE_POINTS)
