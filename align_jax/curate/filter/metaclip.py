"""MetaCLIP curation: texts that hold a metadata entry, sampled so that no entry dominates.

    matches = match_entries(batches, entries, stage_dir)   # pass 1: the slow one, resumes by part
    for batch in matches.sample(cap, seed): ...            # pass 2: key, keep, reason

`keep_table` does both. Where entries come from is in metadata_entries.py. Source: Xu et al. 2023
(2309.16671) algorithm 1 and its released code; Chuang et al. 2025 (2507.22062) for `choose_cap` and
for entries, counts and caps of each language.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from align_jax.run.progress import show_progress
from align_jax.storage import writing

_ROWS_PER_PART = 2**18
_ROWS_PER_SEARCH = 2**10  # a half faster than 2**14: lists of matches stay small
_FORMAT = "2"  # of the parts; change it when matching changes
_LINE_BREAKS = "\t\n\r"

# Entries, or those of each language.
Entries = Sequence[str] | Mapping[str, Sequence[str]]

_Search = Callable[[pa.RecordBatch], tuple[np.ndarray, np.ndarray]]


def keep_table(
    batches: Iterable[pa.RecordBatch],
    entries: Sequence[str],
    cap: int,
    seed: int,
    stage_dir: str | os.PathLike,
    num_threads: int | None = None,
) -> Iterator[pa.RecordBatch]:
    """Returns which rows MetaCLIP keeps: columns `key`, `keep` (bool) and `reason` (string).

    As many rows as were given, in their order; batch sizes differ. `reason` is "no_entry" (the text
    holds none of the entries), "not_sampled", or null where `keep` is true. All batches are read
    before this returns, since counts are those of the whole pool.

    Whether a row is kept depends on seed, its key, its text and the counts alone: not on the order
    of rows, their split into batches, the number of threads, or the order of the entries. Each text
    of a key has draws of its own; rows with the same key and text share one decision.

    Args:
      batches: columns `key` (string or integer) and `text` (string; a null holds no entry).
      entries: distinct, not empty; see metadata_entries.read_entries.
      cap: t of the paper, at least 1. An entry found in c texts is drawn with probability
        min(1, cap / c) in each; a row stays if one of its entries is drawn. 20,000 gave 400 M of
        1.6 B texts; for other pools see `choose_cap`.
      seed: 0 to 2**63 - 1.
      stage_dir: folder for what pass 1 finds. Parts in it are used again where the same rows and
        entries come again, so that a killed run resumes.
      num_threads: texts searched at the same time; None takes one a core.

    Raises:
      ValueError: an entry or argument that cannot be used, columns of other names or types.
      RuntimeError: the extra `curate` is not installed.
    """
    _check_sampling(cap, seed)
    return match_entries(batches, entries, stage_dir, num_threads).sample(cap, seed)


def match_entries(
    batches: Iterable[pa.RecordBatch],
    entries: Entries,
    stage_dir: str | os.PathLike,
    num_threads: int | None = None,
) -> "Matches":
    """Returns which entries each text holds, and how many texts hold each; arguments: `keep_table`.

    The text is put between spaces, each of , . ; : ? ! ` gets a space on either side, tabs and line
    breaks become spaces; an entry is held if it occurs there between spaces. Case counts. An entry
    counts once a text. Memory: 262,144 rows, and about 450 bytes an entry.

    With entries of each language, a text is looked through for those of its own, which a column
    `language` (string) names.
    """
    is_mapping = isinstance(entries, Mapping)
    groups = _by_language(entries)
    search = _make_search(groups)
    columns = ("key", "text", "language") if is_mapping else ("key", "text")
    of_language = {name: len(found) for name, found in groups.items()}
    entries = _flat(groups)
    stage_dir = Path(stage_dir)
    stage_dir.mkdir(parents=True, exist_ok=True)
    digest = hashlib.blake2b(_FORMAT.encode(), digest_size=16)
    for entry in entries:
        digest.update(entry.encode() + b"\n")
    counts = np.zeros(len(entries), np.uint64)
    parts, num_texts, num_unmatched = [], 0, 0
    tables = show_progress(_rechunk(batches, columns), None, "match entries", "text", size=len)
    with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
        for index, table in enumerate(tables):
            path = stage_dir / f"matches-{index:06d}.parquet"
            ids, offsets = _make_part(path, table, digest.copy(), search, pool)
            counts += np.bincount(ids, minlength=len(entries)).astype(np.uint64)
            num_texts += len(table)
            num_unmatched += int((np.diff(offsets) == 0).sum())
            parts.append(path)
    for stale in set(stage_dir.glob("matches-*.parquet")) - set(parts):
        stale.unlink()
    return Matches(tuple(entries), counts, num_texts, num_unmatched, tuple(parts), of_language)


def load_matches(
    entries: Entries, counts: np.ndarray, folder: str | os.PathLike | None = None
) -> "Matches":
    """Returns what `match_entries` has left in `folder`, with counts of a larger pool, uint64 [E].

    Without the numbers of texts; without parts where no folder is given.
    """
    groups = _by_language(entries)
    parts = tuple(sorted(Path(folder).glob("matches-*.parquet"))) if folder else ()
    of_language = {name: len(found) for name, found in groups.items()}
    return Matches(_flat(groups), counts, 0, 0, parts, of_language)


@dataclasses.dataclass(frozen=True)
class Matches:
    """What pass 1 found.

    Attributes:
      entries: as given; of several languages the language and a tab before each, by language.
      counts: uint64 [E], number of texts that hold each entry.
      num_texts: rows that were given.
      num_unmatched: rows without any entry.
      parts: Parquet files of `key`, `text_hash` (of the text alone) and `entries` (list of indices,
        ascending), in order.
      num_entries: language -> number of its entries; "" -> all.
    """

    entries: tuple[str, ...]
    counts: np.ndarray
    num_texts: int
    num_unmatched: int
    parts: tuple[Path, ...]
    num_entries: Mapping[str, int]

    def by_language(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields each language ("" for all) with the counts of its entries, uint64."""
        start = 0
        for name, size in self.num_entries.items():
            yield name, self.counts[start : start + size]
            start += size

    def sample(self, cap: int | Mapping[str, int], seed: int) -> Iterator[pa.RecordBatch]:
        """Yields what `keep_table` does; another cap or seed needs no new matching.

        Args:
          cap: of all entries, or language -> that of its entries.
          seed: see `keep_table`.
        """
        caps = cap if isinstance(cap, Mapping) else dict.fromkeys(self.num_entries, cap)
        for one in caps.values():
            _check_sampling(one, seed)
        draw_rates = np.concatenate(
            [caps[name] / np.maximum(found, caps[name]) for name, found in self.by_language()]
        )
        salt = seed.to_bytes(8, "little")
        entry_hashes = np.array([_hash(entry.encode(), salt) for entry in self.entries], np.uint64)
        for path in self.parts:
            table = pq.read_table(path)
            ids, offsets = _ids_and_offsets(table["entries"].combine_chunks())
            num_ids = np.diff(offsets)
            keys, texts = table["key"].cast("string").to_pylist(), table["text_hash"].to_pylist()
            row_hashes = np.fromiter(
                (
                    _hash(text.to_bytes(8, "little") + key.encode(), salt)
                    for key, text in zip(keys, texts, strict=True)
                ),
                np.uint64,
                len(table),
            )
            rows = np.repeat(np.arange(len(table)), num_ids)
            draws = row_hashes[rows] + entry_hashes[ids]
            # 53 bits: as many as a float64 in [0, 1) holds.
            drawn = (_mix(draws) >> np.uint64(11)) * 2.0**-53 < draw_rates[ids]
            keep = np.bincount(rows[drawn], minlength=len(table)) > 0
            reasons = np.where(num_ids == 0, "no_entry", "not_sampled")
            yield pa.record_batch(
                {
                    "key": table["key"].combine_chunks(),
                    "keep": pa.array(keep),
                    "reason": pa.array(reasons, pa.string(), mask=keep),
                }
            )


def choose_cap(counts: np.ndarray, tail_share: float) -> int:
    """Returns the cap t so that entries found at most t times have `tail_share` of all matches.

    The nearest share that the counts allow. MetaCLIP 2 keeps the share of its English pool for each
    other language and pool size.

    Args:
      counts: [E] number of texts that hold each entry.
      tail_share: in (0, 1]. MetaCLIP's 400 M English pairs: 0.055 (t = 20,000).

    Raises:
      ValueError: tail_share is out of range, or nothing was found.
    """
    if not 0 < tail_share <= 1:
        raise ValueError(f"tail_share={tail_share} must be above 0 and at most 1.")
    ascending = np.sort(np.asarray(counts, np.uint64))
    ascending = ascending[ascending > 0]
    if not len(ascending):
        raise ValueError("No text holds an entry, so there is no cap to choose; check the entries.")
    shares = np.cumsum(ascending) / ascending.sum()
    return int(ascending[np.abs(shares - tail_share).argmin()])


def choose_caps(matches: Matches, cap: int | None, tail_share: float | None) -> dict[str, int]:
    """Returns language -> cap ("" -> that of all entries), from either of the two arguments.

    With entries of several languages, `cap` is that of English ("en"): the share of English matches
    that it leaves to the tail is what the cap of each language leaves to its own. A language
    without any match has 1.

    Raises:
      ValueError: no entries of English, or none found, to take the share from.
    """
    counts = dict(matches.by_language())
    if tail_share is None:
        if "" in counts:
            return {"": cap}
        if "en" not in counts or not counts["en"].any():
            raise ValueError(
                f"cap {cap} is that of English, of which no entry was found; give --tail, the "
                "share of matches that belongs to the tail."
            )
        english = counts["en"]
        tail_share = float(english[english <= cap].sum() / english.sum())
        if not tail_share:
            raise ValueError(f"cap {cap} is below the count of every English entry; raise it.")
        chosen = {name: _cap_or_one(found, tail_share) for name, found in counts.items()}
        return chosen | {"en": cap}
    return {name: _cap_or_one(found, tail_share) for name, found in counts.items()}


def _cap_or_one(counts: np.ndarray, tail_share: float) -> int:
    return choose_cap(counts, tail_share) if counts.any() else 1


def _check_sampling(cap: int, seed: int) -> None:
    if cap < 1:
        raise ValueError(f"cap={cap} must be at least 1; MetaCLIP's 400 M pairs used 20000.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} must be 0 to 2**63 - 1.")


def _by_language(entries: Entries) -> dict[str, tuple[str, ...]]:
    """Language ("" where there is one list) -> entries, by language."""
    if not isinstance(entries, Mapping):
        return {"": _check_entries(entries)}
    return {name: _check_entries(entries[name]) for name in sorted(entries)}


def _flat(groups: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(
        f"{name}\t{entry}" if name else entry for name, found in groups.items() for entry in found
    )


def _check_entries(entries: Sequence[str]) -> tuple[str, ...]:
    entries = tuple(entries)
    if not entries:
        raise ValueError("There are no metadata entries.")
    if len(set(entries)) != len(entries):
        seen = set()
        repeated = next(entry for entry in entries if entry in seen or seen.add(entry))
        raise ValueError(f"Metadata entry {repeated!r} occurs more than once; keep one.")
    for entry in entries:
        if not entry.strip():
            raise ValueError(f"Metadata entry {entry!r} is blank; leave it out.")
        if any(mark in entry for mark in _LINE_BREAKS):
            raise ValueError(f"Metadata entry {entry!r} holds a tab or line break; use a space.")
    return entries


def _make_search(groups: Mapping[str, tuple[str, ...]]) -> _Search:
    """A function of rows [N] -> (ids of the entries of all rows [matches], how many a row [N])."""
    total = sum(map(len, groups.values()))
    searches, start = {}, 0
    for name, entries in groups.items():
        searches[name] = (start, _make_automaton(entries))
        start += len(entries)

    def search(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
        texts = batch["text"]
        pairs = [np.zeros(0, np.int64)]
        if "" in searches:
            places = {"": np.arange(len(texts))}
        else:
            found = np.array(batch["language"].to_pylist(), object)
            places = {name: np.flatnonzero(found == name) for name in set(found) & set(searches)}
        for name, rows in places.items():
            first, automaton = searches[name]
            ids, positions = automaton(texts.take(pa.array(rows)))
            pairs.append(rows[positions] * total + ids + first)
        pairs = np.unique(np.concatenate(pairs))  # once a text
        return pairs % total, np.bincount(pairs // total, minlength=len(texts))

    return search


@functools.lru_cache(512)
def _make_automaton(
    entries: tuple[str, ...],
) -> Callable[[pa.LargeStringArray], tuple[np.ndarray, np.ndarray]]:
    """A function of texts [N] -> (ids of entries, row of each), [matches]."""
    try:
        import ahocorasick_rs
    except ModuleNotFoundError as error:
        raise RuntimeError("MetaCLIP matching needs pip install 'align_jax[curate]'.") from error
    automaton = ahocorasick_rs.BytesAhoCorasick([f" {entry} ".encode() for entry in entries])

    def find(texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        spaced = _space(texts)
        starts = np.frombuffer(spaced.buffers()[1], np.int64)[: len(spaced) + 1]
        # All texts in one search: the line break that ends each is in no entry.
        found = automaton.find_matches_as_indexes(
            spaced.buffers()[2].to_pybytes()[: starts[-1]], overlapping=True
        )
        flat = np.fromiter(itertools.chain.from_iterable(found), np.int64, 3 * len(found))
        return flat[0::3], np.searchsorted(starts, flat[1::3], side="right") - 1

    return find


def _space(texts: pa.LargeStringArray) -> pa.LargeStringArray:
    """The texts with spaces around them and around , . ; : ? ! `, each ended by a line break."""
    texts = pc.fill_null(texts, "")
    texts = pc.replace_substring_regex(texts, r"([,.;:?!`])", r" \1 ")
    texts = pc.replace_substring_regex(texts, rf"[{_LINE_BREAKS}]", " ")
    between = pa.scalar("", pa.large_string())
    front, end = pa.scalar(" ", pa.large_string()), pa.scalar(" \n", pa.large_string())
    return pc.binary_join_element_wise(front, texts, end, between)


def _make_part(
    path: Path, table: pa.Table, digest: hashlib.blake2b, search: _Search, pool: ThreadPoolExecutor
) -> tuple[np.ndarray, np.ndarray]:
    """What `_ids_and_offsets` returns; read from `path` if it is of this very table."""
    (batch,) = table.to_batches()
    digest.update(str(batch["key"].type).encode())
    for column in batch.columns:
        for piece in _contents(column.cast(pa.large_string())):
            digest.update(piece)
    rows = digest.hexdigest().encode()
    if path.exists():
        with pq.ParquetFile(path) as file:
            if file.schema_arrow.metadata.get(b"rows") == rows:
                return _ids_and_offsets(file.read(["entries"])["entries"].combine_chunks())
    texts = batch["text"]
    starts = range(0, len(texts), _ROWS_PER_SEARCH)
    slices = [batch.slice(start, _ROWS_PER_SEARCH) for start in starts]
    found = list(pool.map(search, slices))
    ids = np.concatenate([ids for ids, _ in found]).astype(np.uint32)
    offsets = np.concatenate([[0], *(num_ids for _, num_ids in found)]).cumsum()
    held = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(ids))
    hashes = (_hash((text or "").encode(), b"") for text in texts.to_pylist())
    hashes = pa.array(np.fromiter(hashes, np.uint64, len(texts)))
    part = pa.table({"key": batch["key"], "text_hash": hashes, "entries": held})
    part = part.replace_schema_metadata({"rows": rows})
    with writing.replacing(path) as temporary:
        pq.write_table(part, temporary, compression="zstd")
    return ids, offsets


def _contents(texts: pa.LargeStringArray) -> Iterator[bytes | memoryview]:
    """Lengths and bytes of an array; Arrow's buffers of equal arrays need not be equal."""
    yield pc.fill_null(pc.binary_length(texts), -1).to_numpy().tobytes()
    filled = pc.fill_null(texts, "")
    starts = np.frombuffer(filled.buffers()[1], np.int64)[filled.offset :]
    yield memoryview(filled.buffers()[2] or b"")[starts[0] : starts[len(filled)]]


