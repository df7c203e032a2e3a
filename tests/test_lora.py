"""LoRA: what learns and what does not, gradients, meshes, resume, and adapters in PEFT's format."""

import contextlib
import functools
import json
import re
import shutil
from unittest import mock

import jax
import numpy as np
import optax
import pytest
import torch
from helpers import CONFIG, assert_same_bytes, error_of, make_pairs, read_checkpoint
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AlignModel

import align_jax
from align_jax import align, config, config_checks, losses, mesh, train, train_step, trees
from align_jax.cli import main as cli
from align_jax.data import images, tokenizer
from align_jax.hf import adapter, convert, processor
from align_jax.hf import weights as weights_file
from align_jax.models import dual_encoder, efficientnet, init, layers, lora

KERNELS = (r"/(query|feed_forward_out)/kernel$", r"/block\d+/(expand|project)/kernel$", "^text_pro")
BATCH, SIZE, LENGTH, VOCAB = 16, 32, 8, 60


make_model, make_mesh = dual_encoder.make_model, mesh.make_mesh


def small_model(*args, **kwargs):
    """As `dual_encoder.make_model`, with the first two stages of the trunk alone."""
    model = make_model(*args, **kwargs)
    trunk = model.image.clone(stages=model.image.stages[:2])
    sizes = trunk.stages, trunk.width, trunk.depth, trunk.depth_divisor
    width = efficientnet.scale_stages(*sizes)[-1].out_channels
    return model.clone(image=trunk, image_width=width)


@pytest.fixture(scope="module", autouse=True)
def quick():
    one_device = make_mesh(1, 1, devices=jax.devices()[:1])
    # The depthwise convolution of CPUs has a product for each pixel of a kernel: slow to trace.
    with (
        mock.patch.object(layers, "depthwise_conv", layers.native_depthwise_conv),
        mock.patch.object(dual_encoder, "make_model", small_model),
        mock.patch.object(mesh, "make_mesh", lambda *args, **kwargs: one_device),
    ):
        yield


@pytest.fixture(scope="module")
def base(tiny_hf):
    return align.load(tiny_hf[0], batch_size=8)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 33, 33, 3), np.uint8)
    return pixels, ["a photo of a cat", "two red squares", "dog on a mat", "circles", "a a a"]


def adapted(base, *, zero=False, rank=3, kernels=KERNELS):
    """The base with a random adapter; with `zero` as it starts: B is 0."""
    lora_ = lora.Lora(rank, 5.0, kernels)
    variables = jax.device_get(base.variables)
    rng = np.random.default_rng(1)

    def draw(name, leaf):
        if name.endswith("/a") or zero:
            return init.draw(name, leaf.shape, seed=3)
        return rng.normal(0, 0.2, leaf.shape).astype(np.float32)

    shapes = lora.with_shapes(lora_, variables["params"])
    factors = trees.map_named(draw, {"params": {"lora": shapes["lora"]}})["params"]["lora"]
    variables = variables | {"params": variables["params"] | {"lora": factors}}
    m = mesh.make_mesh()
    return align.Align(
        base.model.clone(lora=lora_),
        jax.device_put(variables, mesh.infer_shardings(variables, m)),
        base.tokenizer,
        base.preprocessing,
        m,
        batch_size=8,
        origin=base.origin,
    )


def embeddings(model, inputs):
    return model.encode_image(inputs[0]), model.encode_text(inputs[1])


def assert_close(found, expected, limit):
    for z, wanted in zip(found, expected, strict=True):
        assert np.abs(z - wanted).max() <= limit


def assert_differ(found, expected):
    for z, other in zip(found, expected, strict=True):
        assert np.abs(z - other).max() > 1e-2


def test_zero_initialised_adapter_gives_bitwise_what_the_base_does(base, inputs):
    start = adapted(base, zero=True)
    assert len(lora.factors_of(start.variables["params"])) == 12
    for z, wanted in zip(embeddings(start, inputs), embeddings(base, inputs), strict=True):
        assert z.tobytes() == wanted.tobytes()


def test_a_starts_uniform_up_to_the_root_of_the_inputs_and_b_at_zero():
    a = init.draw("params/lora/image/stage1/block0/project/a", (64, 500), seed=1)
    assert 0.99 / 8 < np.abs(a).max() <= 1 / 8
    np.testing.assert_allclose(a.std(), 1 / 8 / np.sqrt(3), rtol=0.02)
    assert not init.draw("params/lora/image/stage1/block0/project/b", (4, 5), seed=1).any()


