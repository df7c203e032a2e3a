"""Class vectors, zero-shot accuracy against a double loop, the ZeroShot evaluator, templates."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import decoded

from align_jax.evals import make_evaluators, run_evaluators
from align_jax.evals.templates import GENERIC, SIMPLE, load_templates
from align_jax.evals.zeroshot import ZeroShot, class_vectors, zeroshot_accuracy


def _unit(rng, *shape):
    z = rng.normal(size=shape)
    return (z / np.linalg.norm(z, axis=-1, keepdims=True)).astype(np.float32)


def test_class_vector_is_the_normalised_mean_over_templates():
    table = {
        "a cat": [1.0, 0.0],
        "the cat": [0.0, 1.0],
        "a dog": [0.6, 0.8],
        "the dog": [0.6, 0.8],
    }
    z = class_vectors(
        lambda texts: np.array([table[text] for text in texts], np.float32),
        ("cat", "dog"),
        ("a {}", "the {}"),
    )
    half = 0.5**0.5
    np.testing.assert_allclose(z, [[half, half], [0.6, 0.8]], atol=1e-7)  # float32 rounding
    assert z.dtype == np.float32


def test_class_name_with_braces_goes_in_unchanged():
    seen = []

    def encode_text(texts):
        seen.extend(texts)
        return np.ones((len(texts), 1), np.float32)

    class_vectors(encode_text, ("{x}", "100 %"), ("a {} and a {}",))
    assert seen == ["a {x} and a {x}", "a 100 % and a 100 %"]


def test_class_vectors_of_cancelling_or_missing_prompts_raise():
    def cancel(texts):
        return np.array([[1.0, 0.0], [-1.0, 0.0]], np.float32)

    with pytest.raises(ValueError, match="class 'cat' have no mean direction"):
        class_vectors(cancel, ("cat",), ("a {}", "no {}"))
    with pytest.raises(ValueError, match="class 'cat' have no mean direction"):
        class_vectors(lambda texts: np.full((1, 2), np.nan), ("cat",), ("a {}",))
    with pytest.raises(ValueError, match="at least one class name"):
        class_vectors(cancel, (), ("a {}",))


def _accuracy_by_loop(scores, labels, k):
    hits = []
    for row, label in zip(scores, labels, strict=True):
        rank = sum(row[c] >= row[label] for c in range(len(row)) if c != label)
        hits.append(rank < k)
    return hits


def test_accuracy_equals_double_loop_with_planted_ties():
    rng = np.random.default_rng(0)
    # Components in quarters: dot products are exact, and ties frequent.
    z_image = (rng.integers(-2, 3, (50, 3)) / 4).astype(np.float32)
    z_class = (rng.integers(-2, 3, (9, 3)) / 4).astype(np.float32)
    labels = rng.integers(0, 7, 50)  # classes 7 and 8 do not occur
    scores = z_image.astype(np.float64) @ z_class.T.astype(np.float64)
    metrics = zeroshot_accuracy(z_image, z_class, labels)
    top1 = np.array(_accuracy_by_loop(scores, labels, 1))
    per_class = [top1[labels == label].mean() for label in np.unique(labels)]
    expected = {
        "top1": 100 * top1.mean(),
        "top5": 100 * np.mean(_accuracy_by_loop(scores, labels, 5)),
        "mean_per_class": 100 * np.mean(per_class),
    }
    assert metrics == pytest.approx(expected, abs=1e-9)
    assert 0 < metrics["top1"] < metrics["top5"] < 100


@pytest.mark.parametrize(("num_classes", "has_top5"), [(1, False), (5, False), (6, True)])
def test_top5_is_reported_only_above_five_classes(num_classes, has_top5):
    z = _unit(np.random.default_rng(0), num_classes, 8)
    metrics = zeroshot_accuracy(z, z, np.arange(num_classes))
    assert ("top5" in metrics) == has_top5
    assert metrics["top1"] == 100.0


def test_mean_per_class_weighs_classes_alike():
    z_class = np.eye(2, dtype=np.float32)
    z_image = z_class[[0, 0, 0, 0]]
    metrics = zeroshot_accuracy(z_image, z_class, np.array([0, 0, 0, 1]))
    assert metrics == {"top1": 75.0, "mean_per_class": 50.0}


def test_collapsed_model_scores_zero():
    z = np.repeat(_unit(np.random.default_rng(0), 1, 64), 12, axis=0)
    assert zeroshot_accuracy(z, z, np.arange(12))["top5"] == 0.0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 3], r"must lie in 0..2; got 0 to 3"),
        ([0, -1, 2], r"must lie in 0..2; got -1 to 2"),
        ([0, 1], r"must be \[3\] integers"),
        ([0.0, 1.0, 2.0], "of float64"),
    ],
)
def test_bad_labels_raise(labels, message):
    z = _unit(np.random.default_rng(0), 3, 4)
    with pytest.raises(ValueError, match=message):
        zeroshot_accuracy(z, z, np.array(labels))


def test_non_finite_embedding_or_wrong_width_raises():
    z = _unit(np.random.default_rng(0), 3, 4)
    bad = z.copy()
    bad[1, 1] = np.nan
    for image, classes in ((bad, z), (z, bad)):
        with pytest.raises(ValueError, match="not finite"):
            zeroshot_accuracy(image, classes, np.arange(3))
    with pytest.raises(ValueError, match=r"got \(3, 4\) for images and \(3, 2\) for classes"):
        zeroshot_accuracy(z, z[:, :2], np.arange(3))


@dataclasses.dataclass
class _LabelledImage:
    key: str
    image: np.ndarray | bytes
    label: int


class _Source:
    classes = ("black", "grey", "white")

    def __init__(self, items):
        self._items = items

    def __len__(self):
        return len(self._items)

    def __getitem__(self, index):
        if self._items[index] is None:
            raise OSError("archive ends inside the member")
        return self._items[index]


class _Model:
    """Embeds grey levels as angles; knows three words whatever stands around them."""

    _levels = {"black": 0, "grey": 128, "white": 255, "noir": 0, "gris": 128, "blanc": 255}

    def encode_image(self, images, on_error):
        images = list(decoded(images, on_error))
        return self._vectors([int(image[0, 0, 0]) for image in images])

    def encode_text(self, texts):
        words = [next(word for word in self._levels if word in text) for text in texts]
        return self._vectors([self._levels[word] for word in words])

    def _vectors(self, levels):
        angle = np.asarray(levels) / 200
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def _items():
    levels = [3, 120, 250, 10, 140, 100]
    labels = [0, 1, 2, 0, 1, 2]  # the last one is wrong on purpose
    return [
        _LabelledImage(str(i), np.full((2, 2, 3), level, np.uint8), label)
        for i, (level, label) in enumerate(zip(levels, labels, strict=True))
    ]


def test_zeroshot_of_known_model_gives_known_scores():
    metrics = ZeroShot("shade", _Source(_items()), templates=GENERIC)(_Model())
    assert metrics.pop("top1_low") <= metrics["top1"] <= metrics.pop("top1_high")
    assert metrics == pytest.approx(
        {
            "top1": 100 * 5 / 6,
            "mean_per_class": 100 * (1 + 1 + 0.5) / 3,
            "num_images": 6,
            "num_classes": 3,
            "num_skipped": 0,
        }
    )


def test_zeroshot_skips_and_counts_images_it_cannot_read():
    items = _items()
    items[2] = _LabelledImage("2", b"<html>not an image</html>", 2)
    items[3] = None
    metrics = ZeroShot("shade", _Source(items))(_Model())
    assert (metrics["num_images"], metrics["num_skipped"]) == (4, 2)
    assert metrics["top1"] == 75.0
    broken = ZeroShot("shade", _Source(items[2:4]))
    with pytest.raises(ValueError, match="Evaluator 'shade': None of the 2 images can be read"):
        run_evaluators([broken], _Model())


def test_zeroshot_class_names_replace_the_names_of_the_source():
    config = {
        "ton": {
            "type": "zeroshot",
            "source": _Source(_items()),
            "class_names": ("noir", "gris", "blanc"),
            "templates": ("une image {}",),
        }
    }
    results = run_evaluators(make_evaluators(config), _Model())
    assert results["ton/top1"] == pytest.approx(100 * 5 / 6)
    config["ton"]["class_names"] = ("noir", "gris")
    with pytest.raises(ValueError, match="'ton' has 2 class_names, its source 3 classes"):
        make_evaluators(config)


def test_load_templates_reads_names_files_and_sequences(tmp_path):
    assert load_templates("simple") == SIMPLE
    assert load_templates(["a {}", "b {}"]) == ("a {}", "b {}")
    (tmp_path / "t.txt").write_text("a {}\n\n  the {} \n", encoding="utf-8")
    assert load_templates(str(tmp_path / "t.txt")) == ("a {}", "the {}")
    (tmp_path / "t.json").write_text(json.dumps(["a {}", "ein {}"]))
    assert load_templates(str(tmp_path / "t.json")) == ("a {}", "ein {}")
    (tmp_path / "n.json").write_text(json.dumps({"x": ["a {c}."], "y": ["b {c}."]}))
    assert load_templates(f"{tmp_path / 'n.json'}:y") == ("b {}.",)


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        ('{"x": ["a {c}"]}', "", "holds named lists; give .*:NAME with one of: x"),
        ('{"x": ["a {c}"]}', ":z", "with one of: x"),
        ('["a photo"]', "", "Template 'a photo' has no {}"),
        ("[]", "", "No prompt template"),
        ('"a {}"', "", "must hold a list"),
        ("[", "", "is not valid JSON"),
    ],
)
def test_bad_template_file_raises(tmp_path, content, suffix, message):
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_templates(f"{path}{suffix}")


def test_template_that_is_no_file_raises():
    with pytest.raises(ValueError, match="'a photo of a {}' are neither 'simple' nor 'generic'"):
        load_templates("a photo of a {}")
    with pytest.raises(ValueError, match="missing.txt does not exist"):
        load_templates("missing.txt")


def test_the_80_imagenet_templates_of_clip_load_from_their_file():
    default = Path(__file__).parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("ALIGN_JAX_REAL_DATA", default))
    path = folder / "text" / "zeroshot_templates_en.json"
    if not path.is_file():
        pytest.skip("real data not found; set ALIGN_JAX_REAL_DATA to its folder")
    templates = load_templates(f"{path}:imagenet1k")
    assert len(templates) == len(set(templates)) == 80
    assert "a photo of a {}." in templates
