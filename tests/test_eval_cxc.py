"""Crisscrossed Captions: ground truth of the val files, recalls by hand, a whole made set."""

import collections
import csv
import json

import numpy as np
import pytest
from helpers import LevelModel, real_data
from PIL import Image

from align_jax.data.sources.open_source import open_source
from align_jax.evals import make_evaluator
from align_jax.evals.cxc import Cxc, co_caption_pairs, pair_recalls
from align_jax.evals.rated_pairs import read_rated_pairs
from align_jax.evals.retrieval import Retrieval
from align_jax.evals.tables import format_table
from align_jax.storage.problems import Problems


@pytest.mark.parametrize(("kind", "rows"), [("sts", 44_009), ("sis", 42_767), ("sits", 44_722)])
def test_files_of_the_val_split_are_read_whole(kind, rows):
    path = real_data("text", "cxc", f"{kind}_val.csv")
    problems = Problems()
    pairs = read_rated_pairs(str(path), problems)
    assert len(pairs.left) == rows and not problems
    with open(path, newline="") as file:
        read = list(csv.reader(file))[1:]
    assert [row[0] for row in read] == pairs.left and [row[1] for row in read] == pairs.right
    assert [float(row[2]) for row in read] == pairs.scores.tolist()


def test_recalls_of_a_hand_made_example():
    angles = np.array([0.0, 0.1, 0.3, 0.7])
    z = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    # Without itself, the nearest of 0, 1, 2, 3 are 1, 0, 1, 2.
    pairs = np.array([[0, 1], [0, 3], [1, 2], [1, 1], [3, 0], [0, 1]])
    assert pair_recalls(z, z, pairs, (1, 2, 9), inside=True) == pytest.approx(
        {"r1": 100 / 3, "r2": 200 / 3, "r9": 100.0, "queries": 3}
    )
    # In another set, the item itself is a candidate.
    assert pair_recalls(z, z, pairs, (1, 2))["r1"] == pytest.approx(100 / 3)  # 1 finds 1
    with pytest.raises(ValueError, match="no rated pair"):
        pair_recalls(z, z, pairs[3:4], (1,), inside=True)


def test_recalls_equal_a_slow_reference():
    rng = np.random.default_rng(0)
    z_query, z_index = rng.normal(size=(40, 6)), rng.normal(size=(60, 6))
    pairs = np.c_[rng.integers(0, 30, 80), rng.integers(0, 60, 80)]
    expected = collections.Counter()
    for query in sorted(set(pairs[:, 0].tolist())):
        positives = set(pairs[pairs[:, 0] == query, 1].tolist())
        order = np.argsort(-(z_index @ z_query[query]), kind="stable").tolist()
        for k in (1, 5, 10):
            expected[f"r{k}"] += bool(positives & set(order[:k]))
    found = pair_recalls(z_query.astype(np.float32), z_index.astype(np.float32), pairs, (1, 5, 10))
    count = found.pop("queries")
    assert found == pytest.approx({key: 100 * value / count for key, value in expected.items()})


def test_co_captions_are_all_ordered_pairs_of_an_image():
    pairs = co_caption_pairs(np.array([0, 0, 1, 2, 2, 2]))
    assert {tuple(pair) for pair in pairs.tolist()} == {
        (0, 1), (1, 0), (3, 4), (4, 3), (3, 5), (5, 3), (4, 5), (5, 4)
    }  # fmt: skip


@pytest.fixture
def coco(tmp_path):
    """Six grey images of two captions each as Karpathy's JSON, and three files of ratings."""
    (tmp_path / "coco" / "val2014").mkdir(parents=True)
    (tmp_path / "cxc").mkdir()
    images = []
    for number in range(7):
        name = f"COCO_val2014_{number}.jpg"
        if number != 5:
            path = tmp_path / "coco" / "val2014" / name
            Image.new("L", (8, 8), 30 * number).save(path, "PNG")
        sentences = [
            {"raw": f"{30 * number + shift}", "sentid": 100 * number + shift} for shift in (0, 2)
        ]
        images.append(
            {
                "filepath": "val2014",
                "filename": name,
                "split": "val" if number == 6 else "test",
                "sentids": [s["sentid"] for s in sentences],
                "sentences": sentences,
                "cocoid": number,
            }
        )
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))

    def write(kind, header, rows):
        lines = [f"{header},agg_score,sampling_method", *(f"{a},{b},{s},x" for a, b, s in rows)]
        (tmp_path / "cxc" / f"{kind}_test.csv").write_text("\n".join(lines) + "\n")

    def text(number, shift=0):
        return f"COCO_val2014:sentid:{100 * number + shift}"

    def image(number):
        return f"COCO_val2014_{number}.jpg"

    everyone = range(5)
    write("sits", "caption,image", [(text(n, s), image(n), 5) for n in everyone for s in (0, 2)])
    write("sts", "caption1,caption2", [(text(n), text(m), 5 - abs(n - m)) for n in everyone
                                       for m in range(n)])  # fmt: skip
    write("sis", "image1,image2", [(image(n), image(m), 5 - abs(n - m)) for n in everyone
                                   for m in range(n)] + [(image(0), image(5), 5)])  # fmt: skip
    return tmp_path


