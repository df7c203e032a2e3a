"""The dual encoder, and THE SEAM: everything outside `models/` calls the functions of this file.

Variables are a plain dict {"params": ..., "batch_stats": ...} with the subtrees `image`, `text`,
`image_projection` (only where widths differ), `text_projection`, the scalar `temperature` and, for
the sigmoid loss only, the scalar `bias`, which no tower uses; adapted models have `lora` too.
Source: Jia et al. 2021, section 4.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from align_jax import trees
from align_jax.models import bert, classifier, efficientnet, freeze, init, layers
from align_jax.models import lora as lora_lib

Variables = dict[str, dict]


class DualEncoder(nn.Module):
    """EfficientNet and BERT towers with linear projections to one space, and a temperature.

    Attributes:
      image, text: the towers.
      embed_dim: D. The image projection exists only if the trunk's width differs from it.
      image_width: C, width of the trunk's pooled feature.
      temperature_init: starting value of the scalar that divides the cosine.
      bias_init: starting value of the sigmoid loss's bias; None: there is none.
      bn_decay: weight of the old BatchNorm statistics in `update_batch_stats`.
      lora: how kernels are adapted; None: they are not. The factors are then all that learns.
      frozen: regexes on names of parameters that do not learn, see `learned`.
    """

    image: efficientnet.EfficientNet
    text: bert.Bert
    embed_dim: int
    image_width: int
    temperature_init: float = 1.0
    bias_init: float | None = None
    bn_decay: float = 0.99
    lora: lora_lib.Lora | None = None
    frozen: tuple[str, ...] = ()

    def setup(self) -> None:
        # Projections, norms and loss stay float32 in every compute dtype.
        def dense() -> nn.Dense:
            return nn.Dense(
                self.embed_dim,
                precision=jax.lax.Precision.HIGHEST,
                kernel_init=init.zeros,
            )

        if self.image_width != self.embed_dim:
            self.image_projection = dense()
        self.text_projection = dense()
        self.temperature = self.param("temperature", init.zeros, (), jnp.float32)
        if self.bias_init is not None:
            self.bias = self.param("bias", init.zeros, (), jnp.float32)

    def __call__(
        self,
        images: jax.Array,
        ids: jax.Array,
        mask: jax.Array,
        train_image: bool,
        image_keys: jax.Array | None = None,
        text_keys: jax.Array | None = None,
        constrain: layers.Constrain = layers.unconstrained,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns (z_image [B, D], z_text [B, D], temperature []), not unit norm."""
        z_image = self.encode_image(images, train_image, image_keys, constrain)
        return z_image, self.encode_text(ids, mask, text_keys, constrain), self.temperature

    def encode_image(
        self,
        images: jax.Array,
        train: bool,
        keys: jax.Array | None = None,
        constrain: layers.Constrain = layers.unconstrained,
    ) -> jax.Array:
        """Returns [B, D] float32 of uint8 images [B, H, W, 3]."""
        # f32: uint8 -> [-1, 1] would lose a bit in bf16.
        x = self.image(images.astype(jnp.float32) / 127.5 - 1.0, train, keys, constrain)
        return self.image_projection(x) if self.image_width != self.embed_dim else x

    def encode_text(
        self,
        ids: jax.Array,
        mask: jax.Array,
        keys: jax.Array | None = None,
        constrain: layers.Constrain = layers.unconstrained,
    ) -> jax.Array:
        """Returns [B, D] float32 of int32 ids and mask [B, L]."""
        return self.text_projection(self.encode_cls(ids, mask, keys, constrain))

    def encode_cls(
        self,
        ids: jax.Array,
        mask: jax.Array,
        keys: jax.Array | None = None,
        constrain: layers.Constrain = layers.unconstrained,
    ) -> jax.Array:
        """Returns the state of [CLS] before the projection, [B, W] float32."""
        return self.text(ids, mask, keys, constrain)[:, 0].astype(jnp.float32)


# Of what this file does, the functions that do not speak of texts take either.
Model = DualEncoder | classifier.Classifier


