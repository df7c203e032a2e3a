"""Fails unless the quickstart in the given workdir reached what the README promises."""

import sys

from align_jax.metrics import read_metrics

GOALS = {
    "eval/scenes/image_to_text_r1": 50.0,
    "eval/shape/top1": 90.0,
    "eval/colour/top1": 90.0,
}

results = [line for line in read_metrics(f"{sys.argv[1]}/metrics.jsonl") if set(GOALS) <= set(line)]
if not results:
    sys.exit("no evaluation in metrics.jsonl")
for name, goal in GOALS.items():
    value = results[-1][name]
    print(f"{name}: {value:.1f} % (at least {goal:.0f} %)")
    if value < goal:
        sys.exit(f"{name} is {value:.1f} %, below {goal:.0f} %")
