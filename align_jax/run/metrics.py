"""What a run writes while it trains: metric lines, timing lines, TensorBoard, a progress line.

metrics.jsonl holds only values that equal runs reproduce, so a resumed run's file is byte-identical
to an uninterrupted run's. Anything measured with a clock goes to perf.jsonl. Plots are in plots.py.
Only process 0 of a multi-process run creates these objects.
"""

import io
import json
import math
import os
import shutil
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from align_jax.storage import writing

_WINDOW_S = 30.0  # long enough to smooth a slow step, short enough to follow a change
_TERMINAL_PERIOD_S = 0.2


class MetricWriter:
    """Appends metric lines to `workdir/metrics.jsonl` and the same values to TensorBoard.

    Write everything that belongs to step k before checkpoint k is saved: a resumed run continues
    after its checkpoint and never writes the lines of earlier steps again.

    Args:
      workdir: folder of the run; created where missing.
      resume_step: step of the restored checkpoint: lines of later steps, and a last line torn by a
        kill, are cut off. None starts both files anew.
      every: steps between training lines, to notice that the last ones are missing.
      log: prints a line.

    Raises:
      ValueError: if a kept file holds a line that is no metric line (the torn last one excepted).
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        resume_step: int | None,
        every: int = 1,
        log: Callable[[str], None] = print,
    ):
        self._workdir = Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._open(resume_step)
        if resume_step is not None:
            _report_hole(self._workdir / "metrics.jsonl", resume_step, every, log)

    def rewind(self, step: int) -> None:
        """Cuts off the lines of later steps: the run goes back to this one."""
        self.close()
        self._open(step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line `{"step": step, ...}` with sorted keys; values must be reproducible.

        Args:
          step: number of updates done.
          values: scalars (Python, NumPy or JAX). Integers stay integers; a non-finite float is
            written as null, since JSON has no NaN.
        """
        self._append(self._metrics, step, values)

    def write_timing(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line to perf.jsonl: values that a clock measured (rates, seconds, shares).

        `unix_s`, seconds since 1970, is in the line alone.
        """
        self._append(self._perf, step, values)

    def sync(self) -> None:
        """Returns when all lines are on disk: call it before a checkpoint that counts on them."""
        for file in (self._metrics, self._perf):
            os.fsync(file.fileno())

    def close(self) -> None:
        """Closes all files; closing twice is harmless."""
        self._metrics.close()
        self._perf.close()
        self._tensorboard.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _open(self, resume_step: int | None) -> None:
        self._metrics = _open_lines(self._workdir / "metrics.jsonl", resume_step)
        self._perf = _open_lines(self._workdir / "perf.jsonl", resume_step)
        next_step = 0 if resume_step is None else resume_step + 1
        self._tensorboard = _TensorBoardFile(self._workdir / "tensorboard", next_step)

    def _append(self, file: TextIO, step: int, values: Mapping[str, Any]) -> None:
        if "step" in values:
            raise ValueError("The metric name 'step' is taken by the line's own step; rename it.")
        scalars = {key: _scalar(key, values[key]) for key in sorted(values)}
        line = {"step": int(step)}
        for key, value in scalars.items():
            line[key] = value if math.isfinite(value) else None
        # One write call a line: a kill can tear the last line but not mix two.
        file.write(json.dumps(line, allow_nan=False) + "\n")
        file.flush()
        scalars.pop("unix_s", None)  # TensorBoard has the time of each value
        self._tensorboard.write(int(step), scalars)


class NoWriter:
    """Takes the place of a `MetricWriter` in the processes that write nothing."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Does nothing."""

    write_timing = write

    def rewind(self, step: int) -> None:
        """Does nothing."""

    def sync(self) -> None:
        """Does nothing."""

    close = sync


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl or perf.jsonl as dicts, in file order.

    A last line torn by a kill is left out, so the file of a running job can be read.

    Raises:
      ValueError: if another line is no JSON object with an integer `step`.
    """
    return [line for _, line in _parse_lines(Path(path))]


class Progress:
    """Prints one progress line: rewritten in place on a terminal, one line a period otherwise.

    Rate and time left come from the last half minute only, and the time before the first update
    (compilation) is not in them.

    Args:
      total_steps: step at which the run ends.
      batch_size: global batch size in pairs.
      stream: where to print; standard error by default.
      period_s: seconds between lines where `stream` is no terminal.
      clock: monotonic seconds.
      silent: whether to print nothing at all, as all processes but one do.
      note: seconds of a step -> what else the line says; "" for nothing.
    """

    def __init__(
        self,
        total_steps: int,
        batch_size: int,
        *,
        silent: bool = False,
        stream: TextIO | None = None,
        period_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        note: Callable[[float], str] = lambda step_time_s: "",
    ):
        self._total_steps, self._note = total_steps, note
        self._batch_size = batch_size
        self._stream = sys.stderr if stream is None else stream
        if silent:
            self._stream = io.StringIO()
        self._is_terminal = self._stream.isatty()
        self._period_s = _TERMINAL_PERIOD_S if self._is_terminal else period_s
        self._clock = clock
        self._window: deque[tuple[float, int, float]] = deque()  # time in s, step, data wait in s
        self._printed_at_s = -math.inf
        self._line_is_open = False

    def update(self, step: int, loss: float, data_wait_s: float = 0.0) -> None:
        """Records that `step` is done and prints when a line is due.

        Args:
          step: number of updates done.
          loss: loss of that step.
          data_wait_s: seconds spent waiting for input since the last update.
        """
        now_s = self._clock()
        self._window.append((now_s, step, data_wait_s))
        while len(self._window) > 2 and now_s - self._window[0][0] > _WINDOW_S:
            self._window.popleft()
        if now_s - self._printed_at_s >= self._period_s or step >= self._total_steps:
            self._printed_at_s = now_s
            self._print(step, loss)

    def timing(self) -> dict[str, float]:
        """Returns `perf/pairs_per_s`, `perf/step_time_s` and `perf/data_wait_share` (0 to 1).

        The dict is empty until two steps are done.
        """
        if len(self._window) < 2:
            return {}
        (start_s, start_step, wait_before_s), (end_s, end_step, _) = (
            self._window[0],
            self._window[-1],
        )
        if end_step <= start_step or end_s <= start_s:
            return {}
        step_time_s = (end_s - start_s) / (end_step - start_step)
        data_wait_s = sum(wait_s for _, _, wait_s in self._window) - wait_before_s
        return {
            "perf/pairs_per_s": self._batch_size / step_time_s,
            "perf/step_time_s": step_time_s,
            "perf/data_wait_share": min(1.0, data_wait_s / (end_s - start_s)),
        }

    def restart(self) -> None:
        """Forgets the recent steps: call it after a pause that is no training (an evaluation)."""
        self._window.clear()

    def log(self, text: str) -> None:
        """Prints text on lines of its own without tearing the progress line."""
        self.close()
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends the line that is being rewritten."""
        if self._line_is_open:
            self._stream.write("\n")
            self._stream.flush()
            self._line_is_open = False

    def _print(self, step: int, loss: float) -> None:
        timing = self.timing()
        step_time_s = timing.get("perf/step_time_s")
        line = format_progress(
            step,
            self._total_steps,
            loss,
            pairs_per_s=timing.get("perf/pairs_per_s"),
            data_wait_share=timing.get("perf/data_wait_share"),
            time_left_s=None if step_time_s is None else (self._total_steps - step) * step_time_s,
            note="" if step_time_s is None else self._note(step_time_s),
        )
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1  # a full line would wrap
            self._stream.write("\r\x1b[K" + line[:width])
            self._line_is_open = True
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


def format_progress(
    step: int,
    total_steps: int,
    loss: float,
    *,
    pairs_per_s: float | None,
    data_wait_share: float | None,
    time_left_s: float | None,
    note: str = "",
) -> str:
    """Returns the progress line; figures that are None (not known yet) are left out.

    Args:
      data_wait_share: part of the time spent waiting for input, 0 to 1.
      note: goes before the time left.
    """
    width = len(str(total_steps))
    parts = [f"step {step:>{width}}/{total_steps}", f"loss {loss:.4f}"]
    if pairs_per_s is not None:
        parts.append(f"{pairs_per_s:,.{0 if pairs_per_s >= 100 else 1}f} pairs/s")
    if data_wait_share is not None:
        parts.append(f"data wait {100 * data_wait_share:.0f} %")
    if note:
        parts.append(note)
    if time_left_s is not None:
        parts.append(f"time left {format_duration(time_left_s)}")
    return "  ".join(parts)


def format_duration(seconds: float) -> str:
    """Returns a duration in its two largest units, e.g. `42 s`, `3 min 05 s`, `2 h 14 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    minutes = seconds // 60
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = minutes // 60
    return f"{hours // 24} d {hours % 24:02d} h"


class _TensorBoardFile:
    """One event file, in TensorBoard's record format, written without loading TensorFlow."""

    def __init__(self, folder: Path, next_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "wb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        # Makes TensorBoard forget what an earlier process logged for the steps now done again.
        self._write(step=next_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=key, simple_value=value) for key, value in scalars.items()]
        self._write(step=step, summary=Summary(value=values))

    def close(self) -> None:
        self._file.close()

    def _write(self, **fields: int | str | Summary | SessionLog) -> None:
        event = Event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())
        self._file.flush()