def make_model(
    config: ConfigDict,
    loss: ConfigDict,
    *,
    vocab_size: int,
    lora: ConfigDict | None = None,
    optim: ConfigDict | None = None,
) -> DualEncoder:
    """Returns the dual encoder that groups of a validated config describe.

    Args:
      config: group `model`.
      loss: group `loss`, whose learned scalars are kept with the towers.
      vocab_size: of the tokenizer.
      lora: group `lora`; None adapts nothing.
      optim: group `optim`, which says what does not learn; None freezes nothing.
    """
    size = bert.VARIANTS[config.text.variant]
    return DualEncoder(
        image=efficientnet.make_tower(config),
        text=bert.Bert(
            vocab_size,
            size.num_layers,
            size.hidden_dim,
            size.num_heads,
            max_positions=config.text.max_positions,
            dropout_rate=config.text.dropout_rate,
            attention_dropout_rate=config.text.dropout_rate,
            scan_layers=config.scan_layers,
            dtype=jnp.dtype(config.dtype),
            remat=config.remat,
        ),
        embed_dim=config.embed_dim,
        image_width=efficientnet.output_width(config.image.variant),
        temperature_init=loss.temperature_init,
        bias_init=loss.bias_init if loss.kind == "sigmoid" else None,
        bn_decay=config.bn_decay,
        lora=lora_lib.make_lora(lora) if lora else None,
        frozen=freeze.make_frozen(optim) if optim else (),
    )


def learned(model: Model, params: dict) -> dict:
    """Returns the part of the parameters, or of shapes like them, that learns."""
    return freeze.learned(model.frozen, model.lora, params)


def is_locked(model: Model, params: dict, tower: str) -> bool:
    """Returns whether nothing of a tower, "image" or "text", learns: it is then in eval mode.

    Its projection is no part of it, its factors are.
    """
    of_tower = trees.select(params, lambda name: name.startswith((f"{tower}/", f"lora/{tower}/")))
    return not learned(model, of_tower)


def abstract_variables(model: Model) -> Variables:
    """Returns the variables as `jax.ShapeDtypeStruct`s; computes nothing."""
    return jax.tree.map(lambda leaf: leaf, _shapes(model))  # dicts of the caller's own


@functools.lru_cache(maxsize=8)  # tracing takes a second or more, and several parts of a run ask
def _shapes(model: Model) -> Variables:
    images = jnp.zeros((1, 64, 64, 3), jnp.uint8)  # no parameter depends on the image size
    ids = jnp.zeros((1, 1), jnp.int32)
    inputs = (images, ids, jnp.ones_like(ids)) if isinstance(model, DualEncoder) else (images,)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, False))
    if model.lora:
        shapes = shapes | {"params": lora_lib.with_shapes(model.lora, shapes["params"])}
    return shapes


def init_variables(model: Model, *, seed: int, shardings: Variables) -> Variables:
    """Returns fresh variables, each tensor born in its sharding.

    Args:
      model: from `make_model` or `classifier.make_classifier`.
      seed: the values depend on (seed, tensor name) alone, see `init.draw`.
      shardings: tree of `jax.sharding.Sharding` like `abstract_variables(model)`.
    """

    def make(path: tuple, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
        name = trees.path_name(path)
        if name == "params/temperature":
            value = np.float32(model.temperature_init)
        elif name == "params/bias":
            value = np.float32(model.bias_init)
        else:
            value = init.draw(name, leaf.shape, seed)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: value[index])

    return jax.tree_util.tree_map_with_path(make, abstract_variables(model), shardings)


