"""Linear probe and few-shot least squares against scikit-learn, torch and the known numbers."""

import numpy as np
import pytest
import torch
from helpers import decoded
from sklearn.linear_model import Ridge
from test_eval_neighbours import cifar10

from align_jax.data.sources.record import LabelledImage
from align_jax.evals.accuracy import score_accuracy
from align_jax.evals.fewshot import FewShot, draw_shots, least_squares
from align_jax.evals.probe import Probe, fit_logistic, search_penalty, split_by_class
from align_jax.evals.tables import format_table


def test_accuracies_of_a_hand_made_example_with_ties():
    scores = np.array([[1, 1, 0], [1, 1, 0], [0, 2, 3], [0, 2, 3]])
    labels = np.array([0, 1, 2, 1])
    # Of equal scores the lower class comes first: right, wrong, right, wrong.
    assert score_accuracy(scores, labels) == pytest.approx(
        {"top1": 50.0, "mean_per_class": 200 / 3}
    )
    many = score_accuracy(np.tile(np.arange(7.0), (7, 1)), np.arange(7))
    assert many["top5"] == pytest.approx(500 / 7)


def test_logistic_regression_is_at_the_minimum_of_the_summed_loss():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    z = (rng.normal(size=(90, 5)) + np.eye(3, 5)[labels]).astype(np.float32)
    scores = fit_logistic(z, labels, 3, l2=2.0)
    inputs = torch.tensor(z, dtype=torch.float64)
    weights = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=500, tolerance_grad=1e-9)

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(
            inputs @ weights + bias, torch.tensor(labels), reduction="sum"
        )
        value = value + weights.square().sum()  # half of l2 = 2
        value.backward()
        return value

    optimizer.step(loss)
    expected = (inputs @ weights + bias).detach().numpy()
    found = scores(z)
    centred = [a - a.mean(axis=1, keepdims=True) for a in (found, expected)]
    np.testing.assert_allclose(*centred, atol=1e-4)


def test_two_classes_and_absent_ones_have_a_column_each():
    z = np.array([[0.0], [1.0], [0.1], [0.9]], np.float32)
    scores = fit_logistic(z, np.array([1, 3, 1, 3]), 5, l2=0.01)(z)
    assert scores.argmax(axis=1).tolist() == [1, 3, 1, 3]
    assert np.isneginf(scores[:, [0, 2, 4]]).all()
    with pytest.raises(ValueError, match="at least two classes"):
        fit_logistic(z, np.ones(4, int), 5, l2=1.0)


def test_penalty_search_finds_a_peak_in_few_trials():
    tried = []

    def accuracy(l2):
        tried.append(l2)
        return -abs(np.log10(l2) - 2.4)

    assert search_penalty(accuracy) == pytest.approx(10**2.375)
    assert tried[:7] == pytest.approx([1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6])
    assert len(tried) == 7 + 4 * 2
    assert search_penalty(lambda l2: 1.0) == pytest.approx(1e6)
    assert search_penalty(lambda l2: -l2) == pytest.approx(1e-6)


def test_split_takes_the_share_of_every_class():
    labels = np.repeat([0, 1], [20, 40])
    learned, held = split_by_class(labels, 0.1, seed=0)
    assert np.bincount(labels[held]).tolist() == [2, 4]
    assert sorted([*learned, *held]) == list(range(60))
    with pytest.raises(ValueError, match="leaves one side empty"):
        split_by_class(labels, 0.01, seed=0)


def test_probe_on_cifar10_gives_the_known_numbers():
    pixels, labels = cifar10()
    z = pixels.reshape(len(pixels), 8, 4, 8, 4, 3).mean(axis=(2, 4)).reshape(len(pixels), -1)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    is_even = np.concatenate([np.arange(n) % 2 == 0 for n in np.bincount(labels)])
    for l2, expected in ((1.0, 36.50), (10.0, 32.66)):
        scores = fit_logistic(z[is_even], labels[is_even], 10, l2)(z[~is_even])
        found = score_accuracy(scores, labels[~is_even])["top1"]
        assert found == pytest.approx(expected, abs=0.021)  # one image of 5,000


