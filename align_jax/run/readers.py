"""Who reads checkpoints of a run that goes on, so that it removes none of them meanwhile.

`reading/<step>.<host>.<pid>` stands for a reader, `reading/<step>.gone` for a checkpoint that is
about to be removed. Each side writes its own file before it looks for the other's: whatever the
order, at most one of them goes on.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

_FOLDER = "reading"
_DEAD_S = 3600.0  # a reader that needs longer to load a checkpoint was killed


class Gone(Exception):
    """The checkpoint was removed before it could be read."""


@contextlib.contextmanager
def reading(workdir: str | os.PathLike, step: int) -> Iterator[None]:
    """Context in which the run does not remove the checkpoint of a step.

    Raises:
      Gone: it has, or is about to.
    """
    folder = _folder(workdir)
    mine = folder / f"{step}.{socket.gethostname()}.{os.getpid()}"
    mine.touch()
    try:
        checkpoint = Path(workdir) / "checkpoints" / str(step)
        if (folder / f"{step}.gone").exists() or not checkpoint.is_dir():
            raise Gone
        yield
    finally:
        mine.unlink(missing_ok=True)


def may_go(workdir: str | os.PathLike, step: int) -> bool:
    """Returns whether nobody reads the checkpoint; nobody begins to, then."""
    folder = _folder(workdir)
    gone = folder / f"{step}.gone"
    gone.touch()
    for reader in folder.glob(f"{step}.*"):
        with contextlib.suppress(FileNotFoundError):
            if reader != gone and time.time() - reader.stat().st_mtime < _DEAD_S:
                gone.unlink()
                return False
    return True


def clear(workdir: str | os.PathLike, steps: set[int]) -> None:
    """Removes the marks of checkpoints that are gone.

    Args:
      workdir: folder of the run.
      steps: that are there.
    """
    for mark in _folder(workdir).glob("*.gone"):
        if int(mark.name.partition(".")[0]) not in steps:
            mark.unlink(missing_ok=True)


def _folder(workdir: str | os.PathLike) -> Path:
    folder = Path(workdir) / _FOLDER
    folder.mkdir(exist_ok=True)
    return folder
