"""The training input: a source of pairs becomes an endless stream of host batches (NumPy).

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
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from align_jax.data import images, mixture, read_ahead
from align_jax.storage.problems import reason_of

DROP_REASONS = (
    *images.BAD_IMAGE_REASONS,
    "caption_empty",
    "record_unreadable",
    "caption_not_utf8",
    "caption_too_long",
)  # checkpoints hold their counts in this order: add new ones at the end
_MAX_DRAWS = 100  # records tried for one row; all of them bad means the source is at fault
_MAX_STEPS = 2**48


@dataclasses.dataclass(frozen=True)
class Batch:
    """One process's rows of a global batch, and what was dropped while building them.

    Attributes:
      arrays: for the device. `image` uint8 [b, S, S, 3]; `ids` and `mask` int32 [b, L]; `index`
        int32 [b], the record's index in the source. With `hash_pairs` also `caption_hash` and
        `image_hash`, uint32 [b, 2]: equal captions (or images) have equal hashes.
      dropped: reason (of DROP_REASONS) -> number of records that were drawn, found unusable and
        replaced by another. A bad record is counted each time it is drawn, once an epoch or so.
      dropped_keys: reason -> key of the first such record in this batch.
    """

    arrays: dict[str, np.ndarray]
    dropped: dict[str, int]
    dropped_keys: dict[str, str]


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
    source,
    tokenizer,
    *,
    batch_size: int,
    image_size_px: int,
    resize_px: int,
    resize: str,
    flip: bool,
    max_tokens: int,
    seed: int,
    decode: str = "full",
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
    num_workers: int = 0,
    hash_pairs: bool = False,
) -> BatchIterator:
    """Returns an endless iterator of training batches, from `start_step` on.

    Step s holds positions s*B to (s+1)*B - 1 of the epochs laid end to end, each epoch another
    permutation of the source (a Mixture lays out each of its sources so and takes turns, see
    mixture.Order); process p of P gets the p-th of P equal blocks of those rows. Caption choice,
    crop and flip depend on (seed, position) only. Reading ahead starts with the first batch;
    `close` the iterator when it is no longer needed.

    Args:
      source: a sources.PairSource or a mixture.Mixture, not empty.
      tokenizer: a tokenizer.Tokenizer.
      batch_size: B, over all processes; a multiple of `process_count`.
      image_size_px: side S of the random crop.
      resize_px: side before the crop, at least `image_size_px`.
      resize: method, see images.train_view.
      flip: whether half of the images are mirrored.
      max_tokens: L, including [CLS] and [SEP].
      seed: in [0, 2**32).
      decode: see images.train_view.
      start_step: first step.
      process_index: p.
      process_count: P.
      num_threads: batches built at the same time in each process (or worker); that many and two
        more wait in memory.
      num_workers: processes that build batches; 0 builds them in this process's threads.
      hash_pairs: adds `caption_hash` and `image_hash`.

    Raises:
      ValueError: an empty source, a batch size that P does not divide, a seed out of range, a
        way of decoding that the resize method does not allow.
      RuntimeError: while iterating, when 100 records drawn for one row are all unusable, when a
        worker died, or when a batch gets no further for two minutes; names worker and record.
    """
    if len(source) == 0:
        raise ValueError(f"{source.describe()} holds no pairs; check config.data.source.")
    if batch_size % process_count:
        raise ValueError(
            f"config.train.batch_size={batch_size} is not divisible by {process_count} processes."
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"config.train.seed={seed} must lie in [0, 2**32).")
    images.check_decode(decode, resize)
    # More than can be in the making or waiting: Grain buffers 2 in a worker and 2 of each here.
    board = read_ahead.Board(max(1, num_workers) * (num_threads + 16), num_workers)
    build = _BatchBuilder(
        source=source,
        tokenizer=tokenizer,
        order=mixture.Order(source, seed),
        board=board,
        global_rows=batch_size,
        local_rows=batch_size // process_count,
        first_row=process_index * (batch_size // process_count),
        image_size_px=image_size_px,
        resize_px=resize_px,
        resize=resize,
        decode=decode,
        flip=flip,
        max_tokens=max_tokens,
        seed=seed,
        hash_pairs=hash_pairs,
    )
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

    source: object
    tokenizer: object
    order: mixture.Order
    board: read_ahead.Board
    global_rows: int
    local_rows: int
    first_row: int
    image_size_px: int
    resize_px: int
    resize: str
    decode: str
    flip: bool
    max_tokens: int
    seed: int
    hash_pairs: bool

    def __call__(self, step: int):
        size = self.image_size_px
        arrays = {
            "image": np.empty((self.local_rows, size, size, 3), np.uint8),
            "index": np.empty(self.local_rows, np.int32),
        }
        if self.hash_pairs:
            arrays["caption_hash"] = np.empty((self.local_rows, 2), np.uint32)
            arrays["image_hash"] = np.empty((self.local_rows, 2), np.uint32)
        captions, drops = [], []
        first_position = step * self.global_rows + self.first_row
        for row in range(self.local_rows):
            index, record, image, caption = self._draw(step, row, first_position + row, drops)
            arrays["index"][row] = index
            arrays["image"][row] = image
            captions.append(caption)
            if self.hash_pairs:
                arrays["caption_hash"][row] = _hash(caption.strip().lower().encode())
                arrays["image_hash"][row] = _hash(_image_bytes(record.image))
        arrays["ids"], arrays["mask"] = self.tokenizer.encode(captions, self.max_tokens)
        dropped, dropped_keys = {}, {}
        for reason, key in drops:
            dropped[reason] = dropped.get(reason, 0) + 1
            dropped_keys.setdefault(reason, key)
        self.board.delivered(step, self.local_rows)
        return arrays, dropped, dropped_keys

    def _draw(self, step, row, position, drops):
        reasons = {}
        for attempt in range(_MAX_DRAWS):
            rng = np.random.Generator(np.random.Philox([self.seed, position, attempt]))
            if attempt == 0:
                index = self.order[position]
                peers = self.order.peers(index)
            else:  # of the same source: bad records do not change the weights of a mixture
                index = peers.start + int(rng.integers(len(peers)))
            self.board.note(step, row, index)
            key = f"record {index}"
            try:
                record = self.source[index]
                key = record.key
                caption = _choose_caption(record, rng)
                if caption is not None:
                    return index, record, self._view(record.image, rng), caption
                reason = "caption_empty"
            except (images.BadImage, OSError) as error:
                reason = reason_of(error)
            drops.append((reason, key))
            reasons[reason] = reasons.get(reason, 0) + 1
        counts = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
        raise RuntimeError(
            f"{self.source.describe()}: {_MAX_DRAWS} records drawn for one row are all unusable "
            f"({counts}), the last is {key!r}, {self.source.where(index)}; check config.data."
        )

    def _view(self, image, rng):
        return images.train_view(
            image,
            resize_px=self.resize_px,
            crop_px=self.image_size_px,
            method=self.resize,
            decode=self.decode,
            rng=rng,
            flip=self.flip,
        )


def _choose_caption(record, rng):
    usable = [i for i, caption in enumerate(record.captions) if caption.strip()]
    if not usable:
        return None
    if not record.weights:
        return record.captions[usable[int(rng.integers(len(usable)))]]
    ends = np.cumsum([record.weights[i] for i in usable])
    number = int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))
    return record.captions[usable[min(number, len(usable) - 1)]]


def _hash(data):
    return np.frombuffer(hashlib.blake2b(data, digest_size=8).digest(), np.uint32)


def _image_bytes(image):
    if isinstance(image, np.ndarray):
        return repr(image.shape).encode() + image.tobytes()
    return image


def _init_worker(board, worker_index, worker_count):
    board.enter(worker_index)
    # The parent decides what Ctrl-C and SIGTERM mean (it saves first), then stops the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent():
    # A parent killed by SIGKILL cannot stop its workers.
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
