"""Long loops on this machine: how far one has come, and how many cores there are for it.

Progress goes to standard error: a bar on a terminal, else a line every ten seconds. Training has a
line of its own, see metrics.py.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import tqdm

_EVERY_S = 10.0

T = TypeVar("T")


def show_progress(
    items: Iterable[T],
    total: int | None,
    title: str,
    unit: str = "pair",
    size: Callable[[T], int] = lambda item: 1,
) -> Iterator[T]:
    """Yields the items; shows how many of `total` are done, the rate and the time left.

    Args:
      items: what is worked through.
      total: sum of the sizes of all items; None where it is not known.
      title: what is done to them, e.g. "pack train".
      unit: one of what `size` counts, in the singular.
      size: how much an item counts.
    """
    if sys.stderr.isatty():
        with tqdm.tqdm(desc=title, total=total, unit=unit) as bar:
            for item in items:
                yield item
                bar.update(size(item))
        return
    start = last = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += size(item)
        now = time.monotonic()
        if now - last >= _EVERY_S:
            last = now
            rate = done / (now - start)
            line = f"{title}: {done} {unit}s, {rate:.0f} {unit}s/s"
            if total is not None:
                left_min = (total - done) / max(rate, 1e-9) / 60
                line = (
                    f"{title}: {done} of {total} {unit}s, {rate:.0f} {unit}s/s, "
                    f"{left_min:.1f} min left"
                )
            print(line, file=sys.stderr, flush=True)


def num_cores() -> int:
    """Returns the number of cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
