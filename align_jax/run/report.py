"""What a run tells while it trains: metric lines, the progress line, the records that it dropped.

It judges the loss of each step, too, by divergence.py.

Counts of dropped records belong to the run, not to a process: process 0 carries on those of before
the checkpoint, and every line and every checkpoint holds the sum over all processes.
"""

import os
from collections import Counter
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from align_jax.data import mixture, pipeline
from align_jax.data.sources.open_source import PairSource
from align_jax.run import divergence, history, metrics, multihost
from align_jax.run.rates import Rates
from align_jax.run.timeline import Timeline


def nothing_done() -> dict[str, np.ndarray]:
    """Returns what the checkpoint of a run that has done nothing yet would hold beside its state.

    `dropped`: int64, records that all processes have dropped, by `pipeline.DROP_REASONS`. `losses`:
    of a `divergence.LossWatch`. `skipped`: of history.py, here a checkpoint has it only where
    batches have been skipped.
    """
    return {
        "dropped": np.zeros(len(pipeline.DROP_REASONS), np.int64),
        "losses": divergence.no_losses(),
        "skipped": history.no_skips(),
    }


class Reporter:
    """Writes and prints what the steps of a run give; a context, for its files.

    Attributes:
      rates: of the chips.
      step_time_s: of a recent step; 0 before the first metric line that knows it.
      writer: of metric lines; writes nothing in all processes but one.
      progress: likewise.
      skipped: batches left out after rollbacks, see history.py.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        config: ConfigDict,
        source: PairSource,
        timeline: Timeline,
        rates: Rates,
        *,
        resume_step: int | None,
        every: int,
        data: dict[str, np.ndarray],
    ):
        """Opens the files, without the lines that come after the restored step.

        Args:
          path: the workdir.
          config: of the run.
          source: of its pairs.
          timeline: of this part of the run; takes up those before.
          rates: of its chips.
          resume_step: of the restored checkpoint; None starts anew.
          every: most steps between two lines that are there, to tell where some are missing.
          data: from that checkpoint, or `nothing_done`.
        """
        self._config = config
        self._source = source
        self._timeline, self.rates, self.step_time_s = timeline, rates, 0.0
        self._watch = divergence.LossWatch(config)
        self._restore(data)
        self.progress = metrics.Progress(
            config.train.steps,
            config.train.batch_size,
            silent=not multihost.is_lead(),
            note=rates.note,
        )
        self.writer = metrics.NoWriter()
        if multihost.is_lead():
            before = Path(path) / "perf.jsonl"
            lines = metrics.read_metrics(before) if before.exists() else []
            continues = timeline.take_up(lines, resume_step or 0)
            self.writer = metrics.MetricWriter(
                path, resume_step=resume_step, every=every, log=multihost.log
            )
            if continues and (resume_step or 0) < config.train.steps:
                self.time(resume_step or 0)  # the writer has cut off the lines of what is lost

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.progress.close()
        self.writer.close()

    @property
    def num_skipped(self) -> int:
        """Batches left out so far: step s is made of batch s - 1 + num_skipped of the stream."""
        return int((self.skipped[:, 2] - self.skipped[:, 1]).sum())

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
          divergence.TrainingDiverged: see there.
        """
        values = {name: float(value) for name, value in jax.device_get(step_metrics).items()}
        self._watch.check(step, values["loss"], values["grad_norm"])
        self._count_dropped(batch)
        self.progress.update(step, values["loss"], wait_s)
        if step % self._config.log.every_steps == 0 or step == self._config.train.steps:
            totals = zip(pipeline.DROP_REASONS, self._total_dropped().tolist(), strict=True)
            data = {f"data/dropped_{reason}": count for reason, count in totals if count}
            rows = (step + self.num_skipped) * self._config.train.batch_size
            epochs = mixture.epochs(self._source, rows)
            data |= {f"data/{key}": count for key, count in epochs.items()}
            data |= {f"data/problems/{k}": n for k, n in self._source.problems.items()}
            self.writer.write(step, {f"train/{k}": v for k, v in values.items()} | data)
            timing = self.progress.timing()
            if timing:
                self.step_time_s = timing["perf/step_time_s"]
                timing |= self.rates.of(self.step_time_s)
            self.writer.write_timing(step, timing | self._timeline.sums())

    def time(self, step: int) -> None:
        """Writes where the time went, up to a step that has no line of its own."""
        self.writer.write_timing(step, self._timeline.sums())

    def data(self) -> dict[str, np.ndarray]:
        """Returns what belongs into a checkpoint beside the state."""
        data = {"dropped": self._total_dropped(), "losses": self._watch.state()}
        return data | ({"skipped": self.skipped} if len(self.skipped) else {})

    def rewind(self, step: int, data: dict[str, np.ndarray]) -> None:
        """Goes back to an earlier step, whose `data` these are."""
        self._restore(data)
        self.writer.rewind(step)
        self.progress.restart()

    def _restore(self, data: dict[str, np.ndarray]) -> None:
        # What was dropped before belongs to process 0, so that a sum over all counts it once.
        dropped = data["dropped"].tolist() if multihost.is_lead() else [0] * len(data["dropped"])
        self._dropped = Counter(dict(zip(pipeline.DROP_REASONS, dropped, strict=True)))
        self._watch.restore(data["losses"])
        self.skipped = data["skipped"]

    def _total_dropped(self) -> np.ndarray:
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
