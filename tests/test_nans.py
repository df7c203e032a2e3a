"""`config.debug.nans`: the operation that gives the first NaN, in programs of every form."""

import dataclasses
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import StubStep, read_lines
from jax.sharding import PartitionSpec

from align_jax import config as config_lib
from align_jax import config_checks, mesh, state, train, train_step, trees
from align_jax.cli import main as cli
from align_jax.models import layers
from align_jax.run import divergence, nans
from align_jax.run.timeline import Timeline

ROWS = 16


def place(fn, part):
    """Where a piece of code stands in this file, as messages have it."""
    lines, start = inspect.getsourcelines(fn)
    (number,) = (start + i for i, line in enumerate(lines) if part in line)
    return f"tests/test_nans.py:{number})"


def plain(x, mesh_):
    with jax.named_scope("layer3"):
        y = jnp.log(x - 5.0)
    return y + jnp.sqrt(x - 7.0)  # NaN, too, but later


def scanned(x, mesh_):
    def body(y, _):
        return jnp.exp(jnp.log(y) - 0.5) - 1.0, y  # negative after the second round

    return jax.lax.scan(body, x, None, length=9)


def backward(x, mesh_):
    def last(x):
        with jax.named_scope("head"):
            return jnp.sqrt(jnp.square(x - x)).sum()

    return jax.grad(jax.checkpoint(last))(x)


def on_one_device(x, mesh_):
    """One row is bad; the other devices see it by a collective only."""

    def local(x):
        with jax.named_scope("own"):
            y = jnp.log(x - 0.5)
        return jax.lax.psum(y, mesh_.axis_names)

    rows = PartitionSpec(mesh_.axis_names)
    return jax.shard_map(local, mesh=mesh_, in_specs=rows, out_specs=PartitionSpec())(x) * 2.0


@pytest.fixture(params=[(1, 1), (4, 2)], ids=["1 device", "8 devices"])
def mesh_(request):
    count = math.prod(request.param)
    return mesh.make_mesh(*request.param, devices=jax.devices()[:count])


@pytest.mark.parametrize(
    "fn, operation, part",
    [
        (plain, "`log` of layer3", "jnp.log"),
        (scanned, "`log`", "jnp.log"),
        (backward, "`mul` of transpose(", "jnp.sqrt"),
        (on_one_device, "`log` of own", "jnp.log"),
    ],
)
def test_first_operation_that_gives_a_nan_is_named_with_its_line(mesh_, fn, operation, part):
    x = np.ones((ROWS, 3), np.float32)
    x[5, 1] = 0.25 if fn is on_one_device else 1.0
    x = jax.device_put(x, mesh.batch_sharding(mesh_))
    found = nans.first_nan(jax.jit(lambda x: fn(x, mesh_), donate_argnums=0), x)
    assert found.startswith(operation) and found.endswith(place(fn, part)), found
    assert not x.is_deleted()


def test_infinities_are_no_nans_and_bad_input_is_told():
    found = nans.first_nan(lambda x: 1.0 / x, jnp.zeros(3))
    assert found.startswith("none that a second run shows")
    assert nans.first_nan(jnp.sin, jnp.array([1.0, math.nan])).startswith("none: there are NaNs in")
    assert not nans.any_nan({"step": jnp.int32(3), "x": jnp.array([math.inf, 1.0])})
    assert nans.any_nan({"step": jnp.int32(3), "x": jnp.array([math.inf, math.nan])})


def make_step():
    def step(state, batch):
        metrics = {"loss": jnp.log(5.5 - state.step), "grad_norm": 1.0, "temperature": 0.1}
        return dataclasses.replace(state, step=state.step + 1), metrics

    return jax.jit(step)


