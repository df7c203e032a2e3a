"""The one door to text that users wrote: encoding, line ends, broken characters, limits.

UTF-8, with or without a byte order mark. Lines end at \\n or \\r\\n; a lone \\r is white space.
Lone surrogates and control characters that are no white space (NUL, ESC ...) become U+FFFD, which
tokenizers leave out.

Two kinds of files. What is written by hand (labels, templates, block lists) must be right: an error
names file and line. What comes in bulk (tables, lists of texts, captions beside images) is read
on: bytes that are no UTF-8 become U+FFFD and the reader counts the rows in which that happened.
"""

import json
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

MAX_CAPTION_CHARS = 2**17  # a caption that is longer is a page, or an unclosed quote
MAX_LINE_BYTES = 2**24  # of bulk files, and of a file of captions beside an image
MAX_FILE_BYTES = 2**30  # of files written by hand
_BLOCK_BYTES = 2**22

_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
# \t to \r, \x1c to \x1f and \x85 are white space.
ODD_CHARACTERS = "[\\x00-\\x08\\x0e-\\x1b\\x7f-\\x84\\x86-\\x9f]"
_SURROGATE = re.compile("[\ud800-\udfff]")
_ODD = re.compile(f"{ODD_CHARACTERS}|{_SURROGATE.pattern}")
_ODD_ASCII = bytes(number for number in range(128) if _ODD.match(chr(number)))
_ODD_IN_UTF8 = re.compile(rb"\xc2[\x80-\x84\x86-\x9f]")


class BadText(OSError):
    """A caption that cannot be used.

    Attributes:
      reason: `caption_too_long` or `caption_not_utf8`.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["BadText"], tuple[str, ...]]:
        return type(self), (self.reason, *self.args)


class Block(NamedTuple):
    """Some lines of a bulk file.

    Attributes:
      first: number of the first line, from 1.
      lines: without their ends.
      repaired: positions of lines whose bytes were no UTF-8, or control characters.
      too_long: positions of lines of more than MAX_LINE_BYTES, of which only the start is here.
      num_bytes: of the file, up to the end of the block since the end of the last one.
    """

    first: int
    lines: list[str]
    repaired: frozenset[int]
    too_long: frozenset[int]
    num_bytes: int


def clean_halves(text: str) -> str:
    """Returns the text with U+FFFD for each lone surrogate."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def clean(text: str) -> str:
    """Returns the text with U+FFFD for each lone surrogate and odd control character."""
    return text if text.isprintable() else _ODD.sub("\ufffd", text)


def clean_json(content: object) -> object:
    """Returns JSON content with all its strings cleaned."""
    if isinstance(content, str):
        return clean(content)
    if isinstance(content, list):
        return [clean_json(item) for item in content]
    if isinstance(content, dict):
        return {clean(name): clean_json(value) for name, value in content.items()}
    return content


