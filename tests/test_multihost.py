"""Runs of several real processes: the lines of one process, and no hanging when one dies."""

import contextlib
import importlib.machinery
import json
import os
import re
import signal
import socket
import sys
import time
import types

import numpy as np
import pytest
from helpers import (
    CONFIG,
    FAST_COMPILE,
    environment,
    make_pairs,
    read_lines,
    start_align,
    wait_for_line,
)

from align_jax.cli import main as cli
from align_jax.run import multihost, watchdog

TRAIN = (
    *("train", "--config", "config.py", "--config.train.batch_size=32"),
    *("--config.model.bn_group_size=8", "--config.train.steps=12", "--config.eval.every_steps=6"),
    *("--config.checkpoint.every_steps=3", "--config.checkpoint.keep=9"),
)
STOP_S = 60  # how long the others may take to notice that a process is gone
PAIRS = 44  # that make_pairs writes

# Python runs this file at the start of every process: `align` then also writes down which examples
# each step was given, or has its devices in an order that is not that of the processes.
RECORDER = """
import json, os, sys
if os.environ.get("INTERLEAVE"):
    from align_jax import mesh
    make = mesh.make_mesh
    def make_mesh(data=-1, fsdp=1, devices=None):
        import jax
        order = sorted(jax.devices(), key=lambda d: (d.id % 4, d.process_index))
        return make(data, fsdp, devices or order)
    mesh.make_mesh = make_mesh
if os.environ.get("RECORD"):
    from align_jax import mesh
    real = mesh.put_batch
    def put_batch(batch, sharding):
        import jax
        with open(f"{os.environ['RECORD']}.{jax.process_index()}", "a") as file:
            file.write(json.dumps(batch["index"].tolist()) + chr(10))
        return real(batch, sharding)
    mesh.put_batch = put_batch
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    make_pairs(folder)
    (folder / "config.py").write_text(CONFIG)
    (folder / "recorder").mkdir()
    (folder / "recorder" / "sitecustomize.py").write_text(RECORDER)
    with contextlib.chdir(folder):
        assert cli.main(["pack", "captions.jsonl?images=images", "--out", "data"]) == 0
        assert cli.main(["vocab", "data", "--out", "tokenizer", "--size", "200"]) == 0
    return folder


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(project, workdir, *overrides, processes=1, devices=8, record="", **variables):
    """Starts the processes of one run, `devices` in all; their standard error goes to files."""
    address = free_address()
    env = environment(
        cache=project / f"cache{processes}",
        JAX_NUM_CPU_DEVICES=str(devices // processes),
        **FAST_COMPILE,
        **variables,
    )
    if record:
        env["RECORD"] = str(project / record)
    if record or variables:
        env["PYTHONPATH"] = os.pathsep.join([str(project / "recorder"), env["PYTHONPATH"]])
    several = ["--coordinator", address, "--processes", processes] if processes > 1 else []
    started = []
    for process in range(processes):
        own = ["--process", process] if processes > 1 else []
        log = (project / f"{workdir}.{process}.log").open("w")
        arguments = [*TRAIN, "--workdir", workdir, *overrides, *several, *own]
        started.append(start_align(*arguments, cwd=project, env=env, stderr=log))
    return started


def finish(project, workdir, *overrides, **where):
    for number, process in enumerate(start(project, workdir, *overrides, **where)):
        assert process.wait(timeout=600) == 0, (project / f"{workdir}.{number}.log").read_text()
    return read_lines(project / workdir / "metrics.jsonl")


@pytest.fixture(scope="module")
def straight(project):
    return finish(project, "straight")


def assert_same_lines(found, expected):
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for line, want in zip(found, expected, strict=True):
        for name, value in want.items():
            # Ranks are integers: a near tie may turn over under rounding, in at most one query.
            # The bounds of an interval move by more than its score.
            points = 10.0 if name.endswith(("_low", "_high")) else 5.0
            tolerance = {"atol": points} if name.startswith("eval/") else {"rtol": 1e-5}
            np.testing.assert_allclose(line[name], value, err_msg=name, **tolerance)


@pytest.mark.slow
def test_two_processes_write_the_lines_of_one(project, straight):
    found = finish(project, "two", processes=2)
    assert_same_lines(found, straight)
    assert [line["step"] for line in found if "train/loss" in line] == list(range(1, 13))
    assert re.search(r"process 0 of 2 on \S+, pid \d+", (project / "two.0.log").read_text())
    # Process 1 reports only itself.
    own = [line for line in (project / "two.1.log").read_text().splitlines() if "step" in line]
    assert not own


def recorded(project, record, processes):
    """Returns the example indices [steps, B] that a run's processes were given, step by step."""
    parts = [(project / f"{record}.{number}").read_text() for number in range(processes)]
    rows = [[json.loads(line) for line in part.splitlines()] for part in parts]
    return np.concatenate([np.array(part) for part in rows], axis=1)


