"""Must the temperature be learned? See README.md here.

python experiments/sweep.py experiments/ablation_temperature --workdir runs/temperature
"""

from ablation_base import make_config


def _fixed(temperature):
    return {"optim.temperature": "fixed", "loss.temperature_init": temperature}


POINTS = {
    "learned": {},
    "fixed_128": _fixed(1 / 128),
    "fixed_64": _fixed(1 / 64),
    "fixed_32": _fixed(1 / 32),
}
SMOKE_POINTS = POINTS
PUBLISHED = {
    "learned": "51.7 / 37.5 / 64.6",
    "fixed_128": "52.2 / 36.5 / 64.8",
    "fixed_64": "52.2 / 37.3 / 64.8",
    "fixed_32": "39.6 / 26.9 / 61.2",
}


def get_config(point=""):
    return make_config(point, POINTS, SMOKE_POINTS)
