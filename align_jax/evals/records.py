"""Embeddings of a source's images, each read by the process that embeds it; failures counted."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from align_jax.data.images import BadImage, decode_image
from align_jax.data.sources.karpathy import KarpathyImage
from align_jax.data.sources.open_source import LabelledSource, open_labelled
from align_jax.data.sources.record import UNUSABLE_REASONS
from align_jax.run import multihost
from align_jax.storage import identity
from align_jax.storage.problems import Problems, reason_of


class Labelled(NamedTuple):
    """The images of a source that can be read: z [N, D] float32, labels [N] int64."""

    z: np.ndarray
    labels: np.ndarray


class EncodeOnce:
    """A model that keeps what it embeds while several evaluators run, by the stamp of the source.

    It lives for one run of one model, so weights cannot change under it.
    """

    def __init__(self, model: Any):
        """Keeps the model, whose attributes are then its own."""
        self._model = model
        self.kept: dict[str, _Kept] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _Kept:
    """What is known of the images of a source."""

    def __init__(self, length: int):
        self.z: np.ndarray | None = None  # [length, D] float32
        self.is_done = np.zeros(length, bool)
        self.codes = np.zeros(length, np.int64)  # of UNUSABLE_REASONS, from 1
        self.labels = np.full(length, -1)


def encode_records(
    model: Any, source: Any, indices: Sequence[int], problems: Problems
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (z [N, D] float32, is_readable [N] bool); rows that are not readable mean nothing.

    Images are decoded as the model asks for them: in a run of several processes each reads its own
    part, and all get the same result.

    Args:
      model: with `encode_image(functions, on_error="skip")`, see `align.Align`; an `EncodeOnce`
        reads no image of equal data twice.
      source: items with `key` and `image`.
      indices: N, of the items, each once.
      problems: receives what cannot be read, by reason, the same in every process.
    """
    kept = _encode(model, source, indices, problems)
    if kept.z is None:
        return np.zeros((0, 1), np.float32), np.zeros(0, bool)
    return kept.z[indices], kept.codes[indices] == 0


def encode_labelled(model: Any, source: Any, problems: Problems) -> Labelled:
    """Returns embeddings and labels of those images of a labelled source that can be read.

    Args:
      model: see `encode_records`.
      source: items with `key`, `image` and `label`.
      problems: see `encode_records`; also receives those of the source.

    Raises:
      ValueError: there are none.
    """
    problems.merge(getattr(source, "problems", {}))
    kept = _encode(model, source, range(len(source)), problems)
    is_readable = kept.codes == 0
    if kept.z is None or not is_readable.any():
        raise ValueError(f"None of the {len(source)} images can be read: {problems}.")
    return Labelled(kept.z[is_readable], kept.labels[is_readable])


def encode_karpathy(
    model: Any, source: Any, images: Sequence[KarpathyImage], problems: Problems
) -> tuple[np.ndarray, np.ndarray, list[KarpathyImage]]:
    """Returns (z_image [N, D], z_text [M, D], the N images that can be read).

    Rows of z_text are their captions, one image after the other.

    Args:
      model: see `encode_records`.
      source: and
      images: of karpathy.open_karpathy.
      problems: see `encode_records`.

    Raises:
      ValueError: there are none.
    """
    z_image, is_readable = encode_records(model, source, range(len(source)), problems)
    used = [image for image, kept in zip(images, is_readable, strict=True) if kept]
    if not used:
        raise ValueError(f"No image can be read: {problems}.")
    z_text = model.encode_text([text for image in used for text in image.captions])
    return z_image[is_readable], z_text, used


def open_train(train: Any, source: LabelledSource) -> LabelledSource:
    """Returns labelled images to learn from, whose classes are those of `source`.

    Raises:
      ValueError: they cannot be opened, or the classes differ.
    """
    opened = open_labelled(train) if isinstance(train, str) else train
    if tuple(opened.classes) != tuple(source.classes):
        raise ValueError(
            f"train has {len(opened.classes)} classes and source {len(source.classes)}, or they "
            f"have other names or another order: {', '.join(opened.classes[:3])} ... and "
            f"{', '.join(source.classes[:3])} ..."
        )
    return opened


class Learned:
    """What evaluators that learn a classifier from `train` and test it on `source` share."""

    def __init__(self, name: str, source: Any, train: Any):
        """Opens both; see `open_train`."""
        self.name = name
        self.source = open_labelled(source) if isinstance(source, str) else source
        self.train = open_train(train, self.source)
        self.problems = Problems()

    @cached_property
    def stamps(self) -> dict[str, str]:
        """What identifies the data."""
        return {"source": identity.stamp(self.source), "train": identity.stamp(self.train)}

    def embed(self, model: Any) -> tuple[Labelled, Labelled, dict[str, int]]:
        """Returns (train, test, counts of both and of what is left out)."""
        self.problems = Problems()
        test = encode_labelled(model, self.source, self.problems)
        train = encode_labelled(model, self.train, self.problems)
        counts = {
            "num_images": len(test.labels),
            "num_train": len(train.labels),
            "num_classes": len(self.source.classes),
        }
        return train, test, counts | count_problems(self.problems)


def name_of(source: Any, index: int) -> str:
    """Returns what to call a record that cannot be used, without reading it."""
    return source.key(index) if hasattr(source, "key") else f"record {index}"


def count_problems(problems: Problems) -> dict[str, int]:
    """Returns `num_skipped` and `problems/<reason>`, as every evaluator reports them."""
    counts = {f"problems/{reason}": count for reason, count in problems.items()}
    return {"num_skipped": problems.num_lost()} | counts


def _encode(model: Any, source: Any, indices: Sequence[int], problems: Problems) -> _Kept:
    kept = _Kept(len(source))
    if isinstance(model, EncodeOnce):
        kept = model.kept.setdefault(identity.stamp(source), kept)
    missing = [index for index in indices if not kept.is_done[index]]
    if missing:
        codes = np.zeros(len(missing), np.int64)
        labels = np.zeros(len(missing), np.int64)  # from 1
        read = partial(_read, source, codes, labels)
        readers: list[Callable] = [partial(read, row, i) for row, i in enumerate(missing)]
        z = np.asarray(model.encode_image(readers, on_error="skip"), np.float32)
        if kept.z is None:
            kept.z = np.zeros((len(source), z.shape[1]), np.float32)
        kept.z[missing] = z
        kept.codes[missing] = multihost.total(codes)
        kept.labels[missing] = multihost.total(labels) - 1
        kept.is_done[missing] = True
    for index in indices:
        if kept.codes[index]:
            problems.add(UNUSABLE_REASONS[kept.codes[index] - 1], name_of(source, index))
    return kept


def _read(source: Any, codes: np.ndarray, labels: np.ndarray, row: int, index: int) -> np.ndarray:
    key = f"record {index}"
    try:
        item = source[index]
        key = item.key
        labels[row] = 1 + getattr(item, "label", -1)
        return decode_image(item.image)
    except (BadImage, OSError) as error:
        reason = reason_of(error)
        codes[row] = 1 + UNUSABLE_REASONS.index(reason)
        raise BadImage(reason, f"{key}: {error}") from error