@pytest.mark.slow
def test_run_continues_on_other_processes_and_devices(project, straight):
    finish(project, "elastic", processes=2, devices=8, record="indices_2")
    order = recorded(project, "indices_2", 2)
    assert order.shape == (12, 32)
    # 12 steps are done; the same run on 1 and 4 processes, from checkpoints 9, 6 and 3.
    seen = order
    for step, (processes, devices) in zip((9, 6, 3), ((1, 4), (4, 16), (1, 8)), strict=True):
        for folder in (project / "elastic" / "checkpoints").iterdir():
            if folder.name.isdecimal() and int(folder.name) > step:
                remove(folder)
        record = f"indices_from_{step}"
        found = finish(project, "elastic", processes=processes, devices=devices, record=record)
        assert_same_lines(found, straight)
        seen = np.concatenate([seen[:step], recorded(project, record, processes)])
        # All checkpoints lie inside an epoch; nothing is lost or repeated over any of them.
        epochs = [seen.ravel()[at : at + PAIRS] for at in range(0, seen.size, PAIRS)]
        for epoch in epochs[:-1]:
            assert sorted(epoch) == list(range(PAIRS))
        assert len(set(epochs[-1])) == len(epochs[-1])
        np.testing.assert_array_equal(seen, order)


@pytest.mark.slow
@pytest.mark.parametrize("group", [8, 4])
def test_devices_in_another_order_than_the_processes_train_the_same(project, group):
    # Later losses differ by more: training makes the rounding of the first steps grow.
    overrides = [f"--config.model.bn_group_size={group}", "--config.train.steps=3"]
    overrides += [
        "--config.optim.warmup_steps=1",
        "--config.eval.every_steps=99",
        "--config.checkpoint.every_steps=99",
    ]
    one = finish(project, f"ordered{group}", *overrides)
    where = {"processes": 2, "record": f"indices_interleaved{group}", "INTERLEAVE": "1"}
    two = finish(project, f"interleaved{group}", *overrides, **where)
    losses = [
        [line["train/loss"] for line in lines if "train/loss" in line] for lines in (one, two)
    ]
    assert len(losses[0]) == 3
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)
    # Process 0 holds places 0, 2, 4, 6 of the mesh, 4 rows each.
    steps = [
        np.array([json.loads(line) for line in text.splitlines()])
        for text in ((project / f"{where['record']}.{n}").read_text() for n in range(2))
    ]
    order = np.stack([part.reshape(3, 4, 4) for part in steps], 2).reshape(3, 32)
    epoch = order.ravel()[:PAIRS]
    assert sorted(epoch) == list(range(PAIRS))
    assert ("waits for other devices" in (project / f"ordered{group}.0.log").read_text()) == (
        group == 8
    )


def remove(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_process_stops_the_other_and_is_named(project, victim):
    workdir = f"killed{victim}"
    processes = start(project, workdir, "--config.train.steps=100000", processes=2)
    wait_for_line(
        project / workdir / "metrics.jsonl",
        lambda line: line["step"] >= 2,
        processes[0],
        log=project / f"{workdir}.0.log",
    )
    processes[victim].send_signal(signal.SIGKILL)
    killed_s = time.monotonic()
    assert processes[1 - victim].wait(timeout=STOP_S) not in (0, None)
    assert time.monotonic() - killed_s <= STOP_S
    log = (project / f"{workdir}.{1 - victim}.log").read_text()
    # The watchdog, or JAX where a connection breaks.
    named = r"leader task" if victim == 0 else r"unhealthy[^\n]*\n1\b"
    assert re.search(rf"{named}|process {victim} of 2 ", log), log[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_process_that_stops_without_dying_is_named_and_ends_the_run(project, victim):
    workdir = f"stopped{victim}"
    overrides = "--config.train.steps=100000", "--config.train.hang_s=90"
    processes = start(project, workdir, *overrides, processes=2)
    logs = [project / f"{workdir}.{number}.log" for number in range(2)]
    metrics = project / workdir / "metrics.jsonl"
    wait_for_line(metrics, lambda line: line["step"] >= 2, processes[0], log=logs[0])
    processes[victim].send_signal(signal.SIGSTOP)
    try:
        code = processes[1 - victim].wait(timeout=STOP_S)
    finally:
        processes[victim].kill()
    log = logs[1 - victim].read_text()
    assert code == 1, log[-3000:]
    (line,) = [line for line in log.splitlines() if line.startswith("align: ")]
    pid = processes[victim].pid
    assert re.search(
        rf"step \d+: process {victim} of 2 \(host \S+, pid {pid}\), at step \d+, \w+, "
        r"(is silent|does not answer) for 3\d s\. Ended; the same command continues from the last "
        r"checkpoint\.$",
        line,
    ), line
    assert "thread MainThread:" in log and "in train_and_evaluate" in log


@pytest.mark.slow
def test_bad_input_of_one_process_is_told_and_ends_all(project):
    env = environment(JAX_NUM_CPU_DEVICES="4")
    address = free_address()
    started = []
    for number, data in enumerate(("data", "missing")):
        log = (project / f"wrong.{number}.log").open("w")
        arguments = [*TRAIN, f"--config.data.source={data}?split=train", "--workdir", "wrong"]
        arguments += ["--coordinator", address, "--processes", 2, "--process", number]
        started.append(start_align(*arguments, cwd=project, env=env, stderr=log))
    assert started[1].wait(timeout=120) == 2
    assert started[0].wait(timeout=STOP_S) == 1
    logs = [(project / f"wrong.{number}.log").read_text() for number in range(2)]
    assert "align: process 1 of 2 failed: config.data.source" in logs[1]
    assert "Traceback" not in logs[1]
    assert re.search(r"align: step 0: process 1 of 2 \(host \S+, pid \d+\), .* is silent", logs[0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("localhost:1", 2, 2), "0 <= I < N"),
        (("localhost:1", 0, -1), "0 <= I < N"),
        (("", 2, 0), "--coordinator HOST:PORT"),
    ],
)
def test_incomplete_process_flags_are_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)), multihost.processes(*arguments):
        raise AssertionError("entered")


