"""Recalls of known rankings, the Retrieval evaluator, the evaluator contract, the gallery."""

import io
import json

import numpy as np
import pytest
from helpers import decoded
from PIL import Image

from align_jax import evals
from align_jax.data.sources.open_source import InMemory, open_labelled
from align_jax.data.sources.record import Record
from align_jax.evals import make_evaluators, run_evaluators, write_json
from align_jax.evals.gallery import retrieval_gallery
from align_jax.evals.retrieval import (
    Retrieval,
    RetrievalEmbeddings,
    retrieval_ranks,
    retrieval_recalls,
)
from align_jax.evals.tables import format_table
from align_jax.evals.zeroshot import ZeroShot


def _unit(rng, *shape):
    z = rng.normal(size=shape)
    return (z / np.linalg.norm(z, axis=-1, keepdims=True)).astype(np.float32)


def _recalls(z_image, z_text, text_to_image, **options):
    return retrieval_recalls(*retrieval_ranks(z_image, z_text, text_to_image), **options)


def test_recalls_of_a_hand_made_example():
    z_image = np.eye(3, dtype=np.float32)
    z_text = np.array(
        [
            [0.6, 0.8, 0.0],  # of image 0; image 1 is nearer: rank 1
            [0.8, 0.6, 0.0],  # of image 0: rank 0
            [0.0, 0.6, 0.8],  # of image 1; image 2 is nearer: rank 1
            [0.0, 0.8, 0.6],  # of image 2; image 1 is nearer: rank 1
        ],
        np.float32,
    )
    metrics = _recalls(z_image, z_text, np.array([0, 0, 1, 2]), ks=(1, 2, 4))
    # Image 0: own 0.8 and 0.6 lead, rank 0. Image 1: own 0.6 after 0.8, 0.8 and an equal 0.6,
    # rank 3. Image 2: own 0.6 after 0.8, rank 1.
    assert metrics == pytest.approx(
        {
            "image_to_text_r1": 100 / 3,
            "image_to_text_r2": 200 / 3,
            "image_to_text_r4": 100.0,
            "text_to_image_r1": 25.0,
            "text_to_image_r2": 100.0,
            "text_to_image_r4": 100.0,
            "mean_recall": 425 / 6,
            "num_images": 3,
            "num_captions": 4,
        }
    )


def test_own_other_captions_do_not_push_a_caption_down():
    # All five captions of image 0 score alike; so do those of image 1.
    z_image = np.eye(2, dtype=np.float32)
    text_to_image = np.repeat([0, 1], 5)
    metrics = _recalls(z_image, z_image[text_to_image], text_to_image)
    assert metrics["image_to_text_r1"] == metrics["text_to_image_r1"] == 100.0


def test_collapsed_model_scores_zero():
    rng = np.random.default_rng(0)
    z = np.repeat(_unit(rng, 1, 64), 50, axis=0)
    metrics = _recalls(z, z, np.arange(50))
    assert metrics["mean_recall"] == 0.0


def test_random_embeddings_score_about_chance():
    rng = np.random.default_rng(0)
    num_images = 400
    text_to_image = np.repeat(np.arange(num_images), 5)
    z_image, z_text = _unit(rng, num_images, 32), _unit(rng, 5 * num_images, 32)
    metrics = _recalls(z_image, z_text, text_to_image)
    # 2000 texts hit with p = 10 / 400: standard deviation 0.35 %; four of them.
    assert metrics["text_to_image_r10"] == pytest.approx(2.5, abs=1.4)
    # 400 images, p about 2.5 %: standard deviation 0.78 %.
    assert metrics["image_to_text_r10"] == pytest.approx(2.5, abs=3.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["z_image"].__setitem__((1, 2), np.nan), "1 of 3 image vectors are not finite"),
        (lambda a: a["z_text"].__setitem__((4, 0), np.inf), "1 of 6 text vectors are not finite"),
        (lambda a: a.update(z_text=a["z_text"][:, :3]), r"got \(3, 4\) for images and \(6, 3\)"),
        (lambda a: a.update(text_to_image=np.arange(5)), r"must be \[6\] integers"),
        (lambda a: a.update(text_to_image=np.arange(6.0)), "of float64"),
        (lambda a: a.update(text_to_image=np.arange(6)), "must lie in 0..2"),
        (lambda a: a.update(text_to_image=np.arange(6) % 2), r"without one: \[2\]"),
    ],
)
def test_bad_embeddings_raise(change, message):
    rng = np.random.default_rng(0)
    arguments = {
        "z_image": _unit(rng, 3, 4),
        "z_text": _unit(rng, 6, 4),
        "text_to_image": np.arange(6) % 3,
    }
    change(arguments)
    with pytest.raises(ValueError, match=message):
        retrieval_ranks(**arguments)


