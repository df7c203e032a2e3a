"""EfficientNet trunk (Tan & Le 2019) as ALIGN uses it: no top convolution, global mean pooling.

All sizes come from one stage table by compound scaling (hf_align_parity 1.2, 6.1). The tree holds
one tensor per block, `stage3/block2/expand/kernel`, whether or not the blocks are scanned.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from align_jax.models import init, layers


@dataclasses.dataclass(frozen=True)
class StageSpec:
    """One row of the B0 table; `repeats` and channels are before scaling."""

    kernel_size: int
    repeats: int
    in_channels: int
    out_channels: int
    expand_ratio: int
    stride: int


STAGES = (
    StageSpec(3, 1, 32, 16, 1, 1),
    StageSpec(3, 2, 16, 24, 6, 2),
    StageSpec(5, 2, 24, 40, 6, 2),
    StageSpec(3, 3, 40, 80, 6, 2),
    StageSpec(5, 3, 80, 112, 6, 1),
    StageSpec(5, 4, 112, 192, 6, 2),
    StageSpec(3, 1, 192, 320, 6, 1),
)

# (width, depth) multipliers; pico and nano are ours, for tests and laptops.
VARIANTS: dict[str, tuple[float, float]] = {
    "pico": (0.25, 0.3),
    "nano": (0.5, 0.5),
    "b0": (1.0, 1.0),
    "b1": (1.0, 1.1),
    "b2": (1.1, 1.2),
    "b3": (1.2, 1.4),
    "b4": (1.4, 1.8),
    "b5": (1.6, 2.2),
    "b6": (1.8, 2.6),
    "b7": (2.0, 3.1),
    "b8": (2.2, 3.6),
    "l2": (4.3, 5.3),
}

SQUEEZE_RATIO = 0.25


def round_filters(channels: int, width: float, divisor: int = 8) -> int:
    """Returns `channels * width` rounded to a multiple of `divisor`, never below 90 % of it."""
    scaled = channels * width
    rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * scaled else rounded


def round_repeats(repeats: int, depth: float) -> int:
    """Returns the number of blocks of a stage after depth scaling (rounded up)."""
    return math.ceil(depth * repeats)


def output_width(variant: str) -> int:
    """Returns the width C of the pooled feature of a variant, e.g. 640 for "b7"."""
    return round_filters(STAGES[-1].out_channels, VARIANTS[variant][0])


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every block of a trunk shares; see `EfficientNet` for the meaning."""

    padding: str
    activation: str
    bn_mode: str
    bn_group_size: int
    dtype: jnp.dtype
    train: bool

    def conv_kwargs(self) -> dict:
        return {
            "use_bias": False,
            "dtype": self.dtype,
            "param_dtype": jnp.float32,
            "precision": layers.matmul_precision(self.dtype),
            "kernel_init": init.zeros,
        }

    def norm(self, name: str) -> layers.GroupedBatchNorm:
        return layers.GroupedBatchNorm(self.bn_mode, self.bn_group_size, self.train, name=name)


class EfficientNet(nn.Module):
    """Maps normalised pixels [B, H, W, 3] to pooled features [B, C], float32, not unit norm.

    Attributes:
      width, depth: multipliers of the B0 table.
      padding: "hf" or "same", see `layers.conv_padding`.
      activation: key of `layers.ACTIVATIONS`.
      drop_path_rate: stochastic depth; block b of n drops with probability rate * b / n.
      bn_mode, bn_group_size: see `layers.GroupedBatchNorm`.
      dtype: of convolutions and activations; parameters, statistics and pooling are float32.
      remat: "none", or "block" to recompute each block's activations in the backward pass.
      scan_blocks: compile the equal blocks of a stage once. Same numbers, same parameter tree.
    """

    width: float
    depth: float
    padding: str = "hf"
    activation: str = "swish"
    drop_path_rate: float = 0.2
    bn_mode: str = "grouped"
    bn_group_size: int = 16
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    scan_blocks: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, keys: jax.Array | None = None) -> jax.Array:
        settings = Settings(
            self.padding, self.activation, self.bn_mode, self.bn_group_size, self.dtype, train
        )
        activate = layers.ACTIVATIONS[self.activation]
        x = nn.Conv(
            round_filters(STAGES[0].in_channels, self.width),
            (3, 3),
            (2, 2),
            padding=layers.conv_padding(self.padding, 3, 2, x.shape[1:3]),
            name="stem_conv",
            **settings.conv_kwargs(),
        )(x.astype(self.dtype))
        x = activate(settings.norm("stem_bn")(x))

        repeats = [round_repeats(stage.repeats, self.depth) for stage in STAGES]
        block_keys = layers.split_keys(keys, sum(repeats))
        first_block = 0
        for number, (stage, count) in enumerate(zip(STAGES, repeats, strict=True), 1):
            rates = [self.drop_path_rate * (first_block + i) / sum(repeats) for i in range(count)]
            stage_args = (stage, self.width, tuple(rates), settings, self.remat)
            if self.scan_blocks and count > 1:
                names = tuple(f"block{i}" for i in range(1, count))
                stack, unstack = layers.stack_blocks(names, "rest")
                stage_class = nn.map_variables(
                    _ScannedStage,
                    ["params", "batch_stats"],
                    trans_in_fn=stack,
                    trans_out_fn=unstack,
                    init=self.is_initializing(),
                    mutable=True,
                )
            else:
                stage_class = _Stage
            stage_keys = block_keys[first_block : first_block + count]
            x = stage_class(*stage_args, name=f"stage{number}")(x, stage_keys)
            first_block += count
        return x.astype(jnp.float32).mean((1, 2))  # [B, C]


