"""`align train --profile A:B`: a trace of some steps, for TensorBoard's profile page."""

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import jax

from align_jax.run import multihost


class Profiler:
    """Traces the steps after A, up to B; a context that ends a trace that is open."""

    def __init__(self, workdir: str | os.PathLike, span: str, last: int):
        """Begins nothing yet.

        Args:
          workdir: folder of the run; the trace goes to its TensorBoard folder.
          span: "A:B"; "" traces nothing.
          last: step of the run's end.

        Raises:
          ValueError: no two numbers 0 <= A < B, or A lies behind the end.
        """
        self._folder, self._is_open = Path(workdir) / "tensorboard", False
        self._step = contextlib.ExitStack()
        numbers = re.fullmatch(r"(\d+):(\d+)", span)
        if span and not (numbers and int(numbers[1]) < min(int(numbers[2]), last)):
            raise ValueError(
                f"--profile {span} is not A:B with 0 <= A < B and A < config.train.steps={last}, "
                "e.g. 100:105 for the five steps after step 100."
            )
        self._span = range(int(numbers[1]), int(numbers[2])) if numbers else range(0)

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Is told how many updates are done before the next one begins."""
        self._step.close()
        if step not in self._span or not multihost.is_lead():
            return
        if not self._is_open:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it slows the loader down and fills the trace
            jax.profiler.start_trace(str(self._folder), profiler_options=options)
            self._is_open = True
        # From one step to the next: the call itself only hands it to the devices.
        self._step.enter_context(jax.profiler.StepTraceAnnotation("train", step_num=step + 1))

    def after(self, step: int, result: Any) -> None:
        """Is told how many updates are done or on their way, and what the last of them gives."""
        if self._is_open and step >= self._span.stop:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        if self._is_open:
            self._is_open = False
            self._step.close()
            jax.profiler.stop_trace()
            multihost.log(
                f"trace of {len(self._span)} steps in {self._folder}/plugins/profile; "
                "`tensorboard --logdir` shows it with the package tensorboard-plugin-profile"
            )
