"""train.py through the command line: resume after kills, signals, bad records, other meshes.

Processes that are killed are real. Where only the loop is in question, `StubStep` stands in for the
train step, so that nothing has to be compiled.
"""

import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
from helpers import (
    FAST_COMPILE,
    StubStep,
    assert_same_bytes,
    environment,
    make_project,
    read_checkpoint,
    read_lines,
    run_align,
    saved_steps,
    snapshot,
    start_align,
    wait_for_line,
    write_table,
)

from align_jax import train
from align_jax.cli import main as cli

TRAIN = ("train", "--config", "config.py")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder as a user has it: packed pairs, a vocabulary, a config; and a compile cache."""
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def straight(project):
    """The workdir of 40 uninterrupted steps, and what the run printed."""
    done = run_align(*TRAIN, "--workdir", "straight", cwd=project, env=child_env(project))
    assert done.returncode == 0, done.stderr
    return project / "straight", done.stderr


@pytest.fixture
def inside(project, monkeypatch):
    """The same folder as current directory, for runs in this process."""
    monkeypatch.chdir(project)
    return project


def child_env(project, **variables):
    return environment(cache=project / "cache", **FAST_COMPILE, **variables)


def train_step_lines(workdir, prefix="train/"):
    return [line for line in read_lines(workdir / "metrics.jsonl") if f"{prefix}loss" in line]


def finish(workdir, project):
    done = run_align(*TRAIN, "--workdir", workdir, cwd=project, env=child_env(project))
    assert done.returncode == 0, done.stderr
    return done.stderr


def assert_same_run(workdir, straight_workdir):
    lines, expected = (
        (folder / "metrics.jsonl").read_bytes() for folder in (workdir, straight_workdir)
    )
    assert lines == expected
    assert_same_bytes(read_checkpoint(workdir, 40), read_checkpoint(straight_workdir, 40))


def test_straight_run_writes_every_line_file_and_the_newest_checkpoints(straight):
    workdir, printed = straight
    lines = read_lines(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 41))
    evaluated = [line for line in lines if "eval/own/image_to_text_r1" in line]
    assert [line["step"] for line in evaluated] == [20, 40]
    assert all("eval/shapes/top1" in line for line in evaluated)
    assert saved_steps(workdir) == [24, 32, 40]
    written = set(snapshot(workdir))
    assert {"config.json", "preprocessing.json", "tokenizer/tokenizer.json"} <= written
    assert {"plots/loss.png", "plots/recall.png", "plots/gallery_own.png"} <= written
    assert {f"eval/step_{step:08d}.json" for step in (20, 40)} <= written
    assert "step 40/40" in printed and "Traceback" not in printed


@pytest.fixture(scope="module")
def killed(project):
    """A workdir as SIGKILL leaves it in the evaluation of step 20, between checkpoints 16 and 24.

    The line of that evaluation is written, its plots and a checkpoint that contains it are not.
    """
    workdir = project / "killed"
    process = start_align(*TRAIN, "--workdir", "killed", cwd=project, env=child_env(project))
    metrics = workdir / "metrics.jsonl"
    wait_for_line(metrics, lambda line: "eval/own/mean_recall" in line, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [line["step"] for line in read_lines(metrics)][-2:] == [20, 20]
    assert saved_steps(workdir)[-1] < 20
    return workdir


def test_run_resumed_after_kill_9_equals_the_straight_run(project, straight, killed):
    shutil.copytree(killed, project / "resumed")
    printed = finish("resumed", project)
    assert int(re.search(r"continuing from step (\d+) of resumed", printed)[1]) in (8, 16)
    assert_same_run(project / "resumed", straight[0])


def test_run_stopped_by_sigterm_saves_its_step_and_goes_on_like_the_straight_run(
    project, straight, killed
):
    workdir = project / "stopped"
    shutil.copytree(killed, workdir)
    process = start_align(*TRAIN, "--workdir", "stopped", cwd=project, env=child_env(project))
    # Lines of steps that the killed process reached are cut off: wait for a later one.
    wait_for_line(workdir / "metrics.jsonl", lambda line: line["step"] >= 27, process)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=100)[1]
    assert process.returncode == 0, printed
    stop = re.search(r"SIGTERM: saved step (\d+); run the same command to continue", printed)
    assert saved_steps(workdir)[-1] == int(stop[1]) < 40
    assert f"continuing from step {stop[1]} of stopped" in finish("stopped", project)
    assert_same_run(workdir, straight[0])


def test_rerun_of_a_finished_run_changes_nothing_and_shows_its_results(
    inside, straight, monkeypatch, capfd
):
    StubStep(act=lambda step: pytest.fail("a finished run trained on")).patch(monkeypatch)
    before = snapshot(straight[0])
    assert cli.main([*TRAIN, "--workdir", "straight"]) == 0
    printed = capfd.readouterr().err
    assert "step 40: this run is complete;" in printed and "I→T R@1" in printed
    after = snapshot(straight[0])
    kept = [name for name in before if "tensorboard" not in name]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


def test_eval_of_a_workdir_equals_the_evaluation_in_the_loop(project, straight):
    done = run_align(
        *("eval", "--workdir", "straight", "--out", "scores.json"),
        *("--retrieval", "data?split=train", "--zeroshot", "scenes?size=24&seed=6&label=shape"),
        *("--template", "a picture of a {}", "--template", "{}"),
        cwd=project,
        env=child_env(project),
    )
    assert done.returncode == 0, done.stderr
    assert "I→T R@1" in done.stdout and "zero-shot" in done.stdout
    assert done.stdout.endswith("wrote scores.json\n")
    written = json.loads((project / "scores.json").read_text())
    assert written["provenance"]["step"] == 40
    in_loop = json.loads((straight[0] / "eval" / "step_00000040.json").read_text())["results"]
    renamed = {"retrieval": "own", "zeroshot": "shapes"}
    results = {
        f"{renamed[key.split('/')[0]]}/{key.split('/')[1]}": value
        for key, value in written["results"].items()
    }
    assert results == in_loop


def test_eval_without_sources_runs_the_evaluators_of_the_config(inside, straight, capfd):
    assert cli.main(["eval", "--workdir", "straight", "--step", "32"]) == 0
    captured = capfd.readouterr()
    assert "own" in captured.out and "shapes" in captured.out
    written = json.loads((straight[0] / "eval" / "align_eval.json").read_text())
    assert written["provenance"]["step"] == 32
    assert set(written["provenance"]["evaluators"]) == {"own", "shapes"}


@pytest.mark.parametrize(
    "mesh",
    [(), pytest.param(("--config.mesh.fsdp=2",), marks=pytest.mark.slow)],
    ids=["data8", "data4_fsdp2"],
)
def test_eight_devices_give_the_losses_of_one(project, straight, mesh):
    name = f"eight{len(mesh)}"
    process = start_align(
        *("train", "--config", "config.py:plain", "--workdir", name, *mesh),
        cwd=project,
        env=child_env(project, JAX_NUM_CPU_DEVICES="8"),
    )
    wait_for_line(project / name / "metrics.jsonl", lambda line: line["step"] >= 6, process)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=100)[1]
    assert process.returncode == 0, printed
    assert f"8 cpu device(s), mesh data {4 if mesh else 8} x fsdp {2 if mesh else 1}" in printed
    expected, found = (train_step_lines(project / folder)[:6] for folder in ("straight", name))
    for key in ("train/loss", "train/temperature"):
        # Rounding alone: 1e-5 was seen after 10 steps at this learning rate.
        np.testing.assert_allclose(
            [line[key] for line in found], [line[key] for line in expected], rtol=1e-4
        )


def test_diverging_run_stops_with_one_line_and_keeps_a_good_checkpoint(project):
    done = run_align(
        *("train", "--config", "config.py:plain", "--workdir", "diverged"),
        *("--config.optim.learning_rate=1e30", "--config.checkpoint.every_steps=1"),
        cwd=project,
        env=child_env(project),
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("align: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    # The first update has rate 0; the second makes the third loss meaningless.
    assert errors[0].startswith("align: step 3: loss is nan")
    assert "checkpoint 1 is the last good one" in errors[0]
    assert "config.optim.learning_rate" in errors[0]
    kept = read_checkpoint(project / "diverged", 1)
    kept = {name: array for name, array in kept.items() if not name.startswith("data/")}
    assert len(kept) > 100 and all(np.isfinite(array).all() for array in kept.values())
    losses = [line["train/loss"] for line in train_step_lines(project / "diverged")]
    assert len(losses) == 2 and np.isfinite(losses).all()


def test_every_step_of_a_resumed_run_sees_the_batch_of_the_straight_run(inside, monkeypatch):
    def crash_at_14(step):
        if step == 14:
            raise RuntimeError("crash")

    command = ("train", "--config", "config.py:plain", "--config.train.steps=24", "--workdir")
    expected = StubStep().patch(monkeypatch)
    assert cli.main([*command, "stub_straight"]) == 0
    crashed = StubStep(act=crash_at_14).patch(monkeypatch)
    assert cli.main([*command, "stub_crashed"]) == 1
    resumed = StubStep().patch(monkeypatch)
    assert cli.main([*command, "stub_crashed"]) == 0

    assert sorted(expected.batches) == list(range(1, 25))
    assert sorted(crashed.batches) == list(range(1, 15))
    assert sorted(resumed.batches) == list(range(9, 25))
    for stub in (crashed, resumed):
        for step, (batch,) in stub.batches.items():
            (same,) = expected.batches[step]
            assert batch.keys() == same.keys() >= {"image", "ids", "mask", "index"}
            for name in batch:
                np.testing.assert_array_equal(batch[name], same[name], err_msg=f"{step} {name}")
    # The comparison would also hold if nothing were random: 44 pairs, so epochs repeat.
    first = {int(i): image for s in range(1, 6) for i, image in rows_of(expected.batches[s][0])}
    again = {int(i): image for s in range(7, 11) for i, image in rows_of(expected.batches[s][0])}
    assert any(not np.array_equal(first[i], again[i]) for i in first.keys() & again.keys())


def rows_of(batch):
    return zip(batch["index"], batch["image"], strict=True)


def test_bad_records_are_counted_named_once_and_their_counts_survive_a_resume(
    inside, tmp_path, monkeypatch, capfd
):
    rows = [json.loads(line) for line in (inside / "captions.jsonl").read_text().splitlines()]
    rows[3]["captions"] = ["", "  "]
    rows.append({"image": "broken.jpg", "captions": ["a broken one"]})
    write_table(tmp_path / "captions.jsonl", rows)
    whole = (inside / "images" / "0.jpg").read_bytes()
    (tmp_path / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    source = f"{tmp_path}/captions.jsonl?images={inside}/images,{tmp_path}"
    command = (
        *("train", "--config", "config.py:plain", f"--config.data.source={source}"),
        *("--config.checkpoint.every_steps=13", "--workdir"),
    )

    def crash_at_30(step):
        if step == 30:
            raise RuntimeError("crash")

    StubStep().patch(monkeypatch)
    assert cli.main([*command, "drops_straight"]) == 0
    printed = capfd.readouterr().err.splitlines()
    named = [line for line in printed if line.startswith("skipped ")]
    assert len(named) == 2
    assert any("'broken.jpg' (image_truncated)" in line for line in named)
    assert any("'3.jpg' (caption_empty)" in line for line in named)
    lines = read_lines(inside / "drops_straight" / "metrics.jsonl")
    for key in ("data/dropped_image_truncated", "data/dropped_caption_empty"):
        counts = [line.get(key, 0) for line in lines]
        assert counts == sorted(counts)
        # 40 steps of 8 are seven epochs of 45 pairs: each bad record is met once an epoch.
        assert 6 <= counts[-1] <= 8

    StubStep(act=crash_at_30).patch(monkeypatch)
    assert cli.main([*command, "drops_resumed"]) == 1
    capfd.readouterr()
    StubStep().patch(monkeypatch)
    assert cli.main([*command, "drops_resumed"]) == 0
    assert "skipped" not in capfd.readouterr().err  # named before the crash
    assert (inside / "drops_resumed" / "metrics.jsonl").read_bytes() == (
        inside / "drops_straight" / "metrics.jsonl"
    ).read_bytes()


class SignallingEvaluator:
    """An evaluator in whose middle the machine is to be switched off."""

    name = "signalling"

    def __init__(self):
        self.calls = 0

    def __call__(self, model):
        self.calls += 1
        if self.calls == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)  # a long evaluation is broken off
        return {"calls": self.calls}


def test_signal_during_an_evaluation_loses_no_step(inside, monkeypatch, capfd):
    evaluator = SignallingEvaluator()
    monkeypatch.setattr(train.evals_lib, "make_evaluators", lambda config: [evaluator])
    monkeypatch.setattr(train.tables, "format_table", lambda results, *_: str(results))
    command = (
        *("train", "--config", "config.py:plain", "--workdir", "signalled"),
        "--config.eval.every_steps=15",
    )
    stub = StubStep().patch(monkeypatch)
    assert cli.main(command) == 0
    assert "SIGTERM: saved step 15; run the same command" in capfd.readouterr().err
    assert saved_steps("signalled") == [8, 15] and max(stub.batches) == 15
    assert cli.main(command) == 0
    steps = [line["step"] for line in read_lines(inside / "signalled" / "metrics.jsonl")]
    assert steps == sorted([*range(1, 41), 15, 30, 40])
    assert evaluator.calls == 4  # that of step 15 again


def test_signal_at_the_last_step_leaves_its_evaluation_to_the_next_run(inside, monkeypatch, capfd):
    evaluator = SignallingEvaluator()
    evaluator.calls = 1  # sends no signal of its own
    monkeypatch.setattr(train.evals_lib, "make_evaluators", lambda config: [evaluator])
    monkeypatch.setattr(train.tables, "format_table", lambda results, *_: str(results))
    command = (
        *("train", "--config", "config.py:plain", "--workdir", "last"),
        "--config.train.steps=10",
    )

    def stop_at_10(step):
        if step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    StubStep(act=stop_at_10).patch(monkeypatch)
    assert cli.main(command) == 0
    assert "SIGTERM: saved step 10; run the same command" in capfd.readouterr().err
    assert evaluator.calls == 1 and saved_steps("last") == [8, 10]
    assert cli.main(command) == 0
    assert evaluator.calls == 2
    assert "eval/signalling/calls" in read_lines(inside / "last" / "metrics.jsonl")[-1]


def test_divergence_names_the_last_checkpoint_that_did_not_cause_it(inside, monkeypatch, capfd):
    # The loss of step 6 is computed with the parameters of checkpoint 5.
    StubStep(act=lambda step: float("nan") if step == 6 else None).patch(monkeypatch)
    command = ("train", "--config", "config.py:plain", "--workdir", "nan")
    assert cli.main([*command, "--config.checkpoint.every_steps=1"]) == 1
    printed = capfd.readouterr().err
    assert "align: step 6: loss is nan" in printed
    assert "checkpoint 4 is the last good one" in printed
    assert read_checkpoint("nan", 4)["training/step"] == 4
    # Steps as fast as these: none is left out because the one before is still being written.
    assert saved_steps("nan") == [3, 4, 5]


def test_failing_evaluator_costs_no_step_and_is_logged_counted_and_told_at_the_end(
    inside, monkeypatch, capfd
):
    class Other:
        name = "other"

        def __call__(self, model):
            return {"x": 7}

    class Failing:
        name = "failing"

        def __call__(self, model):
            raise ValueError("3 of 44 image vectors are not finite.")

    monkeypatch.setattr(train.evals_lib, "make_evaluators", lambda config: [Failing(), Other()])
    StubStep().patch(monkeypatch)
    assert cli.main([*TRAIN, "--workdir", "failing"]) == 1
    printed = capfd.readouterr().err
    assert "step 20: Evaluator 'failing': 3 of 44 image vectors are not finite. The run" in printed
    last = printed.splitlines()[-1]
    assert last.startswith("align: step 40: Evaluator 'failing': 3 of 44 image vectors")
    assert last.endswith("All 40 steps are saved.")
    assert saved_steps("failing") == [24, 32, 40]
    lines = read_lines(inside / "failing" / "metrics.jsonl")
    counted = {line["step"]: line for line in lines if "eval/failing/failed" in line}
    assert set(counted) == {20, 40}
    assert counted[20]["eval/other/x"] == 7 and "eval/other/failed" not in counted[20]
    # Once it is mended the same command evaluates the step that had no numbers.
    monkeypatch.setattr(train.evals_lib, "make_evaluators", lambda config: [Other()])
    assert cli.main([*TRAIN, "--workdir", "failing"]) == 0
    lines = read_lines(inside / "failing" / "metrics.jsonl")
    assert lines[-1] == {"step": 40, "eval/other/x": 7}
