"""data/captions.py and data/vocabulary.py: read captions, count their words, learn wordpieces."""

import csv
import io
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import error_of, real_data
from test_tokenizer import TRICKY
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.trainers import WordPieceTrainer

from align_jax.cli import main as cli
from align_jax.curate import vocab
from align_jax.data import tokenizer, vocabulary
from align_jax.data.sources import captions, table_files
from align_jax.data.sources.scenes import Scenes
from align_jax.storage.problems import Problems

SPECIAL = tokenizer.SPECIAL_TOKENS
BERT = normalizers.BertNormalizer(lowercase=True)
SPLIT = pre_tokenizers.BertPreTokenizer()


def split_as_bert(text):
    return [word for word, _ in SPLIT.pre_tokenize_str(BERT.normalize_str(text))]


def scene_captions(num):
    source = Scenes(num, seed=0)
    return [caption for index in range(num) for caption in source[index].captions]


def random_words(num, letters, seed):
    rng = random.Random(seed)
    words = ("".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(num))
    return {word: rng.choice([1, 1, 2, 3, 5, 40]) for word in words}


def learn_slowly(counts, vocab_size):
    """WordPiece as defined: recount all pairs, merge the most frequent one, repeat."""
    letters = Counter()
    for word, count in counts.items():
        for letter in word:
            letters[letter] += count
    known = sorted(letters, key=lambda letter: (-letters[letter], letter))[: vocab_size // 4]
    inner = sorted({letter for word in counts for letter in word[1:] if letter in known})
    tokens = [*SPECIAL, *(f"##{letter}" for letter in inner), *sorted(known)]
    rows = []
    for word, count in counts.items():
        pieces = [letter if i == 0 else f"##{letter}" for i, letter in enumerate(word)]
        rows.append(([p for p in pieces if p.removeprefix("##") in known], count))
    while len(tokens) < vocab_size:
        pairs = Counter()
        for pieces, count in rows:
            for pair in zip(pieces, pieces[1:], strict=False):
                pairs[pair] += count
        if not pairs or max(pairs.values()) < 2:
            break
        a, b = min(pairs, key=lambda p: (-pairs[p], tokens.index(p[0]), tokens.index(p[1])))
        merged = a + b.removeprefix("##")
        if merged not in tokens:
            tokens.append(merged)
        for pieces, _ in rows:
            index = 0
            while index < len(pieces) - 1:
                if (pieces[index], pieces[index + 1]) == (a, b):
                    pieces[index : index + 2] = [merged]
                index += 1
    return tokens


@pytest.mark.parametrize("letters", ["a", "ab", "aab", "abcdefgh", "猫一b\u0301\U0001f389"])
def test_learned_pieces_equal_those_of_the_definition(letters):
    for seed in range(8):
        counts = random_words(60, letters, seed)
        for vocab_size in (16, 40, 120):
            expected = learn_slowly(counts, vocab_size)
            assert vocabulary.learn_pieces(counts, vocab_size, SPECIAL) == expected


def test_learned_pieces_are_the_same_for_any_order_of_the_words():
    counts = random_words(400, "abcde", 0)
    reverse = dict(reversed(counts.items()))
    first = vocabulary.learn_pieces(counts, 300, SPECIAL)
    assert first == vocabulary.learn_pieces(reverse, 300, SPECIAL)
    assert len(first) == 300


def test_learned_pieces_of_counts_beyond_32_bits_are_right():
    # The pairs (x, ##y) and (c, ##d) would be negative or zero in 32 bits.
    counts = {"xy": 3 * 2**30, "cd": 2**32, "ab": 5}
    assert vocabulary.learn_pieces(counts, 100, SPECIAL)[-3:] == ["cd", "xy", "ab"]


@pytest.mark.parametrize("vocab_size", [600, 3000])
def test_trained_vocabulary_equals_that_of_the_tokenizers_library(vocab_size):
    try:
        lines = real_data("cc3m", "train.jsonl").read_text("utf-8").split("\n")[:4000]
        texts = [json.loads(line)["captions"][0] for line in lines]
    except pytest.skip.Exception:
        texts = scene_captions(500)
    texts += TRICKY
    counts = Counter(word for text in texts for word in split_as_bert(text) if len(word) <= 100)
    # Its ties are made reproducible as far as they can be: letters get fixed numbers.
    alphabet, inner = vocabulary._alphabet(counts, vocab_size // 4)
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL, *(f"##{letter}" for letter in inner)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    theirs = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    theirs.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    theirs.train_from_iterator(counts.elements(), trainer)
    ids = theirs.get_vocab(with_added_tokens=True)
    ours = tokenizer.train_wordpiece(texts, vocab_size)
    assert list(ours.tokens) == sorted(ids, key=ids.get)


SPACES = [chr(code) for code in (*range(1, 33), 0x85, 0xA0, 0x1680, *range(0x2000, 0x2010))]
SPACES += ["\u2028", "\u2029", "\u202f", "\u205f", "\u3000", "\ufeff", "\x00", "\x7f"]


def test_counted_words_equal_those_of_each_caption_alone():
    texts = TRICKY + [f"Left{space}right" for space in SPACES] + ["a b", "\ud800 half"]
    expected = Counter()
    for text in texts:
        expected.update(split_as_bert(text.encode("utf-8", "replace").decode()))
    assert vocabulary.count_words(iter(texts), split_as_bert) == expected


def test_counted_words_through_files_equal_those_in_memory(monkeypatch, tmp_path):
    texts = scene_captions(300) + TRICKY
    expected = Counter(word for text in texts for word in split_as_bert(text))
    monkeypatch.setattr(vocabulary, "_CAPTIONS_PER_BATCH", 10)
    monkeypatch.setattr(vocabulary, "_MAX_CHUNKS", 20)
    monkeypatch.setattr(vocabulary.tempfile, "tempdir", str(tmp_path))
    runs = []
    write_run = vocabulary._write_run
    monkeypatch.setattr(
        vocabulary, "_write_run", lambda *args: runs.append(args) or write_run(*args)
    )
    assert vocabulary.count_words(texts, split_as_bert) == expected
    assert len(runs) > 10
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("max_chunks", [1000, 2])
def test_counted_words_beyond_the_limit_are_the_most_frequent_whatever_the_order(
    monkeypatch, max_chunks
):
    monkeypatch.setattr(vocabulary, "_MAX_WORDS", 3)
    monkeypatch.setattr(vocabulary, "_MAX_CHUNKS", max_chunks)
    monkeypatch.setattr(vocabulary, "_CAPTIONS_PER_BATCH", 1)
    texts = ["a a a b b", "c c d", "e a", "b f"]
    expected = {"a": 4, "b": 3, "c": 2}
    assert vocabulary.count_words(texts, split_as_bert) == expected
    assert vocabulary.count_words(texts[::-1], split_as_bert) == expected
    # d and e tie for the last place: neither is kept.
    texts += ["d e"]
    assert vocabulary.count_words(texts, split_as_bert) == {"a": 4, "b": 3}


class Caption(str):
    """Counts how many of its kind are in memory."""

    alive = most_alive = 0

    def __new__(cls, text):
        Caption.alive += 1
        Caption.most_alive = max(Caption.alive, Caption.most_alive)
        return super().__new__(cls, text)

    def __del__(self):
        Caption.alive -= 1


def test_counting_holds_a_few_captions_at_a_time():
    texts = (Caption(f"red circle {index}") for index in range(20_000))
    counts = vocabulary.count_words(texts, split_as_bert)
    assert counts["red"] == 20_000 and len(counts) == 20_002
    assert Caption.most_alive <= 2 * vocabulary._CAPTIONS_PER_BATCH + 1


def test_words_longer_than_the_encoder_reads_are_not_learned():
    texts = ["x" * 101, "y" * 100] * 2
    trained = tokenizer.train_wordpiece(texts, 200)
    assert "y" * 100 in trained.tokens and "x" not in trained.tokens
    assert trained.encode(texts[:1], 5)[0][0, 1] == 1


def test_kept_accents_keep_vowel_signs_and_syllables(tmp_path):
    transformers = pytest.importorskip("transformers")
    texts = ["हिन्दी कुत्ता", "ภาษาไทย ที่นี่", "한국어 강아지", "がぎぐ かきく", "Zoë été"] * 3
    plain = tokenizer.train_wordpiece(texts, 400)
    kept = tokenizer.train_wordpiece(texts, 400, strip_accents=False)
    for word in ("कुत्ता", "ที่นี่", "강아지", "がぎぐ", "zoë"):
        assert word in kept.tokens and word not in plain.tokens
    kept.save(tmp_path)
    assert tokenizer.load_tokenizer(tmp_path).fingerprint() == kept.fingerprint()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids, mask = kept.encode(texts[:5], 32)
    for row, text in enumerate(texts[:5]):
        assert ids[row][mask[row] == 1].tolist() == theirs(text)["input_ids"]


CAPTIONS = ["A red cat, sitting", 'She said "hi"', "naïve 猫", "", "end\u2028line"]


def write_captions(path):
    """Writes CAPTIONS as a table of the path's suffix, among other columns."""
    suffix = path.suffix
    if suffix in (".txt", ".token"):
        path.write_text("\ufeff" + "\r\n".join(CAPTIONS), "utf-8", newline="")
    elif suffix == ".json":
        path.write_text(json.dumps([*({"text": caption} for caption in CAPTIONS), 5]))
    elif suffix == ".jsonl":
        rows = [json.dumps({"url": "u", "TEXT": caption}) for caption in CAPTIONS]
        rows[1:1] = ["{broken", "[1]", "", json.dumps({"TEXT": None}), json.dumps({"url": 1})]
        path.write_text("\n".join(rows) + "\n")
    elif suffix == ".parquet":
        table = pa.table({"image": [b"x"] * 6, "Caption": [*CAPTIONS, None]})
        pq.write_table(table, path, row_group_size=2)
    elif suffix == ".tsv":
        rows = [f"http://{i}\t{caption}" for i, caption in enumerate(CAPTIONS)]
        path.write_text("url\ttext\n" + "\n".join(rows) + "\nno tab\n", "utf-8")
    else:
        file = io.StringIO(newline="")
        csv.writer(file).writerows([["id", "caption"], *enumerate(CAPTIONS), ["too", "many", "x"]])
        path.write_text(file.getvalue(), "utf-8", newline="")
    return path


@pytest.mark.parametrize("suffix", table_files.TABLE_SUFFIXES)
def test_read_captions_gives_all_of_each_format_and_counts_its_bytes(tmp_path, suffix):
    path = write_captions(tmp_path / f"table{suffix}")
    problems = Problems()
    batches = list(captions.read_captions(str(path), problems))
    assert [caption for batch, _ in batches for caption in batch] == CAPTIONS
    lost = {".csv": 1, ".tsv": 1, ".json": 1, ".jsonl": 2}.get(suffix, 0)
    assert problems == ({"row_malformed": lost} if lost else {})
    size = path.stat().st_size
    assert abs(sum(num_bytes for _, num_bytes in batches) - size) < 0.02 * size + 1


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("cc3m.tsv", "a cat\thttp://x/1\na dog\thttps://x/2\n", ["a cat", "a dog"]),
        ("cc12m.tsv", 'http://x/1\ta "cat\nhttps://x/2\ta dog\n', ['a "cat', "a dog"]),
        (
            "captions.txt",
            'image,caption\n1.jpg,"a cat, a dog"\n2.jpg,two\n',
            ["a cat, a dog", "two"],
        ),
        ("a.jsonl", '{"captions": ["a", "b", null]}\n{"captions": "c"}\n', ["a", "b", "c"]),
        ("a.csv", 'caption;n\n"two\nlines";1\n', ["two\nlines"]),
        ("empty.txt", "", []),
        ("empty.jsonl", "", []),
    ],
)
def test_read_captions_of_other_layouts(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    batches = captions.read_captions(str(tmp_path / name), Problems())
    assert [caption for batch, _ in batches for caption in batch if caption] == expected


def test_read_captions_of_a_named_column(tmp_path):
    (tmp_path / "a.csv").write_text("Alt,caption\na cat,no\n", newline="")
    assert list(captions.read_captions(str(tmp_path / "a.csv"), Problems(), "alt")) == [
        (["a cat"], 21)
    ]


@pytest.mark.parametrize(
    ("name", "content", "arguments", "message"),
    [
        ("a.csv", "id,words\n1,a\n", (), "a.csv has no column of captions (captions, caption, "),
        ("a.csv", "id,text\n1,a\n", ("--column", "x"), "a.csv has no column 'x': it has id, text."),
        ("a.jsonl", '{"words": 1}\n', (), "a.jsonl has no column of captions (captions, "),
        ("a.parquet", "PAR1", (), "a.parquet is not a readable Parquet file: "),
        ("a.txt", "\n \n", (), "No caption holds a word to make a vocabulary of"),
        ("b.txt", "a", (), "a.*: no such table of captions; known: .csv, "),
    ],
)
def test_vocab_of_unusable_table_is_one_clear_line(
    tmp_path, monkeypatch, capfd, name, content, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(content)
    source = "a.*.txt" if name == "b.txt" else name
    assert cli.main(["vocab", source, "--out", "new", *arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("align: " + message.replace("a.*:", "a.*.txt:"))


def test_vocab_takes_the_place_of_vocabularies_of_its_own_alone(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("t.jsonl").write_text('{"caption": "a red dog"}\n')
    command = ("vocab", "t.jsonl", "--size", "100", "--out")
    for folder, *names in (("model", "tokenizer.json"), ("cur", "kept.parquet", "report.json")):
        Path(folder).mkdir()
        for name in names:
            Path(folder, name).write_text("{}")
        message = error_of(capfd, *command, folder)
        assert f"{folder} holds other files, {names[0]} first; name a new folder." in message
        assert all(Path(folder, name).read_text() == "{}" for name in names)
    for _ in range(2):
        assert cli.main([*command, "new"]) == 0
    Path("new", "report.json").unlink()  # killed before its last file
    assert "new holds other files, " in error_of(capfd, *command, "new")
    Path(".new.parts").mkdir()
    assert cli.main([*command, "new"]) == 0


def test_vocab_of_pairs_has_no_columns(capfd):
    code = cli.main(["vocab", "scenes?size=4", "--out", "new", "--column", "text"])
    assert code == 2
    assert "--column is for tables of captions; scenes?size=4 is none." in capfd.readouterr().err


def test_vocab_of_shards_in_another_order_and_format_is_the_same_byte_for_byte(tmp_path, capfd):
    texts = scene_captions(200)
    for number, part in enumerate((texts[:300], texts[300:])):
        pq.write_table(pa.table({"text": part}), tmp_path / f"a{number}.parquet")
    (tmp_path / "b.txt").write_text("\n".join(reversed(texts)))
    for source, out in (("a*.parquet", "a"), ("b.txt", "b"), ("b.txt", "c")):
        arguments = ["vocab", str(tmp_path / source), "--out", str(tmp_path / out)]
        assert cli.main([*arguments, "--size", "300"]) == 0
        assert capfd.readouterr().out.startswith("wrote 300 wordpieces to ")
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"vocab.txt", "tokenizer.json", "report.json"} <= files
    files.remove("report.json")  # names the source
    for name in files:
        first = (tmp_path / "a" / name).read_bytes()
        assert first == (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    assert tokenizer.load_tokenizer(tmp_path / "a").tokens == (
        tokenizer.train_wordpiece(texts, 300).tokens
    )


def test_vocab_with_kept_accents_says_so_in_its_files(tmp_path):
    (tmp_path / "a.txt").write_text("été été\n" * 3, "utf-8")
    arguments = ["vocab", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--size", "100", "--keep-accents"]) == 0
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["strip_accents"] is False and config["do_lower_case"] is True
    assert "été" in tokenizer.load_tokenizer(tmp_path / "out").tokens


def test_parts_are_counted_as_the_whole(tmp_path, monkeypatch):
    texts = scene_captions(200) + TRICKY
    for number in range(4):
        vocabulary.write_counts(texts[number::4], split_as_bert, tmp_path / str(number))
        monkeypatch.setattr(vocabulary, "_CAPTIONS_PER_BATCH", 10)
        monkeypatch.setattr(vocabulary, "_MAX_CHUNKS", 20)
    merged = vocabulary.merge_counts([str(tmp_path / str(number)) for number in range(4)])
    assert merged == vocabulary.count_words(texts, split_as_bert)


def write_tables(folder):
    folder.mkdir()
    texts = scene_captions(300)
    for number in range(3):
        lines = "".join(f"{text}\n" for text in texts[number::3])
        (folder / f"{number}.txt").write_text(lines)
    return tokenizer.train_wordpiece(texts, 300)


def test_interrupted_vocabulary_goes_on_after_its_last_part(tmp_path, monkeypatch):
    whole = write_tables(tmp_path / "in")
    spec, out, written = str(tmp_path / "in" / "*.txt"), tmp_path / "out", []
    write = vocabulary.write_counts

    def stop(*args):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(args)
        write(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(vocabulary, "write_counts", stop)
        vocab.train_vocabulary(spec, out, 300)
    monkeypatch.setattr(vocabulary, "write_counts", lambda *a: written.append(a) or write(*a))
    assert vocab.train_vocabulary(spec, out, 300).fingerprint() == whole.fingerprint()
    assert len(written) == 3
    (out / f".tokenizer.json.{'0' * 32}.tmp").touch()  # of a killed run
    vocab.train_vocabulary(spec, out, 300)
    assert not list(out.glob(".*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["processes", "beam"])
def test_workers_learn_the_same_vocabulary(tmp_path, monkeypatch, where):
    options = {"num_workers": 2}
    if where == "beam":
        pytest.importorskip("apache_beam")
        options = {"beam": "--runner=DirectRunner --direct_num_workers=1"}
    monkeypatch.setattr(vocab, "_BYTES_A_WORKER", 1)
    whole = write_tables(tmp_path / "in")
    made = vocab.train_vocabulary(str(tmp_path / "in/*.txt"), tmp_path / "out", 300, **options)
    assert made.fingerprint() == whole.fingerprint()
