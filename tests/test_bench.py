"""bench.py and `align bench`: the report of a source whose speed and faults are known."""

import io
import json
import time

import numpy as np
import pytest
from helpers import error_of
from PIL import Image

from align_jax.cli import main as cli
from align_jax.config import default_config
from align_jax.data import images, mixture
from align_jax.data.sources import open_source as sources
from align_jax.data.sources.record import Record
from align_jax.plan import bench, bench_search

READ_S = 0.004


class Slow(sources.InMemory):
    """Waits READ_S for each record."""

    def __getitem__(self, index):
        time.sleep(READ_S)
        return super().__getitem__(index)


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr(bench, "_SAMPLE", 32)
    monkeypatch.setattr(bench, "_TIMED_S", 0.5)
    image = np.random.default_rng(0).integers(0, 256, (60, 50, 3), np.uint8)
    records = [
        Record(f"{i}", image if i % 4 else b"<html>", (f"a thing, number {i % 7}",))
        for i in range(32)
    ]
    monkeypatch.setattr(mixture, "open_source", lambda spec: Slow(records))
    c = default_config()
    c.data.source = "slow"
    c.data.image_size, c.data.resize_size, c.data.num_threads = 32, 40, 1
    c.train.batch_size = 16
    return c


def measure(config, **options):
    return bench.measure_input(config, log=lambda text: None, **options)


def test_input_report_of_a_slow_source_finds_its_waiting_its_faults_and_its_rate(config):
    report = measure(config)
    assert list(report["stages"]) == [*bench.STAGES, "all"]
    assert report["dropped"] == {"image_not_an_image": 8}
    read = report["stages"]["read"]
    # 32 records are read, 24 can be used; sleeping overshoots, by much on a busy machine.
    assert 1000 * READ_S * 32 / 24 <= read["wait_ms"] < 20 * 1000 * READ_S
    assert read["cpu_ms"] < read["wait_ms"]
    everything = report["stages"]["all"]
    parts = [report["stages"][name]["cpu_ms"] for name in bench.STAGES]
    assert everything["cpu_ms"] == pytest.approx(sum(parts))
    assert everything["pairs_per_s_per_core"] == pytest.approx(1000 / sum(parts))
    # A quarter of the records drawn is replaced by others, one thread: at most 3/4 of 1 / READ_S.
    assert 0.02 / READ_S < report["pipeline"]["pairs_per_s"] < 0.8 / READ_S
    assert "step" not in report
    json.dumps(report)


def test_input_report_judges_a_step_by_the_rate_it_measured(config):
    config.data.num_threads = 2
    report = measure(config, step_time_s=1e-4, num_processes=2)
    step, rate = report["step"], report["pipeline"]["pairs_per_s"]
    assert step["batch_size"] == 8 and step["pairs_per_s"] == 80_000
    assert step["input_bound"]
    cores = min(2, report["cores"])
    assert cores * 80_000 / rate <= step["cores_needed"] < cores * 80_000 / rate + 1
    assert "80,000 pairs/s: input-bound" in bench.format_input(report)
    relaxed = bench._judge_step(report, 1000.0, 8)
    assert not relaxed["input_bound"] and relaxed["cores_needed"] == 1


@pytest.mark.parametrize(("decode", "size"), [("full", (600, 600)), ("reduced", (150, 150))])
def test_stages_and_pipeline_decode_as_the_config_says(config, monkeypatch, decode, size):
    config.data.decode, config.data.resize = decode, "pil"
    jpeg = io.BytesIO()
    Image.new("RGB", (600, 600)).save(jpeg, "JPEG")
    records = [Record("0", jpeg.getvalue(), ("words words",))]
    monkeypatch.setattr(mixture, "open_source", lambda spec: sources.InMemory(records))
    monkeypatch.setattr(images, "simplejpeg", None)
    loaded, to_rgb = [], images._to_rgb
    monkeypatch.setattr(images, "_to_rgb", lambda image: loaded.append(image.size) or to_rgb(image))
    report = measure(config)
    assert set(loaded) == {size}
    assert len(loaded) >= 32 + report["pipeline"]["pairs"]


