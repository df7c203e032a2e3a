"""What a run keeps and for whom: milestones, the best, readers; evaluators' periods; traces; time
from a signal to the saved step. `StubStep` stands in for the train step.
"""

import asyncio
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import jax
import pytest
from helpers import StubStep, environment, read_lines, run_align, saved_steps, start_align

from align_jax import config as config_lib
from align_jax import train
from align_jax.cli import eval_verbs
from align_jax.cli import main as cli
from align_jax.run import readers, signals


class Scores:
    """An evaluator with a score for each of its calls."""

    def __init__(self, name, scores):
        self.name, self._scores, self.steps = name, list(scores), []

    def __call__(self, model):
        return {"score": self._scores.pop(0)}


@pytest.fixture
def here(project, monkeypatch):
    monkeypatch.chdir(project)
    return project


def use(monkeypatch, *evaluators):
    monkeypatch.setattr(train.evals_lib, "make_evaluators", lambda config: list(evaluators))
    monkeypatch.setattr(train.tables, "format_table", lambda results, *_: str(results))
    StubStep().patch(monkeypatch)


def config(*overrides, **entries):
    loaded = config_lib.load_config("config.py:plain", [f"--config.{o}" for o in overrides])
    with loaded.unlocked():
        for name, entry in entries.items():
            loaded.eval.evaluators[name] = {"type": "retrieval", "source": "data?split=train"}
            loaded.eval.evaluators[name].update(entry)
    return loaded


@pytest.mark.slow
def test_milestones_and_the_best_outlive_the_newest(here, monkeypatch, capfd):
    settings = (
        *("train.steps=12", "checkpoint.every_steps=4", "checkpoint.keep=1"),
        *("checkpoint.keep_every=4", "checkpoint.best=own/score", "eval.every_steps=3"),
    )
    use(monkeypatch, Scores("own", [1.0, 5.0, 4.0, 5.0]))
    train.train_and_evaluate(config(*settings, own={}), "kept")
    # Scores are of 3, 6, 9 and 12; of equal ones the first counts.
    assert saved_steps("kept") == [4, 6, 8, 12]
    printed = capfd.readouterr().err
    assert printed.count("own/score the best so far, its checkpoint stays") == 2
    # The run that continues knows its best.
    use(monkeypatch, Scores("own", [2.0]))
    train.train_and_evaluate(config("train.steps=14", *settings[1:], own={}), "kept")
    assert saved_steps("kept") == [4, 6, 8, 12, 14]
    use(monkeypatch, Scores("own", [7.0, 1.0, 5.0]))
    lowest = ["train.steps=9", *settings[1:3], "checkpoint.best=-own/score", settings[-1]]
    train.train_and_evaluate(config(*lowest, own={}), "lowest")
    assert saved_steps("lowest") == [6, 9]


@pytest.mark.parametrize("best", ["own", "own/", "other/r1", "/r1"])
def test_best_of_no_evaluator_is_refused(here, best, capfd):
    with pytest.raises(ValueError, match="checkpoint.best=.* which has: own"):
        train.train_and_evaluate(config(f"checkpoint.best={best}", own={}), "unkept")
    assert not os.path.exists("unkept")


def test_each_evaluator_has_its_period_and_all_run_at_the_end(here, monkeypatch):
    use(monkeypatch, Scores("often", range(9)), Scores("own", range(9)))
    settings = config("eval.every_steps=5", often={"every_steps": 2}, own={})
    train.train_and_evaluate(settings, "periods")
    lines = read_lines(Path("periods/metrics.jsonl"))
    found = {
        name: [line["step"] for line in lines if f"eval/{name}/score" in line]
        for name in ("often", "own")
    }
    assert found == {"often": [2, 4, 6, 8, 10], "own": [5, 10]}
    for wrong in (0, "3"):
        with pytest.raises(
            ValueError, match="evaluators.own.every_steps=.* must be (positive|an integer)"
        ):
            train.train_and_evaluate(config(own={"every_steps": wrong}), "unperiodic")


def test_checkpoint_that_is_read_is_not_removed_and_one_that_goes_is_not_read(here, monkeypatch):
    seen = {}

    def act(step):
        if step == 5:
            wait_for(lambda: saved_steps("read") == [2, 4])
            seen["reader"] = readers.reading("read", 2)
            seen["reader"].__enter__()
        if step == 9:
            wait_for(lambda: saved_steps("read") == [2, 6, 8])
            seen["reader"].__exit__(None, None, None)

    StubStep(act=act).patch(monkeypatch)
    settings = config("train.steps=12", "checkpoint.every_steps=2", "checkpoint.keep=2")
    train.train_and_evaluate(settings, "read")
    assert saved_steps("read") == [10, 12]
    with pytest.raises(readers.Gone), readers.reading("read", 8):
        raise AssertionError("it is gone")
    assert readers.may_go("read", 12)
    with pytest.raises(readers.Gone), readers.reading("read", 12):
        raise AssertionError("it is about to go")
    readers.clear("read", {10})
    with readers.reading("read", 12):
        assert not readers.may_go("read", 12)
    assert readers.may_go("read", 12)
    dead = Path("read/reading/10.elsewhere.77")
    dead.touch()
    assert not readers.may_go("read", 10)
    os.utime(dead, (time.time() - 4000,) * 2)
    assert readers.may_go("read", 10)


