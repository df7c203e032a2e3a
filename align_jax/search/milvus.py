"""One collection of Milvus: in a local folder (Milvus Lite) or on a server. Knows no models.

The only file that imports Milvus, when the first index is opened. What its libraries do with
rows and errors that nobody would want is kept from the user here:

- Lite's HNSW returns too few and wrong rows, silently, where a filter is selective. A folder gets
  IVF_FLAT with one list, which compares with all rows whatever a search says.
- Lite has no password. It is reached by a socket in a folder of this user, not by a port.
- Its client puts keys into expressions unquoted. The primary key is a hash of the key instead.
- Its clustering warns of few rows, on standard error, although one list needs no centre.
- Its loggers print a traceback for every error that is raised as well, and importing it sets up
  logging anew for the whole program.
"""

import contextlib
import dataclasses
import json
import logging
import logging.config
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align_jax.search.rows import MAX_TEXT_BYTES, Row
from align_jax.storage import identity, writing

INDEX_TYPES = ("IVF_FLAT", "HNSW")

_BUILD = {"IVF_FLAT": {"nlist": 1}, "HNSW": {"M": 16, "efConstruction": 200}}
_ALL_LISTS = 65_536
_LEAST_EF = 64
_SCHEMES = ("http://", "https://", "tcp://")
_NAME = "align"
_DATA, _SIDE_FILE = "milvus.db", "align.json"
_FIELDS = [field.name for field in dataclasses.fields(Row)]
_PROPERTY = "align.about"
_CALL_ROWS = 1000  # rows or queries; a message to a server is at most 64 MiB
_CALL_HITS = 50_000
_TIMEOUT_S = 10


