"""Joining records to lists by something else than their key: the uid, id or url of their metadata.

img2dataset numbers what it downloads, so that its keys are in no table that the downloads came
from; `00000.parquet` beside each shard holds their urls and the columns that
`--save_additional_columns` named. Records of Parquet tables and packed datasets hold theirs.
"""

import os
from collections.abc import Mapping

from align_jax.data.sources.column_names import find_column
from align_jax.data.sources.open_source import PairSource
from align_jax.data.sources.record import Record
from align_jax.data.sources.shards import Part
from align_jax.data.sources.table_files import open_table, plain_text


def check(source: PairSource, option: str, by: str) -> None:
    """Raises ValueError where no record of a source can be joined by `by`.

    Args:
      source: of the records.
      option: names the choice in messages, e.g. "--keep-by".
      by: name of the metadata.
    """
    if hasattr(source, "parts"):
        Identities(source.parts[0], by, option)
        return
    for index in range(min(100, len(source))):
        try:
            metadata = source[index].metadata
        except OSError:
            continue
        if find_column(metadata, (by.lower(),)) is not None:
            return
        known = f"only {', '.join(sorted(metadata))}" if metadata else "nor any other"
        raise ValueError(
            f"{option} {by}: records of {source.describe()} have no such metadata, {known}; "
            "img2dataset folders with their tables, Parquet tables and packed datasets have it."
        )


class Identities:
    """Record -> what joins it to a list."""

    def __init__(self, source: PairSource | Part, by: str, option: str = "--keep-by"):
        """Reads the table beside a shard; other records are asked one by one.

        Raises:
          ValueError: a shard without such a table or column.
        """
        self._by = by.lower()
        self._of_key: dict[str, str] | None = None
        if hasattr(source, "num_expected"):  # a part that may have a table beside it
            self._of_key = _read_side_table(source.path, by, option)

    def known(self, key: str) -> str | None:
        """Returns the identity of a record of a shard; None if it has none."""
        return self._of_key.get(key) if self._of_key is not None else None

    @property
    def needs_record(self) -> bool:
        """Whether `of` has to be asked, with the whole record."""
        return self._of_key is None

    def of(self, record: Record) -> str | None:
        """Returns the identity that a record holds itself; None if it has none."""
        return _find(record.metadata, self._by)


def _find(metadata: Mapping[str, str | int | float], by: str) -> str | None:
    name = find_column(metadata, (by,))
    return None if name is None else plain_text(metadata[name])


def _read_side_table(path: str, by: str, option: str) -> dict[str, str]:
    """Returns key -> identity of the table beside a shard."""
    side = f"{os.path.splitext(path)[0]}.parquet"
    if not os.path.isfile(side):
        raise ValueError(
            f"{option} {by}: {side} does not exist; the table beside each shard says which key "
            f"has which {by}."
        )
    table = open_table(side)
    key, name = (find_column(table.names, (wanted,)) for wanted in ("key", by.lower()))
    if key is None or name is None:
        raise ValueError(
            f"{option} {by}: {side} has {table.describe()}; let img2dataset write it by "
            f"--save_additional_columns '[\"{by}\"]', or join by url."
        )
    found = {}
    for batch in table.read([key, name]):
        keys, values = (_plain(batch.columns[column]) for column in (key, name))
        found.update((k, v) for k, v in zip(keys, values, strict=True) if k and v)
    return found


def _plain(cells: object) -> list[str | None]:
    return [plain_text(cell) for cell in (cells if isinstance(cells, list) else cells.to_pylist())]
