"""Choosing captions: SugarCrepe, ARO and Winoground on made pictures, accuracies by hand."""

import json

import numpy as np
import pytest
from helpers import decoded, real_data
from PIL import Image

from align_jax.evals import make_evaluator
from align_jax.evals.selection import _read_task, choice_accuracies
from align_jax.evals.tables import format_table
from align_jax.storage.problems import Problems


def test_accuracies_of_hand_made_scores():
    # One picture, three captions: right, tie (wrong), wrong.
    text = [np.array([[0.9, 0.1, 0.8]]), np.array([[0.5, 0.5, 0.1]]), np.array([[0.1, 0.5, 0.1]])]
    assert choice_accuracies(text) == pytest.approx({"text_accuracy": 100 / 3, "chance": 100 / 3})
    # Mean over groups: 1/1 and 0/2.
    assert choice_accuracies(text, ["on", "in", "in"])["text_accuracy"] == pytest.approx(50.0)
    # Winoground: rows are pictures. Both; pictures choose right alone; captions alone; neither.
    four = [
        np.array([[0.9, 0.1], [0.1, 0.9]]),
        np.array([[0.3, 0.1], [0.4, 0.9]]),
        np.array([[0.3, 0.4], [0.1, 0.9]]),
        np.array([[0.1, 0.9], [0.9, 0.1]]),
    ]
    assert choice_accuracies(four) == pytest.approx(
        {"text_accuracy": 50.0, "image_accuracy": 50.0, "group_accuracy": 25.0, "chance": 25.0}
    )


def test_pictures_of_equal_scores_choose_wrongly():
    # Each picture prefers its caption, but the second is as near to the first's caption.
    scores = [np.array([[0.5, 0.1], [0.5, 0.9]])]
    assert choice_accuracies(scores) == pytest.approx(
        {"text_accuracy": 100.0, "image_accuracy": 0.0, "group_accuracy": 0.0, "chance": 25.0}
    )


class _Model:
    """A grey picture and its level as text have the same vector."""

    def encode_image(self, images, on_error):
        return self._vectors([image.mean() for image in decoded(images, on_error)])

    def encode_text(self, texts):
        return self._vectors([float(text) for text in texts])

    def _vectors(self, levels):
        angle = np.asarray(levels) / 200
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for level in (0, 80, 160):
        Image.new("L", (8, 8), level).save(tmp_path / "images" / f"{level}.png")
    halves = np.zeros((8, 8), np.uint8)
    halves[:, 4:] = 200
    Image.fromarray(halves).save(tmp_path / "images" / "halves.png")
    (tmp_path / "images" / "dead.png").write_bytes(b"<html>")
    return tmp_path


def _write(folder, name, content):
    (folder / name).write_text(json.dumps(content))


def _ask(filename, caption, negative):
    return {"filename": filename, "caption": caption, "negative_caption": negative}


def test_sugarcrepe_is_the_mean_of_its_tasks_and_counts_what_is_missing(folder):
    (folder / "crepe").mkdir()
    first = [_ask("0.png", "0", "90"), _ask("80.png", "0", "80"), _ask("none.png", "0", "80")]
    _write(folder, "crepe/add.json", {str(i): entry for i, entry in enumerate(first)})
    second = [_ask("160.png", "160", ["0", "80"]), _ask("dead.png", "0", "1"), {"filename": "x"}]
    _write(folder, "crepe/swap.json", second)
    entry = {"type": "selection", "pairs": "crepe/*.json", "images": "images"}
    evaluator = make_evaluator("crepe", entry)
    metrics = evaluator(_Model())
    assert metrics["text_accuracy_add"] == 50.0 and metrics["text_accuracy_swap"] == 100.0
    assert metrics["text_accuracy"] == 75.0 and metrics["num_questions"] == 3
    assert metrics["problems/image_missing"] == metrics["problems/row_malformed"] == 1
    assert metrics["num_skipped"] == 3
    table = format_table({f"crepe/{key}": value for key, value in metrics.items()}, [evaluator])
    assert table.splitlines()[2].split() == "crepe 75.0 - - 41.7 3 3".split()
    assert "  swap" in table


def test_aro_crops_to_the_box_and_means_over_relations(folder):
    box = {"bbox_x": 4, "bbox_y": 0, "bbox_w": 4, "bbox_h": 8}
    base = {"image_path": "halves.png", "true_caption": "200", "false_caption": "100"}
    _write(folder, "aro.json", [
        base | box | {"relation_name": "on"},
        base | box | {"bbox_x": 0, "true_caption": "0", "relation_name": "on"},
        base | {"relation_name": "in"},  # whole: its mean is 100
        base | {"relation_name": "in"},
        base | box | {"relation_name": "in"},
    ])  # fmt: skip
    entry = {"type": "selection", "pairs": "aro.json", "images": "images"}
    metrics = make_evaluator("aro", entry)(_Model())
    assert metrics["text_accuracy"] == pytest.approx((100 + 100 / 3) / 2)
    assert "text_accuracy_aro" not in metrics


def test_winoground_has_three_scores(folder):
    pair = {"image_0": "0.png", "image_1": "160.png"}
    _write(folder, "w.json", [
        pair | {"caption_0": "0", "caption_1": "160"},
        pair | {"caption_0": "160", "caption_1": "0"},
    ])  # fmt: skip
    entry = {"type": "selection", "pairs": "w.json", "images": "images"}
    evaluator = make_evaluator("w", entry)
    metrics = evaluator(_Model())
    for kind in ("text", "image", "group"):
        assert metrics[f"{kind}_accuracy"] == 50.0


def test_files_of_sugarcrepe_are_read_whole():
    sizes = {"add_att": 692, "add_obj": 2062, "replace_att": 788, "replace_obj": 1652}
    sizes |= {"replace_rel": 1406, "swap_att": 666, "swap_obj": 245}
    problems = Problems()
    for task, size in sizes.items():
        path = str(real_data("text", "sugarcrepe", f"{task}.json"))
        assert len(_read_task(path, problems)) == size
    assert not problems


@pytest.mark.parametrize(
    ("content", "message"),
    [("3", "must hold a list or an object"), ("[]", "holds no question"), ("[", "not valid JSON")],
)
def test_bad_files_are_named(folder, content, message):
    (folder / "bad.json").write_text(content)
    entry = {"type": "selection", "pairs": "bad.json", "images": "images"}
    with pytest.raises(ValueError, match=f"bad.json .*{message}"):
        make_evaluator("s", entry)
    with pytest.raises(ValueError, match="none.json does not exist"):
        make_evaluator("s", entry | {"pairs": "none.json"})
