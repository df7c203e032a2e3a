"""How many in-batch negatives are needed? See README.md here.

python experiments/sweep.py experiments/ablation_negatives --workdir runs/negatives
"""

from ablation_base import make_config


def _points(batch_size, steps, warmup_steps):
    # Differs from paper: a smaller batch, not a random subset of the batch's negatives.
    return {
        name: {
            "train.batch_size": batch_size // part,
            "train.steps": steps * part,  # as many pairs
            "optim.warmup_steps": warmup_steps * part,
        }
        for name, part in (("all", 1), ("half", 2), ("quarter", 4))
    }


POINTS = _points(batch_size=16_384, steps=1_000_000, warmup_steps=10_000)
SMOKE_POINTS = _points(batch_size=64, steps=30, warmup_steps=3)
PUBLISHED = {
    "all": "51.7 / 37.5 / 64.6",
    "half": "50.2 / 37.0 / 63.8",
    "quarter": "48.7 / 35.8 / 63.3",
}


def get_config(point=""):
    return make_config(point, POINTS, SMOKE_POINTS)
