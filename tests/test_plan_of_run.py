"""`align train --dry-run`, and the rates of a chip that a run writes down."""

import os

import jax
import jax.numpy as jnp
import pytest
from helpers import FAST_COMPILE, environment, error_of, run_align, snapshot

from align_jax import config as config_lib
from align_jax import mesh
from align_jax.models import dual_encoder, flops
from align_jax.run import chips, rates


def test_dry_run_says_what_the_run_needs_and_writes_nothing(project):
    before = snapshot(project)
    command = ("train", "--config", "config.py", "--workdir", "never", "--dry-run")
    command += ("--config.train.steps=20 epochs",)  # of 12 pairs, in batches of 8
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    env = environment(cache, JAX_NUM_CPU_DEVICES="2", **FAST_COMPILE)
    done = run_align(*command, cwd=project, env=env)
    assert done.returncode == 0, done.stderr
    assert snapshot(project) == before
    said = done.stdout + done.stderr
    for part in (
        '"batch_size": 8',
        '"steps": 30',
        "config.train.steps: 20 epochs are 30 steps",
        " pairs",
        "evaluators: own, shapes",
        "starts a run in never",
        "on 2 cpu",
        "model FLOPs",
        "memory per chip, GiB: arguments",
        "pipeline: ",
        "fits",
    ):
        assert part in said, part
    assert "step  " not in said


@pytest.mark.parametrize(
    "change, message",
    [
        ("--config.data.source=nowhere", "nowhere"),
        ("--config.train.batch_size=9", "config.train.batch_size"),
        ("--config.task=classify", "config.task"),
        ("--profile=1:2", "leave --resume-from and --profile out"),
        ("--workdir=config.py", "config.py is a file"),
    ],
)
def test_dry_run_refuses_in_one_line_what_cannot_run(inside, capfd, change, message):
    before = snapshot(inside)
    line = error_of(capfd, *"train --config config.py --workdir never --dry-run".split(), change)
    assert message in line
    assert snapshot(inside) == before


@pytest.mark.parametrize("kind, peak", [("TPU v5 lite", 197e12), ("cpu", None)])
def test_rates_are_of_one_chip_and_its_peak(monkeypatch, kind, peak):
    c = config_lib.default_config()
    c.model.image.variant, c.model.text.variant, c.train.batch_size = "pico", "tiny", 64
    model = dual_encoder.make_model(c.model, c.loss, vocab_size=50)
    whole = mesh.make_mesh(devices=jax.devices()[:4])
    # The chips here are CPUs, which no table has.
    find_chip = chips.find_chip
    monkeypatch.setattr(chips, "find_chip", lambda here: find_chip(here.replace("cpu", kind)))
    found = rates.Rates(c, model, whole).of(0.5)
    pair = flops.pair_flops(model, image_size_px=289, max_tokens=64, batch_size=64).model
    assert found["perf/pairs_per_s_per_chip"] == 64 / 4 / 0.5
    per_s = pair * 16 / 0.5
    assert found["perf/tflops_per_s_per_chip"] == pytest.approx(per_s / 1e12)
    assert found.get("perf/mfu") == (pytest.approx(per_s / peak) if peak else None)


@pytest.mark.parametrize(
    "hbm_bytes_per_s, bound, least_s",
    # 256 x 256 by 256 x 256 in float32: 2 x 256^3 FLOPs, and three matrices of 256 KiB to move.
    [(1e9, "memory", 3 * 2**18 / 1e9), (1e13, "compute", 2 * 256**3 / 1e12)],
)
def test_roofline_of_a_product_equals_hand_worked_one(monkeypatch, hbm_bytes_per_s, bound, least_s):
    chip = chips.Chip("cpu", 1.0, hbm_bytes_per_s, peak_flops=1e12)
    monkeypatch.setattr(chips, "find_chip", lambda kind: chip)
    found = rates.Rates(frozen_config(), frozen_model(), one_device())
    assert found.note(0.01) == "" and found.summary(0.01) == ""
    matrix = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    found.take_program(jax.jit(jnp.matmul).lower(matrix, matrix).compile())
    values = found.of(10 * least_s)
    assert values["perf/roofline"] == pytest.approx(0.1)
    assert values["perf/roofline_compute_s"] == pytest.approx(2 * 256**3 / 1e12)
    assert values["perf/roofline_memory_s"] == pytest.approx(3 * 2**18 / hbm_bytes_per_s)
    assert found.note(10 * least_s) == f"10 % of roofline ({bound})"
    assert found.summary(10 * least_s).startswith(f"bound by {bound}: a step takes ")
    assert found.summary(0.0) == ""


def test_roofline_counts_what_microbatches_compute_twice(monkeypatch):
    c = frozen_config()
    c.train.microbatches = 4
    model = dual_encoder.make_model(c.model, c.loss, vocab_size=50)
    monkeypatch.setattr(chips, "find_chip", lambda kind: chips.Chip("cpu", 1.0, 1e15, 1e12))
    found = rates.Rates(c, model, one_device())
    found.take_program(jax.jit(jnp.sin).lower(1.0).compile())
    pair = flops.pair_flops(model, image_size_px=289, max_tokens=64, batch_size=64, microbatches=4)
    values = found.of(1.0)
    assert values["perf/roofline"] == pytest.approx(64 * pair.hardware / 1e12)
    assert values["perf/mfu"] == pytest.approx(64 * pair.model / 1e12)


def test_chip_that_no_table_has_has_no_roofline():
    found = rates.Rates(frozen_config(), frozen_model(), one_device())
    found.take_program(None)  # not even looked at
    assert not [key for key in found.of(1.0) if "roofline" in key]


def one_device():
    return mesh.make_mesh(devices=jax.devices()[:1])


def frozen_config():
    c = config_lib.default_config()
    c.model.image.variant, c.model.text.variant, c.train.batch_size = "pico", "tiny", 64
    c.optim.image_lr_multiplier = 0.0
    return c


def frozen_model():
    c = frozen_config()
    return dual_encoder.make_model(c.model, c.loss, vocab_size=50, optim=c.optim)


def test_rates_of_a_model_with_frozen_parts_leave_flops_out():
    found = rates.Rates(frozen_config(), frozen_model(), one_device()).of(2.0)
    assert found == {"perf/pairs_per_s_per_chip": 32.0}
