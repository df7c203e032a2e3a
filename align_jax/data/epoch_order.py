"""The order of a source's records, epoch after epoch, for many positions at once.

It is Grain's: `grain.MapDataset.range(num_records).seed(seed).shuffle().repeat()`, number for
number, which takes 20 us a position where this takes less than one. But for 2**k + 1 records with
an even k of 16 or more: there Grain's cipher is a bit too narrow, so that an epoch has one record
twice and the last one never.

Source: grain/_src/python/experimental/index_shuffle of Grain 0.2: a Simon cipher of 4 rounds
(Beaulieu et al. 2013) over the least even number of bits, from 16 on, applied until the result is
an index, its keys from C++'s std::seed_seq.
"""

import functools

import numpy as np

_ROUNDS, _FEWEST_BITS = 4, 16
_DEPTH = 1  # of `shuffle` above `seed` in Grain's chain, which its seed depends on


class EpochOrder:
    """An endless sequence: position -> index of a record.

    Positions e*N to (e+1)*N - 1 are a permutation of 0 to N - 1, another one for each epoch e.
    """

    def __init__(self, num_records: int, seed: int):
        """Args: number of records, 1 to 2**31, and a seed in [0, 2**32)."""
        self._num_records = num_records
        self._seed = int(np.random.SeedSequence([seed, _DEPTH]).generate_state(1)[0])
        bits = (num_records - 1).bit_length()
        self._word_bits = max(bits + bits % 2, _FEWEST_BITS) // 2

    def take(self, positions: np.ndarray) -> np.ndarray:
        """Returns the indices, int64 [K], at positions, int64 [K]."""
        epochs, places = np.divmod(positions, self._num_records)
        if self._num_records == 1 or len(places) == 0:
            return places
        epochs, which = np.unique(epochs, return_inverse=True)
        seeds = ((self._seed + epochs) % 2**32).tolist()
        if self._num_records <= 2**_FEWEST_BITS:
            orders = [_whole_epoch(self._num_records, seed) for seed in seeds]
            found = [orders[w][place] for w, place in zip(which, places, strict=True)]
            return np.array(found, np.int64)
        keys = np.array([_round_keys(seed) for seed in seeds])[which].T
        keys &= (1 << self._word_bits) - 1
        left = np.arange(len(places))  # not at an index yet; a quarter or more of a step are
        while len(left):
            found = _encrypt(places[left], keys[:, left], self._word_bits)
            places[left] = found
            left = left[found >= self._num_records]
        return places


@functools.lru_cache(maxsize=16)
def _whole_epoch(num_records: int, seed: int) -> np.ndarray:
    """Returns the permutation, int32 [num_records], of at most 65,536 records.

    Of few records nearly all values that the cipher gives are too large: the ways through them are
    followed for all together, twice as far in each round.
    """
    keys = np.array(_round_keys(seed))[:, None] & (1 << _FEWEST_BITS // 2) - 1
    start = _encrypt(np.arange(2**_FEWEST_BITS), keys, _FEWEST_BITS // 2)
    found = start[:num_records]
    ahead = start.copy()
    ahead[:num_records] = np.arange(num_records)
    while (found >= num_records).any():
        found, ahead = ahead[found], ahead[ahead]
    return found.astype(np.int32)


def _encrypt(values: np.ndarray, keys: np.ndarray, word_bits: int) -> np.ndarray:
    """Returns values [K] of two words each after the rounds of keys [rounds, K]."""
    mixed, mask = _mixed(word_bits), (1 << word_bits) - 1
    high, low = values >> word_bits & mask, values & mask
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        high = high ^ mixed[low] ^ first
        low = low ^ mixed[high] ^ second
    return high << word_bits | low


@functools.cache
def _mixed(word_bits: int) -> np.ndarray:
    """Returns what a round makes of each word, int64 [2**word_bits]."""
    words, mask = np.arange(1 << word_bits), (1 << word_bits) - 1
    by_1, by_2, by_8 = ((words << by | words >> word_bits - by) & mask for by in (1, 2, 8))
    return by_1 & by_8 ^ by_2


@functools.lru_cache(maxsize=1024)
def _round_keys(seed: int) -> list[int]:
    """Returns what std::seed_seq{seed} generates, 32 bits each."""
    words = 2**32 - 1
    shift = (_ROUNDS - 1) // 2  # as the standard has it for fewer than 7 numbers
    near = (_ROUNDS - shift) // 2
    far = near + shift
    keys = [0x8B8B8B8B] * _ROUNDS
    for k in range(_ROUNDS):
        mixed = keys[k] ^ keys[(k + near) % _ROUNDS] ^ keys[k - 1]
        first = 1664525 * (mixed ^ mixed >> 27) & words
        second = first + (1 if k == 0 else k + seed if k == 1 else k) & words
        keys[(k + near) % _ROUNDS] = keys[(k + near) % _ROUNDS] + first & words
        keys[(k + far) % _ROUNDS] = keys[(k + far) % _ROUNDS] + second & words
        keys[k] = second
    for k in range(_ROUNDS):
        mixed = keys[k] + keys[(k + near) % _ROUNDS] + keys[k - 1] & words
        first = 1566083941 * (mixed ^ mixed >> 27) & words
        second = first - k & words
        keys[(k + near) % _ROUNDS] ^= first
        keys[(k + far) % _ROUNDS] ^= second
        keys[k] = second
    return keys