@pytest.mark.parametrize(("count", "dim"), [(30, 8), (8, 30)])
def test_least_squares_equals_ridge_of_scikit_learn(count, dim):
    rng = np.random.default_rng(0)
    z, z_test = rng.normal(size=(count, dim)), rng.normal(size=(7, dim))
    labels = rng.integers(0, 4, count)
    scale = z.std(axis=0) + 1e-5
    x, x_test = (np.c_[(a - z.mean(axis=0)) / scale, np.full(len(a), 100.0)] for a in (z, z_test))
    ridge = Ridge(alpha=1024.0, fit_intercept=False, solver="svd")
    ridge.fit(x, 2 * np.eye(4)[labels] - 1)
    np.testing.assert_allclose(
        least_squares(z, labels, 4, z_test), ridge.predict(x_test), atol=1e-9
    )


def test_shots_are_drawn_as_in_big_vision():
    labels = np.array([0, 1, 0, 1, 0, 1, 0])
    rng = np.random.default_rng(1)
    zeros, ones = rng.permutation([0, 2, 4, 6]), rng.permutation([1, 3, 5])
    assert draw_shots(labels, 2, 2, seed=1).tolist() == [*zeros[:2], *ones[:2]]


class _Source:
    classes = ("dark", "bright")

    def __init__(self, levels):
        self.levels = levels

    def __len__(self):
        return len(self.levels)

    def __getitem__(self, index):
        level = self.levels[index]
        image = b"broken" if level < 0 else np.full((2, 2, 3), level, np.uint8)
        return LabelledImage(str(index), image, int(level > 100))


class _Model:
    def encode_image(self, images, on_error):
        angle = np.array([int(image[0, 0, 0]) for image in decoded(images, on_error)]) / 200
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


@pytest.mark.parametrize("make", [Probe, FewShot])
def test_classifiers_learn_two_levels_and_count_broken_images(make):
    rng = np.random.default_rng(0)
    levels = np.r_[rng.integers(0, 90, 20), rng.integers(130, 255, 20)].tolist()
    options = {"shots": (1, 10)} if make is FewShot else {"val": 0.2}
    evaluator = make("c", _Source([20, 80, 200, -1]), train=_Source([*levels, -1]), **options)
    metrics = evaluator(_Model())
    assert metrics["top1" if make is Probe else "shot10"] == 100.0
    assert metrics["num_skipped"] == 2 and metrics["num_train"] == 40
    table = format_table({f"c/{key}": value for key, value in metrics.items()}, [evaluator])
    assert "100.0" in table and "c: 2 left out" in table


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (Probe, {"val": 0}, "val=0 must lie between"),
        (Probe, {"l2": -1.0}, "l2=-1.0 must be positive"),
        (FewShot, {"shots": (0,)}, "must be at least 1"),
        (FewShot, {"train": "scenes?size=4&label=shape"}, "train has 7 classes and source 2"),
    ],
)
def test_bad_arguments_raise(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make("c", _Source([1, 200]), **({"train": _Source([1, 200])} | arguments))


def test_few_shot_scores_are_mean_and_deviation_of_its_seeds():
    levels = np.random.default_rng(0).integers(60, 140, 60).tolist()
    evaluator = FewShot("c", _Source(levels[:30]), train=_Source(levels[30:]), shots=1, seeds=4)
    metrics = evaluator(_Model())
    seeds = [metrics[f"shot1_seed{seed}"] for seed in range(4)]
    assert len(set(seeds)) > 1
    assert metrics["shot1"] == pytest.approx(sum(seeds) / 4)
    assert metrics["shot1_std"] == pytest.approx(np.std(seeds))
