"""One thread that owns the device: it takes what waits, and never waits for more.

While a batch is computed the next one gathers by itself, so batches grow with the load and an idle
server answers at once.
"""

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np

from align_jax.serve.metrics import Metrics

IMAGE, TEXT = "image", "text"

# On CPUs a batch costs as much as its rows, padding included: 5 rows are cheaper as 4 and 1 than
# padded to 8, and texts of 10 tokens are not padded to others' 40. On accelerators a small batch
# costs as much as a larger one.
_LEAST_FULL_ON_CPU = 0.75
_PART_TOKENS = 16


class Prepared(NamedTuple):
    """One input, ready for the device.

    Attributes:
      tower: IMAGE or TEXT.
      arrays: the view, uint8 [S, S, 3]; or ids and mask, int32 [max_tokens] each.
    """

    tower: str
    arrays: tuple[np.ndarray, ...]


@dataclasses.dataclass
class _Job:
    """The inputs of one call; rows of `z` are filled as batches are done."""

    z: list[np.ndarray | None]
    left: int
    future: Future


class _Entry(NamedTuple):
    prepared: Prepared
    job: _Job
    row: int
    since: float


class Batcher:
    """Computes embeddings for many callers at once."""

    def __init__(self, model: Any, metrics: Metrics):
        """Starts the thread.

        Args:
          model: an `Align`.
          metrics: to count batches with.
        """
        self._model = model
        self._metrics = metrics
        self._sizes = model.batch_sizes
        self._least_full = _LEAST_FULL_ON_CPU if jax.default_backend() == "cpu" else 0.0
        self._waiting: dict[str, deque[_Entry]] = {IMAGE: deque(), TEXT: deque()}
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    def submit(self, inputs: Sequence[Prepared]) -> Future:
        """Returns a future of z, float32 [N, D], in the order of the inputs (at least one).

        Cancelling it drops the inputs that are not computed yet.
        """
        job = _Job([None] * len(inputs), len(inputs), Future())
        now = time.monotonic()
        # Texts of like lengths together: a batch costs as much as its longest.
        order = sorted(
            range(len(inputs)),
            key=lambda row: int(inputs[row].arrays[-1].sum()) if inputs[row].tower == TEXT else 0,
        )
        with self._changed:
            if self._is_closed:
                raise RuntimeError("The server has stopped.")
            for row in order:
                entry = _Entry(inputs[row], job, row, now)
                self._waiting[inputs[row].tower].append(entry)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Ends the thread after what it computes now; what waits is cancelled."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (entries := self._take()) and not self._is_closed:
                    self._changed.wait()
            for part in self._parts(entries):
                if self._is_closed:
                    break
                self._compute(part)
            with self._changed:
                if self._is_closed:
                    for entry in [*entries, *self._waiting[IMAGE], *self._waiting[TEXT]]:
                        entry.job.future.cancel()
                    return

    def _take(self) -> list[_Entry]:
        """Returns what has waited longest: of the tower whose first input came first."""
        for queue in self._waiting.values():
            while queue and queue[0].job.future.done():
                queue.popleft()
        queues = [queue for queue in self._waiting.values() if queue]
        if not queues:
            return []
        queue = min(queues, key=lambda queue: queue[0].since)
        live = []
        while queue and len(live) < self._sizes[-1]:
            entry = queue.popleft()
            if not entry.job.future.done():  # its client has gone, or another input failed
                live.append(entry)
        return live

    def _parts(self, entries: list[_Entry]) -> Iterator[list[_Entry]]:
        """Yields the batches to compute: all at once, or those about as long, the longest first."""
        alike: dict[int, list[_Entry]] = {}
        for entry in entries:
            alike.setdefault(self._length(entry), []).append(entry)
        for _, part in sorted(alike.items(), reverse=True):
            while part := [entry for entry in part if not entry.job.future.done()]:
                count = self._count(len(part))
                yield part[:count]
                part = part[count:]

    def _length(self, entry: _Entry) -> int:
        """Returns its tokens where padding costs, in parts of 16, else the same for all.

        Finer parts would pad less, and leave less to compute together.
        """
        if not self._least_full or entry.prepared.tower == IMAGE:
            return 0
        return -(-int(entry.prepared.arrays[-1].sum()) // _PART_TOKENS)

    def _count(self, waiting: int) -> int:
        """Returns how many of those that wait make the next batch."""
        padded = next(size for size in self._sizes if size >= waiting)
        smaller = [size for size in self._sizes if size <= waiting]
        if waiting >= self._least_full * padded or not smaller:
            return waiting
        return smaller[-1]

    def _compute(self, entries: list[_Entry]) -> None:
        tower, start = entries[0].prepared.tower, time.monotonic()
        self._metrics.batch_size.labels(tower).observe(len(entries))
        for entry in entries:
            self._metrics.stage_seconds.labels("wait").observe(start - entry.since)
        try:
            columns = zip(*(entry.prepared.arrays for entry in entries), strict=True)
            arrays = [np.stack(column) for column in columns]
            compute = self._model.encode_views if tower == IMAGE else self._model.encode_tokens
            z = compute(*arrays)
            if not np.isfinite(z).all():
                raise FloatingPointError("The model gave an embedding that is not finite.")
        except BaseException as error:
            for entry in entries:
                _settle(entry.job.future, error=error)
            return
        self._metrics.stage_seconds.labels("device").observe(time.monotonic() - start)
        for entry, row in zip(entries, z, strict=True):
            entry.job.z[entry.row] = row
            entry.job.left -= 1
            if not entry.job.left:
                _settle(entry.job.future, np.stack(entry.job.z))


def _settle(future: Future, result: Any = None, *, error: BaseException | None = None) -> None:
    """Completes a future, unless it was cancelled or has failed already."""
    if future.done() or not future.set_running_or_notify_cancel():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
