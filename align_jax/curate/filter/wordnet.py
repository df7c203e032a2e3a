"""Words of a text that are synsets of WordNet, as NLTK finds them: DataComp's text-based filter.

Source: Gadre et al. 2023 (2304.14108), baselines `text_based`: a text stays if the first synset of
one of its words is among the 21,841 of ImageNet. Looking words up follows NLTK's
WordNetCorpusReader: nouns, verbs, adjectives, adverbs in this order; exceptions, then endings
(Miller 1995, morphy).
"""

import functools
import os
import re
from pathlib import Path

from align_jax.storage.text import read_lines

_PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
# Endings and what takes their place, of WordNet's morphy.
_ENDINGS = {
    "noun": [
        ("s", ""),
        ("ses", "s"),
        ("ves", "f"),
        ("xes", "x"),
        ("zes", "z"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("men", "man"),
        ("ies", "y"),
    ],
    "verb": [
        ("s", ""),
        ("ies", "y"),
        ("es", "e"),
        ("es", ""),
        ("ed", "e"),
        ("ed", ""),
        ("ing", "e"),
        ("ing", ""),
    ],
    "adj": [("er", ""), ("est", ""), ("er", "e"), ("est", "e")],
    "adv": [],
}
_WNID = re.compile(r"n?(\d{8})")


class WordNet:
    """The first synset of words; `first_synset` is its offset, as ImageNet's wnids have it."""

    def __init__(self, folder: str | os.PathLike):
        """Reads index.* and *.exc of WordNet's folder.

        Raises:
          ValueError: a file is missing.
        """
        self._first: dict[str, dict[str, int]] = {}
        self._exceptions: dict[str, dict[str, list[str]]] = {}
        for part in _PARTS_OF_SPEECH:
            lines = (line for line in _lines(folder, f"index.{part}") if line[:1] not in ("", " "))
            self._first[part] = dict(map(_parse_index, lines))
            exceptions = (line.split() for line in _lines(folder, f"{part}.exc") if line.strip())
            self._exceptions[part] = {word: forms for word, *forms in exceptions}
        self.first_synset = functools.lru_cache(1 << 20)(self._first_synset)

    def _first_synset(self, word: str) -> int | None:
        word = word.lower()
        for part in _PARTS_OF_SPEECH:
            for form in self._forms(word, part):
                return self._first[part][form]
        return None

    def _forms(self, word: str, part: str) -> list[str]:
        known = self._first[part]
        if word in self._exceptions[part]:
            return [form for form in (word, *self._exceptions[part][word]) if form in known]
        forms = self._without_endings([word], part)
        found = [form for form in (word, *forms) if form in known]
        while not found and forms:
            forms = self._without_endings(forms, part)
            found = [form for form in forms if form in known]
        return found

    @staticmethod
    def _without_endings(forms: list[str], part: str) -> list[str]:
        return [
            form[: -len(end)] + new
            for form in forms
            for end, new in _ENDINGS[part]
            if form.endswith(end)
        ]


@functools.lru_cache(2)
def open_wordnet(folder: str) -> WordNet:
    """Returns the WordNet of a folder, once a process."""
    return WordNet(folder)


def read_wnids(path: str | os.PathLike) -> frozenset[int]:
    """Returns the offsets of a file of wnids such as n01440764, one a line.

    Raises:
      ValueError: a line is none, or there is no line.
    """
    offsets = set()
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            found = _WNID.fullmatch(line.split()[0])
            if found is None:
                raise ValueError(f"{path}:{number}: {line[:40]!r} is no wnid such as n01440764.")
            offsets.add(int(found[1]))
    if not offsets:
        raise ValueError(f"{path} holds no wnid.")
    return frozenset(offsets)


def _lines(folder: str | os.PathLike, name: str) -> list[str]:
    path = Path(folder) / name
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; name the folder of WordNet's index.* and *.exc files."
        )
    return read_lines(path)


def _parse_index(line: str) -> tuple[str, int]:
    # lemma pos synsets pointers symbol... senses tagged offset...
    fields = line.split()
    return fields[0], int(fields[-int(fields[2])])
