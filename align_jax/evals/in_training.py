"""The evaluations of a run: when one is due, what it writes into the workdir, what happens if it
fails or a signal comes. What an evaluator does is in the other files of this folder.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
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
        self.failed = ""
        self._read()

    @property
    def best_step(self) -> int:
        """The step that `config.checkpoint.best` chooses, of equal ones the first; -1 for none."""
        return self._best[1]

    def due(self, step: int) -> bool:
        """Returns whether the step is one to evaluate, and has not been."""
        if step == self._done_step:
            return False
        if not self.evaluators:  # the plots of losses are drawn all the same
            return step % self._config.eval.every_steps == 0 or step == self._config.train.steps
        return bool(self._due(step))

    def _due(self, step: int) -> list[evals.Evaluator]:
        """Returns the evaluators whose turn it is; all at the end."""
        if step == self._config.train.steps:
            return list(self.evaluators)
        every, entries = self._config.eval.every_steps, self._config.eval.evaluators
        return [
            evaluator
            for evaluator in self.evaluators
            if step % entries.get(evaluator.name, {}).get("every_steps", every) == 0
        ]

    def _read(self) -> None:
        """Reads what was evaluated before."""
        self.results: dict[str, float] = {}
        self._done_step, self._best = -1, (-math.inf, -1)
        if multihost.is_lead():
            for line in metrics.read_metrics(self._path / "metrics.jsonl"):
                results = {key[5:]: value for key, value in line.items() if key.startswith("eval/")}
                if results and not any(key.endswith("/failed") for key in results):
                    self.results, self._done_step = results, line["step"]
                self._compare(results, line["step"])
        self._done_step = multihost.agree(self._done_step)
        value = multihost.agree(int(np.float32(self._best[0]).view(np.int32)))
        self._best = float(np.int32(value).view(np.float32)), multihost.agree(self._best[1])

    def _compare(self, results: dict[str, float], step: int) -> bool:
        """Returns whether these are the best results yet, and remembers them then."""
        best = self._config.checkpoint.best
        value = results.get(best.removeprefix("-"))
        if not best or value is None:
            return False
        value = float(np.float32(-value if best.startswith("-") else value))
        if value > self._best[0]:
            self._best = value, step
        return self._best[1] == step

    def rewind(self, step: int) -> None:
        """Forgets what came after a step that the run has gone back to."""
        if self._done_step > step:
            self._read()

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
        evaluators = self._due(step)
        try:
            results, failed = stop.run(lambda: self._call(step, evaluators))
        except signals.Interrupted:
            return False
        self.results, self.failed, self._done_step = results, " ".join(failed), step
        for line in failed:
            self._reporter.progress.log(
                f"step {step}: {line} The run goes on without these numbers."
            )
        is_best = self._compare(results, step)
        if multihost.is_lead():
            self._write(step, evaluators)
            if best := self._config.checkpoint.best:
                said = "the best so far, its checkpoint stays" * is_best
                if best.removeprefix("-") not in results:
                    said = f"is not among {', '.join(results)}" * (step == self._config.train.steps)
                if said:
                    self._reporter.progress.log(f"step {step}: {best.removeprefix('-')} {said}")
            self._reporter.progress.restart()
        return True

    def _call(
        self, step: int, evaluators: Sequence[evals.Evaluator]
    ) -> tuple[dict[str, float], list[str]]:
        """Returns (results, what the evaluators that failed say)."""
        results, failed = {}, []
        model = records.EncodeOnce(self._model) if len(evaluators) > 1 else self._model
        for evaluator in evaluators:
            try:
                results |= evals.run_evaluators([evaluator], model)
            except (ValueError, RuntimeError) as error:
                if jax.process_count() > 1:
                    raise RuntimeError(f"step {step}: {error}") from error
                results[f"{evaluator.name}/failed"] = 1
                failed.append(" ".join(str(error).split()))
        return results, failed

    def _write(self, step: int, evaluators: Sequence[evals.Evaluator]) -> None:
        if self.results:
            table = tables.format_table(self.results, evaluators)
            self._reporter.progress.log(f"step {step}\n{table}")
            evals.write_json(
                self._path / "eval" / f"step_{step:08d}.json",
                self.results,
                {"workdir": self._path.name, "step": step, "config": self._config.to_dict()},
                evals.problems_of(evaluators),
            )
            # After its file: where the line is, a resumed run does not evaluate again.
            self._reporter.writer.write(step, {f"eval/{k}": v for k, v in self.results.items()})
        done = [e for e in evaluators if f"{e.name}/failed" not in self.results]
        evals.write_plots(done, self._path / "plots")
        chance = 2 * math.log(self._config.train.batch_size)
        if self._config.task == "classify":
            chance = math.log(len(self._model.classes))
        plots.write_plots(self._path, chance_loss=chance)
