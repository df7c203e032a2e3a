"""Units of work for any number of workers: threads and processes here, Apache Beam, Spark.

The input alone decides the units (`plan`), and a unit's result depends on the unit and on what all
share alone. So units may be done by any number of workers, in any order, and again after a crash,
and the files are the same bytes. Workers elsewhere must see the source and the folder of results
under the same paths (a shared or mounted file system), and have align_jax installed.

Beam gets a plain pipeline instead of the writers of TFDS: its BeamWriter orders records by hashed
keys and sends every image over the network, its NoShuffleBeamWriter leaves order and shards to
chance.
"""

import collections
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, TypeVar

from align_jax.data.sources.open_source import PairSource
from align_jax.data.sources.shards import Part

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

T = TypeVar("T")

# (unit, settings) -> an iterator that does the work and yields how much of it is done.
Work = Callable[[Any, Any], Iterator[int]]


@dataclasses.dataclass(frozen=True)
class Unit:
    """Records `start` to `stop` of a PairSource, or all records of a part that `open` opens.

    Attributes:
      number: place among the units.
      source: PairSource, or a part (shards.Part).
      start: first record.
      stop: one after the last record; None for all.
      expected: number of records, for the display of progress.
    """

    number: int
    source: PairSource | Part
    start: int
    stop: int | None
    expected: int

    def open(self) -> tuple[PairSource, range]:
        """Returns the source and which of its records to take."""
        source = self.source.open() if self.stop is None else self.source
        return source, range(self.start, len(source) if self.stop is None else self.stop)


def plan(source: PairSource, step: int) -> list[Unit]:
    """Returns the units of a source: its parts where it has some, else `step` records each."""
    if hasattr(source, "parts"):
        parts = enumerate(source.parts)
        return [Unit(number, part, 0, None, part.num_expected) for number, part in parts]
    units = []
    for start in range(0, len(source), step):
        stop = min(start + step, len(source))
        if hasattr(source, "slice"):  # workers then receive their share of the index only
            unit = Unit(len(units), source.slice(start, stop), 0, stop - start, stop - start)
        else:
            unit = Unit(len(units), source, start, stop, stop - start)
        units.append(unit)
    return units


class Pool:
    """Processes for several calls of `run`; they start when they are first needed.

    Attributes:
      size: number of processes.
    """

    def __init__(self, size: int):
        self.size = size
        self._executor: ProcessPoolExecutor | None = None

    def submit(self, *call: Any) -> Future:
        """Has a function called in one of the processes."""
        if self._executor is None:
            # spawn: a forked copy of threads that hold locks can hang.
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self.size, context, initializer=_start_worker)
        return self._executor.submit(*call)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


def run(
    work: Work,
    units: Sequence[Any],
    settings: Any,
    *,
    num_workers: int = 1,
    beam: str | None = None,
    spark: "SparkSession | None" = None,
    pool: "Pool | None" = None,
) -> Iterator[int]:
    """Does the work of all units; yields how much has been done since, for progress.

    Args:
      work: function of a module, with results in files.
      units: what can be pickled, one for each call; `expected` is how much the work of one is.
      settings: likewise, what all units share.
      num_workers: processes; 1 does the work in this one.
      beam: options of an Apache Beam pipeline that does it instead, as on a command line, e.g.
        "--runner=DirectRunner".
      spark: session whose executors do it instead.
      pool: that has the processes, for several calls; by default they end with the work.

    Raises:
      ValueError: Beam is not installed, or has no such runner or option.
      RuntimeError: a worker died, or the pipeline failed; finished units are kept.
    """
    if not units:
        return
    if beam is not None:
        yield from _on_beam(work, units, settings, beam)
    elif spark is not None:
        yield from _on_spark(work, units, settings, spark)
    elif num_workers > 1 and len(units) > 1:
        with contextlib.nullcontext(pool) if pool else Pool(min(num_workers, len(units))) as used:
            yield from _in_processes(work, units, settings, used)
    else:
        for unit in units:
            yield from work(unit, settings)


def in_order(function: Callable[[Any], T], items: Iterable[Any], num_threads: int) -> Iterator[T]:
    """Yields the function of each item, in order, several at a time.

    Not by Grain, which imports jax: a worker would load it for seconds and hold it for nothing.
    """
    if num_threads == 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(num_threads)
    waiting: collections.deque[Future] = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 4 * num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _on_beam(work: Work, units: Sequence[Any], settings: Any, options: str) -> Iterator[int]:
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ValueError("--beam needs pip install 'align_jax[beam]'.") from error
    pipeline = beam.Pipeline(options=PipelineOptions(shlex.split(options)))
    created = pipeline | "Units" >> beam.Create(list(units))
    spread = created | "Spread" >> beam.Reshuffle()  # else runners give one worker everything
    _ = spread | "Work" >> beam.Map(_finish_unit, work, settings)  # results are files
    try:
        pipeline.run().wait_until_finish()
    except Exception as error:  # of whatever kind the runner lets through
        raise RuntimeError(f"The Beam pipeline failed: {error}") from error
    yield sum(unit.expected for unit in units)


def _on_spark(
    work: Work, units: Sequence[Any], settings: Any, session: "SparkSession"
) -> Iterator[int]:
    spread = session.sparkContext.parallelize(list(units), len(units))
    spread.foreach(functools.partial(_finish_unit, work=work, settings=settings))
    yield sum(unit.expected for unit in units)


def _in_processes(work: Work, units: Sequence[Any], settings: Any, pool: Pool) -> Iterator[int]:
    waiting = iter(units)
    running = set()
    try:
        while True:
            # A few at a time: what is queued is pickled and held in memory.
            while len(running) < 2 * pool.size and (unit := next(waiting, None)) is not None:
                running.add(pool.submit(_finish_unit, unit, work, settings))
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "A worker process died (out of memory?); finished units are kept, run the same "
            "command again, with fewer --workers if need be."
        ) from error
    finally:
        for future in running:
            future.cancel()


def _finish_unit(unit: Any, work: Work, settings: Any) -> int:
    return sum(work(unit, settings))


def _start_worker() -> None:
    """Makes this worker end with its parent, which may be killed, and on Ctrl-C without a word."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