def test_a_model_that_knows_the_images_scores_full_marks(coco, monkeypatch):
    monkeypatch.chdir(coco)
    entry = {"type": "cxc", "captions": "dataset_coco.json", "images": "coco", "rounds": 20}
    evaluator = make_evaluator("cxc", entry | {"annotations": "cxc"})
    metrics = evaluator(LevelModel())
    for task in ("image_to_text", "text_to_image", "text_to_text", "image_to_image"):
        assert metrics[f"{task}_r1"] == 100.0
    assert metrics["image_to_text_queries"] == 5 and metrics["text_to_image_queries"] == 10
    assert metrics["text_to_text_queries"] == 10
    assert metrics["sis"] == pytest.approx(100.0, abs=25) and metrics["sis_pairs"] == 10
    mean = np.mean([metrics[kind] for kind in ("sts", "sis", "sits")])
    assert metrics["correlation_mean"] == pytest.approx(mean)
    assert len({metrics[kind] for kind in ("sts", "sis", "sits")}) > 1
    assert metrics["num_images"] == 5 and metrics["num_skipped"] == 1
    assert metrics["problems/image_missing"] == 1
    table = format_table({f"cxc/{key}": value for key, value in metrics.items()}, [evaluator])
    assert "I→I R@1" in table and "cxc: 1 left out" in table
    # Without co-captions, only the first caption of each image has a partner.
    alone = make_evaluator("cxc", entry | {"annotations": "cxc", "co_captions": False})
    assert alone(LevelModel())["text_to_text_queries"] == 5
    strict = make_evaluator("cxc", entry | {"annotations": "cxc", "sis_threshold": 5.5})
    with pytest.raises(ValueError, match="image_to_image: no rated pair reaches"):
        strict(LevelModel())


def test_published_thresholds_are_the_defaults(coco, monkeypatch):
    monkeypatch.chdir(coco)
    texts = [f"COCO_val2014:sentid:{100 * n}" for n in range(5)]
    images = [f"COCO_val2014_{n}.jpg" for n in range(5)]
    for kind, left, right, scores in (
        ("sts", texts[:4:2], texts[1:4:2], (3.0, 2.99)),
        ("sis", images[:4:2], images[1:4:2], (2.5, 2.49)),
        ("sits", texts[:4], images[:4], (3.0, 2.99, 2.99, 2.99)),
    ):
        rows = ["caption,image,agg_score" if kind == "sits" else "image1,image2,agg_score"]
        rows += [f"{a},{b},{s}" for a, b, s in zip(left, right, scores, strict=True)]
        (coco / "cxc" / f"{kind}_test.csv").write_text("\n".join(rows) + "\n")
    metrics = Cxc("c", "dataset_coco.json", "coco", "cxc", co_captions=False, rounds=3)(
        LevelModel()
    )
    counts = [metrics[f"{task}_queries"] for task in ("image_to_text", "text_to_image")]
    assert counts == [1, 1]
    assert metrics["text_to_text_queries"] == metrics["image_to_image_queries"] == 2


def test_karpathy_splits_are_a_source_of_pairs(coco, monkeypatch):
    monkeypatch.chdir(coco)
    source = open_source("dataset_coco.json?images=coco&split=test")
    assert len(source) == 5 and source.problems == {"image_missing": 1}
    assert source[1].key == "val2014/COCO_val2014_1.jpg" and source[1].captions == ("30", "32")
    assert len(open_source("dataset_coco.json?images=coco&split=test,val")) == 6
    assert Retrieval("r", source)(LevelModel())["image_to_text_r1"] == 100.0
    with pytest.raises(ValueError, match="has no split 'dev'; it has test, val"):
        open_source("dataset_coco.json?images=coco&split=dev")
    (coco / "other.json").write_text('[{"image": "a.jpg", "caption": "a"}]')
    with pytest.raises(ValueError, match="other.json is not Karpathy's JSON"):
        open_source("other.json?images=coco&split=test")
    with pytest.raises(ValueError, match="for Karpathy's splits add &split=test"):
        open_source("dataset_coco.json?images=coco")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        ({"sits_query": "image"}, "sits_query='image' is unknown"),
        ({"split": "val"}, "sts_val.csv does not exist"),
        ({"captions": "none.json"}, "none.json does not exist"),
    ],
)
def test_bad_arguments_raise(coco, monkeypatch, arguments, message):
    monkeypatch.chdir(coco)
    known = {"captions": "dataset_coco.json", "images": "coco", "annotations": "cxc"}
    with pytest.raises(ValueError, match=message):
        Cxc("c", **(known | arguments))