# Training.


def lora_config(**changes):
    c = config.default_config()
    c.model.image.variant, c.model.text.variant, c.model.embed_dim = "pico", "tiny", 64
    c.model.dtype, c.model.bn_mode = "float32", "frozen"
    c.model.image.drop_path_rate = c.model.text.dropout_rate = 0.0  # quick to compile
    c.optim.name, c.optim.learning_rate, c.optim.warmup_steps = "adamw", 1e-2, 0
    c.optim.temperature = "fixed"
    c.loss.temperature_init = 0.1
    c.data.source, c.init_from = "pairs", "base"
    c.lora.rank, c.lora.alpha = 2, 3.0
    c.lora.kernels = KERNELS
    c.train.batch_size, c.train.steps = BATCH, 10
    c.update_from_flattened_dict(changes)
    return c


def make_batches(count):
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8),
            "ids": rng.integers(5, VOCAB, (BATCH, LENGTH)).astype(np.int32),
            "mask": (np.arange(LENGTH) < rng.integers(3, LENGTH, (BATCH, 1))).astype(np.int32),
            "index": rng.permutation(1000)[:BATCH].astype(np.int32),
        }
        for _ in range(count)
    ]


@functools.cache
def run(data, fsdp, microbatches=1, steps=3):
    """(first state, last state, losses) on the host."""
    m = make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
    with mock.patch.object(mesh, "FSDP_MIN_ELEMENTS", 256):  # so that A and B are split too
        model, optimizer, abstract, step_fn = train.make_program(
            lora_config(**{"train.microbatches": microbatches}), m, vocab_size=VOCAB
        )
    state = train_step.init_state(model, optimizer, abstract, seed=0)
    if fsdp > 1:
        a = state.params["lora"]["text"]["encoder"]["layer0"]["feed_forward_out"]["a"]
        assert a.sharding.shard_shape(a.shape) != a.shape
    first, history = jax.device_get(state), []
    for batch in make_batches(steps):
        state, metrics = step_fn(state, mesh.put_batch(batch, mesh.batch_sharding(m)))
        history.append(float(metrics["loss"]))
    return first, jax.device_get(state), history


