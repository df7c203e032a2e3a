"""Folders, zips and tars as flat lists of members that are read by offset.

Archives are indexed once; a read opens the file, seeks and closes, so an index pickles and works
from any thread or process. Member names are only ever dictionary keys, never file-system paths.
"""

import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from typing import NamedTuple

from align_jax.storage import identity
from align_jax.storage.problems import Problems

ARCHIVE_SUFFIXES = (".tar", ".zip")
MAX_FILE_BYTES = 2**28  # no web image is larger, but a member that claims to be may be read
_TAR_BLOCK = 512
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
    """Returns name -> Member of the files that `list_files` lists; the last of equal names."""
    return {member.name: member for member in list_files(path, problems)}


def list_files(path: str, problems: Problems) -> list[Member]:
    """Returns the files in a folder (recursively), a .zip or a .tar, in its order.

    Links, devices and the like in archives are left out.

    Args:
      path: folder or archive.
      problems: receives `archive_unreadable`, `tar_truncated` (what follows the break is lost),
        `zip_member_unsupported` (neither stored nor deflated, or encrypted).
    """
    if os.path.isdir(path):
        return _list_folder(path)
    list_archive = _list_zip if path.lower().endswith(".zip") else _list_tar
    try:
        return list_archive(path, problems)
    except Exception as error:  # both modules leak every kind of error on damaged headers
        problems.add("archive_unreadable", f"{path}: {error}")
        return []


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
    members = list(members)
    archives = {member.path: None for member in members if member.kind != "file"}
    number = {path: n for n, path in enumerate(archives)}
    index = ((m.name, m.kind, number.get(m.path), m.offset, m.size) for m in members)
    loose = (member.path for member in members if member.kind == "file")
    return identity.digest(
        [identity.digest(index), identity.of_files(archives), identity.of_files(loose)]
    )


def _too_large(member):
    return OSError(f"{member.path}: {member.name} is larger than {MAX_FILE_BYTES >> 20} MiB.")


def _list_folder(path):
    members = []
    for folder, folders, files in os.walk(path):
        folders.sort()
        for file in sorted(files):
            full = os.path.join(folder, file)
            name = os.path.relpath(full, path).replace(os.sep, "/")
            members.append(Member(full, name, "file"))
    return members


def _list_zip(path, problems):
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


def _list_tar(path, problems):
    members = []
    size = os.path.getsize(path)
    broken = None
    with tarfile.open(path, "r:") as archive:
        try:
            while (info := archive.next()) is not None:
                archive.members.clear()  # which keeps every header
                if not info.isreg() or info.issparse():
                    continue
                if info.offset_data + info.size > size:
                    broken = info.name
                    break
                members.append(Member(path, info.name, "tar", info.offset_data, info.size))
        except Exception as error:  # of many kinds where a header is damaged
            broken = str(error)
        end = archive.offset
    # tarfile stops silently at a damaged header; a whole archive ends in blocks of zeros.
    if broken is None and _read_block(path, end) != bytes(_TAR_BLOCK):
        broken = f"no end-of-archive block at byte {end}"
    if broken is not None:
        problems.add("tar_truncated", f"{path}: {broken}")
    return members


def _read_block(path, offset):
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(_TAR_BLOCK)
