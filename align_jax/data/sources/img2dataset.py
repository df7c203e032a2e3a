"""The output folder of img2dataset: shards 00000.tar (or 00000/) with 00000.parquet beside them.

img2dataset writes 00000_stats.json last, so a shard without one was interrupted. Shards are opened
one by one where that is enough (curate/pack/), or all together as one source of pairs.
open_source.py is the way in.
Source: the layout is described in img2dataset's README, "Output format".
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping

from align_jax.data.sources import files
from align_jax.data.sources.shards import Shards
from align_jax.storage.problems import Problems

UNFINISHED = ("skip", "refuse")
_STATS = re.compile(r"(\d+)_stats\.json")
_SHARD = re.compile(r"(\d+)(?:\.tar)?")


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished shard, not yet indexed.

    Attributes:
      path: tar, or folder with the output format "files".
      num_expected: pairs that it holds according to its stats.
      weights: caption field -> weight, see files.open_samples.
    """

    path: str
    num_expected: int
    weights: Mapping[str, float] | None = None

    def open(self) -> files.FilePairs:
        """Returns the pairs; `problems` has also what img2dataset could not download."""
        pairs = files.open_samples(self.path, [self.path], None, self.weights, img2dataset=True)
        _add_failures(os.path.splitext(self.path)[0], pairs.problems)
        return pairs


class Img2Dataset(Shards):
    """The finished shards of a folder."""

    def __init__(
        self,
        spec: str,
        folder: str,
        unfinished: str,
        weights: Mapping[str, float] | None = None,
    ):
        """Lists the shards.

        Args:
          spec: names the source in messages.
          folder: see `is_img2dataset`.
          unfinished: "skip" counts shards without stats as `shard_unfinished`; "refuse" raises.
          weights: of the fields of the .json files, see files.open_samples.

        Raises:
          ValueError: an unfinished shard that is refused, or no finished one.
        """
        if unfinished not in UNFINISHED:
            raise ValueError(f"{spec}: unfinished={unfinished} must be skip or refuse.")
        super().__init__()
        self._spec = spec
        parts = []
        for name in sorted(os.listdir(folder)):
            match = _SHARD.fullmatch(name)
            if match is None:
                continue
            path = os.path.join(folder, name)
            num_pairs = _count_pairs(os.path.join(folder, f"{match[1]}_stats.json"))
            if num_pairs is not None:
                parts.append(Shard(path, num_pairs, weights))
            elif unfinished == "skip":
                self.folder_problems.add("shard_unfinished", path)
            else:
                raise ValueError(
                    f"{path} is unfinished: {match[1]}_stats.json is missing or not whole; let "
                    "img2dataset finish it, or leave it out with unfinished=skip."
                )
        if not parts:
            raise ValueError(f"{spec} holds no finished shard. {self.folder_problems}".strip())
        self.parts = tuple(parts)

    def describe(self) -> str:
        """Returns the spec and the number of shards."""
        return f"{self._spec}: {len(self.parts)} img2dataset shards"

    def open(self, limit: int | None = None) -> files.FilePairs:
        """Returns the pairs of all shards, or the first `limit` of them, indexed."""
        paths, weights = [shard.path for shard in self.parts], self.parts[0].weights
        pairs = files.open_samples(self._spec, paths, limit, weights, img2dataset=True)
        pairs.problems.merge(self.folder_problems)
        for path in paths:
            _add_failures(os.path.splitext(path)[0], pairs.problems)
        return pairs


def is_img2dataset(path: str) -> bool:
    """Returns whether a folder holds at least one finished shard of img2dataset."""
    return os.path.isdir(path) and any(map(_STATS.fullmatch, os.listdir(path)))


def _count_pairs(path: str) -> int | None:
    """Returns how many downloads succeeded, None where the stats are missing or not whole."""
    try:
        with open(path, encoding="utf-8") as file:
            return int(json.load(file)["successes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _add_failures(stem: str, problems: Problems) -> None:
    """Counts the rows of a shard's table by their status, where there is such a table."""
    path = f"{stem}.parquet"
    if not os.path.exists(path):
        return
    try:
        from pyarrow import compute, parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading it needs pip install 'align_jax[parquet]'.") from error
    try:
        counts = compute.value_counts(parquet.read_table(path, columns=["status"])["status"])
    except Exception as error:  # pyarrow's own kinds; the pairs themselves are in the shard
        problems.add("side_table_unreadable", f"{path}: {error}")
        return
    for row in counts.to_pylist():
        if row["values"] != "success":
            problems.add(f"status_{row['values']}", path, row["counts"])
