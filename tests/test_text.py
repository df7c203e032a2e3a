"""The door to user text (storage/text.py), against Python's own decoding of whole files."""

import pickle
import random
import unicodedata

import pytest

from align_jax.cli import model_verbs
from align_jax.config import load_config
from align_jax.curate.filter import metadata_entries, rules
from align_jax.data.sources import files
from align_jax.evals import templates
from align_jax.storage import text

# Category Cc but what str.isspace takes for white space.
CONTROL = {
    number: "\ufffd"
    for number in range(256)
    if unicodedata.category(chr(number)) == "Cc" and not chr(number).isspace()
}


def write(path, data):
    path.write_bytes(data)
    return path


def lines_of(path):
    return [line for block in text.read_blocks(path) for line in block.lines]


def oracle(data):
    """The lines of a whole file: the definition, in the slow way."""
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    lines = lines if lines[-1] else lines[:-1]
    lines = [line[:-1] if line.endswith(b"\r") else line for line in lines]
    return [line.decode("utf-8", "replace").translate(CONTROL) for line in lines]


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 64, 2**23])
def test_blocks_hold_the_lines_of_the_file_whatever_their_size(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(text, "_BLOCK_BYTES", block_bytes)
    rng = random.Random(block_bytes)
    pieces = [
        b"a",
        b"\n",
        b"\r",
        b"\r\n",
        "é".encode(),
        b"\xff",
        "\U0001f600".encode(),
        b"\n\n",
        b"\0",
    ]
    pieces += ["\u2028".encode(), "\x85".encode(), b"\x0b", b"\x0c", b"\x1c", "\x9b".encode()]
    for number in range(60):
        data = b"".join(rng.choices(pieces, k=number))
        if number % 3 == 0 and block_bytes > 2:
            data = b"\xef\xbb\xbf" + data
        path = write(tmp_path / "t", data)
        blocks = list(text.read_blocks(path))
        assert [line for block in blocks for line in block.lines] == oracle(data)
        first = 1
        for block in blocks:
            assert block.first == first
            first += len(block.lines)
        bad = [b.first + i for b in blocks for i in b.repaired]
        raw = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        assert sorted(bad) == [
            n
            for n, line in enumerate(raw, 1)
            if line.decode("utf-8", "replace").translate(CONTROL).encode() != line
        ]
        assert (
            sum(block.num_bytes for block in blocks) == (len(data) if blocks else 0) or not raw[0]
        )


def test_a_line_beyond_the_limit_is_named_and_the_next_ones_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(text, "_BLOCK_BYTES", 256)
    path = write(tmp_path / "t", b"a\n" + b"x" * 1000 + b"\n" + b"y" * 5000 + b"\nb\n")
    blocks = list(text.read_blocks(path))
    assert [len(line) for block in blocks for line in block.lines] == [1, 1000, 1160, 1]
    assert [block.first + i for block in blocks for i in block.too_long] == [3]
    path = write(tmp_path / "t", b"z" * 5000)
    (block,) = text.read_blocks(path)
    assert len(block.lines[0]) > 1000 and block.too_long == {0} and block.num_bytes == 5000


def test_files_written_by_hand(tmp_path):
    path = write(tmp_path / "l.txt", b"\xef\xbb\xbfcat\r\ndog\rcow\n\n")
    assert text.read_lines(path) == ["cat", "dog\rcow", ""]
    assert text.read_lines(write(path, b"")) == []
    assert text.read_lines(write(path, b"one")) == ["one"]
    with pytest.raises(ValueError, match=r"l.txt:3 is not UTF-8: byte 0xe9; save"):
        text.read_lines(write(path, b"a\nb\r\ncaf\xe9\n"))
    for data in ("a\nb".encode("utf-16"), b"\xfe\xff\0a"):
        with pytest.raises(ValueError, match="l.txt is UTF-16, not UTF-8"):
            text.read_lines(write(path, data))
        with pytest.raises(ValueError, match="l.txt is UTF-16, not UTF-8"):
            list(text.read_blocks(path))


def test_json_written_by_hand(tmp_path):
    path = write(
        tmp_path / "l.json", b'\xef\xbb\xbf{"a\\ud800": ["x\\udc00y", 1, "\\ud83d\\ude00"]}'
    )
    assert text.read_json(path) == {"a\ufffd": ["x\ufffdy", 1, "\U0001f600"]}
    with pytest.raises(ValueError, match=r"l.json is not valid JSON: .* line 2 column 1"):
        text.read_json(write(path, b'["a",\n]'))
    with pytest.raises(ValueError, match=r"l.json is not valid JSON: it is nested too deeply"):
        text.read_json(write(path, b"[" * 100_000))


def test_control_characters_and_halves_are_replaced_and_white_space_kept():
    every = "".join(map(chr, range(0x3000)))
    assert text.clean(every) == every.translate(CONTROL)
    assert text.clean("a\0b\ud83d\x1b[0m \t\n\x85") == "a\ufffdb\ufffd\ufffd[0m \t\n\x85"


def test_captions_beside_images():
    assert text.read_caption(b"\xef\xbb\xbfa\rdog\r\n", "a.txt") == "a\rdog\n"
    with pytest.raises(text.BadText, match="a.txt is not UTF-8") as caught:
        text.read_caption(b"caf\xe9", "a.txt")
    assert caught.value.reason == "caption_not_utf8"
    with pytest.raises(text.BadText, match="a.txt is larger than 16 MiB") as caught:
        text.read_caption(b"x" * 30_000_000, "a.txt")
    assert caught.value.reason == "caption_too_long"
    assert text.check_caption("a" * 131_072, "a.txt") == "a" * 131_072
    assert text.check_caption("cut emoji \ud83d", "a.txt") == "cut emoji \ufffd"
    with pytest.raises(text.BadText, match="a caption of 140,000 characters; 131,072") as caught:
        text.check_caption("a" * 140_000, "a.txt")
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.reason == "caption_too_long" and str(again) == str(caught.value)


BROKEN = b"cat\ncaf\xe9\n"


def broken_labels(path):
    model_verbs._labels(str(path))


def broken_templates(path):
    templates.load_templates(str(path))


def broken_entries(path):
    metadata_entries.read_entries(path)


def broken_block_list(path):
    rules.domains(path, source="-")


def broken_classes(path):
    files._read_classes(str(path))


@pytest.mark.parametrize(
    "read", [broken_labels, broken_templates, broken_entries, broken_block_list, broken_classes]
)
def test_every_file_written_by_hand_is_opened_at_the_door(tmp_path, read):
    path = write(tmp_path / "mine.txt", BROKEN)
    with pytest.raises(ValueError, match=r"mine.txt:2 is not UTF-8: byte 0xe9"):
        read(path)


def test_no_first_line_keeps_its_byte_order_mark(tmp_path):
    bom = "\ufeff".encode()
    labels = write(tmp_path / "labels.txt", bom + b"cat\r\ndog\r\n")
    assert model_verbs._labels(str(labels)) == ["cat", "dog"]
    prompts = write(tmp_path / "prompts.txt", bom + b"a {}\r\n")
    assert templates.load_templates(str(prompts)) == ("a {}",)
    prompts = write(tmp_path / "prompts.json", bom + b'["a {c}"]')
    assert templates.load_templates(str(prompts)) == ("a {}",)
    listed = write(tmp_path / "domains.txt", bom + b"bad.com\r\n# no\nworse.org # yes\n")
    assert rules._listed(listed) == ["bad.com", "worse.org"]
    config = "from align_jax.config import default_config as get_config\r\n"
    config = write(tmp_path / "config.py", bom + config.encode())
    assert load_config(str(config), []).train.batch_size
    classes = write(tmp_path / "classes.tsv", bom + b"0\tn01\tcat\r\n1\tn02\tdog\r\n")
    assert files._read_classes(str(classes)) == (("cat", "dog"), {"n01": 0, "n02": 1})
