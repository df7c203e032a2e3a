"""EfficientNet trunk (Tan & Le 2019) as ALIGN uses it: no top convolution, global mean pooling.

All sizes come from one stage table by compound scaling (hf_align_parity 1.2, 6.1), or from that of
EfficientNetV2 (Tan & Le 2021), whose early blocks are plain convolutions. The tree holds one tensor
per block, `stage3/block2/expand/kernel`, whether or not the blocks are scanned.
"""

import dataclasses
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from align_jax.models import chunked_mbconv, init, layers

Keys = jax.Array | tuple[None, ...]  # [blocks, B], or a None for each block


@dataclasses.dataclass(frozen=True)
class StageSpec:
    """One row of a stage table, before or after scaling (`scale_stages`)."""

    kernel_size: int
    repeats: int
    in_channels: int
    out_channels: int
    expand_ratio: int
    stride: int
    fused: bool = False  # `FusedMBConv` instead of `MBConv`


STAGES = (
    StageSpec(3, 1, 32, 16, 1, 1),
    StageSpec(3, 2, 16, 24, 6, 2),
    StageSpec(5, 2, 24, 40, 6, 2),
    StageSpec(3, 3, 40, 80, 6, 2),
    StageSpec(5, 3, 80, 112, 6, 1),
    StageSpec(5, 4, 112, 192, 6, 2),
    StageSpec(3, 1, 192, 320, 6, 1),
)

# EfficientNetV2-B0 (Tan & Le 2021, and keras.applications). B3 rounds its widths by another rule.
STAGES_V2 = (
    StageSpec(3, 1, 32, 16, 1, 1, fused=True),
    StageSpec(3, 2, 16, 32, 4, 2, fused=True),
    StageSpec(3, 2, 32, 48, 4, 2, fused=True),
    StageSpec(3, 3, 48, 96, 4, 2),
    StageSpec(3, 5, 96, 112, 6, 1),
    StageSpec(3, 8, 112, 192, 6, 2),
)

# Ours, of fused blocks alone: on two CPU cores a training step of fused-nano takes less time than
# one of nano, with 6 times the products (experiments/real_pairs/report.md).
STAGES_FUSED = (
    StageSpec(3, 1, 24, 16, 1, 1, fused=True),
    StageSpec(3, 1, 16, 32, 4, 2, fused=True),
    StageSpec(3, 2, 32, 64, 4, 2, fused=True),
    StageSpec(3, 2, 64, 128, 4, 2, fused=True),
    StageSpec(3, 1, 128, 256, 4, 2, fused=True),
)

# Ours, the least with every kind of MBConv: unexpanded, strided, with a residual, 3 and 5 wide.
STAGES_FEMTO = (
    StageSpec(3, 1, 32, 16, 1, 1),
    StageSpec(5, 2, 16, 40, 6, 2),
    StageSpec(3, 1, 40, 80, 6, 2),
)

# (width, depth, stage table); femto, pico and nanos are ours, for tests and laptops.
VARIANTS: dict[str, tuple[float, float, tuple[StageSpec, ...]]] = {
    "femto": (0.25, 1.0, STAGES_FEMTO),
    "pico": (0.25, 0.3, STAGES),
    "nano": (0.5, 0.5, STAGES),
    "b0": (1.0, 1.0, STAGES),
    "b1": (1.0, 1.1, STAGES),
    "b2": (1.1, 1.2, STAGES),
    "b3": (1.2, 1.4, STAGES),
    "b4": (1.4, 1.8, STAGES),
    "b5": (1.6, 2.2, STAGES),
    "b6": (1.8, 2.6, STAGES),
    "b7": (2.0, 3.1, STAGES),
    "b8": (2.2, 3.6, STAGES),
    "l2": (4.3, 5.3, STAGES),
    "fused-nano": (1.0, 1.0, STAGES_FUSED),
    "v2-b0": (1.0, 1.0, STAGES_V2),
    "v2-b1": (1.0, 1.1, STAGES_V2),
    "v2-b2": (1.1, 1.2, STAGES_V2),
}


def round_filters(channels: int, width: float, divisor: int = 8) -> int:
    """Returns `channels * width` rounded to a multiple of `divisor`, never below 90 % of it."""
    scaled = channels * width
    rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * scaled else rounded


def round_repeats(repeats: int, depth: float) -> int:
    """Returns the number of blocks of a stage after depth scaling (rounded up)."""
    return math.ceil(depth * repeats)


