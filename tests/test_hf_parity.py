"""The same numbers as the installed transformers `AlignModel` (torch), block by block, float32."""

import hf_helpers as hf
import jax
import numpy as np
import pytest

from align_jax import losses, trees
from align_jax.hf import config as hf_config
from align_jax.hf import convert
from align_jax.models import bert, dual_encoder, efficientnet, layers

torch = hf.torch

pytestmark = pytest.mark.usefixtures("quick_compile")
SIZES = (65, 96, 224, 240, 289, 300)  # odd and even inputs of the strided convolutions


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def convert_model(theirs):
    ours = hf_config.model_from_hf(theirs.config)
    variables, _ = convert.from_hf(hf.tensors_of(theirs), ours)
    return ours, variables


def run_theirs(model, batch):
    """Returns (outputs, raw text features, hidden states).

    The hidden states are those of the stem, of each block [B, H, W, C] and of each text layer.
    """
    states = []

    def keep(_module, _inputs, output):
        state = output[0] if isinstance(output, tuple) else output
        states.append(state.permute(0, 2, 3, 1) if state.ndim == 4 else state)

    vision = model.vision_model
    modules = [vision.embeddings, *vision.encoder.blocks, *model.text_model.encoder.layer]
    hooks = [module.register_forward_hook(keep) for module in modules]
    with torch.no_grad():
        outputs = model(**hf.torch_inputs(batch), return_loss=True)
        z_text = model.text_projection(outputs.text_model_output.last_hidden_state[:, 0])
    for hook in hooks:
        hook.remove()
    return outputs, z_text.numpy(), [state.numpy() for state in states]


def run_ours(model, variables, batch):
    """Returns (raw image features, raw text features, temperature, hidden states as above)."""

    def keep(module, _method):
        return isinstance(module, efficientnet.MBConv | bert.BertLayer) or module.name == "stem_bn"

    def towers(variables):
        outputs, captured = model.apply(
            variables,
            batch["image"],
            batch["ids"],
            batch["mask"],
            False,
            capture_intermediates=keep,
            mutable=["intermediates", "batch_stats"],
        )
        return outputs, captured["intermediates"]

    (z_image, z_text, temperature), states = jax.jit(towers)(variables)
    activate = layers.ACTIVATIONS[model.image.activation]
    image, encoder = states["image"], states["text"]["encoder"]
    blocks = [activate(image["stem_bn"]["__call__"][0])]
    for stage in sorted(name for name in image if name.startswith("stage")):
        for i in range(len(image[stage])):
            blocks.append(image[stage][f"block{i}"]["__call__"][0][0])
    blocks += [encoder[f"layer{i}"]["__call__"][0][0] for i in range(len(encoder))]
    return z_image, z_text, temperature, blocks


@pytest.mark.parametrize(
    ("name", "size_px"),
    [(name, 65) for name in hf.CONFIGS]
    + [slow(name, size) for size in SIZES[1:] for name in hf.CONFIGS]
    + [slow("align-base", size) for size in SIZES],
)
def test_every_block_and_output_equals_transformers(name, size_px):
    theirs = hf.torch_model(name)
    ours, variables = convert_model(theirs)
    batch = hf.make_batch(2, size_px)
    outputs, their_z_text, their_states = run_theirs(theirs, batch)
    del theirs
    z_image, z_text, temperature, states = run_ours(ours, variables, batch)

    assert len(states) == len(their_states)
    for number, (found, wanted) in enumerate(zip(states, their_states, strict=True)):
        # Relative to the largest entry: residual streams of random weights grow with depth.
        error = np.abs(found - wanted).max() / max(1.0, np.abs(wanted).max())
        assert error <= 1e-4, f"hidden state {number} of {len(states)}"
    their_z_image = outputs.vision_model_output.pooler_output.numpy()
    np.testing.assert_allclose(z_image, their_z_image, rtol=0, atol=1e-4)
    np.testing.assert_allclose(z_text, their_z_text, rtol=0, atol=1e-4)
    z_image, z_text = dual_encoder.unit_norm(z_image), dual_encoder.unit_norm(z_text)
    np.testing.assert_allclose(z_image, outputs.image_embeds.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(z_text, outputs.text_embeds.numpy(), rtol=0, atol=1e-5)
    logits = z_image @ z_text.T / temperature
    np.testing.assert_allclose(logits, outputs.logits_per_image.numpy(), rtol=0, atol=1e-4)
    loss, _ = losses.dense_loss(z_image, z_text, temperature, label_smoothing=0.1)
    assert float(loss) == pytest.approx(2 * outputs.loss.item(), abs=1e-4)  # sum; theirs the mean


CASES = [("gelu-both-towers", False), ("max-pooling", True)]


@pytest.mark.parametrize(
    ("name", "train"),
    [*CASES]
    + [slow(n, train) for n in hf.CONFIGS for train in (False, True) if (n, train) not in CASES],
)
def test_gradient_of_every_parameter_equals_transformers(name, train):
    theirs = hf.torch_model(name)
    ours, variables = convert_model(theirs)
    theirs.train(train)  # batch statistics, or running ones; dropout is off in both
    batch = hf.make_batch(8, 65)
    outputs = theirs(**hf.torch_inputs(batch), return_loss=True)
    outputs.loss.backward()
    gradients = {
        key: np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()
        for key, parameter in theirs.named_parameters()
    }
    wanted = convert.from_hf(hf.tensors_of(theirs) | gradients, ours)[0]["params"]
    ours = ours.clone(image=ours.image.clone(bn_mode="global"))
    keys = dual_encoder.example_keys(0, 0, batch["index"]) if train else None

    def loss(params):
        z_image, z_text, temperature, *_ = dual_encoder.apply_towers(
            ours, variables | {"params": params}, batch, train=train, keys=keys
        )
        return losses.dense_loss(z_image, z_text, temperature, label_smoothing=0.1)[0] / 2

    value, found = jax.jit(jax.value_and_grad(loss))(variables["params"])
    assert float(value) == pytest.approx(outputs.loss.item(), rel=1e-5)
    # Some are zero in exact arithmetic (the bias of attention keys, biases before a batch
    # normalisation): there both sides have rounding only, of the size of the largest gradient's.
    largest = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(wanted))
    noise = 4 * np.finfo(np.float32).eps * largest
    for (leaf_name, want), leaf in zip(
        trees.named_leaves(wanted), jax.tree.leaves(found), strict=True
    ):
        error = np.linalg.norm(leaf - want)
        assert error <= 1e-4 * np.linalg.norm(want) + noise, leaf_name
