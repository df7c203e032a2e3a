"""The launcher for Cloud TPU VMs: the commands it prints, and what they do on two pretended hosts.

No cloud is used: a `gcloud` on the PATH writes down its arguments, answers `describe` from a list,
and runs what would go to a host in a folder of its own.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align_jax.cli import main as cli

ROOT = Path(__file__).parents[1]
LAUNCHER = ROOT / "experiments" / "launch" / "tpu_vm.sh"
SETTINGS = {"NAME": "slice", "ZONE": "us-west4-a", "ACCELERATOR": "v5litepod-64"}
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]

GCLOUD = f"""#!{sys.executable}
import json, os, pathlib, shutil, subprocess, sys

cloud = pathlib.Path(os.environ["FAKE_CLOUD"])
with open(cloud / "calls", "a") as calls:
    print(json.dumps(sys.argv[1:]), file=calls)
verb, words = sys.argv[4], sys.argv[5:]
if verb == "describe":
    states = (cloud / "states").read_text().split()
    (cloud / "states").write_text(" ".join(states[1:] or states))
    print(states[0]) if states else sys.exit(1)
hosts = ["host0", "host1"] if "--worker=all" in words else ["host0"]
for host in hosts:
    home = cloud / host
    if verb == "scp":
        shutil.copy(words[0], home / words[1].partition(":")[2])
    if verb == "ssh":
        command = next(w for w in words if w.startswith("--command=")).partition("=")[2]
        env = os.environ | {{"HOME": str(home)}}
        subprocess.run(["bash", "-c", command], cwd=home, env=env, check=True)
"""
# Says what it was called with; ends at SIGTERM, as `align train` does.
ALIGN = """#!/bin/sh
printf '%s\\n' "$@" >>"$HOME/arguments"
trap 'echo saved; exit 0' TERM
while true; do sleep 0.1; done
"""


def launch(*arguments, env=None, **settings):
    env = {k: v for k, v in (env or os.environ).items() if k not in SETTINGS}
    return subprocess.run(
        ["bash", str(LAUNCHER), *arguments],
        env=env | SETTINGS | settings,
        capture_output=True,
        text=True,
        timeout=60,
    )


def printed(*arguments, **settings):
    """Returns the gcloud commands of a dry run, as lists of words."""
    run = launch("--dry-run", *arguments, **settings)
    assert run.returncode == 0, run.stderr
    words = shlex.split(run.stdout)
    starts = [i for i, word in enumerate(words) if word == "gcloud"] + [len(words)]
    commands = [words[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]
    assert all(command[:4] == QUEUED for command in commands)
    return [command[4:] for command in commands]


@pytest.fixture
def cloud(tmp_path):
    """Folder of a pretended cloud: `calls`, `states`, and a home for each of two hosts."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gcloud").write_text(GCLOUD)
    (tmp_path / "bin" / "gcloud").chmod(0o755)
    for host in ("host0", "host1"):
        program = tmp_path / host / "align_jax" / ".venv" / "bin" / "align"
        program.parent.mkdir(parents=True)
        program.write_text(ALIGN)
        program.chmod(0o755)
    yield tmp_path
    for started in tmp_path.glob("host?/align.pid"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(started.read_text()), signal.SIGKILL)


def on(cloud, *arguments, states="ACTIVE", **settings):
    (cloud / "states").write_text(states)
    path = f"{cloud / 'bin'}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "FAKE_CLOUD": str(cloud), "POLL_S": "0"}
    return launch(*arguments, env=env, TMPDIR=str(cloud), **settings)


def verbs(cloud):
    return [json.loads(line)[3] for line in (cloud / "calls").read_text().splitlines()]


def test_launcher_is_valid_bash():
    subprocess.run(["bash", "-n", str(LAUNCHER)], check=True)


def test_create_asks_for_one_slice_with_the_runtime_of_its_accelerator():
    create, describe = printed("create")
    assert create == [
        *("create", "slice", "--zone=us-west4-a", "--node-id=slice"),
        *("--accelerator-type=v5litepod-64", "--runtime-version=v2-alpha-tpuv5-lite"),
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
    ]
    assert describe[:2] == ["describe", "slice"]


