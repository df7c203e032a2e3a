"""A run that learns, and the same run with one update at a hundred times the rate.

    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1  # as align does; eight devices run twice as fast
    python experiments/benchmarks/spike.py --folder /tmp/spikes

The quickstart in short under `train.on_divergence=rollback`, on one device and on eight:

  spiked    one bad update, found, rolled back
  left out  no bad update and no rollback: the stream of batches lacks those that `spiked` left out
  clean     no bad update; goes on from the same checkpoint with `--clean` other parts of the stream

If a rollback leaves nothing behind, `spiked` and `left out` end in the same bits. How far `clean`
runs lie apart says what the batches alone make of a run. Prints for each the mean loss of the last
steps, the loss over 2,048 held-out scenes in batches of 64, and R@10. Further `--config.x=y`
change the config.
"""

import argparse
import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import align_jax
from align_jax import config as config_lib
from align_jax import losses, train
from align_jax.data.sources import open_source
from align_jax.run import history, metrics

HELD_OUT, HELD_OUT_BATCH = 2048, 64


class BadUpdate:
    """The train step; one update, the first time that it is made, goes so many times as far."""

    def __init__(self, step_fn, at: int, times: float):
        self._step_fn, self._at, self._times = step_fn, at, times

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
        params = jax.tree.map(
            lambda old, new: old + self._times * (new - old), before, state.params
        )
        # A scalar that must stay positive does not go through zero.
        params["temperature"] = jnp.maximum(params["temperature"], 1e-3)
        return train.dataclasses.replace(state, params=params), values


@contextlib.contextmanager
def patched(
    *, devices: int, bad_update: int, times: float, jump: tuple[int, int]
) -> Iterator[None]:
    """Context in which runs have so many devices, a bad update (0: none) and other batches.

    Args:
      devices: of the mesh.
      bad_update: number of the update.
      times: how far it goes.
      jump: (first batch that is left out, the one to go on with); from 0.
    """
    make_program, make_mesh = train.make_program, train.mesh_lib.make_mesh
    train_batches = train.pipeline.train_batches

    def with_bad_update(config, mesh, **sizes):
        *others, step_fn = make_program(config, mesh, **sizes)
        return *others, BadUpdate(step_fn, bad_update, times)

    def jumping(*args, start_step: int, **options):
        first, then = jump
        assert start_step == first or first == then, (start_step, jump)
        return train_batches(*args, start_step=start_step + then - first, **options)

    with (
        mock.patch.object(train, "make_program", with_bad_update),
        mock.patch.object(train.pipeline, "train_batches", jumping),
        mock.patch.object(
            train.mesh_lib, "make_mesh", lambda **_: make_mesh(devices=jax.devices()[:devices])
        ),
    ):
        yield


def run(
    folder: Path,
    args: argparse.Namespace,
    overrides: list[str],
    *,
    devices: int,
    bad_update: int = 0,
    keep_every: int = 0,
    jump: tuple[int, int] = (0, 0),
) -> dict[str, float]:
    """Trains, from the checkpoint at `jump` where there is a jump, and returns what came out."""
    changes = {
        "train.steps": args.steps,
        "train.on_divergence": "rollback",
        "checkpoint.every_steps": args.save,
        "checkpoint.keep_every": keep_every,
        "eval.every_steps": args.steps,
        "log.every_steps": 1,
    }
    every = [f"--config.{key}={value}" for key, value in changes.items()]
    config = config_lib.load_config("configs/quickstart.py", every + overrides)
    with config.unlocked():
        del config.eval.evaluators.shape, config.eval.evaluators.colour
    with patched(devices=devices, bad_update=bad_update, times=args.times, jump=jump):
        results = train.train_and_evaluate(
            config, folder, resume_from=jump[0] if jump[0] != jump[1] else None
        )
    lines = metrics.read_metrics(folder / "metrics.jsonl")
    last = [line["train/loss"] for line in lines if "train/loss" in line][-args.last :]
    return {
        "loss of the last steps": float(np.mean(last)),
        "held-out loss": held_out_loss(folder),
        "R@10": results["scenes/image_to_text_r10"],
    }


def held_out_loss(folder: Path) -> float:
    """Returns the mean loss of the last weights over batches of unseen scenes, in eval mode."""
    model = align_jax.load(folder)
    source = open_source.open_source(f"scenes?size={HELD_OUT}&seed=1000003")
    pairs = [source[index] for index in range(len(source))]
    z_image = model.encode_image([pair.image for pair in pairs])
    z_text = model.encode_text([pair.captions[0] for pair in pairs])
    parts = [slice(at, at + HELD_OUT_BATCH) for at in range(0, len(pairs), HELD_OUT_BATCH)]
    return float(
        np.mean([losses.dense_loss(z_image[p], z_text[p], model.temperature)[0] for p in parts])
    )


def compare(args: argparse.Namespace, overrides: list[str], devices: int) -> list[str]:
    """Runs all on so many devices; returns lines to print."""
    folder = args.folder / str(devices)
    spiked = run(folder / "spiked", args, overrides, devices=devices, bad_update=args.at)
    events = [e for e in history.read(folder / "spiked") if e["event"] == "rollback"]
    rows = [
        f"{devices} device(s), bad update {args.at}: "
        + ", ".join(f"found {e['step']}, back to {e['to']}" for e in events)
    ]
    if len(events) != 1:
        return [*rows, "not one rollback: nothing to compare with"]
    first, then = events[0]["skipped"]
    straight = folder / "clean" / "0"
    options = {"devices": devices, "keep_every": first}
    clean = [run(straight, args, overrides, **options)]

    def other(name: str, then: int) -> dict[str, float]:
        shutil.copytree(straight, folder / name)
        return run(folder / name, args, overrides, jump=(first, then), **options)

    left_out = other("left_out", then)
    # As many batches further on as there are steps left, so that no two runs see the same.
    left = args.steps - first
    clean += [other(f"clean/{n}", first + n * left) for n in range(1, args.clean)]
    same = parameters(folder / "spiked") == parameters(folder / "left_out")
    rows.append(f"parameters of spiked and left out: {'the same' if same else 'NOT the same'} bits")
    for name in spiked:
        values = np.array([values[name] for values in clean])
        mean, spread = values.mean(), values.std(ddof=1)
        rows.append(
            f"{name}: spiked {spiked[name]:.4f}, left out {left_out[name]:.4f}, {len(clean)} clean "
            f"{mean:.4f} +- {spread:.4f} ({100 * spread / mean:.1f} %), {values.min():.4f} to "
            f"{values.max():.4f}; spiked is {100 * (spiked[name] / mean - 1):+.1f} %, "
            f"{(spiked[name] - mean) / spread:+.1f} spreads"
        )
    return rows


def parameters(folder: Path) -> bytes:
    """Returns the bytes of all weights of the last checkpoint, in order of their names."""
    model = align_jax.load(folder)
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(model.variables))


def main() -> None:
    """Prints what came out on each number of devices."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--at", type=int, default=330)
    parser.add_argument("--times", type=float, default=100, help="how far the bad update goes")
    parser.add_argument("--save", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--last", type=int, default=100, help="steps in the mean loss")
    parser.add_argument("--clean", type=int, default=8, help="clean runs")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8])
    args, overrides = parser.parse_known_args()
    for devices in args.devices:
        print("\n".join(compare(args, overrides, devices)), flush=True)


if __name__ == "__main__":
    main()