def apply_towers(
    model: DualEncoder,
    variables: Variables,
    batch: dict[str, jax.Array],
    *,
    train: bool,
    keys: jax.Array | None = None,
    constrain: layers.Constrain = layers.unconstrained,
) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, jax.Array], dict]:
    """Returns (z_image [B, D], z_text [B, D], temperature [], norms, batch_stats).

    Embeddings are float32 and unit norm; `norms` holds their L2 norms [B] before that, of each
    tower that is computed ("image", "text"), without gradient. In train mode `batch_stats` holds
    the *moments of this batch*, to be blended by `update_batch_stats`; in eval mode the running
    statistics unchanged. A tower that is locked is in eval mode always.

    Args:
      model: from `make_model`.
      variables: {"params", "batch_stats"}.
      batch: `image` uint8 [B, H, W, 3] or, of a locked image side, its embedding `z_image` float32
        [B, D]; `ids` int32 [B, L], `mask` int32 [B, L].
      train: batch statistics and dropout, or running statistics and none.
      keys: one key per example [B]; needed in train mode (`example_keys`).
      constrain: pins the sharding of activations between blocks, see `layers.Constrain`.

    Raises:
      ValueError: train mode without keys, or B not divisible by the BatchNorm group.
    """
    if train and keys is None:
        raise ValueError("apply_towers(train=True) needs one PRNG key per example.")
    image_keys, text_keys = layers.split_keys(keys if train else None, 2)
    train_image = train
    if train and is_locked(model, variables["params"], "image"):
        train_image, image_keys = False, None
    if train and is_locked(model, variables["params"], "text"):
        text_keys = None
    if "z_image" in batch:
        z_text = model.apply(
            merge_lora(model, variables),
            batch["ids"],
            batch["mask"],
            text_keys,
            constrain,
            method=DualEncoder.encode_text,
        )
        temperature = variables["params"]["temperature"]
        norms = {"text": _norms(z_text)}
        return batch["z_image"], unit_norm(z_text), temperature, norms, variables["batch_stats"]
    (z_image, z_text, temperature), updated = model.apply(
        merge_lora(model, variables),
        batch["image"],
        batch["ids"],
        batch["mask"],
        train_image,
        image_keys,
        text_keys,
        constrain,
        mutable=["batch_stats"],
    )
    norms = {"image": _norms(z_image), "text": _norms(z_text)}
    return unit_norm(z_image), unit_norm(z_text), temperature, norms, updated["batch_stats"]


def embed_image(model: Model, variables: Variables, images: jax.Array) -> jax.Array:
    """Returns z_image [B, D] float32, unit norm, in eval mode, of uint8 images [B, H, W, 3].

    Of a classifier it is the pooled feature [B, C].
    """
    z = model.apply(merge_lora(model, variables), images, False, method="encode_image")
    return unit_norm(z)


def embed_text(
    model: DualEncoder,
    variables: Variables,
    ids: jax.Array,
    mask: jax.Array,
    *,
    projected: bool = True,
) -> jax.Array:
    """Returns z_text [B, D] float32, unit norm, in eval mode, of int32 ids and mask [B, L].

    Not projected, it is the state of [CLS] instead, [B, W] with the width of the text tower.
    """
    method = DualEncoder.encode_text if projected else DualEncoder.encode_cls
    return unit_norm(model.apply(merge_lora(model, variables), ids, mask, method=method))


def merge_lora(model: Model, variables: Variables) -> Variables:
    """Returns variables without `lora`, of the same model without it, that compute the same."""
    if model.lora is None:
        return variables
    return variables | {"params": lora_lib.merge(model.lora, variables["params"])}


def update_batch_stats(model: Model, variables: Variables, moments: dict) -> dict:
    """Returns `bn_decay * running + (1 - bn_decay) * moments`, leaf by leaf.

    Those of mode "frozen" and of a locked tower stay bitwise as they are: their moments are the
    running ones, of which the weighted sum would be off by rounding.
    """
    running = variables["batch_stats"]
    if model.image.bn_mode == "frozen" or is_locked(model, variables["params"], "image"):
        return running
    new_share = 1.0 - model.bn_decay
    return jax.tree.map(lambda old, new: model.bn_decay * old + new_share * new, running, moments)


def unit_norm(z: jax.Array) -> jax.Array:
    """Returns rows of z [B, D] divided by their L2 norm; a zero row stays zero, not NaN."""
    squared = jnp.sum(jnp.square(z), axis=-1, keepdims=True)
    return z * jax.lax.rsqrt(jnp.maximum(squared, jnp.finfo(jnp.float32).tiny))


def example_keys(seed: int, step: jax.Array, index: jax.Array) -> jax.Array:
    """Returns one key per example [B], a function of (seed, step, global example index) only."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def _norms(z: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(jax.lax.stop_gradient(z)), axis=-1))