def scale_stages(
    stages: tuple[StageSpec, ...], width: float, depth: float, divisor: int = 8
) -> tuple[StageSpec, ...]:
    """Returns the stages with the channels and repeats that a trunk of this size has."""
    return tuple(
        dataclasses.replace(
            stage,
            repeats=round_repeats(stage.repeats, depth),
            in_channels=round_filters(stage.in_channels, width, divisor),
            out_channels=round_filters(stage.out_channels, width, divisor),
        )
        for stage in stages
    )


def output_width(variant: str) -> int:
    """Returns the width C of the pooled feature of a variant, e.g. 640 for "b7"."""
    width, depth, stages = VARIANTS[variant]
    return scale_stages(stages, width, depth)[-1].out_channels


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every block of a trunk shares; see `EfficientNet` for the meaning."""

    padding: str
    activation: str
    squeeze_ratio: float
    bn_mode: str
    bn_group_size: int
    bn_eps: float
    dtype: jnp.dtype
    train: bool
    constrain: layers.Constrain

    def conv_kwargs(self) -> dict:
        return {
            "use_bias": False,
            "dtype": self.dtype,
            "param_dtype": jnp.float32,
            "precision": layers.matmul_precision(self.dtype),
            "kernel_init": init.zeros,
        }

    def dense_kwargs(self) -> dict:
        return self.conv_kwargs() | {"dot_general": layers.dense_product(self.constrain)}

    def group(self, x: jax.Array) -> int:
        """Returns the images [B, H, W, C] that one set of BatchNorm statistics covers."""
        return x.shape[0] if self.bn_mode == "global" else self.bn_group_size

    def norm(self, name: str) -> layers.GroupedBatchNorm:
        return layers.GroupedBatchNorm(
            self.bn_mode, self.bn_group_size, self.train, self.bn_eps, name=name
        )


class EfficientNet(nn.Module):
    """Maps normalised pixels [B, H, W, 3] to pooled features [B, C], float32, not unit norm.

    Attributes:
      width, depth: multipliers of the stage table.
      stages: the table; the stem has the input channels of its first row.
      depth_divisor: scaled channels are multiples of it.
      squeeze_ratio: squeeze-excitation channels over the block's input channels.
      pooling: "mean" or "max" over all pixels of the last map.
      padding: "hf" or "same", see `layers.conv_padding`.
      depthwise_padding: blocks, counted over all stages from 0, whose strided depthwise
        convolution pads both sides alike. Empty for ALIGN.
      activation: key of `layers.ACTIVATIONS`.
      drop_path_rate: stochastic depth; block b of n drops with probability rate * b / n.
      bn_mode, bn_group_size, bn_eps: see `layers.GroupedBatchNorm`.
      dtype: of convolutions and activations; parameters, statistics and pooling are float32.
      remat: of each block, see `layers.remat`. With "block" and grouped BatchNorm, a block trains
        on one BatchNorm group of each device after the other: same numbers, and what it computes
        for 16 images fits into the on-chip memory of a TPU, so that it reads and writes HBM hardly
        more than its input and output.
      scan_blocks: compile the equal blocks of a stage once. Same numbers, same parameter tree.
    """

    width: float
    depth: float
    stages: tuple[StageSpec, ...] = STAGES
    depth_divisor: int = 8
    squeeze_ratio: float = 0.25
    pooling: str = "mean"
    padding: str = "hf"
    depthwise_padding: tuple[int, ...] = ()
    activation: str = "swish"
    drop_path_rate: float = 0.2
    bn_mode: str = "grouped"
    bn_group_size: int = 16
    bn_eps: float = 1e-3
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    scan_blocks: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: bool,
        keys: jax.Array | None = None,
        constrain: layers.Constrain = layers.unconstrained,
    ) -> jax.Array:
        settings = Settings(
            self.padding,
            self.activation,
            self.squeeze_ratio,
            self.bn_mode,
            self.bn_group_size,
            self.bn_eps,
            self.dtype,
            train,
            constrain,
        )
        activate = layers.ACTIVATIONS[self.activation]
        stages = scale_stages(self.stages, self.width, self.depth, self.depth_divisor)
        x = nn.Conv(
            stages[0].in_channels,
            (3, 3),
            (2, 2),
            padding=layers.conv_padding(self.padding, 3, 2, x.shape[1:3]),
            name="stem_conv",
            **settings.conv_kwargs(),
        )(x.astype(self.dtype))
        x = activate(settings.norm("stem_bn")(x))

        num_blocks = sum(stage.repeats for stage in stages)
        block_keys = layers.split_keys(keys, num_blocks)
        first_block = 0
        for number, stage in enumerate(stages, 1):
            count = stage.repeats
            rates = [self.drop_path_rate * (first_block + i) / num_blocks for i in range(count)]
            symmetric = first_block in self.depthwise_padding
            stage_args = (stage, symmetric, tuple(rates), settings, self.remat)
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
        x = x.astype(jnp.float32)
        return x.max((1, 2)) if self.pooling == "max" else x.mean((1, 2))  # [B, C]


def make_tower(config: ConfigDict) -> EfficientNet:
    """Returns the image tower that the group `model` of a validated config describes."""
    width, depth, stages = VARIANTS[config.image.variant]
    return EfficientNet(
        width,
        depth,
        stages,
        padding=config.padding,
        drop_path_rate=config.image.drop_path_rate,
        bn_mode=config.bn_mode,
        bn_group_size=config.bn_group_size,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        scan_blocks=config.scan_layers,
    )


class MBConv(nn.Module):
    """Inverted bottleneck with squeeze-excitation: [B, H, W, in] -> [B, H/s, W/s, out].

    The first block of a stage has no residual, even at equal widths (Hugging Face's rule; the
    original asks for stride 1 and equal widths, which is the same for every published size).
    On CPUs it trains on some images after the other, see `chunked_mbconv`.
    """

    stage: StageSpec
    symmetric: bool
    is_first: bool
    settings: Settings

    @nn.compact
    def __call__(
        self, x: jax.Array, rate_and_keys: tuple[float | jax.Array, jax.Array | None]
    ) -> tuple[jax.Array, None]:
        drop_rate, keys = rate_and_keys
        stage, settings = self.stage, self.settings
        x = settings.constrain(x)
        stride = stage.stride if self.is_first else 1
        # The symmetric padding of a strided convolution is that of an unstrided one.
        padding = layers.conv_padding(
            settings.padding, stage.kernel_size, 1 if self.symmetric else stride, x.shape[1:3]
        )
        run, residual = self._in_chunks if self._runs_in_chunks(x) else self._at_once, x
        x = run(x, stride, padding)
        if not self.is_first:
            x = layers.drop_path(x, drop_rate, keys) + residual
        return settings.constrain(x), None

    def _at_once(self, x: jax.Array, stride: int, padding: layers.Padding) -> jax.Array:
        stage, settings = self.stage, self.settings
        activate = layers.ACTIVATIONS[settings.activation]
        in_channels = x.shape[-1]
        if stage.expand_ratio != 1:
            width = in_channels * stage.expand_ratio
            x = nn.Dense(width, name="expand", **settings.dense_kwargs())(x)
            x = activate(settings.norm("expand_bn")(x))
        x = layers.DepthwiseConv(
            stage.kernel_size, stride, padding, settings.dtype, name="depthwise"
        )(x)
        x = activate(settings.norm("depthwise_bn")(x))
        squeezed = max(1, int(in_channels * settings.squeeze_ratio))
        x = _SqueezeExcite(squeezed, settings, name="squeeze")(x)
        x = nn.Dense(stage.out_channels, name="project", **settings.dense_kwargs())(x)
        return settings.norm("project_bn")(x)

    def _runs_in_chunks(self, x: jax.Array) -> bool:
        settings, rows = self.settings, self.settings.constrain
        normalises_by_batch = settings.train and settings.bn_mode != "frozen"
        whole_groups = x.shape[0] % (settings.group(x) * rows.num_devices) == 0
        return rows.on_cpu and normalises_by_batch and whole_groups and not self.is_initializing()

    def _in_chunks(self, x: jax.Array, stride: int, padding: layers.Padding) -> jax.Array:
        s = self.settings
        block = chunked_mbconv.Block(
            stride, padding, s.activation, s.group(x), s.bn_eps, jnp.dtype(s.dtype)
        )
        x, moments = chunked_mbconv.run(block, s.constrain, self.variables["params"], x)
        for name, of_norm in moments.items():
            self.put_variable("batch_stats", name, of_norm)
        return x


class FusedMBConv(MBConv):
    """As `MBConv`, with one k x k convolution for expansion and depthwise, and no squeeze.

    With expand ratio 1 that convolution is all: [B, H, W, in] -> [B, H/s, W/s, out].

    Source: Tan & Le 2021.
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, rate_and_keys: tuple[float | jax.Array, jax.Array | None]
    ) -> tuple[jax.Array, None]:
        drop_rate, keys = rate_and_keys
        stage, settings = self.stage, self.settings
        x = residual = settings.constrain(x)
        stride = stage.stride if self.is_first else 1
        expands = stage.expand_ratio != 1
        x = nn.Conv(
            x.shape[-1] * stage.expand_ratio if expands else stage.out_channels,
            (stage.kernel_size, stage.kernel_size),
            (stride, stride),
            padding=layers.conv_padding(
                settings.padding, stage.kernel_size, 1 if self.symmetric else stride, x.shape[1:3]
            ),
            name="expand",
            **settings.conv_kwargs(),
        )(x)
        x = layers.ACTIVATIONS[settings.activation](settings.norm("expand_bn")(x))
        if expands:
            x = nn.Dense(stage.out_channels, name="project", **settings.dense_kwargs())(x)
            x = settings.norm("project_bn")(x)
        if not self.is_first:
            x = layers.drop_path(x, drop_rate, keys) + residual
        return settings.constrain(x), None


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
    symmetric: bool
    drop_rates: tuple[float, ...]
    settings: Settings
    remat: str

    def block_class(self) -> type[MBConv]:
        return FusedMBConv if self.stage.fused else MBConv

    @nn.compact
    def __call__(self, x: jax.Array, keys: Keys) -> jax.Array:
        if self._in_groups(x):
            for i, rate in enumerate(self.drop_rates):
                x = self._run_in_groups(f"block{i}", x, jnp.float32(rate), keys[i])
            return x
        block = layers.remat(self.block_class(), self.remat)
        for i, rate in enumerate(self.drop_rates):
            x, _ = block(self.stage, self.symmetric, i == 0, self.settings, name=f"block{i}")(
                x, (rate, keys[i])
            )
        return x

    def _in_groups(self, x: jax.Array) -> bool:
        """Whether a block runs on one BatchNorm group of each device after the other."""
        settings = self.settings
        group = settings.bn_group_size * settings.constrain.num_devices
        return (
            self.remat == "block"
            and settings.bn_mode == "grouped"
            and settings.train
            and not self.is_initializing()
            and x.shape[0] % group == 0
            and x.shape[0] > group
        )

    def _run_in_groups(
        self, name: str, x: jax.Array, rate: jax.Array, keys: jax.Array | None
    ) -> jax.Array:
        variables = {kind: tree[name] for kind, tree in self.variables.items()}
        x, moments = self._groups(name == "block0", variables, x, rate, keys)
        self.put_variable("batch_stats", name, moments)
        return x

    def _groups(
        self,
        is_first: bool,
        variables: dict,
        x: jax.Array,
        rate: jax.Array,
        keys: jax.Array | None,
    ) -> tuple[jax.Array, dict]:
        """Returns (activations, batch_stats) of a block that runs in groups."""
        settings = dataclasses.replace(self.settings, constrain=layers.unconstrained)
        block = self.block_class()(self.stage, self.symmetric, is_first, settings, parent=None)
        size = settings.bn_group_size

        def local(whole: tuple, rows: tuple) -> tuple[jax.Array, dict]:
            variables, rate = whole

            # prevent_cse guards against a merge of both passes, which a scan already rules out.
            @partial(jax.checkpoint, prevent_cse=False)
            def group(_: None, part: tuple) -> tuple[None, tuple[jax.Array, dict]]:
                x, keys = part
                (x, _), updated = block.apply(variables, x, (rate, keys), mutable=["batch_stats"])
                return None, (x, updated["batch_stats"])

            parts = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), rows)
            _, (x, moments) = jax.lax.scan(group, None, parts)
            x = x.reshape(-1, *x.shape[2:])
            return x, jax.tree.map(lambda m: m.mean(0, keepdims=True), moments)

        run = self.settings.constrain.on_each_device(local)
        x, moments = run((variables, rate), (x, keys))
        return x, jax.tree.map(lambda m: m.mean(0), moments)


class _ScannedStage(_Stage):
    @nn.compact
    def __call__(self, x: jax.Array, keys: Keys) -> jax.Array:
        rates = jnp.asarray(self.drop_rates[1:], jnp.float32)
        rest_keys = None if keys[0] is None else keys[1:]
        if self._in_groups(x):
            x = self._run_in_groups("block0", x, jnp.float32(0.0), keys[0])
            stacked = {kind: tree["rest"] for kind, tree in self.variables.items()}

            def body(x: jax.Array, block: tuple) -> tuple[jax.Array, dict]:
                return self._groups(False, block[0], x, *block[1:])

            x, moments = jax.lax.scan(body, x, (stacked, rates, rest_keys))
            self.put_variable("batch_stats", "rest", moments)
            return x
        block = layers.remat(self.block_class(), self.remat)
        x, _ = block(self.stage, self.symmetric, True, self.settings, name="block0")(
            x, (self.drop_rates[0], keys[0])
        )
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": False},
            length=len(self.drop_rates) - 1,
        )
        x, _ = scanned(self.stage, self.symmetric, False, self.settings, name="rest")(
            x, (rates, rest_keys)
        )
        return x
