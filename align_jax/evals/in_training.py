"""The evaluations of a run: when one is due, what it writes into the workdir, what happens if it
fails or a signal comes. What an evaluator does is in the other files of this folder.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from align_jax import evals
from align_jax.evals import records, tables
from align_jax.run import metrics, multihost, plots, signals
from align_jax.run.report import Reporter


class Evaluations:
    """Evaluates a model in training, and knows what of that was done before.

    Attributes:
      evaluators: that are run.
      results: of the last evaluation, `<evaluator>/<metric>`; empty if there was none.
      failed: what its evaluators failed by, "" if by nothing.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        config: ConfigDict,
        evaluators: Sequence[evals.Evaluator],
        model: Any,
        reporter: Reporter,
    ):
        """Reads the results of earlier parts of the run.

        Args:
          path: the workdir.
          config: of the run.
          evaluators: from `evals.make_evaluators`.
          model: an `Align` or an `ImageClassifier`, given the variables of each evaluation.
          reporter: whose lines the results become.
        """
        self._path = Path(path)
        self._config = config
        self.evaluators = evaluators
        self._model = model
        self._reporter = reporter
        self.results: dict[str, float] = {}
        self.failed = ""
        self._done_step = -1
        if multihost.is_lead():
            for line in metrics.read_metrics(self._path / "metrics.jsonl"):
                results = {key[5:]: value for key, value in line.items() if key.startswith("eval/")}
                if results and not any(key.endswith("/failed") for key in results):
                    self.results, self._done_step = results, line["step"]
        self._done_step = multihost.agree(self._done_step)

    def due(self, step: int) -> bool:
        """Returns whether the step is one to evaluate, and has not been."""
        if step % self._config.eval.every_steps and step != self._config.train.steps:
            return False
        return step != self._done_step

    def rewind(self, step: int) -> None:
        """Forgets what came after a step that the run has gone back to."""
        if self._done_step > step:
            self.results, self._done_step = {}, -1

    def run(self, step: int, variables: dict, stop: signals.StopSignals) -> bool:
        """Evaluates; returns whether all evaluators had their turn, False if a signal came.

        An evaluator that fails is named, the others go on.

        Args:
          step: number of updates done.
          variables: {"params", "batch_stats"} after it.
          stop: whose signals break an evaluation off.

        Raises:
          RuntimeError: one failed in a run of several processes, where the others wait for it.
        """
        self._model.variables = variables
        results, failed = {}, []
        model = self._model
        if len(self.evaluators) > 1:
            model = records.EncodeOnce(model)
        try:
            with stop.giving_up():
                for evaluator in self.evaluators:
                    try:
                        results |= evals.run_evaluators([evaluator], model)
                    except (ValueError, RuntimeError) as error:
                        if jax.process_count() > 1:
                            raise RuntimeError(f"step {step}: {error}") from error
                        results[f"{evaluator.name}/failed"] = 1
                        failed.append(" ".join(str(error).split()))
        except signals.Interrupted:
            return False
        self.results, self.failed, self._done_step = results, " ".join(failed), step
        for line in failed:
            self._reporter.progress.log(
                f"step {step}: {line} The run goes on without these numbers."
            )
        if multihost.is_lead():
            self._write(step)
            self._reporter.progress.restart()
        return True

    def _write(self, step: int) -> None:
        if self.results:
            table = tables.format_table(self.results, self.evaluators)
            self._reporter.progress.log(f"step {step}\n{table}")
            evals.write_json(
                self._path / "eval" / f"step_{step:08d}.json",
                self.results,
                {"workdir": self._path.name, "step": step, "config": self._config.to_dict()},
                evals.problems_of(self.evaluators),
            )
            # After its file: where the line is, a resumed run does not evaluate again.
            self._reporter.writer.write(step, {f"eval/{k}": v for k, v in self.results.items()})
        done = [e for e in self.evaluators if f"{e.name}/failed" not in self.results]
        evals.write_plots(done, self._path / "plots")
        chance = 2 * math.log(self._config.train.batch_size)
        if self._config.task == "classify":
            chance = math.log(len(self._model.classes))
        plots.write_plots(self._path, chance_loss=chance)