def wait_for(condition):
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_follower_evaluates_what_appears_until_the_run_is_complete(here, monkeypatch, capfd):
    StubStep().patch(monkeypatch)
    settings = ["--config.train.steps=6", "--config.checkpoint.every_steps=3"]
    command = ["train", "--config", "config.py:plain", "--workdir", "followed", *settings]
    follow = ["eval", "--follow", "followed", "--retrieval", "data?split=train"]
    assert cli.main(follow) == 2
    assert "followed is no workdir" in capfd.readouterr().err
    assert cli.main([*follow, "--step", "3"]) == 2
    assert "no --step" in capfd.readouterr().err
    assert cli.main(command) == 0
    assert cli.main([*command, "--config.train.steps=9"]) == 0
    monkeypatch.setattr(eval_verbs, "_POLL_S", 0.01)
    missing = readers.may_go("followed", 6)
    assert missing
    assert cli.main(follow) == 0
    files = sorted(path.name for path in Path("followed/eval").glob("followed_*"))
    assert files == ["followed_00000003.json", "followed_00000009.json"]
    assert "step 6: removed before it was read" in capfd.readouterr().err
    written = json.loads(Path("followed/eval", files[1]).read_text())
    assert written["provenance"]["step"] == 9
    assert "retrieval/image_to_text_r1" in written["results"]
    # What is written is not evaluated again.
    monkeypatch.setattr("align_jax.evals.run_evaluators", lambda *args: pytest.fail("again"))
    assert cli.main(follow) == 0


def test_storage_that_fails_is_one_line_and_exit_1(here, monkeypatch, capfd):
    def act(step):
        if step == 5:
            wait_for(lambda: saved_steps("failing") == [2, 4])
            os.rename("failing/checkpoints", "failing/moved")
            Path("failing/checkpoints").write_text("no folder")

    StubStep(act=act).patch(monkeypatch)
    command = ["train", "--config", "config.py:plain", "--workdir", "failing"]
    assert cli.main([*command, "--config.checkpoint.every_steps=2"]) == 1
    printed = capfd.readouterr().err
    (line,) = [text for text in printed.splitlines() if text.startswith("align: ")]
    assert re.search(r"failing/checkpoints: checkpoint \d is not saved: NotADirectoryError", line)
    assert "Traceback" not in printed

    def deny(*args):
        raise PermissionError(13, "Permission denied", "metrics.jsonl")

    StubStep().patch(monkeypatch)
    monkeypatch.setattr(train.report.metrics.MetricWriter, "write", deny)
    assert cli.main([*command[:-1], "denied"]) == 1
    (line,) = [t for t in capfd.readouterr().err.splitlines() if t.startswith("align: ")]
    assert "Permission denied: 'metrics.jsonl'; the same command continues" in line


@pytest.mark.parametrize("during", ["compilation", "evaluation"])
def test_signal_waits_neither_for_compiler_nor_evaluation(here, monkeypatch, capfd, during):
    released = threading.Event()

    def blocked():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert released.wait(60)  # in a thread that nobody waits for

    class Compiling(StubStep):
        def compile(self):
            blocked()
            return self

    class Evaluating:
        name = "own"

        def __call__(self, model):
            blocked()
            return {}

    use(monkeypatch, *[Evaluating()] * (during == "evaluation"))
    if during == "compilation":
        Compiling().patch(monkeypatch)
    train.train_and_evaluate(config("eval.every_steps=3"), during)
    assert any(thread.name == signals.LEFT for thread in threading.enumerate())
    released.set()
    said = {"compilation": "no step was done", "evaluation": "saved step 3"}[during]
    assert f"SIGTERM: {said}; run the same command" in capfd.readouterr().err
    assert saved_steps(during) == ([3] if during == "evaluation" else [])


def test_training_works_in_a_running_event_loop(here, monkeypatch):
    StubStep().patch(monkeypatch)

    async def cell():
        return train.train_and_evaluate(config("train.steps=6"), "notebook")

    asyncio.run(cell())
    assert saved_steps("notebook") == [6]


def test_trace_of_some_steps_is_where_tensorboard_looks(here, monkeypatch, capfd):
    StubStep().patch(monkeypatch)
    command = ["train", "--config", "config.py:plain", "--workdir", "traced"]
    for span in ("5", "5:5", "6:5", "a:b", "10:12", "-1:3"):
        assert cli.main([*command, f"--profile={span}"]) == 2
        assert f"--profile {span} is not A:B" in capfd.readouterr().err
        assert not os.path.exists("traced")
    assert cli.main([*command, "--profile", "4:6"]) == 0
    assert "trace of 2 steps in traced/tensorboard/plugins/profile" in capfd.readouterr().err
    (trace,) = Path("traced/tensorboard/plugins/profile").glob("*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    steps = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
    assert steps == [5, 6]
    assert not any(event.name.startswith("$") for event in events)  # calls of Python


@pytest.mark.slow
def test_compiled_programs_are_kept_for_the_user_and_a_signal_does_not_wait_for_the_compiler(here):
    env = {k: v for k, v in environment().items() if not k.startswith("JAX_")}
    env |= {"XDG_CACHE_HOME": str(here / "caches")}
    command = ["train", "--config", "config.py:plain", "--workdir", "cached"]
    process = start_align(*command, cwd=here, env=env)
    wait_for(lambda: os.path.exists("cached/history.jsonl"))
    time.sleep(1.0)  # the compiler is at work
    process.send_signal(signal.SIGTERM)
    sent_s = time.monotonic()
    printed = process.communicate(timeout=60)[1]
    took_s = time.monotonic() - sent_s
    assert process.returncode == 0, printed
    assert "SIGTERM: no step was done" in printed and took_s < 10
    done = run_align(*command, cwd=here, env=env)
    assert done.returncode == 0, done.stderr
    kept = {path.name for path in (here / "caches" / "align_jax" / "compiled").iterdir()}
    assert any(name.startswith("jit_train_step") for name in kept)
