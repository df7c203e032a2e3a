"""One job for each of many archives, in processes of their own; results come in the order given.

They are plain child processes of this module, so that a script of the user is not run again in them
and no copy of this process's threads is made.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

_PARALLEL_FROM_BYTES = 2**28  # less is indexed before other processes have started


def for_each(job: Callable[[str], T], paths: Sequence[str]) -> Iterator[T]:
    """Yields job(path) of all paths, in order.

    Args:
      job: can be pickled, as its results can; raises nothing.
      paths: existing files and folders.

    Raises:
      RuntimeError: a process ended before its work was done.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = min(cores or 1, len(paths))
    if count < 2 or sum(map(os.path.getsize, paths)) < _PARALLEL_FROM_BYTES:
        yield from map(job, paths)
        return
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", __spec__.name]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    children = [subprocess.Popen(command, env=environment, **pipes) for _ in range(count)]
    try:
        for number, child in enumerate(children):
            with child.stdin as stdin:
                pickle.dump((job, list(paths[number::count])), stdin)
        for number in range(len(paths)):
            child = children[number % count]
            try:
                yield pickle.load(child.stdout)
            except (EOFError, pickle.UnpicklingError) as error:
                raise RuntimeError(
                    f"a process that lists archives ended at {paths[number]} (code {child.wait()})."
                ) from error
    finally:
        for child in children:
            child.kill()  # where not all is wanted; else it has ended
            child.stdout.close()
            child.wait()


def _serve() -> None:
    results, sys.stdout = sys.stdout.buffer, sys.stderr
    job, paths = pickle.load(sys.stdin.buffer)
    for path in paths:
        pickle.dump(job(path), results)
        results.flush()


if __name__ == "__main__":
    _serve()
