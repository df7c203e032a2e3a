"""A slow second implementation of training, in PyTorch and NumPy float64, read from the papers.

It shares no code with the package: towers, loss, optimizers, schedule and running statistics are
written out here, for one device and the whole batch at once. Only the random bits are drawn as the
package documents it: one key per example, of (seed, step, example index).
"""

import jax
import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F

# Tan & Le 2019, table 1, without the head: kernel, repeats, in, out, expansion, stride.
STAGES = (
    (3, 1, 32, 16, 1, 1),
    (3, 2, 16, 24, 6, 2),
    (5, 2, 24, 40, 6, 2),
    (3, 3, 40, 80, 6, 2),
    (5, 3, 80, 112, 6, 1),
    (5, 4, 112, 192, 6, 2),
    (3, 1, 192, 320, 6, 1),
)
FEMTO = ((3, 1, 32, 16, 1, 1), (5, 2, 16, 40, 6, 2), (3, 1, 40, 80, 6, 2))
TOWERS = {"femto": (FEMTO, 1.0), "pico": (STAGES, 0.3), "nano": (STAGES, 0.5)}  # stages, depth
TEXT_LAYERS = {"tiny": 2, "mini": 4}
HEAD_DIM = 64


def run(config, variables, batches):
    """Returns ({metric: value} of each step, variables after the last).

    Args:
      config: a whole config.
      variables: "params/..." and "batch_stats/..." -> array, at step 0.
      batches: one dict of arrays per step, as the device gets it.
    """
    torch.set_num_threads(1)  # nothing here is large
    values = {name: np.asarray(value, np.float64) for name, value in variables.items()}
    params = {n.removeprefix("params/"): v for n, v in values.items() if n.startswith("params/")}
    stats = {n.split("/", 1)[1]: v for n, v in values.items() if n.startswith("batch_stats/")}
    optimizer, history = Optimizer(config), []
    for step, batch in enumerate(batches):
        leaves = {n: torch.tensor(v, requires_grad=True) for n, v in params.items()}
        towers = Towers(config, leaves, stats, step, batch)
        parts, largest = loss_parts(config, towers, step, batch)
        loss = sum(parts.values())
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        gradients = {
            name: np.zeros_like(params[name]) if g is None else g.numpy()
            for name, g in zip(leaves, gradients, strict=True)
            if not is_frozen(config.optim, name)
        }
        rate = learning_rate(config, step)
        history.append(
            {
                "loss": loss.item(),
                **{name: part.item() for name, part in parts.items()},
                **{f"logit_max/{kind}": logit.item() for kind, logit in largest.items()},
                **{f"embedding_norm/{t}": n.mean().item() for t, n in towers.norms.items()},
                **{f"embedding_norm_max/{t}": n.max().item() for t, n in towers.norms.items()},
                "temperature": float(params["temperature"]),
                **({"bias": float(params["bias"])} if "bias" in params else {}),
                "learning_rate": rate,
                "grad_norm": norm(gradients),
                **norms_by_tower("grad_norm", gradients),
                **norms_by_tower("param_norm", {name: params[name] for name in gradients}),
            }
        )
        before, params = params, optimizer.update(params, gradients, rate)
        moved = {name: params[name] - before[name] for name in gradients}
        history[-1] |= norms_by_tower("update_norm", moved)
        decay = config.model.bn_decay
        stats = {n: decay * v + (1 - decay) * towers.moments.get(n, v) for n, v in stats.items()}
    return history, {f"params/{n}": v for n, v in params.items()} | {
        f"batch_stats/{n}": v for n, v in stats.items()
    }


def norm(arrays):
    return np.sqrt(sum((array**2).sum() for array in arrays.values()))


def norms_by_tower(kind, arrays):
    towers = {
        tower: {
            n: a for n, a in arrays.items() if n.startswith((f"{tower}/", f"{tower}_projection/"))
        }
        for tower in ("image", "text")
    }
    return {f"{kind}/{tower}": norm(found) for tower, found in towers.items() if found}


def example_keys(seed, step, index):
    step_key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda i: jax.random.fold_in(step_key, i))(index)


