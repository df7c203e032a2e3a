"""Metric files, TensorBoard files, the progress line and the plots."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from align_jax.run import plots
from align_jax.run.metrics import (
    MetricWriter,
    Progress,
    format_duration,
    format_progress,
    read_metrics,
)
from align_jax.run.plots import write_plots


def _loss(step):
    return math.exp(-step / 7) / 3  # floats with long decimal expansions


def _write_steps(workdir, steps, resume_step=None):
    with MetricWriter(workdir, resume_step=resume_step) as writer:
        for step in steps:
            writer.write(step, {"train/loss": _loss(step), "train/grad_norm": np.float32(0.1)})
            writer.write_timing(step, {"perf/pairs_per_s": 100.0 + step})


def test_metric_line_is_step_then_sorted_keys_with_exact_floats(tmp_path):
    with MetricWriter(tmp_path, resume_step=None) as writer:
        writer.write(3, {"train/loss": 0.1, "data/dropped_bad_image": np.int64(2), "a": 1e-9})
    line = '{"step": 3, "a": 1e-09, "data/dropped_bad_image": 2, "train/loss": 0.1}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == line
    assert read_metrics(tmp_path / "metrics.jsonl") == [json.loads(line)]


def test_non_finite_metric_is_written_as_null(tmp_path):
    with MetricWriter(tmp_path, resume_step=None) as writer:
        writer.write(1, {"loss": float("nan"), "norm": np.float32("inf"), "ok": 1.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": None, "norm": None, "ok": 1.0}
    ]


def test_metric_that_is_no_scalar_or_named_step_raises_and_leaves_the_file_whole(tmp_path):
    with MetricWriter(tmp_path, resume_step=None) as writer:
        writer.write(1, {"loss": 1.0})
        with pytest.raises(ValueError, match=r"'loss' has shape \(2,\)"):
            writer.write(2, {"loss": np.zeros(2)})
        with pytest.raises(ValueError, match="'step' is taken"):
            writer.write(2, {"step": 2})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


def test_line_is_readable_before_the_writer_is_closed(tmp_path):
    writer = MetricWriter(tmp_path, resume_step=None)
    writer.write(1, {"loss": 1.0})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    writer.close()
    writer.close()


@pytest.mark.parametrize("torn", [b"", b'{"step": 26, "train/lo', b'{"step": 26}', b"\xff\x00"])
def test_resumed_files_are_byte_identical_to_an_uninterrupted_run(tmp_path, torn):
    _write_steps(tmp_path / "straight", range(1, 41))
    _write_steps(tmp_path / "resumed", range(1, 26))  # checkpoint at 20, killed after 25
    for name in ("metrics.jsonl", "perf.jsonl"):
        with open(tmp_path / "resumed" / name, "ab") as file:
            file.write(torn)
    _write_steps(tmp_path / "resumed", range(21, 41), resume_step=20)
    for name in ("metrics.jsonl", "perf.jsonl"):
        straight = (tmp_path / "straight" / name).read_bytes()
        assert (tmp_path / "resumed" / name).read_bytes() == straight
    assert not list((tmp_path / "resumed").glob("*.tmp"))


def test_last_line_without_newline_is_kept_when_it_is_complete(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}')
    _write_steps(tmp_path, [3], resume_step=2)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_lines_survive_kill_9_without_close(tmp_path):
    code = (
        "import os, signal, sys; from align_jax.run.metrics import MetricWriter\n"
        "writer = MetricWriter(sys.argv[1], resume_step=None)\n"
        "for step in range(1, 6): writer.write(step, {'loss': step / 3})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment)
    assert killed.returncode == -9
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_fresh_writer_starts_files_anew(tmp_path):
    _write_steps(tmp_path, range(1, 4))
    _write_steps(tmp_path, [1])
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.parametrize("bad", ["not json", '{"loss": 1.0}', "[1]", '{"step": "1"}'])
def test_damaged_middle_line_raises_and_names_file_and_line(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError, match="metrics.jsonl line 2 is not a metric line"):
        MetricWriter(tmp_path, resume_step=3)
    assert path.read_bytes() == before


def test_tensorboard_shows_each_step_once_after_resume(tmp_path):
    _write_steps(tmp_path, range(1, 26))
    _write_steps(tmp_path, range(21, 31), resume_step=20)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/grad_norm", "perf/pairs_per_s"}
    scalars = events.Scalars("train/loss")
    assert [scalar.step for scalar in scalars] == list(range(1, 31))
    # TensorBoard keeps float32.
    np.testing.assert_allclose(scalars[9].value, _loss(10), rtol=1e-7)


def test_metrics_module_loads_neither_tensorflow_nor_jax(tmp_path):
    code = (
        "import sys; from align_jax.run.metrics import MetricWriter\n"
        "MetricWriter(sys.argv[1], resume_step=None).write(1, {'loss': 1.0})\n"
        "print([name for name in ('tensorflow', 'jax', 'torch') if name in sys.modules])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (8040, "2 h 14 min"),
        (86399, "23 h 59 min"),
        (86400, "1 d 00 h"),
        (277200, "3 d 05 h"),
    ],
)
def test_format_duration_gives_two_largest_units(seconds, text):
    assert format_duration(seconds) == text


def test_format_progress_has_the_note_before_the_time_left():
    line = format_progress(
        1, 2, 9.7, pairs_per_s=None, data_wait_share=0.0, time_left_s=5.0, note="half (memory)"
    )
    assert line == "step 1/2  loss 9.7000  data wait 0 %  half (memory)  time left 5 s"


def test_format_progress_leaves_out_what_is_not_known():
    first = format_progress(1, 500, 9.7, pairs_per_s=None, data_wait_share=None, time_left_s=None)
    assert first == "step   1/500  loss 9.7000"
    later = format_progress(
        20, 500, float("nan"), pairs_per_s=1234.5, data_wait_share=0.031, time_left_s=61
    )
    expected = "step  20/500  loss nan  1,234 pairs/s  data wait 3 %  time left 1 min 01 s"
    assert later == expected


class _Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_rate_leaves_out_compile_time_and_old_steps():
    clock = _Clock()
    progress = Progress(1000, 64, stream=io.StringIO(), clock=clock)
    clock.now_s += 100  # compilation
    progress.update(1, 5.0, data_wait_s=50.0)
    assert progress.timing() == {}
    for step in range(2, 11):
        clock.now_s += 2.0
        progress.update(step, 5.0, data_wait_s=0.5)
    expected = {
        "perf/pairs_per_s": 32.0,
        "perf/step_time_s": 2.0,
        "perf/data_wait_share": 0.25,
    }
    assert progress.timing() == pytest.approx(expected)
    for step in range(11, 200):  # the window forgets the slow steps
        clock.now_s += 0.5
        progress.update(step, 5.0)
    assert progress.timing()["perf/step_time_s"] == pytest.approx(0.5)
    assert progress.timing()["perf/data_wait_share"] == 0


def test_progress_restart_keeps_a_pause_out_of_the_rate():
    clock = _Clock()
    progress = Progress(1000, 64, stream=io.StringIO(), clock=clock)
    for step in range(1, 5):
        clock.now_s += 1
        progress.update(step, 5.0)
    clock.now_s += 20  # an evaluation
    progress.restart()
    for step in range(5, 8):
        clock.now_s += 1
        progress.update(step, 5.0)
    assert progress.timing()["perf/step_time_s"] == pytest.approx(1.0)


def test_progress_without_terminal_prints_one_line_a_period_and_the_last_step():
    clock, stream = _Clock(), io.StringIO()
    progress = Progress(26, 64, stream=stream, period_s=10.0, clock=clock)
    for step in range(1, 27):
        clock.now_s += 1
        progress.update(step, 5.0)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/26", "11/26", "21/26", "26/26"]
    assert "time left 15 s" in lines[1]
    assert "\r" not in stream.getvalue()


def test_progress_on_terminal_rewrites_one_line_and_log_goes_on_its_own(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    clock, stream = _Clock(), _Terminal()
    progress = Progress(3, 64, stream=stream, clock=clock)
    for step in (1, 2):
        clock.now_s += 1
        progress.update(step, 5.0)
    progress.log("saved")
    progress.update(3, 5.0)
    progress.close()
    progress.close()
    text = stream.getvalue()
    assert text.count("\n") == 3
    assert text.split("\n")[1] == "saved"
    assert all(len(part) < 30 + len("\x1b[K") for part in text.replace("\n", "\r").split("\r"))


def _write_run(workdir, with_evals):
    with MetricWriter(workdir, resume_step=None) as writer:
        for step in range(1, 11):
            loss = None if step == 4 else _loss(step)
            values = {"train/loss": float("nan") if loss is None else loss}
            writer.write(step, values | {"train/temperature": 1 / step})
            if with_evals and step % 5 == 0:
                recalls = {
                    f"eval/dev/{direction}_r{k}": 4.0 * k
                    for direction in ("image_to_text", "text_to_image")
                    for k in (1, 5, 10)
                }
                writer.write(step, recalls | {"eval/shape/top1": 50.0, "eval/shape/num_classes": 4})


def test_write_plots_draws_every_plot_with_data_and_only_those(tmp_path):
    _write_run(tmp_path / "full", with_evals=True)
    paths = write_plots(tmp_path / "full", chance_loss=2 * math.log(64))
    names = {"loss.png", "temperature.png", "recall.png", "zeroshot.png"}
    assert {path.name for path in paths} == names
    for path in paths:
        with Image.open(path) as image:
            assert image.width >= 800
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20  # something is drawn
    _write_run(tmp_path / "short", with_evals=False)
    names = {path.name for path in write_plots(tmp_path / "short")}
    assert names == {"loss.png", "temperature.png"}


def test_write_plots_warns_of_nothing_and_loads_no_pyplot(tmp_path):
    _write_run(tmp_path, with_evals=True)
    code = (
        "import sys; from align_jax.run.plots import write_plots\n"
        "write_plots(sys.argv[1])\n"
        "print('matplotlib.pyplot' in sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_write_plots_without_metrics_raises(tmp_path):
    with pytest.raises(ValueError, match="metrics.jsonl does not exist"):
        write_plots(tmp_path)


def test_curves_of_one_step_show_that_step_and_no_fractions():
    series = {"eval/a/image_to_text_r1": ([5], [3.0]), "eval/a/text_to_image_r1": ([5], [4.0])}
    figure = plots._plot_recall(series, "run")
    plots._widen_one_step(figure)
    assert [axes.get_xticks().tolist() for axes in figure.axes] == [[5], [5]]
