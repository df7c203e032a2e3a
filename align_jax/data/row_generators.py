"""A random generator for each row of the stream, made for many rows at once.

Row `position` has `Generator(Philox([seed, position, attempt]))`. Making one takes 12 us, most of
it the hash of those three numbers, which is here done for all rows of a batch together.

Source: numpy.random.SeedSequence, whose output NumPy keeps the same, after O'Neill's
randutils (2015).
"""

import numpy as np

_POOL_SIZE = 4
_INIT_A, _MULT_A = 0x43B0D7E5, 0x931E8875
_INIT_B, _MULT_B = 0x8B51F9DD, 0x58F38DED
_MIX_LEFT, _MIX_RIGHT = 0xCA01F9DD, 0x4973F715
_WORD = 2**32 - 1


def philox_keys(seed: int, positions: np.ndarray) -> np.ndarray:
    """Returns the keys of Philox([seed, position, 0]), uint64 [K, 2], of positions, int64 [K]."""
    low, high = positions.astype(np.uint64) & _WORD, positions.astype(np.uint64) >> 32
    # A number that needs two words of 32 bits has two; the last of four is the attempt, or none.
    zero = np.zeros_like(low)
    hashed = _Hash(_INIT_A, _MULT_A)
    pool = [hashed(word) for word in (zero + np.uint64(seed), low, high, zero)]
    for source in range(_POOL_SIZE):
        for target in range(_POOL_SIZE):
            if source != target:
                mixed = _MIX_LEFT * pool[target] - _MIX_RIGHT * hashed(pool[source]) & _WORD
                pool[target] = mixed ^ mixed >> 16
    hashed = _Hash(_INIT_B, _MULT_B)
    words = [hashed(word) for word in pool]
    return np.stack([words[0] | words[1] << 32, words[2] | words[3] << 32], axis=1)


class RowGenerator:
    """One generator that becomes that of one row after another; not for several threads at once."""

    def __init__(self):
        self._philox = np.random.Philox(0)
        self._generator = np.random.Generator(self._philox)
        self._state = self._philox.state

    def at(self, key: np.ndarray) -> np.random.Generator:
        """Returns the generator with a key of `philox_keys`, at its start."""
        self._state["state"]["key"] = key
        self._philox.state = self._state
        return self._generator


class _Hash:
    """Hashes one word of 32 bits after another, each in another way."""

    def __init__(self, start: int, multiplier: int):
        self._constant, self._multiplier = start, multiplier

    def __call__(self, words: np.ndarray) -> np.ndarray:
        words = words ^ self._constant
        self._constant = self._constant * self._multiplier & _WORD
        words = words * self._constant & _WORD
        return words ^ words >> 16
