"""What the loop makes of a step's values: which lines it writes, when it stops, what chance is.

The values themselves (losses, norms, rates, temperatures) are those of test_golden.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from helpers import StubStep, read_lines

from align_jax.cli import main as cli
from align_jax.run import plots


class Values(StubStep):
    """A step whose metrics are given: step -> {name: value}."""

    def __init__(self, values):
        super().__init__()
        self._values = values

    def __call__(self, state, batch):
        step = int(state.step) + 1
        metrics = {"loss": 1.0, "grad_norm": 1.0, "temperature": 0.1} | self._values(step)
        metrics = {name: np.float32(value) for name, value in metrics.items()}
        return dataclasses.replace(state, step=state.step + 1), metrics


@pytest.fixture
def command(project, monkeypatch):
    monkeypatch.chdir(project)

    def run(workdir, *overrides):
        arguments = ("train", "--config", "config.py:plain", "--workdir", workdir)
        return cli.main([*arguments, *(f"--config.{override}" for override in overrides)])

    return run


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_value_that_is_not_finite_stops_the_run_whichever_it_is(
    command, monkeypatch, capfd, name, value
):
    Values(lambda step: {name: value} if step == 4 else {}).patch(monkeypatch)
    workdir = f"stopped_{name}_{value}"
    assert command(workdir, "checkpoint.every_steps=1") == 1
    error = capfd.readouterr().err
    assert f"align: step 4: loss is {value if name == 'loss' else 1.0}" in error
    assert "checkpoint 2 is the last good one" in error  # the weights of 3 gave these values
    assert [line["step"] for line in read_lines_of(workdir)] == [1, 2, 3]


def read_lines_of(workdir):
    return read_lines(Path(workdir) / "metrics.jsonl")


def test_lines_hold_every_value_of_their_own_step(command, monkeypatch):
    Values(lambda step: {"loss": step / 8, "grad_norm": step, "other": -step}).patch(monkeypatch)
    assert command("values", "log.every_steps=3") == 0
    lines = read_lines_of("values")
    assert [line["step"] for line in lines] == [3, 6, 9, 10]  # and the last
    for line in lines:
        step = line["step"]
        assert line["train/loss"] == step / 8
        assert line["train/grad_norm"] == step and line["train/other"] == -step
        assert line["data/epochs"] == step * 8 / 12


def test_chance_is_twice_the_logarithm_of_the_batch(command, monkeypatch):
    drawn = []
    Values(lambda step: {}).patch(monkeypatch)
    monkeypatch.setattr(plots, "write_plots", lambda *_, **options: drawn.append(options))
    assert command("chance", "train.batch_size=16") == 0
    assert drawn and {options["chance_loss"] for options in drawn} == {2 * math.log(16)}