class MBConv(nn.Module):
    """Inverted bottleneck with squeeze-excitation: [B, H, W, in] -> [B, H/s, W/s, out].

    The first block of a stage has no residual, even at equal widths (Hugging Face's rule; the
    original asks for stride 1 and equal widths, which is the same for every published size).
    """

    stage: StageSpec
    width: float
    is_first: bool
    settings: Settings

    @nn.compact
    def __call__(self, x: jax.Array, rate_and_keys) -> tuple[jax.Array, None]:
        drop_rate, keys = rate_and_keys
        stage, settings = self.stage, self.settings
        activate = layers.ACTIVATIONS[settings.activation]
        out_channels = round_filters(stage.out_channels, self.width)
        in_channels = x.shape[-1]
        stride = stage.stride if self.is_first else 1
        residual = x
        if stage.expand_ratio != 1:
            x = nn.Dense(in_channels * stage.expand_ratio, name="expand", **settings.conv_kwargs())(
                x
            )
            x = activate(settings.norm("expand_bn")(x))
        padding = layers.conv_padding(settings.padding, stage.kernel_size, stride, x.shape[1:3])
        x = layers.DepthwiseConv(
            stage.kernel_size, stride, padding, settings.dtype, name="depthwise"
        )(x)
        x = activate(settings.norm("depthwise_bn")(x))
        x = _SqueezeExcite(max(1, int(in_channels * SQUEEZE_RATIO)), settings, name="squeeze")(x)
        x = nn.Dense(out_channels, name="project", **settings.conv_kwargs())(x)
        x = settings.norm("project_bn")(x)
        if not self.is_first:
            x = layers.drop_path(x, drop_rate, keys) + residual
        return x, None


class _SqueezeExcite(nn.Module):
    hidden: int
    settings: Settings

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kwargs = self.settings.conv_kwargs() | {"use_bias": True}
        s = x.astype(jnp.float32).mean((1, 2)).astype(x.dtype)  # [B, C]
        s = layers.ACTIVATIONS[self.settings.activation](
            nn.Dense(self.hidden, name="reduce", **kwargs)(s)
        )
        s = nn.sigmoid(nn.Dense(x.shape[-1], name="expand", **kwargs)(s))
        return x * s[:, None, None, :]


class _Stage(nn.Module):
    stage: StageSpec
    width: float
    drop_rates: tuple[float, ...]
    settings: Settings
    remat: str

    @nn.compact
    def __call__(self, x: jax.Array, keys) -> jax.Array:
        block = _block_class(self.remat)
        for i, rate in enumerate(self.drop_rates):
            x, _ = block(self.stage, self.width, i == 0, self.settings, name=f"block{i}")(
                x, (rate, keys[i])
            )
        return x


class _ScannedStage(_Stage):
    @nn.compact
    def __call__(self, x: jax.Array, keys) -> jax.Array:
        block = _block_class(self.remat)
        x, _ = block(self.stage, self.width, True, self.settings, name="block0")(
            x, (self.drop_rates[0], keys[0])
        )
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": False},
            length=len(self.drop_rates) - 1,
        )
        rates = jnp.asarray(self.drop_rates[1:], jnp.float32)
        rest_keys = None if keys[0] is None else keys[1:]
        x, _ = scanned(self.stage, self.width, False, self.settings, name="rest")(
            x, (rates, rest_keys)
        )
        return x


def _block_class(remat: str) -> type[MBConv]:
    return nn.remat(MBConv, prevent_cse=False) if remat == "block" else MBConv
