"""What the tests of the training loop and of the command line share: tiny data, runs, snapshots."""

import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp
from PIL import Image, ImageDraw

from align_jax import embed, train, trees
from align_jax.cli import main as cli
from align_jax.data import images
from align_jax.run import plots

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}

# Random crop, flip, dropout and stochastic depth are on. float32 and a learning rate this small
# keep runs on other meshes comparable: with 4 images a BatchNorm group, rounding grows quickly.
CONFIG = """
from align_jax.config import default_config


def get_config(kind=""):
    c = default_config()
    c.model.image.variant = "femto"
    c.model.text.variant = "tiny"
    c.model.embed_dim = 32
    c.model.dtype = "float32"
    c.model.bn_group_size = 4
    c.data.source = "data?split=train"
    c.data.image_size = 32
    c.data.resize_size = 40
    c.data.resize = "pil"
    c.data.max_tokens = 12
    c.data.tokenizer = "tokenizer"
    c.data.num_threads = 2
    c.optim.name = "adamw"
    c.optim.learning_rate = 1e-4
    c.optim.warmup_steps = 5
    c.optim.temperature = "log"
    c.loss.temperature_init = 0.1
    c.train.batch_size = 8
    c.train.steps = 40
    c.checkpoint.every_steps = 8
    c.eval.every_steps = 20
    c.eval.batch_size = 16
    c.log.every_steps = 1
    if kind == "plain":
        c.eval.every_steps = 1000
    else:
        c.eval.evaluators.own = {"type": "retrieval", "source": "data?split=train"}
        c.eval.evaluators.shapes = {
            "type": "zeroshot",
            "source": "scenes?size=24&seed=6&label=shape",
            "templates": ("a picture of a {}", "{}"),
        }
    return c
"""


