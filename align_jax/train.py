"""The training loop: `train_and_evaluate(config, workdir)`.

The order of operations in `_Run.train` matters for exact resume: the metrics of a step are on disk
before the checkpoint that contains it, its evaluation comes after that checkpoint and is made up
for where it is missing, and lines after the restored step are cut off, so that a kill at any moment
repeats work but never loses or doubles a line.
"""

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from align_jax import __version__, align, config_checks, losses, optim, train_step
from align_jax import evals as evals_lib
from align_jax import mesh as mesh_lib
from align_jax import state as state_lib
from align_jax.data import image_embeddings, mixture, pipeline
from align_jax.data.sources.classes import Classes, open_classes
from align_jax.data.sources.open_source import PairSource
from align_jax.evals import image_classifier, in_training, tables
from align_jax.models import classifier, dual_encoder, native
from align_jax.run import (
    checkpoint,
    divergence,
    history,
    init_from,
    multihost,
    nans,
    report,
    signals,
    welcome,
    workdir,
)
from align_jax.run.profile import Profiler
from align_jax.run.rates import Rates
from align_jax.run.timeline import Timeline
from align_jax.run.watchdog import Watchdog
from align_jax.storage import writing


def train_and_evaluate(
    config: ConfigDict,
    path: str | os.PathLike,
    *,
    resume_from: int | None = None,
    profile: str = "",
    began_s: float | None = None,
) -> dict[str, float]:
    """Trains to `config.train.steps`, continuing from the workdir's checkpoint where there is one.

    Writes config, tokenizer, checkpoints, metrics.jsonl, perf.jsonl, TensorBoard files, plots,
    evaluation results and the retrieval gallery into the workdir.

    Args:
      config: see `config.default_config`.
      path: the workdir; created where missing.
      resume_from: step of the checkpoint to go back to; later ones are set aside. The settings of
        the optimizer may be others from there on. None goes on from the newest.
      profile: "A:B" traces the steps after A, up to B, for TensorBoard.
      began_s: of `time.monotonic`, from when on time is accounted for; None is now.

    Returns:
      The results of the last evaluation, `<evaluator>/<metric>`; empty if a signal ended the run.

    Raises:
      ValueError: a config, source or workdir that cannot work; nothing has been compiled then.
      divergence.TrainingDiverged: see there; the last good checkpoint is kept.
      RuntimeError: an evaluator failed after the last step, which is saved; or the storage failed.
      OSError: the disk is full.
    """
    writing.check_local(path, "--workdir")
    if os.path.isfile(path):
        raise ValueError(f"--workdir {path} is a file; name a folder.")
    config_checks.validate(
        config, num_devices=jax.device_count(), num_processes=jax.process_count()
    )
    timeline = Timeline(began_s=began_s)
    with Watchdog(timeline, config.train.hang_s), contextlib.ExitStack() as stack:
        if multihost.is_lead():
            stack.enter_context(writing.locked(path, "align train"))
        stack.enter_context(writing.explaining_full_disk(path))
        run, state = _open_run(config, Path(path), stack, resume_from, profile, timeline)
        try:
            return run.train(state)
        except OSError as error:  # while a run is under way no path of its user is wrong
            raise RuntimeError(
                f"{error}; the same command continues from the last checkpoint."
            ) from error


def make_program(
    config: ConfigDict, mesh: Mesh, *, vocab_size: int = 0, num_classes: int = 0
) -> tuple[dual_encoder.Model, Any, state_lib.TrainState, Callable]:
    """Returns (model, optimizer, abstract state, jitted train step) of a config; computes nothing.

    Training and `align compile` both start here, so that what is planned is what runs.

    Args:
      config: already validated.
      mesh: of real devices, or of a topology's.
      vocab_size: of the tokenizer, of a dual encoder.
      num_classes: of a classifier.
    """
    schedule = optim.make_schedule(config.optim, config.train.steps)
    if config.task == "classify":
        model = classifier.make_classifier(config.model, num_classes, optim=config.optim)
        optimizer = optim.make_optimizer(config.optim, schedule, optim.CLASSIFIER)
        loss_fn = partial(losses.classify_loss, label_smoothing=config.loss.label_smoothing)
        step_fn = train_step.make_classify_step(
            model, optimizer, schedule, loss_fn, mesh, config.train
        )
    else:
        model = dual_encoder.make_model(
            config.model,
            config.loss,
            vocab_size=vocab_size,
            lora=config.lora,
            optim=config.optim,
        )
        optimizer = optim.make_optimizer(config.optim, schedule)
        loss_fn = losses.make_loss(config.loss, mesh)
        step_fn = train_step.make_train_step(
            model, optimizer, schedule, loss_fn, mesh, config.train
        )
    abstract = state_lib.abstract_state(model, optimizer, mesh, average=config.train.ema_decay > 0)
    step_fn = train_step.compile_train_step(step_fn, abstract, mesh, donate=not config.debug.nans)
    return model, optimizer, abstract, step_fn


