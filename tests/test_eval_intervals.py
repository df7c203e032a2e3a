"""Intervals of resampled queries against slow ones, and published rows of another protocol."""

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from align_jax.cli import main as cli
from align_jax.evals import bootstrap, presets
from align_jax.evals.comparison import compare, to_markdown
from align_jax.evals.multilabel import average_precisions, map_interval
from align_jax.evals.selection import _text_interval
from align_jax.evals.similarity import Words


def draws(*sizes):
    """The rows of every round, an array a stratum."""
    rng = np.random.default_rng(0)
    return [[rng.integers(0, size, size) for size in sizes] for _ in range(bootstrap.ROUNDS)]


def bounds(values):
    return pytest.approx(np.percentile(values, [2.5, 97.5]).tolist(), abs=1e-9)


def test_interval_of_a_statistic_has_the_width_of_the_normal_one():
    values = np.random.default_rng(1).normal(50.0, 10.0, 400)
    found = bootstrap.statistic_interval("x", lambda rows: values[rows].mean(), 400)
    error = 1.96 * values.std() / 20
    assert found["x_low"] == pytest.approx(values.mean() - error, abs=0.15)
    assert found["x_high"] == pytest.approx(values.mean() + error, abs=0.15)


def test_map_of_images_drawn_again_is_that_of_sorting_them_again():
    rng = np.random.default_rng(0)
    scores, is_right = rng.normal(size=(40, 3)), rng.random((40, 3)) < 0.3
    is_right[:, 2] = np.arange(40) == 7  # in a third of the rounds no image has it
    expected = []
    for (rows,) in draws(40):
        occurs = is_right[rows].any(axis=0)
        found = average_precisions(scores[rows][:, occurs], is_right[rows][:, occurs])
        expected.append(100 * found["map"].mean())
    assert list(map_interval(scores, is_right).values()) == bounds(expected)


def test_words_have_an_interval_over_pairs_that_is_no_subset(tmp_path):
    rng = np.random.default_rng(0)
    angles = rng.random(30)
    rows = [f"{a}\t{b}\t{abs(a - b) + rng.random() / 2:.4f}\n" for a, b in angles.reshape(15, 2)]
    (tmp_path / "w.tsv").write_text("".join(rows))

    class Model:
        def encode_text(self, texts, projected):
            angle = np.array([float(text) for text in texts])
            return np.stack([np.cos(angle), np.sin(angle)], axis=1)

    words = Words("w", str(tmp_path / "w.tsv"))
    metrics = words(Model())
    scores = words.pairs.scores
    cosines = np.cos(
        [float(a) - float(b) for a, b in zip(words.pairs.left, words.pairs.right, strict=True)]
    )
    expected = [100 * spearmanr(scores[rows], cosines[rows]).statistic for (rows,) in draws(15)]
    assert [metrics["spearman_low"], metrics["spearman_high"]] == bounds(expected)
    assert words.table(metrics)[0][:3] == ["words [Spearman x 100]", "all", "chance"]


def test_questions_are_drawn_again_inside_each_task_and_groups_have_equal_weight():
    one = np.array([True, False, True, True]), np.array([0, 0, 0, 0])
    two = np.array([True, False, False, True, True]), np.array([0, 0, 1, 1, 1])
    expected = []
    for first, second in draws(4, 5):
        hits, group = two[0][second], two[1][second]
        means = [hits[group == g].mean() for g in (0, 1) if (group == g).any()]
        expected.append(100 * np.mean([one[0][first].mean(), np.mean(means)]))
    assert list(_text_interval([one, two]).values()) == bounds(expected)


def write(path, name, kind, results, **arguments):
    protocol = {"type": kind, "arguments": arguments, "fingerprint": "x"}
    provenance = {"workdir": path.stem, "protocols": {name: protocol}}
    content = {f"{name}/{key}": value for key, value in results.items()}
    path.write_text(json.dumps({"provenance": provenance, "results": content}))
    return path


def departures(path):
    return dict(compare([path]).departures)


def test_published_rows_of_another_split_are_marked_and_said(tmp_path, capfd):
    recalls = {"image_to_text_r1": 80.0, "num_images": 1000, "num_captions": 5000}
    path = write(tmp_path / "a.json", "flickr30k", "retrieval", recalls)
    assert departures(path) == {}
    assert "†" not in to_markdown(compare([path]))
    path = write(tmp_path / "b.json", "flickr30k", "retrieval", recalls | {"num_images": 999})
    text = "flickr30k: not the protocol of ALIGN: b: num_images 999, there 1,000."
    assert departures(path)["ALIGN", "flickr30k"] == text
    assert cli.main(["eval", "--report", str(path)]) == 0
    printed = capfd.readouterr()
    assert f"warning: {text}" in printed.err
    assert "| flickr30k/image_to_text_r1 | 80.00 | 88.60 † | 88.10 † | 87.30 † |" in printed.out
    assert f"† {text}" in printed.out
    # Either number of captions of COCO is published; one a picture is another protocol.
    for count, is_other in ((25_010, False), (25_000, False), (5000, True)):
        results = {"image_to_text_r1": 50.0, "num_images": 5000, "num_captions": count}
        path = write(tmp_path / "c.json", "coco", "retrieval", results)
        assert bool(departures(path)) == is_other


def test_published_rows_of_other_prompts_arguments_or_unknown_counts_are_said(tmp_path):
    eighty = list(presets.imagenet_templates())
    results = {"top1": 60.0, "num_images": 50_000, "num_classes": 1000}

    def said(templates, **changes):
        path = tmp_path / "m.json"
        write(path, "imagenet", "zeroshot", results | changes, templates=templates)
        return {title: text.split("m: ", 1)[1] for (title, _), text in departures(path).items()}

    assert said(eighty) == {"align-base (MIEB)": "80 prompt(s), there 1."}
    assert said(["a photo of {}."]) == {"ALIGN": "1 prompt(s), there 80."}
    assert said(["a photo of a {}."])["align-base (MIEB)"] == "1 prompt(s), other ones."
    assert said(eighty[::-1])["ALIGN"] == "80 prompt(s), other ones."
    assert said(eighty, num_classes=999)["ALIGN"] == "num_classes 999, there 1,000."
    path = write(tmp_path / "s.json", "simlex", "words", {"spearman": 3.0}, feature="embedding")
    assert departures(path)["ALIGN", "simlex"].endswith(
        "s: num_pairs not known, there 999, feature='embedding', there 'cls'."
    )
    path = write(tmp_path / "v.json", "vtab", "vtab", {"mean": 30.0})
    assert "here by a probe" in departures(path)["ALIGN", "vtab"]
    path = write(
        tmp_path / "g.json",
        "gtsrb",
        "zeroshot",
        {"top1": 3.0, "num_classes": 43},
        templates=["any {}."],
    )
    assert departures(path) == {}  # which one prompt is not known


def test_every_published_row_says_its_protocol():
    for published in presets.published():
        for name, entry in published["results"].items():
            protocol = entry["protocol"]
            assert protocol.keys() <= {"counts", "arguments", "templates", "always"}, name
            assert protocol