def test_only_a_and_b_change_and_only_they_have_optimizer_state():
    first, last, _ = run(1, 1)
    for collection in ("params", "batch_stats"):
        before = trees.named_leaves(getattr(first, collection))
        after = dict(trees.named_leaves(getattr(last, collection)))
        for name, value in before:
            assert (value.tobytes() != after[name].tobytes()) == name.startswith("lora/"), name
    count = trees.count(first.params["lora"])
    assert count == sum(
        2 * (leaf.shape[0] + leaf.shape[1])
        for leaf in lora.matches(lora.make_lora(lora_config().lora), first.params).values()
    )
    moments = [leaf for leaf in jax.tree.leaves(last.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * count


def test_a_mesh_and_microbatches_give_the_numbers_of_one_device_and_one_pass():
    _, expected, expected_losses = run(1, 1)
    _, found, found_losses = run(4, 2, microbatches=2)
    np.testing.assert_allclose(found_losses, expected_losses, rtol=1e-5)
    for (name, value), wanted in zip(
        trees.named_leaves(found.params), jax.tree.leaves(expected.params), strict=True
    ):
        assert np.linalg.norm(value - wanted) <= 1e-4 * np.linalg.norm(wanted), name


def test_gradient_is_that_of_the_dense_kernels_through_the_product():
    c, m = lora_config(), mesh.make_mesh()
    rate = optax.sgd(1.0)  # a step is the gradient
    model = dual_encoder.make_model(c.model, c.loss, vocab_size=VOCAB, lora=c.lora)
    first = jax.device_get(run(1, 1)[1])  # B is not zero any more
    batch, loss_fn = make_batches(1)[0], losses.make_loss(c.loss, m)
    step_fn = train_step.make_train_step(model, rate, lambda step: 1.0, loss_fn, m, c.train)
    first = train_step.state.TrainState(
        first.step, first.params, first.batch_stats, rate.init(first.params["lora"])
    )
    after, _ = jax.jit(step_fn)(first, batch)

    dense = dual_encoder.make_model(c.model, c.loss, vocab_size=VOCAB)
    factors = lora.factors_of(first.params)
    assert len(factors) == 8
    scale = 3.0 / 2

    def merged(name, leaf):
        pair = factors.get(name.removesuffix("/kernel"))
        if pair is None:
            return leaf
        product = pair["a"].astype(np.float64) @ pair["b"].astype(np.float64)
        return (leaf + scale * product).astype(np.float32)

    kernels = trees.map_named(merged, lora.base_of(first.params))

    def loss_of(params):
        keys = dual_encoder.example_keys(c.train.seed, first.step, batch["index"])
        variables = {"params": params, "batch_stats": first.batch_stats}
        z_image, z_text, *_ = dual_encoder.apply_towers(
            dense, variables, batch, train=True, keys=keys
        )
        return loss_fn(z_image, z_text, params, batch, keys)[0]

    gradients = dict(trees.named_leaves(jax.jit(jax.grad(loss_of))(kernels)))
    moved = lora.factors_of(jax.device_get(after).params)
    for layer, pair in factors.items():
        dense_gradient = np.float64(gradients[f"{layer}/kernel"])
        for factor, wanted in (
            ("a", scale * dense_gradient @ pair["b"].T),
            ("b", scale * pair["a"].T @ dense_gradient),
        ):
            found = pair[factor] - moved[layer][factor]
            assert np.linalg.norm(found - wanted) <= 1e-3 * np.linalg.norm(wanted), (layer, factor)


# Runs of the command line.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with `hf`, a base, and `run`, four steps of an adapter to it."""
    folder = tmp_path_factory.mktemp("lora")
    make_pairs(folder, count=16)
    config = CONFIG.replace("embed_dim = 32", "embed_dim = 8").replace("femto", "pico")
    (folder / "config.py").write_text(config)
    tokens = tokenizer.train_wordpiece(["a red square and a green one", "thing in blue"] * 4, 200)
    c = lora_config(**{"model.embed_dim": 8, "model.text.max_positions": 512})
    model = dual_encoder.make_model(c.model, c.loss, vocab_size=tokens.vocab_size)
    p = processor.Preprocessing(32, 40, "pil", 12, tokens.vocab_size, tokens.fingerprint())
    m = mesh.make_mesh()
    shardings = mesh.infer_shardings(dual_encoder.abstract_variables(model), m)
    for seed, name in ((5, "hf"), (6, "other")):
        variables = dual_encoder.init_variables(model, seed=seed, shardings=shardings)
        align.Align(model, variables, tokens, p, m, batch_size=8).save(folder / name)
    with contextlib.chdir(folder):
        assert cli.main([*ADAPT, "--workdir", "run"]) == 0
    return folder


ADAPT = (
    "train",
    "--config=config.py:plain",
    "--config.data.source=captions.jsonl?images=images",
    "--config.data.tokenizer=",
    "--config.init_from=hf",
    "--config.optim.warmup_steps=0",
    "--config.model.text.dropout_rate=0",
    "--config.model.image.drop_path_rate=0",
    "--config.lora.kernels=('/(query|project)/kernel$',)",
    "--config.lora.rank=2",
    "--config.model.bn_mode=frozen",
    "--config.optim.temperature=fixed",
    "--config.optim.learning_rate=0.03",
    "--config.train.steps=4",
    "--config.checkpoint.every_steps=2",
)


def test_interrupted_run_continues_bitwise(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(finished)
    shutil.copytree("run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    assert cli.main([*ADAPT, "--workdir", str(tmp_path / "again")]) == 0
    expected = read_checkpoint("run", 4)
    assert_same_bytes(read_checkpoint(tmp_path / "again", 4), expected)
    assert any("/lora/" in name for name in expected)


def test_adapter_of_a_run_on_its_base_equals_the_run_and_the_merged_model(
    finished, inputs, monkeypatch, capfd
):
    monkeypatch.chdir(finished)
    assert cli.main(["convert", "run", "adapter", "--to", "peft"]) == 0
    assert cli.main(["convert", "hf", "merged", "--adapter", "adapter"]) == 0
    trained, loaded = align.load("run"), align_jax.load("hf", adapter="adapter")
    merged = align.load("merged")
    expected = embeddings(trained, inputs)
    assert_close(embeddings(loaded, inputs), expected, 1e-6)
    assert_close(embeddings(merged, inputs), expected, 1e-6)
    assert np.abs(embeddings(align.load("hf"), inputs)[1] - expected[1]).max() > 1e-3
    assert trained.fingerprint() == loaded.fingerprint() == merged.fingerprint()
    assert loaded.temperature == trained.temperature == align.load("hf").temperature
    described = json.loads((finished / "adapter" / adapter.CONFIG).read_text())
    assert described["base_model_name_or_path"] == "hf"


def test_a_later_run_starts_from_the_merged_weights(finished, monkeypatch):
    monkeypatch.chdir(finished)
    trained = align.load("run")
    plain = trained.model.clone(lora=None)
    fresh = jax.tree.map(
        lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype)),
        dual_encoder.abstract_variables(plain),
    )
    found = train.init_from.start_from("run", "both", plain, fresh)
    wanted = dual_encoder.merge_lora(trained.model, jax.device_get(trained.variables))
    for (name, value), other in zip(
        trees.named_leaves(found), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_array_equal(value, other, err_msg=name)


def test_adapter_of_another_base_is_one_line_with_both_fingerprints(finished, monkeypatch, capfd):
    monkeypatch.chdir(finished)
    assert cli.main(["convert", "run", "adapter2", "--to", "peft"]) == 0
    error = error_of(capfd, "convert", "other", "out", "--adapter", "adapter2")
    assert re.fullmatch(
        r"adapter2 adapts hf, whose weights have the fingerprint [0-9a-f]{16}; those of the given "
        r"model have [0-9a-f]{16}\.",
        error,
    )


def test_model_without_an_adapter_has_none_to_save(finished, monkeypatch, capfd):
    monkeypatch.chdir(finished)
    error = error_of(capfd, "convert", "hf", "out", "--to", "peft")
    assert error == "the model has no adapter: it was trained with config.lora.rank=0."


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lora.rank": -1}, "config.lora.rank=-1 must be finite and not negative."),
        ({"lora.alpha": 0.0}, "config.lora.alpha=0.0 must be positive and finite."),
        ({"lora.kernels": ("(",)}, "config.lora.kernels holds '(', no regular expression"),
        ({"lora.kernels": ()}, "config.lora.kernels=() names no kernel"),
        (
            {"lora.kernels": ("query", "q_proj")},
            "config.lora.kernels: 'q_proj' is in the name of none of the",
        ),
        ({"lora.kernels": ("stem_conv",)}, "config.lora.kernels: 'stem_conv' is in the name of no"),
        ({"init_from": ""}, "config.lora.rank=2 adapts a trained model; name it by config.init_f"),
        ({"init_towers": "text"}, "with config.init_towers='both'"),
        ({"model.bn_mode": "grouped"}, "set config.model.bn_mode='frozen'"),
        ({"optim.temperature": "log"}, "config.optim.temperature='fixed'"),
        ({"optim.name": "lamb"}, "use 'adamw' or 'lion'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_compiles(changes, expected):
    c = lora_config()
    config_checks.validate(c, num_devices=8)
    c.update_from_flattened_dict(changes)
    with pytest.raises(ValueError) as error:
        config_checks.validate(c, num_devices=8)
    assert expected in str(error.value) and "\n" not in str(error.value)


# PEFT's format.


def torch_embeddings(model, base, inputs):
    p = base.preprocessing
    sizes = {"resize_px": p.resize_size, "crop_px": p.image_size, "method": p.resize}
    views = [images.eval_view(image, **sizes) for image in inputs[0]]
    pixels = torch.tensor(np.stack(views).astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    ids, mask = base.tokenizer.encode(inputs[1], p.max_tokens)
    model = model.eval()
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(np.asarray(ids), dtype=torch.long),
            attention_mask=torch.tensor(np.asarray(mask), dtype=torch.long),
            pixel_values=pixels,
        )
    return out.image_embeds.numpy(), out.text_embeds.numpy()


def test_peft_loads_our_adapter_and_gives_the_same_embeddings(base, inputs, tiny_hf, tmp_path):
    ours = adapted(base)
    expected = embeddings(ours, inputs)
    assert_differ(expected, embeddings(base, inputs))
    ours.save_adapter(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(AlignModel.from_pretrained(tiny_hf[0]), tmp_path / "adapter")
    assert_close(torch_embeddings(theirs, base, inputs), expected, 1e-5)


PEFT_SETTINGS = {
    "plain": {},
    "other scales": {
        "use_rslora": True,
        "rank_pattern": {"query": 2, r"layer\.1.*value": 6},
        "alpha_pattern": {"expand_conv": 2, "query": 32},
    },
}


@pytest.mark.parametrize("settings", PEFT_SETTINGS.values(), ids=PEFT_SETTINGS)
def test_adapter_that_peft_wrote_gives_peft_s_embeddings(base, inputs, tiny_hf, tmp_path, settings):
    target = r".*(query|value|expand_conv|project_conv|squeeze_excite\.reduce|text_projection)"
    torch.manual_seed(0)
    theirs = get_peft_model(
        AlignModel.from_pretrained(tiny_hf[0]),
        LoraConfig(r=4, lora_alpha=8, target_modules=target, init_lora_weights=False, **settings),
    )
    theirs.save_pretrained(tmp_path)
    loaded = align_jax.load(tiny_hf[0], adapter=tmp_path)
    found = embeddings(loaded, inputs)
    assert_differ(found, embeddings(base, inputs))
    assert_close(found, torch_embeddings(theirs, base, inputs), 1e-5)


@pytest.fixture
def saved(base, tmp_path):
    adapted(base).save_adapter(tmp_path)
    return tmp_path


def edit(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not read; only 'LORA' is."),
        ({"use_dora": True}, "use_dora=True is not read; only False is."),
        ({"bias": "all"}, "bias='all' is not read; only 'none' is."),
        ({"modules_to_save": ["classifier"]}, "modules_to_save=['classifier'] is not read"),
        ({"r": 0}, "r=0 must be a positive number."),
        ({"lora_alpha": None}, "lora_alpha=None must be a positive number."),
    ],
)
def test_settings_that_mean_something_else_are_refused(saved, tiny_hf, changes, expected):
    edit(saved / adapter.CONFIG, **changes)
    with pytest.raises(ValueError) as error:
        align.load(tiny_hf[0], adapter=saved)
    assert expected in str(error.value) and str(saved / adapter.CONFIG) in str(error.value)


QUERY = "base_model.model.text_model.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(f"{QUERY}.lora_B.weight"), "A and B of text_model.encoder.layer.0.atten"),
        (lambda t: t.update({f"{QUERY}.lora_magnitude_vector": np.ones(3, "f")}), "adapts no den"),
        (lambda t: t.update({f"{QUERY}.lora_A.weight": np.ones((3, 9), "f")}), "32 inputs."),
        (lambda t: t.update({f"{QUERY}.lora_A.weight": np.ones(32, "f")}), "is no matrix."),
        (lambda t: t.clear(), "holds no tensor."),
    ],
)
def test_damaged_tensors_are_refused(saved, tiny_hf, change, expected):
    file = saved / adapter.WEIGHTS
    tensors = weights_file.read_tensors(file)
    change(tensors)
    weights_file.write_safetensors(file, tensors)
    with pytest.raises(ValueError, match=re.escape(expected)):
        align.load(tiny_hf[0], adapter=saved)


def test_folder_that_is_no_adapter_is_named(tiny_hf, tmp_path):
    with pytest.raises(ValueError, match="is no adapter in PEFT's format: it has no adapter_conf"):
        align.load(tiny_hf[0], adapter=tmp_path / "nowhere")


def test_kernel_without_a_place_in_the_format_is_named():
    c = lora_config(**{"lora.kernels": ("image_projection",)})
    model = dual_encoder.make_model(c.model, c.loss, vocab_size=VOCAB, lora=c.lora)
    m = mesh.make_mesh()
    shardings = mesh.infer_shardings(dual_encoder.abstract_variables(model), m)
    variables = dual_encoder.init_variables(model, seed=0, shardings=shardings)
    with pytest.raises(ValueError, match="an adapter of image_projection cannot be saved"):
        adapter.write_adapter("nowhere", model, jax.device_get(variables), base="")


def test_fingerprint_of_a_base_is_that_of_its_hugging_face_folder(base):
    model, variables = base.model, jax.device_get(base.variables)
    again, _ = convert.from_hf(convert.to_hf(variables, model), model)
    assert adapter.base_fingerprint(model, again) == adapter.base_fingerprint(model, variables)
