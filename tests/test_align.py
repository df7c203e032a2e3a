"""align.py: the public API against transformers on a tiny random model, and its promises."""

import importlib.util
import io
import itertools
import json
import logging
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
import torch
from helpers import environment
from huggingface_hub.errors import LocalEntryNotFoundError
from jax.sharding import Mesh
from PIL import Image
from tiny_hf import CAPTIONS, IMAGE_SIZE, RESIZE_SIZE
from transformers import AlignModel, AlignProcessor, pipeline

import align_jax
from align_jax import align, encode
from align_jax.hf import hub

TEXTS = (*CAPTIONS[:3], "a dog " * 40, "", "two cats on a mat and one red square", "dog")


@pytest.fixture(scope="module")
def model(tiny_hf):
    return align_jax.load(tiny_hf[0], batch_size=32)


@pytest.fixture(scope="module")
def pictures():
    """41 uint8 images of all kinds of sizes, with some structure."""
    rng = np.random.default_rng(0)
    found = []
    for index in range(41):
        height, width = rng.integers(20, 90, 2)
        image = np.zeros((height, width, 3), np.uint8) + rng.integers(0, 255, 3, np.uint8)
        image[index % 9 :: 5, :: 1 + index % 4] = rng.integers(0, 255, 3, np.uint8)
        found.append(image)
    return found


@pytest.fixture(scope="module")
def theirs(tiny_hf, pictures):
    """transformers' outputs for the first 7 pictures and all TEXTS, padded to 64 tokens."""
    folder, torch_model = tiny_hf
    batch = AlignProcessor.from_pretrained(folder)(
        text=list(TEXTS),
        images=[Image.fromarray(picture) for picture in pictures[:7]],
        truncation=True,
        return_tensors="pt",
    )
    assert batch["input_ids"].shape == (len(TEXTS), 64)
    with torch.no_grad():
        return torch_model(**batch)