@pytest.mark.parametrize(
    "accelerator, runtime",
    [
        ("v6e-256", "v2-alpha-tpuv6e"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v4-64", "tpu-ubuntu2204-base"),
    ],
)
def test_create_asks_for_several_preemptible_slices(accelerator, runtime):
    create = printed("create", ACCELERATOR=accelerator, SLICES="4", SPOT="1", PROJECT="mine")[0]
    assert {"--node-count=4", "--node-prefix=slice", "--spot", "--project=mine"} < set(create)
    assert {f"--accelerator-type={accelerator}", f"--runtime-version={runtime}"} < set(create)
    assert "--node-id=slice" not in create


def test_resume_after_preemption_makes_everything_anew_and_runs():
    commands = printed("resume", "train", "--workdir", "/mnt/gcs/run", BUCKET="b")
    assert [command[0] for command in commands] == [
        *("describe", "delete", "create", "describe", "scp", "ssh", "ssh", "ssh", "ssh")
    ]
    assert all({"--node=all", "--worker=all"} < set(command) for command in commands[4:])
    assert "gcsfuse --implicit-dirs b /mnt/gcs" in commands[-2][-1]
    assert ".venv/bin/align train --workdir /mnt/gcs/run >>~/align.log" in commands[-1][-1]


@pytest.mark.parametrize(
    "arguments, settings, message",
    [
        (["fly"], {}, "unknown command 'fly'"),
        (["run"], {}, "run needs 'train' and its arguments"),
        (["create", "x"], {}, "create takes no arguments, not 'x'"),
        (["create"], {"ZONE": ""}, "ZONE is not set"),
        (["create"], {"ACCELERATOR": "v9-8"}, "ACCELERATOR=v9-8 is not known; set RUNTIME"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(arguments, settings, message):
    run = launch("--dry-run", *arguments, **settings)
    assert run.returncode == 2 and run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("tpu_vm.sh: ") and message in line


def test_create_waits_for_the_slice_and_gives_up_on_a_failed_one(cloud):
    run = on(cloud, "create", states="WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    assert run.returncode == 0, run.stderr
    assert verbs(cloud) == ["create", "describe", "describe", "describe"]
    run = on(cloud, "create", states="PROVISIONING FAILED")
    assert run.returncode == 2 and "slice is FAILED; delete it" in run.stderr


def test_run_starts_on_all_hosts_with_its_exact_arguments_and_stop_ends_it(cloud):
    arguments = ["train", "--workdir", "/mnt/gcs/run", "--config.data.source=a?split=train[:10%]"]
    arguments += ["--config.optim.no_decay=('_bn/', \"bias$\")", "it's; $HOME `date`", ""]
    run = on(cloud, "run", *arguments)
    assert run.returncode == 0, run.stderr
    for host in ("host0", "host1"):
        assert eventually(cloud / host / "arguments") == "".join(f"{a}\n" for a in arguments)
    assert on(cloud, "run", "train").stdout.count("a run is alive here") == 2
    assert on(cloud, "status").stdout.count(": alive;") == 2
    assert on(cloud, "stop").returncode == 0
    assert on(cloud, "status").stdout.count(": no run; saved") == 2
    assert (cloud / "host1" / "arguments").read_text().count("train\n") == 1


def test_resume_of_an_active_slice_only_runs(cloud):
    assert on(cloud, "resume", "train").returncode == 0
    assert verbs(cloud) == ["describe", "ssh"]


def test_failing_create_ends_resume(cloud):
    fake = cloud / "bin" / "gcloud"
    fake.write_text(GCLOUD + 'sys.exit(1 if verb == "create" else 0)\n')
    assert on(cloud, "resume", "train", states="").returncode != 0
    assert verbs(cloud) == ["describe", "create"]


def test_archive_holds_what_installing_needs(cloud):
    # What the hosts do with it needs the network; here they only take it.
    (cloud / "bin" / "gcloud").write_text(GCLOUD.replace('"ssh"', '"not here"'))
    assert on(cloud, "install").returncode == 0
    listed = subprocess.run(
        ["tar", "-tzf", str(cloud / "host1" / "align_jax.tar.gz")], capture_output=True, text=True
    ).stdout
    for name in ("setup.py", "README.md", "configs/coyo_b7_base.py", "align_jax/data/pipeline.py"):
        assert f"\n{name}\n" in f"\n{listed}"
    assert "__pycache__" not in listed and ".git/" not in listed


def test_commands_of_the_page_are_the_launchers_and_the_programs():
    page = (ROOT / "docs" / "tpu.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    ran = set()
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["experiments/launch/tpu_vm.sh"]:
            ran.add(words[1])
            assert printed(*words[1:], BUCKET="b")
        elif words[:1] == ["align"]:
            args, rest = cli._parser().parse_known_args([w for w in words[1:] if w != "&"])
            assert all(args.takes_config and word.startswith("--config.") for word in rest)
            assert not args.takes_config or (ROOT / args.config).exists()
    help_text = launch("--help").stdout
    commands = re.findall(r"^  ([a-z]+) ", help_text, re.MULTILINE)
    assert ran == set(commands)
    assert "not run on Cloud TPUs by this project" in " ".join(page.split())


def eventually(path, timeout_s=20):
    """Returns the text of a file that another process is about to write."""
    deadline_s = time.monotonic() + timeout_s
    while not (path.exists() and path.read_text().endswith("\n\n")):
        assert time.monotonic() < deadline_s, path
        time.sleep(0.02)
    return path.read_text()
