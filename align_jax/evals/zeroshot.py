"""Zero-shot classification: class vectors from prompts, accuracy of images against them.

The prompts themselves are in templates.py. Source: Jia et al. 2021, section 5.3.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from align_jax.data.sources.open_source import open_labelled
from align_jax.evals import presets
from align_jax.evals.accuracy import rank_accuracy, reported_accuracy
from align_jax.evals.peers import renamed
from align_jax.evals.ranking import pair_ranks
from align_jax.evals.records import count_problems, encode_labelled
from align_jax.evals.templates import SIMPLE, load_templates
from align_jax.evals.top_k import top_k
from align_jax.storage import identity
from align_jax.storage.problems import Problems

TIES = ("index", "against")


def class_vectors(
    encode_text: Callable[[Sequence[str]], np.ndarray],
    class_names: Sequence[str | Sequence[str]],
    templates: Sequence[str],
) -> np.ndarray:
    """Returns one vector a class, [C, D] float32, unit norm.

    The order: embed every prompt with unit norm, average over the templates, normalise the mean.
    Otherwise a class whose prompts disagree would have a shorter vector and lower scores.

    Args:
      encode_text: texts to [N, D] embeddings of unit norm.
      class_names: C names, put where a template has `{}`; or lists of several names of a class.
      templates: T templates; C x T prompts are encoded.

    Raises:
      ValueError: if a template has no `{}`, there is no class, or a mean has no direction.

    Source: the order of CLIP_benchmark; Jia et al. 2021 average the embeddings of 80 prompts and do
    not say whether the mean is normalised.
    """
    templates = load_templates(tuple(templates))
    if not class_names:
        raise ValueError("Zero-shot classification needs at least one class name.")
    names = [[name] if isinstance(name, str) else list(name) for name in class_names]
    prompts = [t.replace("{}", name) for group in names for name in group for t in templates]
    z_prompt = np.asarray(encode_text(prompts), np.float32)
    ends = np.cumsum([len(group) * len(templates) for group in names])
    parts = np.split(z_prompt, ends[:-1])
    z_class = np.stack([part.mean(axis=0) for part in parts])  # [C, D]
    norm = np.linalg.norm(z_class, axis=1, keepdims=True)
    # Prompts that cancel leave rounding noise of about 1e-8 a component.
    bad = np.flatnonzero(~(norm[:, 0] > 1e-6))
    if bad.size:
        raise ValueError(
            f"The prompts of class {class_names[bad[0]]!r} have no mean direction: their "
            "embeddings cancel or are not finite."
        )
    return z_class / norm


def zeroshot_accuracy(
    z_image: np.ndarray,
    z_class: np.ndarray,
    labels: np.ndarray,
    ks: Sequence[int] = (1, 5),
    ties: str = "against",
) -> dict[str, float]:
    """Returns accuracies in percent (0 to 100): `top<k>` and `mean_per_class`.

    A `top<k>` above 1 is left out where there are not more than k classes. `mean_per_class` is the
    mean of the top-1 accuracies of the classes that occur.

    Args:
      z_image: [N, D] float32, unit norm.
      z_class: [C, D] float32, unit norm.
      labels: [N] int in 0..C-1.
      ks: cut-offs.
      ties: "index", of equal scores that of the lower class comes first, as in the peers' code; or
        "against" the model: all other classes that score as high as the label come before it, see
        `ranking.pair_ranks`, so a model that maps everything to one vector scores 0.

    Raises:
      ValueError: if shapes disagree, there is no image, a label is out of range or an embedding
        is not finite.
    """
    ks = [k for k in ks if k == 1 or len(z_class) > k]
    ranks = label_ranks(z_image, z_class, labels, max(ks), ties)
    return rank_accuracy(ranks, np.asarray(labels), len(z_class), ks)


def label_ranks(
    z_image: np.ndarray, z_class: np.ndarray, labels: np.ndarray, most: int, ties: str
) -> np.ndarray:
    """Returns the place of each image's label [N] among the classes, see `zeroshot_accuracy`.

    It is exact below `most`; with ties by index, all others are one number of at least `most`.
    """
    z_image, labels = np.asarray(z_image), np.asarray(labels)
    _check_labelled(z_image, z_class, labels)
    if ties == "against":
        _, ranks = pair_ranks(z_class, z_image, labels)
        return ranks
    nearest, _ = top_k(z_image, z_class, min(most, len(z_class)))
    is_label = nearest == labels[:, None]
    return np.where(is_label.any(axis=1), is_label.argmax(axis=1), len(z_class))


class ZeroShot:
    """Evaluator: zero-shot accuracy of a model over a labelled source.

    Args:
      name: prefix of its metrics.
      source: what `open_labelled` takes, or an open labelled source.
      templates: see `load_templates`.
      class_names: words for the classes, in label order; the source's own names by default. Several
        names of a class are a list: the prompts of all of them are averaged. Or one of
        presets.NAMES.
      ties: see `zeroshot_accuracy`.

    Raises:
      ValueError: if the source or the templates cannot be read, or the number of names is wrong.
    """

    def __init__(
        self,
        name: str,
        source: Any,
        templates: str | Sequence[str] = SIMPLE,
        class_names: str | Sequence[str | Sequence[str]] | None = None,
        ties: str = "index",
    ):
        self.name = name
        self.source = open_labelled(source) if isinstance(source, str) else source
        self.templates = load_templates(templates)
        if ties not in TIES:
            raise ValueError(f"ties={ties!r} is unknown; use one of: {', '.join(TIES)}.")
        self.ties = ties
        names = self.source.classes if class_names is None else class_names
        if isinstance(names, str):
            names = presets.class_names(names)
        self.class_names = tuple(n if isinstance(n, str) else tuple(n) for n in names)
        if len(self.class_names) != len(self.source.classes):
            raise ValueError(
                f"Evaluator '{name}' has {len(self.class_names)} class_names, its source "
                f"{len(self.source.classes)} classes; give one name for each class."
            )
        self.problems = Problems()
        if not len(self.source):
            raise ValueError(f"The source of evaluator '{name}' holds no image.")

    def __call__(self, model: Any) -> dict[str, float]:
        """Returns `top1` with its interval `top1_low`, `top1_high`, `top5`, `mean_per_class`
        (percent), `num_images`, `num_classes`, `num_skipped`, the images left out or missing, and
        `problems/<reason>`; where several classes have the same words, `num_repeated_names`.

        Raises:
          ValueError: if no image can be read.
        """
        z_class = class_vectors(model.encode_text, self.class_names, self.templates)
        self.problems = Problems()
        images = encode_labelled(model, self.source, self.problems)
        counts = {"num_images": len(images.labels), "num_classes": len(self.class_names)}
        # Classes of the same words cannot be told apart: ties decide between them.
        if repeated := len(self.class_names) - len(set(self.class_names)):
            counts["num_repeated_names"] = repeated
        ranks = label_ranks(images.z, z_class, images.labels, 5, self.ties)
        metrics = reported_accuracy(ranks, images.labels, len(self.class_names))
        return metrics | counts | count_problems(self.problems)

    @cached_property
    def stamps(self) -> dict[str, Any]:
        """What identifies the data, and the words in use."""
        return {
            "source": identity.stamp(self.source),
            "templates": self.templates,
            "class_names": self.class_names,
        }

    def clip_benchmark(self, metrics: Mapping[str, float]) -> tuple[str, dict[str, float]]:
        """Returns task and metrics of CLIP_benchmark; acc5 is left out where it writes NaN."""
        names = {"acc1": "top1", "acc5": "top5", "mean_per_class_recall": "mean_per_class"}
        return "zeroshot_classification", renamed(metrics, names)

    def mteb(self, metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Returns the scores of MTEB's zero-shot task."""
        return {"ZeroShot": renamed(metrics, {"accuracy": "top1", "main_score": "top1"})}

    def open_clip(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Returns metrics as open_clip's evaluation calls them."""
        start = f"{self.name.replace('_', '')}-zeroshot-val"
        return renamed(metrics, {f"{start}-top1": "top1", f"{start}-top5": "top5"})

    def table(self, metrics: Mapping[str, float]) -> list[list[str]]:
        """Returns header and rows of the table of results."""
        header = ["zero-shot [%]", "top-1", "top-5", "mean per class"]
        top5 = f"{metrics['top5']:.1f}" if "top5" in metrics else "-"
        row = [self.name, f"{metrics['top1']:.1f}", top5, f"{metrics['mean_per_class']:.1f}"]
        row.append(f"{100 / metrics['num_classes']:.1f}")
        row += [f"{metrics[key]:,}" for key in ("num_classes", "num_images", "num_skipped")]
        return [[*header, "chance top-1", "classes", "images", "skipped"], row]


def _check_labelled(z_image: np.ndarray, z_class: np.ndarray, labels: np.ndarray) -> None:
    if z_image.ndim != 2 or np.ndim(z_class) != 2 or z_image.shape[1] != z_class.shape[1]:
        raise ValueError(
            f"Embeddings must be [N, D] and [C, D]; got {z_image.shape} for images and "
            f"{np.shape(z_class)} for classes."
        )
    if labels.shape != (len(z_image),) or not labels.size or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels must be [{len(z_image)}] integers, one for each image and at least one; got "
            f"{labels.shape} of {labels.dtype}."
        )
    if not 0 <= labels.min() <= labels.max() < len(z_class):
        raise ValueError(
            f"labels must lie in 0..{len(z_class) - 1}; got {labels.min()} to {labels.max()}."
        )
    if not (np.isfinite(z_image).all() and np.isfinite(z_class).all()):
        raise ValueError("An image or class embedding is not finite.")
