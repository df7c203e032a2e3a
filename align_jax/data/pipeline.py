"""The training input: a source of pairs, or of labelled images, becomes an endless stream of host
batches (NumPy).

The global batch of a step is a pure function of (source, seed, step, settings): no iterator state
is saved, a resumed run starts at its step, and neither the number of processes, workers nor
threads changes a byte. Which record a position holds is decided in mixture.py; moving batches to
devices is done elsewhere (mesh.py, train.py).
"""

import dataclasses
import functools
import hashlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from align_jax.data import augment, images, inception, mixture, read_ahead, row_generators
from align_jax.data.image_embeddings import ImageEmbeddings
from align_jax.data.loans import Loans
from align_jax.data.sources.classes import Classes
from align_jax.data.sources.open_source import PairSource
from align_jax.data.sources.record import UNUSABLE_REASONS, LabelledImage, Record, is_usable
from align_jax.data.tokenizer import Tokenizer
from align_jax.storage.problems import reason_of

DROP_REASONS = UNUSABLE_REASONS
_MAX_DRAWS = 100  # records tried for one row; all of them bad means the source is at fault
_MAX_STEPS = 2**48


@dataclasses.dataclass(frozen=True)
class Batch:
    """A process's rows of a global batch, and what was dropped while building them.

    Attributes:
      arrays: for the device. `image` uint8 [b, S, S, 3], or its embedding `z_image` float32 [b, D]
        where those are given; `ids` and `mask` int32 [b, L]; `index`
        int32 [b], the record's index in the source. With `hash_pairs` also `caption_hash` and
        `image_hash`, uint32 [b, 2]: equal captions (or images) have equal hashes. Of labelled
        images, `label` int32 [b] takes the place of `ids` and `mask`.
      dropped: reason (of DROP_REASONS) -> number of records that were drawn, found unusable and
        replaced by another. A bad record is counted each time it is drawn, once an epoch or so.
      dropped_keys: reason -> key of the first such record in this batch.
    """

    arrays: dict[str, np.ndarray]
    dropped: dict[str, int]
    dropped_keys: dict[str, str]


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """All that the bytes of a process's batches depend on, next to the source and the tokenizer.

    Attributes:
      batch_size: B, over all processes.
      seed: in [0, 2**32).
      image_size: side S of the random crop, in pixels.
      resize_size: side before the crop, at least `image_size`.
      resize, decode: see images.train_view.
      crop: "random", see images.train_view, or "inception", see inception.inception_view.
      crop_min_area: of the latter.
      flip: whether half of the images are mirrored.
      color_jitter, grayscale: see augment.change_color.
      downscale: share of the views that augment.lose_detail reduces.
      max_tokens: L, including [CLS] and [SEP].
      hash_pairs: adds `caption_hash` and `image_hash`.
      rows: which of the B rows the batches hold, in this order.
    """

    batch_size: int
    seed: int
    image_size: int
    resize_size: int
    resize: str
    decode: str
    crop: str
    crop_min_area: float
    flip: bool
    color_jitter: float
    grayscale: float
    downscale: float
    max_tokens: int
    hash_pairs: bool
    rows: tuple[int, ...]


class BatchIterator(Iterator[Batch]):
    """Batches read ahead by threads or processes, which `close` (or the program's end) stops."""

    def __init__(self, elements: read_ahead.ReadAhead):
        self._elements = elements

    def __next__(self) -> Batch:
        return Batch(*next(self._elements))

    def close(self) -> None:
        """Stops the threads and processes; the iterator is then exhausted."""
        self._elements.close()