def split(keys, count):
    """`count` keys [B] of each of the keys [B]."""
    parts = jax.vmap(lambda key: jax.random.split(key, count))(keys)
    return [parts[:, i] for i in range(count)]


class Towers:
    """Embeddings [B, D] of unit norm in train mode, as `z_image` and `z_text`; BatchNorm moments.

    Attributes:
      norms: of the embeddings [B] before that, by tower.
      moments: name of a running statistic -> what this batch has; empty with frozen BatchNorm.
    """

    def __init__(self, config, params, stats, step, batch):
        self.config, self.params, self.stats, self.moments = config, params, stats, {}
        keys = example_keys(config.train.seed, step, batch["index"])
        image_keys, text_keys = split(keys, 2)
        z_image = self._image(batch["image"], image_keys)
        z_text = self._text(batch["ids"], batch["mask"], text_keys)
        self.z_image, self.z_text = F.normalize(z_image, dim=1), F.normalize(z_text, dim=1)
        self.norms = {"image": z_image.norm(dim=1), "text": z_text.norm(dim=1)}

    def _image(self, image, keys):
        x = torch.tensor(image, dtype=torch.float64).permute(0, 3, 1, 2) / 127.5 - 1
        x = self._pad(x, 3, 2)
        x = F.conv2d(x, self.params["image/stem_conv/kernel"].permute(3, 2, 0, 1), stride=2)
        x = F.silu(self._norm(x, "image/stem_bn"))
        stages, depth = TOWERS[self.config.model.image.variant]
        counts = [int(np.ceil(depth * stage[1])) for stage in stages]
        keys, number = split(keys, sum(counts)), 0
        for s, (stage, count) in enumerate(zip(stages, counts, strict=True), 1):
            for b in range(count):
                y = self._block(x, f"image/stage{s}/block{b}", stage, 1 if b else stage[5])
                if b:
                    rate = self.config.model.image.drop_path_rate * number / sum(counts)
                    y = x + self._drop(y, rate, keys[number], (1, 1, 1))
                x, number = y, number + 1
        x = x.mean((2, 3))
        if "image_projection/kernel" in self.params:
            x = self._dense(x, "image_projection")
        return x

    def _block(self, x, name, stage, stride):
        if stage[4] != 1:
            x = torch.einsum("bihw,io->bohw", x, self.params[f"{name}/expand/kernel"])
            x = F.silu(self._norm(x, f"{name}/expand_bn"))
        kernel = self.params[f"{name}/depthwise/kernel"].permute(3, 2, 0, 1)
        x = F.conv2d(self._pad(x, stage[0], stride), kernel, stride=stride, groups=x.shape[1])
        x = F.silu(self._norm(x, f"{name}/depthwise_bn"))
        gate = F.silu(self._dense(x.mean((2, 3)), f"{name}/squeeze/reduce"))
        x = x * torch.sigmoid(self._dense(gate, f"{name}/squeeze/expand"))[:, :, None, None]
        x = torch.einsum("bihw,io->bohw", x, self.params[f"{name}/project/kernel"])
        return self._norm(x, f"{name}/project_bn")

    def _pad(self, x, kernel, stride):
        pads = []
        for size in x.shape[:1:-1]:  # width first
            if stride == 1:
                before = after = kernel // 2
            elif self.config.model.padding == "hf":
                before, after = kernel // 2 - 1, kernel // 2
            else:
                total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
                before, after = total // 2, total - total // 2
            pads += [before, after]
        return F.pad(x, pads)

    def _norm(self, x, name):
        scale, bias = self.params[f"{name}/scale"], self.params[f"{name}/bias"]
        mode, size = self.config.model.bn_mode, len(x)
        if mode == "frozen":
            mean, var = (torch.tensor(self.stats[f"{name}/{part}"]) for part in ("mean", "var"))
            x = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + 1e-3)
        else:
            size = self.config.model.bn_group_size if mode == "grouped" else size
            x = x.reshape(-1, size, *x.shape[1:])
            mean = x.mean((1, 3, 4), keepdim=True)
            var = ((x - mean) ** 2).mean((1, 3, 4), keepdim=True)
            x = ((x - mean) / torch.sqrt(var + 1e-3)).flatten(0, 1)
            self.moments[f"{name}/mean"] = mean.mean(0).flatten().detach().numpy()
            self.moments[f"{name}/var"] = var.mean(0).flatten().detach().numpy()
        return x * scale[:, None, None] + bias[:, None, None]

    def _text(self, ids, mask, keys):
        params, rate = self.params, self.config.model.text.dropout_rate
        layers = TEXT_LAYERS[self.config.model.text.variant]
        length = ids.shape[1]
        x = params["text/word_embeddings/embedding"][torch.tensor(ids.astype(np.int64))]
        x = x + params["text/position_embeddings"][:length] + params["text/segment_embeddings"][0]
        x = self._layer_norm(x, "text/embeddings_norm")
        *layer_keys, embedding_keys = split(keys, layers + 1)
        x = self._drop(x, rate, embedding_keys)
        for i in range(layers):
            weight_keys, attended_keys, output_keys = split(layer_keys[i], 3)
            name = f"text/encoder/layer{i}"
            query, key, value = (
                self._dense(x, f"{name}/{part}").unflatten(2, (-1, HEAD_DIM)).transpose(1, 2)
                for part in ("query", "key", "value")
            )  # [B, N, L, 64]
            scores = query @ key.transpose(2, 3) / HEAD_DIM**0.5
            scores = scores.masked_fill(torch.tensor(mask)[:, None, None, :] == 0, -torch.inf)
            weights = self._drop(scores.softmax(3), rate, weight_keys)
            attended = (weights @ value).transpose(1, 2).flatten(2)
            attended = self._dense(attended, f"{name}/attention_out")
            x = x + self._drop(attended, rate, attended_keys)
            x = self._layer_norm(x, f"{name}/attention_norm")
            y = F.gelu(self._dense(x, f"{name}/feed_forward"))
            y = self._drop(self._dense(y, f"{name}/feed_forward_out"), rate, output_keys)
            x = self._layer_norm(x + y, f"{name}/feed_forward_norm")
        return self._dense(x[:, 0], "text_projection")

    def _dense(self, x, name):
        return x @ self.params[f"{name}/kernel"] + self.params[f"{name}/bias"]

    def _layer_norm(self, x, name):
        scale, bias = self.params[f"{name}/scale"], self.params[f"{name}/bias"]
        return F.layer_norm(x, x.shape[-1:], scale, bias, 1e-12)

    def _drop(self, x, rate, keys, shape=None):
        shape = x.shape[1:] if shape is None else shape
        keep_rate = np.float32(1.0) - np.float32(rate)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, keep_rate, shape))(keys)
        return x * torch.tensor(np.array(keep)) / (1 - rate)


