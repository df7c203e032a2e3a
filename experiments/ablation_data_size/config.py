"""How much data does which model need? See README.md here.

python experiments/sweep.py experiments/ablation_data_size --workdir runs/data_size
"""

from ablation_base import CC3M, PAIRS, make_config

MODELS = {
    "b7": {"model.image.variant": "b7", "model.text.variant": "base"},
    "b3": {"model.image.variant": "b3", "model.text.variant": "mini"},
}
# The packed pairs lie in random order, so the first ones are a random subset.
DATA = {
    "full": {"data.source": f"{PAIRS}?split=train"},
    "tenth": {"data.source": f"{PAIRS}?split=train[:10%]"},
    "12m": {"data.source": f"{PAIRS}?split=train[:12000000]"},
    "6m": {"data.source": f"{PAIRS}?split=train[:6000000]"},
    "3m": {"data.source": f"{PAIRS}?split=train[:3000000]"},
    "cc3m": {"data.source": f"{CC3M}?split=train", "train.steps": 100_000},
}
PUBLISHED = {
    "b7-full": "55.4 / 41.7 / 69.3",
    "b7-tenth": "52.0 / 39.2 / 68.8",
    "b7-12m": "23.8 / 17.5 / 51.4",
    "b7-6m": "15.8 / 11.9 / 47.9",
    "b7-3m": "8.1 / 6.3 / 41.3",
    "b7-cc3m": "18.9 / 15.5 / 48.7",
    "b3-full": "37.4 / 24.5 / 56.5",
    "b3-tenth": "36.7 / 24.4 / 55.8",
    "b3-cc3m": "22.1 / 17.3 / 48.9",
}
POINTS = {
    f"{model}-{data}": MODELS[model] | DATA[data]
    for model, data in (name.split("-") for name in PUBLISHED)
}
SMOKE_POINTS = {
    f"{size}": {"data.source": f"scenes?size={size}&seed=1"} for size in (2000, 200, 64)
}


def get_config(point=""):
    return make_config(point, POINTS, SMOKE_POINTS)
