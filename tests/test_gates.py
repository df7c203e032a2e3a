"""Gates of speed that do not depend on the machine's mood: calls, bytes and copies are counted.

A change that makes one of these larger makes slower what was measured once (docs/performance.md,
docs/input.md). The counts stand beside each gate, which is about a tenth above.
"""

import re
import sys
from collections import Counter

import jax
import jax.numpy as jnp
from test_chunked_mbconv import ONE_DEVICE, compiled_gradient

from align_jax.config import default_config
from align_jax.data import pipeline
from align_jax.data.sources.open_source import open_source
from align_jax.data.tokenizer import load_tokenizer
from align_jax.models import bert


def test_python_makes_few_calls_for_an_image_of_the_input(project, monkeypatch):
    c = default_config().data
    c.image_size, c.resize_size, c.resize, c.max_tokens = 32, 40, "pil", 16
    build, counts = pipeline._BatchBuilder.__call__, []

    def counted(builder, step):
        calls = Counter()

        def count(frame, event, argument):
            calls[event] += "align_jax" in frame.f_code.co_filename

        sys.setprofile(count)
        try:
            return build(builder, step)
        finally:
            sys.setprofile(None)
            counts.append(calls)

    monkeypatch.setattr(pipeline._BatchBuilder, "__call__", counted)
    source = open_source(f"{project}/data?split=train")
    tokenizer = load_tokenizer(project / "tokenizer")
    batches = pipeline.train_batches(source, tokenizer, c, batch_size=96, seed=0)
    next(batches), next(batches)
    batches.close()
    ours, below = (counts[1][event] / 96 for event in ("call", "c_call"))
    assert ours <= 52  # 47.4 functions of ours
    assert below <= 68  # 61.3 that they call in C


def test_an_mbconv_block_moves_few_bytes_forward_and_backward():
    compiled, expanded_bytes = compiled_gradient()
    # 23.1; XLA counts a pass over chunks as one chunk.
    assert compiled.cost_analysis()["bytes accessed"] <= 26 * expanded_bytes


def test_the_text_tower_is_rearranged_seldom_forward_and_backward():
    model = bert.Bert(1000, num_layers=2, hidden_dim=128, num_heads=2, dropout_rate=0.0)
    ids = jax.ShapeDtypeStruct((64, 20), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), ids, ids)

    def value(params, ids):
        return jnp.sum(model.apply({"params": params}, ids, ids, constrain=ONE_DEVICE))

    text = jax.jit(jax.grad(value)).lower(variables["params"], ids).compile().as_text()
    found = Counter(re.findall(r"= \S+ (copy|transpose|dot)\(", text))
    assert found["copy"] + found["transpose"] <= 70  # 63; 99 with autodiff's kernel gradients