def loss_parts(config, towers, step, batch):
    loss, size = config.loss, len(batch["index"])
    masked = {"none": (), "both": ("caption", "image")}
    hashes = [
        batch[f"{what}_hash"] for what in masked.get(loss.mask_duplicates, (loss.mask_duplicates,))
    ]
    if loss.negatives < 1:
        keys = example_keys(config.train.seed, step, batch["index"])
        halvings = (round(-np.log2(loss.negatives)),)
        bits = jax.vmap(lambda k: jax.random.bits(jax.random.fold_in(k, 2**16), halvings))(keys)
        hashes += list((np.asarray(bits) & 1).T[:, :, None])  # coins: halves of the batch
    excluded = np.zeros((size, size), bool)
    for h in hashes:
        excluded |= (h[:, None] == h[None]).all(-1)
    allowed = torch.tensor(~excluded | np.eye(size, dtype=bool))
    eye = torch.eye(size, dtype=torch.float64)
    logits = towers.z_image @ towers.z_text.T / towers.params["temperature"]
    logits = logits + (towers.params["bias"] if loss.kind == "sigmoid" else 0.0)
    largest = {"positive": logits.diag().max(), "negative": logits[allowed & (eye == 0)].max()}
    if loss.kind == "sigmoid":
        pairwise = F.softplus(-(2 * eye - 1) * logits)
        parts = {
            "loss_positive": (pairwise * eye).sum() / size,
            "loss_negative": (pairwise * (1 - eye) * allowed).sum() / size,
        }
        return parts, largest

    def cross_entropy(logits, allowed):
        log_p = logits.masked_fill(~allowed, -torch.inf).log_softmax(1)
        uniform = allowed.double() / allowed.sum(1, keepdim=True)
        target = (1 - loss.label_smoothing) * eye + loss.label_smoothing * uniform
        return -(target * log_p.masked_fill(~allowed, 0.0)).sum(1).mean()

    parts = {
        "loss_image_to_text": cross_entropy(logits, allowed),
        "loss_text_to_image": cross_entropy(logits.T, allowed.T),
    }
    return parts, largest


