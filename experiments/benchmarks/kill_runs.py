"""Kills a run again and again, and compares what is left with a run that was left alone.

    python experiments/benchmarks/kill_runs.py --kills 20 --signals 20 --folder /tmp/kills

The same small run three times: alone, under `kill -9` (every third in the middle of a save), and
under two SIGTERMs 20 ms apart. Moments are drawn from --seed. Metric lines and the bytes of the
last checkpoint must be those of the run that was left alone; a run that was sent SIGTERM must end
with exit code 0 and the step that it says saved. Prints a row for each; exit code 1 if one differs.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from orbax.checkpoint import v1 as ocp

from align_jax import trees

CONFIG = """
from align_jax.config import default_config


def get_config():
    c = default_config()
    c.model.image.variant = "pico"
    c.model.text.variant = "tiny"
    c.model.embed_dim = 32
    c.model.bn_group_size = 4
    c.data.source = "scenes?size=200&seed=1"
    c.data.image_size = 32
    c.data.resize_size = 40
    c.data.resize = "pil"
    c.data.max_tokens = 12
    c.data.vocab_size = 300
    c.data.num_threads = 1
    c.optim.warmup_steps = 5
    c.train.batch_size = 8
    c.train.steps = STEPS
    c.checkpoint.every_steps = 5
    c.eval.every_steps = 20
    c.eval.evaluators.own = {"type": "retrieval", "source": "scenes?size=24&seed=2"}
    c.log.every_steps = 1
    return c
"""


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signals", type=int, default=20)
    parser.add_argument("--folder", default="kill_runs", help="made anew")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder, draw = Path(args.folder), random.Random(args.seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    steps = 12 * max(args.kills, args.signals, 1)
    (folder / "config.py").write_text(CONFIG.replace("STEPS", str(steps)))
    finish(folder, "alone")
    failed = 0
    for name, count in (("kills", args.kills), ("signals", args.signals)):
        if not count:
            continue
        saves = told = 0
        for number in range(count):
            process = start(folder, name)
            in_save = name == "kills" and number % 3 == 0
            reached = wait(folder / name, process, draw.randint(1, 9), in_save)
            if name == "kills":
                saves += in_save and reached
                process.kill()
                process.communicate()
                continue
            for _ in range(2):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.02)
            printed = process.communicate()[1]
            said = re.search(r"SIGTERM: saved step (\d+)", printed)
            saved = [int(p.name) for p in (folder / name / "checkpoints").glob("[0-9]*")]
            told += process.returncode == 0 and bool(said) and int(said[1]) == max(saved)
        finish(folder, name)
        same = contents(folder / "alone", steps) == contents(folder / name, steps)
        good = same and (name == "kills" or told == count)
        failed += not good
        extra = f"{saves} during a save" if name == "kills" else f"{told} saved what they said"
        verdict = "the bytes of the run alone" if same else "OTHER BYTES"
        print(f"{count} {name} ({extra}), {steps} steps: {verdict}", flush=True)
    return int(failed > 0)


def start(folder: Path, workdir: str) -> subprocess.Popen:
    """Starts the run, or goes on with it."""
    command = [sys.executable, "-m", "align_jax.cli.main", "train", "--config", "config.py"]
    cache = {"JAX_COMPILATION_CACHE_DIR": "cache", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [*command, "--workdir", workdir],
        cwd=folder,
        env=os.environ | cache | {"JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0.3"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait(workdir: Path, process: subprocess.Popen, more: int, in_save: bool) -> bool:
    """Returns when the process has made some steps; of a save, whether one was seen under way."""
    metrics, history, first = workdir / "metrics.jsonl", workdir / "history.jsonl", None
    started = history.stat().st_size if history.exists() else 0
    while process.poll() is None:
        if history.exists() and history.stat().st_size > started:
            count = metrics.read_bytes().count(b"\n")
            first = count if first is None else first
            if in_save and any(".orbax-" in p.name for p in (workdir / "checkpoints").iterdir()):
                return True
            if count >= first + more + 20 * in_save:
                return False
        time.sleep(0.002)
    raise RuntimeError(process.stderr.read())


def finish(folder: Path, workdir: str) -> None:
    """Runs to the end."""
    process = start(folder, workdir)
    printed = process.communicate()[1]
    if process.returncode:
        raise RuntimeError(printed)


def contents(workdir: Path, step: int) -> tuple[bytes, dict[str, bytes]]:
    """Returns (metric lines, bytes of each tensor of a checkpoint)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is told no sharding, as it says
        items = ocp.load_checkpointables(workdir.absolute() / "checkpoints" / str(step))
    tensors = {
        f"{item}/{name}": np.asarray(leaf).tobytes()
        for item, tree in items.items()
        for name, leaf in trees.named_leaves(tree)
    }
    return (workdir / "metrics.jsonl").read_bytes(), tensors


if __name__ == "__main__":
    sys.exit(main())
