"""ECCV Caption's precisions, intervals by bootstrap, parts of labelled images."""

import json

import numpy as np
import pytest
from helpers import LevelModel
from PIL import Image

from align_jax.data.sources.open_source import open_labelled
from align_jax.evals import bootstrap, make_evaluator
from align_jax.evals.eccv import precision_metrics
from align_jax.evals.tables import format_table
from align_jax.storage import identity


def test_precisions_of_three_queries_by_hand():
    z_query = np.eye(3, 4, dtype=np.float32)
    # Of query 0 the order is 0 1 2 3, of query 1 it is 3 2 1 0, of query 2 0 2 1 3.
    z_index = np.array([[4, 1, 4, 0], [3, 2, 2, 0], [2, 3, 3, 0], [1, 4, 1, 0]], np.float32)
    found = precision_metrics(z_query, z_index, {0: {0, 2}, 1: {1, 2, 0}, 2: {2}})
    # Query 0: right, wrong: (1 + 0) / 2 and 1/2. Query 1: wrong, right, right of 3:
    # (0 + 1/2 + 2/3) / 3 and 2/3. Query 2: wrong: 0 and 0.
    assert found == pytest.approx(
        {
            "map_at_r": 100 * (1 / 2 + (1 / 2 + 2 / 3) / 3 + 0) / 3,
            "r_precision": 100 * (1 / 2 + 2 / 3 + 0) / 3,
            "r1": 100 / 3,
            "queries": 3,
        }
    )


def test_precisions_equal_a_slow_reference_on_random_rankings():
    rng = np.random.default_rng(0)
    z_query = rng.normal(size=(20, 5)).astype(np.float32)
    z_index = rng.normal(size=(50, 5)).astype(np.float32)
    positives = {
        query: set(rng.choice(50, int(rng.integers(1, 9)), replace=False).tolist())
        for query in range(0, 20, 2)
    }
    maps, precisions = [], []
    for query, items in positives.items():
        order = np.argsort(-(z_index.astype(np.float64) @ z_query[query]), kind="stable").tolist()
        # As eccv_caption's compute_eccv_metrics has it: 1 minus the share of wrong ones.
        places = range(1, len(items) + 1)
        shares = [1 - len(set(order[:r]) - items) / r for r in places]
        kept = [s if order[r - 1] in items else 0 for r, s in zip(places, shares, strict=True)]
        maps.append(np.mean(kept))
        precisions.append(shares[-1])
    found = precision_metrics(z_query, z_index, positives)
    assert found["map_at_r"] == pytest.approx(100 * np.mean(maps))
    assert found["r_precision"] == pytest.approx(100 * np.mean(precisions))


def test_eccv_reads_its_files_and_counts_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coco").mkdir()
    images = []
    for number in range(4):
        Image.new("L", (8, 8), 40 * number).save(tmp_path / "coco" / f"{number}.png")
        sentences = [{"raw": f"{40 * number + k}", "sentid": 10 * number + k} for k in (0, 1)]
        entry = {"filename": f"{number}.png", "split": "test", "sentences": sentences}
        images.append(entry | {"cocoid": 100 + number})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    entry = {"type": "eccv", "captions": "dataset_coco.json", "images": "coco"}
    with pytest.raises(ValueError, match="eccv_image_to_caption.json does not exist"):
        make_evaluator("e", entry | {"annotations": "."})
    # Caption 999 and image 555 are in no split; image 100 has captions 0, 1 and 10.
    found = {"100": [0, 1, 10, 999], "555": [0]}
    (tmp_path / "eccv_image_to_caption.json").write_text(json.dumps(found))
    (tmp_path / "eccv_caption_to_image.json").write_text(json.dumps({"0": [100, 101]}))
    evaluator = make_evaluator("e", entry | {"annotations": "."})
    metrics = evaluator(LevelModel())
    # Levels 0, 1, 40 are the three captions nearest to level 0.
    assert metrics["image_to_text_map_at_r"] == metrics["text_to_image_map_at_r"] == 100.0
    assert metrics["image_to_text_missing"] == 2 and metrics["image_to_text_queries"] == 1
    table = format_table({f"e/{key}": value for key, value in metrics.items()}, [evaluator])
    assert "I→T mAP@R" in table
    (tmp_path / "eccv_caption_to_image.json").write_text("[1]")
    with pytest.raises(ValueError, match="is not the ground truth of ECCV Caption"):
        make_evaluator("e", entry | {"annotations": "."})


def test_interval_of_a_mean_agrees_with_the_normal_one():
    hits = np.arange(1000) < 300
    low, high = bootstrap.interval(hits)
    half = 196 * np.sqrt(0.3 * 0.7 / 1000)
    assert (low, high) == pytest.approx((30 - half, 30 + half), abs=0.3)
    assert bootstrap.interval(hits) == (low, high) != bootstrap.interval(hits, seed=1)
    # Five queries of one image that are all right or all wrong tell no more than one.
    assert bootstrap.interval(5 * hits, np.full(1000, 5)) == pytest.approx((low, high))
    assert bootstrap.interval(np.ones(5)) == (100.0, 100.0)


def test_parts_are_of_each_class_and_together_the_whole():
    whole = open_labelled("scenes?size=61&label=shape")
    halves = [open_labelled(f"scenes?size=61&label=shape&part={k}/2") for k in (1, 2)]
    keys = [[half[i].key for i in range(len(half))] for half in halves]
    assert sorted(keys[0] + keys[1]) == sorted(whole[i].key for i in range(61))
    counts = [np.bincount([half[i].label for i in range(len(half))]) for half in halves]
    assert set((counts[0] - counts[1]).tolist()) <= {0, 1}
    assert halves[0].classes == whole.classes
    assert len({identity.stamp(source) for source in (whole, *halves)}) == 3


@pytest.mark.parametrize("part", ["2", "0/2", "3/2", "a/b"])
def test_bad_parts_are_one_line(part):
    with pytest.raises(ValueError, match=f"part={part} must be K/N"):
        open_labelled(f"scenes?size=9&label=shape&part={part}")