def png(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def test_embeddings_and_logits_equal_those_of_transformers(model, pictures, theirs):
    z_image, z_text = model.encode_image(pictures[:7]), model.encode_text(TEXTS)
    assert z_image.dtype == z_text.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(z_image, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(z_image, theirs.image_embeds, atol=1e-5)
    # Ours are padded to 8 to 64 tokens, theirs to 64.
    np.testing.assert_allclose(z_text, theirs.text_embeds, atol=1e-5)
    logits = model.similarity(z_image, z_text)
    # The temperature of 0.05 magnifies 1e-5 of the cosine.
    np.testing.assert_allclose(logits, theirs.logits_per_image, atol=2e-4)


def test_texts_are_padded_to_few_lengths_of_at_most_a_third_padding():
    assert encode.text_lengths(64) == [8, 12, 16, 24, 32, 48, 64]
    assert encode.text_lengths(20) == [8, 12, 16, 20] and encode.text_lengths(6) == [6]
    for longest in range(1, 65):
        mask = np.stack([np.arange(64) < 1, np.arange(64) < longest]).astype(np.int32)
        ids, cut = encode.trim(np.arange(128, dtype=np.int32).reshape(2, 64), mask)
        assert ids.shape[1] == cut.shape[1] in encode.text_lengths(64)
        assert longest <= ids.shape[1] <= max(8, 1.5 * longest)
        np.testing.assert_array_equal(ids, np.arange(128).reshape(2, 64)[:, : ids.shape[1]])


def test_image_list_times_caption_list_gives_one_cosine_a_pair(model, pictures, theirs):
    cosines = model.encode_image(pictures[:7]) @ model.encode_text(TEXTS).T
    assert cosines.shape == (7, len(TEXTS))
    wanted = torch.nn.functional.cosine_similarity(
        theirs.image_embeds[:, None], theirs.text_embeds[None], dim=-1
    )
    np.testing.assert_allclose(cosines, wanted, atol=1e-5)
    assert np.ptp(cosines) > 0.1  # else the comparison says nothing


def test_candidate_labels_give_the_probabilities_of_the_hugging_face_pipeline(
    model, tiny_hf, pictures
):
    folder, torch_model = tiny_hf
    processor = AlignProcessor.from_pretrained(folder)
    classifier = pipeline(
        "zero-shot-image-classification",
        model=torch_model,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )
    labels = ["cat", "red square", "dog on a mat"]
    answers = classifier(
        [Image.fromarray(picture) for picture in pictures[:3]],
        candidate_labels=labels,
        hypothesis_template="This is a photo of {}.",
    )
    wanted = [[{a["label"]: a["score"] for a in row}[label] for label in labels] for row in answers]
    ours = model.classify(pictures[:3], labels, templates=("This is a photo of {}.",))
    np.testing.assert_allclose(ours, wanted, atol=1e-4)
    np.testing.assert_allclose(ours.sum(axis=1), 1, atol=1e-6)
    assert np.ptp(ours, axis=0).max() > 0.01


def test_several_templates_are_averaged_before_the_softmax(model, pictures):
    labels, templates = ["cat", "dog"], ["{}", "a photo of a {}"]
    z = model.encode_text([t.replace("{}", label) for label in labels for t in templates])
    z = z.reshape(2, 2, -1).mean(axis=1)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    logits = model.encode_image(pictures[:4]) @ z.T / model.temperature
    wanted = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(model.classify(pictures[:4], labels, templates), wanted, atol=1e-5)


def test_paths_bytes_pictures_functions_and_generators_give_the_same_rows(
    model, pictures, tmp_path
):
    wanted = model.encode_image(pictures[:5])
    paths = [tmp_path / f"{index}.png" for index in range(5)]
    for path, picture in zip(paths, pictures, strict=False):
        path.write_bytes(png(picture))
    for images in (
        paths,
        map(str, paths),
        (png(picture) for picture in pictures[:5]),
        [Image.fromarray(picture) for picture in pictures[:5]],
        [lambda path=path: path.read_bytes() for path in paths],
    ):
        np.testing.assert_array_equal(model.encode_image(images), wanted)
    alike = np.stack([pictures[0]] * 3)
    np.testing.assert_allclose(model.encode_image(alike), wanted[[0, 0, 0]], atol=1e-6)


def test_inputs_of_any_number_keep_their_order_and_compile_few_shapes(model, pictures):
    wanted = model.encode_image(pictures)
    texts = [f"{'a cat ' * (n * 7 % 40)}{n}" for n in range(1, 101)]
    wanted_text = np.concatenate([model.encode_text([text]) for text in texts])
    for count in (1, 2, 7, 8, 9, 31, 33, 40):
        np.testing.assert_allclose(
            model.encode_image(iter(pictures[:count])), wanted[:count], atol=1e-5
        )
    for count in (1, 7, 33, 100):
        np.testing.assert_allclose(
            model.encode_text(iter(texts[:count])), wanted_text[:count], atol=1e-5
        )
    # 8 devices, at most 32 rows: 8, 16 or 32 of them; texts also of 16, 32, 48 or 64 tokens.
    assert model._embed_image._cache_size() <= 3
    assert model._embed_text._cache_size() <= 3 * 4


def test_windows_of_texts_keep_their_order(model, monkeypatch):
    monkeypatch.setattr("align_jax.encode._BATCHES_PER_WINDOW", 1)
    texts = [f"{'a cat ' * (n * 7 % 20)}{n}" for n in range(70)]
    z = model.encode_text(texts)
    for row in (0, 31, 32, 63, 64, 69):
        np.testing.assert_allclose(z[row], model.encode_text([texts[row]])[0], atol=1e-5)


def test_one_device_gives_the_numbers_of_eight(model, tiny_hf, pictures, monkeypatch):
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    monkeypatch.setattr(align.mesh_lib, "make_mesh", lambda: mesh)
    one = align_jax.load(tiny_hf[0], batch_size=5)
    assert jax.device_count() == 8
    np.testing.assert_allclose(
        one.encode_image(pictures[:7]), model.encode_image(pictures[:7]), atol=1e-6
    )
    np.testing.assert_allclose(one.encode_text(TEXTS), model.encode_text(TEXTS), atol=1e-6)


def test_bad_image_is_named(model, pictures, tmp_path):
    path = tmp_path / "page.jpg"
    path.write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"page\.jpg: Not an image of a known format"):
        model.encode_image([pictures[0], path])
    with pytest.raises(ValueError, match="image 1: The file is empty"):
        model.encode_image([pictures[0], b""])
    with pytest.raises(FileNotFoundError, match="nowhere.jpg"):
        model.encode_image([pictures[0], "nowhere.jpg"])


def test_skipped_images_are_logged_and_have_rows_of_nan(model, pictures, tmp_path, caplog):
    path = tmp_path / "page.jpg"
    path.write_text("<html>404</html>")
    images = [*pictures[:3], path, "nowhere.jpg", *pictures[3:40], b"GIF8"]
    with caplog.at_level(logging.WARNING):
        z = model.encode_image(images, on_error="skip")
    bad = [3, 4, 42]
    assert np.flatnonzero(np.isnan(z).any(axis=1)).tolist() == bad
    assert np.isnan(z[bad]).all()
    np.testing.assert_allclose(
        np.delete(z, bad, axis=0), model.encode_image(pictures[:40]), atol=1e-5
    )
    assert len(caplog.messages) == 3
    for message, name in zip(caplog.messages, (str(path), "nowhere.jpg", "image 42"), strict=True):
        assert message.startswith("left out: ") and name in message
    assert np.isnan(model.encode_image([path], on_error="skip")).all()
    probabilities = model.classify([path, pictures[0]], ["cat", "dog"], on_error="skip")
    assert np.isnan(probabilities).tolist() == [[True, True], [False, False]]


def test_images_of_other_processes_rows_are_not_read(model, pictures):
    class OfTwoProcesses:  # devices 1 and 3 of 4 are this process's
        num_devices = 4

        def addressable_devices_indices_map(self, shape):
            part = shape[0] // 4
            return {d: (slice(d * part, (d + 1) * part),) for d in (1, 3)}

    read = []

    def reader(index):
        def image():
            read.append(index)
            return pictures[index]

        return image

    batches = encode.image_batches(
        map(reader, range(13)),
        model.preprocessing,
        sharding=OfTwoProcesses(),
        batch_size=8,
        on_error="raise",
    )
    (first,), _, _ = next(batches)
    (second,), rows, _ = next(batches)
    assert rows.tolist() == [8, 9, 10, 11, 12] and len(second) == 5
    # Of 8 rows, 2 a device; the last 5 are padded to 8, too.
    assert sorted(read) == [2, 3, 6, 7, 10, 11]
    assert [bool(row.any()) for row in first] == [False, False, True, True] * 2
    assert [bool(row.any()) for row in second] == [False, False, True, True, False]


def test_endless_generator_is_read_no_further_than_the_first_error(model, pictures):
    read = itertools.count()

    def images():
        for _ in itertools.cycle([0]):
            yield pictures[0] if next(read) < 100 else b""

    with pytest.raises(ValueError, match="image 100: The file is empty"):
        model.encode_image(images())
    assert next(read) < 300


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode_image("a.jpg"), "images is one str; put it in a list."),
        (lambda m: m.encode_image(b"GIF8"), "images is one bytes; put it in a list."),
        (lambda m: m.encode_image(Image.new("RGB", (9, 9))), "images is one Image; put it in a"),
        (lambda m: m.encode_image(np.zeros((9, 9, 3), np.uint8)), "images is one array [9, 9, 3]"),
        (lambda m: m.encode_image([]), "Nothing to encode: the input is empty."),
        (lambda m: m.encode_image([], on_error="drop"), "on_error='drop' is unknown; use 'raise'"),
        (lambda m: m.encode_text("a cat"), "texts is one str; put it in a list."),
        (lambda m: m.encode_text(iter(())), "Nothing to encode: the input is empty."),
        (lambda m: m.encode_text(["a", None]), "text 1 is a NoneType, no string."),
        (lambda m: m.classify([], "cat"), "labels is one str; put it in a list."),
        (lambda m: m.classify([], ["cat"], ("a cat",)), "Template 'a cat' has no {}"),
    ],
)
def test_wrong_argument_is_one_line(model, call, message):
    with pytest.raises(ValueError) as error:
        call(model)
    assert str(error.value).startswith(message)


