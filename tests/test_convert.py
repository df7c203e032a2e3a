"""Hugging Face tensors and configs <-> ours: bit for bit, and what is refused."""

import json
import shutil

import hf_helpers as hf
import jax
import numpy as np
import pytest

from align_jax import config, trees
from align_jax.hf import config as hf_config
from align_jax.hf import convert
from align_jax.hf import weights as weights_file
from align_jax.models import dual_encoder

torch, transformers = hf.torch, hf.transformers
SMALL = "other-widths"


@pytest.fixture(scope="module")
def small():
    theirs = hf.torch_model(SMALL)
    return theirs, hf.tensors_of(theirs), hf_config.model_from_hf(theirs.config)


def our_model(**changes):
    base = config.default_config()
    c, base.loss.temperature_init = base.model, 0.3
    c.image.variant, c.text.variant, c.text.max_positions = "pico", "tiny", 16
    c.embed_dim, c.dtype = 80, "float32"
    c.update_from_flattened_dict(changes)
    return dual_encoder.make_model(c, base.loss, vocab_size=hf.VOCAB)


def random_variables(model, seed=0):
    rng = np.random.default_rng(seed)

    def draw(name, leaf):
        if name.endswith(("/var", "/scale", "temperature")):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if name.endswith("kernel") else 1
        return rng.normal(0, fan_in**-0.5, leaf.shape).astype(np.float32)

    return trees.map_named(draw, dual_encoder.abstract_variables(model))


def assert_same_tensors(found, wanted):
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert (found[key].shape, found[key].dtype) == (tensor.shape, tensor.dtype), key
        assert found[key].tobytes() == tensor.tobytes(), key


def write_folder(path, variables, model, extras=None, image_size=65):
    path.mkdir()
    tensors = convert.to_hf(variables, model, extras)
    weights_file.write_safetensors(path / "model.safetensors", tensors)
    hf_config.hf_from_model(model, image_size=image_size).save_pretrained(path)


def assert_transformers_gives_our_logits(folder, variables, model, batch):
    """Loads a folder in transformers, with nothing missing, and compares logits."""
    theirs, info = transformers.AlignModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        logits = theirs.eval()(**hf.torch_inputs(batch)).logits_per_image.numpy()

    def towers(variables):
        return dual_encoder.apply_towers(model, variables, batch, train=False)[:3]

    z_image, z_text, temperature = jax.jit(towers)(variables)
    # Embeddings agree to 1e-5 (test_hf_parity); the temperature of about 0.3 divides them.
    np.testing.assert_allclose(z_image @ z_text.T / temperature, logits, atol=1e-4)


@pytest.mark.parametrize("name", [*hf.CONFIGS, pytest.param("align-base", marks=pytest.mark.slow)])
def test_round_trip_of_all_tensors_is_bitwise_equal(name, tmp_path):
    theirs = hf.torch_model(name)
    theirs.save_pretrained(tmp_path)
    tensors = hf.tensors_of(theirs)
    read = convert.load_folder(tmp_path)
    assert_same_tensors(convert.to_hf(read.variables, read.model, read.extras), tensors)
    assert read.legacy_keys == ()
    for leaf_name, leaf in trees.named_leaves(read.variables):
        assert leaf.dtype == np.float32 and leaf.flags.c_contiguous, leaf_name
    if name == "align-base":
        assert len(tensors) == 1394
        assert trees.count(read.variables["params"]) == 172_117_841 - 590_592  # the pooler
        assert trees.count(read.variables["batch_stats"]) == 305_600


def test_pickled_checkpoint_equals_safetensors(small, tmp_path):
    theirs, tensors, model = small
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    read = convert.load_folder(tmp_path)
    assert_same_tensors(convert.to_hf(read.variables, model, read.extras), tensors)


def test_variables_do_not_depend_on_the_file_once_read(small, tmp_path):
    theirs, tensors, model = small
    theirs.save_pretrained(tmp_path)
    read = convert.load_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert_same_tensors(convert.to_hf(read.variables, model, read.extras), tensors)


def test_absent_extras_are_written_as_zeros_and_temperature_as_a_scalar(small):
    _, tensors, model = small
    variables, _ = convert.from_hf(tensors, model)
    written = convert.to_hf(variables, model)
    assert written.keys() == tensors.keys()
    assert written["temperature"].shape == ()
    for key, tensor in tensors.items():
        assert (written[key].shape, written[key].dtype) == (tensor.shape, tensor.dtype)
        if "pooler" in key or "num_batches" in key:
            assert not written[key].any()


