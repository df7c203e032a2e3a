"""What all metrics and a checkpoint every 100 steps cost the quickstart, by turns in one run.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python experiments/benchmarks/overhead.py

Blocks of 100 steps, in the middle of which a checkpoint is due: as the run is (norms of both
towers, metric lines, TensorBoard, progress line, rules of divergence, checkpoint), and bare: a step
that returns the loss alone, which is all that is read; nothing is written. Each block as it is is
compared with the mean of the bare ones before and after it, by wall time and by CPU time of the
process, the last only where the machine is not quiet. Further `--config.x=y` change the config.
"""

import argparse
import os
import tempfile
import time
from unittest import mock

import jax
import numpy as np

from align_jax import config as config_lib
from align_jax import train
from align_jax.run import report


class Blocks:
    """The train step as it is and a bare one, by turns; an uneven number of blocks, bare first."""

    def __init__(self, steps: int):
        """The first block begins after `steps / 2` steps."""
        self._steps, self._half = steps, steps // 2
        self._programs: list = []
        self.borders: list[tuple[float, float]] = []  # wall and CPU time, s

    def compile_train_step(self, step_fn, abstract, mesh, **options) -> "Blocks":
        def bare(state, batch):
            state, values = step_fn(state, batch)
            return state, {"loss": values["loss"]}

        self._programs = [COMPILE(fn, abstract, mesh, **options) for fn in (bare, step_fn)]
        return self

    def lower(self, state, batch) -> "Blocks":
        self._programs = [program.lower(state, batch) for program in self._programs]
        return self

    def compile(self) -> "Blocks":
        self._programs = [program.compile() for program in self._programs]
        return self

    def memory_analysis(self):
        return self._programs[1].memory_analysis()

    def is_bare(self, done: int) -> bool:
        """Whether the block of the step before which so many are done is a bare one."""
        return (done + self._half) // self._steps % 2 == 1

    def __call__(self, state, batch):
        done = int(state.step)
        if (done + self._half) % self._steps == 0:
            jax.block_until_ready(state)
            self.borders.append((time.perf_counter(), time.process_time()))
        return self._programs[not self.is_bare(done)](state, batch)


COMPILE = train.train_step.compile_train_step
REPORT = report.Reporter.report
SAVE = train._Run._save


def main() -> None:
    """Trains and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=17, help="uneven")
    parser.add_argument("--steps", type=int, default=100, help="of a block, even")
    parser.add_argument("--no-saves", action="store_true", help="all but the checkpoints")
    args, overrides = parser.parse_known_args()
    blocks = Blocks(args.steps)

    def report_or_wait(self, step, values, batch, wait_s):
        if values.keys() == {"loss"}:
            float(values["loss"])  # waits for the step
        else:
            REPORT(self, step, values, batch, wait_s)

    def save_or_not(self, state):
        if not (args.no_saves or blocks.is_bare(int(state.step) - 1)):
            SAVE(self, state)

    config = config_lib.load_config("configs/quickstart.py", overrides)
    config.train.steps = args.steps // 2 + args.steps * args.blocks + 1
    config.checkpoint.every_steps = args.steps
    with config.unlocked():
        config.eval.evaluators = config_lib.ConfigDict()
    with (
        mock.patch.object(train.train_step, "compile_train_step", blocks.compile_train_step),
        mock.patch.object(report.Reporter, "report", report_or_wait),
        mock.patch.object(train._Run, "_save", save_or_not),
        tempfile.TemporaryDirectory() as folder,
    ):
        train.train_and_evaluate(config, os.path.join(folder, "run"))
    spent = np.diff(np.array(blocks.borders), axis=0)  # [blocks, 2]
    for row, (wall_s, cpu_s) in enumerate(spent / args.steps):
        kind = "as it is" if row % 2 else "bare"
        print(f"block {row + 1:2d}, {kind:8s}: {1e3 * wall_s:.1f} ms a step, CPU {1e3 * cpu_s:.1f}")
    ratios = spent[1::2] / ((spent[:-1:2] + spent[2::2]) / 2)
    for name, values in zip(("wall time", "CPU time"), 100 * (ratios.T - 1), strict=True):
        error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        print(
            f"{name}: {values.mean():+.2f} % +- {error:.2f} (standard error of {len(values)}; "
            f"median {np.median(values):+.2f} %, {values.min():+.2f} to {values.max():+.2f} %)"
        )


if __name__ == "__main__":
    main()
