"""The README.md of a saved model: what it is, what it was trained on, how inputs are prepared.

States only what is known: a model that was loaded from a Hugging Face folder has no training facts.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from align_jax import trees
from align_jax.hf.processor import Preprocessing
from align_jax.models import dual_encoder

_HEAD = """---
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags:
- align
- align_jax
---

# {title}

ALIGN dual encoder (EfficientNet image tower, BERT text tower), written by align_jax {version}.

```python
import align_jax

model = align_jax.load("FOLDER_OR_HUB_ID")
probabilities = model.classify(["photo.jpg"], ["cat", "dog"])
```

`transformers.AlignModel.from_pretrained` and `AlignProcessor.from_pretrained` read it too.
"""

_RESIZE = {
    "pil": "Pillow's bilinear filter (averages when it shrinks)",
    "tf": "bilinear between the 2 x 2 nearest pixels, as tf.image.resize; AlignProcessor resizes "
    "with Pillow's filter instead, so its embeddings differ somewhat",
}


def make_card(
    model: dual_encoder.DualEncoder,
    variables: dual_encoder.Variables,
    preprocessing: Preprocessing,
    *,
    name: str,
    step: int | None,
    config: ConfigDict | None,
    version: str,
) -> str:
    """Returns the model card as Markdown.

    Args:
      model, variables: the weights that are saved.
      preprocessing: of the model.
      name: title.
      step: updates done, if known.
      config: of the training run, if known.
      version: of align_jax.
    """
    sections = [_HEAD.format(title=name, version=version)]
    if config is not None:
        sections.append(_table("Training", _training(config, step)))
    sections.append(_table("Sizes", _sizes(model, variables)))
    sections.append(_table("Preprocessing", _preprocessing(preprocessing)))
    return "\n".join(sections)


def _training(config: ConfigDict, step: int | None) -> Sequence[tuple[str, str]]:
    batch_size, c = config.train.batch_size, config
    sources = [(entry.source, entry.get("weight", 1)) for entry in c.data.mixture.values()]
    shares = [(source, f" x {weight:g}") for source, weight in sources] or [(c.data.source, "")]
    # The path of a source names a machine's folders; its last part names the data.
    names = [f"`{source.rstrip('/').rpartition('/')[2]}`{share}" for source, share in shares]
    rows = [("data", ", ".join(names))]
    if step is not None:
        rows.append(("steps", f"{step:,} of {c.train.steps:,}"))
        rows.append(("pairs seen", f"{step * batch_size:,}"))
    return rows + [
        ("global batch", f"{batch_size:,} pairs"),
        ("optimizer", f"{c.optim.name}, peak learning rate {c.optim.learning_rate:g}"),
        ("label smoothing", f"{c.loss.label_smoothing:g}"),
        ("BatchNorm", f"{c.model.bn_mode}, groups of {c.model.bn_group_size}"),
        ("compute dtype", c.model.dtype),
        ("seed", str(c.train.seed)),
    ]


def _sizes(
    model: dual_encoder.DualEncoder, variables: dual_encoder.Variables
) -> Sequence[tuple[str, str]]:
    params = variables["params"]
    text = model.text
    return [
        ("parameters", f"{trees.count(params):,}"),
        ("image tower", f"{trees.count(params['image']):,}"),
        (
            "text tower",
            f"{trees.count(params['text']):,}; {text.num_layers} layers of {text.hidden_dim}, "
            f"{text.vocab_size:,} tokens",
        ),
        ("embedding", f"{model.embed_dim} dimensions"),
        ("temperature", f"{float(params['temperature']):.6g} (divides the cosine)"),
    ]


def _preprocessing(p: Preprocessing) -> Sequence[tuple[str, str]]:
    return [
        ("image", f"RGB, resized to {p.resize_size} x {p.resize_size} px, aspect ratio lost"),
        ("resize", _RESIZE[p.resize]),
        ("crop", f"central {p.image_size} x {p.image_size} px"),
        ("pixels", "x / 127.5 - 1"),
        ("text", f"WordPiece, cut to {p.max_tokens} tokens"),
        ("tokenizer", f"{p.vocab_size:,} wordpieces, fingerprint `{p.tokenizer_fingerprint}`"),
    ]


def _table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {key} | {value} |" for key, value in rows]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines]) + "\n"
