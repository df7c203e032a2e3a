"""Which caption fits the picture: SugarCrepe, ARO and Winoground.

Sources: Hsieh et al. 2023 (SugarCrepe), Yuksekgonul et al. 2023 (ARO: pictures are cropped to the
box, accuracy is a mean over relations or attributes), Thrush et al. 2022 (Winoground). A choice is
right only if its cosine is strictly greater: a model that maps all to one vector scores 0.
"""

import posixpath
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from align_jax.data.images import decode_image
from align_jax.data.sources import files
from align_jax.data.sources.image_finder import printable
from align_jax.data.sources.record import Record
from align_jax.data.sources.tables import Row
from align_jax.evals import bootstrap
from align_jax.evals.peers import renamed
from align_jax.evals.records import count_problems, encode_records
from align_jax.storage import identity
from align_jax.storage.paths import find_paths
from align_jax.storage.problems import Problems
from align_jax.storage.text import read_json

_IMAGE_KEYS = ("filename", "image_path", "image")
_TRUE_KEYS, _FALSE_KEYS = ("caption", "true_caption"), ("negative_caption", "false_caption")
_BOX_KEYS = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")

_BOUNDS = ("text_accuracy_low", "text_accuracy_high")

_View = tuple[str, tuple[int, ...] | None]  # a picture's name, and x, y, width, height in it


class Choice(NamedTuple):
    """One question: pictures and captions, of which the n-th belong together.

    A task of SugarCrepe or ARO has one picture and several captions, the first one right; one of
    Winoground has two of each.
    """

    views: tuple[_View, ...]
    captions: tuple[str, ...]
    group: str = ""