def test_bfloat16_is_close_to_float32(model, tiny_hf, pictures):
    half = align_jax.load(tiny_hf[0], dtype="bfloat16", batch_size=8)
    for ours, wanted in (
        (half.encode_image(pictures[:8]), model.encode_image(pictures[:8])),
        (half.encode_text(TEXTS), model.encode_text(TEXTS)),
    ):
        assert ours.dtype == np.float32
        # bfloat16 keeps 8 bits: about 1 % of error a layer.
        assert 0.99 < (ours * wanted).sum(axis=1).min() < 1 - 1e-7
    assert half.fingerprint() != model.fingerprint()


def test_saved_model_gives_the_same_embeddings_here_and_in_torch(
    model, pictures, tiny_hf, theirs, tmp_path
):
    model.save(tmp_path)
    again = align_jax.load(tmp_path, batch_size=32)
    assert again.fingerprint() == model.fingerprint()
    np.testing.assert_array_equal(
        again.encode_image(pictures[:7]), model.encode_image(pictures[:7])
    )
    loaded, info = AlignModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = AlignProcessor.from_pretrained(tmp_path)(
        text=list(TEXTS),
        images=[Image.fromarray(picture) for picture in pictures[:7]],
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        outputs = loaded.eval()(**batch)
    state, expected = loaded.state_dict(), tiny_hf[1].state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    # torch adds up in an order that depends on where in memory its arrays lie.
    np.testing.assert_allclose(outputs.logits_per_image, theirs.logits_per_image, atol=1e-5)
    card = (tmp_path / "README.md").read_text()
    for fact in (
        f"resized to {RESIZE_SIZE} x {RESIZE_SIZE} px",
        f"central {IMAGE_SIZE} x {IMAGE_SIZE} px",
        f"| parameters | {sum(leaf.size for leaf in jax.tree.leaves(model.variables['params'])):,}",
        "| temperature | 0.05 ",
        "cut to 64 tokens",
    ):
        assert fact in card
    assert "## Training" not in card  # nothing is known of it


def test_save_refuses_a_file_and_a_folder_with_another_readme(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; name a folder."):
        model.save(tmp_path / "file")
    (tmp_path / "README.md").write_text("# My project\n")
    with pytest.raises(ValueError, match="holds a README.md of no model; name another folder."):
        model.save(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "README.md"}
    for _ in range(2):  # over a model, too
        model.save(tmp_path / "model")
    assert "# My project" not in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float16"}, "dtype='float16' is unknown; use 'float32' or 'bfloat16'."),
        ({"step": 3}, "is no workdir, so it has no step 3."),
        ({"batch_size": 0}, "batch_size=0 must be at least 1."),
    ],
)
def test_wrong_load_argument_is_one_line(tiny_hf, arguments, message):
    with pytest.raises(ValueError, match=message):
        align_jax.load(tiny_hf[0], **arguments)