def read_text(path: str | os.PathLike) -> str:
    """Returns the text of a file written by hand, lines ended by \\n.

    Raises:
      ValueError: bytes that are no UTF-8, with the line; more than MAX_FILE_BYTES.
      OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB.")
    _check_utf16(path, data)
    data = data.removeprefix(_BOM)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line} is not UTF-8: byte 0x{data[error.start]:02x}; save the file as UTF-8."
        ) from None
    return text.replace("\r\n", "\n")


def read_lines(path: str | os.PathLike) -> list[str]:
    """Returns the lines of a file written by hand, see read_text; [] if it is empty."""
    lines = read_text(path).split("\n")
    return lines if lines[-1] else lines[:-1]


def read_json(path: str | os.PathLike) -> object:
    """Returns the content of a JSON file written by hand, see read_text.

    Raises:
      ValueError: also where it is no JSON, with the line.
    """
    try:
        return clean_json(json.loads(read_text(path)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply.") from None


def read_caption(data: bytes, name: str) -> str:
    """Returns the text of a file beside an image.

    Args:
      data: what the file holds.
      name: of the file, for the message.

    Raises:
      BadText: it is no UTF-8, or larger than MAX_LINE_BYTES.
    """
    if len(data) > MAX_LINE_BYTES:
        raise BadText("caption_too_long", f"{name} is larger than {MAX_LINE_BYTES >> 20} MiB.")
    try:
        return data.removeprefix(_BOM).decode().replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise BadText("caption_not_utf8", f"{name} is not UTF-8.") from None


def check_caption(caption: str, name: str) -> str:
    """Returns a caption, cleaned.

    Raises:
      BadText: it has more than MAX_CAPTION_CHARS.
    """
    if len(caption) > MAX_CAPTION_CHARS:
        raise BadText(
            "caption_too_long",
            f"{name}: a caption of {len(caption):,} characters; {MAX_CAPTION_CHARS:,} are allowed.",
        )
    return clean(caption)


def read_bulk(path: str | os.PathLike) -> tuple[str, bool]:
    """Returns the text of a bulk file that is read whole, and whether bytes were no UTF-8.

    Raises:
      ValueError: the file is UTF-16.
      OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read()
    _check_utf16(path, data)
    data = data.removeprefix(_BOM)
    content = clean(data.decode("utf-8", "replace"))
    return content, content.encode() != data


def read_blocks(path: str | os.PathLike) -> Iterator[Block]:
    """Yields the lines of a bulk file, a few MiB at a time.

    Raises:
      ValueError: the file is UTF-16.
      OSError: it cannot be read.
    """
    number, rest, num_bytes = 1, b"", 0
    with open(path, "rb") as file:
        while data := file.read(_BLOCK_BYTES):
            if not num_bytes and number == 1:
                _check_utf16(path, data)
                num_bytes += len(_BOM) * data.startswith(_BOM)
                data = data.removeprefix(_BOM)
            num_bytes += len(data)
            end = data.rfind(b"\n") + 1
            if end:
                block = _decode(number, rest + data[:end], num_bytes)
                yield block
                number, rest, num_bytes = number + len(block.lines), data[end:], 0
            elif len(rest) <= MAX_LINE_BYTES:  # else its start is enough
                rest += data
    if rest:
        yield _decode(number, rest, num_bytes)


def check_line_ends(path: str | os.PathLike, first: Block) -> None:
    """Raises ValueError if the first block is one line that holds lone \\r, meant to end lines."""
    if first.first == len(first.lines) == 1 and "\r" in first.lines[0].rstrip("\r"):
        raise ValueError(f"{path}: its lines end in \\r alone; save it with \\n or \\r\\n.")


def _decode(first: int, data: bytes, num_bytes: int) -> Block:
    repaired, too_long = [], []
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError:
        raw = data.split(b"\n")
        lines = [line.decode("utf-8", "replace") for line in raw]
        repaired = [i for i, line in enumerate(lines) if line.encode() != raw[i]]
    if not lines[-1]:
        lines.pop()
    if _holds_odd(data):
        cleaned = [clean(line) for line in lines]
        repaired += [i for i, line in enumerate(lines) if cleaned[i] != line]
        lines = cleaned
    if b"\r" in data:
        lines = [line[:-1] if line.endswith("\r") else line for line in lines]
    if len(data) > MAX_LINE_BYTES:
        too_long = [i for i, line in enumerate(lines) if len(line.encode()) > MAX_LINE_BYTES]
        for i in too_long:
            lines[i] = lines[i][: MAX_CAPTION_CHARS + 1]  # too long for a caption, too
    return Block(first, lines, frozenset(repaired), frozenset(too_long), num_bytes)


def _holds_odd(data: bytes) -> bool:
    has_ascii = len(data.translate(None, _ODD_ASCII)) < len(data)
    return has_ascii or _ODD_IN_UTF8.search(data) is not None


def _check_utf16(path: str | os.PathLike, data: bytes) -> None:
    if data.startswith(_UTF16):
        raise ValueError(f"{path} is UTF-16, not UTF-8; save the file as UTF-8.")
