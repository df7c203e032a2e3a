"""The training loop: `train_and_evaluate(config, workdir)`.

The order of operations in `_Run.train` matters for exact resume: the metrics of a step are on disk
before the checkpoint that contains it, its evaluation comes after that checkpoint and is made up
for where it is missing, and lines after the restored step are cut off, so that a kill at any moment
repeats work but never loses or doubles a line.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from align_jax import align, config_checks, losses, optim, train_step
from align_jax import evals as evals_lib
from align_jax import mesh as mesh_lib
from align_jax import state as state_lib
from align_jax.data import mixture, pipeline
from align_jax.evals import in_training, tables
from align_jax.models import dual_encoder
from align_jax.run import checkpoint, init_from, multihost, report, signals, welcome, workdir
from align_jax.storage import writing


def train_and_evaluate(config: ConfigDict, path: str | os.PathLike) -> dict[str, float]:
    """Trains to `config.train.steps`, continuing from the workdir's checkpoint where there is one.

    Writes config, tokenizer, checkpoints, metrics.jsonl, perf.jsonl, TensorBoard files, plots,
    evaluation results and the retrieval gallery into the workdir.

    Args:
      config: see `config.default_config`.
      path: the workdir; created where missing.

    Returns:
      The results of the last evaluation, `<evaluator>/<metric>`; empty if a signal ended the run.

    Raises:
      ValueError: a config, source or workdir that cannot work; nothing has been compiled then.
      report.TrainingDiverged: loss or gradient is not finite; the last good checkpoint is kept.
      RuntimeError: an evaluator failed after the last step, which is saved.
      OSError: the disk is full.
    """
    writing.check_local(path, "--workdir")
    if os.path.isfile(path):
        raise ValueError(f"--workdir {path} is a file; name a folder.")
    with contextlib.ExitStack() as stack:
        if multihost.is_lead():
            stack.enter_context(writing.locked(path, "align train"))
        stack.enter_context(writing.explaining_full_disk(path))
        run, state = _open_run(config, Path(path), stack)
        return run.train(state)


def make_program(
    config: ConfigDict, mesh: Mesh, *, vocab_size: int
) -> tuple[dual_encoder.DualEncoder, Any, state_lib.TrainState, Callable]:
    """Returns (model, optimizer, abstract state, jitted train step) of a config; computes nothing.

    Training and `align compile` both start here, so that what is planned is what runs.

    Args:
      config: already validated.
      mesh: of real devices, or of a topology's.
      vocab_size: of the tokenizer.
    """
    model = dual_encoder.make_model(
        config.model,
        config.loss,
        vocab_size=vocab_size,
        lora=config.lora,
        optim=config.optim,
    )
    schedule = optim.make_schedule(config.optim, config.train.steps)
    optimizer = optim.make_optimizer(config.optim, schedule)
    abstract = state_lib.abstract_state(model, optimizer, mesh)
    loss_fn = losses.make_loss(config.loss, mesh)
    step_fn = train_step.make_train_step(model, optimizer, schedule, loss_fn, mesh, config.train)
    return model, optimizer, abstract, train_step.compile_train_step(step_fn, abstract, mesh)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What the loop needs around the state."""

    config: ConfigDict
    step_fn: Callable
    batches: Iterator[pipeline.Batch]
    rows: NamedSharding
    checkpoints: checkpoint.Checkpointer
    reporter: report.Reporter
    evaluations: in_training.Evaluations
    stop: signals.StopSignals

    def train(self, state: state_lib.TrainState) -> dict[str, float]:
        """The loop; see the first lines of this file before changing the order of operations."""
        config, stop, evaluations = self.config, self.stop, self.evaluations
        last = config.train.steps
        step = int(state.step)
        if step and evaluations.due(step):  # the run was stopped before it
            evaluations.run(step, state.variables(), stop)
        elif step == last and evaluations.results:
            multihost.log(tables.format_table(evaluations.results, evaluations.evaluators))
        if step == last:
            multihost.log(
                f"step {step}: this run is complete; a larger config.train.steps continues it."
            )
        step_fn, pending, batch, stopping = self.step_fn, None, None, stop.requested
        if step < last and not stopping:
            batch = self._next()
            step_fn = step_fn.lower(state, batch[0]).compile()
            multihost.log(welcome.memory_plan(step_fn, state))
            stopping = stop.requested  # compiling cannot be broken off, but costs no step
        while step < last and not stopping:
            arrays, host_batch, wait_s = batch
            state, metrics = step_fn(state, arrays)
            step += 1
            # While the device works on this step, the host fetches the next batch and reports the
            # previous step.
            batch = self._next() if step < last else None
            if pending:
                self.reporter.report(*pending)
            pending = step, metrics, host_batch, wait_s

            # Read once: a signal that comes from here on stops the run after the next step.
            stopping = "SIGTERM" if multihost.preempted(step) else stop.requested
            saves = step == last or step % config.checkpoint.every_steps == 0 or stopping
            evaluates = evaluations.due(step) and not stopping
            if saves or evaluates:
                pending = self.reporter.report(*pending)
            if saves:
                self._save(state)
            if evaluates and not evaluations.run(step, state.variables(), stop):
                stopping = stop.requested
                if not saves:
                    self._save(state)
        self.checkpoints.wait()
        self.reporter.progress.close()
        if stopping:
            saved = f"saved step {step}" if step else "no step was done"
            multihost.log(f"{stopping}: {saved}; run the same command to continue.")
        elif evaluations.failed:
            raise RuntimeError(f"step {step}: {evaluations.failed} All {step} steps are saved.")
        return evaluations.results

    def _next(self) -> tuple[dict[str, jax.Array], pipeline.Batch, float]:
        """Returns (arrays on the devices, the batch, seconds that it took)."""
        start_s = time.perf_counter()
        batch = next(self.batches)
        arrays = mesh_lib.put_batch(batch.arrays, self.rows)
        return arrays, batch, time.perf_counter() - start_s

    def _save(self, state: state_lib.TrainState) -> None:
        self.reporter.writer.sync()
        self.checkpoints.save(state, {"dropped": self.reporter.total_dropped()})


