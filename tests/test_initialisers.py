"""Every tensor of a fresh state has the distribution that its source gives it."""

import re

import jax
import numpy as np
import pytest
import scipy.stats

from align_jax import config, mesh, train, train_step, trees

# Of a standard normal cut off at two deviations, which Keras's initialisers are scaled by.
TRUNCATED = scipy.stats.truncnorm(-2.0, 2.0)


def fan_out(shape):
    return np.prod(shape[:-2]) * shape[-1]


def truncated(variance_of):
    return lambda shape: scipy.stats.truncnorm(
        -2.0, 2.0, scale=np.sqrt(variance_of(shape)) / TRUNCATED.std()
    )


def xavier(shape):
    limit = np.sqrt(6.0 / sum(shape))
    return scipy.stats.uniform(-limit, 2 * limit)


# (names, shape -> distribution); Tan & Le 2019 as in Keras, Devlin et al. 2019, Glorot & Bengio
# 2010. A depthwise kernel [k, k, 1, C] has k * k weights a channel.
DRAWN = {
    "depthwise": (
        r"^params/image/stage\d/block\d/depthwise/kernel$",
        truncated(lambda shape: 2.0 / (shape[0] * shape[1])),
    ),
    "convolutions": (
        r"^params/image/(stem_conv|stage\d/block\d/(expand|project|squeeze/reduce|squeeze/expand))"
        "/kernel$",
        truncated(lambda shape: 2.0 / fan_out(shape)),
    ),
    "bert": (
        r"^params/text/(word_embeddings/embedding|(position|segment)_embeddings|encoder/layer\d/"
        r"(query|key|value|attention_out|feed_forward|feed_forward_out)/kernel)$",
        lambda shape: scipy.stats.norm(scale=0.02),
    ),
    "projections": (r"^params/(image|text)_projection/kernel$", xavier),
}
CONSTANT = {
    r"/bias$": 0.0,
    r"_(bn|norm)/scale$": 1.0,
    r"^batch_stats/.*/mean$": 0.0,
    r"^batch_stats/.*/var$": 1.0,
    r"^params/temperature$": 0.25,
    r"^params/bias$": -4.0,
}


def initial(seed):
    c = config.default_config()
    c.model.image.variant, c.model.text.variant, c.model.embed_dim = "nano", "mini", 96
    c.loss.kind, c.loss.label_smoothing = "sigmoid", 0.0
    c.loss.temperature_init, c.loss.bias_init = 0.25, -4.0
    c.optim.momentum_dtype = "bfloat16"
    m = mesh.make_mesh(1, 1, devices=jax.devices()[:1])
    model, optimizer, abstract, _ = train.make_program(c, m, vocab_size=500)
    state = train_step.init_state(model, optimizer, abstract, seed=seed)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return {n: np.asarray(leaf) for n, leaf in trees.named_leaves(variables)}, state


@pytest.fixture(scope="module")
def fresh():
    return initial(seed=5)


def test_every_tensor_is_one_kind_and_float32(fresh):
    patterns = [pattern for pattern, _ in DRAWN.values()]
    for name, value in fresh[0].items():
        assert value.dtype == np.float32
        drawn = [pattern for pattern in patterns if re.search(pattern, name)]
        constant = [v for pattern, v in CONSTANT.items() if re.search(pattern, name)]
        if drawn:
            assert len(drawn) == 1 and not constant, name
        else:
            np.testing.assert_array_equal(value, constant[-1], err_msg=name)


@pytest.mark.parametrize("kind", DRAWN)
def test_values_follow_their_distribution(fresh, kind):
    pattern, distribution = DRAWN[kind]
    names = [name for name in fresh[0] if re.search(pattern, name)]
    assert names
    quantiles = []
    for name in names:
        value = fresh[0][name]
        drawn = distribution(value.shape)
        if value.size >= 200:
            # Also tensor by tensor: a wrong scale of some would drown in the others.
            error = 1.0 / np.sqrt(2 * value.size)
            assert abs(value.std() / drawn.std() - 1.0) < 5 * error, name
        lowest, highest = drawn.support()
        assert lowest <= value.min() and value.max() <= highest * (1 + 1e-6), name
        quantiles.append(drawn.cdf(value.astype(np.float64)).ravel())
    # The seed is fixed: this passes or fails for good.
    assert scipy.stats.kstest(np.concatenate(quantiles), "uniform").pvalue > 1e-3


def test_each_tensor_and_each_seed_draw_anew(fresh):
    other, _ = initial(seed=6)
    seen = set()
    for name, value in fresh[0].items():
        if any(re.search(pattern, name) for pattern, _ in DRAWN.values()):
            assert not np.array_equal(value, other[name]), name
            start = value.ravel()[:4] / value.std()
            assert start.tobytes() not in seen, name
            seen.add(start.tobytes())


def test_state_starts_at_step_zero_with_empty_moments(fresh):
    state = fresh[1]
    assert int(state.step) == 0 and state.step.dtype == np.int32
    moments = trees.named_leaves(state.opt_state)
    assert moments and all(not np.asarray(leaf, np.float32).any() for _, leaf in moments)
    dtypes = {np.dtype(leaf.dtype).name for name, leaf in moments if "/mu/" in name}
    assert dtypes == {"bfloat16"}
