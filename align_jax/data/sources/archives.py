"""Folders, zips and tars as flat lists of members that are read by offset.

Archives are indexed once; a read opens the file, seeks and closes, so an index pickles and works
from any thread or process. Member names are only ever dictionary keys, never file-system paths.
"""

import contextlib
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from align_jax.storage import identity
from align_jax.storage.problems import Problems

ARCHIVE_SUFFIXES = (".tar", ".zip")
MAX_FILE_BYTES = 2**28  # no web image is larger, but a member that claims to be may be read
_TAR_BLOCK = 512
_TAR_RECORD = 20 * _TAR_BLOCK
_SCAN_BYTES = 2**20  # a multiple of the block
_MAX_HEADER_BYTES = 2**20  # of a long name or a pax record
_ZIP_LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of name and extra field
_ZIP_STORED, _ZIP_DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


class Member(NamedTuple):
    """Where the bytes of one file lie."""

    path: str  # the file itself, or the archive that holds it
    name: str  # inside the folder or archive, with "/"
    kind: str  # "file", "tar", "zip" (stored) or "deflated" (zip)
    offset: int = 0  # of the data (tar) or of the local header (zip)
    size: int = 0  # bytes on disk; unused for "file"


def index_files(path: str, problems: Problems) -> dict[str, Member]:
    """Returns name -> Member of all files, hidden ones too; the last of equal names."""
    return {member.name: member for member in list_files(path, problems, hidden=True)}


def list_files(path: str, problems: Problems, *, hidden: bool = False) -> list[Member]:
    """Returns the files in a folder (recursively), a .zip or a .tar, in its order.

    Links to folders are followed, each target once. Links, devices and the like in archives are
    left out. Names are hidden that begin with a dot (.ipynb_checkpoints, ._a.jpg), and __MACOSX.

    Args:
      path: folder or archive.
      problems: receives `archive_unreadable`, `tar_truncated` (what follows the break is lost),
        `tar_damaged` (reading goes on at the next header; the bytes between are named),
        `zip_member_unsupported` (neither stored nor deflated, or encrypted); of folders
        `folder_unreadable`, `file_unreadable` (a link to nothing, a pipe) and `link_repeated` (to
        a folder that is read already); `name_hidden`.
      hidden: whether hidden names are listed; else they are counted, a hidden folder once.
    """
    if os.path.isdir(path):
        return _Folder(path, problems, hidden).members
    list_archive = _list_zip if path.lower().endswith(".zip") else _list_tar
    try:
        members = list_archive(path, problems)
    except Exception as error:  # both modules leak every kind of error on damaged headers
        problems.add("archive_unreadable", f"{path}: {error}")
        return []
    if hidden:
        return members
    kept = []
    for member in members:
        if any(map(_is_hidden, member.name.split("/"))):
            problems.add("name_hidden", f"{path}: {member.name}")
        else:
            kept.append(member)
    return kept


