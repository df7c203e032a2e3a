"""Where the time of a run goes: how long it was in each phase, over all its parts.

A run is in one phase at a time. `step` is the work that the run is for; its share of all is the
goodput. The sums go to perf.jsonl as `time/<phase>_s`, from where a run that continues takes them
up: steps that have to be done again are then no longer `step` but `lost`, and `between` is what has
passed since the last line. So the sum over all phases is the time since the run was first started.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from align_jax.run.metrics import format_duration

# In the order of the summary. `data` is the loop's wait for a batch; the devices may still be at
# the step before.
PHASES = (
    *("step", "data", "evaluation", "save", "restore", "compilation", "startup", "lost"),
    "between",
)


class Timeline:
    """Adds up the seconds of each phase.

    Attributes:
      phase: the one that the run is in.
      doing: number of the step that it belongs to.
      since_s: when the run came into it, by the clock.
      longest_s: between two steps, without evaluations and saves.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        unix_clock: Callable[[], float] = time.time,
        began_s: float | None = None,
    ):
        """Begins in the phase `startup`.

        Args:
          clock: monotonic seconds.
          unix_clock: seconds since 1970, by which parts of a run know of each other.
          began_s: when the startup began, by the monotonic clock; None is now.
        """
        self.clock, self._unix_clock = clock, unix_clock
        began_s = clock() if began_s is None else began_s
        self._began_unix_s = unix_clock() - (clock() - began_s)
        self.phase, self.doing, self.since_s, self.longest_s = "startup", 0, began_s, 0.0
        self._sums = dict.fromkeys(PHASES, 0.0)
        self._step_s: dict[int, float] = {}

    def enter(self, phase: str, step: int) -> None:
        """Ends the phase before, unless it is the same."""
        now_s = self.clock()
        self._sums[self.phase] += now_s - self.since_s
        if self.phase == phase == "step":
            self.longest_s = max(self.longest_s, now_s - self.since_s)
        self.phase, self.doing, self.since_s = phase, step, now_s

    @contextlib.contextmanager
    def inside(self, phase: str, step: int) -> Iterator[None]:
        """Context of a phase after which the one before goes on."""
        before = self.phase
        self.enter(phase, step)
        try:
            yield
        finally:
            self.enter(before, step)

    def sums(self) -> dict[str, float]:
        """Returns `time/<phase>_s` up to now, `perf/goodput`, 0 to 1, and now as `unix_s`."""
        self.enter(self.phase, self.doing)
        total_s = sum(self._sums.values())
        return {f"time/{phase}_s": spent_s for phase, spent_s in self._sums.items()} | {
            "perf/goodput": self._sums["step"] / total_s if total_s else 0.0,
            "unix_s": self._unix_clock(),
        }

    def saved(self, step: int) -> None:
        """Notes that the steps up to this one need not be done again."""
        self._step_s[step] = self.sums()["time/step_s"]

    def lose(self, step: int) -> None:
        """Counts the steps after a saved one as lost: the run goes back to it."""
        known = [before for before in self._step_s if before <= step]
        kept_s = self._step_s[max(known)] if known else 0.0
        self._sums["lost"] += max(0.0, self.sums()["time/step_s"] - kept_s)
        self._sums["step"] = min(self._sums["step"], kept_s)

    def take_up(self, lines: Sequence[Mapping[str, Any]], step: int) -> bool:
        """Goes on from the lines of perf.jsonl that earlier parts of the run have written.

        Args:
          lines: all of them, in order.
          step: that the run goes on from; 0 where it starts.

        Returns:
          Whether there were any.
        """
        lines = [line for line in lines if "time/step_s" in line]
        if not lines:
            return False
        for phase in PHASES:
            self._sums[phase] += lines[-1].get(f"time/{phase}_s", 0.0)
        # Clocks of two hosts may differ: no time is counted twice, and none runs backwards.
        away_s = self._began_unix_s - lines[-1].get("unix_s", self._began_unix_s)
        self._sums["between"] += max(0.0, away_s)
        self._step_s = {line["step"]: line["time/step_s"] for line in lines if line["step"] <= step}
        self.lose(step)
        return True

    def summary(self) -> str:
        """Returns a line on where the time went."""
        sums = self.sums()
        total_s = sum(self._sums.values())
        parts = ", ".join(
            f"{phase} {100 * self._sums[phase] / max(total_s, 1e-9):.1f} %"
            for phase in PHASES
            if self._sums[phase] >= 0.001 * total_s
        )
        goodput = 100 * sums["perf/goodput"]
        return f"time {format_duration(total_s)}: {parts}; goodput {goodput:.1f} %"
