"""Learning WordPiece vocabularies: exact counts of words, then merges of the most frequent pieces.

Both are the same for any order of the captions, and memory does not grow with their number. The
trainer of the `tokenizers` library finds the same pieces (a test compares them), but counts pairs
in 32 bits, numbers letters at random and holds all words in memory.
"""

import heapq
import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from align_jax.storage import writing

_CAPTIONS_PER_BATCH = 1024
_MAX_CHUNKS = 2**21  # different ones in memory; about 0.4 GB
_MAX_WORDS = 2_000_000  # to learn from, the most frequent ones; 0.7 M took 0.8 GB in all
_MIN_FREQUENCY = 2  # a piece seen once helps nobody
# BERT's clean-up removes them or lets them be; str.split takes them for white space.
_NO_SPACE = "\x0b\x0c\x1c\x1d\x1e\x1f\x85"

Progress = Callable[[Iterator[int], int, str, str], Iterable[int]]


def no_progress(items: Iterator[int], total: int, title: str, unit: str) -> Iterable[int]:
    """Returns the items: the Progress that shows nothing."""
    return items


def count_words(captions: Iterable[str], split: Callable[[str], list[str]]) -> dict[str, int]:
    """Returns how often each word occurs, of the two million most frequent words.

    Words that are as frequent as the first one left out are left out, too, so that the order of
    the captions does not matter. Counts that do not fit into memory go through temporary files.

    Args:
      captions: read once.
      split: white-space-free text -> its words; called once or a few times for each different one.
    """
    with tempfile.TemporaryDirectory(prefix="align_words_") as folder:
        runs, words = _count(captions, split, folder)
        if not runs:
            least = _least_count(words.values())
            return {word: count for word, count in words.items() if count >= least}
        runs.append(os.path.join(folder, "last"))
        _write_run(runs[-1], words)
        words.clear()
        return merge_counts(runs)