def read_member(member: Member) -> bytes:
    """Returns the file's bytes.

    Raises:
      OSError: the bytes are not there (any more), do not decompress or are more than 256 MiB.
    """
    if member.size > MAX_FILE_BYTES:
        raise _too_large(member)
    if member.kind == "file":
        with open(member.path, "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                raise _too_large(member)
            return file.read()
    with open(member.path, "rb", buffering=0) as file:
        start = member.offset
        if member.kind != "tar":
            # The local header may differ in length from its copy in the central directory.
            file.seek(start)
            header = file.read(_ZIP_LOCAL_HEADER.size)
            if len(header) < _ZIP_LOCAL_HEADER.size:
                raise OSError(f"{member.path} ends before {member.name}.")
            start += len(header) + sum(_ZIP_LOCAL_HEADER.unpack(header))
        file.seek(start)
        data = file.read(member.size)
    if len(data) < member.size:
        raise OSError(f"{member.path} ends inside {member.name}.")
    if member.kind == "deflated":
        inflate = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
        try:
            data = inflate.decompress(data, MAX_FILE_BYTES)
        except zlib.error as error:
            raise OSError(f"{member.path}: {member.name} does not decompress: {error}.") from error
        if inflate.unconsumed_tail:
            raise _too_large(member)
        if not inflate.eof:
            raise OSError(f"{member.path}: {member.name} does not decompress: it is cut off.")
    return data


def stamp_members(members: Iterable[Member]) -> str:
    """Returns 32 hex digits of the names and places of members and the content of their files.

    Archives count by their order, so that neither their folder nor their own name matters.
    """
    archives: dict[str, int] = {}
    loose: list[str] = []

    def index() -> Iterator[tuple]:
        for member in members:
            if member.kind == "file":
                loose.append(member.path)
            else:
                archives.setdefault(member.path, len(archives))
            place = archives.get(member.path)
            yield member.name, member.kind, place, member.offset, member.size

    of_index = identity.digest(index())
    return identity.digest([of_index, identity.of_files(archives), identity.of_files(loose)])


def _too_large(member: Member) -> OSError:
    return OSError(f"{member.path}: {member.name} is larger than {MAX_FILE_BYTES >> 20} MiB.")


def _is_hidden(name: str) -> bool:
    return name == "__MACOSX" or (name.startswith(".") and name not in (".", ".."))


class _Folder:
    """The files below a folder, in order of their names."""

    def __init__(self, path: str, problems: Problems, hidden: bool):
        self.members: list[Member] = []
        self._problems, self._hidden = problems, hidden
        self._linked: set[tuple[int, int]] = set()  # targets of links that were followed
        self._list(path, "", {_identity(path)})

    def _list(self, folder: str, prefix: str, above: set[tuple[int, int]]) -> None:
        """Adds what lies in a folder; `above` are the folders that it lies in, and itself."""
        try:
            with os.scandir(folder) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError as error:
            self._problems.add("folder_unreadable", f"{folder}: {error.strerror}")
            return
        folders = []
        for entry in entries:
            if not self._hidden and _is_hidden(entry.name):
                self._problems.add("name_hidden", entry.path)
            elif entry.is_dir():
                folders.append(entry)
            elif entry.is_file():
                self.members.append(Member(entry.path, prefix + entry.name, "file"))
            else:
                self._problems.add("file_unreadable", entry.path)
        for entry in folders:
            identity = _identity(entry.path)
            if entry.is_symlink():
                if identity in above or identity in self._linked:
                    self._problems.add("link_repeated", entry.path)
                    continue
                self._linked.add(identity)
            self._list(entry.path, f"{prefix}{entry.name}/", above | {identity})


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _list_zip(path: str, problems: Problems) -> list[Member]:
    members = []
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            if info.compress_type not in (_ZIP_STORED, _ZIP_DEFLATED) or info.flag_bits & 1:
                problems.add("zip_member_unsupported", f"{path}: {info.filename}")
                continue
            kind = "zip" if info.compress_type == _ZIP_STORED else "deflated"
            members.append(
                Member(path, info.filename, kind, info.header_offset, info.compress_size)
            )
    return members


def _list_tar(path: str, problems: Problems) -> list[Member]:
    members: list[Member] = []
    with open(path, "rb") as raw:
        size, start = os.fstat(raw.fileno()).st_size, 0
        while start is not None:
            end, broken = _list_one_tar(path, raw, start, members)
            if broken is None:
                content = _next_content(raw, end)
                if content is None:
                    break
                start = _next_header(raw, content)
                # Archives may follow each other (cat a b): zeros pad each to whole records.
                if start == content and (start % _TAR_RECORD == 0 or start - end == 2 * _TAR_BLOCK):
                    continue
                broken = f"no header at byte {end:,}"
            else:
                start = _next_header(raw, end + _TAR_BLOCK)
            if start is None and _next_header(raw, 0) is None:
                raise tarfile.ReadError(broken)
            reason = "tar_truncated" if start is None else "tar_damaged"
            until = size if start is None else start
            problems.add(reason, f"{path}: {broken}; bytes {end:,} to {until:,} are not read")
    return members


def _list_one_tar(
    path: str, raw: BinaryIO, start: int, members: list[Member]
) -> tuple[int, str | None]:
    """Adds the files of the archive at `start`; returns where it ends and what is broken there."""
    size = os.fstat(raw.fileno()).st_size
    raw.seek(start)
    last = start  # where a header should be
    try:
        with tarfile.open(fileobj=_HeaderReader(raw), mode="r:") as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # which keeps every header
                if info.size < 0:
                    return info.offset, f"{info.name} has a negative size"
                last = archive.offset
                if not info.isreg() or info.issparse():
                    continue
                if info.offset_data + info.size > size:
                    return info.offset, f"{info.name} does not end in the file"
                members.append(Member(path, info.name, "tar", info.offset_data, info.size))
            end = archive.offset
    except Exception as error:  # of many kinds where a header is damaged
        return min(last, size), str(error)
    # tarfile stops silently at a damaged header; a whole archive ends in blocks of zeros.
    raw.seek(end)
    if raw.read(_TAR_BLOCK) != bytes(_TAR_BLOCK):
        return end, f"no header at byte {end:,}"
    return end, None


def _next_content(raw: BinaryIO, offset: int) -> int | None:
    """Returns the first block at or after `offset` that is not all zeros, None at the end."""
    raw.seek(offset)
    while data := raw.read(_SCAN_BYTES):
        if rest := data.lstrip(b"\0"):
            return offset + (len(data) - len(rest)) // _TAR_BLOCK * _TAR_BLOCK
        offset += len(data)
    return None


def _next_header(raw: BinaryIO, offset: int) -> int | None:
    """Returns the first block at or after `offset` that is a header by its checksum, None if none.

    Args:
      raw: of the archive.
      offset: a multiple of the block, like all headers.
    """
    raw.seek(offset)
    while len(data := raw.read(_SCAN_BYTES)) >= _TAR_BLOCK:
        blocks = np.frombuffer(data, np.uint8, len(data) // _TAR_BLOCK * _TAR_BLOCK)
        blocks = blocks.reshape(-1, _TAR_BLOCK)
        # The checksum is six octal digits or spaces; nearly no data looks so.
        field = blocks[:, 148:154]
        may_be = (((field | 7) == ord("7")) | (field == ord(" "))).all(axis=1)
        for number in np.flatnonzero(may_be).tolist():
            with contextlib.suppress(tarfile.HeaderError):
                tarfile.TarInfo.frombuf(blocks[number].tobytes(), "utf-8", "surrogateescape")
                return offset + number * _TAR_BLOCK
        offset += len(data)
    return None


class _HeaderReader:
    """What tarfile reads headers through: never a whole file because a header says so."""

    def __init__(self, raw: BinaryIO):
        self.seek, self.tell = raw.seek, raw.tell
        self._raw = raw

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise OSError(f"a header at byte {self._raw.tell()} claims {size} bytes")
        return self._raw.read(size)