class _Model:
    """Image of grey level g and the text "g" have the same embedding."""

    def encode_image(self, images, on_error):
        images = list(decoded(images, on_error))
        assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in images)
        return _level_vectors([int(image[0, 0, 0]) for image in images])

    def encode_text(self, texts):
        return _level_vectors([int(text) for text in texts])


def _level_vectors(levels):
    angle = np.asarray(levels) / 200
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def _grey(level):
    return np.full((4, 6, 3), level, np.uint8)


def _png(level):
    file = io.BytesIO()
    Image.fromarray(_grey(level)).save(file, format="PNG")
    return file.getvalue()


def test_retrieval_of_known_model_is_perfect_and_skips_what_is_broken():
    source = [
        Record("a", _grey(10), ("10",)),
        Record("b", b"<html>not an image</html>", ("20",)),
        Record("c", _png(30), ("30", " ", "30")),
        Record("d", _grey(40), ()),
        Record("e", _grey(50), ("", "  ")),
        Record("f", _grey(60), ("60",)),
    ]
    evaluator = Retrieval("dev", InMemory(source))
    metrics = evaluator(_Model())
    assert metrics["image_to_text_r1"] == metrics["text_to_image_r1"] == 100.0
    counts = {key: metrics[key] for key in ("num_images", "num_captions", "num_skipped")}
    assert counts == {"num_images": 3, "num_captions": 4, "num_skipped": 3}
    assert evaluator.embeddings.captions == ["10", "30", "30", "60"]
    assert evaluator.embeddings.records == [0, 2, 5]
    assert evaluator.embeddings.text_to_image.tolist() == [0, 1, 1, 2]
    np.testing.assert_array_equal(evaluator.load_image(1), _grey(30))


def test_retrieval_keeps_the_order():
    source = [Record(str(i), _grey(7 * i), (str(7 * i),)) for i in range(11)]
    source[5] = Record("5", _grey(35), ())
    metrics = Retrieval("dev", InMemory(source))(_Model())
    assert metrics["num_images"] == 10
    assert metrics["mean_recall"] == 100.0


def test_retrieval_max_pairs_takes_the_first_records():
    source = [Record(str(i), _grey(i), (str(i), str(i))) for i in range(9)]
    assert Retrieval("dev", InMemory(source), max_pairs=4)(_Model())["num_captions"] == 8
    assert Retrieval("dev", InMemory(source), max_pairs=40)(_Model())["num_images"] == 9
    with pytest.raises(ValueError, match="max_pairs=0 of evaluator 'dev' must be at least 1"):
        Retrieval("dev", InMemory(source), max_pairs=0)


def test_retrieval_without_any_usable_record_raises():
    with pytest.raises(ValueError, match="holds no record"):
        Retrieval("dev", InMemory([]))
    evaluator = Retrieval("dev", InMemory([Record("a", _grey(1), ())]))
    with pytest.raises(ValueError, match="Evaluator 'dev': None of the 1 records"):
        run_evaluators([evaluator], _Model())


def test_make_evaluators_builds_in_order_with_arguments():
    source = [Record("a", _grey(10), ("10",))] * 3
    config = {
        "second": {"type": "retrieval", "source": InMemory(source), "max_pairs": 2},
        "first": {"type": "retrieval", "source": InMemory(source)},
    }
    evaluators = make_evaluators(config)
    assert [evaluator.name for evaluator in evaluators] == ["second", "first"]
    results = run_evaluators(evaluators, _Model())
    assert results["second/num_images"] == 2
    assert results["first/num_images"] == 3


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"type": "retrival", "source": []},
            "Unknown evaluator 'retrival'. Did you mean 'retrieval'? Known: KNOWN.",
        ),
        ({"source": []}, "Evaluator 'dev' needs 'type', one of: KNOWN."),
        (
            {"type": "retrieval", "sorce": "x"},
            "Evaluator 'dev': Unknown argument of retrieval 'sorce'. Did you mean 'source'? "
            "Known: folds, max_pairs, source, ties.",
        ),
        ({"type": "retrieval"}, "Evaluator 'dev' needs 'source'."),
        (
            {"type": "retrieval", "source": []},
            "Evaluator 'dev': The source of evaluator 'dev' holds no record.",
        ),
    ],
)
def test_make_evaluators_with_bad_entry_says_what_is_wrong(entry, message):
    with pytest.raises(ValueError) as error:
        make_evaluators({"dev": entry})
    known = ", ".join(sorted(evals.TYPES))
    assert str(error.value) == message.replace("KNOWN", known)


def test_run_evaluators_names_the_evaluator_that_failed():
    class Broken:
        name = "shapes"

        def __call__(self, model):
            raise KeyError("lost")

    with pytest.raises(RuntimeError, match="Evaluator 'shapes' failed: KeyError: 'lost'"):
        run_evaluators([Broken()], _Model())