@pytest.mark.parametrize("where", ["loss", "grad_norm", "params"])
def test_nan_is_found_in_whatever_a_step_gives(where):
    def step(s, batch):
        bad = jnp.log(s.params["w"] - 1.0)
        good = jnp.sqrt(s.params["w"])
        values = {name: bad if name == where else jnp.exp(0.0) for name in ("loss", "grad_norm")}
        params = {"w": bad if where == "params" else good}
        return dataclasses.replace(s, step=s.step + 1, params=params), values

    first = state.TrainState(jnp.int32(4), {"w": jnp.float32(0.5)}, {}, {})
    named = nans.naming_first(jax.jit(step), jax.jit(step), Timeline())
    with pytest.raises(
        divergence.TrainingDiverged, match=r"step 5: the first NaN .* `log` \("
    ) as e:
        named(first, {})
    assert (e.value.step, e.value.span) == (5, 1)
    fine = dataclasses.replace(first, params={"w": jnp.float32(2.0)})
    assert int(named(fine, {})[0].step) == 5


@pytest.fixture
def command(project, monkeypatch):
    monkeypatch.chdir(project)
    donated = []

    def compile_step(*args, donate):
        donated.append(donate)
        return make_step()

    StubStep().patch(monkeypatch)
    monkeypatch.setattr(train.train_step, "compile_train_step", compile_step)

    def run(workdir, *overrides):
        arguments = ("train", "--config", "config.py:plain", "--workdir", workdir)
        return cli.main([*arguments, *(f"--config.{override}" for override in overrides)])

    run.donated = donated
    return run


def test_run_ends_at_the_first_nan_with_its_operation_and_later_runs_are_as_before(
    command, capfd, project
):
    often = "checkpoint.every_steps=4"
    assert command("named", often, "train.steps=6") == 0  # a run without the key
    capfd.readouterr()
    extra = (often, "train.on_divergence=rollback")
    assert command("named", *extra, "debug.nans=True") == 1
    *_, line = capfd.readouterr().err.splitlines()
    assert line.startswith("align: step 7: the first NaN comes out of `log` (")
    assert place(make_step, "jnp.log") in line
    assert "config.debug.nans" in line and "config.optim.learning_rate" in line
    assert command.donated == [True, False]
    assert [entry["step"] for entry in read_lines(project / "named/metrics.jsonl")][-1] <= 6

    assert command("unnamed") == 1
    assert "step 7: loss is nan" in capfd.readouterr().err


def test_several_processes_are_refused():
    c = config_lib.default_config()
    c.data.source, c.debug.nans = "scenes?size=9", True
    with pytest.raises(ValueError, match="config.debug.nans=True looks into one process, not 2"):
        config_checks.validate(c, num_devices=8, num_processes=2)


@pytest.mark.slow
def test_block_of_a_tower_is_named_with_microbatches_and_the_ring_on_two_devices(monkeypatch):
    # Equal to the form of CPUs (test_layers), and compiled in a part of the time.
    monkeypatch.setattr(layers, "depthwise_conv", layers.native_depthwise_conv)
    c = config_lib.default_config()
    c.model.image.variant, c.model.text.variant, c.model.embed_dim = "pico", "tiny", 64
    c.model.dtype, c.model.bn_group_size, c.train.batch_size = "float32", 2, 8
    c.train.microbatches, c.loss.form, c.debug.nans = 2, "ring", True
    m = mesh.make_mesh(1, 2, devices=jax.devices()[:2])
    model, optimizer, abstract, step_fn = train.make_program(c, m, vocab_size=60)
    s = train_step.init_state(model, optimizer, abstract, seed=0)

    spoilt = "image/stage2/block0/expand/kernel"
    assert spoilt in dict(trees.named_leaves(s.params))

    def spoil(name, leaf):  # infinite weights of both signs: their product with anything is NaN
        return leaf * np.inf if name == spoilt else leaf

    s = dataclasses.replace(s, params=trees.map_named(spoil, s.params))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (8, 32, 32, 3), np.uint8),
        "ids": rng.integers(5, 60, (8, 6)).astype(np.int32),
        "mask": np.ones((8, 6), np.int32),
        "index": np.arange(8, dtype=np.int32),
    }
    batch = mesh.put_batch(batch, mesh.batch_sharding(m))
    found = nans.first_nan(lambda *args: step_fn(*args)[1]["loss"], s, batch)
    assert "stage2/block0/expand" in found and "align_jax/models/" in found, found
