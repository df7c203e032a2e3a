"""The training loop: `train_and_evaluate(config, workdir)`.

The order of operations in `_Run.train` matters for exact resume: the metrics of a step are on disk
before the checkpoint that contains it, its evaluation comes after that checkpoint and is made up
for where it is missing, and lines after the restored step are cut off, so that a kill at any moment
repeats work but never loses or doubles a line.
"""

import contextlib
import dataclasses
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from align_jax import align, config_checks, losses, optim, train_step, trees
from align_jax import evals as evals_lib
from align_jax import mesh as mesh_lib
from align_jax import state as state_lib
from align_jax.data import mixture, pipeline
from align_jax.models import dual_encoder
from align_jax.run import checkpoint, init_from, metrics, multihost, plots, signals, workdir
from align_jax.storage import writing


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is no longer finite."""


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
      TrainingDiverged: loss or gradient is not finite; the last good checkpoint is kept.
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
        return _train_and_evaluate(config, path)


def _train_and_evaluate(config: ConfigDict, path: str | os.PathLike) -> dict[str, float]:
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
        lambda: workdir.open_for_training(path, prepared, source, log=_log)
    )
    tokenizer, preprocessing = opened or workdir.read(path)

    model, optimizer, abstract, step_fn = make_program(
        config, mesh, vocab_size=tokenizer.vocab_size
    )

    checkpoints = checkpoint.Checkpointer(Path(path) / "checkpoints", keep=config.checkpoint.keep)
    dropped = np.zeros(len(pipeline.DROP_REASONS), np.int64)
    resume_step = checkpoints.latest_step()
    if resume_step is None:
        state = train_step.init_state(model, optimizer, abstract, seed=config.train.seed)
        if config.init_from:
            _log(f"starting from {config.init_from} ({config.init_towers})")
            variables = init_from.start_from(
                config.init_from, config.init_towers, model, state.variables()
            )
            state = dataclasses.replace(state, **variables)
    else:
        state, data = checkpoints.restore(resume_step, abstract, {"dropped": dropped})
        dropped = np.array(data["dropped"])
    log_every = max(config.log.every_steps, workdir.logged_every(path))
    multihost.lead_first(lambda: workdir.write_config(path, config))
    _welcome(config, path, mesh, source, abstract, resume_step)

    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.close)
        if multihost.is_lead():
            writer = stack.enter_context(
                metrics.MetricWriter(path, resume_step=resume_step, every=log_every, log=_log)
            )
        else:
            writer = metrics.NoWriter()
        stop = stack.enter_context(signals.StopSignals())
        batches = pipeline.train_batches(
            source,
            tokenizer,
            config.data,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            hash_pairs=config.loss.mask_duplicates != "none",
            start_step=int(state.step),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        stack.callback(batches.close)
        encoder = align.Align(
            model,
            state.variables(),
            tokenizer,
            preprocessing,
            mesh,
            batch_size=config.eval.batch_size,
        )
        run = _Run(config, path, mesh, checkpoints, writer, encoder, evaluators, dropped, source)
        return run.train(state, step_fn, batches, stop)


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
    model = dual_encoder.make_model(config.model, config.loss, vocab_size=vocab_size)
    schedule = optim.make_schedule(config.optim, config.train.steps)
    optimizer = optim.make_optimizer(config.optim, schedule)
    abstract = state_lib.abstract_state(model, optimizer, mesh)
    loss_fn = losses.make_loss(config.loss, mesh)
    step_fn = train_step.make_train_step(model, optimizer, schedule, loss_fn, mesh, config.train)
    return model, optimizer, abstract, train_step.compile_train_step(step_fn, abstract, mesh)


class _Run:
    """What the loop needs around the state; one method for each thing that happens in a step."""

    def __init__(
        self, config, path, mesh, checkpoints, writer, encoder, evaluators, dropped, source
    ):
        self.config = config
        self.source = source
        self.path = Path(path)
        self.rows = mesh_lib.batch_sharding(mesh)
        self.checkpoints = checkpoints
        self.writer = writer
        self.encoder = encoder
        self.evaluators = evaluators
        self.is_lead = multihost.is_lead()
        # Of this process; process 0 carries what all of them dropped before the checkpoint.
        before = dropped if self.is_lead else np.zeros_like(dropped)
        self.dropped = Counter(dict(zip(pipeline.DROP_REASONS, before.tolist(), strict=True)))
        self.progress = metrics.Progress(
            config.train.steps, config.train.batch_size, silent=not self.is_lead
        )
        self.results: dict[str, float] = {}
        self.failed = ""  # what the evaluators of the last evaluation failed by
        self.evaluated_step = -1
        if self.is_lead:
            for line in metrics.read_metrics(self.path / "metrics.jsonl"):
                results = {key[5:]: value for key, value in line.items() if key.startswith("eval/")}
                if results and not any(key.endswith("/failed") for key in results):
                    self.results, self.evaluated_step = results, line["step"]
        self.evaluated_step = multihost.agree(self.evaluated_step)

    def train(self, state, step_fn, batches: Iterator[pipeline.Batch], stop) -> dict[str, float]:
        """The loop; see the first lines of this file before changing the order of operations."""
        config, last = self.config, self.config.train.steps
        step = int(state.step)
        if step and self._evaluation_due(step):
            self._evaluate(step, state, stop)  # the run was stopped before it
        elif step == last and self.results:
            _log(evals_lib.format_table(self.results))
        if step == last:
            _log(f"step {step}: this run is complete; a larger config.train.steps continues it.")
        pending, batch, stopping = None, None, stop.requested
        if step < last and not stopping:
            batch = self._next(batches)
            step_fn = step_fn.lower(state, batch[0]).compile()
            _log(memory_plan(step_fn, state))
            stopping = stop.requested  # compiling cannot be broken off, but costs no step
        while step < last and not stopping:
            arrays, host_batch, wait_s = batch
            state, step_metrics = step_fn(state, arrays)
            step += 1
            # While the device works on this step, the host fetches the next batch and reports the
            # previous step.
            batch = self._next(batches) if step < last else None
            if pending:
                self._report(*pending)
            pending = (step, step_metrics, host_batch, wait_s)

            # Read once: a signal that comes from here on stops the run after the next step.
            stopping = "SIGTERM" if multihost.preempted(step) else stop.requested
            saves = step == last or step % config.checkpoint.every_steps == 0 or stopping
            evaluates = self._evaluation_due(step) and not stopping
            if saves or evaluates:
                pending = self._report(*pending)
            if saves:
                self._save(state)
            if evaluates and not self._evaluate(step, state, stop):
                stopping = stop.requested
                if not saves:
                    self._save(state)
        self.checkpoints.wait()
        self.progress.close()
        if stopping:
            saved = f"saved step {step}" if step else "no step was done"
            _log(f"{stopping}: {saved}; run the same command to continue.")
        elif self.failed:
            raise RuntimeError(f"step {step}: {self.failed} All {step} steps are saved.")
        return self.results

    def _evaluation_due(self, step) -> bool:
        if step % self.config.eval.every_steps and step != self.config.train.steps:
            return False
        return step != self.evaluated_step

    def _next(self, batches):
        start_s = time.perf_counter()
        batch = next(batches)
        arrays = mesh_lib.put_batch(batch.arrays, self.rows)
        return arrays, batch, time.perf_counter() - start_s

    def _report(self, step, step_metrics, batch, wait_s) -> None:
        values = {name: float(value) for name, value in jax.device_get(step_metrics).items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise TrainingDiverged(self._diverged(step, values))
        for reason, count in batch.dropped.items():
            if not self.dropped[reason]:
                self.progress.log(
                    f"skipped {batch.dropped_keys[reason]!r} ({reason}); further ones are counted "
                    f"as data/dropped_{reason} in metrics.jsonl"
                )
            self.dropped[reason] += count
        self.progress.update(step, values["loss"], wait_s)
        if step % self.config.log.every_steps == 0 or step == self.config.train.steps:
            totals = zip(pipeline.DROP_REASONS, self._all_dropped().tolist(), strict=True)
            data = {f"data/dropped_{reason}": count for reason, count in totals if count}
            data |= {f"data/problems/{k}": count for k, count in self.source.problems.items()}
            epochs = mixture.epochs(self.source, step * self.config.train.batch_size)
            data |= {f"data/{key}": count for key, count in epochs.items()}
            self.writer.write(step, {f"train/{k}": v for k, v in values.items()} | data)
            self.writer.write_timing(step, self.progress.timing())

    def _diverged(self, step, values) -> str:
        self.checkpoints.wait()
        # The parameters of checkpoint step - 1 are those that gave this loss.
        good = [saved for saved in self.checkpoints.steps() if saved < step - 1]
        kept = f"checkpoint {good[-1]} is the last good one" if good else "no checkpoint before it"
        return (
            f"step {step}: loss is {values['loss']}, gradient norm {values['grad_norm']}; stopped "
            f"({kept}). Start another --workdir with a lower config.optim.learning_rate, more "
            "config.optim.warmup_steps or a config.optim.clip_norm."
        )

    def _save(self, state) -> None:
        self.writer.sync()
        self.checkpoints.save(state, {"dropped": self._all_dropped()})

    def _all_dropped(self) -> np.ndarray:
        counts = [self.dropped[reason] for reason in pipeline.DROP_REASONS]
        return multihost.total(np.array(counts, np.int64))

    def _evaluate(self, step, state, stop) -> bool:
        """Returns whether all evaluators had their turn; a signal breaks them off."""
        self.encoder.variables = state.variables()
        results, failed = {}, []
        try:
            with stop.giving_up():
                for evaluator in self.evaluators:
                    try:
                        results |= evals_lib.run_evaluators([evaluator], self.encoder)
                    except (ValueError, RuntimeError) as error:
                        if jax.process_count() > 1:  # the others wait for this one
                            raise RuntimeError(f"step {step}: {error}") from error
                        results[f"{evaluator.name}/failed"] = 1
                        failed.append(" ".join(str(error).split()))
        except signals.Interrupted:
            return False
        self.results, self.failed, self.evaluated_step = results, " ".join(failed), step
        for line in failed:
            self.progress.log(f"step {step}: {line} The run goes on without these numbers.")
        if not self.is_lead:
            return True
        problems = evals_lib.problems_of(self.evaluators)
        if self.results:
            self.progress.log(f"step {step}\n{evals_lib.format_table(self.results, problems)}")
            evals_lib.write_json(
                self.path / "eval" / f"step_{step:08d}.json",
                self.results,
                {"workdir": self.path.name, "step": step, "config": self.config.to_dict()},
                problems,
            )
            # After its file: where the line is, a resumed run does not evaluate again.
            self.writer.write(step, {f"eval/{key}": v for key, v in self.results.items()})
        for evaluator in self.evaluators:
            done = f"{evaluator.name}/failed" not in results
            if done and isinstance(evaluator, evals_lib.Retrieval):
                evals_lib.retrieval_gallery(
                    self.path / "plots" / f"gallery_{evaluator.name}.png",
                    evaluator.embeddings,
                    evaluator.load_image,
                )
        plots.write_plots(self.path, chance_loss=2 * math.log(self.config.train.batch_size))
        self.progress.restart()
        return True


def memory_plan(compiled: Any, state: state_lib.TrainState) -> str:
    """Returns a line on the bytes that a step needs on each device, before it has run.

    Args:
      compiled: the train step.
      state: its first argument.
    """

    def held(tree):
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )

    parts = {"parameters": held(state.variables()), "optimizer": held(state.opt_state)}
    analysis = compiled.memory_analysis()
    if analysis is not None:  # not every platform has it
        parts["batch"] = analysis.argument_size_in_bytes - held(state)
        parts["temporaries"] = analysis.temp_size_in_bytes
    text = ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in parts.items())
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return f"memory per device: {text}" + (f" of {limit / 2**20:,.0f} MiB" if limit else "")


@contextlib.contextmanager
def _naming(path: str):
    """Puts the config path in front of the ValueErrors of code that does not know it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _welcome(config, path, mesh, source, abstract, resume_step) -> None:
    counts = {
        "image": trees.count({k: v for k, v in abstract.params.items() if k.startswith("image")}),
        "text": trees.count({k: v for k, v in abstract.params.items() if k.startswith("text")}),
    }
    _log(
        f"{config.model.image.variant} + {config.model.text.variant}: "
        f"{counts['image']:,} + {counts['text']:,} parameters, {config.model.dtype}"
    )
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    _log(
        f"{mesh.size} {kind} device(s), mesh {axes}; global batch {config.train.batch_size}, "
        f"{config.train.steps} steps"
    )
    problems = f" ({source.problems})" if source.problems else ""
    _log(f"{source.describe()}{problems}")
    started = "starting" if resume_step is None else f"continuing from step {resume_step} of"
    _log(f"{started} {path}")


def _log(text: str) -> None:
    if multihost.is_lead():
        print(text, file=sys.stderr, flush=True)
