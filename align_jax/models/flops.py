"""Analytic FLOPs of a training step, from the module sizes: what MFU and pod plans divide by.

Matrix products and convolutions only, two per multiply-add; padding counts as pixels. XLA's own
count has elementwise work too, but counts the body of a loop once, however often it runs.
"""

import dataclasses

from align_jax.models import bert, dual_encoder, efficientnet, layers


@dataclasses.dataclass(frozen=True)
class PairFlops:
    """FLOPs of one pair in a train step.

    Attributes:
      image, text: forward pass of a tower with its projection.
      loss: forward pass of the pair's row of the one B x B matrix of logits.
      recomputed: what rematerialisation and microbatches compute again for the backward pass. The
        depthwise convolutions and attention of `remat="dots"` are left out (4 % of B7 + base).
    """

    image: float
    text: float
    loss: float
    recomputed: float

    @property
    def model(self) -> float:
        """Forward and backward pass: three times the forward pass, nothing computed twice.

        The first layer needs no gradient by its input, so this is a little too much (1 % for B0).
        """
        return 3 * (self.image + self.text + self.loss)

    @property
    def hardware(self) -> float:
        """What the chips compute: `model` and everything that is `recomputed`."""
        return self.model + self.recomputed


def pair_flops(
    model: dual_encoder.DualEncoder,
    *,
    image_size_px: int,
    max_tokens: int,
    batch_size: int,
    microbatches: int = 1,
) -> PairFlops:
    """Returns the FLOPs of one pair of a global batch.

    Args:
      model: from `dual_encoder.make_model`.
      image_size_px: side of the image that the trunk sees.
      max_tokens: L, padding included.
      batch_size: B, global.
      microbatches: with more than one, both towers run forward once more.
    """
    stem, blocks = _trunk(model.image, image_size_px)
    layers_ = _encoder(model.text, max_tokens)
    image = stem + blocks
    if model.image_width != model.embed_dim:
        image += 2 * model.image_width * model.embed_dim
    text = layers_ + 2 * model.text.hidden_dim * model.embed_dim
    recomputed = 0.0
    if microbatches > 1:
        recomputed += image + text
    if model.image.remat == "block":
        recomputed += blocks
    if model.text.remat == "block":
        recomputed += layers_
    return PairFlops(float(image), float(text), 2.0 * batch_size * model.embed_dim, recomputed)


def _trunk(trunk: efficientnet.EfficientNet, size: int) -> tuple[int, int]:
    """FLOPs of (stem, all blocks) for one image of `size` x `size` pixels."""
    stages = efficientnet.scale_stages(trunk.stages, trunk.width, trunk.depth, trunk.depth_divisor)
    size = _out_size(trunk.padding, 3, 2, size)
    stem = 2 * size**2 * 9 * 3 * stages[0].in_channels
    blocks = 0
    for stage in stages:
        for i in range(stage.repeats):
            width_in = stage.in_channels if i == 0 else stage.out_channels
            stride = stage.stride if i == 0 else 1
            hidden = width_in * stage.expand_ratio
            if stage.fused:
                size = _out_size(trunk.padding, stage.kernel_size, stride, size)
                middle = hidden if stage.expand_ratio != 1 else stage.out_channels
                blocks += 2 * size**2 * stage.kernel_size**2 * width_in * middle
                if stage.expand_ratio != 1:
                    blocks += 2 * size**2 * hidden * stage.out_channels
                continue
            if stage.expand_ratio != 1:
                blocks += 2 * size**2 * width_in * hidden
            size = _out_size(trunk.padding, stage.kernel_size, stride, size)
            blocks += 2 * size**2 * stage.kernel_size**2 * hidden
            blocks += 4 * hidden * max(1, int(width_in * trunk.squeeze_ratio))
            blocks += 2 * size**2 * hidden * stage.out_channels
    return stem, blocks


def _out_size(padding: str, kernel_size: int, stride: int, size: int) -> int:
    """Side of the output, in pixels."""
    low, high = layers.conv_padding(padding, kernel_size, stride, (size, size))[0]
    return (size + low + high - kernel_size) // stride + 1


def _encoder(encoder: bert.Bert, length: int) -> int:
    """FLOPs of all layers for one text of `length` tokens."""
    width = encoder.hidden_dim
    hidden = encoder.feed_forward_dim or 4 * width
    dense = 2 * length * (4 * width**2 + 2 * width * hidden)
    attention = 4 * length**2 * width
    return encoder.num_layers * (dense + attention)
