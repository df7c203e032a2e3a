"""The one way to write files: whole or not at all, on disk when they count, never two at once.

`replacing` and the functions on it write beside the target and rename; `locked` keeps a second
process out of a folder; `check_local` decides on `scheme://` paths; `explain_full_disk` says which
folder has no space left.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

LOCK_FILE = "lock"
_REMOTE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # pathlib makes gs:/ of gs://
_LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.tmp")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXT = re.compile(
    r"no space left on device|disk quota exceeded|file too large|\bENOSPC\b", re.IGNORECASE
)

_Path = str | os.PathLike


def check_local(path: _Path, what: str) -> None:
    """Refuses `gs://bucket/x` and the like, which the file system would take for a folder `gs:`.

    Locks, appended lines and renames, by which nothing here is lost, do not exist in a bucket.

    Args:
      path: any path of a user.
      what: names it, e.g. "--out".

    Raises:
      ValueError: the path has a scheme.
    """
    if remote := _REMOTE.match(os.fspath(path)):
        raise ValueError(
            f"{what} {os.fspath(path)}: {remote[1]}:// is not a file system here; name a "
            "local path, or mount the bucket (gcsfuse, s3fs) and name the mounted path."
        )


def check_alone(folder: _Path, names: Collection[str]) -> None:
    """Raises ValueError if a folder holds anything but files that an earlier call has left.

    Args:
      folder: where files will be written; need not be there.
      names: of those files. Hidden files do not count.
    """
    folder = Path(folder)
    others = {path.name for path in folder.glob("[!.]*")} - {*names} if folder.is_dir() else ()
    if others:
        raise ValueError(f"{folder} holds other files, {min(others)} first; name a new folder.")


def check_local_values(values: Mapping[str, Any], path: str) -> None:
    """Refuses each text of a group of settings, and of groups in it, that `check_local` refuses.

    Args:
      values: name -> text, group or anything else.
      path: of the group, for the message.
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            check_local_values(value, f"{path}.{name}")
        elif isinstance(value, str):
            check_local(value, f"{path}.{name}")


@contextlib.contextmanager
def replacing(path: _Path) -> Iterator[Path]:
    """Yields a new path in the folder of `path`; its file takes the place of `path` at the end.

    Missing folders are made. What was written is on disk before it is renamed. An error leaves the
    old file, and no other. A link is followed; what is no file (/dev/stdout) is written directly.

    Raises:
      ValueError: see `check_local`.
    """
    check_local(path, "output")
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        yield temporary
        move(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        full = explain_full_disk(error, path.parent)
        if full is None:
            raise
        raise full from error


def temporary_path(path: _Path) -> Path:
    """Returns a path beside `path` that no other process uses; `locked` clears up what is left."""
    path = Path(path)
    return path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex}.tmp")


def move(source: _Path, target: _Path) -> None:
    """Puts a finished file or folder in the place of `target`; both lie on one file system."""
    if not os.path.isdir(source):
        with open(source, "rb") as file:
            os.fsync(file.fileno())
    os.replace(source, target)
    _sync_folder(os.path.dirname(os.path.abspath(target)))


def write_bytes(path: _Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: _Path, text: str) -> None:
    """Writes UTF-8 with lines that end at `\\n`; half surrogate pairs become `?`."""
    write_bytes(path, text.encode("utf-8", "replace"))


def write_json(path: _Path, content: Any, **options: Any) -> None:
    """Writes JSON, indented by 2 and with a line end.

    Args:
      content: what json.dumps takes.
      options: of json.dumps.
    """
    write_text(path, json.dumps(content, **({"indent": 2} | options)) + "\n")


def append_line(path: _Path, line: str) -> None:
    """Adds a line to a file that grows; returns when it is on disk. A torn last line is ended."""
    with open(path, "a+b") as file:
        torn = file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        file.write(b"\n" * torn + line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def write_array(path: _Path, array: np.ndarray) -> None:
    """Writes a .npy file."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


@contextlib.contextmanager
def locked(folder: _Path, work: str, *, shown: _Path | None = None) -> Iterator[None]:
    """Context in which no other process is in `folder` by this function.

    Makes the folder, and takes it away again if nothing was put into it. `folder/lock` names host
    and process while the lock is held; the kernel frees it however the process ends. Temporary
    files that killed processes have left here, or one level below, are removed.

    Args:
      folder: that is written into.
      work: what is done, e.g. "align train".
      shown: what to call the folder in messages, where the user knows another one.

    Raises:
      ValueError: another process has the lock; nothing has been touched then. The line names it.
    """
    check_local(folder, "folder")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder.")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = _take(folder / LOCK_FILE, work, shown or folder)
    try:
        _remove_leftovers(folder)
        yield
    finally:
        if _is_at(file, folder / LOCK_FILE):  # not where the folder was removed meanwhile
            os.unlink(folder / LOCK_FILE)  # while it is held: nobody else can hold this file
        os.close(file)
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


@contextlib.contextmanager
def explaining_full_disk(folder: _Path) -> Iterator[None]:
    """Context that ends with one OSError, see `explain_full_disk`, where the disk was full."""
    try:
        yield
    except Exception as error:
        full = explain_full_disk(error, folder)
        if full is None:
            raise
        raise full from error


def explain_full_disk(error: BaseException, folder: _Path) -> OSError | None:
    """Returns the error to show where `error` comes from a full disk, else None.

    Libraries wrap the system's error in others, or keep its text only; all causes are looked at.

    Args:
      error: as caught.
      folder: that was written into; it is named with its free space.
    """
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        left += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
        code = getattr(one, "errno", None)
        if code in _FULL or _FULL_TEXT.search(str(one)):
            existing = next(
                p for p in (Path(folder).absolute(), *Path(folder).absolute().parents) if p.exists()
            )
            usage = shutil.disk_usage(existing)
            return OSError(
                f"{folder} cannot be written: no space left ({usage.free / 2**20:,.1f} MiB "
                f"free of {usage.total / 2**20:,.1f}); make room and run the same command again."
            )
    return None


def _take(path: Path, work: str, shown: _Path) -> int:
    """Returns a descriptor of the lock file, locked."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(file, 1000, 0).decode("utf-8", "replace").strip()
            os.close(file)
            raise ValueError(
                f"{shown} is in use by {owner or 'another process'}; wait for it, or name "
                "another folder."
            ) from None
        except OSError as error:  # file systems without locks
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                os.close(file)
                raise
        # Another process may have removed the file between our opening and our locking it.
        if _is_at(file, path):
            with contextlib.suppress(OSError):  # a full disk; the lock holds without the name
                os.ftruncate(file, 0)
                os.pwrite(file, f"{work}, process {os.getpid()} on {_host()}\n".encode(), 0)
            return file
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _host() -> str:
    return socket.gethostname()


def _remove_leftovers(folder: Path) -> None:
    inside = [entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    for place in (folder, *inside):
        with contextlib.suppress(OSError):
            for entry in list(os.scandir(place)):
                if _LEFTOVER.search(entry.name) and entry.name.endswith(".tmp"):
                    os.unlink(entry.path)


def _sync_folder(folder: str) -> None:
    with contextlib.suppress(OSError):  # some network file systems cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