def _open_run(
    config: ConfigDict, path: Path, stack: contextlib.ExitStack
) -> tuple[_Run, state_lib.TrainState]:
    """Returns the run and the state that it starts or goes on with; the stack closes its files."""
    config_checks.validate(
        config, num_devices=jax.device_count(), num_processes=jax.process_count()
    )
    mesh = mesh_lib.make_mesh(**config.mesh)
    source = mixture.open_sources(config.data)
    with _naming("config.eval.evaluators"):
        evaluators = evals_lib.make_evaluators(config.eval.evaluators.to_dict())
    prepared = config
    if config.init_from and config.init_towers != "image" and not workdir.is_run(path):
        with _naming("config.init_from"):
            prepared = init_from.with_tokenizer(config)
    opened = multihost.lead_first(
        lambda: workdir.open_for_training(path, prepared, source, log=multihost.log)
    )
    tokenizer, preprocessing = opened or workdir.read(path)
    model, optimizer, abstract, step_fn = make_program(
        config, mesh, vocab_size=tokenizer.vocab_size
    )

    checkpoints = checkpoint.Checkpointer(path / "checkpoints", keep=config.checkpoint.keep)
    stack.callback(checkpoints.close)
    dropped, resume_step = report.no_drops(), checkpoints.latest_step()
    if resume_step is None:
        state = _first_state(config, model, optimizer, abstract)
    else:
        state, data = checkpoints.restore(resume_step, abstract, {"dropped": dropped})
        dropped = data["dropped"]
    log_every = max(config.log.every_steps, workdir.logged_every(path))
    multihost.lead_first(lambda: workdir.write_config(path, config))
    welcome.welcome(config, path, mesh, source, model, abstract, resume_step)

    reporter = report.Reporter(
        path,
        config,
        source,
        checkpoints,
        resume_step=resume_step,
        every=log_every,
        dropped=dropped,
    )
    stack.enter_context(reporter)
    stop = stack.enter_context(signals.StopSignals())
    rows = mesh_lib.batch_sharding(mesh)
    batches = pipeline.train_batches(
        source,
        tokenizer,
        config.data,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        hash_pairs=config.loss.mask_duplicates != "none",
        start_step=int(state.step),
        rows=mesh_lib.process_rows(rows, config.train.batch_size, jax.process_index()),
    )
    stack.callback(batches.close)
    parts = model, state.variables(), tokenizer, preprocessing, mesh
    encoder = align.Align(*parts, batch_size=config.eval.batch_size)
    run = _Run(
        config=config,
        step_fn=step_fn,
        batches=batches,
        rows=rows,
        checkpoints=checkpoints,
        reporter=reporter,
        evaluations=in_training.Evaluations(path, config, evaluators, encoder, reporter),
        stop=stop,
    )
    return run, state


def _first_state(
    config: ConfigDict, model: dual_encoder.DualEncoder, optimizer: Any, abstract: Any
) -> state_lib.TrainState:
    state = train_step.init_state(model, optimizer, abstract, seed=config.train.seed)
    if not config.init_from:
        return state
    multihost.log(f"starting from {config.init_from} ({config.init_towers})")
    variables = init_from.start_from(config.init_from, config.init_towers, model, state.variables())
    return dataclasses.replace(state, **variables)


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Puts the config path in front of the ValueErrors of code that does not know it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