def test_format_table_aligns_columns_and_shows_chance():
    recalls = {
        f"{direction}_r{k}": float(k)
        for direction in ("image_to_text", "text_to_image")
        for k in (1, 5, 10)
    }
    results = {f"dev/{key}": value for key, value in recalls.items()}
    results |= {"dev/num_images": 1000, "dev/num_captions": 5000, "dev/num_skipped": 2}
    results |= {"shape/top1": 91.5, "shape/mean_per_class": 90.25, "shape/num_classes": 4}
    results |= {"shape/num_images": 512, "shape/num_skipped": 0}
    source = InMemory([Record("a", _grey(10), ("10",))])
    classes = open_labelled("scenes?size=4&label=shape")
    evaluators = [Retrieval("dev", source), ZeroShot("shape", classes)]
    retrieval, zeroshot = format_table(results, evaluators).split("\n\n")
    header, rule, row, chance = retrieval.splitlines()
    assert len(header) == len(rule) == len(row)
    assert row.split() == "dev 1.0 5.0 10.0 1.0 5.0 10.0 1,000 5,000 2".split()
    assert chance.split() == "chance 0.1 0.5 1.0 0.1 0.5 1.0".split()
    assert zeroshot.splitlines()[2].split() == "shape 91.5 - 90.2 25.0 4 512 0".split()


def test_format_table_chance_is_exact_for_a_small_set():
    # 2 images with 3 captions: top 5 of 6 captions must hold one of 3; top 1 does half the time.
    results = {
        f"dev/{direction}_r{k}": 0.0
        for direction in ("image_to_text", "text_to_image")
        for k in (1, 5, 10)
    }
    results |= {"dev/num_images": 2, "dev/num_captions": 6}
    evaluator = Retrieval("dev", InMemory([Record("a", _grey(10), ("10",))]))
    chance = format_table(results, [evaluator]).splitlines()[3]
    assert chance.split() == "chance 50.0 100.0 100.0 50.0 100.0 100.0".split()


def test_write_json_round_trips(tmp_path):
    path = tmp_path / "eval" / "dev.json"
    write_json(path, {"dev/r1": 12.5}, {"step": 3, "workdir": "runs/x"})
    assert json.loads(path.read_text()) == {
        "provenance": {"step": 3, "workdir": "runs/x"},
        "results": {"dev/r1": 12.5},
    }
    assert [file.name for file in path.parent.iterdir()] == ["dev.json"]


def _gallery_embeddings(captions):
    rng = np.random.default_rng(0)
    num_images = 7
    z_image = _unit(rng, num_images, 16)
    text_to_image = np.arange(len(captions)) % num_images
    return RetrievalEmbeddings(
        z_image=z_image,
        z_text=z_image[text_to_image],
        text_to_image=text_to_image,
        text_ranks=np.arange(len(captions)),
        captions=list(captions),
        records=list(range(num_images)),
    )


def test_gallery_frames_the_right_image_green(tmp_path):
    path = retrieval_gallery(
        tmp_path / "plots" / "gallery.png",
        _gallery_embeddings(["one", "two"]),
        lambda row: np.full((20, 30, 3), 10 * row, np.uint8),
    )
    with Image.open(path) as image:
        colors = {color: count for count, color in image.convert("RGB").getcolors(1 << 20)}
    # Two queries, each with the right image first and again at the end: four frames of 4 px
    # around 148 x 99 px; the drawn text adds little.
    frame = 2 * 4 * (148 + 99 + 8)
    assert colors[(26, 152, 80)] == pytest.approx(4 * frame, rel=0.05)


@pytest.mark.parametrize(
    "caption",
    ["", "小狗在草地上奔跑" * 9, "كلب يجري 🐶", "a\x00b\x07\nc\td", "\ud800 lone", "x" * 900],
)
def test_gallery_draws_any_caption_without_warning(tmp_path, recwarn, caption):
    image = np.zeros((3, 500, 3), np.uint8)  # extreme aspect ratio
    path = retrieval_gallery(
        tmp_path / "g.png", _gallery_embeddings([caption]), lambda row: image, num_queries=3
    )
    assert path.stat().st_size > 0
    assert not recwarn.list


def test_gallery_of_an_evaluator_takes_queries_at_even_distances(tmp_path):
    source = [Record(str(i), _grey(i), (str(i),)) for i in range(100)]
    evaluator = Retrieval("dev", InMemory(source))
    evaluator(_Model())
    loaded = []

    def load_image(row):
        loaded.append(row)
        return evaluator.load_image(row)

    retrieval_gallery(tmp_path / "g.png", evaluator.embeddings, load_image, num_queries=4, top=1)
    assert loaded == [12, 12, 37, 37, 62, 62, 87, 87]
