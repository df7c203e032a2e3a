"""Removing near-duplicates: of evaluation images from training data, or inside one set.

Writes what matched, what to drop, a report and a sheet of pictures. Images are read by
image_sets.py, the search itself is in search.py and data/perceptual_hash.py.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from align_jax.curate.near_duplicates import image_sets, match_sheet
from align_jax.curate.near_duplicates import search as near_duplicates
from align_jax.curate.scan import import_parquet
from align_jax.data.perceptual_hash import check_distance, hamming_pairs
from align_jax.storage import writing

if TYPE_CHECKING:
    import pyarrow as pa

MAX_DISTANCE, MAX_DISTANCE_INSIDE = 8, 4
REPORT_FILE = "report.json"

_SHEET_PAIRS = 24

_Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]  # rows, rows, scores; all [P]


def decontaminate(
    train: str,
    against: Sequence[str],
    out_dir: str | os.PathLike,
    *,
    max_distance: int | None = None,
    min_cosine: float = near_duplicates.MIN_COSINE,
    sheet: bool = False,
) -> dict:
    """Returns the report of finding the images of `train` that are also in other sets.

    Without other sets, finds groups of near-duplicates inside `train` (images joined by a chain of
    pairs) and keeps the first of each.

    `out_dir` gets `matches.parquet` (`key`, `match_set`, `match_key`, `method`, `distance` in bits
    or `cosine`; inside one set the match is the image that is kept), `drop.parquet` (`key` of the
    images to leave out, for `align pack --drop`, and `reason`), `sheet.png` on demand, and at last
    `report.json`. Scans made here stay there too. Memory holds about 100 bytes an image, or all
    embeddings.

    Args:
      train: Parquet tables (a path or a glob) with `key` (or `id`, `uid`) and `phash` (or
        `image_phash`, `image_hash`), as `align scan` writes and COYO has; a source of pairs
        (sources.open_source), which is scanned first; or a folder of `align embed`.
      against: the same, of evaluation sets.
      out_dir: new, empty, or left by an interrupted call.
      max_distance: of hashes, bits of 64. Default 8 against other sets, where re-encoded, resized
        and brightened copies are mostly found (docs/curation.md), and 4 inside one, where the
        chance matches grow with the square of the images.
      min_cosine: of embeddings; pairs above it match.
      sheet: whether to draw up to 24 matched pairs, of all distances.

    Raises:
      ValueError: an unusable input, a finished `out_dir`, hashes beside embeddings, embeddings of
        different models, or a sheet of images that no scan has located.
    """
    import_parquet()  # a missing package is named before hours of work
    writing.check_local(out_dir, "--out")
    if max_distance is None:
        max_distance = MAX_DISTANCE if against else MAX_DISTANCE_INSIDE
    check_distance(max_distance)
    near_duplicates.check_cosine(min_cosine)
    names = [train, *against]
    if len(set(names)) < len(names):
        raise ValueError("A set is named twice; each --against must be another one.")
    if os.path.exists(os.path.join(out_dir, REPORT_FILE)):
        raise ValueError(f"{out_dir} holds a finished report; name a new folder.")
    embedded = [name for name in names if image_sets.is_embedded(name)]
    if 0 < len(embedded) < len(names):
        raise ValueError(
            f"{embedded[0]} holds embeddings and another set does not; name folders of `align "
            "embed` for all sets, or for none."
        )
    if embedded and sheet:
        raise ValueError("--sheet needs scans: embeddings do not say where the images are.")
    if embedded:
        method, limit = "embedding", {"min_cosine": min_cosine}
        sets = image_sets.open_embeddings(names)
        matches = _match(sets, near_duplicates.embedding_pairs, _cosines, min_cosine)
    else:
        method, limit = "phash", {"max_distance": max_distance}
        sets = [image_sets.open_hashes(name, n, out_dir) for n, name in enumerate(names)]
        pictures = [match_sheet.Pictures(images) for images in sets] if sheet else []
        matches = _match(sets, _hash_pairs, _distances, max_distance)
    os.makedirs(out_dir, exist_ok=True)
    if sheet and len(matches.rows):
        rows = _spread(matches)
        drawn = match_sheet.draw(
            [(pictures[0], row) for row in rows.rows.tolist()],
            [
                (pictures[number], row)
                for number, row in zip(rows.sets.tolist(), rows.others.tolist(), strict=True)
            ],
            [f"distance {score}" for score in rows.scores],
        )
        with writing.replacing(os.path.join(out_dir, "sheet.png")) as temporary:
            drawn.save(temporary, "PNG")
    matched, drop = _tables(sets, matches, method)
    for name, table in (("matches.parquet", matched), ("drop.parquet", drop)):
        with writing.replacing(os.path.join(out_dir, name)) as temporary:
            import_parquet().write_table(table, temporary)
    report = {"method": method, **limit, **_report(sets, matches)}
    writing.write_json(os.path.join(out_dir, REPORT_FILE), report, ensure_ascii=False)
    return report


@dataclasses.dataclass
class _Matches:
    """Rows of the first set, each with number of the set, row there, and score; all [P]."""

    rows: np.ndarray
    sets: np.ndarray
    others: np.ndarray
    scores: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> "_Matches":
        columns = (self.rows, self.sets, self.others, self.scores)
        return _Matches(*(column[chosen] for column in columns))


def _match(
    sets: list[image_sets.ImageSet],
    find_pairs: Callable[[np.ndarray, np.ndarray | None, float], _Pairs],
    score: Callable[[np.ndarray, np.ndarray], np.ndarray],
    limit: float,
) -> _Matches:
    train = sets[0]
    if len(sets) > 1:
        found = []
        for number, other in enumerate(sets[1:], 1):
            i, j, scores = find_pairs(train.values, other.values, limit)
            found.append((i, np.full(len(i), number), j, scores))
        rows, numbers, others, scores = (np.concatenate(part) for part in zip(*found, strict=True))
        order = np.lexsort((others, numbers, rows))
        return _Matches(rows, numbers, others, scores)[order]
    i, j, _ = find_pairs(train.values, None, limit)
    kept = near_duplicates.first_of_groups(len(train.values), i, j)
    rows = np.flatnonzero(kept != np.arange(len(kept)))
    scores = score(train.values[rows], train.values[kept[rows]])
    return _Matches(rows, np.zeros_like(rows), kept[rows], scores)


def _hash_pairs(left: np.ndarray, right: np.ndarray | None, max_distance: int) -> _Pairs:
    """Those of hamming_pairs, of hashes uint64 [N] and [M].

    Inside one set equal hashes are chained, not all paired: a blank picture may occur ten thousand
    times, its pairs cannot be listed.
    """
    if right is not None:
        return hamming_pairs(left, right, max_distance)
    unique, first, inverse = np.unique(left, return_index=True, return_inverse=True)
    i, j, distances = hamming_pairs(unique, None, max_distance)
    again = np.flatnonzero(first[inverse] != np.arange(len(left)))
    i = np.concatenate([first[inverse[again]], first[i]])
    return (
        i,
        np.concatenate([again, first[j]]),
        np.concatenate([np.zeros(len(again), distances.dtype), distances]),
    )


def _distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Bits that differ, uint8 [P], of hashes uint64 [P]."""
    return np.bitwise_count(left ^ right)


