"""What matched what, a block at a time, and the files that say so.

Blocks come in the order of the training images; all matches of one are in one block. Files are cut
into row groups of one size, so that they are the same however the blocks were cut.
"""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from align_jax.curate.scan import import_parquet
from align_jax.data.perceptual_hash import COPIES
from align_jax.storage import writing

if TYPE_CHECKING:
    import pyarrow as pa

SHEET_PAIRS = 24

_GROUP_ROWS = 2**17


@dataclasses.dataclass
class Matches:
    """Pairs of a training image and an image of another set, or of the same; all columns [P].

    Attributes:
      rows: of the training images, ascending.
      keys: of the training images.
      sets: numbers of the other sets.
      others: rows in these.
      other_keys: keys in these.
      scores: distances in bits, integers, or cosines, float32.
      copies: which copy of the other image is that near, places of perceptual_hash.COPIES; None
        where there are only images as they are.
      positions: of both images in the sources that were scanned, int64 [P, 2], -1 where there is
        no scan; None if nobody asks.
    """

    rows: np.ndarray
    keys: np.ndarray
    sets: np.ndarray
    others: np.ndarray
    other_keys: np.ndarray
    scores: np.ndarray
    copies: np.ndarray | None = None
    positions: np.ndarray | None = None

    def __getitem__(self, chosen: np.ndarray) -> "Matches":
        columns = dataclasses.fields(self)
        values = (getattr(self, column.name) for column in columns)
        return Matches(*(None if value is None else value[chosen] for value in values))


class Output:
    """Writes and counts matches.

    Attributes:
      dropped: training images that matched.
      scores: of each set, score -> pairs; cosines in steps of 0.005.
    """

    def __init__(
        self, out_dir: str | os.PathLike, names: Sequence[str], method: str, num_examples: int
    ):
        """Keeps up to `num_examples` matches of each score for `spread`."""
        self._out_dir, self._names, self._method = out_dir, names, method
        self._num_examples = num_examples
        self._examples: dict[float, list[Matches]] = {}
        self.dropped = 0
        self.scores: list[dict[float, int]] = [{} for _ in names]
        self._train: list[int] = [0] * len(names)
        self._others: list[np.ndarray] = [np.zeros(0, np.int64)] * len(names)
        self._copies: list[dict[str, int]] = [{} for _ in names]

    def write(self, blocks: Iterator[Matches]) -> None:
        """Writes both files."""
        with (
            _Writer(os.path.join(self._out_dir, "matches.parquet"), _matches_schema()) as matched,
            _Writer(os.path.join(self._out_dir, "drop.parquet"), _drop_schema()) as dropped,
        ):
            for block in blocks:
                if len(block.rows):
                    matched.add(self._matched(block))
                    dropped.add(self._dropped(block))
                    self._count(block)

    def counts(self, number: int) -> dict:
        """Returns what the report says of the matches with a set."""
        found = {
            "pairs": sum(self.scores[number].values()),
            "train_images_matched": self._train[number],
            "images_matched": len(self._others[number]),
        }
        copies = {name: self._copies[number].get(name, 0) for name in COPIES}
        return found | ({"copies": copies} if self._copies[number] else {})

    def spread(self) -> Matches | None:
        """Returns up to SHEET_PAIRS matches, as many of each score as there are; None if none."""
        lists = [self._examples[score] for score in sorted(self._examples)]
        turns = itertools.zip_longest(*lists)
        chosen = [one for turn in turns for one in turn if one is not None][:SHEET_PAIRS]
        chosen.sort(key=lambda match: (match.scores[0], match.rows[0]))
        if not chosen:
            return None
        return Matches(
            *(
                None if one[0] is None else np.concatenate(one)
                for one in zip(*(vars(match).values() for match in chosen), strict=True)
            )
        )

    def _count(self, block: Matches) -> None:
        self.dropped += len(np.unique(block.rows))
        for number in np.unique(block.sets).tolist():
            mine = block[block.sets == number]
            _add(self.scores[number], _steps(mine.scores))
            if number:
                self._train[number] += len(np.unique(mine.rows))
                self._others[number] = np.union1d(self._others[number], mine.others)
            if mine.copies is not None:
                _add(self._copies[number], np.array(COPIES)[mine.copies])
        if self._num_examples:
            for score in np.unique(block.scores).tolist():
                kept = self._examples.setdefault(score, [])
                places = np.flatnonzero(block.scores == score)[: self._num_examples - len(kept)]
                kept += [block[place : place + 1] for place in places.tolist()]

    def _matched(self, block: Matches) -> "pa.Table":
        import pyarrow as pa

        none = [None] * len(block.rows)
        is_hash = self._method == "phash"
        columns = [
            block.keys,
            [self._names[number] for number in block.sets],
            block.other_keys,
            [self._method] * len(none),
            none if block.copies is None else [COPIES[copy] for copy in block.copies],
            block.scores.astype(np.int32) if is_hash else none,
            none if is_hash else block.scores,
        ]
        schema = _matches_schema()
        return pa.table(dict(zip(schema.names, columns, strict=True)), schema)

    def _dropped(self, block: Matches) -> "pa.Table":
        import pyarrow as pa

        first = np.unique(block.rows, return_index=True)[1]
        reasons = [f"near_duplicate of {self._names[block.sets[place]]}" for place in first]
        return pa.table({"key": block.keys[first], "reason": reasons}, _drop_schema())


def _matches_schema() -> "pa.Schema":
    import pyarrow as pa

    texts = dict.fromkeys(("key", "match_set", "match_key", "method", "copy"), pa.string())
    return pa.schema(texts | {"distance": pa.int32(), "cosine": pa.float32()})


def _drop_schema() -> "pa.Schema":
    import pyarrow as pa

    return pa.schema({"key": pa.string(), "reason": pa.string()})


class _Writer(contextlib.AbstractContextManager):
    """A Parquet file that is there whole or not at all, in row groups of one size."""

    def __init__(self, path: str, schema: "pa.Schema"):
        self._stack = contextlib.ExitStack()
        temporary = self._stack.enter_context(writing.replacing(path))
        writer = import_parquet().ParquetWriter(temporary, schema)
        self._writer = self._stack.enter_context(writer)
        self._waiting = schema.empty_table()

    def add(self, table: "pa.Table") -> None:
        import pyarrow as pa

        self._waiting = pa.concat_tables([self._waiting, table])
        while len(self._waiting) >= _GROUP_ROWS:
            self._flush(_GROUP_ROWS)

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._flush(len(self._waiting))
        self._stack.__exit__(*error)

    def _flush(self, num_rows: int) -> None:
        # The pages of a file follow the chunks of a table: there is one.
        writer = self._writer
        writer.write_table(self._waiting[:num_rows].combine_chunks())
        self._waiting = self._waiting[num_rows:]


def _steps(scores: np.ndarray) -> np.ndarray:
    """Distances as they are; cosines in steps of 0.005."""
    if scores.dtype != np.float32:
        return scores
    return np.floor(np.minimum(scores, 1.0) * 200) / 200


def _add(counts: dict, values: np.ndarray) -> None:
    for value, count in zip(*np.unique(values, return_counts=True), strict=True):
        value = value.item()
        counts[value] = counts.get(value, 0) + int(count)
