"""VTAB-1k: splits, formulas of labels, and a made folder of two of its datasets."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers import decoded
from PIL import Image
from test_eval_labels import write_splits

from align_jax.evals import make_evaluator, vtab
from align_jax.evals.tables import format_table
from align_jax.evals.vtab import (
    GROUPS,
    TASKS,
    clevr_count,
    clevr_distance,
    dsprites_orientation,
    dsprites_x,
    kitti_distance,
)


def test_there_are_19_tasks_in_three_groups():
    groups = [task.group for task in TASKS.values()]
    assert [groups.count(group) for group in GROUPS] == [7, 4, 8]


def test_labels_follow_the_published_formulas():
    def clevr(*depths):
        return {"objects": {"pixel_coords": np.array([[1.0, 2.0, z] for z in depths])}}

    assert clevr_count(clevr(9, 9, 9)) == 0 and clevr_count(clevr(*range(10))) == 7
    depths = [7.0, 8.0, 8.25, 8.75, 9.25, 9.75, 10.5]
    assert [clevr_distance(clevr(z, 99)) for z in depths] == [0, 0, 1, 2, 3, 4, 5]

    def kitti(*objects):
        types, depths = zip(*objects, strict=True) if objects else ((), ())
        location = np.array([[0.0, 0.0, z] for z in depths]).reshape(-1, 3)
        return {"objects": {"type": np.array(types), "location": location}}

    # Type 3 is a pedestrian, which is no vehicle.
    assert kitti_distance(kitti((0, 5.0), (1, 30.0))) == 0
    assert kitti_distance(kitti((3, 5.0), (2, 12.0))) == 1
    assert kitti_distance(kitti((0, 21.0))) == 2
    assert kitti_distance(kitti((3, 5.0))) == kitti_distance(kitti()) == 3

    places = [dsprites_x({"label_x_position": n}) for n in range(32)]
    assert places == [n // 2 for n in range(32)]
    turned = [dsprites_orientation({"label_orientation": n}) for n in range(40)]
    assert turned == [int(np.floor(n / 2.5)) for n in range(40)]


def _png(level, mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, (4, 4), level if mode == "L" else (level,) * 3).save(file, "PNG")
    file.seek(0)
    return file


class _Model:
    def __init__(self):
        self.levels = []

    def encode_image(self, images, on_error):
        levels = np.array([int(image[0, 0, 0]) for image in decoded(images, on_error)])
        self.levels.append(levels)
        return np.stack([np.cos(levels / 200), np.sin(levels / 200)], axis=1).astype(np.float32)


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 250, 1500)
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=["dark", "bright"]),
    }
    rows = [{"image": _png(int(v)), "label": int(v > 120)} for v in levels]
    splits = {"train": rows[:1000], "validation": rows[1000:1250], "test": rows[1250:]}
    write_splits(tmp_path / "dtd/3.0.1", features, splits)
    features = {
        "image": tfds.features.Image(shape=(None, None, 1)),
        "label_x_position": np.int32,
        "label_orientation": np.int32,
    }
    rows = [
        {"image": _png(n % 2, "L"), "label_x_position": 16 * (n % 2), "label_orientation": 0}
        for n in range(4000)
    ]
    write_splits(tmp_path / "dsprites/2.0.0", features, {"train": rows})
    return tmp_path


# Part of T, the examples of the original training split, after which the 200 begin (None: the first
# 200 of validation), and the test split: by the code of google-research/task_adaptation.
SPLITS = {
    "caltech101": (9, "test"), "cifar100": (9, "test"), "dtd": (None, "test"),
    "oxford_flowers102": (None, "test"), "oxford_iiit_pet": (8, "test"), "sun397": (None, "test"),
    "svhn_cropped": (9, "test"), "patch_camelyon": (None, "test"), "eurosat": (6, "train 8"),
    "resisc45": (6, "train 8"), "diabetic_retinopathy": (None, "test"),
    "clevr_count": (9, "validation"), "clevr_distance": (9, "validation"), "dmlab": (None, "test"),
    "kitti_distance": (None, "test"), "dsprites_x_position": (8, "train 9"),
    "dsprites_orientation": (8, "train 9"), "smallnorb_azimuth": ("test[:200]", "test[50%:]"),
    "smallnorb_elevation": ("test[:200]", "test[50%:]"),
}  # fmt: skip


def test_splits_of_all_tasks_are_the_published_ones():
    expected = {}
    for task, (part, test) in SPLITS.items():
        val = "validation[:200]" if part is None else part
        if isinstance(part, int):
            val = f"train[{{T:{part}/10}}:{{T:{part}/10+200}}]"
        if test.startswith("train "):
            test = f"train[{{T:{test[6:]}/10}}:]"
        expected[task] = val, test
    assert {name: (task.val, task.test) for name, task in TASKS.items()} == expected


def test_tasks_that_are_there_are_probed_on_the_published_splits(data, monkeypatch):
    fitted, fit = [], vtab.fit_logistic

    def watched(z, labels, *args, **kwargs):
        fitted.append(z.tobytes())
        return fit(z, labels, *args, **kwargs)

    monkeypatch.setattr(vtab, "fit_logistic", watched)
    entry = {"type": "vtab", "data": str(data)}
    with pytest.raises(ValueError, match="tasks: 'dtt' is unknown; use of: caltech101"):
        make_evaluator("vtab", entry | {"tasks": ("dtt",)})
    with pytest.raises(ValueError, match="none does not exist or holds no dataset of VTAB"):
        make_evaluator("vtab", entry | {"data": f"{data}/none"})
    tasks = ("dtd", "sun397", "dsprites_x_position")
    evaluator, model = make_evaluator("vtab", entry | {"tasks": tasks}), _Model()
    sizes = {task: [len(split) for split in splits] for task, splits in evaluator._splits.items()}
    assert sizes == {"dtd": [800, 200, 250], "dsprites_x_position": [800, 200, 400]}
    first = [splits[1][0].key for splits in evaluator._splits.values()]
    assert first == ["00000000", "00000000"]
    assert evaluator._splits["dsprites_x_position"][1]._split == "train[3200:3400]"
    metrics = evaluator(model)
    # The penalty is chosen by the 800, the last fit of a task has the 200 after them.
    last, chosen = fitted[-1], fitted[-2]
    assert last.startswith(chosen) and 4 * len(last) == 5 * len(chosen)
    assert metrics["dtd"] > 95 and metrics["dsprites_x_position"] == 100.0
    assert max(map(max, model.levels[3:])) == 255  # 1 of dsprites
    assert metrics["num_tasks"] == 2 and metrics["problems/data_missing"] == 1
    assert "mean" not in metrics and "structured" not in metrics
    table = format_table({f"vtab/{key}": value for key, value in metrics.items()}, [evaluator])
    assert "vtab dtd" in table and "data_missing: 1 (first: sun397: " in table
