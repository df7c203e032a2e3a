import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizer_folders

from align_jax.data.sources.scenes import Scenes
from align_jax.data.tokenizer import (
    SPECIAL_TOKENS,
    load_tokenizer,
    train_wordpiece,
    wordpiece,
)

REPOSITORY = Path(__file__).parents[1]
TRICKY = [
    "",
    " ",
    "A red circle, top-left!",
    "Crème brûlée à la façon de Zoë; naïve Ærøskøbing ß İstanbul",
    "一只红色的猫 sits on 桌子",
    "日本語のテキスト 한국어 ภาษาไทย हिन्दी",
    "party 🎉👩‍👩‍👧 time ❤️",
    "don't... (really?) [x] {y} $5.00 50% a/b a_b #tag @you http://x.io/?q=1&r=2",
    "tab\tnew\nline\r\u00a0nbsp\u200bzero\x00nul\ufffd\u2028separator",
    "word " * 200,
    "x" * 99 + " " + "y" * 100 + " " + "z" * 101,
    "[CLS] inside [SEP] and [MASK] [mask] [PAD]",
    "UPPER Title cASE",
    "e\u0301 combining and \u1e9b\u0323",
]


@pytest.fixture(scope="module")
def captions():
    source = Scenes(400, seed=0)
    return [c for index in range(400) for c in source[index].captions] + TRICKY * 3


@pytest.fixture(scope="module")
def tokenizer(captions):
    return train_wordpiece(captions, 600)


def encode_with_transformers(tokenizer, texts, max_tokens):
    encoded = tokenizer(
        texts, max_length=max_tokens, padding="max_length", truncation=True, return_tensors="np"
    )
    return encoded["input_ids"], encoded["attention_mask"]


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("max_tokens", [3, 16, 64, 300])
def test_encode_equals_transformers_on_tricky_strings(tmp_path, captions, lowercase, max_tokens):
    transformers = pytest.importorskip("transformers")
    tokenizer = train_wordpiece(captions, 600, lowercase=lowercase)
    tokenizer.save(tmp_path)
    reference = transformers.BertTokenizer(
        vocab={token: index for index, token in enumerate(tokenizer.tokens)},
        do_lower_case=lowercase,
    )
    ids, mask = tokenizer.encode(TRICKY, max_tokens)
    assert ids.dtype == mask.dtype == np.int32 and ids.shape == (len(TRICKY), max_tokens)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for other in (reference, auto):
        expected_ids, expected_mask = encode_with_transformers(other, TRICKY, max_tokens)
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_array_equal(mask, expected_mask)


def test_encode_with_real_bert_vocabulary_equals_transformers():
    transformers = pytest.importorskip("transformers")
    folder = Path(os.environ.get("ALIGN_JAX_REAL_DATA", REPOSITORY.parent / "shared" / "data"))
    path = folder / "text" / "bert-base-uncased-vocab.txt"
    if not path.exists():
        pytest.skip(f"real data not found: {path}")
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == 30522
    ids, mask = tokenizer.encode(["a photo of a cat", *TRICKY], 64)
    assert ids[0, :8].tolist() == [101, 1037, 6302, 1997, 1037, 4937, 102, 0]
    assert mask[0].sum() == 7
    vocabulary = {token: index for index, token in enumerate(path.read_text("utf-8").split("\n"))}
    vocabulary.pop("", None)
    reference = transformers.BertTokenizer(vocab=vocabulary)
    expected = encode_with_transformers(reference, ["a photo of a cat", *TRICKY], 64)
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_array_equal(mask, expected[1])


def test_encode_worked_example():
    tokenizer = wordpiece([*SPECIAL_TOKENS, "a", "cat", "##s", "!"])
    ids, mask = tokenizer.encode(["A cats!", "", "dog a a a a a"], 6)
    assert ids.tolist() == [[2, 5, 6, 7, 8, 3], [2, 3, 0, 0, 0, 0], [2, 1, 5, 5, 5, 3]]
    assert mask.tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0], [1] * 6]


def test_halves_of_surrogate_pairs_are_left_out(tokenizer):
    ids, _ = tokenizer.encode(["a \ud83d dog", "\udcff"], 8)
    expected, _ = tokenizer.encode(["a dog", ""], 8)
    assert ids.tolist() == expected.tolist()


def test_encode_no_texts_gives_no_rows(tokenizer):
    ids, mask = tokenizer.encode([], 8)
    assert ids.shape == mask.shape == (0, 8)