def test_tokenizer_of_another_model_is_refused(tiny_hf, tmp_path):
    for file in tiny_hf[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["zebra"] = len(vocabulary)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="they do not belong together"):
        align_jax.load(tmp_path)


def test_hub_id_is_downloaded_without_the_weights_of_other_frameworks(
    tiny_hf, monkeypatch, tmp_path
):
    calls = []

    def snapshot_download(name, allow_patterns):
        calls.append((name, allow_patterns))
        return str(tiny_hf[0])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = align_jax.load("kakaobrain/align-base")
    assert model.origin == align.Origin("kakaobrain/align-base", path="kakaobrain/align-base")
    assert calls == [
        (
            "kakaobrain/align-base",
            ["*.json", "vocab.txt", "merges.txt", "*.model", "model*.safetensors"],
        )
    ]


def test_hub_id_without_safetensors_gets_the_pickled_weights(monkeypatch, tmp_path):
    def snapshot_download(name, allow_patterns):
        if "pytorch_model*.bin" in allow_patterns:
            (tmp_path / "pytorch_model.bin").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.find_folder("owner/name") == tmp_path


def test_hub_without_network_says_what_to_do(monkeypatch):
    def snapshot_download(name, allow_patterns):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError) as error:
        align_jax.load("kakaobrain/align-base")
    assert "\n" not in str(error.value)
    assert "run `hf download kakaobrain/align-base --local-dir DIR`" in str(error.value)


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "a/b/c", "no where/x"])
def test_missing_folder_is_not_looked_for_on_the_hub(monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(ValueError, match="does not exist; name a workdir of `align train`, "):
        align_jax.load(name)


def test_golden_check_passes_on_equal_and_fails_on_other_logits(
    model, tiny_hf, pictures, monkeypatch, tmp_path, capsys
):
    script = Path(__file__).parents[1] / "experiments" / "check_golden.py"
    spec = importlib.util.spec_from_file_location("check_golden", script)
    check_golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_golden)
    path = tmp_path / "cats.png"
    path.write_bytes(png(pictures[0]))
    monkeypatch.setattr(sys, "argv", ["check_golden", str(path), "--model", str(tiny_hf[0])])
    with pytest.raises(SystemExit) as exit_info:
        check_golden.main()
    assert exit_info.value.code == "differs from the published values"
    assert "a photo of a cat: " in capsys.readouterr().out
    logits = model.similarity(model.encode_image([path]), model.encode_text(check_golden.TEXTS))
    for error, code in ((5e-4, None), (0.2, "differs from the published values")):
        monkeypatch.setattr(check_golden, "LOGITS", tuple(logits[0] + error))
        with pytest.raises(SystemExit) as exit_info:
            check_golden.main()
        assert exit_info.value.code == code


def test_import_is_free_of_jax_and_torch():
    code = "import sys, align_jax; print({'jax', 'numpy', 'torch'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )
    assert done.stdout == "set()\n"


def test_library_loads_encodes_and_saves_without_torch_and_without_advice(tiny_hf, tmp_path):
    code = (
        "import sys; sys.modules.update(torch=None, torchvision=None); import align_jax; "
        "model = align_jax.load(sys.argv[1]); model.encode_text(['a cat']); "
        "model.save(sys.argv[2]); import logging; print(logging.getLogger('transformers').level)"
    )
    for file in tiny_hf[0].iterdir():  # through AutoTokenizer: changed since we wrote it
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"processor_class": "AlignProcessor"})
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(tmp_path / "saved")],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == (f"{logging.WARNING}\n", "")
    assert align_jax.load(tmp_path / "saved").tokenizer.vocab_size > 5
