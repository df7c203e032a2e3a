"""How fast the chips of a run are: pairs and FLOPs a second, and the share of the peak (MFU).

MFU is model FLOPs utilisation (Chowdhery et al. 2022): what the model needs, without what is
computed twice, over what the chip could do in bfloat16, whatever the dtype of the run.
"""

from jax.sharding import Mesh
from ml_collections import ConfigDict

from align_jax.models import dual_encoder, flops
from align_jax.run import chips


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
        self._flops = 0.0
        if isinstance(model, dual_encoder.DualEncoder) and not (model.frozen or model.lora):
            pair = flops.pair_flops(
                model,
                image_size_px=config.data.image_size,
                max_tokens=config.data.max_tokens,
                batch_size=config.train.batch_size,
            )
            self._flops = pair.model * self._pairs
        chip = chips.find_chip(mesh.devices.flat[0].device_kind)
        self._peak_flops = chip.peak_flops if chip else 0.0

    def of(self, step_time_s: float) -> dict[str, float]:
        """Returns `perf/` values of one chip, without those that are not known; the MFU is 0 to 1.

        Args:
          step_time_s: from one step to the next, waiting for input included.
        """
        values = {"perf/pairs_per_s_per_chip": self._pairs / step_time_s}
        if self._flops:
            values["perf/tflops_per_s_per_chip"] = self._flops / step_time_s / 1e12
            if self._peak_flops:
                values["perf/mfu"] = self._flops / step_time_s / self._peak_flops
        return values
