"""Two runs in one folder, full disks, signals, evaluators that fail, odd paths: nothing is lost.

`StubStep` stands in for the train step where only the loop is in question.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import (
    FAST_COMPILE,
    StubStep,
    environment,
    make_project,
    read_lines,
    run_align,
    saved_steps,
    snapshot,
    write_table,
)

from align_jax import config as config_lib
from align_jax import train
from align_jax.cli import main as cli
from align_jax.run.trained import load_trained


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder as a user has it: packed pairs, a vocabulary, a config."""
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def inside(project, monkeypatch):
    """The same folder as current directory, for runs in this process."""
    monkeypatch.chdir(project)
    return project


def test_evaluation_comes_after_the_checkpoint_of_its_step(inside, monkeypatch):
    found = []

    class Looking:
        name = "looking"

        def __call__(self, model):
            deadline_s = time.monotonic() + 60  # a save may still be on its way
            while saved_steps("order")[-1:] != [8] and time.monotonic() < deadline_s:
                time.sleep(0.01)
            found.append(saved_steps("order"))
            return {"x": 1}

    monkeypatch.setattr(train.evals_lib, "make_evaluators", lambda config: [Looking()])
    StubStep().patch(monkeypatch)
    command = ("train", "--config", "config.py:plain", "--workdir", "order")
    assert cli.main([*command, "--config.eval.every_steps=8", "--config.train.steps=8"]) == 0
    assert found == [[8]]


def test_second_sigterm_at_once_changes_nothing(inside, monkeypatch, capfd):
    def stop_at_5(step):
        if step == 5:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)

    stub = StubStep(act=stop_at_5).patch(monkeypatch)
    assert cli.main(["train", "--config", "config.py:plain", "--workdir", "twice"]) == 0
    assert "SIGTERM: saved step 5; run the same command" in capfd.readouterr().err
    assert saved_steps("twice") == [5] and max(stub.batches) == 5
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_second_ctrl_c_means_it(inside, monkeypatch, capfd):
    def press_at_5(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    StubStep(act=press_at_5).patch(monkeypatch)
    assert cli.main(["train", "--config", "config.py:plain", "--workdir", "pressed"]) == 1
    assert capfd.readouterr().err.splitlines()[-1] == "align: KeyboardInterrupt"
    assert not os.path.exists("pressed/lock")


def test_signal_during_compilation_ends_the_run_without_a_step(inside, monkeypatch, capfd):
    class Compiling(StubStep):
        def compile(self):
            os.kill(os.getpid(), signal.SIGTERM)
            return self

    stub = Compiling().patch(monkeypatch)
    assert cli.main(["train", "--config", "config.py:plain", "--workdir", "compiling"]) == 0
    assert "SIGTERM: no step was done; run the same command" in capfd.readouterr().err
    assert not stub.batches and saved_steps("compiling") == []
    StubStep().patch(monkeypatch)
    assert cli.main(["train", "--config", "config.py:plain", "--workdir", "compiling"]) == 0


def test_metric_lines_are_on_disk_before_the_checkpoint_counts(inside, monkeypatch):
    order = []
    sync, save = train.report.metrics.MetricWriter.sync, train.checkpoint.Checkpointer.save

    def synced(writer):
        order.append("sync")
        sync(writer)

    def saved(checkpointer, state, data, **options):
        steps = [line["step"] for line in read_lines(inside / "synced" / "metrics.jsonl")]
        order.append(("save", int(state.step), steps[-1]))
        save(checkpointer, state, data, **options)

    monkeypatch.setattr(train.report.metrics.MetricWriter, "sync", synced)
    monkeypatch.setattr(train.checkpoint.Checkpointer, "save", saved)
    StubStep().patch(monkeypatch)
    command = ("train", "--config", "config.py:plain", "--workdir", "synced")
    assert cli.main([*command, "--config.train.steps=16"]) == 0
    assert order == ["sync", ("save", 8, 8), "sync", ("save", 16, 16)]


def test_hole_in_the_metrics_is_noticed_once(inside, monkeypatch, capfd):
    StubStep().patch(monkeypatch)
    command = ("train", "--config", "config.py:plain", "--workdir", "hole")
    assert cli.main([*command, "--config.train.steps=16", "--config.log.every_steps=2"]) == 0
    path = inside / "hole" / "metrics.jsonl"
    assert cli.main([*command, "--config.train.steps=17"]) == 0
    assert "metrics.jsonl ends at" not in capfd.readouterr().err  # 16 is the last that was due
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert cli.main([*command, "--config.train.steps=20"]) == 0
    printed = [line for line in capfd.readouterr().err.splitlines() if "metrics.jsonl" in line]
    assert len(printed) == 1
    assert "ends at step 6, but the run goes on from step 17: the lines between" in printed[0]
    path.unlink()
    assert cli.main([*command, "--config.train.steps=24"]) == 0
    assert "ends at step 0, but the run goes on from step 20" in capfd.readouterr().err


def test_training_works_in_a_thread(inside, monkeypatch):
    StubStep().patch(monkeypatch)
    config = config_lib.load_config("config.py:plain", ["--config.train.steps=6"])
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train.train_and_evaluate, config, "threaded").result()
    assert saved_steps("threaded") == [6]


def test_second_training_in_one_folder_is_refused_and_touches_nothing(inside, monkeypatch, capfd):
    command = ["train", "--config", "config.py:plain", "--workdir", "both"]
    seen = []

    def start_another(step):
        if step == 3:
            before = snapshot("both")
            done = run_align(*command, cwd=inside, env=environment())
            seen.append(done)
            assert snapshot("both") == before

    StubStep(act=start_another).patch(monkeypatch)
    assert cli.main([*command, "--config.train.steps=6"]) == 0
    (done,) = seen
    assert done.returncode == 2
    assert done.stderr == (
        f"align: both is in use by align train, process {os.getpid()} on {os.uname().nodename}; "
        "wait for it, or name another folder.\n"
    )
    assert saved_steps("both") == [6]


