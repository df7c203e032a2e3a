"""Runs whose loss diverges: the rules, what is gone back to, what is left out, exact resume."""

import math
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import StubStep, read_checkpoint, read_lines, saved_steps

from align_jax import config as config_lib
from align_jax import train
from align_jax.cli import main as cli
from align_jax.run import divergence, history

ROLLBACK = "--config.train.on_divergence=rollback"
NAN = float("nan")


def watch(kind="softmax", batch_size=32, **settings):
    c = config_lib.default_config()
    c.loss.kind = kind
    c.train.batch_size = batch_size
    c.train.update(settings)
    return divergence.LossWatch(c)


def judged(losses, watched):
    """Returns (step, span) of the first loss that is refused, None if all are good."""
    for step, loss in enumerate(losses, start=1):
        try:
            watched.check(step, loss, 1.0)
        except divergence.TrainingDiverged as error:
            return error.step, error.span
    return None


@pytest.mark.parametrize("loss", [NAN, math.inf])
def test_loss_or_gradient_that_is_not_finite_is_refused(loss):
    assert judged([3.0, loss], watch()) == (2, 1)
    with pytest.raises(divergence.TrainingDiverged, match="loss is 3.0, gradient norm nan"):
        watch().check(7, 3.0, NAN)


def test_spike_is_measured_by_the_spread_of_the_last_losses():
    # Median 5, median distance 1: the limit is 5 + 10 x 1.4826.
    calm = [4.0, 5.0, 6.0] * 8
    rolling = {"on_divergence": "rollback", "spike": 10.0}
    assert judged([*calm, 19.8], watch(**rolling)) is None
    assert judged([*calm, 19.9], watch(**rolling)) == (25, 1)
    assert judged([*calm[:19], 19.9], watch(**rolling)) is None  # too few to tell
    assert judged([*calm, 19.9], watch()) is None  # a spike does not stop a run
    assert judged([*calm, 19.9], watch(on_divergence="rollback", spike=0.0)) is None
    # Losses that hardly differ have a spread of 1 %.
    assert judged([5.0] * 25 + [5.49], watch(**rolling)) is None
    assert judged([5.0] * 25 + [5.51], watch(**rolling)) == (26, 1)


def test_collapse_is_twenty_steps_at_chance_after_something_was_learned():
    chance = 2 * math.log(32)
    learned, lost = [0.8 * chance] * 20, [0.995 * chance] * 20
    assert judged([*lost, *lost], watch()) is None
    assert judged([*learned, *lost[:19]], watch()) is None
    assert judged([*learned, *lost], watch()) == (40, 20)
    assert judged([*learned, *lost[:10], 0.98 * chance, *lost[:19]], watch()) is None
    assert judged([0.95 * chance] * 20 + lost, watch()) is None
    assert judged([*learned, *lost], watch(kind="sigmoid")) is None


def test_what_the_rules_look_at_survives_a_resume():
    chance = 2 * math.log(32)
    losses = [0.8 * chance] * 130 + [0.995 * chance] * 10
    before = watch()
    assert judged(losses, before) is None
    content = before.state()
    assert content.shape == divergence.no_losses().shape
    after = watch()
    after.restore(content)
    assert judged([0.995 * chance] * 20, after) == (10, 20)
    fresh = watch()
    fresh.restore(divergence.no_losses())
    np.testing.assert_array_equal(fresh.state(), divergence.no_losses())


@pytest.fixture
def here(project, monkeypatch):
    monkeypatch.chdir(project)
    return project


def command(workdir, *overrides, steps=18, save=4):
    return [
        *("train", "--config", "config.py:plain", "--workdir", workdir, *overrides),
        *(f"--config.train.steps={steps}", f"--config.checkpoint.every_steps={save}"),
    ]


def once(step, loss):
    """Returns what a StubStep does: at this step, the first time, that is the loss."""
    seen = []

    def act(now):
        if now == step and not seen:
            seen.append(now)
            return loss
        return 3.0 + 0.01 * (now % 5)

    return act


def contents(batches):
    return [batch["image"].tobytes() + batch["index"].tobytes() for batch in batches]


