"""Where the time of a run goes, and runs that hang: sums by a hand-worked clock, who is behind."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import StubStep, environment, read_lines

from align_jax.cli import main as cli
from align_jax.run import timeline, watchdog


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def line(clock):
    return timeline.Timeline(clock)


def spend(line, clock, phase, seconds, step=0):
    line.enter(phase, step)
    clock.now_s += seconds


def test_every_second_is_in_one_phase(line, clock):
    clock.now_s = 4.0  # startup
    spend(line, clock, "step", 10.0)
    with line.inside("evaluation", 1):
        clock.now_s += 3.0
        with line.inside("save", 1):
            clock.now_s += 2.0
        clock.now_s += 0.5
    clock.now_s += 0.5
    sums = line.sums()
    found = {name: sums[f"time/{name}_s"] for name in timeline.PHASES}
    expected = {"startup": 4.0, "step": 10.5, "evaluation": 3.5, "save": 2.0}
    assert found == dict.fromkeys(timeline.PHASES, 0.0) | expected
    assert sums["perf/goodput"] == 10.5 / 20
    assert line.summary() == (
        "time 20 s: step 52.5 %, evaluation 17.5 %, save 10.0 %, startup 20.0 %; goodput 52.5 %"
    )


def test_steps_that_are_gone_back_from_are_lost(line, clock):
    spend(line, clock, "step", 10.0)
    line.saved(4)
    spend(line, clock, "step", 6.0)
    line.saved(8)
    spend(line, clock, "step", 1.0)
    line.lose(4)
    sums = line.sums()
    assert (sums["time/step_s"], sums["time/lost_s"]) == (10.0, 7.0)
    assert sums["perf/goodput"] == 10 / 17


def test_run_that_was_preempted_twice_takes_up_its_sums(line, clock):
    def written(step, step_s, save_s, lost_s):
        times = {"time/step_s": step_s, "time/save_s": save_s, "time/lost_s": lost_s}
        return {"step": step} | times

    # Killed after step 30, saved at 20; that part had taken up 5 s lost before.
    lines = [written(10, 8.0, 1.0, 5.0), written(20, 18.0, 2.0, 5.0), written(30, 30.0, 2.5, 5.0)]
    assert line.take_up([{"step": 5, "perf/step_time_s": 0.1}, *lines], 20)
    spend(line, clock, "step", 4.0)
    sums = line.sums()
    assert (sums["time/step_s"], sums["time/save_s"], sums["time/lost_s"]) == (22.0, 2.5, 17.0)
    line.lose(10)  # a checkpoint of the part before
    sums = line.sums()
    assert (sums["time/step_s"], sums["time/lost_s"]) == (8.0, 31.0)
    # What was before the first checkpoint is time of the run, too.
    anew = timeline.Timeline(clock)
    assert anew.take_up(lines, 0)
    sums = anew.sums()
    assert (sums["time/step_s"], sums["time/save_s"], sums["time/lost_s"]) == (0.0, 2.5, 35.0)
    assert not anew.take_up([{"step": 5, "perf/step_time_s": 0.1}], 5)


def test_parts_and_what_is_between_them_are_the_whole_time(clock):
    """Three parts of one run, each in a process of its own, by a clock that starts at 1,000 s."""

    def unix_clock():
        return 1000.0 + clock.now_s

    def part(lines, step, began_s, step_s):
        part_of_run = timeline.Timeline(clock, unix_clock=unix_clock, began_s=began_s)
        clock.now_s += 1.0  # restored
        part_of_run.take_up(lines, step)
        spend(part_of_run, clock, "step", step_s)
        sums = part_of_run.sums()
        assert sum(value for key, value in sums.items() if key.startswith("time/")) == clock.now_s
        assert sums["unix_s"] == 1000.0 + clock.now_s
        return [*lines, {"step": step + 10} | sums]

    clock.now_s = 3.0  # the interpreter
    lines = part([], 0, 0.0, 10.0)  # its last line is of 14 s
    clock.now_s = 64.0 + 2.0
    lines = part(lines, 10, 64.0, 5.0)  # 72 s
    clock.now_s = 100.0
    lines = part(lines, 10, 100.0, 4.0)  # was killed, does the same steps again
    last = lines[-1]
    assert last["time/between_s"] == (64 - 14) + (100 - 72)
    assert (last["time/step_s"], last["time/lost_s"]) == (10 + 4, 5)
    assert last["time/startup_s"] == 4 + 3 + 1
    assert last["perf/goodput"] == 14 / 105
    # The clock of another host is behind: nothing is counted twice.
    behind = timeline.Timeline(clock, unix_clock=lambda: 900.0)
    behind.take_up(lines, 20)
    assert behind.sums()["time/between_s"] == last["time/between_s"]


def note(phase="step", step=7, ended=False):
    return {"phase": phase, "step": step, "ended": ended, "host": "a", "pid": 11}


@pytest.fixture
def dog(line, monkeypatch):
    """The watchdog of process 1 of 3, which tells nothing by itself."""
    monkeypatch.setattr(watchdog.jax, "process_index", lambda: 1)
    monkeypatch.setattr(watchdog.jax, "process_count", lambda: 3)
    return watchdog.Watchdog(line, 100.0)


def test_silent_process_is_named(dog, clock):
    dog._heard = {0: (note(), 0.0), 2: (note("evaluation"), 0.0)}
    clock.now_s = dog._answered_s = 30.0
    assert dog.find() == ""
    clock.now_s = dog._answered_s = 31.0
    dog._heard[0] = note(), 31.0
    assert dog.find() == (
        "process 2 of 3 (host a, pid 11), at step 7, evaluation, is silent for 31 s"
    )
    dog._heard[2] = note(ended=True), 0.0
    assert dog.find() == ""
    dog._answered_s = 0.0
    assert dog.find().startswith(
        "process 0 of 3 (host a, pid 11), at step 7, step, does not answer"
    )


def test_process_that_is_behind_is_named_where_all_are_alive(dog, line, clock):
    line.enter("step", 7)
    clock.now_s = dog._answered_s = 101.0
    dog._heard = {0: (note(), 100.0), 2: (note("data"), 100.0)}
    assert dog.find() == (
        "nothing has moved for 101 s (config.train.hang_s=100); behind is process 2 of 3 (host a, "
        "pid 11), at step 7, data,"
    )
    dog._heard[0] = note(step=6), 100.0
    assert "behind is process 0 of 3" in dog.find()
    # Who waits for another's compiler is not stuck, nor is it as soon as that is done.
    dog._heard[0] = note("compilation", step=6), 100.0
    assert dog.find() == ""
    dog._heard[0] = note(step=7), 100.0
    clock.now_s = dog._answered_s = 110.0
    assert dog.find() == ""
    line.enter("compilation", 7)
    clock.now_s = dog._answered_s = 999.0
    dog._heard = {}
    assert dog.find() == ""


def test_slow_steps_are_no_hang(dog, line, clock):
    line.enter("step", 1)
    clock.now_s = 50.0
    line.enter("step", 2)
    clock.now_s = dog._answered_s = 50.0 + 499.0
    assert dog.find() == ""
    clock.now_s = dog._answered_s = 50.0 + 501.0
    assert dog.find().startswith("nothing has moved for 501 s")


def test_hanging_step_ends_the_run_with_all_stacks(project, monkeypatch, capfd):
    monkeypatch.chdir(project)
    hung, said = threading.Event(), []
    monkeypatch.setattr(watchdog, "_PERIOD_S", 0.02)
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: (said.append(code), hung.set()))

    def act(step):
        if step == 3:
            assert hung.wait(60)

    StubStep(act=act).patch(monkeypatch)
    command = ["train", "--config", "config.py:plain", "--workdir", "hung"]
    cli.main([*command, "--config.train.hang_s=0.5"])
    assert said == [1]
    printed = capfd.readouterr().err
    assert "thread MainThread:" in printed and "in act\n" in printed
    (problem,) = [text for text in printed.splitlines() if text.startswith("align: ")]
    assert problem.startswith("align: step 3: nothing has moved for ")
    assert "behind is process 0 of 1" in problem


def test_perf_lines_tell_where_the_time_went(project, monkeypatch, capfd):
    monkeypatch.chdir(project)
    StubStep().patch(monkeypatch)
    command = ["train", "--config", "config.py:plain", "--workdir", "timed"]
    assert cli.main([*command, "--config.log.every_steps=4"]) == 0
    printed = capfd.readouterr().err
    assert printed.splitlines()[-1].startswith("time ") and "; goodput " in printed
    lines = read_lines(Path("timed/perf.jsonl"))
    # Saved at 8, logged at 4 and 8, both at the end; and what the end itself took.
    assert [entry["step"] for entry in lines] == [4, 8, 10, 10]
    for before, after in zip(lines, lines[1:], strict=False):
        for phase in timeline.PHASES:
            assert after[f"time/{phase}_s"] >= before[f"time/{phase}_s"]
    assert lines[-1]["time/save_s"] > 0 and lines[-1]["time/step_s"] > 0
    assert cli.main([*command, "--config.train.steps=11"]) == 0
    later = read_lines(Path("timed/perf.jsonl"))
    assert later[: len(lines)] == lines
    assert later[-1]["time/step_s"] > lines[-1]["time/step_s"]
    assert later[-1]["time/restore_s"] > 0


TELLS = """
import sys
from align_jax.cli import main
from align_jax.run import timeline