def test_encode_max_tokens_below_three_names_the_config_key(tokenizer):
    with pytest.raises(ValueError, match="config.data.max_tokens=2 must be at least 3"):
        tokenizer.encode(["a"], 2)


def test_encode_in_threads_with_other_lengths_gives_the_same_as_alone(tokenizer):
    lengths = [8, 16, 64, 300] * 16
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda length: tokenizer.encode(TRICKY, length)[0], lengths))
    for length, ids in zip(lengths, found, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(TRICKY, length)[0])


def test_trained_vocabulary_opens_with_special_tokens_and_has_the_size_asked_for(tokenizer):
    assert tokenizer.tokens[:5] == SPECIAL_TOKENS == ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    assert tokenizer.vocab_size == len(set(tokenizer.tokens)) == 600
    assert {"circle", "background", "gradient"} <= set(tokenizer.tokens)


def test_trained_vocabulary_of_few_captions_is_smaller_and_spells_all_their_words():
    tokenizer = train_wordpiece(["red circle", "red square"], 1000)
    assert tokenizer.vocab_size < 100
    ids, mask = tokenizer.encode(["red circle", "red square"], 16)
    assert not (ids == 1).any()
    assert {"red"} <= set(tokenizer.tokens)


def test_trained_vocabulary_is_the_same_in_other_processes_and_orders(captions, tokenizer):
    code = (
        "import json, sys\n"
        "from align_jax.data.tokenizer import train_wordpiece\n"
        "tokenizer = train_wordpiece(json.load(sys.stdin), 600)\n"
        "print(json.dumps(tokenizer.tokens))\n"
    )
    for seed, order in (("0", captions), ("1", captions), ("2", captions[::-1])):
        result = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(order),
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        assert result.returncode == 0, result.stderr
        assert tuple(json.loads(result.stdout)) == tokenizer.tokens


def test_trained_alphabet_keeps_the_most_frequent_quarter():
    rare = [chr(code) for code in range(0x4E00, 0x4E00 + 500)]
    tokenizer = train_wordpiece(["红 " * 5 + "abc " * 5, "".join(rare)], 100)
    single = [t for t in tokenizer.tokens if len(t) == 1]
    assert len(single) == 25 and {"红", "a", "b", "c"} <= set(single)
    assert tokenizer.vocab_size <= 100
    # Ties go to the lower code point.
    assert set(single) - {"红", "a", "b", "c"} == set(rare[:21])