def _open_lines(path: Path, resume_step: int | None) -> TextIO:
    kept = []
    if resume_step is not None and path.exists():
        kept = [raw for raw, line in _parse_lines(path) if line["step"] <= resume_step]
    writing.write_bytes(path, b"".join(raw + b"\n" for raw in kept))
    return open(path, "a", encoding="utf-8", newline="\n")


def _report_hole(path: Path, resume_step: int, every: int, log: Callable[[str], None]) -> None:
    """Says so where the training lines end before the checkpoint that the run goes on from."""
    lines = [line for _, line in _parse_lines(path) if "train/loss" in line]
    last = lines[-1]["step"] if lines else 0
    if last < resume_step - resume_step % every:
        log(
            f"{path} ends at step {last}, but the run goes on from step {resume_step}: the lines "
            "between are lost, the checkpoint is not; metrics and plots will have a hole there."
        )


def _parse_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    raw_lines = path.read_bytes().split(b"\n")
    if raw_lines[-1] == b"":
        raw_lines.pop()
    parsed = []
    for number, raw in enumerate(raw_lines, start=1):
        try:
            line = json.loads(raw)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            parsed.append((raw, line))
        elif number < len(raw_lines):
            raise ValueError(
                f"{path} line {number} is not a metric line; remove it or move the file away."
            )
    return parsed


def _scalar(key: str, value: Any) -> int | float:
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(f"Metric '{key}' has shape {array.shape}; metrics are scalars.")
    return int(array.item()) if array.dtype.kind in "iub" else float(array.item())
