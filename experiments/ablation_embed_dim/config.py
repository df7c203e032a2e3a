"""How wide must the embeddings be? See README.md here.

python experiments/sweep.py experiments/ablation_embed_dim --workdir runs/embed_dim
"""

from ablation_base import make_config

POINTS = {str(dim): {"model.embed_dim": dim} for dim in (640, 320, 160, 80)}
SMOKE_POINTS = {str(dim): {"model.embed_dim": dim} for dim in (64, 16, 4)}
PUBLISHED = {
    "640": "51.7 / 37.5 / 64.6",
    "320": "50.3 / 34.1 / 64.0",
    "160": "47.0 / 34.4 / 63.7",
    "80": "42.0 / 29.3 / 61.9",
}


def get_config(point=""):
    return make_config(point, POINTS, SMOKE_POINTS)
