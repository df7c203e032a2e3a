"""Printing (cli/output.py): no terminal, encoding or full disk costs the work."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import environment, error_of

from align_jax import align, evals
from align_jax.cli import main as cli
from align_jax.evals import tables

PRINT = """
import sys
from align_jax.cli import data_verbs, main

def scan(args, rest):
    print("猫 naïve \\ud83d")
    print("猫", file=sys.stderr)
    print(*range(20_000), sep="\\n")
    open(args.out, "w").write("done")

data_verbs._scan = scan
sys.exit(main.main(["scan", "x", "--out", sys.argv[1]]))
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(PRINT, "utf-8")
    return [sys.executable, str(path), str(tmp_path / "out")]


def test_what_the_terminal_cannot_show_is_replaced(tmp_path, script):
    env = environment(PYTHONIOENCODING="ascii")
    done = subprocess.run(script, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "out").read_text() == "done"
    assert done.stdout.splitlines()[0] == "? na?ve ?"
    assert done.stderr == "\\u732b\n"


def test_a_reader_that_has_enough_is_no_error(tmp_path, script):
    with subprocess.Popen(
        script, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        child.stdout.close()
        err = child.stderr.read().decode()
    assert child.returncode == 0 and err == "猫\n"
    assert (tmp_path / "out").read_text() == "done"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_told_when_the_work_is_done(tmp_path, script):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            script, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1 and (tmp_path / "out").read_text() == "done"
    assert "align: cannot print: [Errno 28] No space left on device" in done.stderr


def test_results_are_written_before_they_are_printed(tmp_path, monkeypatch, capfd):
    def fail(*_):
        raise RuntimeError("the terminal is gone")

    model = SimpleNamespace(
        origin=SimpleNamespace(config=None, name="m", step=3), fingerprint=lambda: "0" * 16
    )
    monkeypatch.setattr(align, "load", lambda *_, **__: model)
    monkeypatch.setattr(evals, "make_evaluator", lambda *_: SimpleNamespace(name="r"))
    monkeypatch.setattr(evals, "protocols", lambda *_: {})
    monkeypatch.setattr(evals, "run_evaluators", lambda *_: {"r/num_images": 5})
    monkeypatch.setattr(tables, "format_table", fail)
    out = tmp_path / "z.json"
    command = ["eval", "--model", "m", "--retrieval", "scenes?size=4", "--out", str(out)]
    assert cli.main(command) == 1 and "the terminal is gone" in capfd.readouterr().err
    assert json.loads(out.read_text())["results"] == {"r/num_images": 5}


@pytest.mark.parametrize(
    ("arguments", "ending"),
    [
        (("eval", "--model", "m", "--retrieval", "dev.jsonl", "--out", "dev.jsonl"), ".json"),
        (("eval", "--report", "a.json", "b.json", "--out", "b.json"), ".md"),
        (("bench", "input", "--config", "c.py", "--out", "c.py"), ".json"),
        (("compile", "--config", "c.py", "--platform", "cpu", "--out", "c.py"), ".json"),
    ],
)
def test_reports_take_the_place_of_no_source(arguments, ending, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = error_of(capfd, *arguments)
    assert f"--out {arguments[-1]} must end in {ending}, which is what is written." in message