def test_bias_of_the_sigmoid_loss_is_left_out():
    model = our_model()
    variables = random_variables(model)
    biased = {**variables, "params": variables["params"] | {"bias": np.float32(-10)}}
    assert_same_tensors(
        convert.to_hf(biased, model.clone(bias_init=-10.0)), convert.to_hf(variables, model)
    )


def test_legacy_keys_are_tolerated_named_and_not_written(small, tmp_path):
    theirs, tensors, _ = small
    theirs.save_pretrained(tmp_path)
    legacy = {
        "text_model.embeddings.position_ids": np.arange(17)[None],
        "text_model.embeddings.token_type_ids": np.zeros((1, 17), np.int64),
    }
    weights_file.write_safetensors(tmp_path / "model.safetensors", tensors | legacy)
    read = convert.load_folder(tmp_path)
    assert set(read.legacy_keys) == set(legacy)
    assert_same_tensors(convert.to_hf(read.variables, read.model, read.extras), tensors)


def test_every_misfit_is_listed_in_one_error(small):
    _, tensors, model = small
    wrong = dict(tensors)
    missing = [key for key in tensors if ".layer.1." in key]
    for key in missing:
        del wrong[key]
    wrong["vision_model.encoder.blocks.9.projection.project_conv.weight"] = np.zeros((1, 1, 1, 1))
    wrong["text_model.encoder.layer.0.output.dense.weight"] = np.zeros((48, 7), np.float32)
    wrong["temperature"] = np.ones(1, np.float32)
    with pytest.raises(ValueError) as caught:
        convert.from_hf(wrong, model)
    message = str(caught.value)
    for key in missing:
        assert key in message
    assert f"{len(missing)} missing" in message and "1 unexpected" in message
    assert "blocks.9.projection.project_conv.weight" in message
    assert "layer.0.output.dense.weight is (48, 7), the model expects (48, 100)" in message
    assert "temperature is (1,), the model expects ()" in message
    assert "\n" not in message


def test_sub_towers_load_from_full_and_from_sub_tower_checkpoints(small):
    theirs, tensors, model = small
    variables, _ = convert.from_hf(tensors, model)
    legacy = {"embeddings.position_ids": np.arange(17)[None]}
    for given in (tensors, hf.tensors_of(theirs.vision_model)):
        image = convert.image_from_hf(given, model)
        wanted = {name: tree["image"] for name, tree in variables.items()}
        jax.tree.map(np.testing.assert_array_equal, image, wanted)
    for given in (tensors, hf.tensors_of(theirs.text_model) | legacy):
        text = convert.text_from_bert(given, model)
        jax.tree.map(np.testing.assert_array_equal, text, variables["params"]["text"])
    with pytest.raises(ValueError, match="missing: vision_model.embeddings.batchnorm.bias, "):
        convert.image_from_hf(hf.tensors_of(theirs.text_model), model)
    with pytest.raises(ValueError, match="missing: text_model.embeddings.LayerNorm.bias, "):
        convert.text_from_bert({"a": np.zeros(2)}, model)


def test_sub_tower_loads_into_a_model_with_an_image_projection(small):
    _, tensors, model = small
    wider = model.clone(embed_dim=64)
    image = convert.image_from_hf(tensors, wider)
    assert trees.count(image) == trees.count(
        {name: tree["image"] for name, tree in dual_encoder.abstract_variables(model).items()}
    )
    with pytest.raises(ValueError, match="model.embed_dim=64 must be the width .*, 20"):
        convert.from_hf(tensors, wider)


@pytest.mark.parametrize("layout", ["bare", "prefixed", "old"])
def test_plain_bert_starts_the_text_tower_with_the_same_states(layout):
    torch.manual_seed(0)
    model = our_model()
    settings = transformers.BertConfig(
        vocab_size=hf.VOCAB,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        max_position_embeddings=16,
    )
    theirs = transformers.BertForPreTraining(settings).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    tensors = hf.tensors_of(theirs.bert if layout == "bare" else theirs)
    assert ("bert.embeddings.LayerNorm.weight" in tensors) == (layout != "bare")
    if layout == "old":
        tensors = {
            key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): value
            for key, value in tensors.items()
        } | {"bert.embeddings.position_ids": np.arange(16)[None]}
    params = convert.text_from_bert(tensors, model)
    batch = hf.make_batch(2, 65)
    found = jax.jit(model.text.apply)({"params": params}, batch["ids"], batch["mask"])
    inputs = hf.torch_inputs(batch)
    del inputs["pixel_values"]
    with torch.no_grad():
        wanted = theirs.bert(**inputs).last_hidden_state.numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    shorter = our_model(**{"text.max_positions": 8})
    with pytest.raises(ValueError, match=r"position_embeddings.weight is \(16, 128\).*\(8, 128\)"):
        convert.text_from_bert(tensors, shorter)


