"""Accelerators that a plan, an MFU or a roofline refers to: memory, bandwidth and peak of one chip.

Source: Google Cloud's "System architecture" pages of TPU v4, v5e, v5p and v6e
(docs.cloud.google.com/tpu/docs/v4 and so on). The compiler keeps some 0.25 GiB of it to itself.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip has.

    Attributes:
      device_kind: `jax.Device.device_kind` of one that is there.
      hbm_gib: memory.
      hbm_bytes_per_s: bandwidth of that memory.
      peak_flops: bfloat16 operations per second, two per multiply-add.
    """

    device_kind: str
    hbm_gib: float
    hbm_bytes_per_s: float
    peak_flops: float

    def roofline(self, flops: float, traffic_bytes: float) -> "Roofline":
        """Returns what a program takes at least that computes and moves so much on one chip."""
        return Roofline(flops / self.peak_flops, traffic_bytes / self.hbm_bytes_per_s)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time of a program on a chip, as if computing and memory traffic overlapped wholly.

    Collectives are not in it. Source: Williams et al. 2009.

    Attributes:
      compute_s: of computing at the chip's peak.
      memory_s: of its memory traffic at full bandwidth.
    """

    compute_s: float
    memory_s: float

    @property
    def least_s(self) -> float:
        """The longer of the two."""
        return max(self.compute_s, self.memory_s)

    @property
    def bound(self) -> str:
        """What the longer one is: "compute" or "memory"."""
        return "compute" if self.compute_s >= self.memory_s else "memory"


CHIPS: dict[str, Chip] = {
    "v4": Chip("TPU v4", 32.0, 1.228e12, 275e12),
    "v5e": Chip("TPU v5 lite", 16.0, 0.819e12, 197e12),
    "v5p": Chip("TPU v5", 95.0, 2.765e12, 459e12),
    "v6e": Chip("TPU v6 lite", 32.0, 1.640e12, 918e12),
}


def find_chip(device_kind: str) -> Chip | None:
    """Returns the chip that calls itself so, or None where it is not in `CHIPS`."""
    return next((chip for chip in CHIPS.values() if chip.device_kind == device_kind), None)
