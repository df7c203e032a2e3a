"""When a run has diverged, by stated rules on the loss of each step.

not finite   loss or gradient norm is NaN or infinite.
collapsed    the loss lies at chance for `COLLAPSE` steps, after the median of as many was well
             below: all embeddings have become one. Of the contrastive softmax loss only.
spike        the loss lies far above the median of the last `WINDOW`; asked for by `spike` alone.

What the rules look at belongs to the state of a run and is saved in its checkpoints, so a resumed
run judges as an uninterrupted one. The loss is the same number in all processes: so is the verdict.
"""

import math

import numpy as np
from ml_collections import ConfigDict

WINDOW = 100  # recent losses
COLLAPSE = 20  # steps at chance; also the fewest losses that a spike is measured by
_LEARNED, _AT_CHANCE = 0.9, 0.99  # shares of the loss of chance


class TrainingDiverged(RuntimeError):
    """The loss of a step says that the run is lost.

    Attributes:
      step: number of updates done.
      span: steps that show it, this one the last; what was saved before them can be trusted, but
        for the step right before, whose parameters may have caused it.
      reason: what the loss does.
    """

    def __init__(self, step: int, span: int, reason: str):
        super().__init__(f"step {step}: {reason}")
        self.step, self.span, self.reason = step, span, reason


class LossWatch:
    """Judges the loss of every step."""

    def __init__(self, config: ConfigDict):
        """Has seen nothing yet.

        Args:
          config: of the run; `train.spike` counts where `train.on_divergence` is "rollback".
        """
        rows = 1 + config.loss.negatives * (config.train.batch_size - 1)
        is_softmax = config.task == "contrastive" and config.loss.kind == "softmax"
        self._chance = 2 * math.log(rows) if is_softmax and rows > 1 else None
        self._spike = config.train.spike if config.train.on_divergence == "rollback" else 0.0
        self._lowest, self._losses = math.inf, []

    def check(self, step: int, loss: float, grad_norm: float) -> None:
        """Takes the loss of a step.

        Args:
          step: number of updates done.
          loss: before that step's update.
          grad_norm: likewise.

        Raises:
          TrainingDiverged: by one of the rules.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise TrainingDiverged(step, 1, f"loss is {loss}, gradient norm {grad_norm}")
        if self._spike and len(self._losses) >= COLLAPSE:
            median = float(np.median(self._losses))
            spread = 1.4826 * float(np.median(np.abs(np.array(self._losses) - median)))
            limit = median + self._spike * max(spread, 0.01 * abs(median))
            if loss > limit:
                raise TrainingDiverged(
                    step,
                    1,
                    f"loss is {loss:.4f}, a spike: the median of the last {len(self._losses)} is "
                    f"{median:.4f}, and {limit:.4f} the limit by config.train.spike={self._spike}",
                )
        self._losses = [*self._losses[-WINDOW + 1 :], loss]
        last = self._losses[-COLLAPSE:]
        if self._chance is None or len(last) < COLLAPSE:
            return
        self._lowest = min(self._lowest, float(np.median(last)))
        if self._lowest < _LEARNED * self._chance and min(last) > _AT_CHANCE * self._chance:
            raise TrainingDiverged(
                step,
                COLLAPSE,
                f"loss has collapsed to chance: {loss:.4f}, of {self._chance:.4f}, and no lower "
                f"for {COLLAPSE} steps, after {self._lowest:.4f}",
            )

    def state(self) -> np.ndarray:
        """Returns float64 [WINDOW + 1] to be saved."""
        content = np.full(WINDOW + 1, np.nan)
        content[0] = self._lowest
        content[1 : 1 + len(self._losses)] = self._losses
        return content

    def restore(self, content: np.ndarray) -> None:
        """Takes up what `state` returned."""
        self._lowest = float(content[0])
        self._losses = content[1:][~np.isnan(content[1:])].tolist()


def no_losses() -> np.ndarray:
    """Returns the `LossWatch.state` of a run that has done nothing yet."""
    return np.append(np.inf, np.full(WINDOW, np.nan))
