"""align.py with tokenizers of every kind: loaded, saved, trained with, against transformers."""

import numpy as np
import pytest
import tokenizer_folders
import torch
from helpers import train_on_one_device
from tiny_hf import make_folder
from transformers import AlignModel, AlignProcessor

import align_jax
from align_jax.cli import main as cli
from align_jax.data.tokenizer import load_tokenizer


@pytest.mark.parametrize("kind", ["bert-fast", "bert-slow", "xlm-roberta", "t5", "ours"])
def test_folder_with_a_tokenizer_of_any_kind_equals_transformers_and_survives_saving(
    kind, tmp_path
):
    folder = tokenizer_folders.make_folder(kind, tmp_path / "hf")
    torch_model = make_folder(folder, own_tokenizer=False)
    texts = [*tokenizer_folders.MULTILINGUAL[:10], "two cats " * 60, ""]
    model = align_jax.load(folder, batch_size=8)
    z = model.encode_text(texts)
    assert np.linalg.norm(z[:, None] - z[None], axis=-1)[np.triu_indices(len(z), 1)].min() > 1e-3
    model.save(tmp_path / "saved")
    again = align_jax.load(tmp_path / "saved", batch_size=8)
    assert again.fingerprint() == model.fingerprint()
    np.testing.assert_array_equal(again.encode_text(texts), z)
    saved, info = AlignModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert saved.config.text_config.pad_token_id == model.tokenizer.pad_id
    pairs = [(tmp_path / "saved", saved.eval())]
    if kind != "t5":  # transformers puts nothing before the text; the saved folder does
        pairs.append((folder, torch_model))
    for path, theirs in pairs:
        batch = AlignProcessor.from_pretrained(path)(
            text=texts, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            features = theirs.get_text_features(**batch).pooler_output
        wanted = torch.nn.functional.normalize(features, dim=-1)
        np.testing.assert_allclose(z, wanted, atol=1e-5)


def test_text_tower_trains_on_a_multilingual_sentencepiece_tokenizer(
    project, monkeypatch, tmp_path, quick_compile
):
    train_on_one_device(monkeypatch)
    folder = tokenizer_folders.make_folder("xlm-roberta", tmp_path / "tokenizer")
    monkeypatch.chdir(project)
    workdir, exported = tmp_path / "run", tmp_path / "hf"
    arguments = ["train", "--config", "config.py:plain", "--workdir", str(workdir)]
    arguments += [f"--config.data.tokenizer={folder}", "--config.optim.warmup_steps=1"]
    # A rate that does not depend on the number of steps: both runs are the same program.
    arguments += ["--config.optim.schedule=constant", "--config.train.steps=2"]
    assert cli.main(arguments) == 0
    assert cli.main([*arguments[:-1], "--config.train.steps=3"]) == 0  # continues
    model = align_jax.load(workdir)
    given = load_tokenizer(folder)
    assert model.tokenizer.fingerprint() == given.fingerprint()
    assert model.model.text.vocab_size == given.vocab_size
    assert cli.main(["convert", str(workdir), str(exported), "--to", "hf"]) == 0
    texts = tokenizer_folders.MULTILINGUAL[:10]
    batch = AlignProcessor.from_pretrained(exported)(
        text=texts, max_length=12, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        theirs = AlignModel.from_pretrained(exported).eval().get_text_features(**batch)
    wanted = torch.nn.functional.normalize(theirs.pooler_output, dim=-1)
    np.testing.assert_allclose(model.encode_text(texts), wanted, atol=1e-5)
