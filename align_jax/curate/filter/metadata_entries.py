"""Metadata entries for MetaCLIP curation: read from a file, or built of WordNet and Wikipedia.

    entries = build_entries(wordnet_dir="/usr/share/wordnet", unigrams="unigrams.tsv")
    pathlib.Path("entries.txt").write_text("".join(f"{entry}\\n" for entry in entries))

WordNet's files come with Debian's wordnet-base or from wordnet.princeton.edu. Matching them with
texts is in metaclip.py. Source: Xu et al. 2023 (2309.16671) section 3.1 and table 1.
"""

import itertools
import math
import os
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from align_jax.storage.text import read_blocks, read_json, read_lines

_PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
_MIN_UNIGRAM_COUNT = 100
_MIN_BIGRAM_PMI = 30
_MIN_PAGE_VIEWS = 70
_MIN_HOURLY_VIEWS = 50


def read_entries(path: str | os.PathLike, *, log: Callable[[str], None] = print) -> tuple[str, ...]:
    """Returns the entries of a file in its order, each once.

    Args:
      path: UTF-8; a JSON list of strings if its name ends in .json, else one entry a line, without
        the spaces around it.
      log: told in one line how many blank and repeated entries were left out, if any.

    Raises:
      ValueError: the file is not of its format, or holds no entry.
    """
    path = Path(path)
    is_json = path.suffix.lower() == ".json"
    given = read_json(path) if is_json else [line.strip() for line in read_lines(path)]
    if not isinstance(given, list) or not all(isinstance(entry, str) for entry in given):
        raise ValueError(f"{path} must hold one JSON list of strings, the metadata entries.")
    kept = [entry for entry in given if entry.strip()]
    entries = tuple(dict.fromkeys(kept))
    if not entries:
        raise ValueError(f"{path} holds no metadata entry.")
    if len(entries) < len(given):
        log(
            f"{path}: left out {len(given) - len(kept)} blank and {len(kept) - len(entries)} "
            f"repeated metadata entries; {len(entries)} remain"
        )
    return entries


def read_languages(
    folder: str | os.PathLike, *, log: Callable[[str], None] = print
) -> dict[str, tuple[str, ...]]:
    """Returns language -> entries of a folder of files such as en.txt and de.json.

    Raises:
      ValueError: no such file, or one that `read_entries` refuses.
    """
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix in (".txt", ".json"))
    if not paths:
        raise ValueError(f"{folder} holds no files of entries such as en.txt.")
    return {path.stem: read_entries(path, log=log) for path in paths}


def build_entries(
    *,
    wordnet_dir: str | os.PathLike | None = None,
    unigrams: str | os.PathLike | None = None,
    bigrams: str | os.PathLike | None = None,
    page_views: str | os.PathLike | None = None,
    budget: int = 500_000,
) -> tuple[str, ...]:
    """Returns at most `budget` distinct entries: numbers, then of each source given, in this order.

    "0" to "99"; the first word of each WordNet synset, lower case, up to its first "."; unigrams
    of a count of at least 100; bigrams of a PMI of at least 30; page titles without ":" of at least
    70 views. Of one table, the highest come first. Single punctuation marks are left out.

    Args:
      wordnet_dir: folder with data.noun, data.verb, data.adj and data.adv.
      unigrams: TSV of word and count in the corpus (English Wikipedia). All words: PMI needs the
        total, and a count of both words of a bigram.
      bigrams: TSV of "word word" and count in the same corpus; needs `unigrams`.
      page_views: TSV of title and views; see `sum_page_views`.
      budget: number of entries at which to stop.

    Raises:
      ValueError: a file that is missing or not of its format, or a word that no unigram counts.
    """
    if bigrams is not None and unigrams is None:
        raise ValueError("Bigrams need the counts of their words; give unigrams, too.")
    counts = dict(_read_counts(unigrams)) if unigrams is not None else {}
    sources = [map(str, range(100))]
    if wordnet_dir is not None:
        sources.append(_wordnet_names(Path(wordnet_dir)))
    sources.append(_descending(counts.items(), _MIN_UNIGRAM_COUNT))
    if bigrams is not None:
        sources.append(_descending(_score_bigrams(bigrams, counts), _MIN_BIGRAM_PMI))
    if page_views is not None:
        titles = ((t.replace("_", " "), n) for t, n in _read_counts(page_views) if ":" not in t)
        sources.append(_descending(titles, _MIN_PAGE_VIEWS))
    usable = (entry for entry in itertools.chain(*sources) if _is_usable(entry))
    entries: dict[str, None] = {}
    for entry in usable:
        if len(entries) == budget:
            break
        entries[entry] = None
    return tuple(entries)


