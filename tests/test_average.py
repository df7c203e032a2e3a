"""Moving averages of weights (`train.ema_decay`): their values, and that they are what is used."""

import dataclasses
import os
import re
import shutil

import jax
import numpy as np
import pytest
from helpers import (
    FAST_COMPILE,
    StubStep,
    assert_same_bytes,
    environment,
    read_checkpoint,
    read_lines,
    run_align,
    saved_steps,
)

from align_jax import config as config_lib
from align_jax import train
from align_jax.models import init
from align_jax.run import trained

STEPS, DECAY = 4, 0.2
WARM = "optim.warmup_steps=0"


def test_averages_equal_the_recurrence_and_a_resumed_run_goes_on_with_them(project):
    workdir = project / "averaged"
    command = (
        *("train", "--config", "config.py:plain", "--workdir", workdir),
        *(f"--config.train.steps={STEPS}", f"--config.train.ema_decay={DECAY}"),
        *("--config.optim.learning_rate=0.01", "--config.optim.warmup_steps=1"),
        *("--config.checkpoint.every_steps=1", f"--config.checkpoint.keep={STEPS}"),
    )
    env = environment(os.environ["JAX_COMPILATION_CACHE_DIR"], **FAST_COMPILE)
    done = run_align(*command, cwd=project, env=env)
    assert done.returncode == 0, done.stderr
    assert re.search(r"memory per device: .*averages \d", done.stderr)
    rates = [x for x in read_lines(workdir / "perf.jsonl") if "perf/pairs_per_s" in x][-1]
    assert rates["perf/pairs_per_s_per_chip"] == pytest.approx(rates["perf/pairs_per_s"])
    assert rates["perf/tflops_per_s_per_chip"] > 0
    saved = {step: read_checkpoint(workdir, step) for step in range(1, STEPS + 1)}

    prefix = "training/averaged/"
    names = [name.removeprefix(prefix) for name in saved[1] if name.startswith(prefix)]
    assert {name.split("/")[0] for name in names} == {"params", "batch_stats"}
    assert {f"weights/{name}" for name in names} == {n for n in saved[1] if n.startswith("weights")}
    moved = 0
    for name in names:
        leaf = saved[1][f"weights/{name}"]
        if name == "params/temperature":
            average = np.full(leaf.shape, 0.1)
        else:
            average = init.draw(name, leaf.shape, 0).astype(np.float64)
        for step in range(1, STEPS + 1):
            old = min(DECAY, step / (9 + step))  # 1/10, 2/11, then 0.2
            last = saved[step][prefix + name]
            average = old * average + (1 - old) * last
            found = saved[step][f"weights/{name}"]
            np.testing.assert_allclose(found, average, rtol=1e-5, atol=1e-6, err_msg=name)
            moved += not np.allclose(found, last, rtol=1e-4, atol=1e-6)
    assert moved > len(names)

    for step in (STEPS - 1, STEPS):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    done = run_align(*command, cwd=project, env=env)
    assert done.returncode == 0 and f"continuing from step {STEPS - 2}" in done.stdout + done.stderr
    assert_same_bytes(read_checkpoint(workdir, STEPS), saved[STEPS])

    weights = trained.load_trained(workdir).variables
    head = np.asarray(weights["params"]["text_projection"]["kernel"])
    np.testing.assert_array_equal(head, saved[STEPS]["weights/params/text_projection/kernel"])


class MovesAverages(StubStep):
    """Leaves the last weights as they are and adds one to all averages."""

    def __call__(self, state, batch):
        state, metrics = super().__call__(state, batch)
        return dataclasses.replace(state, average=jax.tree.map(lambda a: a + 1, state.average)), (
            metrics
        )


class Looks:
    """An evaluator that keeps the temperature of the model it is given."""

    name = "looks"

    def __init__(self):
        self.seen = []

    def __call__(self, model):
        self.seen.append(float(model.variables["params"]["temperature"]))
        return {"score": 0.0}


def load(*overrides):
    return config_lib.load_config("config.py:plain", [f"--config.{o}" for o in overrides])


@pytest.mark.parametrize("decay, seen", [(0.9, [2.1, 4.1]), (0.0, [0.1, 0.1])])
def test_evaluators_see_the_average_where_there_is_one(inside, monkeypatch, decay, seen):
    looks = Looks()
    MovesAverages().patch(monkeypatch)
    monkeypatch.setattr(train.evals_lib, "make_evaluators", lambda config: [looks])
    monkeypatch.setattr(train.tables, "format_table", lambda results, *_: str(results))
    changes = (f"train.ema_decay={decay}", "train.steps=4", "eval.every_steps=2", WARM)
    workdir = inside / f"looks_{decay}"
    train.train_and_evaluate(load(*changes), workdir)
    np.testing.assert_allclose(looks.seen, seen, rtol=1e-6)
    saved = read_checkpoint(workdir, 4)
    np.testing.assert_allclose(saved["weights/params/temperature"], seen[-1], rtol=1e-6)
    assert any(name.startswith("training/averaged/") for name in saved) == (decay > 0)


def test_averages_of_a_run_that_starts_from_another_begin_with_its_weights(inside, monkeypatch):
    StubStep().patch(monkeypatch)
    train.train_and_evaluate(load("train.steps=1", "train.seed=5", WARM), inside / "before_average")
    changes = (
        "train.steps=1",
        WARM,
        "train.ema_decay=0.5",
        f"init_from={inside / 'before_average'}",
    )
    train.train_and_evaluate(load(*changes), inside / "after_average")
    before, after = (
        read_checkpoint(inside / name, 1) for name in ("before_average", "after_average")
    )
    for name in before:
        if name.startswith("weights/"):
            np.testing.assert_array_equal(before[name], after[name])
            own = after[name.replace("weights/", "training/averaged/")]
            np.testing.assert_array_equal(own, after[name])
    assert saved_steps(inside / "after_average") == [1]