@pytest.mark.parametrize("name", hf.CONFIGS)
def test_config_round_trip_describes_the_same_model_to_transformers(tmp_path, name):
    wanted = hf.config_of(name)
    for theirs in (wanted.to_diff_dict(), wanted.to_dict()):
        content = json.loads(json.dumps(theirs))
        model = hf_config.model_from_hf(hf_config.parse_config(content))
        found = hf_config.hf_from_model(model, image_size=100, pad_token_id=3)
        found.save_pretrained(tmp_path)
        for part in ("text_config", "vision_config"):
            left, right = getattr(found, part).to_dict(), getattr(wanted, part).to_dict()
            different = {key for key in right if left.get(key) != right[key]}
            allowed = {"image_size", "hidden_dim", "dtype", "_name_or_path", "pad_token_id"}
            assert different <= allowed, different
        assert found.projection_dim == wanted.projection_dim
        assert found.temperature_init_value == wanted.temperature_init_value
        assert found.text_config.pad_token_id == 3
        again = hf_config.read_config(tmp_path)
        assert again.to_dict() == found.to_dict() and hf_config.model_from_hf(again) == model
        # All that matters is in the file: versions differ in what they assume.
        written = json.loads((tmp_path / "config.json").read_text())
        assert {"vocab_size", "layer_norm_eps", "hidden_act"} <= written["text_config"].keys()
        assert {"strides", "pooling_type", "hidden_dim"} <= written["vision_config"].keys()
        assert (written["model_type"], written["dtype"]) == ("align", "float32")


# What transformers 4 wrote into each part besides, as far as it could be in the way.
OLD_KEYS = {
    "_name_or_path": "",
    "bos_token_id": None,
    "chunk_size_feed_forward": 0,
    "diversity_penalty": 0.0,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "max_length": 20,
    "num_beams": 1,
    "pruned_heads": {},
    "return_dict": True,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_word_embeddings": True,
    "top_k": 50,
    "torch_dtype": None,
    "torchscript": False,
    "transformers_version": "4.27.0.dev0",
    "use_bfloat16": False,
}


def test_config_of_transformers_4_with_numbers_in_either_spelling_is_read():
    content = {
        "_commit_hash": None,
        "architectures": ["AlignModel"],
        "model_type": "align",
        "projection_dim": 640.0,
        "temperature_init_value": 1,
        "torch_dtype": "float32",
        "text_config": OLD_KEYS
        | {"position_embedding_type": "absolute", "use_cache": True, "vocab_size": 30522.0},
        "vision_config": OLD_KEYS
        | {"image_size": 289, "dropout_rate": 0.5, "num_hidden_layers": 64, "width_coefficient": 2},
    }
    model = hf_config.model_from_hf(hf_config.parse_config(content))
    assert model == hf_config.model_from_hf(hf.config_of("align-base"))
    assert type(model.temperature_init) is type(model.image.width) is float


def test_config_of_align_base_gives_its_geometry_and_published_values():
    written = hf_config.hf_from_model(
        hf_config.model_from_hf(hf.config_of("align-base")), image_size=289
    )
    assert written.vision_config.hidden_dim == written.projection_dim == 640
    assert written.vision_config.num_hidden_layers == 55
    assert written.vision_config.image_size == 289