class Collection:
    """Rows with vectors; made where there is none and `about` is given.

    Attributes:
      uri: as given, less its password.
      is_local: whether it is a folder of this machine.
      about: what was given when it was made.
      index_type: one of INDEX_TYPES.
    """

    def __init__(
        self,
        uri: str,
        about: dict[str, Any] | None,
        index_type: str | None,
        work: str,
        cleanup: contextlib.ExitStack,
    ):
        """Opens the collection; see index.Index.

        Args:
          uri: folder, or address of a server; `#name` after an address names a collection.
          about: JSON to keep with a new collection, with the `dim` of its vectors.
          index_type: of a new collection; None takes what suits the place.
          work: what is done, for a process that finds the folder in use.
          cleanup: closes the collection.
        """
        self.is_local = not uri.startswith(_SCHEMES)
        address, _, name = uri.partition("#")
        self.uri = uri if self.is_local else _without_password(uri)
        self._pymilvus = _import()
        with self._one_line():
            if self.is_local:
                self._client = _open_folder(uri, about is not None, work, cleanup)
                self._name = _NAME
            else:
                token = os.environ.get("ALIGN_MILVUS_TOKEN", "")
                self._client = self._pymilvus.MilvusClient(address, token=token, timeout=_TIMEOUT_S)
                cleanup.callback(self._client.close)
                self._name = f"{_NAME}_{name}" if name else _NAME
            if not self._client.has_collection(self._name):
                if about is None:
                    raise ValueError(f"{self.uri} holds no index; make one with `align index add`.")
                self._create(about, index_type or ("IVF_FLAT" if self.is_local else "HNSW"))
            properties = self._client.describe_collection(self._name).get("properties", {})
            if _PROPERTY not in properties:
                raise ValueError(f"{self.uri}: the collection {self._name} is no index of align.")
            self.about = json.loads(properties[_PROPERTY])
            self.index_type = self.about.pop("index_type")
            if self.is_local and not (side_file := Path(uri) / _SIDE_FILE).exists():
                writing.write_json(side_file, {**self.about, "index_type": self.index_type})
            self._client.load_collection(self._name)

    @property
    def is_exact(self) -> bool:
        """Whether a search compares with all rows."""
        return self.index_type == "IVF_FLAT"

    def put(self, new: Sequence[Row], vectors: np.ndarray) -> None:
        """Stores rows with different keys; each takes the place of the one with its key."""
        for start in range(0, len(new), _CALL_ROWS):
            part = new[start : start + _CALL_ROWS]
            entities = [
                {
                    "id": _id(row.key),
                    "vector": vector,
                    **{name: getattr(row, name) for name in _FIELDS},
                }
                for row, vector in zip(part, vectors[start : start + _CALL_ROWS], strict=True)
            ]
            with self._one_line():
                self._client.upsert(self._name, entities)

    def digests(self, keys: Sequence[str]) -> dict[str, str]:
        """Returns the digests of the rows that have one of the keys, by key."""
        return {key: row["digest"] for key, row in self._get(keys, ["digest"])}

    def get(self, keys: Sequence[str]) -> dict[str, Row]:
        """Returns the rows that have one of the keys, by key."""
        return {key: _row(row) for key, row in self._get(keys, _FIELDS)}

    def delete_keys(self, keys: Sequence[str]) -> None:
        """Deletes the rows that have one of the keys."""
        for start in range(0, len(keys), _CALL_ROWS):
            with self._one_line():
                ids = [_id(key) for key in keys[start : start + _CALL_ROWS]]
                self._client.delete(self._name, ids=ids)

    def delete(self, where: str) -> None:
        """Deletes the rows for which an expression holds."""
        with self._one_line():
            self._client.delete(self._name, filter=where)

    def flush(self) -> None:
        """Seals what was stored and builds its index; nothing is lost without it."""
        with self._one_line():
            self._client.flush(self._name)

    def count(self, where: str = "") -> int:
        """Returns the number of rows for which an expression holds."""
        with self._one_line():
            rows = self._client.query(self._name, filter=where, output_fields=["count(*)"])
        return int(rows[0]["count(*)"])

    def search(self, vectors: np.ndarray, k: int, where: str) -> list[list[tuple[Row, float]]]:
        """Returns for each of the vectors [N, D] at most k rows and their cosines, best first."""
        if self.is_exact:
            parameters = {"nprobe": _ALL_LISTS if self.is_local else 1}
        else:
            parameters = {"ef": max(_LEAST_EF, 2 * k)}
        queries = max(1, min(_CALL_ROWS, _CALL_HITS // k))
        found: list[list[tuple[Row, float]]] = []
        for start in range(0, len(vectors), queries):
            with self._one_line():
                answers = self._client.search(
                    self._name,
                    data=vectors[start : start + queries],
                    anns_field="vector",
                    limit=k,
                    filter=where,
                    output_fields=_FIELDS,
                    search_params={"params": parameters},
                )
            found += [[(_row(hit["entity"]), hit["distance"]) for hit in hits] for hits in answers]
        return found

    def scan(self, where: str = "") -> Iterator[tuple[list[Row], np.ndarray]]:
        """Yields all rows for which an expression holds, in no order of theirs, with vectors."""
        with self._one_line():
            pages = self._client.query_iterator(
                self._name,
                batch_size=_CALL_ROWS,
                filter=where,
                output_fields=[*_FIELDS, "vector"],
            )
        try:
            while True:
                with self._one_line():
                    page = pages.next()
                if not page:
                    return
                yield [_row(row) for row in page], np.array([r["vector"] for r in page], np.float32)
        finally:
            pages.close()

    def _get(self, keys: Sequence[str], fields: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        for start in range(0, len(keys), _CALL_ROWS):
            ids = {_id(key): key for key in keys[start : start + _CALL_ROWS]}
            with self._one_line():
                rows = self._client.get(self._name, ids=list(ids), output_fields=["id", *fields])
            yield from ((ids[row["id"]], row) for row in rows)

    def _create(self, about: dict[str, Any], index_type: str) -> None:
        kinds = self._pymilvus.DataType
        schema = self._pymilvus.MilvusClient.create_schema(auto_id=False)
        text = {"datatype": kinds.VARCHAR, "max_length": MAX_TEXT_BYTES}
        schema.add_field("id", kinds.VARCHAR, max_length=32, is_primary=True)
        schema.add_field("vector", kinds.FLOAT_VECTOR, dim=about["dim"])
        schema.add_field("key", **text)
        schema.add_field("kind", kinds.VARCHAR, max_length=8)
        schema.add_field("caption", **text)
        schema.add_field("source", **text)
        schema.add_field("metadata", kinds.JSON)
        schema.add_field("digest", kinds.VARCHAR, max_length=32)
        parameters = self._pymilvus.MilvusClient.prepare_index_params()
        build = _BUILD[index_type]
        # Its client sends each by itself; Lite reads them from "params" only.
        build = {"params": build} if self.is_local else build
        parameters.add_index("vector", index_type=index_type, metric_type="IP", params=build)
        self._client.create_collection(
            self._name,
            schema=schema,
            index_params=parameters,
            properties={_PROPERTY: json.dumps({**about, "index_type": index_type})},
            consistency_level="Strong",
        )

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        """Errors of the database become one line of ours."""
        try:
            yield
        except self._pymilvus.MilvusException as error:
            full = writing.explain_full_disk(error, self.uri) if self.is_local else None
            raise full or RuntimeError(f"{self.uri}: {error.message}") from error


def _import() -> Any:
    configure = logging.config.dictConfig
    # It would set up logging for the whole program, which closes the handlers that are there.
    logging.config.dictConfig = lambda config: None
    try:
        import milvus_lite  # noqa: F401
        import pymilvus
    except ImportError as error:
        raise ValueError(
            f"An index needs {error.name}, which is not installed: pip install 'align_jax[search]'."
        ) from None
    finally:
        logging.config.dictConfig = configure
    _silence_clustering()
    for name in ("pymilvus", "milvus_lite", "grpc._server"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    return pymilvus


def _silence_clustering() -> None:
    """Lets Lite train the one list of an index of few rows without a word on standard error."""
    from milvus_lite.index import faiss_ivf_flat

    faiss = faiss_ivf_flat.faiss

    class _Faiss:
        def __getattr__(self, name: str) -> Any:
            return getattr(faiss, name)

        def IndexIVFFlat(self, *arguments: Any) -> Any:
            index = faiss.IndexIVFFlat(*arguments)
            index.cp.min_points_per_centroid = 1
            return index

    if type(faiss).__name__ != "_Faiss":
        faiss_ivf_flat.faiss = _Faiss()


def _open_folder(uri: str, may_create: bool, work: str, cleanup: contextlib.ExitStack) -> Any:
    """Returns a client of the Milvus Lite in a folder; `cleanup` ends it and frees the folder."""
    writing.check_local(uri, "--index")
    folder = Path(uri)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{uri} is a file; an index is a folder, or http://host:port.")
    if not (folder / _DATA).is_dir():
        if not may_create:
            raise ValueError(f"{uri} holds no index; make one with `align index add`.")
        if folder.exists() and any(path.name != writing.LOCK_FILE for path in folder.iterdir()):
            raise ValueError(f"{uri} holds other files; name a new folder for the index.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    cleanup.enter_context(writing.locked(folder, work))
    from milvus_lite.adapter.grpc import server as lite
    from pymilvus import MilvusClient

    sockets = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="align-"))
    server, database, port = lite.start_server_in_thread(
        str(folder / _DATA), host=f"unix:{sockets}/lite", port=0
    )
    cleanup.callback(database.close)
    cleanup.callback(lambda: server.stop(grace=2).wait())
    client = MilvusClient(f"unix:{sockets}/lite:0")
    cleanup.callback(client.close)
    return client


def _without_password(uri: str) -> str:
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


def _id(key: str) -> str:
    return identity.digest([key])


def _row(fields: dict[str, Any]) -> Row:
    return Row(**{name: fields[name] for name in _FIELDS})