def pmi(num_xy: int, num_x: int, num_y: int, num_words: int) -> float:
    """Returns the pointwise mutual information of two words in bits, as NLTK computes it.

    Args:
      num_xy: how often y follows x.
      num_x: how often x occurs.
      num_y: how often y occurs.
      num_words: words of the corpus.
    """
    return math.log2(num_xy * num_words) - math.log2(num_x * num_y)


def sum_page_views(lines: Iterable[str], *, domain: str = "en") -> dict[str, int]:
    """Returns title -> views of the hourly files of dumps.wikimedia.org/other/pageviews.

    Args:
      lines: "en Title_of_page 123 0" of all files; MetaCLIP took 26 days of 24. Counts of less
        than 50 views an hour are passed over, as are lines of another form.
      domain: first word of the lines that count.
    """
    views: dict[str, int] = {}
    for line in lines:
        fields = line.split(" ")
        if len(fields) == 4 and fields[0] == domain and fields[2].isdecimal():
            if int(fields[2]) >= _MIN_HOURLY_VIEWS:
                views[fields[1]] = views.get(fields[1], 0) + int(fields[2])
    return views


def _is_usable(entry: str) -> bool:
    return bool(entry.strip()) and not (len(entry) == 1 and entry in string.punctuation)


def _wordnet_names(folder: Path) -> Iterator[str]:
    for part in _PARTS_OF_SPEECH:
        path = folder / f"data.{part}"
        if not path.is_file():
            raise ValueError(f"{path} does not exist; name the folder of WordNet's data.* files.")
        for number, line in enumerate(read_lines(path), 1):
            if line.startswith(" "):  # the licence
                continue
            fields = line.split(" ", 5)  # offset, file, type, number of words, first word
            if len(fields) < 6 or not fields[0].isdecimal():
                raise ValueError(f"{path}:{number} is no synset of WordNet: {line[:40]!r}.")
            name = fields[4].split("(")[0].lower()  # adjectives: "galore(ip)"
            yield name.split(".")[0].replace("_", " ")


def _read_counts(path: str | os.PathLike) -> Iterator[tuple[str, int]]:
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; name a TSV file of text and count.")
    for block in read_blocks(path):
        for number, line in enumerate(block.lines, block.first):
            text, _, count = line.rpartition("\t")
            if not text or not count.isdecimal():
                raise ValueError(f"{path}:{number} is not a text, a tab and a count: {line[:40]!r}")
            yield text, int(count)


def _score_bigrams(
    path: str | os.PathLike, counts: Mapping[str, int]
) -> Iterator[tuple[str, float]]:
    num_words = sum(counts.values())
    for bigram, count in _read_counts(path):
        words = bigram.split(" ")
        if len(words) != 2:
            raise ValueError(f"{path}: {bigram!r} is no pair of words with one space between.")
        for word in words:
            if not counts.get(word):
                raise ValueError(f"{path}: {word!r} of {bigram!r} is not among the unigrams.")
        if count:
            yield bigram, pmi(count, counts[words[0]], counts[words[1]], num_words)


def _descending(scored: Iterable[tuple[str, float]], least: float) -> Iterator[str]:
    """Texts that score at least `least`, the highest first, ties in the order of the text."""
    kept = [(-score, text) for text, score in scored if score >= least]
    return (text for _, text in sorted(kept))
