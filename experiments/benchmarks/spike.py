"""A run that learns, and the same run with one update at a hundred times the rate.

    python experiments/benchmarks/spike.py --folder /tmp/spikes

The quickstart in short: alone on one device, and with the bad update on one and on eight devices,
under `train.on_divergence=rollback`. Prints for each the step of the bad update, the step at which
it was found, the checkpoint that the run went back to, and the mean loss of the last 100 steps.
"""

import argparse
import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import jax.numpy as jnp
import numpy as np

from align_jax import config as config_lib
from align_jax import train
from align_jax.run import history, metrics


class BadUpdate:
    """The train step; one update, the first time that it is made, goes a hundred times as far."""

    def __init__(self, step_fn, at: int):
        self._step_fn, self._at = step_fn, at

    def lower(self, state, batch):
        self._step_fn = self._step_fn.lower(state, batch).compile()
        return self

    def compile(self):
        return self

    def memory_analysis(self):
        return self._step_fn.memory_analysis()

    def __call__(self, state, batch):
        if int(state.step) + 1 != self._at:
            return self._step_fn(state, batch)
        self._at = 0
        before = jax.tree.map(jnp.copy, state.params)
        state, values = self._step_fn(state, batch)
        params = jax.tree.map(lambda old, new: old + 100 * (new - old), before, state.params)
        # A scalar that must stay positive does not go through zero.
        params["temperature"] = jnp.maximum(params["temperature"], 1e-3)
        return train.dataclasses.replace(state, params=params), values


def run(folder: str, args: argparse.Namespace, *, devices: int, at: int) -> str:
    """Trains; returns the row of the table."""
    make_program, make_mesh = train.make_program, train.mesh_lib.make_mesh

    def with_bad_update(config, mesh, **sizes):
        *others, step_fn = make_program(config, mesh, **sizes)
        return *others, BadUpdate(step_fn, at)

    train.make_program = with_bad_update
    train.mesh_lib.make_mesh = lambda **_: make_mesh(devices=jax.devices()[:devices])
    try:
        changes = {
            "train.steps": args.steps,
            "train.on_divergence": "rollback",
            "checkpoint.every_steps": 50,
            "eval.every_steps": args.steps,
            "log.every_steps": 1,
        }
        overrides = [f"--config.{key}={value}" for key, value in changes.items()]
        config = config_lib.load_config("configs/quickstart.py", overrides)
        results = train.train_and_evaluate(config, folder)
    finally:
        train.make_program, train.mesh_lib.make_mesh = make_program, make_mesh
    lines = metrics.read_metrics(f"{folder}/metrics.jsonl")
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    events = [event for event in history.read(folder) if event["event"] == "rollback"]
    found = ", ".join(f"found {e['step']}, back to {e['to']}" for e in events) or "no rollback"
    r10 = results["scenes/image_to_text_r10"]
    return (
        f"{devices} device(s), bad update {at or '-'}: {found}; mean loss of the last 100 steps "
        f"{np.mean(losses[-100:]):.4f}, R@10 {r10:.1f} %"
    )


def main() -> None:
    """Runs the three and prints a row each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--at", type=int, default=330)
    args = parser.parse_args()
    rows = [
        run(f"{args.folder}/{name}", args, devices=devices, at=at)
        for name, devices, at in (("clean", 1, 0), ("one", 1, args.at), ("eight", 8, args.at))
    ]
    print("\n".join(rows))


if __name__ == "__main__":
    main()
