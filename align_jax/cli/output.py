"""What is printed: a terminal that cannot show it, or is gone, never costs the work."""

import contextlib
import errno
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO


class Output:
    """Stands for stdout or stderr: replaces what the encoding lacks, keeps errors for the end.

    Attributes:
      error: the first one; nothing is written after it.
    """

    def __init__(self, stream: TextIO):
        """Takes a text stream."""
        self._stream = stream
        self.error: OSError | None = None
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")

    def write(self, text: str) -> int:
        """Writes text, or nothing after an error; returns its length."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Hands on what was written."""
        self._try(self._stream.flush)

    def _try(self, function: Callable[..., object], *arguments: str) -> None:
        if self.error is None:
            try:
                function(*arguments)
            except OSError as error:
                self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def kept_safe() -> Iterator[Output]:
    """Context in which printing raises no error; yields what stands for stdout.

    Its error is None where all was printed, or the reader wanted no more (`align ... | head`).
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, _ = Output(before[0]), Output(before[1])
    try:
        yield out
    finally:
        out.flush()
        sys.stdout, sys.stderr = before
        if out.error is not None:
            with contextlib.suppress(OSError, ValueError):
                before[0].close()  # else Python tries again when it ends, and complains
            if out.error.errno == errno.EPIPE:
                out.error = None


def check_report(path: str | None, ending: str) -> None:
    """Raises ValueError if a report would take the place of a file that cannot be one."""
    if path and not path.endswith(ending):
        raise ValueError(f"--out {path} must end in {ending}, which is what is written.")