@pytest.mark.parametrize(
    ("part", "changes", "problem"),
    [
        ("vision_config", {"strides": [1, 2]}, "differ in length"),
        ("vision_config", {"strides": [1, 2, 3]}, "vision_config.strides holds 3; only 1, 2"),
        ("vision_config", {"kernel_sizes": [3, 4, 3]}, "kernel_sizes holds 4; only odd"),
        (
            "vision_config",
            {"in_channels": [32, 24, 24]},
            r"in_channels\[1\] scales to 12 .* 8 come",
        ),
        ("vision_config", {"num_channels": 1}, "num_channels holds 1; only 3"),
        ("vision_config", {"pooling_type": "sum"}, "pooling_type holds 'sum'; only mean, max"),
        ("vision_config", {"hidden_act": "mish"}, "vision_config.hidden_act holds 'mish'; only"),
        ("vision_config", {"out_channels": [16, 24, 80]}, "projection_dim=20 must be .* 40"),
        ("vision_config", {"strides": 3}, "wrong type"),
        ("text_config", {"num_attention_heads": 5}, "hidden_size=48 is no multiple of"),
        ("text_config", {"position_embedding_type": "relative_key"}, "only absolute"),
        ("text_config", {"hidden_size": None}, "wrong type"),
        ("text_config", {"vocab_size": "many"}, "wrong type: .*'vocab_size' expected int, got str"),
        (None, {"text_config": 3}, "wrong type"),
        (None, {"temperature_init_value": None}, "wrong type"),
        (None, {"model_type": "clip"}, "model_type 'clip'; only 'align'"),
        (None, {"model_type": None}, "model_type None; only 'align'"),
    ],
)
def test_config_that_no_align_model_has_is_an_error_naming_the_key(part, changes, problem):
    settings = hf.config_of(SMALL).to_dict()
    (settings[part] if part else settings).update(changes)
    with pytest.raises(ValueError, match=problem) as caught:
        hf_config.model_from_hf(hf_config.parse_config(settings))
    assert "\n" not in str(caught.value)


def test_bad_folder_is_one_line_naming_the_file(small, tmp_path):
    theirs, _, _ = small
    folder = tmp_path / "model"

    def error():
        with pytest.raises(ValueError) as caught:
            convert.load_folder(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
        return str(caught.value)

    assert "has no config.json" in error()
    theirs.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    shutil.copy(folder / "model.safetensors", tmp_path / "weights")
    (folder / "model.safetensors").write_bytes(b"")
    assert "is empty" in error()
    shutil.copy(tmp_path / "weights", folder / "model.safetensors")
    (folder / "config.json").write_text("<html>")
    assert "config.json is not valid JSON" in error()
    (folder / "config.json").write_text("[1]")
    assert "config.json holds a list, not an object" in error()
    (folder / "config.json").write_text(json.dumps(settings | {"projection_dim": 24}))
    assert "projection_dim=24 must be" in error()
    settings["text_config"]["hidden_size"] = 60
    (folder / "config.json").write_text(json.dumps(settings))
    assert "does not fit the model" in error()


def test_folder_of_a_loaded_checkpoint_gives_the_same_logits_in_torch(small, tmp_path):
    _, tensors, model = small
    variables, extras = convert.from_hf(tensors, model)
    write_folder(tmp_path / "hf", variables, model, extras)
    batch = hf.make_batch(2, 65)
    assert_transformers_gives_our_logits(tmp_path / "hf", variables, model, batch)


@pytest.mark.parametrize("embed_dim", [80, 48])
def test_folder_of_our_own_model_gives_the_same_logits_in_torch(tmp_path, embed_dim):
    model = our_model(embed_dim=embed_dim)  # 48: through an image projection, folded
    variables = random_variables(model)
    assert ("image_projection" in variables["params"]) == (embed_dim != 80)
    last = variables["batch_stats"]["image"]["stage7"]["block0"]["project_bn"]
    last["var"] = last["var"] * 0.01  # so small that the eps beside it counts
    write_folder(tmp_path / "hf", variables, model)
    batch = hf.make_batch(2, 64)
    assert_transformers_gives_our_logits(tmp_path / "hf", variables, model, batch)
    read = convert.load_folder(tmp_path / "hf")
    assert trees.count(read.variables["params"]["text"]) == trees.count(variables["params"]["text"])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"image.variant": "b1"}, "last stage has residual blocks. .*model.embed_dim=320"),
        ({"embed_dim": 50}, "multiple of 8"),
        ({"padding": "same", "embed_dim": 80}, "model.padding='same' has no place"),
    ],
)
def test_model_that_the_format_cannot_hold_is_refused_with_the_reason(changes, problem):
    model = our_model(**({"embed_dim": 48} | changes))
    with pytest.raises(ValueError, match=problem):
        hf_config.hf_from_model(model, image_size=64)
    if "padding" not in changes:
        with pytest.raises(ValueError, match=problem):
            convert.to_hf({}, model)
    pooled = our_model(embed_dim=48)
    pooled = pooled.clone(image=pooled.image.clone(pooling="max"))
    with pytest.raises(ValueError, match="pooling is 'max'"):
        convert.to_hf({}, pooled)
