"""Fails if the quickstart in the given workdir learned much less than the README shows.

The goals are 50, 90 and 90 %; these floors guard against a broken run, see the README.
"""

import sys

from align_jax.metrics import read_metrics

FLOORS = {
    "eval/scenes/image_to_text_r1": 30.0,
    "eval/shape/top1": 30.0,
    "eval/colour/top1": 80.0,
}

lines = read_metrics(f"{sys.argv[1]}/metrics.jsonl")
results = [line for line in lines if set(FLOORS) <= set(line)]
if not results:
    sys.exit("no evaluation in metrics.jsonl")
for name, floor in FLOORS.items():
    value = results[-1][name]
    print(f"{name}: {value:.1f} % (at least {floor:.0f} %)")
    if value < floor:
        sys.exit(f"{name} is {value:.1f} %, below {floor:.0f} %")
