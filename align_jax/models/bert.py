"""BERT encoder (Devlin et al. 2019): post-LN, exact GELU, learned positions, no pooler.

ALIGN reads the [CLS] state; BERT's pooler is left out of training because nothing uses it. Layer
normalisation and softmax are float32 whatever the compute dtype (eps 1e-12 underflows otherwise).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from align_jax.models import init, layers


@dataclasses.dataclass(frozen=True)
class BertSize:
    """Depth and width of an encoder; heads are 64 wide, the feed-forward layer 4 x hidden_dim."""

    num_layers: int
    hidden_dim: int

    @property
    def num_heads(self) -> int:
        return self.hidden_dim // 64


VARIANTS: dict[str, BertSize] = {
    "tiny": BertSize(2, 128),
    "mini": BertSize(4, 256),
    "small": BertSize(4, 512),
    "medium": BertSize(8, 512),
    "base": BertSize(12, 768),
    "large": BertSize(24, 1024),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every layer of an encoder shares; see `Bert` for the meaning."""

    num_heads: int
    feed_forward_dim: int
    activation: str
    norm_eps: float
    dropout_rate: float
    attention_dropout_rate: float
    dtype: jnp.dtype
    constrain: layers.Constrain


class Bert(nn.Module):
    """Maps token ids [B, L] to hidden states [B, L, H] in `dtype`.

    Attributes:
      vocab_size: rows of the word embedding.
      num_layers, hidden_dim, num_heads: size of the encoder.
      feed_forward_dim: hidden units of the feed-forward layers; None for 4 x hidden_dim.
      max_positions: longest L.
      num_segments: rows of the segment embedding; only the first is ever used.
      activation: key of `layers.ACTIVATIONS`.
      norm_eps: added to the variance by layer normalisation.
      dropout_rate: of embeddings and residual branches.
      attention_dropout_rate: of attention weights.
      dtype: of matmuls; parameters are float32.
      remat: of each layer, see `layers.remat`.
      scan_layers: compile the equal layers once. Same numbers, same parameter tree.
    """

    vocab_size: int
    num_layers: int
    hidden_dim: int
    num_heads: int
    feed_forward_dim: int | None = None
    max_positions: int = 512
    num_segments: int = 2
    activation: str = "gelu"
    norm_eps: float = 1e-12
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    scan_layers: bool = False

    @nn.compact
    def __call__(
        self,
        ids: jax.Array,
        mask: jax.Array,
        keys: jax.Array | None = None,
        constrain: layers.Constrain = layers.unconstrained,
    ) -> jax.Array:
        length = ids.shape[1]
        if length > self.max_positions:
            raise ValueError(
                f"data.max_tokens={length} exceeds the {self.max_positions} positions of the text "
                "tower (model.text.max_positions)."
            )
        words = nn.Embed(
            self.vocab_size, self.hidden_dim, embedding_init=init.zeros, name="word_embeddings"
        )(ids)
        positions = self.param(
            "position_embeddings", init.zeros, (self.max_positions, self.hidden_dim), jnp.float32
        )
        # One segment is ever used; the other rows exist because checkpoints have them.
        segments = self.param(
            "segment_embeddings", init.zeros, (self.num_segments, self.hidden_dim), jnp.float32
        )
        x = words + positions[:length] + segments[0]
        x = _layer_norm(self, "embeddings_norm", self.norm_eps)(x)
        *layer_keys, embedding_keys = layers.split_keys(keys, self.num_layers + 1)
        x = layers.dropout(x, self.dropout_rate, embedding_keys)
        x = x.astype(self.dtype)

        lowest = jnp.finfo(jnp.float32).min
        bias = jnp.where(mask[:, None, None, :] > 0, 0.0, lowest)  # [B, 1, 1, L]
        encoder = _Encoder
        if self.scan_layers:
            names = tuple(f"layer{i}" for i in range(self.num_layers))
            stack, unstack = layers.stack_blocks(names, "layers")
            encoder = nn.map_variables(
                _ScannedEncoder,
                "params",
                trans_in_fn=stack,
                trans_out_fn=unstack,
                init=self.is_initializing(),
                mutable=True,
            )
        settings = Settings(
            self.num_heads,
            self.feed_forward_dim or 4 * self.hidden_dim,
            self.activation,
            self.norm_eps,
            self.dropout_rate,
            self.attention_dropout_rate,
            self.dtype,
            constrain,
        )
        args = (self.num_layers, settings, self.remat)
        return encoder(*args, name="encoder")(x, bias, tuple(layer_keys))


