"""DataComp's subset files: `.npy` of dtype "u8,u8", a uid of 32 hexadecimal digits in two halves.

Source: datacomp repository, baselines.py and resharder.py, which takes them sorted.
"""

import os
import re
from collections.abc import Iterable, Iterator

import numpy as np

from align_jax.storage import writing

DTYPE = np.dtype("u8,u8")
_UID = re.compile("[0-9a-fA-F]{32}")
_ROWS = 1 << 16


def read_subset(path: str | os.PathLike) -> Iterator[list[str]]:
    """Yields the uids of a subset file, 32 lower-case hexadecimal digits each, in batches.

    Raises:
      ValueError: no such file, or one of another dtype or shape.
    """
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is no .npy file of uids: {error}") from error
    if rows.dtype != DTYPE or rows.ndim != 1:
        raise ValueError(
            f"{path} holds {rows.dtype} of shape {rows.shape}; a subset of DataComp has dtype "
            "u8,u8 and one dimension."
        )
    for start in range(0, len(rows), _ROWS):
        yield [f"{high:016x}{low:016x}" for high, low in rows[start : start + _ROWS].tolist()]


def write_subset(path: str | os.PathLike, batches: Iterable[Iterable[str]], what: str) -> int:
    """Writes uids, ascending and each once; returns their number.

    Args:
      path: of the .npy file.
      batches: of uids.
      what: names where they come from in messages.

    Raises:
      ValueError: one is not 32 hexadecimal digits.
    """
    found = [np.zeros(0, DTYPE)]
    for uids in batches:
        for uid in uids:
            if not _UID.fullmatch(uid):
                raise ValueError(
                    f"{what}: {uid!r} is no uid of DataComp (32 hexadecimal digits), of which a "
                    "subset file consists."
                )
        found.append(np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids], DTYPE))
    rows = np.unique(np.concatenate(found))
    writing.write_array(path, rows)
    return len(rows)
