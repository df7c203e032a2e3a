"""A vector index that is bound to its model: add, delete, search, count, info."""

import contextlib
import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from align_jax import __version__
from align_jax.evals.top_k import top_k
from align_jax.search import filters, milvus, rows
from align_jax.search.compose import encode_query
from align_jax.search.filters import Filter
from align_jax.search.rows import Hit, Row


class Identity(NamedTuple):
    """What an index is bound to.

    Attributes:
      fingerprint: of the model.
      dim: of its embeddings.
      model: what `align_jax.load` takes to load it again; "" if unknown.
      step: likewise, of a workdir.
      preprocessing: of the model, for people; the fingerprint covers it.
      version: of align_jax that made the index.
    """

    fingerprint: str
    dim: int
    model: str = ""
    step: int | None = None
    preprocessing: str = ""
    version: str = __version__


def identity_of(model: Any) -> Identity:
    """Returns the identity of an `Align`."""
    origin = model.origin
    path, step = (origin.path, origin.step) if origin else ("", None)
    dim = model.model.embed_dim
    return Identity(model.fingerprint(), dim, path, step, repr(model.preprocessing))


class Index:
    """Rows with unit vectors of one model. Close it, or use it in a `with` block.

    Attributes:
      identity: what it is bound to.
      close: function that ends the database and frees the folder.
    """

    def __init__(
        self,
        uri: str,
        identity: Identity | None = None,
        *,
        model: Any = None,
        index_type: str | None = None,
        work: str = "align_jax.open_index",
    ):
        """Opens the index, or makes it where there is none and `identity` is given.

        Args:
          uri: a local folder, or http://host:port of a server; `#name` after that names one of
            several indexes.
          identity: that it must have; None takes any.
          model: for `search` by images and texts.
          index_type: "IVF_FLAT" (exact) or "HNSW", of a new index; None takes IVF_FLAT for a folder
            and HNSW on a server.
          work: what is done, for a process that finds the folder in use.

        Raises:
          ValueError: there is no index, it is another model's, or another process uses it.
          RuntimeError: the database cannot be reached or fails.
        """
        if index_type not in (None, *milvus.INDEX_TYPES):
            known = ", ".join(milvus.INDEX_TYPES)
            raise ValueError(f"index type {index_type!r} is unknown; use one of: {known}.")
        self._model = model
        cleanup = contextlib.ExitStack()
        self.close = weakref.finalize(self, cleanup.close)
        try:
            about = None if identity is None else identity._asdict()
            self._rows = milvus.Collection(uri, about, index_type, work, cleanup)
            self.identity = Identity(**self._rows.about)
            self.check_model(identity)
            if index_type not in (None, self._rows.index_type):
                raise ValueError(f"{uri} is an index of type {self._rows.index_type}.")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    @property
    def uri(self) -> str:
        """As given, less its password."""
        return self._rows.uri

    @property
    def index_type(self) -> str:
        """One of milvus.INDEX_TYPES."""
        return self._rows.index_type

    @property
    def is_exact(self) -> bool:
        """Whether a search compares with all rows."""
        return self._rows.is_exact

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return self._rows.is_local

    def check_model(self, identity: Identity | None) -> None:
        """Raises ValueError if the model is another one than that of the index."""
        if identity is not None and identity.fingerprint != self.identity.fingerprint:
            raise ValueError(
                f"{self._rows.uri} holds embeddings of the model {self.identity.fingerprint} "
                f"({self.identity.model or 'unnamed'}), not of {identity.fingerprint} "
                f"({identity.model or 'unnamed'}); name its model, or another index."
            )

    def use_model(self, model: Any) -> None:
        """Gives `search` the model for images and texts; ValueError if it is another one."""
        self.check_model(identity_of(model))
        self._model = model

    def add(
        self,
        keys: Sequence[str],
        vectors: np.ndarray,
        *,
        kind: str = "image",
        captions: Sequence[str] | None = None,
        sources: Sequence[str] | None = None,
        metadata: Sequence[dict[str, Any]] | None = None,
    ) -> dict[str, int]:
        """Stores rows; one whose key is there takes the old one's place. Returns counts.

        Counted are rows `added`, `updated` and `unchanged`. All are safe when this returns.

        Args:
          keys: N different ones.
          vectors: [N, D] of this index's model, unit norm.
          kind: "image" or "text".
          captions: N; of images what is known of them, of texts the text.
          sources: N; where each picture is read again.
          metadata: N; columns by which can be filtered.

        Raises:
          ValueError: lengths differ, or a row is refused (see rows.py); nothing is stored then.
        """
        none = [""] * len(keys)
        columns = (captions or none, sources or none, metadata or [{}] * len(keys))
        vectors = rows.check_vectors(vectors, keys, self.identity.dim)
        new = [
            rows.make_row(key, kind, caption, source, extra, vector)
            for key, vector, caption, source, extra in zip(keys, vectors, *columns, strict=True)
        ]
        changed, there = self.changed(new)
        self.put([new[i] for i in changed], vectors[changed])
        added = sum(row.key not in there for row in new)
        counts = {"added": added, "updated": len(changed) - added}
        return counts | {"unchanged": len(new) - len(changed)}

    def changed(self, new: Sequence[Row]) -> tuple[list[int], set[str]]:
        """Returns which of the rows are not there as they are, and which keys are there.

        Raises:
          ValueError: a row is refused, or two have one key.
        """
        seen = set()
        for row in new:
            rows.check_row(row)
            if row.key in seen:
                raise ValueError(f"{rows.shorten(row.key)}: the key comes twice.")
            seen.add(row.key)
        stored = self._rows.digests([row.key for row in new])
        changed = [i for i, row in enumerate(new) if stored.get(row.key) != row.digest]
        return changed, set(stored)

    def put(self, checked: Sequence[Row], vectors: np.ndarray) -> None:
        """Stores rows that `changed` has seen, with their vectors [N, D]."""
        if checked:
            names = [row.key for row in checked]
            self._rows.put(checked, rows.check_vectors(vectors, names, self.identity.dim))

    def delete(self, keys: Sequence[str] = (), *, filter: Filter | None = None) -> int:
        """Deletes the rows with these keys, and those that a filter keeps; returns how many.

        Raises:
          ValueError: a filter without a condition, which would delete all.
        """
        if isinstance(keys, str):
            raise ValueError("keys is one str; put it in a list.")
        where = filters.expression(filter)
        if filter is not None and not where:
            raise ValueError("A filter without a condition would delete all rows.")
        before = self.count()
        self._rows.delete_keys(list(keys))
        if where:
            self._rows.delete(where)
        return before - self.count()

    def get(self, keys: Sequence[str]) -> dict[str, Row]:
        """Returns the rows that have one of the keys, by key."""
        return self._rows.get(keys)

    def flush(self) -> None:
        """Seals what was added and builds its index; rows are safe and found without it, too."""
        self._rows.flush()

    def count(self, filter: Filter | None = None) -> int:
        """Returns the number of rows that a filter keeps."""
        return self._rows.count(filters.expression(filter))

    def info(self) -> dict[str, Any]:
        """Returns uri, identity, index type, whether search is exact, and rows by kind."""
        by_kind = {kind: self.count({"kind": kind}) for kind in rows.KINDS}
        return {
            "uri": self._rows.uri,
            **self.identity._asdict(),
            "index_type": self._rows.index_type,
            "is_exact": self._rows.is_exact,
            "rows": sum(by_kind.values()),
            "rows_by_kind": by_kind,
        }

    def search(
        self,
        vectors: np.ndarray | None = None,
        *,
        image: Any = None,
        text: str | None = None,
        add: Sequence[str] = (),
        remove: Sequence[str] = (),
        weight: float | None = None,
        k: int = 10,
        filter: Filter | None = None,
    ) -> Any:
        """Returns the k rows of the highest cosines, best first; fewer only if there are no more.

        By image and texts: a list of `Hit`s, see compose.encode_query for what they mean. By
        vectors: N such lists; many in one call cost much less than each alone.

        Args:
          vectors: queries [N, D] of unit norm, instead of image and texts.
          image: a path, picture or array.
          text: a text, alone or beside the image.
          add: texts to add.
          remove: texts to subtract.
          weight: of these; None takes 1 where there are both, else 2.
          k: 1 to 16,384.
          filter: fields and conditions, see filters.py; {"kind": "image"} finds images only.

        Raises:
          ValueError: a bad query, k or filter.
        """
        rows.check_k(k)
        where = filters.expression(filter)
        is_one = vectors is None
        if is_one:
            if self._model is None:
                raise ValueError("Search by image or text needs the model; give it to open_index.")
            options = {"image": image, "text": text, "add": add, "remove": remove}
            vectors = encode_query(self._model, **options, weight=weight)[None]
        names = [f"query {number}" for number in range(len(vectors))]
        vectors = rows.check_vectors(vectors, names, self.identity.dim)
        found = self._rows.search(vectors, k, where)
        if any(len(hits) < k for hits in found):
            # Approximate indexes give up early; then all rows that the filter keeps are scored.
            most = min(k, self._rows.count(where))
            short = [number for number, hits in enumerate(found) if len(hits) < most]
            completed = self._score_all(vectors[short], most, where) if short else []
            for number, hits in zip(short, completed, strict=True):
                found[number] = hits
        hits = [[_hit(row, score) for row, score in one] for one in found]
        return hits[0] if is_one else hits

    def scan(self, filter: Filter | None = None) -> Iterator[tuple[list[Row], np.ndarray]]:
        """Yields the rows that a filter keeps in batches, with their vectors [n, D].

        Their order is that of a hash of the key: the first ones are a random sample.
        """
        return self._rows.scan(filters.expression(filter))

    def _score_all(self, vectors: np.ndarray, k: int, where: str) -> list[list[tuple[Row, float]]]:
        parts = list(self._rows.scan(where))
        kept = [row for part, _ in parts for row in part]
        indices, scores = top_k(vectors, np.concatenate([z for _, z in parts]), k)
        return [
            [(kept[row], score) for row, score in zip(*pair, strict=True)]
            for pair in zip(indices, scores, strict=True)
        ]


def open_index(
    uri: str | os.PathLike, model: Any = None, *, index_type: str | None = None
) -> Index:
    """Returns the index at `uri`; with a model, makes it where there is none.

    Args:
      uri: a local folder, or http://host:port of a Milvus server (a token is read from
        ALIGN_MILVUS_TOKEN); `#name` after that names one of several indexes.
      model: an `Align`, which the index must belong to. Without it, search is by vectors only.
      index_type: "IVF_FLAT" (exact) or "HNSW", of a new index; None takes IVF_FLAT for a folder
        and HNSW on a server.

    Raises:
      ValueError: there is no index, it belongs to another model, or another process uses it.
      RuntimeError: the database cannot be reached or fails.
    """
    identity = None if model is None else identity_of(model)
    return Index(os.fspath(uri), identity, model=model, index_type=index_type)


def _hit(row: Row, score: float) -> Hit:
    return Hit(row.key, float(score), row.kind, row.caption, row.source, dict(row.metadata))