def test_watchdog_is_done_before_jax_aborts_without_a_word():
    heartbeats_s = multihost.HEARTBEAT_S / 2  # apart, so that the last one may be as old
    assert watchdog.SILENT_S + 15 <= multihost.HEARTBEAT_S - heartbeats_s


def test_one_process_leads_and_agrees_with_itself():
    assert multihost.is_lead() and multihost.agree(7) == 7 and not multihost.preempted(1)
    counts = np.array([3, 2**40])
    np.testing.assert_array_equal(multihost.total(counts), counts)
    done = []
    multihost.lead_first(lambda: done.append(os.getpid()))
    assert done == [os.getpid()]


@pytest.fixture
def launched(monkeypatch):
    """Sets the environment of a launcher; whatever started the tests is forgotten."""
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "PMI", "MV2", "KUBERNETES", "JOB_COMPLETION")):
            monkeypatch.delenv(name)

    def launch(**env):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return multihost._find_launcher()

    return launch


def test_launchers_are_told_from_jobs_with_room_for_more(launched):
    assert launched() is None
    assert launched(SLURM_JOB_ID="7", SLURM_NTASKS="8") is None  # a script of sbatch
    assert launched(SLURM_STEP_NODELIST="a[1-2]", SLURM_STEP_NUM_TASKS="1") is None  # salloc
    assert launched(SLURM_STEP_NUM_TASKS="8") == "slurm"
    assert launched(SLURM_STEP_NUM_TASKS="1", OMPI_COMM_WORLD_SIZE="1") is None


def test_indexed_jobs_of_kubernetes_are_found_if_they_can_be(launched, monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    assert launched(KUBERNETES_SERVICE_HOST="10.0.0.1") is None  # any pod
    with pytest.raises(ValueError, match="needs the package kubernetes .* --coordinator"):
        launched(JOB_COMPLETION_INDEX="0")
    module = types.ModuleType("kubernetes")
    module.__spec__ = importlib.machinery.ModuleSpec("kubernetes", None)
    monkeypatch.setitem(sys.modules, "kubernetes", module)
    assert launched() == "k8s"


def test_open_mpi_is_found_and_what_cannot_find_itself_is_refused(launched):
    assert launched(OMPI_COMM_WORLD_SIZE="2", OMPI_MCA_orte_hnp_uri="4096.0;tcp://h:1") == "ompi"


@pytest.mark.parametrize(("size", "rank"), multihost._MPI)
def test_mpi_without_a_meeting_place_is_one_line(launched, size, rank):
    message = rf"MPI has started 4 processes \({size}\), .* --processes 4 --process \${rank}\.$"
    with pytest.raises(ValueError, match=message):
        launched(**{size: "4", rank: "1"})


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["slurm", "ompi"])
def test_processes_of_a_launcher_train_one_run(project, straight, launcher):
    started = []
    for number in range(2):
        env = environment(
            cache=project / "cache2",
            JAX_NUM_CPU_DEVICES="4",
            **FAST_COMPILE,
        )
        if launcher == "slurm":
            env |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
            env |= {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
            env |= {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
        else:
            env["OMPI_MCA_orte_hnp_uri"] = f"{os.getpid() * 4096}.0;tcp://127.0.0.1:34911"
            env |= {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(number)}
            env["OMPI_COMM_WORLD_LOCAL_RANK"] = str(number)
        log = (project / f"{launcher}.{number}.log").open("w")
        started.append(start_align(*TRAIN, "--workdir", launcher, cwd=project, env=env, stderr=log))
    for number, process in enumerate(started):
        assert process.wait(timeout=600) == 0, (project / f"{launcher}.{number}.log").read_text()
    assert "process 0 of 2" in (project / f"{launcher}.0.log").read_text()
    assert_same_lines(read_lines(project / launcher / "metrics.jsonl"), straight)
