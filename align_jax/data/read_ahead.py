"""Taking batches from threads and processes, and naming the one that no longer delivers.

Whoever builds a batch notes on a `Board` which record it is at; whoever waits for the batch reads
that note when nothing comes. What a batch holds is pipeline.py's business.
"""

import contextlib
import mmap
import multiprocessing
import os
import queue
import re
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import thread as futures_thread
from typing import Any

import grain
import numpy as np

# A batch that is late is reported; a batch that gets no further for so long fails the run.
LATE_S = 30.0
STUCK_S = 110.0
_POLL_S = 1.0
_CLOSE_S = 3.0  # to finish what is in the making
_DELIVERED = -1


class Board:
    """What each batch being built is at, in a small file that threads and workers share.

    Pickled, it is the name of that file.

    Attributes:
      threads: of this process that have noted something.
    """

    def __init__(self, num_builders: int, num_workers: int):
        """Makes the file.

        Args:
          num_builders: batches that may be built or wait at the same time.
          num_workers: processes that `enter`.
        """
        self._num_builders, self._num_workers = num_builders, num_workers
        descriptor, self._path = tempfile.mkstemp(prefix="align_jax_board_")
        os.truncate(descriptor, 8 * (4 * num_builders + num_workers))
        os.close(descriptor)
        self._map()

    def note(self, step: int, row: int, index: int) -> None:
        """Says that this process is at a row of a step's batch, record `index`.

        Raises:
          RuntimeError: the board is closed, so nobody waits for the batch any more.
        """
        # In this order: either `close` sees this thread, or this thread sees that it is closed.
        self.threads.add(threading.current_thread())
        if self._closed:
            raise RuntimeError("the batches were closed")
        self._rows[step % self._num_builders] = step + 1, os.getpid(), row, index

    def delivered(self, step: int, num_rows: int) -> None:
        """Says that the batch is complete."""
        self.note(step, num_rows, _DELIVERED)

    def enter(self, worker: int) -> None:
        """Says that this process is that worker."""
        self._pids[worker] = os.getpid()

    def read(self, step: int) -> tuple[int, int, int] | None:
        """Returns (pid, row, index) of the step's last note, index -1 at its end; or None."""
        noted, pid, row, index = self._rows[step % self._num_builders].tolist()
        return (pid, row, index) if noted == step + 1 else None

    def pids(self) -> list[int]:
        """Returns the pid of each worker, 0 for one that has not entered yet."""
        return self._pids.tolist()

    def close(self) -> None:
        """Lets no thread of this process begin another row."""
        self._closed = True

    def remove(self) -> None:
        """Removes the file; processes that have it open may go on."""
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._path)

    def __getstate__(self) -> dict[str, Any]:
        return {n: self.__dict__[n] for n in ("_num_builders", "_num_workers", "_path")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def _map(self) -> None:
        self.threads, self._closed = set(), False
        with open(self._path, "r+b") as file:
            content = np.frombuffer(mmap.mmap(file.fileno(), 0), np.int64)
        self._rows = content[: 4 * self._num_builders].reshape(-1, 4)
        self._pids = content[4 * self._num_builders :]


class ReadAhead(Iterator[tuple]):
    """The elements of a dataset whose steps note their work on a board; never waits for ever.

    Where the next element makes no progress for `STUCK_S`, or a worker has died, `next` raises
    a RuntimeError that names worker and record; one that only takes long is reported on standard
    error after `LATE_S` and again after each doubling.
    """

    def __init__(
        self,
        dataset: grain.IterDataset,
        board: Board,
        *,
        first_step: int,
        num_workers: int,
        where: Callable[[int], str],
    ):
        """Reading ahead starts with the first `next`.

        Args:
          dataset: element i is step `first_step` + i; step i is worker i mod `num_workers`'s.
          board: that the steps note their work on.
          first_step: of the first element.
          num_workers: 0 if threads of this process build the elements.
          where: index of a record -> where it is; must not read it.
        """
        self._board, self._where, self._num_workers = board, where, num_workers
        self._first_step = self._step = first_step
        self._elements = queue.Queue(maxsize=1)
        self._stopped = threading.Event()
        self._open = [iter(dataset)]
        self._feeder = threading.Thread(
            target=_feed, args=(self._open[0], self._elements, self._stopped), daemon=True
        )
        self._close = weakref.finalize(
            self, _close, self._open, self._feeder, self._elements, self._stopped, board
        )

    def __next__(self) -> tuple:
        if not self._open:
            raise StopIteration
        if self._feeder.ident is None:
            self._feeder.start()
        element, error = self._wait()
        if error is not None:
            self.close()
            raise error
        self._step += 1
        return element

    def close(self) -> None:
        """Stops the threads and processes; the iterator is then exhausted."""
        self._close()

    def _wait(self) -> tuple[tuple | None, Exception | None]:
        """Returns the next (element, None), or (None, why there is none)."""
        start_s = progress_s = time.monotonic()
        late_s, seen = LATE_S, None
        while True:
            with contextlib.suppress(queue.Empty):
                element, error = self._elements.get(timeout=_POLL_S)
                return element, self._explain(error)
            now_s, note = time.monotonic(), self._board.read(self._step)
            if note != seen:
                seen, progress_s = note, now_s
            if now_s - progress_s >= STUCK_S:
                return None, RuntimeError(
                    f"no training data for {now_s - start_s:.0f} s: step {self._step + 1} waits "
                    f"for {self._who()}, {self._at(note)}; check the storage that it reads from. "
                    "The same command continues from the last checkpoint."
                )
            if now_s - start_s >= late_s:
                late_s *= 2
                print(
                    f"waiting for data for {now_s - start_s:.0f} s: step {self._step + 1} waits "
                    f"for {self._who()}, {self._at(note)}",
                    file=sys.stderr,
                    flush=True,
                )

    def _who(self) -> str:
        if not self._num_workers:
            return f"a data thread of pid {os.getpid()}"
        worker = (self._step - self._first_step) % self._num_workers
        return f"data worker {worker} (pid {self._board.pids()[worker] or 'unknown'})"

    def _at(self, note: tuple[int, int, int] | None) -> str:
        if note is None:
            return "which has not begun it"
        _, row, index = note
        if index == _DELIVERED:
            return "which has built it but not handed it over"
        return f"which is at row {row}, record {index} of {self._where(index)}"

    def _explain(self, error: Exception | None) -> Exception | None:
        # Grain's words for a worker that is gone.
        died = re.match(r"Worker process was terminated .* exit code (-?\d+)", str(error))
        if not died:
            return error
        code = int(died[1])
        reason = " (killed, most often because memory ran out)" if code == -9 else ""
        return RuntimeError(
            f"{self._who()} died with exit code {code}{reason}; step {self._step + 1} waits for "
            f"it, {self._at(self._board.read(self._step))}. Fewer config.data.num_workers or "
            "config.data.num_threads take less memory; the same command continues from the last "
            "checkpoint."
        )


def _feed(
    elements_in: Iterator[tuple], elements_out: queue.Queue, stopped: threading.Event
) -> None:
    """Puts (element, None) for each, then (None, error), until it is stopped."""
    while not stopped.is_set():
        try:
            element, error = _own(next(elements_in)), None
        except Exception as exception:
            element, error = None, exception
        elements_out.put((element, error))
        if error is not None:
            return


def _own(element: tuple) -> tuple:
    # Arrays from workers lie in shared memory, which must not outlive the iterator.
    arrays, *others = element
    owned = {n: a if type(a) is np.ndarray else np.array(a) for n, a in arrays.items()}
    return owned, *others


def _close(
    iterators: list[Iterator],
    feeder: threading.Thread,
    elements: queue.Queue,
    stopped: threading.Event,
    board: Board,
) -> None:
    stopped.set()
    board.close()
    with contextlib.suppress(queue.Empty):  # a feeder that waits for room goes on and stops
        elements.get_nowait()
    if feeder.ident is not None:
        feeder.join(_CLOSE_S)
    if feeder.is_alive():
        pids = board.pids()
        for child in multiprocessing.active_children():
            if child.pid in pids:  # Grain would wait 25 s for each
                child.kill()
    # Grain's iterators close a second time when they are deleted, which fails in a program that
    # is already half torn down: forget them here.
    while iterators:
        iterators.pop().close()
    board.remove()
    end_s = time.monotonic() + _CLOSE_S
    for thread in list(board.threads):
        thread.join(max(0.0, end_s - time.monotonic()))
        if thread.is_alive():
            # Python's end waits for every thread of a pool, even for a daemon as this one is: for
            # ever, if it reads and gets nothing. There is no public way to say otherwise.
            futures_thread._threads_queues.pop(thread, None)
