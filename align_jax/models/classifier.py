"""An image classifier: the image tower with a linear head on its pooled feature.

Variables are {"params": {"image", "head"}, "batch_stats": {"image"}}; the tower has the names and
the input of a dual encoder's, so either can start from the other. Source: Jia et al. 2021, section
5.3: fine-tuned classification.
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from align_jax.models import efficientnet, freeze, init, layers


class Classifier(nn.Module):
    """EfficientNet tower and a linear head of float32.

    Attributes:
      image: the tower.
      num_classes: K.
      bn_decay: weight of the old BatchNorm statistics in `dual_encoder.update_batch_stats`.
      frozen: from `freeze.make_frozen`.
    """

    image: efficientnet.EfficientNet
    num_classes: int
    bn_decay: float = 0.99
    frozen: tuple[str, ...] = ()

    lora: ClassVar[None] = None

    def setup(self) -> None:
        self.head = nn.Dense(
            self.num_classes, precision=jax.lax.Precision.HIGHEST, kernel_init=init.zeros
        )

    def __call__(
        self,
        images: jax.Array,
        train: bool,
        keys: jax.Array | None = None,
        constrain: layers.Constrain = layers.unconstrained,
    ) -> jax.Array:
        """Returns logits [B, K] float32 of uint8 images [B, H, W, 3]."""
        return self.head(self.encode_image(images, train, keys, constrain))

    def encode_image(
        self,
        images: jax.Array,
        train: bool,
        keys: jax.Array | None = None,
        constrain: layers.Constrain = layers.unconstrained,
    ) -> jax.Array:
        """Returns the pooled feature [B, C] float32, not unit norm."""
        return self.image(images.astype(jnp.float32) / 127.5 - 1.0, train, keys, constrain)


def make_classifier(
    config: ConfigDict, num_classes: int, *, optim: ConfigDict | None = None
) -> Classifier:
    """Returns the classifier that groups of a validated config describe.

    Args:
      config: group `model`.
      num_classes: K.
      optim: group `optim`, which says what does not learn; None freezes nothing.
    """
    return Classifier(
        efficientnet.make_tower(config),
        num_classes,
        bn_decay=config.bn_decay,
        frozen=freeze.make_frozen(optim) if optim else (),
    )


def class_scores(model: Classifier, variables: dict[str, dict], images: jax.Array) -> jax.Array:
    """Returns logits [B, K] float32, in eval mode, of uint8 images [B, H, W, 3]."""
    return model.apply(variables, images, False)


def train_scores(
    model: Classifier,
    variables: dict[str, dict],
    images: jax.Array,
    *,
    keys: jax.Array,
    constrain: layers.Constrain = layers.unconstrained,
) -> tuple[jax.Array, dict]:
    """Returns (logits [B, K] float32, BatchNorm moments of this batch), in train mode.

    A tower of which nothing learns is in eval mode always.

    Args:
      model: from `make_classifier`.
      variables: {"params", "batch_stats"}.
      images: uint8 [B, H, W, 3].
      keys: one per example [B], for stochastic depth (`dual_encoder.example_keys`).
      constrain: pins the sharding of activations between blocks, see `layers.Constrain`.
    """
    tower = {"image": variables["params"]["image"]}
    learns = bool(freeze.learned(model.frozen, None, tower))
    logits, updated = model.apply(
        variables, images, learns, keys if learns else None, constrain, mutable=["batch_stats"]
    )
    return logits, updated["batch_stats"]