def _ids_and_offsets(held: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the entries of all rows, [matches], and where the rows begin and end, [N + 1]."""
    return held.flatten().to_numpy(), held.offsets.to_numpy()


def _rechunk(batches: Iterable[pa.RecordBatch], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Tables of _ROWS_PER_PART rows in one chunk each: the same ones however the rows came."""
    waiting, num_waiting = [], 0
    for batch in batches:
        while batch.num_rows:
            head = batch.slice(0, _ROWS_PER_PART - num_waiting)
            batch = batch.slice(head.num_rows)
            waiting.append(_normalise(head, columns))
            num_waiting += head.num_rows
            if num_waiting == _ROWS_PER_PART:
                yield pa.Table.from_batches(waiting).combine_chunks()
                waiting, num_waiting = [], 0
    if waiting:
        yield pa.Table.from_batches(waiting).combine_chunks()


def _normalise(batch: pa.RecordBatch, columns: Sequence[str]) -> pa.RecordBatch:
    for name in columns:
        if name not in batch.schema.names:
            raise ValueError(
                f"The rows have no column {name!r}, only {', '.join(batch.schema.names)}."
            )
    key = batch["key"]
    if key.null_count:
        raise ValueError(f"{key.null_count} keys of a batch are null; every row needs a key.")
    if not pa.types.is_integer(key.type):
        key = _to_string(key, "key")
    others = {name: _to_string(batch[name], name) for name in columns if name != "key"}
    return pa.record_batch({"key": key, **others})


def _to_string(array: pa.Array, name: str) -> pa.LargeStringArray:
    try:
        return array.cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"Column {name!r} of type {array.type} is no text: {error}.") from error


def _hash(text: bytes, salt: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, salt=salt).digest(), "little")


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every bit of the result depends on all of x, uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
