"""Presets of ImageNet; index ties; ranks, folds and equal captions of retrieval."""

import numpy as np
import pytest
from helpers import decoded, real_data

from align_jax.data.sources.open_source import InMemory
from align_jax.data.sources.record import Record
from align_jax.evals import presets
from align_jax.evals.retrieval import (
    Retrieval,
    index_ranks,
    rank_summary,
    retrieval_ranks,
    retrieval_recalls,
)
from align_jax.evals.templates import load_templates
from align_jax.evals.zeroshot import ZeroShot, class_vectors, zeroshot_accuracy
from align_jax.storage.text import read_json


def test_presets_have_the_published_sizes():
    names = {preset: presets.class_names(preset) for preset in presets.NAMES}
    assert {key: len(value) for key, value in names.items()} == {
        "imagenet": 1000,
        "imagenet_a": 200,
        "imagenet_r": 200,
    }
    assert len(set(names["imagenet"])) == 998
    assert len(set(names["imagenet_a"]) & set(names["imagenet_r"])) == 86
    assert names["imagenet"][:2] == ("tench", "goldfish")
    assert names["imagenet_r"][0] == "goldfish" and names["imagenet_a"][0] == "stingray"
    templates = load_templates("imagenet80")
    assert len(set(templates)) == 80 and "itap of a {}." in templates
    with pytest.raises(ValueError, match="class_names='imagenett' is unknown; use one of"):
        presets.class_names("imagenett")


def test_presets_equal_the_files_of_a_peer():
    names = read_json(real_data("text", "zeroshot_classnames_en.json"))["imagenet1k"]
    assert presets.class_names("imagenet") == tuple(names)
    path = real_data("text", "zeroshot_templates_en.json")
    assert load_templates("imagenet80") == load_templates(f"{path}:imagenet1k")


def test_perfect_vectors_of_the_imagenet_names_lose_only_repeated_names():
    names = presets.class_names("imagenet")
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    z = np.eye(len(places), dtype=np.float32)[[places[name] for name in names]]
    labels = np.arange(1000)
    assert zeroshot_accuracy(z, z, labels, ties="index")["top1"] == pytest.approx(99.8)
    assert zeroshot_accuracy(z, z, labels)["top1"] == pytest.approx(99.6)
    assert zeroshot_accuracy(z, z, labels, ties="index")["top5"] == pytest.approx(100.0)


def test_index_ties_equal_a_stable_sort():
    rng = np.random.default_rng(0)
    z_image = (rng.integers(-2, 3, (80, 3)) / 4).astype(np.float32)
    z_class = (rng.integers(-2, 3, (9, 3)) / 4).astype(np.float32)
    labels = rng.integers(0, 9, 80)
    order = np.argsort(-(z_image @ z_class.T), axis=1, kind="stable")
    metrics = zeroshot_accuracy(z_image, z_class, labels, ties="index")
    assert metrics["top1"] == pytest.approx(100 * np.mean(order[:, 0] == labels))
    top5 = (order[:, :5] == labels[:, None]).any(axis=1)
    assert metrics["top5"] == pytest.approx(100 * np.mean(top5))


def test_several_names_of_a_class_are_averaged():
    table = {"a cat": [1.0, 0], "a kitten": [0, 1.0], "a dog": [0.6, 0.8]}
    seen = []

    def encode_text(texts):
        seen.extend(texts)
        return np.array([table[text] for text in texts], np.float32)

    z = class_vectors(encode_text, (("cat", "kitten"), "dog"), ("a {}",))
    np.testing.assert_allclose(z, [[0.5**0.5, 0.5**0.5], [0.6, 0.8]], atol=1e-7)
    assert seen == ["a cat", "a kitten", "a dog"]