@pytest.mark.parametrize(
    "captions, vocab_size, message",
    [
        (["a cat"], 50, "config.data.vocab_size=50 is too small; use at least 100"),
        ([], 1000, "No caption holds a word"),
        (["", " \n"], 1000, "No caption holds a word"),
    ],
)
def test_training_on_unusable_input_is_one_clear_line(captions, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_wordpiece(captions, vocab_size)


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("lost", [None, "tokenizer.json"])
def test_save_then_load_gives_the_same_tokenizer(tmp_path, captions, lowercase, lost):
    tokenizer = train_wordpiece(captions, 600, lowercase=lowercase)
    tokenizer.save(tmp_path / "new" / "folder")
    if lost:
        (tmp_path / "new" / "folder" / lost).unlink()
    again = load_tokenizer(tmp_path / "new" / "folder")
    assert again.fingerprint() == tokenizer.fingerprint()
    np.testing.assert_array_equal(again.encode(TRICKY, 32)[0], tokenizer.encode(TRICKY, 32)[0])


def test_saved_folder_tells_transformers_the_length(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path, max_tokens=48)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert auto.model_max_length == 48
    assert len(auto("word " * 200, truncation=True)["input_ids"]) == 48
    assert auto.pad_token_id == 0 and len(auto) == tokenizer.vocab_size


@pytest.mark.parametrize("lowercase", [True, False])
def test_load_reads_a_folder_written_by_transformers(tmp_path, captions, lowercase):
    transformers = pytest.importorskip("transformers")
    tokenizer = train_wordpiece(captions, 600, lowercase=lowercase)
    vocabulary = {token: index for index, token in enumerate(tokenizer.tokens)}
    reference = transformers.BertTokenizer(vocab=vocabulary, do_lower_case=lowercase)
    encode_with_transformers(reference, ["a"], 8)  # leaves padding and truncation in its file
    reference.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint() == tokenizer.fingerprint()
    np.testing.assert_array_equal(again.encode(TRICKY, 32)[0], tokenizer.encode(TRICKY, 32)[0])


def test_fingerprint_depends_on_vocabulary_and_case(tokenizer):
    swapped = list(tokenizer.tokens)
    swapped[10], swapped[11] = swapped[11], swapped[10]
    others = [
        wordpiece(tokenizer.tokens, lowercase=False),
        wordpiece(tokenizer.tokens, strip_accents=False),
        wordpiece(swapped),
        wordpiece(tokenizer.tokens[:-1]),
    ]
    fingerprints = {other.fingerprint() for other in [tokenizer, *others]}
    assert len(fingerprints) == 5
    assert all(len(f) == 16 and int(f, 16) >= 0 for f in fingerprints)
    assert wordpiece(tokenizer.tokens).fingerprint() == tokenizer.fingerprint()


def test_tokenizer_survives_pickling(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.fingerprint() == tokenizer.fingerprint()
    np.testing.assert_array_equal(again.encode(TRICKY, 32)[0], tokenizer.encode(TRICKY, 32)[0])


def test_import_leaves_heavy_libraries_alone():
    code = (
        "import sys, align_jax.data.tokenizer, align_jax.data.images\n"
        "import align_jax.data.sources.scenes\n"
        "print([m for m in ('jax', 'transformers', 'torch', 'tensorflow') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_load_missing_path_lists_what_was_looked_for(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="tokenizer.json, vocab.txt or a Sent") as caught:
            load_tokenizer(path)
        assert str(path) in str(caught.value) and "config.data.tokenizer" in str(caught.value)


@pytest.mark.parametrize(
    "name, edit, message",
    [
        ("tokenizer.json", lambda p: p.write_text("{"), "Expecting prop"),
        ("tokenizer.json", lambda p: p.write_text("[]"), "TypeError"),
        ("tokenizer.json", lambda p: p.write_text('{"model": null}'), "Error"),
        ("tokenizer.json", lambda p: p.write_bytes(b"\xff\xfe\x00"), "utf-8"),
        ("vocab.txt", lambda p: p.write_bytes(b"\xff\xfe\x00"), "UTF-8"),
        ("vocab.txt", lambda p: p.write_text(""), "UNK"),
        ("vocab.txt", lambda p: p.write_text("[PAD]\n[CLS]\n[SEP]\na\nb\nc\n"), "UNK"),
        ("tokenizer_config.json", lambda p: p.write_text("{"), "Expecting prop"),
        ("tokenizer_config.json", lambda p: p.write_text('{"auto_map": ["a.B", null]}'), "code"),
    ],
)
def test_load_unusable_file_names_it_and_the_problem(tmp_path, tokenizer, name, edit, message):
    tokenizer.save(tmp_path)
    if name == "vocab.txt":
        (tmp_path / "tokenizer.json").unlink()
    edit(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert f"{tmp_path} " in str(caught.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a\n\xff", "words.txt:2 is not UTF-8"),
        (b"[PAD]\n[UNK]\na\n", "lacks .CLS., .SEP., .MASK."),
        ("\n".join([*SPECIAL_TOKENS, "a", "a"]).encode(), "'a' more than once"),
    ],
)
def test_load_unusable_vocabulary_file_names_it_and_the_problem(tmp_path, content, message):
    path = tmp_path / "words.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(path)
    assert str(caught.value).startswith(f"{path} is not a usable tokenizer: ")


def test_load_lone_vocabulary_file_is_lower_case(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    shutil.copy(tmp_path / "vocab.txt", tmp_path / "words.txt")
    assert load_tokenizer(tmp_path / "words.txt").fingerprint() == tokenizer.fingerprint()


KINDS = "bert-fast bert-slow vocabulary-alone ours xlm-roberta llama t5 byte-bpe".split()
# Ids before and after the text, and of the padding, by the names of tokens.
FRAMES = {
    "xlm-roberta": ("<s>", "</s>", "<pad>"),
    "llama": ("<s>", None, "</s>"),  # <s> by us
    "t5": ("</s>", "</s>", "<pad>"),  # the first one by us
    "byte-bpe": ("<|end|>", None, "<|end|>"),  # by us
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("tokenizers")
    return {kind: tokenizer_folders.make_folder(kind, top / kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_of_every_kind_gives_the_ids_of_transformers(folders, tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(folders[kind])
    ours.save(tmp_path, max_tokens=32)
    texts = [*TRICKY, *tokenizer_folders.MULTILINGUAL[:10], "<s> </s> <pad> <unk> <|end|>"]
    ids, mask = ours.encode(texts, 32)
    assert ids.max() < ours.vocab_size and mask[:, 0].all() and len(set(ids[:, 0])) == 1
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = encode_with_transformers(saved, texts, 32)
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_array_equal(mask, expected[1])
    assert saved.model_max_length == 32 and saved.pad_token_id == ours.pad_id
    first, last, pad = FRAMES.get(kind, ("[CLS]", "[SEP]", "[PAD]"))
    position = {token: index for index, token in enumerate(ours.tokens)}
    assert set(ids[:, 0]) == {position[first]} and ours.pad_id == position[pad]
    if kind == "vocabulary-alone":  # transformers cannot tell what it belongs to
        return
    theirs = transformers.AutoTokenizer.from_pretrained(folders[kind])
    for text, row in zip(texts, ours.encode(texts, 400)[0], strict=True):
        pieces = theirs(text, add_special_tokens=False)["input_ids"]
        pieces = pieces[: 398 if last else 399]
        end = [position[last]] if last else []
        found = [position[first], *pieces, *end]
        assert row.tolist() == found + [ours.pad_id] * (400 - len(found))
        if kind not in ("llama", "t5", "byte-bpe") and len(found) < 400:
            assert found == theirs(text)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_of_every_kind_survives_saving_and_pickling(folders, tmp_path, kind):
    ours = load_tokenizer(folders[kind])
    ours.save(tmp_path)
    for again in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(ours))):
        assert again.fingerprint() == ours.fingerprint()
        assert (again.vocab_size, again.pad_id) == (ours.vocab_size, ours.pad_id)
        for left, right in zip(again.encode(TRICKY, 32), ours.encode(TRICKY, 32), strict=True):
            np.testing.assert_array_equal(left, right)


def test_multilingual_tokenizer_spells_every_language(folders):
    ours = load_tokenizer(folders["xlm-roberta"])
    unknown = ours.tokens.index("<unk>")
    ids, mask = ours.encode(tokenizer_folders.MULTILINGUAL[:10], 64)
    assert not (ids == unknown).any() and (mask.sum(axis=1) > 4).all()


def test_reopening_and_unpickling_leave_transformers_alone(folders, tmp_path):
    load_tokenizer(folders["xlm-roberta"]).save(tmp_path)
    code = (
        "import sys, pickle\n"
        "from align_jax.data.tokenizer import load_tokenizer\n"
        "found = pickle.loads(pickle.dumps(load_tokenizer(sys.argv[1])))\n"
        "found.encode(['a cat'], 8)\n"
        "print([m for m in ('jax', 'transformers', 'torch') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_changed_file_of_a_saved_tokenizer_is_opened_as_transformers_does(tmp_path, captions):
    transformers = pytest.importorskip("transformers")
    train_wordpiece(captions, 600).save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_lower_case": False}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = encode_with_transformers(theirs, TRICKY, 16)[0]
    np.testing.assert_array_equal(load_tokenizer(tmp_path).encode(TRICKY, 16)[0], expected)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("siglip", "SiglipTokenizer has no fast form .tokenizer.json., which is needed"),
        ("no-special-tokens", "has no cls, bos or eos token to put there"),
    ],
)
def test_tokenizer_that_no_text_tower_can_use_is_refused(tmp_path, kind, message):
    folder = tokenizer_folders.make_folder(kind, tmp_path / kind)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [None, "XLMRobertaTokenizer", "BertTokenizer", "T5Tokenizer"])
def test_folder_without_the_vocabulary_of_its_class_is_refused(tmp_path, config):
    (tmp_path / "other.model").write_bytes(b"weights of something")
    if config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": config}))
    with pytest.raises(ValueError, match="is not a usable tokenizer: ") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_file_of_a_folder_asks_for_the_folder(folders):
    for path in (folders["ours"] / "tokenizer.json", *folders["xlm-roberta"].glob("*.model")):
        with pytest.raises(ValueError, match="name the folder that it lies in"):
            load_tokenizer(path)


def test_fingerprint_of_wordpiece_is_that_of_earlier_versions():
    # Workdirs and indexes hold it.
    tokens = [*SPECIAL_TOKENS, "a", "cat", "##s", "!"]
    assert wordpiece(tokens).fingerprint() == "bc80ffa0e2f8f34a"
    content = json.dumps(
        [{"lowercase": False, "strip_accents": False, "split_chinese": True}, tokens]
    )
    other = wordpiece(tokens, lowercase=False, strip_accents=False).fingerprint()
    assert other == hashlib.sha256(content.encode()).hexdigest()[:16]
