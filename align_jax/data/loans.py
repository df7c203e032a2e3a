"""Memory of batches that is used again once nobody holds it.

A batch of 256 views of 289 px is 64 MB; asking the system for fresh memory and clearing it costs
as much CPU time as reading the records.
"""

import collections
from typing import Any

import numpy as np
import numpy.typing as npt


class Loans:
    """Arrays of one shape, whose memory comes back when the last reference to them is gone.

    What jax.device_put makes of an array, which on CPU may be the same memory, refers to it for as
    long as it needs it. Thread-safe. Pickled, it holds no memory.
    """

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike, most_idle: int):
        """Of memory that nobody holds, `most_idle` arrays are kept."""
        self._shape, self._dtype = shape, np.dtype(dtype)
        self._idle = collections.deque(maxlen=most_idle)

    def empty(self) -> np.ndarray:
        """Returns an array of any content."""
        try:
            memory = self._idle.pop()
        except IndexError:
            memory = np.empty(self._shape, self._dtype)
        return np.asarray(_Loan(memory, self._idle))

    def __reduce__(self) -> tuple[Any, ...]:
        return Loans, (self._shape, self._dtype, self._idle.maxlen)


class _Loan:
    """What an array on loan, and every view of it, refers to."""

    def __init__(self, memory: np.ndarray, idle: collections.deque):
        self._memory, self._idle = memory, idle
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        self._idle.append(self._memory)
