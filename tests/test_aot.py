"""`align compile`: reports of programs for chips that are not here, exit codes, pod plans."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CONFIG, environment, make_pairs, run_align

from align_jax import config, train
from align_jax.cli import main as cli
from align_jax.data import pipeline, tokenizer
from align_jax.data.sources import open_source as sources
from align_jax.models import efficientnet
from align_jax.plan import aot
from align_jax.run import hlo


@pytest.fixture
def experiment(tmp_path):
    """An experiment file of the tiny config; its data source does not exist."""
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return path


def compile_command(experiment, *arguments):
    return [
        *("compile", "--config", f"{experiment}:plain", "--config.train.batch_size=16"),
        *("--config.data.vocab_size=99", *arguments),
    ]


class Fake:
    """Stands in for a jitted function, and for what it lowers and compiles to."""

    def __init__(self, error=None, text="ENTRY %main () -> f32[] {\n}\n"):
        self._error, self._text = error, text

    def lower(self, *arguments):
        return self

    def compile(self):
        if self._error:
            raise self._error
        return self

    def memory_analysis(self):
        names = ("argument", "output", "alias", "temp", "generated_code")
        sizes = {f"{name}_size_in_bytes": 2**30 for name in names}
        return SimpleNamespace(**sizes, peak_memory_in_bytes=3 * 2**30)

    def cost_analysis(self):
        return {"flops": 1.0, "bytes accessed": 2.0}

    def as_text(self):
        return self._text


@pytest.fixture
def replace_train_step(monkeypatch):
    """Puts a fake in the place of the jitted train step and of the embed steps."""
    real = train.make_program

    def replace(fake):
        monkeypatch.setattr(train, "make_program", lambda *a, **k: (*real(*a, **k)[:3], fake))
        monkeypatch.setattr(aot.encode, "compile_embed", lambda *a: (Fake(), Fake()))

    return replace


def test_report_that_fits_is_printed_and_written(experiment, replace_train_step, tmp_path, capsys):
    replace_train_step(Fake())
    out = tmp_path / "plans" / "tiny.json"
    arguments = ["--platform", "cpu", "--config.mesh.fsdp=2", "--out", str(out)]
    assert cli.main(compile_command(experiment, *arguments)) == 0
    report = json.loads(out.read_text())
    assert report["fits"] and report["mesh"] == {"data": 4, "fsdp": 2}
    assert report["num_chips"] == 8 and report["vocab_size"] == 99
    assert report["overrides"][-1] == "--config.mesh.fsdp=2"
    assert report["steps"]["train_step"]["memory"]["peak"] == 3 * 2**30
    assert "peak 3.00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("Ran out of memory in memory space hbm. Used 21.90G of 15.75G hbm. Exceeded by", 21.9),
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (512.0M) exc",
            0.5,
        ),
        ("Ran out of memory in another way", None),
    ],
)
def test_program_that_does_not_fit_is_reported_and_exits_1(
    message, gib, experiment, replace_train_step, tmp_path, capsys
):
    replace_train_step(Fake(jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")))
    out = tmp_path / "plan.json"
    arguments = ["--platform", "cpu", "--out", str(out)]
    assert cli.main(compile_command(experiment, *arguments)) == 1
    step = json.loads(out.read_text())["steps"]["train_step"]
    needed = step["memory"]["needed"]
    assert (needed and needed / 2**30) == (gib and pytest.approx(gib))
    output = capsys.readouterr()
    assert "DOES NOT FIT" in output.out and message[:30] in output.out
    assert "does not fit" in output.err and "Traceback" not in output.err


def test_tensor_of_global_batch_squared_exits_1(experiment, replace_train_step, capsys):
    square = "ENTRY %main () -> f32[] {\n  %logits = f32[2048,2048]{1,0} constant(0)\n}\n"
    replace_train_step(Fake(text=square))
    for batch, code in ((2048, 1), (4096, 0)):
        arguments = ["--platform", "cpu", f"--config.train.batch_size={batch}"]
        assert cli.main(compile_command(experiment, *arguments)) == code
        assert ("f32[2048,2048]" in capsys.readouterr().out) == bool(code)
    # The model itself is 1280 wide, so that such a tensor would mean nothing.
    arguments = ["--platform", "cpu", "--config.train.batch_size=64"]
    assert cli.main(compile_command(experiment, *arguments)) == 0


def test_other_compiler_errors_are_raised(experiment, replace_train_step, capsys):
    replace_train_step(Fake(jax.errors.JaxRuntimeError("INTERNAL: broken")))
    assert cli.main(compile_command(experiment, "--platform", "cpu")) == 1
    assert "INTERNAL: broken" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--topology is missing"),
        (("--topology", "v99:2x2"), "unknown chip 'v99'"),
        (("--platform", "cpu", "--devices", "1000"), "--devices 1000"),
        (("--platform", "cpu", "--config.mesh.fsdp=3"), "config.mesh.fsdp=3"),
        (("--platform", "cpu", "--config.train.batch_size=12"), "not divisible by 8 devices"),
        (("--platform", "cpu", "--config.model.widht=1"), "Unknown key"),
    ],
)
def test_bad_input_exits_2_with_one_line(arguments, message, experiment, capsys):
    assert cli.main(compile_command(experiment, *arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_missing_libtpu_names_the_extra(experiment, monkeypatch, capsys):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    assert cli.main(compile_command(experiment, "--topology", "v5e:4x4")) == 1
    assert "pip install 'align_jax[tpu]'" in capsys.readouterr().err


def test_abstract_batch_is_what_the_pipeline_delivers(tmp_path):
    make_pairs(tmp_path)
    c = config.default_config()
    c.data.image_size, c.data.resize_size, c.data.resize, c.data.max_tokens = 32, 40, "pil", 12
    c.loss.mask_duplicates = "both"
    mesh = aot.mesh_lib.make_mesh()
    abstract = aot._abstract_batch(c, mesh, 8)
    source = sources.open_source(f"{tmp_path}/captions.jsonl?images={tmp_path}/images")
    batches = pipeline.train_batches(
        source,
        tokenizer.train_wordpiece(["a red square"] * 9, vocab_size=100),
        c.data,
        batch_size=8,
        seed=0,
        hash_pairs=True,
    )
    arrays = next(batches).arrays
    batches.close()
    described = {name: (a.shape, jnp.dtype(a.dtype)) for name, a in abstract.items()}
    assert described == {name: (a.shape, np.dtype(a.dtype)) for name, a in arrays.items()}


@pytest.mark.parametrize(
    ("op_name", "place", "part"),
    [
        (
            "jit(train_step)/transpose(jvp(DualEncoder))/DualEncoder.encode_image/image/stage6/"
            "while/body/closed_call/stage6._groups/shard_map/while/body/MBConv/depthwise_bn/mul",
            "image backward",
            "depthwise_bn",
        ),
        (
            "jit(train_step)/jvp(DualEncoder)/DualEncoder.encode_image/image/stem_conv/conv",
            "image forward",
            "stem_conv",
        ),
        (
            "jit(train_step)/jvp(DualEncoder)/DualEncoder.encode_text/text/encoder/while/body/query/dot_general",
            "text forward",
            "query",
        ),
        ("jit(train_step)/jvp()/shard_map/reduce_sum", "loss forward", "reduce_sum"),
        ("jit(train_step)/mul", "update", "mul"),
        ("", "update", ""),
    ],
)
def test_operations_are_named_by_tower_and_layer(op_name, place, part):
    assert (aot._place(op_name), aot._part(op_name)) == (place, part)


def test_depthwise_kernels_are_never_split_over_chips(monkeypatch):
    # A TPU program with a split one gathers the global batch: 60 GiB a chip for EfficientNet-L2.
    monkeypatch.setattr(aot.mesh_lib, "FSDP_MIN_ELEMENTS", 64)
    c = config.default_config()
    c.model.image.variant, c.model.text.variant, c.model.scan_layers = "pico", "tiny", True
    mesh = aot.mesh_lib.make_mesh(2, 4)
    _, _, abstract, _ = train.make_program(c, mesh, vocab_size=99)
    split = [
        name
        for name, leaf in aot.trees.named_leaves(abstract)
        if not leaf.sharding.is_fully_replicated
    ]
    assert split and not [name for name in split if "depthwise/kernel" in name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:16x16", "v4:4x4x4", "v5p:4x4x8"])
def test_rows_of_the_processes_of_a_tpu_topology(name):
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'align_jax[tpu]'")
    devices = aot.topology_devices(name)
    processes = sorted({device.process_index for device in devices})
    size, blocks = 4 * len(devices), 0
    for fsdp in (1, 2, 8, 16, 32):  # 2 and 32 are no whole axes of a 4 x 4 x 4 torus
        made = aot.mesh_lib.make_mesh(fsdp=fsdp, devices=devices)
        assert made.shape["fsdp"] == fsdp
        sharding = aot.mesh_lib.batch_sharding(made)
        owners = np.repeat([device.process_index for device in made.devices.flat], 4)
        rows = [aot.mesh_lib.process_rows(sharding, size, process) for process in processes]
        for process, own in zip(processes, rows, strict=True):
            np.testing.assert_array_equal(own, np.flatnonzero(owners == process))
        blocks += np.array_equal(np.concatenate(rows), np.arange(size))
    # In almost every mesh, blocks in the order of the processes would be other rows.
    assert blocks <= 1


@pytest.mark.slow
def test_quick_report_on_cpu_names_the_collectives(experiment, tmp_path):
    out = tmp_path / "plan.json"
    command = compile_command(
        experiment, "--platform", "cpu", "--devices", "8", "--config.mesh.fsdp=2", "--out", out
    )
    done = run_align(*command, cwd=tmp_path, env=environment(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    check_report(json.loads(out.read_text()), num_chips=8)
    assert not done.stderr
    assert not (tmp_path / "cache").exists()  # what compiles for no chip cannot be read back


@pytest.mark.slow
def test_block_in_groups_moves_few_bytes_of_tpu_memory():
    pytest.importorskip("libtpu")
    stage = efficientnet.StageSpec(3, 1, 32, 32, 6, 1)
    trunk = efficientnet.EfficientNet(1, 1, (stage,), remat="block", dtype=jnp.bfloat16)
    size, batch = 33, 2048  # 217 MiB of expanded activations; a chip holds 128
    one = jax.sharding.SingleDeviceSharding(aot.topology_devices("v4:2x2x1")[0])
    images = jnp.zeros((1, size, size, 3))
    variables = jax.eval_shape(lambda: trunk.init(jax.random.key(0), images, False))

    def step(params, batch_stats, images):
        def loss(params):
            variables = {"params": params, "batch_stats": batch_stats}
            pooled, moments = trunk.apply(variables, images, True, mutable=["batch_stats"])
            return jnp.square(pooled).sum(), moments

        return jax.grad(loss, has_aux=True)(params)

    def on_chip(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one)

    images = on_chip(jax.ShapeDtypeStruct((batch, size, size, 3), jnp.bfloat16))
    names = ("params", "batch_stats")
    arguments = (*(jax.tree.map(on_chip, variables[name]) for name in names), images)
    program = hlo.parse(jax.jit(step).lower(*arguments).compile().as_text())
    expanded = 17 * 17 * 6 * 32 * 2  # bytes of an image
    block = sum(op.bytes * op.runs for op in program.traffic if "/stage1/" in op.op_name) / batch
    # The whole batch at once reads or writes the expanded activations some 30 times.
    assert 0.3 * expanded < block < 3 * expanded, block / expanded


@pytest.mark.slow
def test_train_step_compiles_for_a_tpu_topology(experiment, tmp_path):
    pytest.importorskip("libtpu")
    out = tmp_path / "plan.json"
    arguments = ["--topology", "v5e:2x4", "--config.mesh.fsdp=2", "--out", out]
    # Of the two images of a chip, blocks run on one after the other.
    arguments += ["--config.model.remat=block", "--config.model.bn_group_size=1"]
    command = compile_command(experiment, *arguments)
    cache = tmp_path / "cache"
    done = run_align(*command, cwd=tmp_path, env=environment(cache), timeout_s=900)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    check_report(report, num_chips=8)
    assert report["chip"]["device_kind"] == "TPU v5 lite"
    assert report["version"]["libtpu"] != "not installed"
    assert 0 < report["steps"]["train_step"]["memory"]["peak"] < 2**30
    assert not done.stderr and not cache.exists()
    bad = run_align(
        *compile_command(experiment, "--topology", "v5e:3x5"), cwd=tmp_path, env=environment()
    )
    assert bad.returncode == 2 and "--topology v5e:3x5" in bad.stderr


def check_report(report, *, num_chips):
    assert report["fits"] and report["num_chips"] == num_chips
    steps = report["steps"]
    assert set(steps) == {"train_step", "embed_image", "embed_text"}
    kinds = {entry["kind"] for entry in steps["train_step"]["collectives"]}
    assert "all-gather" in kinds and kinds & {"all-reduce", "reduce-scatter"}
    for step in steps.values():
        assert step["memory"]["arguments"] > 0 and step["unknown_loops"] == 0
        assert step["traffic_bytes"] > step["memory"]["outputs"]
        assert sum(entry["bytes"] for entry in step["traffic"]) == step["traffic_bytes"]
    assert report["flops"]["model_per_chip"] == report["flops"]["model_per_pair"] * 16 / num_chips


def test_pod_plans_page_is_generated_from_reports_that_all_fit():
    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location("g", root / "docs/pod_plans/generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    page = (root / "docs/pod_plans.md").read_text()
    assert page == generate.main(), "run: python docs/pod_plans/generate.py"
    for path in (root / "docs/pod_plans").glob("*.json"):
        report = json.loads(path.read_text())
        assert report["fits"] and f"{report['config']} on" in page, path.name
