"""WordPiece: train a vocabulary on captions, encode captions, read and write Hugging Face folders.

Text is split as in BERT, by the `tokenizers` library; transformers is never imported, since worker
processes start often. In the paper: 100k wordpieces of the training captions, 64 tokens.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from align_jax.data import vocabulary

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

MIN_VOCAB_SIZE = 100

_MAX_WORD_CHARS = 100  # the encoder makes longer words [UNK]
_ROLES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


class WordPieceTokenizer:
    """BERT's tokenizer with a given vocabulary. Picklable; may be used by several threads.

    Attributes:
      tokens: the vocabulary; a token's id is its index.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        *,
        lowercase: bool = True,
        strip_accents: bool | None = None,
        split_chinese: bool = True,
    ):
        """Makes a tokenizer of a vocabulary.

        Args:
          tokens: all pieces, "##" in front of those inside a word, and the SPECIAL_TOKENS.
          lowercase: whether case is ignored.
          strip_accents: whether accents are ignored; None does as `lowercase`.
          split_chinese: whether each Chinese character is a word.

        Raises:
          ValueError: if a special token is missing or a token is repeated.
        """
        self.tokens = tuple(tokens)
        ids = {token: index for index, token in enumerate(self.tokens)}
        missing = [token for token in SPECIAL_TOKENS if token not in ids]
        if missing:
            raise ValueError(f"The vocabulary lacks {', '.join(missing)}.")
        if len(ids) != len(self.tokens):
            repeated = Counter(self.tokens).most_common(1)[0][0]
            raise ValueError(f"The vocabulary holds {repeated!r} more than once.")
        self._options = {
            "lowercase": lowercase,
            "strip_accents": strip_accents,
            "split_chinese": split_chinese,
        }
        self._pad, _, self._cls, self._sep, _ = (ids[token] for token in SPECIAL_TOKENS)
        self._tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
        self._tokenizer.normalizer = _normalizer(**self._options)
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._tokenizer.post_processor = processors.BertProcessing(
            ("[SEP]", self._sep), ("[CLS]", self._cls)
        )
        self._tokenizer.add_special_tokens([AddedToken(token) for token in SPECIAL_TOKENS])

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return len(self.tokens)

    def encode(self, texts: Sequence[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids and mask, both int32 [N, max_tokens].

        A row is [CLS], at most max_tokens - 2 pieces, [SEP], then [PAD]; the mask is 1 up to [SEP].

        Raises:
          ValueError: if max_tokens is below 3.
        """
        if max_tokens < 3:
            raise ValueError(f"config.data.max_tokens={max_tokens} must be at least 3.")
        ids = np.full((len(texts), max_tokens), self._pad, np.int32)
        mask = np.zeros((len(texts), max_tokens), np.int32)
        # Truncated here, since truncation is a setting of the Tokenizer that threads would share.
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        for row, encoding in enumerate(encodings):
            pieces = [self._cls, *encoding.ids[: max_tokens - 2], self._sep]
            ids[row, : len(pieces)] = pieces
            mask[row, : len(pieces)] = 1
        return ids, mask

    def fingerprint(self) -> str:
        """Returns 16 hex digits that identify the vocabulary and the text normalisation."""
        content = json.dumps([self._options, self.tokens])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def save(self, folder: str | os.PathLike, max_tokens: int = 64) -> None:
        """Writes a folder that `load_tokenizer` and transformers' AutoTokenizer (4 and 5) read.

        Args:
          folder: made if missing; holds tokenizer.json, tokenizer_config.json, vocab.txt and
            special_tokens_map.json afterwards.
          max_tokens: length that transformers truncates to (`model_max_length`).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        special = dict(zip(_ROLES, SPECIAL_TOKENS, strict=True))
        config = {
            "tokenizer_class": "BertTokenizer",
            "model_max_length": max_tokens,
            "do_lower_case": self._options["lowercase"],
            "strip_accents": self._options["strip_accents"],
            "tokenize_chinese_chars": self._options["split_chinese"],
            **special,
        }
        self._tokenizer.save(str(folder / "tokenizer.json"))
        _write(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
        _write(folder / "special_tokens_map.json", json.dumps(special, indent=2) + "\n")
        _write(folder / "vocab.txt", "".join(f"{token}\n" for token in self.tokens))


def train_wordpiece(
    captions: Iterable[str],
    vocab_size: int,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    progress: vocabulary.Progress = vocabulary.no_progress,
) -> WordPieceTokenizer:
    """Returns a tokenizer with a vocabulary of at most `vocab_size` pieces of the captions.

    The same captions in the same or another order give the same vocabulary, byte for byte.

    Args:
      captions: read once; memory does not grow with their number (vocabulary.count_words).
      vocab_size: at least MIN_VOCAB_SIZE, special tokens included. The vocabulary is smaller where
        the captions hold fewer pieces that occur twice. At most a quarter of it are single
        characters, the most frequent ones; words with others become [UNK].
      lowercase: whether case is ignored.
      strip_accents: whether accents are ignored; None does as `lowercase`. False keeps what is more
        than an accent: vowel signs of Hindi and Thai, the voicing marks of Japanese kana, Korean
        syllables (otherwise taken apart). Each Chinese character is a word either way.
      progress: shows how far the learning has come, see vocabulary.learn_pieces.

    Raises:
      ValueError: if vocab_size is too small, or no caption holds a word.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"config.data.vocab_size={vocab_size} is too small; use at least {MIN_VOCAB_SIZE}."
        )
    normalise = _normalizer(lowercase, strip_accents, True).normalize_str
    pre_tokenize = pre_tokenizers.BertPreTokenizer().pre_tokenize_str

    def split(text):
        words = (word for word, _ in pre_tokenize(normalise(text)))
        return [word for word in words if len(word) <= _MAX_WORD_CHARS]

    counts = vocabulary.count_words(captions, split)
    if not counts:
        raise ValueError("No caption holds a word to make a vocabulary of; check the captions.")
    tokens = vocabulary.learn_pieces(counts, vocab_size, SPECIAL_TOKENS, progress)
    return WordPieceTokenizer(tokens, lowercase=lowercase, strip_accents=strip_accents)


def load_tokenizer(path: str | os.PathLike) -> WordPieceTokenizer:
    """Returns the tokenizer of a Hugging Face folder or of a `vocab.txt` file.

    In a folder, tokenizer.json is read if there is one, else vocab.txt with the options of
    tokenizer_config.json. A lone vocabulary file is taken as lower-case.

    Raises:
      ValueError: if nothing of that is there, or it is no WordPiece tokenizer.
    """
    path = Path(path)
    try:
        if path.is_file():
            return WordPieceTokenizer(_read_vocabulary(path))
        if (path / "tokenizer.json").is_file():
            path = path / "tokenizer.json"
            return _from_tokenizer_json(json.loads(path.read_text(encoding="utf-8")))
        if (path / "vocab.txt").is_file():
            config_path, config = path / "tokenizer_config.json", {}
            path = path / "vocab.txt"
            if config_path.is_file():
                config = json.loads(config_path.read_text(encoding="utf-8"))
            return WordPieceTokenizer(
                _read_vocabulary(path),
                lowercase=config.get("do_lower_case", True),
                strip_accents=config.get("strip_accents"),
                split_chinese=config.get("tokenize_chinese_chars", True),
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # not JSON, other layout
        problem = error if isinstance(error, ValueError) else "it has another layout"
        raise ValueError(f"{path} is not a usable WordPiece tokenizer: {problem}") from error
    raise ValueError(
        f"No tokenizer at {path} (config.data.tokenizer): looked for a vocabulary file of that "
        "name, and for tokenizer.json and vocab.txt in a folder of that name."
    )


def _normalizer(lowercase, strip_accents, split_chinese):
    return normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=split_chinese,
        strip_accents=strip_accents,
        lowercase=lowercase,
    )


def _from_tokenizer_json(content):
    kind = content["model"]["type"]
    if kind != "WordPiece":
        raise ValueError(f"it holds a {kind} model.")
    vocabulary = content["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    if [vocabulary[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError("its ids are not 0 to N - 1.")
    added = [t["content"] for t in content["added_tokens"] if t["content"] not in vocabulary]
    if added:
        raise ValueError(f"it adds tokens outside the vocabulary: {', '.join(added[:5])}.")
    normalizer = content["normalizer"]
    if normalizer["type"] != "BertNormalizer" or not normalizer["clean_text"]:
        raise ValueError(f"it normalises text by {normalizer['type']}, not as BERT does.")
    return WordPieceTokenizer(
        tokens,
        lowercase=normalizer["lowercase"],
        strip_accents=normalizer["strip_accents"],
        split_chinese=normalizer["handle_chinese_chars"],
    )


def _read_vocabulary(path):
    # Not splitlines: vocabularies hold rare characters that it takes for line ends.
    return [line.rstrip("\r") for line in path.read_text("utf-8").rstrip("\n").split("\n")]


def _write(path, text):
    path.write_text(text, encoding="utf-8", newline="\n")