class _Feed:
    """The batches of a run on its devices; may begin anew at another one."""

    def __init__(self, open_batches: Callable[[int], pipeline.BatchIterator], rows: NamedSharding):
        self._open_batches, self._rows = open_batches, rows
        self._batches: pipeline.BatchIterator | None = None

    def seek(self, number: int) -> None:
        """Makes a batch of the stream, from 0, the next one."""
        self.close()
        self._batches = self._open_batches(number)

    def next(self) -> tuple[dict[str, jax.Array], pipeline.Batch, float]:
        """Returns (arrays on the devices, the batch, seconds that it took)."""
        start_s = time.perf_counter()
        batch = next(self._batches)
        arrays = mesh_lib.put_batch(batch.arrays, self._rows)
        return arrays, batch, time.perf_counter() - start_s

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()


@dataclasses.dataclass(frozen=True)
class _Run:
    """What the loop needs around the state."""

    config: ConfigDict
    path: Path
    source: PairSource | Classes
    step_fn: Callable
    feed: _Feed
    restore: Callable[[int | None], tuple[state_lib.TrainState, dict[str, np.ndarray]]]
    checkpoints: checkpoint.Checkpointer
    reporter: report.Reporter
    evaluations: in_training.Evaluations
    stop: signals.StopSignals
    timeline: Timeline
    profiler: Profiler

    def train(self, state: state_lib.TrainState) -> dict[str, float]:
        """The loop; see the first lines of this file before changing the order of operations."""
        config, stop, evaluations = self.config, self.stop, self.evaluations
        last = config.train.steps
        step = int(state.step)
        is_new = step < last
        if step and evaluations.due(step):  # the run was stopped before it
            is_new = True
            self._evaluate(step, state)
        elif step == last and evaluations.results:
            multihost.log(tables.format_table(evaluations.results, evaluations.evaluators))
        if step == last:
            multihost.log(
                f"step {step}: this run is complete; a larger config.train.steps continues it."
            )
        step_fn, pending, batch, stopping = self.step_fn, None, None, stop.requested
        if step < last and not stopping:
            self._note_start(step)
            batch = self._next(step)
            if batch is not None:
                step_fn = self._compile(state, batch[0])
            stopping = stop.requested
        while step < last and not stopping:
            arrays, host_batch, wait_s = batch
            self.timeline.enter("step", step + 1)
            self.profiler.before(step)
            state, metrics = step_fn(state, arrays)
            step += 1
            try:
                # While the device works on this step, the host fetches the next batch and reports
                # the previous step.
                batch = self._next(step) if step < last else None
                if pending:
                    self.reporter.report(*pending)
                pending = step, metrics, host_batch, wait_s

                # Read once: a signal that comes from here on stops the run after the next step.
                stopping = "SIGTERM" if multihost.preempted(step) else stop.requested
                evaluates = evaluations.due(step) and not stopping
                saves = step == last or step % config.checkpoint.every_steps == 0 or stopping
                saves = saves or (evaluates and config.checkpoint.best)
                if saves or evaluates:
                    pending = self.reporter.report(*pending)
                self.profiler.after(step, metrics)
            except divergence.TrainingDiverged as error:
                state = metrics = arrays = pending = None  # the devices hold one state, not two
                state = self._roll_back(error)
                step = int(state.step)
                batch = self._next(step)
                stopping = stop.requested
                continue
            if saves:
                self._save(state)
            if evaluates and not self._evaluate(step, state):
                stopping = stop.requested
                if not saves:
                    self._save(state)
        with self.timeline.inside("save", step):
            self.checkpoints.wait()
        self.reporter.progress.close()
        if is_new:
            self.reporter.time(step)
            multihost.log(self.timeline.summary())
            if bound := self.reporter.rates.summary(self.reporter.step_time_s):
                multihost.log(bound)
        if stopping:
            saved = f"saved step {step}" if step else "no step was done"
            multihost.log(f"{stopping}: {saved}; run the same command to continue.")
        elif evaluations.failed:
            raise RuntimeError(f"step {step}: {evaluations.failed} All {step} steps are saved.")
        return evaluations.results

    def _note_start(self, step: int) -> None:
        if multihost.is_lead():
            count = {"processes": jax.process_count(), "devices": jax.device_count()}
            history.append(self.path, "start", step=step, version=__version__, **count)

    def _next(self, step: int) -> tuple[dict[str, jax.Array], pipeline.Batch, float] | None:
        """Returns the batch of the step after this one; None if a signal came."""
        try:
            with self.timeline.inside("data", step + 1), self.stop.giving_up():
                return self.feed.next()
        except signals.Interrupted:
            return None

    def _compile(
        self, state: state_lib.TrainState, arrays: dict[str, jax.Array]
    ) -> Callable | None:
        """Returns the compiled step; None if a signal came."""
        try:
            with self.timeline.inside("compilation", int(state.step)):
                compiled = self.stop.run(lambda: self.step_fn.lower(state, arrays).compile())
                self.reporter.rates.take_program(compiled)
        except signals.Interrupted:
            return None
        multihost.log(welcome.memory_plan(compiled, state))
        if self.config.debug.nans:
            return nans.naming_first(compiled, self.step_fn, self.timeline)
        return compiled

    def _evaluate(self, step: int, state: state_lib.TrainState) -> bool:
        with self.timeline.inside("evaluation", step):
            return self.evaluations.run(step, state.served(), self.stop)

    def _save(self, state: state_lib.TrainState) -> None:
        step = int(state.step)
        with self.timeline.inside("save", step):
            self.timeline.saved(step)
            if step % self.config.log.every_steps and step < self.config.train.steps:
                self.reporter.time(step)
            self.reporter.writer.sync()
            self.checkpoints.save(state, self.reporter.data(), best=self.evaluations.best_step)

    def _roll_back(self, error: divergence.TrainingDiverged) -> state_lib.TrainState:
        """Returns the last good state, whose next batch is the one after those in between.

        All processes have found the same loss, and do the same.

        Raises:
          divergence.TrainingDiverged: the config forbids it, or there is no good state.
        """
        config, before = self.config.train, self.reporter.skipped
        self.checkpoints.wait()
        saved = self.checkpoints.steps()
        good = [step for step in saved if step < error.step - error.span]
        # Where older checkpoints were cleaned up, the first state is no last good one.
        to = good[-1] if good else 0
        is_there = good or not saved or saved[0] <= self.config.checkpoint.every_steps
        if config.on_divergence == "stop" or len(before) >= config.max_rollbacks or not is_there:
            kept = f"checkpoint {to} is the last good one" if good else "no checkpoint before it"
            spent = f" after {len(before)} rollbacks" if len(before) else ""
            raise divergence.TrainingDiverged(
                error.step,
                error.span,
                f"{error.reason}; stopped{spent} ({kept}). Go back to a good one by --resume-from "
                "STEP with a lower config.optim.learning_rate or a config.optim.clip_norm, or let "
                "the run leave out what it diverges on by config.train.on_divergence=rollback.",
            ) from error
        first, end = to + self.reporter.num_skipped, error.step + self.reporter.num_skipped
        # Checkpoints first: as long as the line is not written, nothing has been gone back from.
        self.checkpoints.delete_after(to)
        if multihost.is_lead():
            examples, shards = self._examples(end - 1)
            history.append(
                self.path,
                "rollback",
                step=error.step,
                to=to,
                skipped=[first, end],
                reason=error.reason,
                examples=examples,
                shards=shards,
            )
            shown = ", ".join(shards[:3]) + (f" and {len(shards) - 3} more" * (len(shards) > 3))
            where = f"checkpoint {to}" if to else "the start"
            self.reporter.progress.log(
                f"step {error.step}: {error.reason}; back to {where} "
                f"(rollback {len(before) + 1} of {config.max_rollbacks}). Batches {first + 1} to "
                f"{end} of the data are left out, rows {first * config.batch_size} to "
                f"{end * config.batch_size - 1}; the last one holds records "
                f"{', '.join(map(str, examples[:8]))}{' ...' * (len(examples) > 8)} of {shown}; "
                "see history.jsonl"
            )
        self.timeline.lose(to)
        with self.timeline.inside("restore", to):
            state, data = self.restore(to or None)
        # The checkpoint may be of before an earlier rollback, which led to the same step.
        data["skipped"] = np.array([*before.tolist(), [to, first, end]], np.int64)
        self.reporter.rewind(to, data)
        self.reporter.time(to)
        self.evaluations.rewind(to)
        self.feed.seek(to + self.reporter.num_skipped)
        return state

    def _examples(self, number: int) -> tuple[list[int], list[str]]:
        """Returns (indices, files or shards) of the records of a batch of the stream."""
        order, size = (
            mixture.Order(self.source, self.config.train.seed),
            self.config.train.batch_size,
        )
        indices = [int(order[at]) for at in range(number * size, (number + 1) * size)]
        places = (
            re.sub(r"^.*(: record \d+ of| in|: row \d+ of) ", "", self.source.where(index))
            for index in indices
        )
        return indices, sorted(set(places))


