"""Tokenizers: WordPiece trained on captions, and those of Hugging Face folders.

transformers opens a folder (AutoTokenizer) and gives its `tokenizers` backend; from then on only
the backend is used: worker processes start often and never import transformers, nor does opening
what `Tokenizer.save` wrote. In the paper: 100k wordpieces of the training captions, 64 tokens.
"""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from align_jax.data import vocabulary
from align_jax.storage import text, writing

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

MIN_VOCAB_SIZE = 100

_MAX_WORD_CHARS = 100  # the encoder makes longer words [UNK]
_ROLES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
_SEAL = "align_jax_seal"  # our key in tokenizer_config.json: the two files are as we wrote them
_PROBES = (
    "a",
    "the 1st cat, a Dog.",
    "\u4e00\u0e01\U0001f600\u0378",
    "<s> [CLS] </s> [SEP]",
    "",
    " ",
)


class Tokenizer:
    """Makes ids of texts, as transformers does. Picklable; may be used by several threads.

    A row is the tokenizer's first tokens ([CLS] of BERT, <s> of XLM-R), the pieces of the text, its
    last tokens ([SEP], </s>), padding. Text is cut and padded on the right, always: the text tower
    reads position 0, so a tokenizer without a first token is refused (`load_tokenizer` gives it
    one).

    Attributes:
      vocab_size: number of ids, special tokens included: the greatest plus one.
      pad_id: id of the padding.
    """

    def __init__(self, content: str, special: Mapping[str, str]):
        """Makes a tokenizer of the content of its files.

        Args:
          content: of tokenizer.json, without truncation and padding: `encode` does both, since
            settings of the backend would be shared by threads.
          special: role (see transformers: "pad_token", "cls_token" ...) -> token.

        Raises:
          ValueError: what no text tower can use; the reason.
        """
        self._content, self._special = content, dict(special)
        self._backend = tokenizers.Tokenizer.from_str(content)
        # Classes of transformers make up a vocabulary like this where they find no file.
        if self._backend.get_vocab_size() - len(self._backend.get_added_tokens_decoder()) < 2:
            raise ValueError("its vocabulary holds special tokens only.")
        self.vocab_size = 1 + max(self._backend.get_vocab().values())
        self._first, self._last = _frame(self._backend)
        if not self._first:
            raise ValueError("it puts no token before the text, where the text tower reads.")
        pad = self._backend.token_to_id(self._special.get("pad_token", ""))
        if pad is None:
            raise ValueError("it has no padding token.")
        self.pad_id = pad

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[str, dict[str, str]]]:
        return Tokenizer, (self._content, self._special)

    @property
    def tokens(self) -> tuple[str | None, ...]:
        """The vocabulary; a token's id is its index. None where no token has that id."""
        return tuple(self._backend.id_to_token(index) for index in range(self.vocab_size))

    def encode(self, texts: Sequence[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids and mask, both int32 [N, max_tokens]; the mask is 0 on padding.

        Raises:
          ValueError: if max_tokens leaves no place for a piece.
        """
        room = max_tokens - len(self._first) - len(self._last)
        if room < 1:
            raise ValueError(
                f"config.data.max_tokens={max_tokens} must be at least {max_tokens - room + 1}."
            )
        ids = np.full((len(texts), max_tokens), self.pad_id, np.int32)
        mask = np.zeros((len(texts), max_tokens), np.int32)
        texts = list(map(text.clean_halves, texts))  # which the backend refuses
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        for row, encoding in enumerate(encodings):
            pieces = [*self._first, *encoding.ids[:room], *self._last]
            ids[row, : len(pieces)] = pieces
            mask[row, : len(pieces)] = 1
        return ids, mask

    def fingerprint(self) -> str:
        """Returns 16 hex digits that identify the vocabulary and what is done with text."""
        content = json.loads(self._content)
        options = self._options(content)
        if options:
            return _digest([options, self.tokens])[:16]
        return _digest([content, self.pad_id, self._first, self._last])[:16]

    def save(self, folder: str | os.PathLike, max_tokens: int = 64) -> None:
        """Writes a folder that `load_tokenizer` and transformers' AutoTokenizer (4 and 5) read.

        Args:
          folder: made if missing; holds tokenizer.json, tokenizer_config.json and, of BERT's
            WordPiece, vocab.txt afterwards.
          max_tokens: length that transformers truncates to (`model_max_length`).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        options = self._options(json.loads(self._content))
        if options:
            config = {
                "tokenizer_class": "BertTokenizer",
                "do_lower_case": options["lowercase"],
                "strip_accents": options["strip_accents"],
                "tokenize_chinese_chars": options["split_chinese"],
            }
            writing.write_text(folder / "vocab.txt", "".join(f"{token}\n" for token in self.tokens))
        else:  # the class that takes tokenizer.json as it is
            config = {"tokenizer_class": "PreTrainedTokenizerFast"}
        config |= self._special | {"padding_side": "right", "truncation_side": "right"}
        config |= {_SEAL: _seal(self._content, config), "model_max_length": max_tokens}
        writing.write_text(folder / "tokenizer.json", self._content)
        writing.write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    def _options(self, content: dict[str, Any]) -> dict[str, Any] | None:
        """Returns the options of BERT's tokenizer, None if this is another one."""
        model, normalizer = content["model"], content["normalizer"] or {}
        found = {
            "lowercase": normalizer.get("lowercase"),
            "strip_accents": normalizer.get("strip_accents"),
            "split_chinese": normalizer.get("handle_chinese_chars"),
        }
        if model["type"] != "WordPiece" or not set(SPECIAL_TOKENS) <= model["vocab"].keys():
            return None
        ours = json.loads(_bert_backend(model["vocab"], found).to_str())
        same = all(content[part] == ours[part] for part in ("model", "normalizer", "pre_tokenizer"))
        added = {token["content"] for token in content["added_tokens"]}
        ids = [[model["vocab"][token]] for token in ("[CLS]", "[SEP]")]
        same = same and added == set(SPECIAL_TOKENS) and self._special["pad_token"] == "[PAD]"
        return found if same and [self._first, self._last] == ids else None


def wordpiece(
    tokens: Sequence[str],
    *,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    split_chinese: bool = True,
) -> Tokenizer:
    """Returns BERT's tokenizer with a given vocabulary.

    Args:
      tokens: all pieces, "##" in front of those inside a word, and the SPECIAL_TOKENS; a token's id
        is its index.
      lowercase: whether case is ignored.
      strip_accents: whether accents are ignored; None does as `lowercase`.
      split_chinese: whether each Chinese character is a word.

    Raises:
      ValueError: if a special token is missing or a token is repeated.
    """
    ids = {token: index for index, token in enumerate(tokens)}
    missing = [token for token in SPECIAL_TOKENS if token not in ids]
    if missing:
        raise ValueError(f"The vocabulary lacks {', '.join(missing)}.")
    if len(ids) != len(tokens):
        repeated = Counter(tokens).most_common(1)[0][0]
        raise ValueError(f"The vocabulary holds {repeated!r} more than once.")
    backend = _bert_backend(ids, _bert_options(lowercase, strip_accents, split_chinese))
    return Tokenizer(backend.to_str(), dict(zip(_ROLES, SPECIAL_TOKENS, strict=True)))


def train_wordpiece(
    captions: Iterable[str],
    vocab_size: int,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    progress: vocabulary.Progress = vocabulary.no_progress,
) -> Tokenizer:
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
    counts = vocabulary.count_words(captions, word_splitter(lowercase, strip_accents))
    return learn_wordpiece(counts, vocab_size, lowercase, strip_accents, progress)


def word_splitter(
    lowercase: bool = True, strip_accents: bool | None = None
) -> Callable[[str], list[str]]:
    """Returns a function of a text that gives its words, as `train_wordpiece` counts them."""
    normalise = _normalizer(_bert_options(lowercase, strip_accents)).normalize_str
    pre_tokenize = pre_tokenizers.BertPreTokenizer().pre_tokenize_str

    def split(caption: str) -> list[str]:
        words = (word for word, _ in pre_tokenize(normalise(caption)))
        return [word for word in words if len(word) <= _MAX_WORD_CHARS]

    return split


def learn_wordpiece(
    counts: Mapping[str, int],
    vocab_size: int,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    progress: vocabulary.Progress = vocabulary.no_progress,
) -> Tokenizer:
    """Returns the tokenizer of words that are counted already, see `train_wordpiece`."""
    if not counts:
        raise ValueError("No caption holds a word to make a vocabulary of; check the captions.")
    tokens = vocabulary.learn_pieces(counts, vocab_size, SPECIAL_TOKENS, progress)
    return wordpiece(tokens, lowercase=lowercase, strip_accents=strip_accents)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Returns the tokenizer of a Hugging Face folder or of a `vocab.txt` file.

    A folder is opened as by transformers' AutoTokenizer, and its ids are the same. Two additions:
    where nothing comes before the text, the tokenizer's cls, bos or eos token does (so <s> of
    Llama, </s> of T5), and where there is no padding token, eos, unk or that first one pads. `save`
    writes them down, so that transformers follows.

    Args:
      path: a folder with tokenizer.json, vocab.txt or a SentencePiece model, or a vocabulary file,
        which is taken as that of a lower-case BERT.

    Raises:
      ValueError: nothing of that is there, it is damaged, or no text tower can use it.
    """
    path = Path(path)
    names = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
    found = [name for name in names if name.startswith("vocab.") or name.endswith(".model")]
    found += [name for name in names if name in ("tokenizer.json", "tokenizer_config.json")]
    try:
        if path.is_file() and path.suffix in (".json", ".model"):
            raise ValueError("name the folder that it lies in.")
        if path.is_file():
            # Not splitlines: vocabularies hold rare characters that it takes for line ends.
            return wordpiece(text.read_text(path).rstrip("\n").split("\n"))
        if set(found) - {"tokenizer_config.json"}:
            return _open_sealed(path) or _open_with_transformers(path, names)
    except ValueError as error:
        among = f" ({', '.join(found)})" if found else ""
        raise ValueError(f"{path}{among} is not a usable tokenizer: {error}") from error
    raise ValueError(
        f"No tokenizer at {path} (config.data.tokenizer): looked for a vocabulary file of that "
        "name, and for tokenizer.json, vocab.txt or a SentencePiece model in a folder of that name."
    )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[Any]:
    """Gives the transformers package, without its advice (such as that PyTorch was not found)."""
    key = "TRANSFORMERS_NO_ADVISORY_WARNINGS"  # it advises on import, before levels can be set
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        import transformers
    finally:
        os.environ.pop(key) if before is None else os.environ.update({key: before})
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield transformers
    finally:
        transformers.logging.set_verbosity(level)


def _open_sealed(folder: Path) -> Tokenizer | None:
    """Returns the tokenizer that `Tokenizer.save` wrote, None if the files are not those."""
    try:
        content = (folder / "tokenizer.json").read_text("utf-8")
        config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        if config.get(_SEAL) != _seal(content, config):
            return None
    except (OSError, ValueError, AttributeError):
        return None
    return Tokenizer(content, {role: config[role] for role in config if role.endswith("_token")})


def _open_with_transformers(folder: Path, names: list[str]) -> Tokenizer:
    with quiet_transformers() as transformers:
        # AutoTokenizer cannot tell what a vocabulary alone belongs to.
        known = {"tokenizer.json", "config.json"} & set(names) or _names_class(folder)
        unknown = "vocab.txt" in names and not known
        opener = transformers.BertTokenizer if unknown else transformers.AutoTokenizer
        try:
            theirs = opener.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            if not theirs.is_fast:
                kind = type(theirs).__name__
                raise ValueError(f"{kind} has no fast form (tokenizer.json), which is needed.")
            special = {role: str(token) for role, token in theirs.special_tokens_map.items()}
            special = {role: special[role] for role in special if role.endswith("_token")}
            ours = Tokenizer(*_complete(theirs.backend_tokenizer.to_str(), special))
            ids = theirs(list(_PROBES), add_special_tokens=False)["input_ids"]
            same = [e.ids for e in ours._backend.encode_batch(_PROBES, add_special_tokens=False)]
            if ids != same:
                raise ValueError("its backend gives other ids than transformers does.")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a damaged file makes it raise anything, panics of Rust too
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(kind + " ".join(str(error).split())[:300]) from error
    return ours


def _names_class(folder: Path) -> bool:
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    except FileNotFoundError:
        return False
    return isinstance(config, dict) and "tokenizer_class" in config


def _complete(content: str, special: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Returns both with a first token and one for padding, as `load_tokenizer` says."""
    backend = tokenizers.Tokenizer.from_str(content)
    backend.no_truncation()
    backend.no_padding()
    first, last = _frame(backend)
    if not first:
        roles = ("cls_token", "bos_token", "eos_token")
        token = next((special[role] for role in roles if role in special), None)
        if token is None:
            raise ValueError(
                "it puts no token before the text, where the text tower reads, and has no cls, bos "
                "or eos token to put there."
            )
        words = [token, *(backend.id_to_token(index) for index in last)]
        template = " ".join([f"{token}:0", "$A:0", *(f"{word}:0" for word in words[1:])])
        backend.post_processor = processors.TemplateProcessing(
            single=template,
            special_tokens=[(word, backend.token_to_id(word)) for word in dict.fromkeys(words)],
        )
        first = [backend.token_to_id(token)]
    if "pad_token" not in special:
        spare = (special.get("eos_token"), special.get("unk_token"), backend.id_to_token(first[0]))
        special = special | {"pad_token": next(token for token in spare if token)}
    return backend.to_str(), special


def _frame(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the ids that the backend puts before and after the pieces of any text."""
    for probe in _PROBES[:3]:
        pieces = backend.encode(probe, add_special_tokens=False).ids
        whole = backend.encode(probe)
        if pieces:
            start = next((i for i, special in enumerate(whole.special_tokens_mask) if not special))
            first, last = whole.ids[:start], whole.ids[start + len(pieces) :]
            if whole.ids != [*first, *pieces, *last]:
                raise ValueError("it does more than put tokens before and after the text.")
            return first, last
    raise ValueError("it makes no pieces of text.")


def _bert_options(
    lowercase: bool, strip_accents: bool | None, split_chinese: bool = True
) -> dict[str, Any]:
    return {
        "lowercase": lowercase,
        "strip_accents": strip_accents,
        "split_chinese": split_chinese,
    }


def _normalizer(options: Mapping[str, Any]) -> normalizers.Normalizer:
    return normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=options["split_chinese"],
        strip_accents=options["strip_accents"],
        lowercase=options["lowercase"],
    )


def _bert_backend(ids: Mapping[str, int], options: Mapping[str, Any]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece(dict(ids), unk_token="[UNK]"))
    backend.normalizer = _normalizer(options)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
    )
    backend.add_special_tokens([tokenizers.AddedToken(token) for token in SPECIAL_TOKENS])
    return backend


def _seal(content: str, config: Mapping[str, Any]) -> str:
    free = (_SEAL, "model_max_length")  # the length changes no ids: `encode` is told its own
    return _digest([content, {key: config[key] for key in sorted(config) if key not in free}])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