def train_batches(
    source: PairSource | Classes,
    tokenizer: Tokenizer | None,
    config: ConfigDict,
    *,
    batch_size: int,
    seed: int,
    hash_pairs: bool = False,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    embeddings: ImageEmbeddings | None = None,
) -> BatchIterator:
    """Returns an endless iterator of training batches, from `start_step` on.

    Step s holds positions s*B to (s+1)*B - 1 of the epochs laid end to end, each epoch another
    permutation of the source (a Mixture lays out each of its sources so and takes turns, see
    mixture.Order); a process gets the `rows` of it that its devices hold. Caption choice, crop and
    flip depend on (seed, position) only. Reading ahead starts with the first batch;
    `close` the iterator when it is no longer needed.

    Args:
      source: a PairSource, a mixture.Mixture or a classes.Classes, not empty.
      tokenizer: of the model; None for labelled images.
      config: group `data`, of which `num_threads` batches are built at the same time in each of
        `num_workers` processes (0: in this one); that many and two more wait in memory.
      batch_size, seed, hash_pairs: see `BatchSpec`.
      start_step: first step.
      rows: of the B rows, those that this process needs; None needs all.
      embeddings: of the images of the source, to be given in their stead.

    Raises:
      ValueError: an empty source, a seed out of range, a way of decoding that the resize method
        does not allow.
      RuntimeError: while iterating, when 100 records drawn for one row are all unusable, when a
        worker died, or when a batch gets no further for two minutes; names worker and record.
    """
    if len(source) == 0:
        raise ValueError(f"{source.describe()} holds no pairs; check config.data.source.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"config.train.seed={seed} must lie in [0, 2**32).")
    images.check_decode(config.decode, config.resize)
    names = {field.name for field in dataclasses.fields(BatchSpec)}
    spec = BatchSpec(
        batch_size=batch_size,
        seed=seed,
        hash_pairs=hash_pairs,
        rows=tuple(range(batch_size) if rows is None else map(int, rows)),
        **{name: value for name, value in config.items() if name in names},
    )
    num_threads, num_workers = config.num_threads, config.num_workers
    # More than can be in the making or waiting: Grain buffers 2 in a worker and 2 of each here.
    board = read_ahead.Board(max(1, num_workers) * (num_threads + 16), num_workers)
    if embeddings is None:
        shape, dtype = (spec.image_size, spec.image_size, 3), np.uint8
    else:
        shape, dtype = (embeddings.dim,), np.float32
    memory = Loans((len(spec.rows), *shape), dtype, most_idle=num_threads + 2)
    order = mixture.Order(source, seed)
    build = _BatchBuilder(source, tokenizer, order, board, spec, embeddings, memory)
    # One element is one batch, so threads and workers can only change who builds it.
    dataset = grain.MapDataset.range(start_step, _MAX_STEPS).map(build)
    dataset = dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads)
    )
    if num_workers:
        # Grain reads its own absl flags here, which fails in programs that do not use absl.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2),
            worker_init_fn=functools.partial(_init_worker, board),
        )
    return BatchIterator(
        read_ahead.ReadAhead(
            dataset,
            board,
            first_step=start_step,
            num_workers=num_workers,
            where=source.where,
        )
    )


