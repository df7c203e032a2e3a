"""k nearest images: recalls and votes against loops, with and without training images; CIFAR-10."""

import io
import subprocess
import sys
import zipfile
from collections import Counter

import numpy as np
import pytest
import tiny_hf
from helpers import decoded, environment, real_data
from PIL import Image
from test_multihost import free_address

import align_jax
from align_jax.data.sources.open_source import open_labelled
from align_jax.data.sources.record import LabelledImage
from align_jax.evals.knn import Knn, neighbour_metrics
from align_jax.evals.records import encode_labelled
from align_jax.evals.tables import format_table
from align_jax.evals.top_k import top_k
from align_jax.storage.problems import Problems


def _unit(rng, *shape):
    z = rng.normal(size=shape)
    return (z / np.linalg.norm(z, axis=-1, keepdims=True)).astype(np.float32)


def test_recalls_and_votes_equal_loops():
    rng = np.random.default_rng(0)
    neighbours, labels = rng.integers(0, 4, (3000, 7)), rng.integers(0, 4, 3000)
    scores = -np.sort(-rng.random((3000, 7)), axis=1).astype(np.float32)
    metrics = neighbour_metrics(neighbours, scores, labels, (1, 3, 7), (0.1,))
    for k in (1, 3, 7):
        recall, vote, weighted = [], [], []
        for near, score, label in zip(neighbours[:, :k], scores[:, :k], labels, strict=True):
            recall.append(label in near)
            vote.append(Counter(near.tolist()).most_common(1)[0][0] == label)  # first of equals
            weights = Counter()
            for n, s in zip(near.tolist(), score.tolist(), strict=True):
                weights[n] += np.exp(s / 0.1)
            weighted.append(weights.most_common(1)[0][0] == label)
        assert metrics[f"r{k}"] == pytest.approx(100 * np.mean(recall))
        assert metrics[f"vote_{k}"] == pytest.approx(100 * np.mean(vote))
        assert metrics[f"weighted_vote_{k}_t0.1"] == pytest.approx(100 * np.mean(weighted))
    assert metrics["r7"] > metrics["r3"] > metrics["r1"] == metrics["vote_1"]


def test_a_vote_of_cosines_of_any_size_does_not_overflow():
    metrics = neighbour_metrics(
        np.array([[0, 1]]), np.array([[1.0, 0.5]], np.float32), np.array([0]), (2,), (1e-4,)
    )
    assert metrics["weighted_vote_2_t0.0001"] == 100.0


class _Source:
    classes = ("even", "odd")

    def __init__(self, levels, broken=()):
        self.levels, self.broken = levels, broken

    def __len__(self):
        return len(self.levels)

    def __getitem__(self, index):
        level = self.levels[index]
        image = b"<html>" if index in self.broken else np.full((2, 2, 3), level, np.uint8)
        return LabelledImage(str(index), image, level % 2)

    def describe(self):
        return f"{self.levels}"


class _Model:
    def encode_image(self, images, on_error):
        angle = np.array([int(image[0, 0, 0]) for image in decoded(images, on_error)]) / 200
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def test_knn_of_a_source_leaves_the_image_itself_out():
    # 10 and 13 are nearest to each other, 40 and 42 too; the nearest of 13 is 10.
    metrics = Knn("k", _Source([10, 13, 40, 42]), k=(1, 2))(_Model())
    assert metrics["r1"] == 50.0  # the two even ones at 40
    assert metrics["num_images"] == metrics["num_train"] == 4


def test_knn_with_training_images_counts_what_cannot_be_read():
    train = _Source([10, 13, 40, 43], broken=(2,))
    evaluator = Knn("k", _Source([12, 42, 44]), train=train, k=1)
    metrics = evaluator(_Model())
    # 12 is nearest to 13, 42 and 44 to 43.
    assert metrics["r1"] == 0.0 and metrics["num_train"] == 3
    assert metrics["num_skipped"] == sum(evaluator.problems.values()) == 1
    assert metrics["chance_r1"] == pytest.approx(100 / 3)
    table = format_table({f"k/{key}": value for key, value in metrics.items()}, [evaluator])
    assert table.splitlines()[2].split() == "k 0.0 0.0 0.0 33.3 3 3 1".split()
    assert "k: 1 left out" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": ()}, "must be one or more numbers"),
        ({"k": (0, 1)}, "must be one or more numbers"),
        ({"temperatures": (0.0,)}, "must be positive"),
        ({"train": "scenes?size=4&label=shape"}, "train has 7 classes and source 2"),
    ],
)
def test_bad_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        Knn("k", _Source([1, 2]), **arguments)


def test_k_above_the_number_of_images_raises():
    with pytest.raises(ValueError, match="k=3 must be between 1 and 2"):
        Knn("k", _Source([1, 2, 3]), k=3)(_Model())


def cifar10():
    """Returns pixels [10000, 3072] and labels of the test images, in sorted order of names."""
    pixels, labels = [], []
    with zipfile.ZipFile(real_data("cifar10", "test.zip")) as archive:
        names = sorted(name for name in archive.namelist() if not name.endswith("/"))
        classes = sorted({name.split("/")[0] for name in names})
        for name in names:
            with Image.open(io.BytesIO(archive.read(name))) as image:
                pixels.append(np.asarray(image.convert("RGB"), np.float32))
            labels.append(classes.index(name.split("/")[0]))
    return np.stack(pixels), np.array(labels)


def test_knn_on_cifar10_gives_the_known_numbers():
    pixels, labels = cifar10()
    z = pixels.reshape(len(pixels), -1)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    is_even = np.concatenate([np.arange(n) % 2 == 0 for n in np.bincount(labels)])
    indices, scores = top_k(z[~is_even], z[is_even], 10)
    found = labels[is_even][indices]
    metrics = neighbour_metrics(found, scores, labels[~is_even], (1, 5, 10))
    found = [metrics[key] for key in ("r1", "r5", "r10")]
    assert found == pytest.approx([28.58, 60.48, 74.04], abs=0.005)


PROCESS = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1])
from align_jax.run import multihost
with multihost.processes(sys.argv[2], 2, int(sys.argv[3])):
    from test_eval_neighbours import near_scenes
    near_scenes(sys.argv[4], f"{sys.argv[4]}/{sys.argv[3]}.npz")
"""


def near_scenes(folder, out):
    """Writes the embeddings and labels of 43 scenes, their neighbours, and the metrics."""
    model = align_jax.load(f"{folder}/model", batch_size=16)
    source, problems = open_labelled("scenes?size=43&label=colour"), Problems()
    kept = encode_labelled(model, source, problems)
    metrics = Knn("near", source, k=(1, 5))(model)
    np.savez(out, z=kept.z, labels=kept.labels, **metrics)


@pytest.mark.slow
def test_two_processes_find_the_neighbours_of_one(tmp_path):
    tiny_hf.make_folder(tmp_path / "model")
    address, env = free_address(), environment(JAX_NUM_CPU_DEVICES="4")
    command = [sys.executable, "-c", PROCESS, __file__.rpartition("/")[0], address]
    started = [subprocess.Popen([*command, str(i), tmp_path], env=env) for i in range(2)]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    near_scenes(tmp_path, tmp_path / "one.npz")
    with np.load(tmp_path / "one.npz") as expected:
        for process in range(2):
            with np.load(tmp_path / f"{process}.npz") as found:
                assert found.files == expected.files
                np.testing.assert_allclose(found["z"], expected["z"], rtol=0, atol=1e-6)
                for name in set(found.files) - {"z"}:
                    assert np.array_equal(found[name], expected[name]), name
