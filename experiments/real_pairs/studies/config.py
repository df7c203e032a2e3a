"""What wrong captions, curation, languages and the paper's ablations do to the recipe of an hour.

The results are in ../report.md.

experiments/real_pairs/prepare.sh DATA data/real_pairs
experiments/real_pairs/prepare_studies.sh DATA data/real_pairs
python experiments/sweep.py experiments/real_pairs/studies --workdir runs/studies
"""

import runpy
from pathlib import Path

_RECIPE = Path(__file__).parents[3] / "configs" / "real_pairs.py"
_ROOT = "data/real_pairs"
LANGUAGES = ("en", "de", "fr", "cs", "zh", "ar")
_STEPS = 300

_SETS = ("flickr8k", "cc3m", "emoji")
POINTS = {
    # All three sets, some of the captions exchanged among each other.
    "wrong0": _SETS,
    "wrong25": ("wrong25/flickr8k", "wrong25/cc3m", "wrong25/emoji"),
    "wrong50": ("wrong50/flickr8k", "wrong50/cc3m", "wrong50/emoji"),
    "wrong75": ("wrong75/flickr8k", "wrong75/cc3m", "wrong75/emoji"),
    # Web images alone: as they come, and what two presets of `align curate` keep of them.
    "cc3m": ("cc3m",),
    "cc3m_align": ("cc3m_align",),
    "cc3m_metaclip": ("cc3m_metaclip",),
    # Photos alone: English captions, and as many of each of six languages.
    "english": ("flickr8k_en",),
    "languages": tuple(f"flickr8k_{language}" for language in LANGUAGES),
}
# The directions of the paper's ablations (Jia et al. 2021, section 6), each beside wrong0.
ABLATIONS = {
    **{f"dim{dim}": {"model.embed_dim": dim} for dim in (128, 64, 32)},
    "half_negatives": {"loss.negatives": 0.5},
    "quarter_negatives": {"loss.negatives": 0.25},
    **{
        f"fixed_{part}": {"optim.temperature": "fixed", "loss.temperature_init": 1 / part}
        for part in (128, 64, 32, 16)
    },
    **{
        f"data{share}": {
            f"data.mixture.{name}.source": f"{_ROOT}/{name}?split=train[:{share}%]"
            for name in _SETS
        }
        for share in (50, 25, 10)
    },
}
POINTS |= dict.fromkeys(ABLATIONS, _SETS)
SMOKE_POINTS = POINTS
PUBLISHED = {}
RESULTS = ("image_to_text_r10", "text_to_image_r10")


def get_config(point=""):
    """Returns the recipe on a point's sources for 300 steps."""
    point = point.removeprefix("smoke-")
    if point not in POINTS:
        raise ValueError(f"point {point!r} is unknown; use one of {', '.join(POINTS)}")
    c = runpy.run_path(_RECIPE)["get_config"](_ROOT)
    recipe = c.data.mixture
    c.data.mixture = {}
    for source in POINTS[point]:
        like = source.rpartition("/")[2]
        c.data.mixture[source.replace("/", "_")] = {
            "source": f"{_ROOT}/{source}?split=train",
            "weight": recipe[like].weight if like in recipe else 1.0,
        }
    if point in ("english", "languages"):
        c.data.vocab_size = 8192
        c.data.max_tokens = 28
    c.train.steps = c.checkpoint.every_steps = c.eval.every_steps = _STEPS
    c.optim.warmup_steps = 50
    c.update_from_flattened_dict(ABLATIONS.get(point, {}))
    return c