def _cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Cosines, float32 [P], of embeddings [P, D] of unit norm."""
    return np.einsum("PD,PD->P", left, right)


def _report(sets: list[image_sets.ImageSet], matches: _Matches) -> dict:
    def facts(images: image_sets.ImageSet) -> dict:
        scanned = {"problems": images.scan.get("problems", {})} if images.scan else {}
        return {
            "name": images.name,
            "images": len(images.values),
            "without_hash": images.num_without_hash,
        } | scanned

    num_dropped = len(np.unique(matches.rows))
    report = {
        "train": facts(sets[0]),
        "dropped": num_dropped,
        "kept": len(sets[0].values) - num_dropped,
    }
    if len(sets) == 1:
        sizes = np.unique(matches.others, return_counts=True)[1] + 1
        groups = {"groups": len(sizes), "largest_group": int(sizes.max(initial=1))}
        return report | groups | {"scores": _histogram(matches.scores)}
    report["against"] = []
    for number, images in enumerate(sets[1:], 1):
        mine = matches[matches.sets == number]
        counts = {
            "pairs": len(mine.rows),
            "train_images_matched": len(np.unique(mine.rows)),
            "images_matched": len(np.unique(mine.others)),
            "scores": _histogram(mine.scores),
        }
        report["against"].append(facts(images) | counts)
    return report


def _histogram(scores: np.ndarray) -> dict[str, int]:
    """Counts of scores [P] by distance, or by cosine in steps of 0.005."""
    if scores.dtype == np.float32:
        scores = np.floor(np.minimum(scores, 1.0) * 200) / 200
    values, counts = np.unique(scores, return_counts=True)
    return {f"{value:g}": int(count) for value, count in zip(values, counts, strict=True)}


def _tables(
    sets: list[image_sets.ImageSet], matches: _Matches, method: str
) -> tuple["pa.Table", "pa.Table"]:
    """The tables of matches and of keys to drop."""
    import pyarrow as pa

    match_keys = np.empty(len(matches.rows), object)
    for number, images in enumerate(sets):
        mine = matches.sets == number
        match_keys[mine] = images.keys.take(pa.array(matches.others[mine])).to_pylist()
    match_sets = [sets[number].name for number in matches.sets]
    keys = sets[0].keys.take(pa.array(matches.rows)).to_pylist()
    is_hash = method == "phash"
    none = [None] * len(keys)
    schema = {
        "key": pa.string(),
        "match_set": pa.string(),
        "match_key": pa.string(),
        "method": pa.string(),
        "distance": pa.int32(),
        "cosine": pa.float32(),
    }
    columns = [
        keys,
        match_sets,
        match_keys.tolist(),
        [method] * len(keys),
        matches.scores if is_hash else none,
        none if is_hash else matches.scores,
    ]
    matched = pa.table(dict(zip(schema, columns, strict=True)), pa.schema(schema))
    first = np.unique(matches.rows, return_index=True)[1]
    drop = pa.table(
        {
            "key": [keys[row] for row in first],
            "reason": [f"near_duplicate of {match_sets[row]}" for row in first],
        },
        pa.schema({"key": pa.string(), "reason": pa.string()}),
    )
    return matched, drop


def _spread(matches: _Matches) -> _Matches:
    """Some matches, as many of each distance as there are."""
    order = np.argsort(matches.scores, kind="stable")
    counts = np.unique(matches.scores, return_counts=True)[1]
    starts = np.cumsum(counts) - counts
    turn = np.arange(len(order)) - np.repeat(starts, counts)  # within its distance
    return matches[order[np.sort(np.argsort(turn, kind="stable")[:_SHEET_PAIRS])]]