def test_rollback_leaves_out_the_batches_in_between_and_is_written_down(here, monkeypatch, capfd):
    straight = StubStep().patch(monkeypatch)
    assert cli.main(command("unrolled", steps=24, save=24)) == 0
    stub = StubStep(act=once(9, NAN)).patch(monkeypatch)
    assert cli.main(command("rolled", ROLLBACK)) == 0
    # The loss of step 9 comes from the parameters of checkpoint 8: 4 is the last good one.
    assert sorted(stub.batches) == list(range(1, 19))
    for step in range(1, 19):
        expected = [straight.batches[step][0]] if step <= 10 else []
        if step >= 5:  # again, or for the first time, with what lies 5 batches further on
            expected.append(straight.batches[step + 5][0])
        # Step 10 was under way when the loss of 9 was read.
        assert contents(stub.batches[step]) == contents(expected), step
    assert saved_steps("rolled") == [12, 16, 18]
    lines = read_lines(Path("rolled/metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(1, 19))
    assert lines[3]["data/epochs"] == 4 * 8 / 12 and lines[4]["data/epochs"] == 10 * 8 / 12
    (event,) = [e for e in history.read("rolled") if e["event"] == "rollback"]
    assert (event["step"], event["to"], event["skipped"]) == (9, 4, [4, 9])
    assert event["examples"] == straight.batches[9][0]["index"].tolist()
    assert event["shards"] and all(name.startswith("pairs-train.") for name in event["shards"])
    printed = capfd.readouterr().err
    assert (
        "step 9: loss is nan, gradient norm 1.0; back to checkpoint 4 (rollback 1 of 3). Batches "
        "5 to 9 of the data are left out, rows 32 to 71; the last one holds records "
    ) in printed
    assert read_checkpoint("rolled", 18)["data/skipped"].tolist() == [[4, 4, 9]]
    assert "data/skipped" not in read_checkpoint("unrolled", 24)


@pytest.mark.parametrize(
    "crash",
    [
        pytest.param(6, id="before_its_next_checkpoint"),
        pytest.param(14, id="after_it", marks=pytest.mark.slow),
    ],
)
def test_run_that_has_rolled_back_is_resumed_exactly(here, monkeypatch, crash):
    whole = StubStep(act=once(9, NAN)).patch(monkeypatch)
    assert cli.main(command(f"whole{crash}", ROLLBACK)) == 0
    diverge, visits = once(9, NAN), []

    def act(step):
        visits.append(step)
        if step == crash and visits.count(9) and visits.count(step) == (2 if crash < 11 else 1):
            raise RuntimeError("crash")
        return diverge(step)

    name = f"crashed{crash}"
    StubStep(act=act).patch(monkeypatch)
    assert cli.main(command(name, ROLLBACK)) == 1
    resumed = StubStep(act=once(99, NAN)).patch(monkeypatch)  # that diverges by itself no more
    assert cli.main(command(name, ROLLBACK)) == 0
    for step, batches in resumed.batches.items():
        assert contents(batches) == contents(whole.batches[step][-1:]), step
    lines = [Path(workdir, "metrics.jsonl").read_bytes() for workdir in (name, f"whole{crash}")]
    assert lines[0] == lines[1]
    left, right = (read_checkpoint(workdir, 18) for workdir in (name, f"whole{crash}"))
    for key in left:
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)


def test_rollback_before_the_first_checkpoint_starts_anew_behind_the_batches(here, monkeypatch):
    stub = StubStep(act=once(3, NAN)).patch(monkeypatch)
    assert cli.main(command("before", ROLLBACK, steps=8)) == 0
    assert contents(stub.batches[1][1:]) == contents(stub.batches[4])[:1]
    assert saved_steps("before") == [4, 8]


def test_rollbacks_have_an_end_and_ranges_grow(here, monkeypatch, capfd):
    StubStep(act=lambda step: NAN if step == 9 else 3.0).patch(monkeypatch)
    assert cli.main(command("always", ROLLBACK, "--config.train.max_rollbacks=2")) == 1
    (line,) = [li for li in capfd.readouterr().err.splitlines() if li.startswith("align: ")]
    assert "step 9: loss is nan" in line
    assert "stopped after 2 rollbacks (checkpoint 4 is the last good one)" in line
    skipped = [e["skipped"] for e in history.read("always") if e["event"] == "rollback"]
    assert skipped == [[4, 9], [9, 14]]


def test_where_no_good_checkpoint_is_left_the_run_stops(here, monkeypatch, capfd):
    chance = 2 * math.log(8)
    losses = [0.5 * chance] * 25 + [chance] * 30
    StubStep(act=lambda step: losses[step - 1]).patch(monkeypatch)
    others = "--config.checkpoint.keep=2", "--config.train.spike=0"
    assert cli.main(command("collapsed", ROLLBACK, *others, steps=60, save=10)) == 1
    printed = capfd.readouterr().err
    assert "step 45: loss has collapsed to chance: 4.1589, of 4.1589" in printed
    assert "stopped (no checkpoint before it)" in printed


def test_run_goes_back_to_a_step_with_another_learning_rate(here, monkeypatch, capfd):
    stub = StubStep().patch(monkeypatch)
    assert cli.main(command("back")) == 0
    lower = command("back", "--config.optim.learning_rate=1e-5")
    assert cli.main(lower) == 2
    assert "go on from a checkpoint by --resume-from STEP, or use" in capfd.readouterr().err
    assert cli.main([*lower, "--resume-from", "8"]) == 2
    assert "has no such checkpoint; it has [12, 16, 18]" in capfd.readouterr().err
    assert cli.main([*command("back", "--config.train.seed=1"), "--resume-from", "12"]) == 2
    assert cli.main([*command("nowhere"), "--resume-from", "12"]) == 2
    assert not Path("nowhere").exists()
    capfd.readouterr()

    def stop_at_17(step):
        if step == 17:
            raise RuntimeError("crash")

    StubStep(act=stop_at_17).patch(monkeypatch)
    assert cli.main([*lower, "--resume-from", "12"]) == 1
    printed = capfd.readouterr().err
    assert "back to step 12 (config.optim.learning_rate=1e-05, was 0.0001)" in printed
    assert "continuing from step 12" in printed
    assert saved_steps("back") == [12, 16]
    assert sorted(path.name for path in Path("back/set_aside/1").iterdir()) == [
        *("16", "18", "metrics.jsonl")
    ]
    (event,) = [e for e in history.read("back") if e["event"] == "resume_from"]
    assert event["changed"] == {"optim.learning_rate": [0.0001, 1e-05]}
    # The same command again, as launchers repeat it, does not go back again.
    stub = StubStep().patch(monkeypatch)
    assert cli.main([*lower, "--resume-from", "12"]) == 0
    assert "done by this command before; going on from the newest" in capfd.readouterr().err
    assert sorted(stub.batches) == [17, 18]
    steps = [line["step"] for line in read_lines(Path("back/metrics.jsonl"))]
    assert steps == list(range(1, 19))


def test_keys_of_divergence_are_checked(here, capfd):
    for override, said in (
        ("--config.train.on_divergence=rolback", "Did you mean 'rollback'?"),
        ("--config.train.max_rollbacks=-1", "config.train.max_rollbacks=-1 must be"),
        ("--config.train.spike=-1", "config.train.spike=-1.0 must be"),
    ):
        assert cli.main(command("wrong", override)) == 2
        assert said in capfd.readouterr().err
    assert cli.main(command("wrong", ROLLBACK, "--config.checkpoint.keep=1")) == 2
    assert "keep 2 at least" in capfd.readouterr().err


def poison(state):
    """Returns the state with a weight that is NaN on the last device alone."""
    name = "text_projection/kernel"
    tower, leaf = name.split("/")
    array = state.params[tower][leaf]
    parts = [np.asarray(shard.data) for shard in array.addressable_shards]
    parts[-1] = np.full_like(parts[-1], NAN)
    devices = [shard.device for shard in array.addressable_shards]
    buffers = [jax.device_put(part, device) for part, device in zip(parts, devices, strict=True)]
    broken = jax.make_array_from_single_device_arrays(array.shape, array.sharding, buffers)
    params = state.params | {tower: state.params[tower] | {leaf: broken}}
    return train.dataclasses.replace(state, params=params)


class Trouble:
    """The compiled train step, to which a broken state is given the first time at a step."""

    def __init__(self, step_fn, at):
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
        self._at = None
        return self._step_fn(poison(state), batch)


def trained(monkeypatch, workdir, devices, at):
    """Returns (training lines, rollbacks) of 60 steps, with a weight that is NaN at a step."""
    make_program, make_mesh = train.make_program, train.mesh_lib.make_mesh

    def with_trouble(config, mesh, **sizes):
        *others, step_fn = make_program(config, mesh, **sizes)
        return *others, Trouble(step_fn, at)

    with monkeypatch.context() as patch:
        patch.setattr(train, "make_program", with_trouble)
        patch.setattr(
            train.mesh_lib, "make_mesh", lambda **_: make_mesh(devices=jax.devices()[:devices])
        )
        config = config_lib.load_config(
            "config.py:plain",
            [
                *(ROLLBACK, "--config.train.batch_size=32", "--config.train.steps=60"),
                *("--config.checkpoint.every_steps=15", "--config.optim.learning_rate=1e-3"),
                "--config.data.source=scenes?size=400&seed=3",
            ],
        )
        train.train_and_evaluate(config, workdir)
    events = [e for e in history.read(workdir) if e["event"] == "rollback"]
    return read_lines(Path(workdir) / "metrics.jsonl"), events


@pytest.mark.slow
def test_nan_on_one_device_ends_as_the_clean_run_does_on_one_device_and_eight(here, monkeypatch):
    clean, events = trained(monkeypatch, "clean", 1, None)
    assert not events
    runs = {n: trained(monkeypatch, f"nan{n}", n, 33) for n in (1, 8)}
    for lines, events in runs.values():
        assert [(e["step"], e["to"], e["skipped"]) for e in events] == [(33, 30, [30, 33])]
        assert [line["step"] for line in lines] == list(range(1, 61))
        last, want = (np.mean([line["train/loss"] for line in run[-15:]]) for run in (lines, clean))
        assert abs(last / want - 1) < 0.01, (last, want)
    left, right = ([line["data/epochs"] for line in runs[n][0]] for n in (1, 8))
    assert left == right
    # Rounding grows at this rate, with or without a rollback: 1e-3 was seen after 12 steps.
    left, right = ([line["train/loss"] for line in runs[n][0]] for n in (1, 8))
    np.testing.assert_allclose(left[:10], right[:10], rtol=1e-3)
    np.testing.assert_allclose(np.mean(left[-15:]), np.mean(right[-15:]), rtol=1e-2)
