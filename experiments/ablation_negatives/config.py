"""How many in-batch negatives are needed? See README.md here.

python experiments/sweep.py experiments/ablation_negatives --workdir runs/negatives
"""

from ablation_base import make_config

POINTS = {
    "all": {"loss.negatives": 1.0},
    "half": {"loss.negatives": 0.5},
    "quarter": {"loss.negatives": 0.25},
}
SMOKE_POINTS = POINTS
PUBLISHED = {
    "all": "51.7 / 37.5 / 64.6",
    "half": "50.2 / 37.0 / 63.8",
    "quarter": "48.7 / 35.8 / 63.3",
}


def get_config(point=""):
    return make_config(point, POINTS, SMOKE_POINTS)