class BertLayer(nn.Module):
    """One post-LN transformer layer: [B, L, H] -> [B, L, H]."""

    settings: Settings

    @nn.compact
    def __call__(
        self, x: jax.Array, bias: jax.Array, keys: jax.Array | None
    ) -> tuple[jax.Array, None]:
        settings = self.settings
        x = settings.constrain(x)
        batch, length, hidden_dim = x.shape
        head_dim = hidden_dim // settings.num_heads
        dtype, precision = settings.dtype, layers.matmul_precision(settings.dtype)

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(
                features,
                dtype=dtype,
                precision=precision,
                kernel_init=init.zeros,
                dot_general=layers.dense_product(settings.constrain),
                name=name,
            )

        def heads(name: str) -> jax.Array:  # [B, L, N, K]
            return dense(hidden_dim, name)(x).reshape(batch, length, settings.num_heads, head_dim)

        weight_keys, attended_keys, output_keys = layers.split_keys(keys, 3)
        query, key, value = heads("query"), heads("key"), heads("value")
        scores = jnp.einsum("BQNK,BLNK->BNQL", query, key, precision=precision)
        scores = scores.astype(jnp.float32) / head_dim**0.5 + bias
        weights = nn.softmax(scores)  # [B, N, L, L] f32
        weights = layers.dropout(weights, settings.attention_dropout_rate, weight_keys)
        attended = jnp.einsum("BNQL,BLNK->BQNK", weights.astype(dtype), value, precision=precision)
        attended = dense(hidden_dim, "attention_out")(attended.reshape(x.shape))
        attended = layers.dropout(attended, settings.dropout_rate, attended_keys)
        x = _layer_norm(self, "attention_norm", settings.norm_eps)(x + attended).astype(dtype)

        y = dense(settings.feed_forward_dim, "feed_forward")(x)
        y = dense(hidden_dim, "feed_forward_out")(layers.ACTIVATIONS[settings.activation](y))
        y = layers.dropout(y, settings.dropout_rate, output_keys)
        x = _layer_norm(self, "feed_forward_norm", settings.norm_eps)(x + y).astype(dtype)
        return settings.constrain(x), None


class _Encoder(nn.Module):
    num_layers: int
    settings: Settings
    remat: str

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, keys: tuple) -> jax.Array:
        layer = layers.remat(BertLayer, self.remat)
        for i in range(self.num_layers):
            x, _ = layer(self.settings, name=f"layer{i}")(x, bias, keys[i])
        return x


class _ScannedEncoder(_Encoder):
    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, keys: tuple) -> jax.Array:
        layer_keys = None if keys[0] is None else jnp.stack(keys)  # [layers, B]
        scanned = nn.scan(
            layers.remat(BertLayer, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": False},
            in_axes=(nn.broadcast, 0),
            length=self.num_layers,
        )
        x, _ = scanned(self.settings, name="layers")(x, bias, layer_keys)
        return x


def _layer_norm(module: nn.Module, name: str, eps: float) -> nn.LayerNorm:
    # Two-pass variance: the fast form is negative by rounding where a row is nearly constant.
    return nn.LayerNorm(
        epsilon=eps, dtype=jnp.float32, use_fast_variance=False, name=name, parent=module
    )
