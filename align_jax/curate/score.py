"""`align score`: the cosine of each pair by a model, as a column that `align curate` filters by.

Beside the pair's own, cosines with further texts: prompts of what is not wanted (safety) or of what
is (beauty), as LAION used CLIP.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from align_jax import __version__
from align_jax.align import Align
from align_jax.curate import parts as parts_lib
from align_jax.data import images
from align_jax.data.sources.open_source import PairSource
from align_jax.data.sources.record import hash_key, is_usable
from align_jax.run.progress import show_progress
from align_jax.storage import identity, text, writing
from align_jax.storage.problems import Problems, from_json, reason_of, report

_METADATA = b"align_score"
_SHARES = (0.01, 0.1, 0.3, 0.5, 0.9)  # whose quantiles the report has

# A part's items: index of a record or None, its key, the rows of the part that it is the image of.
_Item = tuple[int | None, str, list[int]]


def score(
    source: PairSource,
    out: str | os.PathLike,
    model: Align,
    *,
    table: Sequence[str] = (),
    column: str = "similarity",
    texts: Mapping[str, Sequence[str]] | None = None,
    part_size: int = 4096,
) -> dict:
    """Returns the report of writing the cosines of pairs as Parquet.

    Columns `key`, `text` (one row a caption), `index` (of the record), `similarity` (float32,
    cosine of image and text) and one for each of `texts`; or those of `table` with these added. A
    row whose image cannot be used has null, and is counted. The same input gives the same bytes,
    killed and resumed or not.

    Memory: one part, with `table` 16 bytes a record.

    Args:
      source: of the images.
      out: Parquet file, must not exist.
      model: that embeds.
      table: Parquet files with `key` and `text` (of `align scan`, of `align curate`), whose rows
        are scored in their order; () scores every caption of the source.
      column: name of the pair's cosine.
      texts: column -> texts; it holds the largest cosine of the image and one of them.
      part_size: rows (with `table`) or records whose scores are kept at a time.

    Returns:
      `source`, `model` (fingerprint), `rows`, `scored`, `quantiles` (column -> share of the rows
      with the highest values -> the lowest of these) and `problems`.

    Raises:
      ValueError: `out` exists, a table that lacks a column, or no row has a score.
    """
    if parts_lib.is_finished(out, "align score"):
        raise ValueError(f"{out} exists; name a new file.")
    writing.check_local(out, "--out")
    texts = {name: list(found) for name, found in (texts or {}).items()}
    _check_names(column, texts, table)
    out = os.path.abspath(out)
    source = source.open() if hasattr(source, "parts") else source
    content = {
        "stamp": identity.stamp(source),
        "model": model.fingerprint(),
        "batch_sizes": model.batch_sizes,
        "table": [identity.of_content(path) for path in table],
        "columns": [column, *([name, found] for name, found in texts.items())],
        "part_size": part_size,
        "align_jax": __version__,
    }
    folder = parts_lib.folder_of(out)
    with (
        writing.locked(folder, "align score", shown=out),
        writing.explaining_full_disk(folder),
        parts_lib.checked(folder, json.loads(json.dumps(content)), "scoring"),
    ):
        scorer = _Scorer(source, model, column, texts)
        total = sum(parquet.read_metadata(path).num_rows for path in table) or len(source)
        find = _finder(source) if table else None
        done = _write_parts(folder, _batches(table, len(source), part_size), scorer, find)
        count = 0
        for _ in show_progress(done, total, "score", "row" if table else "pair", size=int):
            count += 1
        made = _merge(parts_lib.paths(folder, count), source, model, [column, *texts], out)
    return made


def _check_names(column: str, texts: Mapping[str, Sequence[str]], table: Sequence[str]) -> None:
    for path in table:
        if not path.lower().endswith(".parquet"):
            raise ValueError(f"--table {path} is no Parquet file; `align scan` makes one.")
        names = parquet.read_schema(path).names
        for name in ("key", "text"):
            if name not in names:
                raise ValueError(f"--table {path} has no column {name}: it has {', '.join(names)}.")
    taken = {"key", "text", "index"}
    for name in (column, *texts):
        if name in taken:
            raise ValueError(f"a column {name!r} is there already; name another.")
        taken.add(name)
    for name, found in texts.items():
        if not any(map(is_usable, found)):
            raise ValueError(f"column {name!r} has no text to compare images with.")


def _batches(table: Sequence[str], num_records: int, part_size: int) -> Iterator[pa.Table | range]:
    """What each part is of: rows of the table, or records."""
    if not table:
        for start in range(0, num_records, part_size):
            yield range(start, min(start + part_size, num_records))
    for path in table:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(part_size):
                yield pa.table(batch)


def _write_parts(
    folder: str,
    batches: Iterator[pa.Table | range],
    scorer: "_Scorer",
    find: Callable[[str], int | None] | None,
) -> Iterator[int]:
    """Writes the parts that are not there; yields the size of each."""
    for number, batch in enumerate(batches):
        path = os.path.join(folder, f"{number:06d}.parquet")
        if not os.path.exists(path):
            made = scorer.records(batch) if find is None else scorer.rows(batch, find)
            problems = json.dumps(scorer.problems.to_json())
            scorer.problems = Problems()
            with writing.replacing(path) as temporary:
                made = made.replace_schema_metadata({_METADATA: problems})
                parquet.write_table(made, temporary)
        yield len(batch)


class _Scorer:
    """Makes the rows of a part.

    Attributes:
      problems: of the parts since it was last set.
    """

    def __init__(
        self, source: PairSource, model: Align, column: str, texts: Mapping[str, Sequence[str]]
    ):
        self._source, self._model, self._column = source, model, column
        self._prompts = {name: model.encode_text(found) for name, found in texts.items()}
        self.problems = Problems()

    def records(self, indices: range) -> pa.Table:
        """Returns the rows of all captions of records."""
        z, found = self._images(indices)
        keys, texts, rows = [], [], []
        for place, index in enumerate(indices):
            key, captions = found.get(place, (self._source.where(index), []))
            if place in found and not captions:
                self.problems.add("caption_empty", key)
            for caption in captions:
                keys.append(key)
                texts.append(caption)
                rows.append(place)
        rows = np.array(rows, np.int64)
        table = pa.table(
            {
                "key": pa.array(keys, pa.string()),
                "text": pa.array(texts, pa.string()),
                "index": pa.array(rows + indices.start, pa.int64()),
            }
        )
        return self._add(table, z[rows])

    def rows(self, table: pa.Table, find: Callable[[str], int | None]) -> pa.Table:
        """Returns rows of a table with their scores."""
        keys = [str(key) for key in table["key"].to_pylist()]
        places, indices = {}, []
        for key in dict.fromkeys(keys):
            index = find(key)
            if index is None:
                self.problems.add("record_missing", key)
            else:
                places[key] = len(indices)
                indices.append(index)
        z, _ = self._images(indices)
        z = np.concatenate([z, np.full((1, z.shape[1]), np.nan, np.float32)])  # of missing ones
        return self._add(table, z[[places.get(key, len(indices)) for key in keys]])

    def _images(
        self, indices: Sequence[int]
    ) -> tuple[np.ndarray, dict[int, tuple[str, list[str]]]]:
        """Embeddings [records, D], NaN where there is none, and place -> (key, captions)."""
        found: dict[int, tuple[str, list[str]]] = {}
        lost: dict[int, str] = {}

        def reader(place: int, index: int) -> Callable[[], np.ndarray]:
            def read() -> np.ndarray:  # uint8 [H, W, 3]
                try:
                    record = self._source[index]
                    captions = [text.clean(c) for c in record.captions if is_usable(c)]
                    found[place] = (text.clean(record.key), captions)
                    return images.decode_image(record.image)
                except (images.BadImage, OSError) as error:
                    lost[place] = reason_of(error)
                    where = self._source.where(index)
                    raise images.BadImage(lost[place], f"{where}: {error}") from error

            return read

        if not indices:
            return np.zeros((0, self._model.model.embed_dim), np.float32), {}
        readers = [reader(place, index) for place, index in enumerate(indices)]
        z = self._model.encode_image(readers, on_error="skip")
        for place in sorted(lost):
            self.problems.add(lost[place], self._source.where(indices[place]))
        return z, found

    def _add(self, table: pa.Table, z: np.ndarray) -> pa.Table:
        """The table with the cosines of its rows, whose images are `z` [rows, D]."""
        usable = np.flatnonzero(np.isfinite(z).all(axis=1))
        texts = table["text"].to_pylist()
        usable = np.array([row for row in usable if is_usable(texts[row] or "")], np.int64)
        scores = {name: np.full(len(table), np.nan) for name in (self._column, *self._prompts)}
        if len(usable):
            z_text = self._model.encode_text([texts[row] for row in usable])
            cosines = np.einsum("nd,nd->n", z[usable].astype(np.float64), z_text)
            scores[self._column][usable] = cosines
        with_image = np.isfinite(z).all(axis=1)
        for name, prompts in self._prompts.items():
            if with_image.any():
                cosines = z[with_image].astype(np.float64) @ prompts.T.astype(np.float64)
                scores[name][with_image] = cosines.max(axis=1)
        for name, values in scores.items():
            values = pa.array(values.astype(np.float32), mask=np.isnan(values))
            if name in table.column_names:
                table = table.set_column(table.column_names.index(name), name, values)
            else:
                table = table.append_column(name, values)
        return table


def _finder(source: PairSource) -> Callable[[str], int | None]:
    """A function of a key that returns the index of its first record, or None."""
    if not hasattr(source, "key"):
        raise ValueError(
            f"--table needs the keys of {source.describe()}, which are known only when all its "
            "images are read; score what it was packed from."
        )
    hashes = np.fromiter((hash_key(source.key(i)) for i in range(len(source))), np.uint64)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]

    def find(key: str) -> int | None:
        hashed = np.uint64(hash_key(key))
        place = int(np.searchsorted(hashes, hashed))
        there = place < len(hashes) and hashes[place] == hashed
        return int(order[place]) if there else None

    return find


def _merge(
    paths: list[str], source: PairSource, model: Align, columns: Sequence[str], out: str
) -> dict:
    """Returns the report of the parts, which become one file."""
    problems = Problems()
    problems.merge(source.problems)
    rows, values = 0, {name: [] for name in columns}
    for path in paths:
        metadata = parquet.read_schema(path).metadata
        problems.merge(from_json(json.loads(metadata[_METADATA])))
        table = parquet.read_table(path, columns=list(columns))
        rows += len(table)
        for name in columns:
            values[name].append(table[name].drop_null().to_numpy())
    found = {name: np.concatenate(arrays or [np.zeros(0)]) for name, arrays in values.items()}
    scored = len(found[columns[0]])
    if not scored:
        raise ValueError(f"{source.describe()}: no row has a score; {dict(problems)}.")
    made: dict[str, Any] = {
        "source": source.describe(),
        "model": model.fingerprint(),
        "rows": rows,
        "scored": scored,
        "quantiles": {
            name: {f"{share:g}": round(float(np.quantile(of, 1 - share)), 4) for share in _SHARES}
            for name, of in found.items()
            if len(of)
        },
        "problems": report(problems, source.describe()),
    }
    schema = parquet.read_schema(paths[0]).with_metadata({_METADATA: json.dumps(made)})
    folder = os.path.dirname(paths[0])
    with (
        parts_lib.result(folder, out) as temporary,
        parquet.ParquetWriter(temporary, schema) as writer,
    ):
        for path in paths:
            writer.write_table(parquet.read_table(path).replace_schema_metadata(schema.metadata))
    return made