def test_input_of_a_mixture_reads_all_of_its_sources(config):
    config.data.source = ""
    config.data.mixture = {"first": {"source": "slow"}, "second": {"source": "slow"}}
    report = measure(config)
    assert "first" in report["source"] and "second" in report["source"]


def test_input_without_a_usable_record_is_an_error(config, monkeypatch):
    records = [Record("0", b"", ("words words",))]
    monkeypatch.setattr(mixture, "open_source", lambda spec: sources.InMemory(records))
    with pytest.raises(RuntimeError, match="none of 32 records can be used: {'image_empty': 32}"):
        measure(config)


def write_config(folder):
    (folder / "mine.py").write_text(
        "from align_jax.config import default_config\n\n\n"
        "def get_config():\n"
        "    c = default_config()\n"
        "    c.data.source = 'scenes?size=50'\n"
        "    c.data.image_size = c.data.resize_size = 32\n"
        "    c.data.num_threads = 1\n"
        "    c.train.batch_size = 16\n"
        "    return c\n"
    )
    return folder / "mine.py"


def test_bench_input_prints_a_table_and_writes_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "_TIMED_S", 0.1)
    config = write_config(tmp_path)
    out = tmp_path / "reports" / "input.json"
    arguments = ["bench", "input", "--config", str(config), "--step-time", "100"]
    assert cli.main([*arguments, "--out", str(out), "--config.data.num_threads=2"]) == 0
    printed = capsys.readouterr().out
    for name in (*bench.STAGES, "all", "pipeline:", "not input-bound", f"wrote {out}"):
        assert name in printed
    report = json.loads(out.read_text())
    assert report["num_threads"] == 2 and report["step"]["pairs_per_s"] == 0.16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--step-time", "0"), "--step-time 0.0 must be a positive number of seconds."),
        (("--processes", "3"), "--processes 3 must divide config.train.batch_size=16."),
        (("--config.data.source=nowhere",), "config.data.source: nowhere does not exist; "),
        (("--config.data.source=",), "config.data.source='' and config.data.mixture of 0 "),
    ],
)
def test_bench_input_mistake_is_one_line(tmp_path, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path)
    assert error_of(capfd, "bench", "input", "--config", str(config), *arguments).startswith(
        message
    )


def test_search_is_measured_beside_exact_search(tmp_path, capsys):
    command = ["bench", "search", "--rows", "300", "--dim", "24", "--queries", "60"]
    assert cli.main([*command, "--out", str(tmp_path / "r.json")]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert [report[name] for name in ("rows", "dim", "queries", "k")] == [300, 24, 60, 10]
    assert [found["what"] for found in report["results"]] == [
        *("numpy", "JAX, exact top_k", "folder index"),
    ]
    for found in report["results"]:
        assert found["recall"] == 1.0 and found["single_p99_ms"] >= found["single_p50_ms"]
        assert f"{found['what']} " in printed
    z, queries = bench_search.make_vectors(300, 24, 60)
    assert z.shape == (300, 24) and queries.shape == (60, 24) and z.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([z, queries]), axis=1), 1, atol=1e-6)


def test_recall_of_a_search_that_misses_half_is_half(monkeypatch):
    right = np.arange(40).reshape(4, 10)
    found = bench_search._measure(
        "half", 2, np.zeros((4, 3)), lambda q: np.where(right < 20, right, -1)[-len(q) :], right
    )
    assert found["recall"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("input",), "align bench input needs --config FILE."),
        (("search", "--config", "x.py"), "--config is of align bench input."),
        (("search", "--rows", "9"), "--rows 9 must be at least 10."),
        (("search", "--dim", "0"), "--dim 0 must be at least 1."),
        (("search", "--queries", "0"), "--queries 0 must be at least 1."),
        (("input", "--rows", "9"), "--rows is of align bench search."),
    ],
)
def test_options_of_the_other_measurement_and_wrong_numbers_are_one_line(
    tmp_path, monkeypatch, capfd, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert error_of(capfd, "bench", *arguments) == message