def learning_rate(config, step):
    peak, warmup = config.optim.learning_rate, config.optim.warmup_steps
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / (config.train.steps - warmup)
    decay = {"linear": 1 - done, "cosine": (1 + np.cos(np.pi * done)) / 2}
    least = config.optim.min_learning_rate
    return least + (peak - least) * decay[config.optim.schedule]


def is_frozen(c, name):
    return any(_found(pattern, name) for pattern in c.freeze) or (
        name == "temperature" and c.temperature == "fixed"
    )


class Optimizer:
    """LAMB (You et al. 2020), AdamW, Lion (Chen et al. 2023), one tensor at a time."""

    def __init__(self, config):
        self.config, self.first, self.second, self.count = config.optim, {}, {}, 0

    def update(self, params, gradients, rate):
        c, self.count = self.config, self.count + 1
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        factor = min(1.0, c.clip_norm / norm) if c.clip_norm else 1.0
        return {
            name: self._updated(name, param, factor * gradients[name], rate)
            if name in gradients
            else param
            for name, param in params.items()
        }

    def _updated(self, name, p, g, rate):
        c = self.config
        rate *= {
            "temperature": c.temperature_lr_multiplier,
            "image": c.image_lr_multiplier,
            "image_projection": c.image_lr_multiplier,
        }.get(name.split("/")[0], c.text_lr_multiplier)
        rate *= next((by for pattern, by in c.lr_rules if _found(pattern, name)), 1.0)
        if name == "temperature" and c.temperature == "log":
            return p * np.exp(-rate * self._adam(name, g * p, "float32"))
        if c.name == "lion":
            u = self._lion(name, g, c.momentum_dtype)
        else:
            u = self._adam(name, g, c.momentum_dtype)
        if not any(_found(pattern, name) for pattern in c.no_decay):
            u = u + c.weight_decay * p
        norms = np.linalg.norm(p), np.linalg.norm(u)
        if c.name == "lamb" and not any(_found(pattern, name) for pattern in c.no_trust_ratio):
            u = u * (norms[0] / norms[1] if all(norms) else 1.0)
        return p - rate * u

    def _adam(self, name, g, dtype):
        c = self.config
        m = self._decayed(name, c.b1, dtype) + (1 - c.b1) * g
        v = c.b2 * self.second.get(name, 0.0) + (1 - c.b2) * g**2
        self.first[name], self.second[name] = _stored(m, dtype), v
        m, v = m / (1 - c.b1**self.count), v / (1 - c.b2**self.count)
        return m / (np.sqrt(v) + c.eps)

    def _lion(self, name, g, dtype):
        c = self.config
        u = np.sign(self._decayed(name, c.b1, dtype) + (1 - c.b1) * g)
        self.first[name] = _stored(self._decayed(name, c.b2, dtype) + (1 - c.b2) * g, dtype)
        return u

    def _decayed(self, name, decay, dtype):
        # Optax multiplies in the moment's own dtype, the decay included.
        return _stored(_stored(decay, dtype) * self.first.get(name, 0.0), dtype)


def _found(pattern, name):
    # The patterns of these tests are plain pieces of names, or end with one.
    return name.endswith(pattern[:-1]) if pattern.endswith("$") else pattern in name


def _stored(value, dtype):
    return (
        np.asarray(value).astype(ml_dtypes.bfloat16).astype(np.float64)
        if (dtype == "bfloat16")
        else np.asarray(value, np.float64)
    )
