"""The sweeps of experiments/: valid configs, complete pages, a runner that stops and continues."""

import importlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment

from align_jax import config, config_checks
from align_jax.run import workdir

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
SWEEPS = sorted(path.parent for path in EXPERIMENTS.glob("ablation_*/config.py"))


@pytest.fixture(autouse=True)
def experiments_path(monkeypatch):
    """What `python experiments/sweep.py` has on its path."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))


@pytest.fixture
def sweep():
    return importlib.import_module("sweep")


def load_point(folder, point):
    return config.load_config(f"{folder / 'config.py'}:{point}")


def test_every_ablation_of_the_paper_has_a_folder():
    wanted = {"embed_dim", "negatives", "temperature", "backbones", "data_size"}
    assert {path.name.removeprefix("ablation_") for path in SWEEPS} == wanted


@pytest.mark.parametrize("folder", SWEEPS, ids=lambda path: path.name)
def test_points_are_valid_and_differ_from_one_another(folder):
    found = runpy.run_path(str(folder / "config.py"))
    assert set(found["PUBLISHED"]) <= set(found["POINTS"])
    for points, prefix, devices, hosts in (
        (found["POINTS"], "", 256, 64),
        (found["SMOKE_POINTS"], "smoke-", 1, 1),
    ):
        loaded = [load_point(folder, prefix + point) for point in points]
        for c in loaded:
            config_checks.validate(c, num_devices=devices, num_processes=hosts)
            assert c.train.batch_size * c.train.steps <= (2000 if prefix else 16_384 * 10**6)
        assert len({config.to_json(c) for c in loaded}) == len(points) > 1


def test_base_is_the_papers_ablation_model():
    c = load_point(EXPERIMENTS / "ablation_temperature", "learned")
    assert (c.model.image.variant, c.model.text.variant, c.model.embed_dim) == ("b5", "base", 640)
    assert (c.train.batch_size, c.train.steps, c.optim.name) == (16_384, 1_000_000, "lamb")
    assert (c.loss.temperature_init, c.optim.temperature) == (1.0, "same")


@pytest.mark.parametrize("folder", SWEEPS, ids=lambda path: path.name)
def test_page_has_question_commands_published_numbers_and_smoke_run(folder, sweep):
    page = (folder / "README.md").read_text()
    headings = re.findall(r"^## (.+)$", page, re.MULTILINE)
    assert headings == ["Question", "Command", "Published", "Smoke run"]
    found = runpy.run_path(str(folder / "config.py"))
    for point, values in found["PUBLISHED"].items():
        assert f"| {point} | {values} |" in page
    assert "Jia et al. 2021" in page
    smoke_run = page.partition("## Smoke run")[2]
    for point in found["SMOKE_POINTS"]:
        assert f"| {point} | " in smoke_run
    commands = re.findall(r"^python (experiments/\S+) (\S+) --workdir", page, re.MULTILINE)
    assert commands == [("experiments/sweep.py", f"experiments/{folder.name}")] * 2


def test_unknown_point_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="point 'lerned' is unknown; use one of learned, fixed"):
        load_point(EXPERIMENTS / "ablation_temperature", "lerned")


@pytest.fixture
def stub(sweep, tmp_path, monkeypatch):
    """Replaces `align train`: `stub(point=...)` says how a point ends; returns main's arguments."""
    ends, started = {}, []

    def run(verb, flag, file, workdir_flag, folder, *rest):
        assert (verb, flag, workdir_flag) == ("train", "--config", "--workdir")
        loaded = config.load_config(file, rest)
        point = Path(folder).name
        started.append(point)
        code, last = ends.get(point, (0, loaded.train.steps))
        Path(folder).mkdir(parents=True, exist_ok=True)
        workdir.write_config(folder, loaded)
        lines = [{"step": last, "train/loss": 4.25, "train/temperature": 0.5}] if last else []
        if last == loaded.train.steps:
            lines.append({"step": last, "eval/scenes/image_to_text_r1": 12.5})
        (Path(folder) / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        return code

    monkeypatch.setattr(sweep, "_run", run)

    def call(*arguments, **how):
        ends.clear()
        ends.update(how)
        started.clear()
        code = sweep.main(
            [f"{EXPERIMENTS}/ablation_temperature/", "--workdir", str(tmp_path), *arguments]
        )
        return code, list(started)

    return call


def test_sweep_trains_every_point_and_prints_a_table(stub, capsys):
    code, started = stub("--smoke", "--config.train.steps=7")
    assert code == 0 and started == ["learned", "fixed_128", "fixed_64", "fixed_32"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| point | step | loss | temperature | scenes/image_to_text_r1 |"
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: |"
    assert lines[2] == "| learned | 7 | 4.2500 | 0.5000 | 12.5 |" and len(lines) == 6


def test_table_of_a_full_sweep_shows_the_published_numbers(stub, capsys):
    assert stub("--points", "fixed_64")[0] == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("ImageNet KNN R@1 |")
    assert lines[2].endswith("| 52.2 / 37.3 / 64.8 |") and len(lines) == 3


def test_stopped_point_ends_the_sweep_and_the_same_command_continues(stub, capsys):
    code, started = stub("--smoke", fixed_128=(0, 3))
    assert code == 0 and started == ["learned", "fixed_128"]
    printed = capsys.readouterr()
    assert "run the same command to continue" in printed.err and not printed.out
    assert stub("--smoke")[1] == ["learned", "fixed_128", "fixed_64", "fixed_32"]


def test_diverged_point_is_shown_and_others_go_on(stub, capsys):
    code, started = stub("--smoke", learned=(1, 0), fixed_128=(1, 20))
    assert code == 1 and len(started) == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| learned | 0 | - | - | - |"
    assert lines[3] == "| fixed_128 | 20 | 4.2500 | 0.5000 | - |"


@pytest.mark.parametrize("code", [2, -9])
def test_wrong_argument_or_kill_ends_the_sweep(stub, code):
    assert stub("--smoke", learned=(code, 0)) == (code, ["learned"])


def test_unknown_point_of_a_sweep_is_refused_before_anything_runs(stub, capsys):
    with pytest.raises(SystemExit) as error:
        stub("--points", "learned,x")
    assert error.value.code == 2
    assert "'x' is unknown; use learned, fixed_128" in capsys.readouterr().err


@pytest.mark.slow
def test_two_points_of_a_smoke_sweep_train_and_are_complete_when_run_again(tmp_path):
    command = [sys.executable, "experiments/sweep.py", "experiments/ablation_temperature"]
    command += ["--workdir", str(tmp_path / "runs"), "--smoke", "--points", "learned,fixed_64"]
    command += ["--config.train.steps=2", "--config.optim.warmup_steps=1"]
    outputs = []
    for _ in range(2):
        run = subprocess.run(
            command,
            cwd=ROOT,
            env=environment(cache=tmp_path / "cache"),
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        outputs.append(run.stdout)
    head, _, learned, fixed = outputs[0].splitlines()
    assert "scenes/image_to_text_r1" in head
    assert learned.startswith("| learned | 2 |") and fixed.startswith("| fixed_64 | 2 |")
    assert "| 0.0156 |" in fixed
    assert outputs[1] == outputs[0] and run.stderr.count("this run is complete") == 2
