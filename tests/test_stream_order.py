"""What a position of the stream begins with, made for a whole batch: record and generator."""

import pickle

import grain
import jax
import numpy as np
import pytest

from align_jax.data import row_generators
from align_jax.data.epoch_order import EpochOrder
from align_jax.data.loans import Loans


# Sizes around powers of two, where the cipher's number of bits changes; 2**31 is the most.
@pytest.mark.parametrize("size", [1, 2, 3, 257, 65_536, 65_538, 131_073, 262_146, 2**31 - 1, 2**31])
def test_epoch_order_is_grains_number_for_number(size):
    rng = np.random.default_rng(size)
    positions = np.concatenate([rng.integers(0, high, 4) for high in (size, 5 * size, 2**50)])
    for seed in (7, 2**32 - 1):
        expected = grain.MapDataset.range(size).seed(seed).shuffle().repeat()
        found = EpochOrder(size, seed).take(positions)
        assert found.tolist() == [expected[position] for position in positions.tolist()]
    assert EpochOrder(size, 0).take(np.array([], np.int64)).tolist() == []


# Where Grain 0.2 never gives the last record.
@pytest.mark.parametrize("size", [65_536, 65_537, 65_538, 262_145])
def test_each_epoch_has_every_record_once(size):
    epochs = EpochOrder(size, 3).take(np.arange(2 * size)).reshape(2, size)
    np.testing.assert_array_equal(np.sort(epochs), [np.arange(size)] * 2)
    assert (epochs[0] != epochs[1]).any()


def test_generator_of_each_row_is_that_of_seed_and_position():
    positions = np.array([0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 17, 2**62])
    row = row_generators.RowGenerator()
    for seed in (0, 5, 2**32 - 1):
        keys = row_generators.philox_keys(seed, positions)
        for position, key in zip(positions.tolist(), keys, strict=True):
            expected = np.random.Generator(np.random.Philox([seed, position, 0]))
            found = row.at(key)
            # An odd number of 32-bit draws leaves half a word behind, which the next must not see.
            for draw in (lambda g: g.integers(5, size=3).tolist(), lambda g: g.random()):
                assert draw(found) == draw(expected)


def test_memory_comes_back_when_nobody_holds_it_and_not_before():
    loans = Loans((4, 3), np.uint8, most_idle=2)
    first = loans.empty()
    assert first.shape == (4, 3) and first.dtype == np.uint8 and first.flags.writeable
    address = first.ctypes.data
    del first
    assert loans.empty().ctypes.data == address
    part = loans.empty()[2:]
    other = loans.empty()
    assert other.ctypes.data != address
    del part
    assert loans.empty().ctypes.data == address
    held = [loans.empty() for _ in range(5)]
    held.clear()
    assert len(loans._idle) == 2
    copy = pickle.loads(pickle.dumps(loans))
    assert len(copy._idle) == 0 and copy.empty().shape == (4, 3)


def test_memory_that_jax_reads_is_not_lent_again():
    # Large and aligned as a batch is, so that device_put on CPU takes the memory as it is.
    loans = Loans((1024, 1024), np.uint8, most_idle=4)
    on_device = []
    for value in range(6):
        batch = loans.empty()
        batch[...] = value
        on_device.append(jax.device_put(batch))
        del batch
    addresses = {array.unsafe_buffer_pointer() for array in on_device}
    assert len(addresses) == 6
    for value, array in enumerate(on_device):
        assert (np.asarray(array) == value).all()
    # What reads it later than it is dropped here keeps it too.
    total = jax.jit(lambda array: array.astype("float32").sum())(on_device.pop())
    for value in (9, 9, 9):
        loans.empty()[...] = value
    assert total == 5 * 1024 * 1024
