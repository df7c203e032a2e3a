"""Small tokenizers of the kinds that Hugging Face folders hold, made on the spot."""

import io
import json

import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from align_jax.data.tokenizer import train_wordpiece

MULTILINGUAL = [
    "a photo of a cat",
    "two red squares and circles",
    "un chat noir sur un tapis",
    "ein kleiner Hund im großen Garten",
    "кошка сидит на ковре",
    "猫が座っている",
    "一只红色的猫",
    "สุนัขในสวน",
    "القطة على السجادة",
    "El Niño está aquí",
] * 20

# kind -> (name of the SentencePiece model, class, model type, ids of its special tokens)
_SENTENCEPIECE = {
    "xlm-roberta": ("sentencepiece.bpe.model", "XLMRobertaTokenizer", "unigram", {}),
    "llama": ("tokenizer.model", "LlamaTokenizer", "bpe", {}),
    "t5": (
        "spiece.model",
        "T5Tokenizer",
        "unigram",
        {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    ),
    "siglip": ("spiece.model", "SiglipTokenizer", "unigram", {}),
}


def make_folder(kind, folder):
    """Writes the tokenizer of a kind into a folder, which is made; returns the folder."""
    folder.mkdir(parents=True)
    vocabulary = {
        token: index for index, token in enumerate(train_wordpiece(MULTILINGUAL, 300).tokens)
    }
    if kind in _SENTENCEPIECE:
        name, tokenizer_class, model_type, ids = _SENTENCEPIECE[kind]
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(MULTILINGUAL),
            model_writer=model,
            model_type=model_type,
            vocab_size=250,
            hard_vocab_limit=False,
            minloglevel=2,
            **ids,
        )
        (folder / name).write_bytes(model.getvalue())
        config = {"tokenizer_class": tokenizer_class}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    elif kind == "bert-fast":
        BertTokenizer(vocab=vocabulary, do_lower_case=False).save_pretrained(folder)
    elif kind == "bert-slow":
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary))
        config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    elif kind == "vocabulary-alone":
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary))
    elif kind in ("byte-bpe", "no-special-tokens"):
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        special = ["<|end|>"] if kind == "byte-bpe" else []
        backend.train_from_iterator(
            MULTILINGUAL,
            trainers.BpeTrainer(
                vocab_size=400,
                special_tokens=special,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            ),
        )
        roles = dict.fromkeys(("bos_token", "eos_token"), "<|end|>") if special else {}
        PreTrainedTokenizerFast(tokenizer_object=backend, **roles).save_pretrained(folder)
    elif kind == "ours":
        train_wordpiece(MULTILINGUAL, 300).save(folder)
    return folder
