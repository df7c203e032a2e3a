"""Image-text retrieval: recall at k both ways with one or several captions per image.

Ranks are exact for the embeddings given, whatever the chunk size; NumPy on the host. Drawing the
results is in gallery.py. Source: Jia et al. 2021, section 5.2 (Flickr30K and MSCOCO protocol).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from align_jax.data.images import BadImage, decode_image
from align_jax.data.sources import open_source

# The dot product of two float32 vectors, summed in float64, is known to about 1e-15, whatever the
# order BLAS sums in; different float32 embeddings differ by far more.
TIE_TOLERANCE = 1e-12

_IMAGES_PER_CALL = 256  # decoded images held at once


def retrieval_recalls(
    z_image: np.ndarray,
    z_text: np.ndarray,
    text_to_image: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 256,
) -> dict[str, float]:
    """Returns recalls in percent (0 to 100): `image_to_text_r<k>`, `text_to_image_r<k>`, and more.

    Also `mean_recall` (the mean of them all), `num_images` and `num_captions`. Image to text is a
    hit if any caption of the image is in the top k, text to image if the caption's image is; ties
    are broken against the model, see `retrieval_ranks`.

    Args: see `retrieval_ranks`; ks: cut-offs, at least 1.

    Raises:
      ValueError: see `retrieval_ranks`.

    Source: Jia et al. 2021, table 4; the several-captions rule is that of Karpathy & Li 2015.
    """
    image_ranks, text_ranks = retrieval_ranks(z_image, z_text, text_to_image, chunk)
    recalls = {f"image_to_text_r{k}": 100 * float(np.mean(image_ranks < k)) for k in ks}
    recalls |= {f"text_to_image_r{k}": 100 * float(np.mean(text_ranks < k)) for k in ks}
    mean_recall = float(np.mean(list(recalls.values())))
    counts = {"num_images": len(image_ranks), "num_captions": len(text_ranks)}
    return recalls | {"mean_recall": mean_recall} | counts


def retrieval_ranks(
    z_image: np.ndarray, z_text: np.ndarray, text_to_image: np.ndarray, chunk: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rank (0 is best) of each image's best caption [N] and of each text's image [M].

    The rank of a positive is the number of wrong candidates that score at least as high: a wrong
    candidate with an equal score counts against it, so a model that maps everything to one vector
    scores 0. The other captions of the same image are neither right nor wrong and do not count.
    Scores closer than 1e-12 are equal; they are summed in float64, so that equal embeddings do tie.

    Args:
      z_image: [N, D] float, unit norm.
      z_text: [M, D] float, unit norm.
      text_to_image: [M] int, row of z_image that each text belongs to; every image needs a text.
      chunk: images per block of scores; memory is about chunk x M x 12 bytes.

    Raises:
      ValueError: if shapes disagree, an embedding is not finite, or an image has no text.
    """
    text_to_image = np.asarray(text_to_image)
    _check_embeddings(z_image, z_text, text_to_image)
    z_image = np.asarray(z_image, np.float64)
    z_text = np.asarray(z_text, np.float64)
    num_images, num_texts = len(z_image), len(z_text)
    # [M] score of each true pair, and [N] score of each image's best caption
    pair_score = np.empty(num_texts)
    for start in range(0, num_texts, chunk):
        rows = slice(start, start + chunk)
        pair_score[rows] = np.einsum("md,md->m", z_text[rows], z_image[text_to_image[rows]])
    best_score = np.full(num_images, -np.inf)
    np.maximum.at(best_score, text_to_image, pair_score)

    image_ranks = np.empty(num_images, np.int64)
    text_ranks = np.zeros(num_texts, np.int64)
    for start in range(0, num_images, chunk):
        rows = slice(start, start + chunk)
        scores = z_image[rows] @ z_text.T  # [chunk, M]
        is_wrong = np.arange(num_images)[rows, None] != text_to_image[None, :]
        beats_caption = scores >= best_score[rows, None] - TIE_TOLERANCE
        image_ranks[rows] = np.count_nonzero(beats_caption & is_wrong, axis=1)
        beats_image = scores >= pair_score[None, :] - TIE_TOLERANCE
        text_ranks += np.count_nonzero(beats_image & is_wrong, axis=0)
    return image_ranks, text_ranks


@dataclasses.dataclass(frozen=True)
class RetrievalEmbeddings:
    """What an evaluation embedded: row i of z_image is record `records[i]` of the source."""

    z_image: np.ndarray  # [N, D] float32
    z_text: np.ndarray  # [M, D] float32
    text_to_image: np.ndarray  # [M] int64, row of z_image
    captions: list[str]  # M
    records: list[int]  # N