def write_counts(
    captions: Iterable[str], split: Callable[[str], list[str]], path: str | os.PathLike
) -> None:
    """Writes how often each word occurs, all words in their order, for `merge_counts`.

    Args:
      captions: read once.
      split: see `count_words`.
      path: of the file, which appears when it is complete.
    """
    with tempfile.TemporaryDirectory(prefix="align_words_") as folder:
        runs, words = _count(captions, split, folder)
        with writing.replacing(path) as temporary:
            if not runs:
                _write_run(str(temporary), words)
                return
            runs.append(os.path.join(folder, "last"))
            _write_run(runs[-1], words)
            words.clear()
            with open(temporary, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(f"{word}\t{count}\n" for word, count in _merge_runs(runs))


def merge_counts(paths: Sequence[str]) -> dict[str, int]:
    """Returns what `count_words` does, of files of `write_counts`."""
    least = _least_count(count for _, count in _merge_runs(paths))
    return {word: count for word, count in _merge_runs(paths) if count >= least}


def _count(
    captions: Iterable[str], split: Callable[[str], list[str]], folder: str
) -> tuple[list[str], Counter[str]]:
    """Files of counts in `folder`, and the counts of the words that are in none of them."""
    runs: list[str] = []
    chunks: Counter[str] = Counter()
    for batch in _batched(captions, _CAPTIONS_PER_BATCH):
        text = " ".join(batch)
        for mark in _NO_SPACE:
            text = text.replace(mark, "")
        chunks.update(text.split())
        if len(chunks) > _MAX_CHUNKS:
            runs.append(os.path.join(folder, str(len(runs))))
            _write_run(runs[-1], _split_chunks(chunks, split))
            chunks.clear()
    return runs, _split_chunks(chunks, split)


def learn_pieces(
    counts: Mapping[str, int],
    vocab_size: int,
    special_tokens: Sequence[str],
    progress: Progress = no_progress,
) -> list[str]:
    """Returns the vocabulary: special tokens, characters ("##" before those inside), merged pieces.

    Of a word, neighbouring pieces are merged, the pair that occurs most often first; of equally
    frequent ones the pair whose pieces joined the vocabulary earlier. Smaller than `vocab_size`
    where no pair is left that occurs twice.

    Args:
      counts: word -> how often it occurs.
      vocab_size: the most frequent characters take at most a quarter of it.
      special_tokens: come first.
      progress: wraps (items, total, title, unit), e.g. in a progress bar.
    """
    alphabet, inner = _alphabet(counts, vocab_size // 4)
    tokens = [*special_tokens, *(f"##{character}" for character in inner), *alphabet]
    merges = _merge_pieces(_Pieces(counts, tokens), tokens, vocab_size)
    for _ in progress(merges, max(vocab_size - len(tokens), 0), "learn wordpieces", "wordpiece"):
        pass
    return tokens


def _batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def _split_chunks(chunks: Mapping[str, int], split: Callable[[str], Iterable[str]]) -> Counter[str]:
    """Returns the count of each word, each chunk being there that often."""
    words: Counter[str] = Counter()
    for chunk, count in chunks.items():
        # A lone half of a surrogate pair, as JSON may hold, is no text to the tokenizer.
        for word in split(chunk.encode("utf-8", "replace").decode()):
            words[word] += count
    return words


def _write_run(path: str, words: Mapping[str, int]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{word}\t{words[word]}\n" for word in sorted(words))


def _merge_runs(paths: Iterable[str]) -> Iterator[tuple[str, int]]:
    """(word, total) of all runs, in the order of the words."""
    merged = heapq.merge(*map(_read_run, paths), key=lambda row: row[0])
    for word, rows in itertools.groupby(merged, key=lambda row: row[0]):
        yield word, sum(count for _, count in rows)


def _read_run(path: str) -> Iterator[tuple[str, int]]:
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            word, _, count = line.partition("\t")
            yield word, int(count)


def _least_count(counts: Iterable[int]) -> int:
    """The smallest count of which no more than _MAX_WORDS words are left."""
    left = 0
    least = 1
    for count, num_words in sorted(Counter(counts).items(), reverse=True):
        left += num_words
        if left > _MAX_WORDS:
            return least
        least = count
    return 1


def _alphabet(counts: Mapping[str, int], limit: int) -> tuple[list[str], list[str]]:
    """The `limit` most frequent characters, and those of them that occur inside a word; sorted."""
    characters: Counter[str] = Counter()
    inside = set()
    for word, count in counts.items():
        for character in word:
            characters[character] += count
        inside.update(word[1:])
    alphabet = sorted(characters, key=lambda c: (-characters[c], c))[:limit]
    return sorted(alphabet), sorted(inside.intersection(alphabet))


class _Pieces:
    """All words as one row of piece ids, linked within a word, and where each pair of ids occurs.

    Position `end` stands for the outside of a word: its id is -1. So do positions that were merged
    into their left neighbour.
    """

    def __init__(self, counts: Mapping[str, int], tokens: Sequence[str]):
        ids = {token: index for index, token in enumerate(tokens)}
        words = sorted(counts)
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        codes = np.frombuffer("".join(words).encode("utf-32-le"), np.uint32)
        known, codes = np.unique(codes, return_inverse=True)
        word = np.repeat(np.arange(len(words), dtype=np.int32), lengths)
        inside = np.r_[False, word[1:] == word[:-1]]
        first_ids, inner_ids = (
            np.array([ids.get(prefix + chr(code), -1) for code in known], np.int32)
            for prefix in ("", "##")
        )
        piece = np.where(inside, inner_ids[codes], first_ids[codes])
        usable = piece >= 0  # others are no part of the vocabulary: the word does without them
        word = word[usable]
        self.end = len(word)
        self.weight = np.fromiter(map(counts.__getitem__, words), np.int64, len(words))
        self.word = word
        self.piece = np.r_[piece[usable], np.int32(-1)]
        same = word[1:] == word[:-1]
        right = np.arange(1, self.end + 1, dtype=np.int32)
        left = right - 2
        right[np.r_[~same, True]] = self.end
        left[np.r_[True, ~same]] = self.end
        self.right = np.append(right, np.int32(self.end))
        self.left = np.append(left, np.int32(self.end))
        self.counts: dict[int, int] = {}
        self.places: dict[int, list[np.ndarray]] = {}
        self.heap: list[tuple[int, int]] = []
        self._is_second = np.zeros(self.end + 1, bool)
        self._add(np.flatnonzero(self.right[:-1] < self.end).astype(np.int32))

    def pop(self) -> int | None:
        """The most frequent pair; None if none occurs often enough."""
        # The heap holds each pair with its count or more, and perhaps with smaller ones.
        while self.heap:
            negative, pair = heapq.heappop(self.heap)
            count = self.counts.get(pair, 0)
            if -negative == count:
                return pair
            if -negative > count >= _MIN_FREQUENCY:
                heapq.heappush(self.heap, (-count, pair))
        return None

    def merge(self, pair: int, new: int) -> None:
        """Makes one piece `new` of every occurrence of a pair."""
        first, second = self._find(pair)
        left, right = self.left[first], self.right[second]
        self._is_second[second] = True
        left = left[(left < self.end) & ~self._is_second[left]]
        self._is_second[second] = False
        followed = right < self.end
        self._remove(np.concatenate([left, first, second[followed]]))
        self.piece[first] = new
        self.piece[second] = -1
        self.right[first] = right
        self.left[right] = first
        self._add(np.concatenate([left, first[followed]]))

    def _find(self, pair: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the first and of the second piece of every occurrence."""
        # No place is there twice: pieces only grow, so none comes back to a pair it has left.
        first = np.concatenate(self.places.pop(pair))
        a, b = pair >> 32, pair & 0xFFFFFFFF
        first = first[(self.piece[first] == a) & (self.piece[self.right[first]] == b)]
        if a == b and len(first):  # of a a a, the first two
            first = np.sort(first)
            index = np.arange(len(first))
            overlaps = np.r_[False, self.right[first[:-1]] == first[1:]]
            since = index - np.maximum.accumulate(np.where(overlaps, 0, index))
            first = first[since % 2 == 0]
        return first, self.right[first]

    def _pairs(self, positions: np.ndarray) -> np.ndarray:
        """int64 [N]: ids of the piece there, in the high half, and of the one right of it."""
        return self.piece[positions].astype(np.int64) << 32 | self.piece[self.right[positions]]

    def _remove(self, positions: np.ndarray) -> None:
        pairs, inverse = np.unique(self._pairs(positions), return_inverse=True)
        lost = np.zeros(len(pairs), np.int64)
        np.add.at(lost, inverse, self.weight[self.word[positions]])
        for pair, count in zip(pairs.tolist(), lost.tolist(), strict=True):
            left = self.counts[pair] - count
            if left:
                self.counts[pair] = left
            else:
                del self.counts[pair]
                self.places.pop(pair, None)

    def _add(self, positions: np.ndarray) -> None:
        if not len(positions):
            return
        pairs = self._pairs(positions)
        order = np.argsort(pairs, kind="stable")
        pairs, positions = pairs[order], positions[order]
        starts = np.flatnonzero(np.r_[True, pairs[1:] != pairs[:-1]])
        gained = np.add.reduceat(self.weight[self.word[positions]], starts).tolist()
        ends = [*starts[1:].tolist(), len(pairs)]
        for pair, start, end, count in zip(
            pairs[starts].tolist(), starts.tolist(), ends, gained, strict=True
        ):
            self.counts[pair] = count = self.counts.get(pair, 0) + count
            self.places.setdefault(pair, []).append(positions[start:end])
            if count >= _MIN_FREQUENCY:
                heapq.heappush(self.heap, (-count, pair))


def _merge_pieces(pieces: _Pieces, tokens: list[str], vocab_size: int) -> Iterator[int]:
    """Appends to `tokens`; yields its new length each time."""
    ids = {token: index for index, token in enumerate(tokens)}
    while len(tokens) < vocab_size and (pair := pieces.pop()) is not None:
        token = tokens[pair >> 32] + tokens[pair & 0xFFFFFFFF].removeprefix("##")
        new = ids.setdefault(token, len(tokens))
        pieces.merge(pair, new)
        if new == len(tokens):  # else pieces of another cut have made it already
            tokens.append(token)
            yield new