enter = timeline.Timeline.enter


def told(self, phase, step):
    enter(self, phase, step)
    print(phase, flush=True)


timeline.Timeline.enter = told
sys.exit(main.main())
"""


@pytest.mark.slow
def test_run_that_was_preempted_twice_accounts_for_all_time(project, tmp_path):
    def live(signal_in):
        """Returns when a part of the run was started, first told something, and was gone."""
        command = ["train", "--config", "config.py", "--workdir", "preempted"]
        changes = {"eval.every_steps": 4, "checkpoint.every_steps": 3}
        command += [f"--config.{key}={value}" for key, value in changes.items()]
        began_s, told_s, signalled_s = time.time(), None, None
        process = subprocess.Popen(
            [sys.executable, "-c", TELLS, *command],
            cwd=project,
            env=environment(cache=tmp_path),
            stdout=subprocess.PIPE,
            text=True,
        )
        for phase in process.stdout:
            told_s = told_s or time.time()
            if phase.strip() == signal_in and signalled_s is None:
                process.send_signal(signal.SIGTERM)
                signalled_s = time.time()
        assert process.wait() == 0
        return began_s, told_s, signalled_s, time.time()

    parts = [live(signal_in) for signal_in in ("compilation", "evaluation", None)]
    lines = read_lines(project / "preempted" / "perf.jsonl")
    # No step was made in the first part; the second one was stopped in the evaluation of step 4.
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 4, 4, *range(5, 11), 10]
    stopped, resumed, last = lines[5], lines[6], lines[-1]
    for line in lines:
        whole_s = sum(line[f"time/{phase}_s"] for phase in timeline.PHASES)
        assert line["perf/goodput"] == pytest.approx(line["time/step_s"] / whole_s)
        # Counted from the start of the first part on, whichever part wrote the line.
        assert parts[0][0] - 0.1 <= line["unix_s"] - whole_s <= parts[0][1] + 0.1
    assert last["unix_s"] <= parts[-1][3]
    between_s = [lines[0]["time/between_s"], resumed["time/between_s"] - stopped["time/between_s"]]
    for found_s, before, after in zip(between_s, parts, parts[1:], strict=False):
        assert after[0] - before[3] <= found_s <= after[1] - before[2]
    assert last["time/between_s"] == pytest.approx(sum(between_s))
    for phase in ("compilation", "evaluation"):
        assert stopped[f"time/{phase}_s"] > 0, phase
        assert last[f"time/{phase}_s"] > stopped[f"time/{phase}_s"], phase
    assert last["time/lost_s"] == lines[0]["time/lost_s"] == 0