def _open_run(
    config: ConfigDict,
    path: Path,
    stack: contextlib.ExitStack,
    resume_from: int | None,
    profile: str,
    timeline: Timeline,
) -> tuple[_Run, state_lib.TrainState]:
    """Returns the run and the state that it starts or goes on with; the stack closes its files."""
    mesh = mesh_lib.make_mesh(**config.mesh)
    if config.train.native_kernels:
        native.load(mesh.devices.flat[0].platform)
    is_classifier = config.task == "classify"
    source = open_classes(config.data) if is_classifier else mixture.open_sources(config.data)
    config, lengths = config_checks.in_steps(config, len(source))
    profiler = stack.enter_context(Profiler(path, profile, config.train.steps))
    embeddings = None
    if config.data.image_embeddings:
        embeddings = image_embeddings.ImageEmbeddings(config.data.image_embeddings, source)
    with _naming("config.eval.evaluators"):
        evaluators = evals_lib.make_evaluators(config.eval.evaluators.to_dict())
        evals_lib.check_classes(evaluators, source.classes if is_classifier else None)
    prepared = config
    takes_words = not is_classifier and config.init_towers != "image"
    if config.init_from and takes_words and not workdir.is_run(path):
        with _naming("config.init_from"):
            prepared = init_from.with_tokenizer(config)
    opened = multihost.lead_first(
        lambda: workdir.open_for_training(
            path, prepared, source, log=multihost.log, resume_from=resume_from
        )
    )
    tokenizer, preprocessing = opened or workdir.read(path)
    size = (
        {"num_classes": len(source.classes)}
        if is_classifier
        else {"vocab_size": tokenizer.vocab_size}
    )
    model, optimizer, abstract, step_fn = make_program(config, mesh, **size)

    checkpoints = checkpoint.Checkpointer(
        path / "checkpoints", keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every
    )
    stack.callback(checkpoints.close)

    def restore(step: int | None) -> tuple[state_lib.TrainState, dict[str, np.ndarray]]:
        if step is None:
            return _first_state(config, model, optimizer, abstract), report.nothing_done()
        return checkpoints.restore(step, abstract, report.nothing_done())

    resume_step = checkpoints.latest_step()
    with timeline.inside("restore" if resume_step else "startup", resume_step or 0):
        state, data = restore(resume_step)
    data["skipped"] = history.with_unsaved(path, resume_step or 0, data["skipped"])
    log_every = max(config.log.every_steps, workdir.logged_every(path))
    multihost.lead_first(lambda: workdir.write_config(path, config))
    for line in lengths:
        multihost.log(line)
    welcome.welcome(config, path, mesh, source, model, abstract, resume_step)

    reporter = report.Reporter(
        path,
        config,
        source,
        timeline,
        Rates(config, model, mesh),
        resume_step=resume_step,
        every=log_every,
        data=data,
    )
    stack.enter_context(reporter)
    stop = stack.enter_context(signals.StopSignals())
    rows = mesh_lib.batch_sharding(mesh)

    def open_batches(number: int) -> pipeline.BatchIterator:
        return pipeline.train_batches(
            source,
            tokenizer,
            config.data,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            hash_pairs=config.loss.mask_duplicates != "none",
            start_step=number,
            rows=mesh_lib.process_rows(rows, config.train.batch_size, jax.process_index()),
            embeddings=embeddings,
        )

    feed = _Feed(open_batches, rows)
    stack.callback(feed.close)
    feed.seek(int(state.step) + reporter.num_skipped)
    words = source.classes if is_classifier else tokenizer
    make = image_classifier.ImageClassifier if is_classifier else align.Align
    encoder = make(
        model, state.served(), words, preprocessing, mesh, batch_size=config.eval.batch_size
    )
    if embeddings:
        embeddings.check(source, encoder.encode_image)
    run = _Run(
        config=config,
        path=path,
        source=source,
        step_fn=step_fn,
        feed=feed,
        restore=restore,
        checkpoints=checkpoints,
        reporter=reporter,
        evaluations=in_training.Evaluations(path, config, evaluators, encoder, reporter),
        stop=stop,
        timeline=timeline,
        profiler=profiler,
    )
    return run, state


def _first_state(
    config: ConfigDict, model: dual_encoder.Model, optimizer: Any, abstract: Any
) -> state_lib.TrainState:
    state = train_step.init_state(model, optimizer, abstract, seed=config.train.seed)
    if not config.init_from:
        return state
    variables = init_from.start_from(config.init_from, config.init_towers, model, state.variables())
    return train_step.start_average(dataclasses.replace(state, **variables), abstract)


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Puts the config path in front of the ValueErrors of code that does not know it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