@dataclasses.dataclass(frozen=True)
class _BatchBuilder:
    """Callable step -> (arrays, dropped, dropped_keys); sent to the workers by pickle."""

    source: PairSource | Classes
    tokenizer: Tokenizer | None
    order: mixture.Order
    board: read_ahead.Board
    spec: BatchSpec
    embeddings: ImageEmbeddings | None
    memory: Loans

    def __call__(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, int], dict[str, str]]:
        spec, num_rows = self.spec, len(self.spec.rows)
        views = self.memory.empty()
        arrays = {"image" if self.embeddings is None else "z_image": views}
        positions = step * spec.batch_size + np.array(spec.rows)
        indices = self.order.take(positions).tolist()
        keys = row_generators.philox_keys(spec.seed, positions)
        generator = row_generators.RowGenerator()
        arrays["index"] = np.empty(num_rows, np.int32)
        if self.tokenizer is None:
            arrays["label"] = np.empty(num_rows, np.int32)
        if spec.hash_pairs:
            arrays["caption_hash"] = np.empty((num_rows, 2), np.uint32)
            arrays["image_hash"] = np.empty((num_rows, 2), np.uint32)
        captions, drops = [], []
        for row, position in enumerate(positions.tolist()):
            rng = generator.at(keys[row])
            indices[row], record, caption = self._fill(
                views[row], step, row, position, indices[row], rng, drops
            )
            captions.append(caption)
            if self.tokenizer is None:
                arrays["label"][row] = record.label
            if spec.hash_pairs:
                arrays["caption_hash"][row] = _hash(caption.strip().lower().encode())
                arrays["image_hash"][row] = _hash(_image_bytes(record.image))
        arrays["index"][:] = indices
        if self.tokenizer is not None:
            arrays["ids"], arrays["mask"] = self.tokenizer.encode(captions, spec.max_tokens)
        dropped, dropped_keys = {}, {}
        for reason, key in drops:
            dropped[reason] = dropped.get(reason, 0) + 1
            dropped_keys.setdefault(reason, key)
        self.board.delivered(step, num_rows)
        return arrays, dropped, dropped_keys

    def _fill(
        self,
        view: np.ndarray,
        step: int,
        row: int,
        position: int,
        index: int,
        rng: np.random.Generator,
        drops: list[tuple[str, str]],
    ) -> tuple[int, Record | LabelledImage, str]:
        """Returns (index, record, caption) of a row, after its `view`, see Batch, is written.

        `index` and `rng` are those that its position begins with. Appends (reason, key) of each
        record that could not be used to `drops`.
        """
        reasons = Counter()
        for attempt in range(_MAX_DRAWS):
            if attempt:  # of the same source: bad records do not change the weights of a mixture
                rng = np.random.Generator(np.random.Philox([self.spec.seed, position, attempt]))
                peers = self.order.peers(index)
                index = peers.start + int(rng.integers(len(peers)))
            self.board.note(step, row, index)
            key = f"record {index}"
            try:
                record = self.source[index]
                key = record.key
                caption = "" if self.tokenizer is None else _choose_caption(record, rng)
                if caption is not None:
                    self._write_view(view, index, record.image, rng)
                    return index, record, caption
                reason = "caption_empty"
            except (images.BadImage, OSError) as error:
                reason = reason_of(error)
            drops.append((reason, key))
            reasons[reason] += 1
        counts = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
        raise RuntimeError(
            f"{self.source.describe()}: {_MAX_DRAWS} records drawn for one row are all unusable "
            f"({counts}), the last is {key!r}, {self.source.where(index)}; check config.data."
        )

    def _write_view(
        self, view: np.ndarray, index: int, image: bytes | np.ndarray, rng: np.random.Generator
    ) -> None:
        if self.embeddings is not None:
            view[...] = self.embeddings[index]
            return
        self._write_crop(view, image, rng)
        jitter, grayscale = self.spec.color_jitter, self.spec.grayscale
        if jitter or grayscale:
            view[...] = augment.change_color(view, jitter=jitter, grayscale=grayscale, rng=rng)
        if self.spec.downscale:
            view[...] = augment.lose_detail(view, share=self.spec.downscale, rng=rng)

    def _write_crop(
        self, view: np.ndarray, image: bytes | np.ndarray, rng: np.random.Generator
    ) -> None:
        if self.spec.crop == "inception":
            view[...] = inception.inception_view(
                image,
                crop_px=self.spec.image_size,
                min_area=self.spec.crop_min_area,
                method=self.spec.resize,
                rng=rng,
                flip=self.spec.flip,
            )
        else:
            images.train_view(
                image,
                resize_px=self.spec.resize_size,
                crop_px=self.spec.image_size,
                method=self.spec.resize,
                decode=self.spec.decode,
                rng=rng,
                flip=self.spec.flip,
                out=view,
            )


def _choose_caption(record: Record, rng: np.random.Generator) -> str | None:
    """Returns one of the captions that are not blank, by their weights; None if all are."""
    usable = [i for i, caption in enumerate(record.captions) if is_usable(caption)]
    if not usable:
        return None
    if not record.weights:
        return record.captions[usable[int(rng.integers(len(usable)))]]
    ends = np.cumsum([record.weights[i] for i in usable])
    number = int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))
    return record.captions[usable[min(number, len(usable) - 1)]]


def _hash(data: bytes) -> np.ndarray:
    """Returns uint32 [2]."""
    return np.frombuffer(hashlib.blake2b(data, digest_size=8).digest(), np.uint32)


def _image_bytes(image: bytes | np.ndarray) -> bytes:
    if isinstance(image, np.ndarray):
        return repr(image.shape).encode() + image.tobytes()
    return image


def _init_worker(board: read_ahead.Board, worker_index: int, worker_count: int) -> None:
    board.enter(worker_index)
    # The parent decides what Ctrl-C and SIGTERM mean (it saves first), then stops the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # A parent killed by SIGKILL cannot stop its workers.
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
