"""Durations of a config with a unit: steps, epochs, examples."""

import json
from pathlib import Path

import pytest
from helpers import StubStep, error_of, read_lines, saved_steps

from align_jax import config as config_lib
from align_jax import config_checks
from align_jax.cli import main as cli
from align_jax.plan import aot


def make_config(batch_size=32, **durations):
    c = config_lib.default_config()
    c.data.source, c.train.batch_size, c.train.steps = "scenes?size=9", batch_size, 10**6
    for key, value in durations.items():
        group, name = key.split("__")
        c[group][name] = value
    return c


@pytest.mark.parametrize(
    "value, batch_size, num_pairs, steps",
    [
        (7, 32, 1000, 7),
        ("7 steps", 32, 1000, 7),
        ("1 epoch", 32, 1000, 31),  # 31.25
        ("2 epochs", 32, 1000, 62),  # 62.5: to the even one, as Python rounds
        ("3 epochs", 32, 1000, 94),  # 93.75
        ("2.5 epochs", 32, 1000, 78),  # 78.125
        ("0.001 epochs", 32, 1000, 1),  # never none
        ("0 epochs", 32, 1000, 0),
        ("1000 examples", 32, 1000, 31),
        ("1e6 examples", 128, 1000, 7812),  # 7812.5
        ("1 example", 32, 1000, 1),
    ],
)
def test_duration_in_steps_equals_hand_worked_one(value, batch_size, num_pairs, steps):
    c = make_config(batch_size, checkpoint__keep_every=value)
    resolved, lines = config_checks.in_steps(c, num_pairs)
    assert resolved.checkpoint.keep_every == steps and type(resolved.checkpoint.keep_every) is int
    assert c.checkpoint.keep_every == value
    said = [f"config.checkpoint.keep_every: {value} are {steps} steps"]
    assert lines == (said if isinstance(value, str) else [])


@pytest.mark.parametrize("key", config_lib.DURATIONS)
def test_every_duration_takes_a_unit(key):
    c = make_config(optim__schedule="constant", optim__warmup_steps=1)
    config_checks.validate(c, num_devices=1)
    group, name = key.split(".")
    c[group][name] = "3 epochs"
    config_checks.validate(c, num_devices=1)
    assert config_checks.in_steps(c, 64)[0][group][name] == 6


def test_keys_that_count_steps_are_those_that_take_units():
    # A new one is to be added there.
    def paths(config, prefix=""):
        for key, value in config.items():
            if isinstance(value, config_lib.ConfigDict):
                yield from paths(value, f"{prefix}{key}.")
            elif key.endswith("steps") or key == "keep_every":
                yield prefix + key

    assert set(paths(config_lib.default_config())) == set(config_lib.DURATIONS)


@pytest.mark.parametrize(
    "value", ["2 epoch s", "two epochs", "-1 epochs", "epochs", "1e999 epochs", "", 2.0, True, None]
)
def test_what_is_no_duration_is_refused_with_its_path(value):
    with pytest.raises(ValueError, match="^config.eval.every_steps=.*must be "):
        config_checks.validate(make_config(eval__every_steps=value), num_devices=1)


def test_durations_that_do_not_go_together_are_refused_once_they_are_known():
    c = make_config(train__steps="2 epochs", optim__warmup_steps="200 examples")
    config_checks.validate(c, num_devices=1)
    assert config_checks.in_steps(c, 320)[0].optim.warmup_steps == 6
    with pytest.raises(ValueError, match="warmup_steps=6 leaves nothing of config.train.steps=6"):
        config_checks.in_steps(c, 96)


def test_epochs_of_a_mixture_and_of_a_plan_are_refused():
    c = make_config(eval__every_steps="1 epoch")
    with pytest.raises(ValueError, match="config.eval.every_steps='1 epoch': the data is not open"):
        config_checks.in_steps(c, None)
    with pytest.raises(ValueError, match="the data is not open"):
        aot.compile_report(c, aot.cpu_devices(1))
    c.data.source = ""
    c.data.mixture.a = {"source": "scenes?size=9", "weight": 1.0}
    with pytest.raises(ValueError, match="a mixture has epochs of each source; give steps, or"):
        config_checks.in_steps(c, 9)


def test_run_saves_steps_and_goes_on_with_the_same_in_another_unit(project, monkeypatch, capfd):
    monkeypatch.chdir(project)
    StubStep().patch(monkeypatch)
    pairs, batch = 12, 8  # of the project: an epoch is 1.5 steps

    def run(*overrides):
        arguments = ("train", "--config", "config.py:plain", "--workdir", "units")
        return cli.main([*arguments, *(f"--config.{override}" for override in overrides)])

    lengths = ("optim.warmup_steps=16 examples", "checkpoint.every_steps=2 epochs")
    assert run("train.steps=6 epochs", "log.every_steps=1 epoch", *lengths) == 0
    said = capfd.readouterr().err
    assert f"config.train.steps: 6 epochs are {6 * pairs // batch} steps" in said
    saved = json.loads(Path("units/config.json").read_text())
    assert saved["train"]["steps"] == 9 and saved["optim"]["warmup_steps"] == 2
    assert saved["checkpoint"]["every_steps"] == 3 and saved["log"]["every_steps"] == 2
    assert saved_steps("units") == [3, 6, 9]
    assert [line["step"] for line in read_lines(Path("units/metrics.jsonl"))] == [2, 4, 6, 8, 9]

    assert run("train.steps=9", "optim.warmup_steps=2") == 0  # the same run
    assert run("train.steps=88 examples", *lengths) == 0  # longer: 11
    assert saved_steps("units")[-1] == 11
    capfd.readouterr()
    assert run("train.steps=11", "optim.warmup_steps=32 examples") == 2
    assert "config.optim.warmup_steps=4, but the run in units" in capfd.readouterr().err
    assert run("train.steps=1 epoch", "optim.warmup_steps=1") == 2


def test_evaluator_has_a_period_in_its_unit(inside, capfd):
    command = ("train", "--config", "config.py", "--workdir", "new")
    c = config_lib.load_config("config.py")
    with c.unlocked():
        c.eval.evaluators.own.every_steps = "3 epochs"
    config_checks.validate(c, num_devices=1)
    assert config_checks.in_steps(c, 16)[0].eval.evaluators.own.every_steps == 6
    for wrong in ("0 epochs", "never"):
        with c.unlocked():
            c.eval.evaluators.own.every_steps = wrong
        with pytest.raises(ValueError, match="config.eval.evaluators.own.every_steps='.* must be"):
            config_checks.validate(c, num_devices=1)
    assert "config.log.every_steps='1 hour' must be" in error_of(
        capfd, *command, "--config.log.every_steps=1 hour"
    )
