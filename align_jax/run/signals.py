"""SIGTERM and SIGINT end a run after the step that is being made, which is then saved."""

import contextlib
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Name of threads whose work nobody waits for any more. XLA cannot be broken off: a program that
# ends meanwhile has to end without clearing up.
LEFT = "align_jax.left"

T = TypeVar("T")


class Interrupted(BaseException):
    """A signal came where work may be given up; nothing that catches Exception stops it."""


class StopSignals:
    """Context in which the first signal sets `requested` to its name instead of killing.

    Further SIGTERMs change nothing, however soon they come: launchers send several. A second
    Ctrl-C raises KeyboardInterrupt. Signals belong to the main thread: in another one, and where
    several processes must stop after the same step (multihost.preempted), nothing is caught.

    Attributes:
      requested: name of the first signal, "" before it.
    """

    def __init__(self):
        self.requested = ""
        self._gives_up = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._catch) for number in _SIGNALS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def giving_up(self) -> Iterator[None]:
        """Context that a signal leaves at once, as `Interrupted`: for waits in Python."""
        if self.requested:
            raise Interrupted
        self._gives_up = True
        try:
            yield
        finally:
            self._gives_up = False

    def run(self, function: Callable[[], T]) -> T:
        """Returns what a function does; a signal leaves it at once, whatever it is in.

        Where signals are caught it runs in a thread of its own, since Python sees a signal only
        when its main thread is back from XLA. A function that was left goes on unseen, at most to
        its end.

        Raises:
          Interrupted: a signal came.
        """
        if not self._before:
            return function()
        done: queue.SimpleQueue = queue.SimpleQueue()

        def work() -> None:
            try:
                done.put((function(), None))
            except BaseException as error:
                done.put((None, error))

        thread = threading.Thread(target=work, daemon=True)
        try:
            with self.giving_up():
                thread.start()
                result, error = done.get()
        except Interrupted:
            thread.name = LEFT
            raise
        if error is not None:
            raise error
        return result

    def _catch(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self.requested == name:
            raise KeyboardInterrupt
        self.requested = self.requested or name
        if self._gives_up:
            self._gives_up = False
            raise Interrupted
