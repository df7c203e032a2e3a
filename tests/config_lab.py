"""Runs of the training loop whose keys are changed, each once: for test_config_keys."""

import multiprocessing
import threading

import jax
import numpy as np
import pytest
from helpers import StubStep
from ml_collections import ConfigDict

from align_jax import align, mesh, train
from align_jax import config as config_lib

BASE = {
    "model.image.variant": "femto",
    "model.text.variant": "tiny",
    "model.embed_dim": 32,
    "model.dtype": "float32",
    "model.bn_group_size": 4,
    "data.source": "one.jsonl?images=images",
    "data.image_size": 33,
    "data.resize_size": 40,
    "data.resize": "pil",
    "data.max_tokens": 8,
    "data.num_threads": 1,
    "data.vocab_size": 130,
    "optim.warmup_steps": 1,
    "optim.weight_decay": 0.1,
    "optim.temperature": "log",
    "train.batch_size": 8,
    "train.steps": 4,
    "checkpoint.every_steps": 4,
    "log.every_steps": 1,
}


def lowered(config):
    one_device = mesh.make_mesh(1, 1, devices=jax.devices()[:1])
    *_, abstract, step_fn = train.make_program(config, one_device, vocab_size=60)
    batch, size, length = (
        config.train.batch_size,
        config.data.image_size,
        config.data.max_tokens,
    )
    shapes = {
        "image": ((batch, size, size, 3), np.uint8),
        "ids": ((batch, length), np.int32),
        "mask": ((batch, length), np.int32),
        "index": ((batch,), np.int32),
        "caption_hash": ((batch, 2), np.uint32),
        "image_hash": ((batch, 2), np.uint32),
    }
    rows = mesh.batch_sharding(one_device)
    arrays = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        for name, (shape, dtype) in shapes.items()
    }
    return step_fn.lower(abstract, arrays).as_text()


class Stop(Exception):
    """Ends a run where the observer has seen enough."""


class Run:
    """A run of the loop with a step that does nothing but look at its batch."""

    def __init__(self, lab, config, workdir):
        self.workdir, self.evaluations, self.children = workdir, [], 0
        self.watched = False
        self._readers, self._changed = set(), threading.Condition()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(lab.folder)
            stub = StubStep(self._count_children).patch(patch)
            self._watch_source(patch)
            self._watch_evaluators(patch)
            patch.setattr(train.image_embeddings.ImageEmbeddings, "check", lambda *args: None)
            train.train_and_evaluate(config, workdir)
        self.threads = len(self._readers)
        self.batches = {
            (step, name): (array.shape, array.tobytes())
            for step, (batch,) in stub.batches.items()
            for name, array in batch.items()
        }

    def _count_children(self, step):
        self.watched |= any(t.name == "align_jax.watch" for t in threading.enumerate())
        self.children = max(self.children, len(multiprocessing.active_children()))
        return 1.0

    def _watch_source(self, patch):
        run, open_sources = self, train.mixture.open_sources

        def watched(*args):
            source = open_sources(*args)
            if len(getattr(source, "sources", "1")) > 1:
                return source
            read = type(source).__getitem__

            def getitem(source, index):
                with run._changed:
                    first = not run._readers
                    run._readers.add(threading.get_ident())
                    run._changed.notify_all()
                    if first:  # gives a second thread, if there is one, the time to come
                        run._changed.wait_for(lambda: len(run._readers) > 1, timeout=0.5)
                return read(source, index)

            patch.setattr(type(source), "__getitem__", getitem)
            return source

        if multiprocessing.parent_process() is None:
            patch.setattr(train.mixture, "open_sources", watched)

    def _watch_evaluators(self, patch):
        run, make = self, train.evals_lib.make_evaluators

        class Probe:
            name = "probe"

            def __init__(self, names):
                self._names = names

            def __call__(self, model):
                model.encode_text(["a red square"])
                run.evaluations.append(tuple(self._names))
                return {"calls": len(run.evaluations)}

        def encode(*args, batch_size, **kwargs):
            run.evaluations.append(batch_size)
            return np.zeros((1, 2), np.float32)

        patch.setattr(align.encode, "encode", encode)
        patch.setattr(
            train.evals_lib,
            "make_evaluators",
            lambda config: [Probe([evaluator.name for evaluator in make(config)])],
        )
        patch.setattr(train.tables, "format_table", lambda results, *_: str(results))


class Lab:
    """Data to train on, and the runs that were made of it, each once."""

    def __init__(self, folder):
        self.folder = folder
        self._runs, self._programs = {}, {}

    def program(self, config):
        key = config_lib.to_json(config)
        if key not in self._programs:
            self._programs[key] = lowered(config)
        return self._programs[key]

    def config(self, changes):
        c = config_lib.default_config()
        changes = BASE | changes
        groups = {k: v for k, v in changes.items() if isinstance(v, dict)}
        c.update_from_flattened_dict({k: v for k, v in changes.items() if k not in groups})
        for key, value in groups.items():
            group, name = key.split(".")
            c[group][name] = ConfigDict(value)
        return c.lock()

    def run(self, changes, repeat=0):
        config = self.config(changes)
        key = (config_lib.to_json(config), repeat)
        if key not in self._runs:
            self._runs[key] = Run(self, config, self.folder / f"run{len(self._runs)}")
        return self._runs[key]

    def diverged(self, changes):
        config = self.config(changes | {"train.steps": 25, "checkpoint.every_steps": 12})
        key = (config_lib.to_json(config), "diverged")
        if key not in self._runs:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(self.folder)
                StubStep(lambda step: {23: 9.0, 24: np.nan}.get(step, 1.0)).patch(patch)
                with pytest.raises(RuntimeError) as error:
                    train.train_and_evaluate(config, self.folder / f"run{len(self._runs)}")
            self._runs[key] = str(error.value)
        return self._runs[key]

    def until_program(self, changes, workdir="mesh"):
        def make_program(config, mesh_, **kwargs):
            raise Stop(dict(mesh_.shape))

        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.setattr(train, "make_program", make_program)
            patch.setattr(train.jax, "device_count", lambda: 1)  # microbatches need their share
            try:
                train.train_and_evaluate(self.config(changes), self.folder / workdir)
            except (Stop, ValueError) as end:
                return str(end)
