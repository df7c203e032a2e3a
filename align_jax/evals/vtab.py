"""VTAB-1k by linear probe: 19 tasks, each learned from 1,000 images.

Source: Zhai et al. 2019 and google-research/task_adaptation: the splits are the first examples in
the order of the TFDS files, and some labels are formulas of other features. Instead of fine-tuning,
the probe of probe.py learns from 800 images, chooses its penalty on 200, learns again from all and
is tested on the whole test split.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from align_jax.data.sources.packed import find_tfds_folder
from align_jax.data.sources.packed_labels import Formula, TfdsLabelled, num_examples
from align_jax.evals.accuracy import score_accuracy
from align_jax.evals.probe import (
    SEARCH_TOLERANCE,
    fit_logistic,
    require_sklearn,
    search_penalty,
)
from align_jax.evals.records import count_problems, encode_labelled
from align_jax.storage import identity
from align_jax.storage.problems import Problems


class Task(NamedTuple):
    """A task: the folder below the data root, its splits, the label.

    In a split, `{T:a/b}` stands for floor(T * a / b), T the number of records of `train`.
    """

    folder: str
    group: str
    val: str
    test: str
    label: str | None = None
    formula: Formula | None = None


def _after(numerator: int, denominator: int) -> str:
    share = f"{numerator}/{denominator}"
    return f"train[{{T:{share}}}:{{T:{share}+200}}]"


def clevr_count(example: Mapping[str, Any]) -> int:
    """Returns the number of objects, 3 to 10, as 0 to 7."""
    return len(example["objects"]["pixel_coords"]) - 3


def clevr_distance(example: Mapping[str, Any]) -> int:
    """Returns in which of six ranges the distance of the closest object lies."""
    distance = np.min(np.asarray(example["objects"]["pixel_coords"])[:, 2])
    return last_below((0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0), distance)


def kitti_distance(example: Mapping[str, Any]) -> int:
    """Returns in which of three ranges the closest car, van or truck is; 3: there is none."""
    objects = example["objects"]
    is_vehicle = np.asarray(objects["type"]) < 3
    distances = np.asarray(objects["location"]).reshape(-1, 3)[is_vehicle, 2]
    return last_below((-100.0, 8.0, 20.0, 999.0), min([1000.0, *distances.tolist()]))


def dsprites_x(example: Mapping[str, Any]) -> int:
    """Returns the horizontal place, 32 of them, as 0 to 15."""
    return int(example["label_x_position"]) * 16 // 32


def dsprites_orientation(example: Mapping[str, Any]) -> int:
    """Returns the angle, 40 of them, as 0 to 15."""
    return int(example["label_orientation"]) * 16 // 40


def last_below(thresholds: Sequence[float], value: float) -> int:
    """Returns the place of the last threshold that is below a value.

    Raises:
      ValueError: none is.
    """
    below = [place for place, threshold in enumerate(thresholds) if threshold < value]
    if not below:
        raise ValueError(f"a distance of {value} is not above {thresholds[0]}.")
    return below[-1]


_NATURAL, _SPECIALISED, _STRUCTURED = GROUPS = ("natural", "specialised", "structured")
_VAL = "validation[:200]"
_SPRITES = _after(8, 10), "train[{T:9/10}:]"
_CLEVR = _after(9, 10), "validation"
_NORB = "test[:200]", "test[50%:]"
TASKS = {
    "caltech101": Task("caltech101", _NATURAL, _after(9, 10), "test"),
    "cifar100": Task("cifar100", _NATURAL, _after(9, 10), "test"),
    "dtd": Task("dtd", _NATURAL, _VAL, "test"),
    "oxford_flowers102": Task("oxford_flowers102", _NATURAL, _VAL, "test"),
    "oxford_iiit_pet": Task("oxford_iiit_pet", _NATURAL, _after(8, 10), "test"),
    "sun397": Task("sun397/tfds", _NATURAL, _VAL, "test"),
    "svhn_cropped": Task("svhn_cropped", _NATURAL, _after(9, 10), "test"),
    "patch_camelyon": Task("patch_camelyon", _SPECIALISED, _VAL, "test"),
    "eurosat": Task("eurosat/rgb", _SPECIALISED, _after(6, 10), "train[{T:8/10}:]"),
    "resisc45": Task("resisc45", _SPECIALISED, _after(6, 10), "train[{T:8/10}:]"),
    "diabetic_retinopathy": Task(
        "diabetic_retinopathy_detection/btgraham-300", _SPECIALISED, _VAL, "test"
    ),
    "clevr_count": Task(
        "clevr", _STRUCTURED, *_CLEVR, formula=Formula(("objects",), clevr_count, 8)
    ),
    "clevr_distance": Task(
        "clevr", _STRUCTURED, *_CLEVR, formula=Formula(("objects",), clevr_distance, 6)
    ),
    "dmlab": Task("dmlab", _STRUCTURED, _VAL, "test"),
    "kitti_distance": Task(
        "kitti", _STRUCTURED, _VAL, "test", formula=Formula(("objects",), kitti_distance, 4)
    ),
    "dsprites_x_position": Task(
        "dsprites",
        _STRUCTURED,
        *_SPRITES,
        formula=Formula(("label_x_position",), dsprites_x, 16, 255),
    ),
    "dsprites_orientation": Task(
        "dsprites",
        _STRUCTURED,
        *_SPRITES,
        formula=Formula(("label_orientation",), dsprites_orientation, 16, 255),
    ),
    "smallnorb_azimuth": Task("smallnorb", _STRUCTURED, *_NORB, "label_azimuth"),
    "smallnorb_elevation": Task("smallnorb", _STRUCTURED, *_NORB, "label_elevation"),
}


class Vtab:
    """Evaluator: top-1 of the tasks of VTAB-1k by linear probe.

    Args:
      name: prefix of its metrics.
      data: folder of TFDS datasets, prepared with file_format="array_record".
      tasks: names of TASKS; all of them by default. Those whose data are not there are counted as
        `data_missing`.

    Raises:
      ValueError: an unknown task, a dataset that cannot be read, or none is there.
      RuntimeError: scikit-learn is not installed.
    """

    def __init__(self, name: str, data: str, tasks: Sequence[str] = tuple(TASKS)):
        self.name = name
        require_sklearn()
        if unknown := [task for task in tasks if task not in TASKS]:
            raise ValueError(f"tasks: {unknown[0]!r} is unknown; use of: {', '.join(TASKS)}.")
        self._missing = Problems()
        self._splits: dict[str, tuple[TfdsLabelled, ...]] = {}
        for task in tasks:
            folder = Path(data) / TASKS[task].folder
            found = find_tfds_folder(str(folder)) if folder.is_dir() else None
            if found is None:
                self._missing.add("data_missing", f"{task}: {folder}")
            else:
                self._splits[task] = _open(found, TASKS[task])
        if not self._splits:
            raise ValueError(f"{data} does not exist or holds no dataset of VTAB. {self._missing}")
        self.problems = self._missing

    @property
    def stamps(self) -> dict[str, Any]:
        """What identifies the data."""
        return {
            "data": {
                task: [identity.stamp(source) for source in sources]
                for task, sources in self._splits.items()
            }
        }

    def __call__(self, model: Any) -> dict[str, float]:
        """Returns top-1 by task; where all tasks of a group are there, its mean by its name, and of
        all 19 `mean`; `num_tasks`.

        Raises:
          ValueError: a split has no image that can be read.
        """
        self.problems = Problems()
        self.problems.merge(self._missing)
        metrics: dict[str, float] = {}
        for task, sources in self._splits.items():
            metrics[task] = self._accuracy(model, task, sources)
        for group in GROUPS:
            found = [metrics.get(name) for name, task in TASKS.items() if task.group == group]
            if None not in found:
                metrics[group] = float(np.mean(found))
        if len(self._splits) == len(TASKS):
            metrics["mean"] = float(np.mean([metrics[task] for task in TASKS]))
        return metrics | {"num_tasks": len(self._splits)} | count_problems(self.problems)

    def table(self, metrics: Mapping[str, float]) -> list[list[str]]:
        """Returns header and rows of the table of results: a row a task, then the means."""
        rows = []
        for task, (learned, *_, test) in self._splits.items():
            chance = f"{100 / len(learned.classes):.1f}"
            rows.append([f"{self.name} {task}", f"{metrics[task]:.1f}", chance, f"{len(test):,}"])
        for key in (*GROUPS, "mean"):
            if key in metrics:
                rows.append([f"{self.name} {key}", f"{metrics[key]:.1f}", "", ""])
        return [["VTAB-1k by probe [%]", "top-1", "chance", "images"], *rows]

    def _accuracy(self, model: Any, task: str, sources: Sequence[TfdsLabelled]) -> float:
        try:
            train, val, test = (encode_labelled(model, s, self.problems) for s in sources)
        except ValueError as error:
            raise ValueError(f"{task}: {error}") from error
        num_classes = len(sources[0].classes)

        def accuracy(l2: float) -> float:
            fitted = fit_logistic(
                train.z, train.labels, num_classes, l2, tolerance=SEARCH_TOLERANCE
            )
            return score_accuracy(fitted(val.z), val.labels)["top1"]

        l2 = search_penalty(accuracy)
        z, labels = (np.concatenate(pair) for pair in zip(train, val, strict=True))
        scores = fit_logistic(z, labels, num_classes, l2)(test.z)
        return score_accuracy(scores, test.labels)["top1"]


def _open(folder: str, task: Task) -> tuple[TfdsLabelled, ...]:
    count = num_examples(folder, "train")

    def split(text: str) -> str:
        for share in ("6/10", "8/10", "9/10"):
            numerator, denominator = map(int, share.split("/"))
            place = count * numerator // denominator
            text = text.replace(f"{{T:{share}}}", str(place))
            text = text.replace(f"{{T:{share}+200}}", str(place + 200))
        return text

    return tuple(
        TfdsLabelled(f"{folder}?split={part}", folder, part, None, task.label, task.formula)
        for part in map(split, ("train[:800]", task.val, task.test))
    )
