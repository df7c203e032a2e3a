"""Eight fake CPU devices for every test; helpers that several test files need."""

import atexit
import contextlib
import gc
import os
import shutil
import tempfile

# Programs that several files and workers of this session need are compiled once. JAX reads the
# variable when it is imported; workers of pytest-xdist inherit it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="align_jax_tests_")
    os.environ["JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

# The files that take longest, in this order, before all others: so no worker of pytest-xdist is
# left with one of them when the others are done.
LONGEST = (
    *("multihost", "launch", "train", "train_step", "config_keys", "golden", "divergence"),
    *("run_faults", "average", "align_tokenizers", "init_from", "serve_clients", "hf_parity"),
    *("export", "classify", "curate_workers", "lora", "freeze", "run_keeping", "plan_of_run"),
)


def pytest_configure(config):
    gc.disable()  # while the test files are imported: hardly anything of theirs is garbage
    if hasattr(config.option, "loadscopereorder"):  # else files of many tests would come first
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish():
    # A quarter of the time of many tests went into collections of the garbage of tracing, which
    # visited all that was imported each time.
    gc.freeze()
    gc.set_threshold(5000, 10, 50)
    gc.enable()


@pytest.fixture(scope="module")
def quick_compile():
    """For programs that take longer to compile than to run: LLVM does not optimise them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def quick_depthwise():
    """The form of depthwise convolutions of other devices, to which that of CPUs is equal.

    That of CPUs has a multiplication for each pixel of a kernel: slow to compile.
    """
    from align_jax.models import layers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "depthwise_conv", layers.native_depthwise_conv)
        yield


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A folder with packed pairs, two vocabularies, a config and a workdir of 10 (stub) steps."""
    from helpers import CONFIG, StubStep, make_pairs, write_table

    from align_jax.cli import main as cli

    folder = tmp_path_factory.mktemp("project")
    make_pairs(folder, count=12)
    (folder / "config.py").write_text(CONFIG.replace("c.train.steps = 40", "c.train.steps = 10"))
    other = [{"image": "0.jpg", "captions": ["zebras graze", "zebras graze again"]}]
    write_table(folder / "other.jsonl", other)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        StubStep().patch(patch)
        for arguments in (
            ("pack", "captions.jsonl?images=images", "--out", "data"),
            ("vocab", "data", "--out", "tokenizer", "--size", "200"),
            ("vocab", "other.jsonl?images=images", "--out", "other", "--size", "200"),
            ("train", "--config", "config.py:plain", "--workdir", "run"),
        ):
            assert cli.main(arguments) == 0
    return folder


@pytest.fixture
def inside(project, monkeypatch):
    """The same folder as current directory; nothing may get as far as a train step."""
    from align_jax import train

    def train_step(state, batch):
        raise AssertionError("bad input came as far as the compiler")

    monkeypatch.setattr(train.train_step, "compile_train_step", lambda *args, **_: train_step)
    monkeypatch.chdir(project)
    return project


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory):
    """(folder, torch model) of a tiny random AlignModel with its processor; do not change it."""
    from tiny_hf import make_folder

    folder = tmp_path_factory.mktemp("tiny_hf")
    return folder, make_folder(folder)