def test_repeated_names_are_counted():
    class Model:
        def encode_text(self, texts):
            return np.tile(np.array([[1.0, 0]], np.float32), (len(texts), 1))

        def encode_image(self, images, on_error):
            return np.tile(
                np.array([[1.0, 0]], np.float32), (len(list(decoded(images, on_error))), 1)
            )

    names = ("a", "b", "a", "c", "d", "e", "a")
    metrics = ZeroShot("z", "scenes?size=14&label=shape", class_names=names)(Model())
    assert metrics["num_repeated_names"] == 2
    assert metrics["top1"] == pytest.approx(100 / 7)  # of equal scores the first class
    strict = ZeroShot("z", "scenes?size=14&label=shape", class_names=names, ties="against")
    assert strict(Model())["top1"] == 0.0


def _unit(rng, *shape):
    z = rng.normal(size=shape)
    return (z / np.linalg.norm(z, axis=-1, keepdims=True)).astype(np.float32)


def test_index_ranks_give_the_recalls_of_a_stable_sort():
    rng = np.random.default_rng(0)
    # Quarters: dot products are exact and often equal.
    z_image = (rng.integers(-2, 3, (30, 3)) / 4).astype(np.float32)
    z_text = (rng.integers(-2, 3, (60, 3)) / 4).astype(np.float32)
    owner = np.repeat(np.arange(30), 2)
    found = retrieval_recalls(*index_ranks(z_image, z_text, owner))
    scores = z_image @ z_text.T
    for k in (1, 5, 10):
        near = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        hits = (owner[near] == np.arange(30)[:, None]).any(axis=1)
        assert found[f"image_to_text_r{k}"] == pytest.approx(100 * hits.mean())
        near = np.argsort(-scores.T, axis=1, kind="stable")[:, :k]
        assert found[f"text_to_image_r{k}"] == pytest.approx(
            100 * (near == owner[:, None]).any(axis=1).mean()
        )
    # Without ties both rules agree.
    z_image, z_text = _unit(rng, 30, 8), _unit(rng, 60, 8)
    by_index = retrieval_recalls(*index_ranks(z_image, z_text, owner))
    assert by_index == retrieval_recalls(*retrieval_ranks(z_image, z_text, owner))


def test_mean_and_median_rank_begin_at_1():
    summary = rank_summary(np.array([0, 0, 2, 8]), np.array([0, 1, 2]))
    assert summary == {
        "image_to_text_mean_rank": 3.5,
        "image_to_text_median_rank": 2.0,
        "text_to_image_mean_rank": 2.0,
        "text_to_image_median_rank": 2.0,
    }


class _Random:
    """Every image and text has a vector of its own, drawn by its number."""

    def encode_image(self, images, on_error):
        return self.images[: len(list(images))]

    def encode_text(self, texts):
        return self.texts[: len(texts)]

    def __init__(self):
        rng = np.random.default_rng(0)
        self.images, self.texts = _unit(rng, 23, 4), _unit(rng, 46, 4)


def test_folds_are_means_over_equal_parts():
    image = np.zeros((2, 2, 3), np.uint8)
    records = [Record(str(i), image, (f"first {i}", "the same")) for i in range(23)]
    model = _Random()
    evaluator = Retrieval("r", InMemory(records), folds=4)
    metrics = evaluator(model)
    assert "mean of 4 folds, 3 in none" in str(evaluator.table(metrics))
    parts = []
    for start in range(0, 20, 5):  # the last three images are in none
        images = model.images[start : start + 5]
        texts = model.texts[2 * start : 2 * start + 10]
        parts.append(retrieval_recalls(*retrieval_ranks(images, texts, np.repeat(np.arange(5), 2))))
    for key in ("image_to_text_r1", "text_to_image_r5", "mean_recall"):
        assert metrics[f"4_folds/{key}"] == pytest.approx(np.mean([part[key] for part in parts]))
    assert metrics["num_images_in_no_fold"] == 3
    assert metrics["image_to_text_r1_low"] <= metrics["image_to_text_r1"]
    assert metrics["num_images_a_fold"] == 5 and metrics["num_duplicate_captions"] == 22
    with pytest.raises(ValueError, match="23 images are too few for 30 folds"):
        Retrieval("r", InMemory(records), folds=30)(model)
    with pytest.raises(ValueError, match="ties='for' one of: index, against"):
        Retrieval("r", InMemory(records), ties="for")
