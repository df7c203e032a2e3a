"""Fails if the quickstart in the given workdir learned less than the README shows.

The goals are 50, 90 and 90 %. The floors leave a few points to processors that round otherwise: on
one machine two runs give the same scores to the last digit.
"""

import sys

from align_jax.run.metrics import read_metrics

FLOORS = {
    "eval/scenes/image_to_text_r1": 45.0,
    "eval/shape/top1": 85.0,
    "eval/colour/top1": 90.0,
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
