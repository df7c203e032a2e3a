"""Unigrams of scripts that are written without spaces between words.

Chinese, Japanese, Thai, Lao, Khmer, Burmese and Tibetan texts are divided at the word boundaries of
Unicode's annex 29 as ICU finds them, with its dictionaries; ICU comes with the package icu4py.
Without it they count by white space, which the report of a curation says with their number.
"""

import importlib.metadata
import importlib.util
import re

import pyarrow as pa
import pyarrow.compute as pc

# The blocks that such texts are written in; Tibetan is divided at its syllables. Characters as they
# are, a class of Python and of RE2.
_BLOCKS = (
    (0x0E00, 0x109F),  # Thai, Lao, Tibetan, Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x2FDF),  # radicals of ideographs
    (0x3005, 0x3007),  # ideographic iteration, closing and zero
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),  # phonetic Katakana
    (0x3400, 0x4DBF),  # ideographs: extension A
    (0x4E00, 0x9FFF),  # ideographs
    (0xA9E0, 0xA9FF),  # Myanmar: extension B
    (0xAA60, 0xAA7F),  # Myanmar: extension A
    (0xF900, 0xFAFF),  # ideographs: compatibility
    (0xFF66, 0xFF9F),  # Katakana of half width
    (0x1AFF0, 0x1B16F),  # Kana: extensions
    (0x20000, 0x323AF),  # ideographs: extensions B to H
)
_UNSPACED = "[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in _BLOCKS) + "]"
_is_unspaced = re.compile(_UNSPACED).match


def are_unspaced(texts: pa.Array) -> pa.BooleanArray:
    """Returns which texts hold a character of a script without spaces between words."""
    return pc.match_substring_regex(texts, _UNSPACED)


def segmenter() -> str | None:
    """Returns what finds the words of such texts, with its version; None if it is not installed."""
    if importlib.util.find_spec("icu4py") is None:
        return None
    import icu4py

    return f"ICU {icu4py.icu_version} (icu4py {importlib.metadata.version('icu4py')})"


def divide(texts: pa.Array) -> pa.Array:
    """Returns texts with a single space between their unigrams.

    Parts between white space stay as they are but for boundaries of words with a character of a
    script without spaces on either side; what is neither letter nor digit stays with the word
    before it, or with the first word.

    Args:
      texts: strings with white space single, none at either end.

    Source: Unicode Standard Annex 29, "Unicode Text Segmentation", as ICU implements it.
    """
    if segmenter() is None:
        return texts
    unspaced = are_unspaced(texts)
    if not pc.any(unspaced).as_py():
        return texts
    divided = [_divide(text) for text in pc.filter(texts, unspaced).to_pylist()]
    return pc.replace_with_mask(texts, unspaced, pa.array(divided, texts.type))


def _divide(text: str) -> str:
    from icu4py.breakers import WordBreaker

    parts, word = [], ""  # the last word since a space
    for part in WordBreaker(text, ""):  # the root locale: all scripts and dictionaries
        if part == " ":
            word = ""
        elif any(map(str.isalnum, part)):
            if word and (_is_unspaced(part) or _is_unspaced(word[-1])):
                parts.append(" ")
            word = part
        parts.append(part)
    return "".join(parts)