class Retrieval:
    """Evaluator: recalls of a model over the pairs of a source.

    Args:
      name: prefix of its metrics.
      source: what `align_jax.data.sources.open_source` takes, or an open source.
      max_pairs: evaluate only the first `max_pairs` records (images with all their captions).

    Raises:
      ValueError: if the source cannot be opened or is empty.
    """

    def __init__(self, name: str, source: Any, max_pairs: int | None = None):
        self.name = name
        self.source = open_source(source) if isinstance(source, str) else source
        if max_pairs is not None and max_pairs < 1:
            raise ValueError(f"max_pairs={max_pairs} of evaluator '{name}' must be at least 1.")
        self._num_records = min(len(self.source), max_pairs or len(self.source))
        if not self._num_records:
            raise ValueError(f"The source of evaluator '{name}' holds no record.")
        self.embeddings: RetrievalEmbeddings | None = None

    def __call__(self, model: Any) -> dict[str, float]:
        """Returns the metrics of `retrieval_recalls` and `num_skipped`.

        `num_skipped` counts the records left out: unreadable, not an image, or without a caption.

        Raises:
          ValueError: if no record can be used.
        """
        z_blocks, captions, text_to_image, records = [], [], [], []
        for start in range(0, self._num_records, _IMAGES_PER_CALL):
            images = []
            for index in range(start, min(start + _IMAGES_PER_CALL, self._num_records)):
                read = read_or_none(self.source, index)
                if read is None:
                    continue
                record, image = read
                texts = [caption for caption in record.captions if caption.strip()]
                if texts:
                    text_to_image += [len(records)] * len(texts)
                    captions += texts
                    records.append(index)
                    images.append(image)
            if images:
                z_blocks.append(model.encode_image(images))
        num_skipped = self._num_records - len(records)
        if not records:
            raise ValueError(
                f"None of the {num_skipped} records has both a caption and a readable image."
            )
        self.embeddings = RetrievalEmbeddings(
            z_image=np.concatenate(z_blocks),
            z_text=model.encode_text(captions),
            text_to_image=np.asarray(text_to_image, np.int64),
            captions=captions,
            records=records,
        )
        found = self.embeddings
        recalls = retrieval_recalls(found.z_image, found.z_text, found.text_to_image)
        return recalls | {"num_skipped": num_skipped}

    def load_image(self, row: int) -> np.ndarray:
        """Returns the image [H, W, 3] uint8 of a row of `self.embeddings.z_image`."""
        return decode_image(self.source[self.embeddings.records[row]].image)


def read_or_none(source: Any, index: int) -> tuple[Any, np.ndarray] | None:
    """Returns an item of a source and its image [H, W, 3] uint8; None if either cannot be read."""
    try:
        item = source[index]
        return item, decode_image(item.image)
    except (BadImage, OSError):
        return None


def _check_embeddings(z_image: np.ndarray, z_text: np.ndarray, text_to_image: np.ndarray) -> None:
    if np.ndim(z_image) != 2 or np.ndim(z_text) != 2 or z_image.shape[1] != z_text.shape[1]:
        raise ValueError(
            f"Embeddings must be [N, D] and [M, D]; got {np.shape(z_image)} for images and "
            f"{np.shape(z_text)} for texts."
        )
    if text_to_image.shape != (len(z_text),) or text_to_image.dtype.kind not in "iu":
        raise ValueError(
            f"text_to_image must be [{len(z_text)}] integers, one for each text; got "
            f"{text_to_image.shape} of {text_to_image.dtype}."
        )
    if text_to_image.size and not 0 <= text_to_image.min() <= text_to_image.max() < len(z_image):
        raise ValueError(f"text_to_image must lie in 0..{len(z_image) - 1}, the rows of z_image.")
    num_captions = np.bincount(text_to_image, minlength=len(z_image))
    if not len(z_image) or not num_captions.all():
        missing = np.flatnonzero(num_captions == 0)
        raise ValueError(f"Every image needs a text; without one: {missing[:5].tolist()} ...")
    for what, z in (("image", z_image), ("text", z_text)):
        bad = np.flatnonzero(~np.isfinite(z).all(axis=1))
        if bad.size:
            raise ValueError(
                f"{bad.size} of {len(z)} {what} vectors are not finite; the first is row {bad[0]}."
            )