class Selection:
    """Evaluator: accuracies of choosing the caption of a picture (and the picture of a caption).

    Args:
      name: prefix of its metrics.
      pairs: JSON file, or glob of several, one a task: a list or object of entries with `filename`,
        `caption`, `negative_caption` (a text or several); or `image_path`, `true_caption`,
        `false_caption`, with `bbox_x`, `_y`, `_w`, `_h` and `relation_name` or `attributes`; or
        `image_0`, `image_1`, `caption_0`, `caption_1`.
      images: folders, zips or tars of the pictures.

    Raises:
      ValueError: a file that cannot be read, or is of no such form.
    """

    def __init__(self, name: str, pairs: str, images: str):
        self.name = name
        paths = find_paths(pairs)
        if not paths:
            raise ValueError(f"{pairs} does not exist; it is a JSON file, or a glob of several.")
        self._found = Problems()
        self._tasks = {Path(path).stem: _read_task(path, self._found) for path in paths}
        choices = [choice for task in self._tasks.values() for choice in task]
        self._views = list(dict.fromkeys(view for choice in choices for view in choice.views))
        self.source = _Views(self._views, images)
        self._found.merge(self.source.problems)
        self.problems = self._found

    @cached_property
    def stamps(self) -> dict[str, str]:
        """What identifies the data."""
        questions = identity.digest(c for task in self._tasks.values() for c in task)
        return {"pairs": questions, "images": identity.stamp(self.source)}

    def __call__(self, model: Any) -> dict[str, float]:
        """Returns `text_accuracy`, of several tasks their mean, with its 95 % interval (questions
        of a task drawn again), and `text_accuracy_<task>`; where captions choose pictures too,
        `image_accuracy` and `group_accuracy`; `num_questions`.

        Raises:
          ValueError: no question can be used.
        """
        self.problems = Problems()
        self.problems.merge(self._found)
        views = self.source.views
        z_image, is_readable = encode_records(model, self.source, range(len(views)), self.problems)
        row_of = {view: row for row, view in enumerate(views) if is_readable[row]}
        tasks = {
            task: [choice for choice in choices if all(view in row_of for view in choice.views)]
            for task, choices in self._tasks.items()
        }
        tasks = {task: choices for task, choices in tasks.items() if choices}
        if not tasks:
            raise ValueError(f"No question has its pictures: {self.problems}.")
        captions = [text for task in tasks.values() for c in task for text in c.captions]
        texts = {text: row for row, text in enumerate(dict.fromkeys(captions))}
        z_text = model.encode_text(list(texts))
        metrics: dict[str, float] = {}
        found, questions = [], []
        for task, choices in tasks.items():
            cosines = [
                z_image[[row_of[view] for view in choice.views]].astype(np.float64)
                @ z_text[[texts[text] for text in choice.captions]].T
                for choice in choices
            ]
            groups = [choice.group for choice in choices]
            found.append(choice_accuracies(cosines, groups))
            questions.append((is_text_right(cosines), np.unique(groups, return_inverse=True)[1]))
            metrics[f"text_accuracy_{task}"] = found[-1]["text_accuracy"]
        for key in found[0]:
            values = [task[key] for task in found if key in task]
            metrics[key] = float(np.mean(values))
        metrics |= _text_interval(questions)
        if len(tasks) == 1:
            del metrics[f"text_accuracy_{next(iter(tasks))}"]
        metrics["num_questions"] = sum(map(len, tasks.values()))
        return metrics | count_problems(self.problems)

    def clip_benchmark(self, metrics: Mapping[str, float]) -> tuple[str, dict[str, float]]:
        """Returns task and metrics of CLIP_benchmark."""
        kinds = {"text_acc": "text", "image_acc": "image", "acc": "group"}
        names = {new: f"{kind}_accuracy" for new, kind in kinds.items()}
        return "image_caption_selection", renamed(metrics, names)

    def mteb(self, metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Returns the scores of MTEB's compositionality tasks."""
        kinds = {"text_acc": "text", "image_acc": "image", "accuracy": "group"}
        found = renamed(metrics, {new: f"{kind}_accuracy" for new, kind in kinds.items()})
        return {"": found | {"main_score": found.get("accuracy", found["text_acc"])}}

    def table(self, metrics: Mapping[str, float]) -> list[list[str]]:
        """Returns header and rows of the table of results."""
        header = ["selection [%]", "text", "image", "group", "chance of text", "questions"]
        rows = []
        counts = [f"{metrics['num_questions']:,}", f"{metrics['num_skipped']:,}"]
        keys = [f"{kind}_accuracy" for kind in ("text", "image", "group")]
        values = [f"{metrics[key]:.1f}" if key in metrics else "-" for key in keys]
        rows.append([self.name, *values, f"{metrics['chance']:.1f}", *counts])
        for key in metrics:
            if key.startswith("text_accuracy_") and key not in _BOUNDS:
                rows.append([f"  {key[14:]}", f"{metrics[key]:.1f}", "", "", "", "", ""])
        return [[*header, "skipped"], *rows]


def choice_accuracies(
    cosines: Sequence[np.ndarray], groups: Sequence[str] | None = None
) -> dict[str, float]:
    """Returns `text_accuracy` and `chance`, with several pictures also `image_` and `group_`.

    Text: each picture prefers its caption to all others; image: each of those captions prefers its
    picture; group: both.

    Args:
      cosines: of N questions, [pictures, captions] each; the n-th of both belong together.
      groups: N names; with more than one, accuracies are means over groups.
    """
    image, chance = [], []
    for scores in cosines:
        own = scores.diagonal()
        others = ~np.eye(*scores.shape, dtype=bool)
        square = scores[:, : len(scores)]
        image.append(bool((square < own)[others[:, : len(scores)]].all()))
        chance.append(scores.shape[1] ** -float(len(scores)))
    kinds = {"text_accuracy": is_text_right(cosines), "chance": np.array(chance)}
    if max(len(scores) for scores in cosines) > 1:
        kinds |= {"image_accuracy": np.array(image)}
        kinds |= {"group_accuracy": kinds["text_accuracy"] & kinds["image_accuracy"]}
    names = np.array(groups if groups is not None else [""] * len(cosines))
    return {
        kind: 100 * float(np.mean([hits[names == name].mean() for name in np.unique(names)]))
        for kind, hits in kinds.items()
    }


def is_text_right(cosines: Sequence[np.ndarray]) -> np.ndarray:
    """Returns of each question [N] whether all its pictures prefer their captions to all others."""
    return np.array(
        [
            bool((scores < scores.diagonal()[:, None])[~np.eye(*scores.shape, dtype=bool)].all())
            for scores in cosines
        ]
    )


def _text_interval(questions: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Returns the interval of `text_accuracy`: of each task as many questions are drawn as it has.

    Args:
      questions: of each task whether each is right [N], and the number of its group [N].
    """

    def statistic(*drawn: np.ndarray) -> float:
        means = []
        for rows, (hits, group) in zip(drawn, questions, strict=True):
            counts, sums = np.bincount(group[rows]), np.bincount(group[rows], hits[rows])
            means.append((sums[counts > 0] / counts[counts > 0]).mean())
        return 100 * float(np.mean(means))

    sizes = [len(hits) for hits, _ in questions]
    return bootstrap.statistic_interval("text_accuracy", statistic, *sizes)


class _Views:
    """A source of pictures and parts of pictures; those whose file is missing are left out."""

    def __init__(self, views: Sequence[_View], images: str):
        names = dict.fromkeys(name for name, _ in views)
        self._files = files.open_rows(
            images, [Row(name, "", ("",)) for name in names], images, None, Problems()
        )
        self.problems = self._files.problems
        places = {self._files.key(index): index for index in range(len(self._files))}
        self.views = [view for view in views if printable(view[0]) in places]
        self._places = [places[printable(name)] for name, _ in self.views]

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> Record:
        name, box = self.views[index]
        image = self._files[self._places[index]].image
        if box is not None:
            x, y, width, height = box
            image = decode_image(image)[y : y + height, x : x + width]
        return Record(name, image, ())

    def key(self, index: int) -> str:
        """Returns the name of the picture."""
        return self.views[index][0]

    def stamp(self) -> str:
        """Returns what identity.stamp does."""
        return identity.digest([self._files.stamp(), self.views])


def _read_task(path: str, problems: Problems) -> list[Choice]:
    content = read_json(path)
    entries: Iterable[Any] = content.values() if isinstance(content, dict) else content
    if not isinstance(content, dict | list):
        raise ValueError(f"{path} must hold a list or an object of questions.")
    choices = []
    for number, entry in enumerate(entries):
        choice = _read_choice(entry) if isinstance(entry, dict) else None
        if choice is None:
            problems.add("row_malformed", f"{path}: entry {number}")
        else:
            choices.append(choice)
    if not choices:
        raise ValueError(f"{path} holds no question. {problems}".strip())
    return choices


def _read_choice(entry: Mapping[str, Any]) -> Choice | None:
    if "image_0" in entry:
        views = tuple((entry.get(f"image_{n}"), None) for n in (0, 1))
        captions = tuple(entry.get(f"caption_{n}") for n in (0, 1))
        return Choice(views, captions) if _are_texts([v for v, _ in views], captions) else None
    image, right, wrong = (
        next((entry[key] for key in keys if key in entry), None)
        for keys in (_IMAGE_KEYS, _TRUE_KEYS, _FALSE_KEYS)
    )
    captions = (right, *(wrong if isinstance(wrong, list) else [wrong]))
    if not _are_texts([image], captions) or len(captions) < 2:
        return None
    box = tuple(entry.get(key) for key in _BOX_KEYS)
    if not all(isinstance(side, int) and side >= 0 for side in box) or not min(box[2:]):
        box = None
    group = entry.get("relation_name") or "_".join(map(str, entry.get("attributes", ())))
    return Choice(((posixpath.normpath(image), box),), captions, str(group))


def _are_texts(names: Iterable[Any], captions: Iterable[Any]) -> bool:
    return all(isinstance(text, str) and text for text in (*names, *captions))
