"""How fast the chips of a run are: pairs and FLOPs a second, shares of peak and roofline.

MFU is model FLOPs utilisation (Chowdhery et al. 2022): what the model needs, without what is
computed twice, over what the chip could do in bfloat16, whatever the dtype of the run. The roofline
is the least time of a step: of what it computes, twice or not, or of the memory traffic of its
compiled program, whichever takes longer.
"""

from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from align_jax.models import dual_encoder, flops
from align_jax.run import chips, hlo


class Rates:
    """Turns the time of a step into rates of one chip."""

    def __init__(self, config: ConfigDict, model: dual_encoder.Model, mesh: Mesh):
        """Counts what a chip does in a step.

        Args:
          config: of the run.
          model: that it trains. FLOPs are known where all of a dual encoder learns.
          mesh: of its devices.
        """
        self._pairs = config.train.batch_size / mesh.size
        self._flops = self._hardware_flops = 0.0
        self._roof: chips.Roofline | None = None
        if isinstance(model, dual_encoder.DualEncoder) and not (model.frozen or model.lora):
            pair = flops.pair_flops(
                model,
                image_size_px=config.data.image_size,
                max_tokens=config.data.max_tokens,
                batch_size=config.train.batch_size,
                microbatches=config.train.microbatches,
            )
            self._flops = pair.model * self._pairs
            self._hardware_flops = pair.hardware * self._pairs
        self._chip = chips.find_chip(mesh.devices.flat[0].device_kind)

    def take_program(self, compiled: Any) -> None:
        """Works out the roofline of the compiled step, where the chip is known.

        Of a run with frozen parts the FLOPs are the compiler's, which counts loops as run once.
        """
        if self._chip:
            flops = self._hardware_flops or compiled.cost_analysis()["flops"]
            traffic_bytes = hlo.parse(compiled.as_text()).traffic_bytes
            self._roof = self._chip.roofline(flops, traffic_bytes)

    def of(self, step_time_s: float) -> dict[str, float]:
        """Returns `perf/` values of one chip, without those that are not known; the MFU is 0 to 1.

        Args:
          step_time_s: from one step to the next, waiting for input included.
        """
        values = {"perf/pairs_per_s_per_chip": self._pairs / step_time_s}
        if self._flops:
            values["perf/tflops_per_s_per_chip"] = self._flops / step_time_s / 1e12
            if self._chip:
                values["perf/mfu"] = self._flops / step_time_s / self._chip.peak_flops
        if self._roof:
            values["perf/roofline"] = self._roof.least_s / step_time_s
            values["perf/roofline_compute_s"] = self._roof.compute_s
            values["perf/roofline_memory_s"] = self._roof.memory_s
        return values

    def note(self, step_time_s: float) -> str:
        """Returns the share of the roofline in words, e.g. "62 % of roofline (memory)", or ""."""
        if not self._roof:
            return ""
        return f"{100 * self._roof.least_s / step_time_s:.0f} % of roofline ({self._roof.bound})"

    def summary(self, step_time_s: float) -> str:
        """Returns a line on what bounds a step, or "" where that or its time is not known (0)."""
        if not (self._roof and step_time_s):
            return ""
        return (
            f"bound by {self._roof.bound}: a step takes {step_time_s:.3g} s, at least "
            f"{self._roof.compute_s:.3g} s of computing at the chip's peak and "
            f"{self._roof.memory_s:.3g} s of memory traffic at full bandwidth; "
            f"{self.note(step_time_s)}"
        )
