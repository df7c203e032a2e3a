"""hf/processor.py: what it reads and writes against transformers, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AlignProcessor, EfficientNetImageProcessorPil

from align_jax.data import images, tokenizer
from align_jax.hf import processor

# As published: kakaobrain/align-base, main branch, written by transformers 4.
ALIGN_BASE = {
    "crop_size": {"height": 289, "width": 289},
    "do_center_crop": True,
    "do_normalize": False,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "EfficientNetImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "include_top": False,
    "resample": 2,
    "rescale_factor": 0.00784313725490196,
    "rescale_offset": True,
    "size": {"height": 346, "width": 346},
}
CAPTIONS = ["a photo of a cat", "two dogs, one mat", "red squares and Öl"] * 2
SMALL = {"height": 40, "width": 40}


@pytest.fixture(scope="module")
def tokens():
    return tokenizer.train_wordpiece(CAPTIONS, 200)


def preprocessing(tokens, **changes):
    values = {
        "image_size": 33,
        "resize_size": 40,
        "resize": "pil",
        "max_tokens": 64,
        "vocab_size": tokens.vocab_size,
        "tokenizer_fingerprint": tokens.fingerprint(),
    }
    return processor.Preprocessing(**(values | changes))


def write_4x(folder, tokens, **changes):
    """The layout of transformers 4 before tokenizer.json: vocab.txt and a flat image processor."""
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens.tokens))
    options = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    config = {key: value for key, value in (ALIGN_BASE | changes).items() if value is not None}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_published_files_of_align_base_are_read(tmp_path, tokens):
    write_4x(tmp_path, tokens)
    read, found = processor.read_processor(tmp_path)
    assert found == preprocessing(tokens, image_size=289, resize_size=346)
    assert read.fingerprint() == tokens.fingerprint()


def test_folder_saved_by_transformers_5_is_read(tmp_path, tokens):
    processor.write_processor(tmp_path / "ours", tokens, preprocessing(tokens))
    AlignProcessor.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    files = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert "processor_config.json" in files
    assert not {"preprocessor_config.json", "vocab.txt"} & files
    read, found = processor.read_processor(tmp_path / "theirs")
    assert found == preprocessing(tokens)
    assert read.tokens == tokens.tokens


def test_written_folder_gives_transformers_the_same_ids_and_pixels(tmp_path, tokens):
    processor.write_processor(tmp_path, tokens, preprocessing(tokens))
    theirs = AlignProcessor.from_pretrained(tmp_path)
    texts = [*CAPTIONS, "", "unseen words", "A CAT " * 60]
    image = picture(90, 70)
    batch = theirs(text=texts, images=Image.fromarray(image), truncation=True, return_tensors="np")
    ids, mask = tokens.encode(texts, 64)
    np.testing.assert_array_equal(batch["input_ids"], ids)
    np.testing.assert_array_equal(batch["attention_mask"], mask)
    view = images.eval_view(image, resize_px=40, crop_px=33, method="pil")
    pixels = batch["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(view.astype(np.float32) / 127.5 - 1, pixels, atol=1e-6)


@pytest.mark.parametrize(
    ("height", "width", "resize_px", "crop_px"),
    [(480, 640, 346, 289), (289, 100, 346, 289), (65, 700, 64, 49), (50, 50, 50, 50)],
)
def test_pil_view_equals_the_hugging_face_processor(height, width, resize_px, crop_px):
    image = picture(height, width)
    theirs = EfficientNetImageProcessorPil(
        **(
            ALIGN_BASE
            | {"size": {"height": resize_px, "width": resize_px}}
            | {"crop_size": {"height": crop_px, "width": crop_px}}
        )
    )(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    view = images.eval_view(image, resize_px=resize_px, crop_px=crop_px, method="pil")
    ours = view.astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(ours, theirs.transpose(1, 2, 0), atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(480, 640), (100, 90), (346, 1000), (33, 700)])
def test_tf_view_equals_half_pixel_bilinear_without_antialias(height, width):
    image = picture(height, width)
    channels_first = torch.from_numpy(image.transpose(2, 0, 1)[None].astype(float))
    theirs = torch.nn.functional.interpolate(
        channels_first, (346, 346), mode="bilinear", align_corners=False, antialias=False
    )[0].numpy()
    view = images.eval_view(image, resize_px=346, crop_px=289, method="tf")
    # Half a grey level of rounding to uint8, and float32 sums and weights of ours.
    np.testing.assert_allclose(view, theirs.transpose(1, 2, 0)[28:317, 28:317], atol=0.501)


def test_long_text_is_cut_to_cls_62_pieces_sep(tmp_path, tokens):
    write_4x(tmp_path, tokens)
    read, found = processor.read_processor(tmp_path)
    ids, mask = read.encode(["cat " * 100], found.max_tokens)
    assert ids.shape == (1, 64) and mask.all()
    assert (ids[0, 0], ids[0, -1]) == (tokens.tokens.index("[CLS]"), tokens.tokens.index("[SEP]"))


@pytest.mark.parametrize(
    "changes",
    [
        {"rescale_factor": 1 / 255, "rescale_offset": False, "do_normalize": True},
        # What is not said is the class's own: 1 / 255, no offset, mean and deviation 0.5.
        dict.fromkeys(("rescale_factor", "rescale_offset", "image_mean", "image_std"))
        | {"do_normalize": True},
        {"rescale_factor": 1 / 127.5, "image_mean": [0.1, 0.2, 0.3]},  # unused: no do_normalize
        {"do_rescale": False, "do_normalize": True, "image_mean": 127.5, "image_std": 127.5},
        {"rescale_factor": 1 / 510, "rescale_offset": False, "include_top": True}
        | {"do_normalize": True, "image_mean": [0.25] * 3},
    ],
)
def test_other_words_for_the_same_scaling_are_accepted(tmp_path, tokens, changes):
    write_4x(tmp_path, tokens, **changes)
    assert processor.read_processor(tmp_path)[1].image_size == 289


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample": 3}, "resample is 3; only 2 (bilinear) can be done."),
        ({"resample": None}, "resample is None; only 2 "),  # its default differs by version
        ({"do_resize": False}, "do_resize is false; images of any size must be resized."),
        ({"size": {"shortest_edge": 346}}, 'size is {"shortest_edge": 346}; it must have equal '),
        ({"size": {"height": 346, "width": 340}}, "size is {"),
        ({"crop_size": {"height": 400, "width": 400}}, "crop_size 400 exceeds size 346."),
        ({"rescale_offset": False}, "grey levels 0 and 255 become 0 and 2 by rescale_factor, "),
        ({"rescale_factor": 1 / 255}, "grey levels 0 and 255 become -1 and 0 by "),
        ({"do_normalize": True}, "grey levels 0 and 255 become -3 and 1 by "),
        ({"include_top": True}, "grey levels 0 and 255 become -2 and 2 by "),
        ({"include_top": True, "image_std": [0, 1, 1]}, "it has another layout (ZeroDivision"),
        ({"image_processor_type": "CLIPImageProcessor"}, "the image processor is CLIPImage"),
        ({"align_jax_resize": "lanczos"}, "align_jax_resize is 'lanczos'; use 'pil' or 'tf'."),
        ({"size": []}, "it has another layout (AttributeError"),
    ],
)
def test_preparation_that_cannot_be_done_is_refused(tmp_path, tokens, changes, message):
    write_4x(tmp_path, tokens, **changes)
    with pytest.raises(ValueError) as error:
        processor.read_processor(tmp_path)
    prefix = f"{tmp_path / 'preprocessor_config.json'} cannot be used: "
    assert str(error.value).startswith(prefix + message)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("preprocessor_config.json", "<html>"),
        ("preprocessor_config.json", "[]"),
        ("processor_config.json", "{"),
        ("tokenizer_config.json", ""),
        ("tokenizer_config.json", '{"model_max_length": "long"}'),
    ],
)
def test_damaged_file_is_named(tmp_path, tokens, name, content):
    write_4x(tmp_path, tokens)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} cannot be used: "):
        processor.read_processor(tmp_path)


def test_missing_files_are_named(tmp_path, tokens):
    with pytest.raises(ValueError, match="neither preprocessor_config.json nor processor_config"):
        processor.read_processor(tmp_path)
    write_4x(tmp_path, tokens)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(ValueError, match="No tokenizer at "):
        processor.read_processor(tmp_path)


def test_nested_settings_win_and_a_file_without_them_is_passed_over(tmp_path, tokens):
    write_4x(tmp_path, tokens)
    path = tmp_path / "processor_config.json"
    path.write_text('{"processor_class": "AlignProcessor"}')
    assert processor.read_processor(tmp_path)[1].resize_size == 346
    path.write_text(json.dumps({"image_processor": ALIGN_BASE | {"size": 300}}))
    assert processor.read_processor(tmp_path)[1].resize_size == 300


@pytest.mark.parametrize(("limit", "max_tokens"), [(32, 32), (int(1e30), 64), (1e30, 64)])
def test_token_limit_is_that_of_the_tokenizer_or_64(tmp_path, tokens, limit, max_tokens):
    write_4x(tmp_path, tokens)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": limit}))
    assert processor.read_processor(tmp_path)[1].max_tokens == max_tokens


def test_resize_without_antialias_survives_writing_here_and_in_transformers(tmp_path, tokens):
    wanted = preprocessing(tokens, resize="tf", max_tokens=48)
    processor.write_processor(tmp_path / "ours", tokens, wanted)
    assert processor.read_processor(tmp_path / "ours")[1] == wanted
    AlignProcessor.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert processor.read_processor(tmp_path / "theirs")[1] == wanted


def test_size_without_crop_is_the_image_size(tmp_path, tokens):
    write_4x(tmp_path, tokens, do_center_crop=False, size=SMALL)
    found = processor.read_processor(tmp_path)[1]
    assert (found.resize_size, found.image_size) == (40, 40)