@pytest.mark.parametrize("name", ["exp[1]", "what?*", "a %20#{b}"])
def test_workdir_whose_name_looks_like_a_pattern(name, inside, monkeypatch):
    StubStep().patch(monkeypatch)
    command = ["train", "--config", "config.py:plain", "--workdir", f"odd/{name}"]
    assert cli.main([*command, "--config.train.steps=6"]) == 0
    assert cli.main([*command, "--config.train.steps=8"]) == 0
    assert saved_steps(f"odd/{name}") == [6, 8]
    lines = read_lines(inside / "odd" / name / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert load_trained(f"odd/{name}").step == 8


def test_first_checkpoint_that_does_not_open_ends_the_run(inside, monkeypatch, capfd):
    def broken(checkpointer, step, expected):
        raise ValueError(f"Checkpoint {step} is damaged.")

    monkeypatch.setattr(train.checkpoint.Checkpointer, "_check", broken)
    StubStep().patch(monkeypatch)
    assert cli.main(["train", "--config", "config.py:plain", "--workdir", "unreadable"]) == 1
    said = "checkpoints, the first one does not open: Checkpoint 8 is damaged."
    (line,) = [li for li in capfd.readouterr().err.splitlines() if li.startswith("align: ")]
    assert line.endswith(said)


def test_bucket_as_workdir_is_refused_before_anything(inside, capfd):
    command = ["train", "--config", "config.py:plain", "--workdir", "gs://bucket/x"]
    assert cli.main(command) == 2
    assert capfd.readouterr().err.startswith("align: --workdir gs://bucket/x: gs:// is not a file")
    assert not os.path.exists("gs:")


@pytest.fixture
def small_disk(inside):
    """A file system of 4 MiB."""
    folder = inside / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_full_disk_is_one_line_that_names_folder_and_space(small_disk, inside):
    done = run_align(
        *("train", "--config", "config.py:plain", "--workdir", "disk/run"),
        cwd=inside,
        env=environment(**FAST_COMPILE),
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if not line.startswith("step ")]
    assert errors[-1].startswith("align: disk/run cannot be written: no space left (")
    assert "MiB free of 4.0); make room and run the same command again." in errors[-1]
    assert "Traceback" not in done.stderr and len(errors) < 10, done.stderr


def test_run_continues_on_the_same_data_elsewhere_and_on_no_other(inside, monkeypatch, capfd):
    StubStep().patch(monkeypatch)
    command = ["train", "--config", "config.py:plain", "--workdir", "moved"]
    assert cli.main([*command, "--config.train.steps=8"]) == 0
    shutil.copytree("data", "mount/elsewhere")
    for path in Path("mount").rglob("*"):
        os.utime(path, (1e9, 1e9))
    elsewhere = "--config.data.source=mount/elsewhere?split=train"
    assert cli.main([*command, elsewhere, "--config.train.steps=9"]) == 0
    capfd.readouterr()

    rows = [json.loads(line) for line in Path("captions.jsonl").read_text().splitlines()]
    rows[20]["captions"][0] = rows[20]["captions"][0].swapcase()
    write_table(inside / "replaced.jsonl", rows)
    assert cli.main(["pack", "replaced.jsonl?images=images", "--out", "replaced"]) == 0
    shutil.rmtree("mount/elsewhere")
    shutil.move("replaced", "mount/elsewhere")
    before = snapshot("moved")
    for source in (elsewhere, "--config.data.source=data?split=train[1:]"):
        capfd.readouterr()
        assert cli.main([*command, source, "--config.train.steps=10"]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert "the training data is now '" in line
        assert "the run in moved was started on 'data?split=train: 44 pairs'" in line
    assert snapshot("moved") == before


def test_workdir_of_an_older_version_opens_with_a_note_and_is_stamped_from_then_on(
    inside, monkeypatch, capfd
):
    StubStep().patch(monkeypatch)
    command = ["train", "--config", "config.py:plain", "--workdir", "older"]
    assert cli.main([*command, "--config.train.steps=8"]) == 0
    path = Path("older/source.txt")
    stamped = path.read_text()
    path.write_text("data?split=train: 44 pairs\n")
    capfd.readouterr()
    assert cli.main([*command, "--config.train.steps=9"]) == 0
    assert "did not record what the training data held" in capfd.readouterr().err
    assert path.read_text() == stamped
    path.write_text("data?split=train: 43 pairs\n")
    assert cli.main([*command, "--config.train.steps=10"]) == 2


def test_sources_of_a_mixture_may_lie_elsewhere(inside, monkeypatch):
    StubStep().patch(monkeypatch)
    shutil.copytree("data", "copied")
    config = Path("config.py").read_text()
    for name, folder in (("mix", "data"), ("remix", "copied")):
        mixture = {"a": {"source": f"{folder}?split=train", "weight": 2.0}}
        mixture |= {"b": {"source": "scenes?size=20", "weight": 1.0}}
        Path(f"{name}.py").write_text(
            config.replace('c.data.source = "data?split=train"', f"c.data.mixture = {mixture}")
        )
    for number, name in enumerate(("mix", "remix")):
        command = ["train", "--config", f"{name}.py:plain", "--workdir", "mixed"]
        assert cli.main([*command, f"--config.train.steps={8 + number}"]) == 0
