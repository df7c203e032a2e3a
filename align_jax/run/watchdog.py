"""A run that hangs is ended: who is behind, where all threads are, one line, exit code 1.

Every process tells the others what it is at, by the coordination service of JAX. Two threads look
on: one exchanges the notes, which may block, the other decides, and calls nothing that can.

silent   another process has told nothing for `SILENT_S` (stopped, or dead), or process 0, which
         keeps the notes, does not answer for as long.
stuck    this process is at the same step, batch or save for `config.train.hang_s`, or ten times as
         long as its longest step if that is more. Compilations, evaluations and restores may take
         any time, as long as all processes are alive.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from typing import Any

import jax
from jax._src import distributed  # the only way to the client, which multihost_utils takes too

from align_jax.run.timeline import Timeline

SILENT_S = 30.0
_PERIOD_S, _PAUSE_S = 1.0, 5.0
_PREFIX = "align_jax/at/"
_LIMITED = ("step", "data", "save")


class Watchdog:
    """Context in which a run is watched."""

    def __init__(self, timeline: Timeline, hang_s: float):
        """Keeps the arguments.

        Args:
          timeline: what the run is at.
          hang_s: seconds; 0 watches nothing. Silence is borne no longer than this, either.
        """
        self._timeline, self._hang_s = timeline, hang_s
        self._silent_s = min(SILENT_S, hang_s)
        self._index, self._count = jax.process_index(), jax.process_count()
        self._ended = threading.Event()
        self._heard: dict[int, tuple[dict[str, Any], float]] = {}  # note, since when it is the same
        self._answered_s = self._excused_s = timeline.clock()

    def __enter__(self) -> "Watchdog":
        if self._hang_s:
            threading.Thread(target=self._watch, name="align_jax.watch", daemon=True).start()
            if self._count > 1:
                threading.Thread(target=self._talk, daemon=True).start()
                self._tell(ended=False)  # one that is never heard of cannot be missed
        return self

    def __exit__(self, kind: type | None, *exc_info: object) -> None:
        if self._count > 1 and kind and issubclass(kind, jax.errors.JaxRuntimeError):
            return  # another process is gone, which will be found; multihost.processes waits
        self._ended.set()
        if self._hang_s and self._count > 1 and kind is None:
            self._tell(ended=True)  # whoever still works must not wait for news

    def find(self) -> str:
        """Returns what is wrong, "" if nothing is."""
        now_s, line = self._timeline.clock(), self._timeline
        for number, (note, since_s) in sorted(self._heard.items()):
            if not note["ended"] and now_s - since_s > self._silent_s:
                return f"{_name(number, self._count, note)} is silent for {now_s - since_s:.0f} s"
        away_s = now_s - self._answered_s
        if self._count > 1 and self._index and away_s > self._silent_s:
            known = self._heard.get(0)
            who = _name(0, self._count, known[0]) if known else f"process 0 of {self._count}"
            return f"{who} does not answer for {away_s:.0f} s"
        stuck_s = now_s - max(line.since_s, self._excused_s)
        if line.phase in _LIMITED and stuck_s > max(self._hang_s, 10 * line.longest_s):
            notes = {number: note for number, (note, _) in self._heard.items()}
            notes[self._index] = self._note(ended=False)
            # Of those at the same step, who still waits for its data keeps the others waiting.
            behind = min(notes, key=lambda n: (notes[n]["step"], notes[n]["phase"] != "data"))
            if notes[behind]["phase"] not in _LIMITED:  # this process waits for its compiler
                self._excused_s = now_s
                return ""
            return (
                f"nothing has moved for {stuck_s:.0f} s (config.train.hang_s={self._hang_s:g}); "
                f"behind is {_name(behind, self._count, notes[behind])}"
            )
        return ""

    def _note(self, ended: bool) -> dict[str, Any]:
        line = self._timeline
        note = {"step": line.doing, "phase": line.phase, "ended": ended}
        return note | {"host": socket.gethostname(), "pid": os.getpid()}

    def _tell(self, ended: bool) -> None:
        note = json.dumps(self._note(ended) | {"time": time.time()})
        client = distributed.global_state.client
        client.key_value_set(f"{_PREFIX}{self._index}", note, allow_overwrite=True)

    def _talk(self) -> None:
        client = distributed.global_state.client
        while not self._ended.wait(_PERIOD_S):
            try:
                self._tell(ended=False)
                found = client.key_value_dir_get(_PREFIX)
            except jax.errors.JaxRuntimeError:
                continue  # `find` sees that no answer comes
            now_s = self._timeline.clock()
            self._answered_s = now_s
            for key, text in found:
                number, note = int(key.rpartition("/")[2]), json.loads(text)
                if number != self._index and self._heard.get(number, ({}, 0))[0] != note:
                    self._heard[number] = note, now_s

    def _watch(self) -> None:
        clock = self._timeline.clock
        looked_s = clock()
        while not self._ended.wait(_PERIOD_S):
            gap_s, looked_s = clock() - looked_s, clock()
            if gap_s > _PAUSE_S:  # this process itself was stopped: all clocks begin anew
                self._answered_s += gap_s
                self._excused_s = looked_s
                self._heard = {n: (note, s + gap_s) for n, (note, s) in self._heard.items()}
            elif problem := self.find():
                if not self._ended.is_set():
                    end(f"step {self._timeline.doing}: {problem}")
                return


def end(problem: str) -> None:
    """Prints all stacks and the problem, and ends this process, whose main thread may be lost."""
    frames = sys._current_frames()
    for thread in threading.enumerate():
        if thread.ident in frames:
            stack = "".join(traceback.format_stack(frames[thread.ident]))
            print(f"thread {thread.name}:\n{stack}", file=sys.stderr)
    print(
        f"align: {problem}. Ended; the same command continues from the last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _name(number: int, count: int, note: dict[str, Any]) -> str:
    return (
        f"process {number} of {count} (host {note['host']}, pid {note['pid']}), at step "
        f"{note['step']}, {note['phase']},"
    )