def make_pairs(folder, count=44):
    """Writes `count` JPEGs of 56 x 48 px with three captions each: images/ and captions.jsonl."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    rows = []
    for index in range(count):
        colour = list(COLOURS)[index % 3]
        noise = rng.integers(0, 80, (48, 56, 3), np.uint8)
        image = Image.fromarray(noise)
        x, y = rng.integers(2, 22, 2).tolist()
        ImageDraw.Draw(image).rectangle([x, y, x + 24, y + 24], fill=COLOURS[colour])
        file = io.BytesIO()
        image.save(file, "JPEG")
        (folder / "images" / f"{index}.jpg").write_bytes(file.getvalue())
        captions = [f"a {colour} square", f"square in {colour}", f"one thing, number {index}"]
        rows.append({"image": f"{index}.jpg", "captions": captions})
    write_table(folder / "captions.jsonl", rows)
    return rows


def make_project(folder):
    """Returns the folder as a user has it: packed pairs, a vocabulary, a config."""
    make_pairs(folder)
    (folder / "config.py").write_text(CONFIG)
    with contextlib.chdir(folder):
        assert cli.main(["pack", "captions.jsonl?images=images", "--out", "data"]) == 0
        assert cli.main(["vocab", "data", "--out", "tokenizer", "--size", "200"]) == 0
    return folder


def write_embeddings(folder, spec, dim, shard_size=4):
    """Writes embeddings [N, dim] of the images of a source as `align embed` does; returns them."""
    items = embed.open_images(spec)
    z = np.random.default_rng(0).standard_normal((items.count, dim)).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    folder.mkdir()
    manifest = {"kind": "image", "inputs": items.identity, "model": "", "embed_dim": dim}
    manifest |= {"file_format": "npy", "shard_size": shard_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for number, start in enumerate(range(0, items.count, shard_size)):
        np.save(folder / f"{number:05d}.npy", z[start : start + shard_size])
    return z


def write_table(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def align_command(*arguments):
    return [sys.executable, "-m", "align_jax.cli.main", *map(str, arguments)]


# Half the compile time; for runs whose numbers need not be those of the default.
FAST_COMPILE = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
}


def environment(cache=None, **variables):
    """Returns the environment of a child: one real CPU device, compilations shared by `cache`."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    if cache is not None:
        env["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        env["JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    return env | variables


def run_align(*arguments, cwd, env, timeout_s=300):
    """Runs `align <arguments>` in a process of its own; returns it completed."""
    return subprocess.run(
        align_command(*arguments),
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def start_align(*arguments, cwd, env, stderr=subprocess.PIPE):
    """Starts `align <arguments>`; its standard error goes to a file, or to the pipe `.stderr`."""
    return subprocess.Popen(
        align_command(*arguments),
        cwd=cwd,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        text=True,
    )


def error_of(capfd, *arguments):
    """Runs `align`; returns its only line of error, asserting that it left all files alone."""
    before = file_times(".")
    capfd.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    printed = capfd.readouterr()
    assert file_times(".") == before
    assert code == 2, printed.err
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("align: ")
    return line.removeprefix("align: ")


def wait_for_line(path, wanted, process, timeout_s=300, log=None):
    """Blocks until `wanted(line)` holds for a line of a growing JSON lines file; returns it."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        for line in read_lines(path):
            if wanted(line):
                return line
        if process.poll() is not None:
            printed = log.read_text() if log else process.stderr.read()
            raise AssertionError(f"ended with {process.returncode}: {printed}")
        time.sleep(0.005)
    process.kill()
    raise AssertionError(f"no such line in {path} after {timeout_s} s")


def read_lines(path):
    """Returns the whole lines of a JSON lines file that may still grow."""
    raw = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in raw.splitlines(keepends=True) if line.endswith("\n")]


def read_checkpoint(workdir, step):
    """Returns {name: array} of everything a checkpoint holds, read by Orbax and numpy alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is told no sharding, as it says
        items = ocp.load_checkpointables(Path(workdir).absolute() / "checkpoints" / str(step))
    small, start = items.pop("small"), 0
    named = {
        f"{item}/{name}": np.asarray(leaf)
        for item, tree in items.items()
        for name, leaf in trees.named_leaves(tree)
    }
    for name, dtype, shape in json.loads(bytes(small["index"])):
        assert name not in named
        stop = start + math.prod(shape) * jnp.dtype(dtype).itemsize
        named[name] = np.frombuffer(bytes(small["bytes"])[start:stop], dtype).reshape(shape)
        start = stop
    assert start == len(small["bytes"])
    return named


def assert_same_bytes(left, right):
    assert left.keys() == right.keys()
    different = [name for name in left if left[name].tobytes() != right[name].tobytes()]
    assert not different


def saved_steps(workdir):
    """Returns the steps of the complete checkpoints; a killed save leaves `8.orbax-...`."""
    names = [path.name for path in (Path(workdir) / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdecimal())


def snapshot(folder):
    """Returns {relative path: content} of all files below a folder."""
    return {name: path.read_bytes() for name, path in _files(folder)}


def file_times(folder):
    """Returns {relative path: what changes when it is written} of all files below a folder.

    Quicker than `snapshot` where there are checkpoints.
    """
    stats = ((name, path.stat()) for name, path in _files(folder))
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats}


def _files(folder):
    # The project's own folder holds an environment of gigabytes.
    assert not (Path(folder) / "pyproject.toml").exists(), "change to a folder of the test's own"
    return [(str(p.relative_to(folder)), p) for p in Path(folder).rglob("*") if p.is_file()]


def train_on_one_device(monkeypatch):
    """Gives `align train` in this process one of the eight devices: less to compile and to save."""
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    monkeypatch.setattr(train.mesh_lib, "make_mesh", lambda **kwargs: mesh)


class StubStep:
    """Stands in for the compiled train step: counts up, keeps the batches, may act at a step.

    Attributes:
      batches: step -> [{name: array} of each time that this step was made].
    """

    def __init__(self, act=None):
        self.batches = {}
        self._act = act or (lambda step: None)

    def __call__(self, state, batch):
        step = int(state.step) + 1
        arrays = {name: np.asarray(array) for name, array in batch.items()}
        self.batches.setdefault(step, []).append(arrays)
        loss = self._act(step)
        metrics = {
            "loss": np.float32(arrays["ids"].sum() / step if loss is None else loss),
            "grad_norm": np.float32(1.0),
            "temperature": np.float32(0.1),
        }
        return dataclasses.replace(state, step=state.step + 1), metrics

    def lower(self, *args):
        return self

    def compile(self):
        return self

    def memory_analysis(self):
        return None

    def patch(self, monkeypatch):
        """Makes `align train` in this process use the stub, on one device; returns the stub.

        Such a run draws no plots.
        """
        train_on_one_device(monkeypatch)
        monkeypatch.setattr(plots, "write_plots", lambda *args, **kwargs: [])
        monkeypatch.setattr(train.train_step, "compile_train_step", lambda *args, **_: self)
        return self


def decoded(readers, on_error):
    """Yields the images that an evaluator offers a model; black where one cannot be read."""
    assert on_error == "skip"
    for read in readers:
        try:
            yield read()
        except images.BadImage:
            yield np.zeros((2, 2, 3), np.uint8)


class LevelModel:
    """A perfect model of grey images and of captions that name their level, 0 to 255."""

    def encode_image(self, images, on_error):
        return self._vectors([int(image[0, 0, 0]) for image in decoded(images, on_error)])

    def encode_text(self, texts):
        return self._vectors([int(text) for text in texts])

    def _vectors(self, levels):
        angle = np.asarray(levels) / 200
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def real_data(*parts):
    """A path inside the folder of real pairs; the test is skipped where it is not there."""
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    path = Path(os.environ.get("ALIGN_JAX_REAL_DATA", beside), *parts)
    if not path.exists():
        pytest.skip(f"real data not found: {path}; set ALIGN_JAX_REAL_DATA")
    return path


def has_compiler():
    """Whether native kernels can be built here."""
    return any(map(shutil.which, ("c++", "g++", "clang++")))
