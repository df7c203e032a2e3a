"""The thread that owns the device: which of the waiting inputs make the next batch."""

import threading

import jax
import numpy as np
import pytest

from align_jax.serve.batcher import TEXT, Batcher, Prepared
from align_jax.serve.metrics import Metrics

MAX_TOKENS = 64


class Recorder:
    """Stands for a model: notes what it is given, the first time after `go`."""

    batch_sizes = [1, 2, 4, 8]

    def __init__(self):
        self.batches, self.begun, self.go = [], threading.Event(), threading.Event()

    def encode_tokens(self, ids, mask):
        self.begun.set()
        self.go.wait()
        self.batches.append(mask.sum(axis=1).tolist())
        return ids[:, :1].astype(np.float32)


def text(tokens):
    ids = np.full(MAX_TOKENS, tokens, np.int32)
    return Prepared(TEXT, (ids, (np.arange(MAX_TOKENS) < tokens).astype(np.int32)))


def batches_of(waiting):
    """Returns the batches of texts, each in a call of its own, that wait while one is computed."""
    model = Recorder()
    batcher = Batcher(model, Metrics())
    first = batcher.submit([text(64)])
    model.begun.wait()
    futures = [batcher.submit([text(tokens)]) for tokens in waiting]
    model.go.set()
    answers = [int(future.result()[0, 0]) for future in [first, *futures]]
    batcher.close()
    assert answers == [64, *waiting]
    return model.batches[1:]


def test_what_waits_is_computed_by_padded_length_the_longest_first_and_none_overtakes():
    waiting = [20, 5, 17, 16, 33, 3, 32, 9, 64]
    assert batches_of(waiting) == [[33], [20, 17, 32], [5, 16, 3, 9], [64]]


@pytest.mark.parametrize(
    ("waiting", "batches"),
    [([7] * 5, [4, 1]), ([7] * 6, [6]), ([7] * 9, [8, 1]), ([7, 40] * 5, [4, 4, 1, 1])],
)
def test_a_batch_that_would_be_mostly_padding_is_cut_on_cpus(waiting, batches):
    assert [len(batch) for batch in batches_of(waiting)] == batches


def test_on_an_accelerator_all_that_waits_goes_together(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert batches_of([20, 5, 17, 16, 33]) == [[20, 5, 17, 16, 33]]
