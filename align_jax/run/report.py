"""What a run tells while it trains: metric lines, the progress line, the records that it dropped.

Counts of dropped records belong to the run, not to a process: process 0 carries on those of before
the checkpoint, and every line and every checkpoint holds the sum over all processes.
"""

import math
import os
from collections import Counter

import jax
import numpy as np
from ml_collections import ConfigDict

from align_jax.data import mixture, pipeline
from align_jax.data.sources.open_source import PairSource
from align_jax.run import checkpoint, metrics, multihost


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is no longer finite."""


def no_drops() -> np.ndarray:
    """Returns the counts of a run that has dropped nothing yet, as a checkpoint holds them."""
    return np.zeros(len(pipeline.DROP_REASONS), np.int64)


class Reporter:
    """Writes and prints what the steps of a run give; a context, for its files.

    Attributes:
      writer: of metric lines; writes nothing in all processes but one.
      progress: likewise.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        config: ConfigDict,
        source: PairSource,
        checkpoints: checkpoint.Checkpointer,
        *,
        resume_step: int | None,
        every: int,
        dropped: np.ndarray,
    ):
        """Opens the files, without the lines that come after the restored step.

        Args:
          path: the workdir.
          config: of the run.
          source: of its pairs.
          checkpoints: of the run, to name the last good one.
          resume_step: of the restored checkpoint; None starts anew.
          every: most steps between two lines that are there, to tell where some are missing.
          dropped: int64, the records that all processes had dropped before, as `total_dropped`.
        """
        self._config = config
        self._source = source
        self._checkpoints = checkpoints
        is_lead = multihost.is_lead()
        before = dropped.tolist() if is_lead else [0] * len(dropped)
        self._dropped = Counter(dict(zip(pipeline.DROP_REASONS, before, strict=True)))
        self.progress = metrics.Progress(
            config.train.steps, config.train.batch_size, silent=not is_lead
        )
        self.writer = metrics.NoWriter()
        if is_lead:
            self.writer = metrics.MetricWriter(
                path, resume_step=resume_step, every=every, log=multihost.log
            )

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.progress.close()
        self.writer.close()

    def report(
        self, step: int, step_metrics: dict[str, jax.Array], batch: pipeline.Batch, wait_s: float
    ) -> None:
        """Takes what a step gave; waits until the device has done it.

        Args:
          step: number of updates done.
          step_metrics: from the train step.
          batch: that it has seen.
          wait_s: seconds that the loop waited for that batch.

        Raises:
          TrainingDiverged: loss or gradient is not finite.
        """
        values = {name: float(value) for name, value in jax.device_get(step_metrics).items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise TrainingDiverged(self._describe_divergence(step, values))
        self._count_dropped(batch)
        self.progress.update(step, values["loss"], wait_s)
        if step % self._config.log.every_steps == 0 or step == self._config.train.steps:
            totals = zip(pipeline.DROP_REASONS, self.total_dropped().tolist(), strict=True)
            data = {f"data/dropped_{reason}": count for reason, count in totals if count}
            epochs = mixture.epochs(self._source, step * self._config.train.batch_size)
            data |= {f"data/{key}": count for key, count in epochs.items()}
            data |= {f"data/problems/{k}": n for k, n in self._source.problems.items()}
            self.writer.write(step, {f"train/{k}": v for k, v in values.items()} | data)
            self.writer.write_timing(step, self.progress.timing())

    def total_dropped(self) -> np.ndarray:
        """Returns int64, one count for each of `pipeline.DROP_REASONS`, of all processes."""
        counts = [self._dropped[reason] for reason in pipeline.DROP_REASONS]
        return multihost.total(np.array(counts, np.int64))

    def _count_dropped(self, batch: pipeline.Batch) -> None:
        for reason, count in batch.dropped.items():
            if not self._dropped[reason]:
                self.progress.log(
                    f"skipped {batch.dropped_keys[reason]!r} ({reason}); further ones are counted "
                    f"as data/dropped_{reason} in metrics.jsonl"
                )
            self._dropped[reason] += count

    def _describe_divergence(self, step: int, values: dict[str, float]) -> str:
        self._checkpoints.wait()
        # The parameters of checkpoint step - 1 are those that gave this loss.
        good = [saved for saved in self._checkpoints.steps() if saved < step - 1]
        kept = f"checkpoint {good[-1]} is the last good one" if good else "no checkpoint before it"
        return (
            f"step {step}: loss is {values['loss']}, gradient norm {values['grad_norm']}; stopped "
            f"({kept}). Start another --workdir with a lower config.optim.learning_rate, more "
            "config.optim.warmup_steps or a config.optim.clip_norm."
        )
