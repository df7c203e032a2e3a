"""Evaluators on one device, on eight, and in two processes: the same numbers of the same model."""

import json
import pickle
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
import tiny_hf
from helpers import environment
from PIL import Image
from test_multihost import free_address

import align_jax
from align_jax import mesh
from align_jax.data.sources.open_source import open_labelled
from align_jax.evals import make_evaluators, run_evaluators
from align_jax.evals.records import encode_labelled
from align_jax.storage.problems import Problems

SHAPES = "scenes?size={}&seed={}&label=shape&image_size_px=48"
WORDS = ("a photo of", "two red", "squares and", "circles on", "a mat", "a cat", "a dog", "a")


def make_data(folder):
    """A tiny model, and seven pictures with captions and ratings in the files of CxC."""
    tiny_hf.make_folder(folder / "model")
    rng = np.random.default_rng(0)
    (folder / "coco" / "val2014").mkdir(parents=True)
    (folder / "cxc").mkdir()
    images = []
    for number in range(7):
        name = f"COCO_val2014_{number}.jpg"
        pixels = rng.integers(0, 256, (6, 6, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(folder / "coco" / "val2014" / name, "PNG")
        sentences = [
            {"raw": " ".join(rng.choice(WORDS, 4)), "sentid": 10 * number + n} for n in (0, 1)
        ]
        images.append(
            {
                "filepath": "val2014",
                "filename": name,
                "split": "test",
                "cocoid": number,
                "sentids": [s["sentid"] for s in sentences],
                "sentences": sentences,
            }
        )
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    kinds = {
        "sts": ("caption1,caption2", "tt"),
        "sis": ("image1,image2", "ii"),
        "sits": ("caption,image", "ti"),
    }
    names = {
        "t": lambda n: f"COCO_val2014:sentid:{10 * n + int(rng.integers(2))}",
        "i": lambda n: f"COCO_val2014_{n}.jpg",
    }
    for kind, (header, sides) in kinds.items():
        rows = [
            f"{names[sides[0]](a)},{names[sides[1]](b)},{rng.random() * 5:.3f},x"
            for a in range(7)
            for b in range(7)
            if a != b
        ]
        (folder / "cxc" / f"{kind}_test.csv").write_text(
            "\n".join([f"{header},agg_score,sampling_method", *rows]) + "\n"
        )


def evaluate(folder, batch_size=8):
    """Returns the embeddings of the images that a probe learns from, and all metrics."""
    train, test = SHAPES.format(37, 1), SHAPES.format(27, 2)
    evaluators = make_evaluators({
        "zeroshot": {"type": "zeroshot", "source": test},
        "fewshot": {"type": "fewshot", "source": test, "train": train, "shots": (1, 3)},
        "probe": {"type": "probe", "source": test, "train": train, "l2": 1e-3},
        "cxc": {"type": "cxc", "captions": f"{folder}/dataset_coco.json", "rounds": 50,
                "images": f"{folder}/coco", "annotations": f"{folder}/cxc"},
    })  # fmt: skip
    model = align_jax.load(f"{folder}/model", batch_size=batch_size)
    z = encode_labelled(model, open_labelled(train), Problems()).z
    return z, run_evaluators(evaluators, model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def on_one(folder):
    one, make_mesh = jax.devices()[:1], mesh.make_mesh
    with mock.patch.object(mesh, "make_mesh", lambda: make_mesh(1, 1, devices=one)):
        return evaluate(folder)


def assert_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=2e-6)
    assert found[1] == pytest.approx(expected[1], abs=1e-9)


def test_eight_devices_give_the_numbers_of_one(folder, on_one):
    assert jax.device_count() == 8
    metrics = on_one[1]
    assert 100 / 7 < metrics["probe/top1"] < 100  # neither chance nor perfect: ranks that can move
    assert 0 < metrics["cxc/image_to_text_r5"] < 100
    assert_same(evaluate(folder), on_one)


PROCESS = """
import pickle, sys
sys.path.insert(0, sys.argv[1])
from align_jax.run import multihost
with multihost.processes(sys.argv[2], 2, int(sys.argv[3])):
    from test_eval_devices import evaluate
    with open(f"{sys.argv[4]}/{sys.argv[3]}.pkl", "wb") as file:
        pickle.dump(evaluate(sys.argv[4]), file)
"""


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(folder, on_one):
    address, env = free_address(), environment(JAX_NUM_CPU_DEVICES="4")
    command = [sys.executable, "-c", PROCESS, __file__.rpartition("/")[0], address]
    started = [subprocess.Popen([*command, str(i), folder], env=env) for i in range(2)]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    for process in range(2):
        assert_same(pickle.loads((folder / f"{process}.pkl").read_bytes()), on_one)
