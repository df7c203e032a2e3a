"""The routes of the server, and what each sends."""

import base64
import uuid
from collections.abc import Sequence
from importlib import resources
from typing import Any
from urllib.parse import quote

import numpy as np
from msgspec import UNSET
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from align_jax.search.rows import Hit
from align_jax.serve import inputs, openapi, schemas
from align_jax.serve.errors import ApiError, retry_later
from align_jax.serve.front import BODY, LOCAL_HOSTS, Front, error_response, json_response
from align_jax.serve.metrics import CONTENT_TYPE
from align_jax.serve.service import Service

CSP = (
    "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "frame-ancestors 'none'; form-action 'self'"
)
_PAGE_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


class Endpoints:
    """The endpoints of one service.

    Attributes:
      app: the ASGI application.
    """

    def __init__(
        self,
        service: Service,
        *,
        name: str = "align",
        key: str | None = None,
        hosts: tuple[str, ...] = LOCAL_HOSTS,
        writable: bool = False,
    ):
        """Makes the application.

        Args:
          service: what answers.
          name: of the model, for clients.
          key: that clients must send; None takes everybody.
          hosts: names that a request may be sent to; () allows any.
          writable: whether rows of the index may be added and deleted.
        """
        self._service = service
        self._name = name
        self._page = _read_page()
        self._fingerprint = service.model.fingerprint()
        routes = [
            Route("/", self._index_page),
            Route("/page/{name}", self._page_file),
            Route("/favicon.ico", self._favicon),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._metrics),
            Route("/openapi.json", self._openapi),
            Route("/v1/models", self._models),
            Route("/v1/embeddings", self._embeddings, methods=["POST"]),
            Route("/embeddings", self._embeddings, methods=["POST"]),  # infinity's clients
            Route("/v2/embed", self._cohere, methods=["POST"]),
            Route("/v1/classify", self._classify, methods=["POST"]),
        ]
        if service.index is not None:
            routes += [
                Route("/v1/search", self._search, methods=["POST"]),
                Route("/v1/items/{key:path}/image", self._picture),
            ]
            if writable:
                routes += [
                    Route("/v1/items", self._add, methods=["POST"]),
                    Route("/v1/items", self._delete, methods=["DELETE"]),
                ]
        handlers = {ApiError: _on_error, HTTPException: _on_http_error, Exception: _on_bug}
        starlette = Starlette(routes=routes, exception_handlers=handlers)
        served = {
            (method.lower(), route.path.replace(":path", ""))
            for route in routes
            for method in route.methods or ()
        }
        self._paths = openapi.document(served, has_key=key is not None)
        self.app = Front(starlette, service.limits, service.metrics, key=key, hosts=hosts)

    async def _embeddings(self, request: Request) -> Response:
        body = self._body(request, schemas.EmbeddingRequest)
        self._check_dimensions(body.dimensions, "dimensions")
        z, tokens = await self._service.embed(inputs.of_embedding_request(body))
        make = _to_base64 if body.encoding_format == "base64" else _to_floats
        data = [schemas.Embedding("embedding", i, row) for i, row in enumerate(make(z))]
        usage = schemas.Usage(sum(tokens), sum(tokens))
        return json_response(schemas.EmbeddingResponse("list", data, self._name, usage))

    async def _cohere(self, request: Request) -> Response:
        body = self._body(request, schemas.CohereRequest)
        self._check_dimensions(body.output_dimension, "output_dimension")
        z, tokens = await self._service.embed(inputs.of_cohere_request(body))
        kinds = body.embedding_types or ["float"]
        vectors = schemas.CohereEmbeddings(
            _to_floats(z) if "float" in kinds else UNSET,
            _to_base64(z) if "base64" in kinds else UNSET,
        )
        meta = {"api_version": {"version": "2"}, "billed_units": {"input_tokens": sum(tokens)}}
        return json_response(
            schemas.CohereResponse(str(uuid.uuid4()), vectors, body.texts or [], meta)
        )

    async def _classify(self, request: Request) -> Response:
        body = self._body(request, schemas.ClassifyRequest)
        images = inputs.of_images(body.images)
        probabilities = await self._service.classify(images, body.labels, body.templates)
        data = [
            schemas.Classified(
                number,
                [schemas.Label(body.labels[i], float(row[i])) for i in np.argsort(-row)],
            )
            for number, row in enumerate(probabilities)
        ]
        temperature = self._service.model.temperature
        return json_response(schemas.ClassifyResponse("list", data, self._name, temperature))

    async def _search(self, request: Request) -> Response:
        body = self._body(request, schemas.SearchRequest)
        hits, took = await self._service.search(body)
        index = self._service.index
        return json_response(
            schemas.SearchResponse(
                "list", [_hit(hit) for hit in hits], self._name, index.is_exact, took
            )
        )

    async def _picture(self, request: Request) -> Response:
        jpeg = await self._service.thumbnail(request.path_params["key"])
        return Response(
            jpeg, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"}
        )

    async def _add(self, request: Request) -> Response:
        body = self._body(request, schemas.AddRequest)
        return json_response(schemas.AddResponse(**await self._service.add(body.items)))

    async def _delete(self, request: Request) -> Response:
        body = self._body(request, schemas.DeleteRequest)
        return json_response(schemas.DeleteResponse(await self._service.delete(body.keys)))

    async def _models(self, request: Request) -> Response:
        model, index = self._service.model, self._service.index
        about = None
        if index is not None:
            about = {"is_exact": index.is_exact, "index_type": index.index_type}
        found = schemas.Model(
            self._name,
            "model",
            0,
            "align_jax",
            model.model.embed_dim,
            model.preprocessing.max_tokens,
            model.preprocessing.image_size,
            self._fingerprint,
            about,
        )
        return json_response(schemas.ModelsResponse("list", [found]))

    async def _health(self, request: Request) -> Response:
        return json_response(schemas.Health("ok"))

    async def _ready(self, request: Request) -> Response:
        if self.app.is_draining:
            return json_response(schemas.Ready("draining"), 503)
        if self._service.is_ready:
            return json_response(schemas.Ready("ready"))
        done, total = self._service.warmed
        return json_response(schemas.Ready("warming", f"{done}/{total}"), 503)

    async def _metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _openapi(self, request: Request) -> Response:
        return json_response(self._paths)

    async def _index_page(self, request: Request) -> Response:
        return self._file("index.html")

    async def _page_file(self, request: Request) -> Response:
        return self._file(request.path_params["name"])

    async def _favicon(self, request: Request) -> Response:
        return self._file("favicon.svg")

    def _file(self, name: str) -> Response:
        if name not in self._page:
            raise ApiError(404, "There is no such page.", code="not_found")
        kind, content = self._page[name]
        headers = {
            "Content-Security-Policy": CSP,
            "Content-Type": kind,
            "Cache-Control": "no-cache",
        }
        return Response(content, headers=headers)

    def _body(self, request: Request, kind: type) -> Any:
        """Returns the parsed body, once the model is ready and is the one that is asked for."""
        sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if sent != "application/json":  # which a page of another site cannot send unasked
            message = "Send JSON, with Content-Type: application/json."
            raise ApiError(415, message, code="unsupported_media_type")
        if not self._service.is_ready:
            done, total = self._service.warmed
            raise retry_later(503, f"The model warms up: {done}/{total} shapes.", "not_ready")
        body = inputs.parse(request.scope[BODY], kind)
        asked = getattr(body, "model", None)
        if asked is not None and asked != self._name:
            message = f"There is no model {asked[:80]!r}; this server has {self._name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return body

    def _check_dimensions(self, given: int | None, param: str) -> None:
        dim = self._service.model.model.embed_dim
        if given not in (None, 0, dim):
            raise ApiError(400, f"{param} must be {dim}, or left out.", param=param)


def _hit(hit: Hit) -> schemas.SearchHit:
    where = f"/v1/items/{quote(hit.key, safe='')}/image"
    has_image = hit.kind == "image" and bool(hit.source)
    return schemas.SearchHit(
        hit.key, hit.score, hit.kind, hit.caption, hit.metadata, where if has_image else None
    )


def _to_floats(z: np.ndarray) -> Sequence[list[float]]:
    # Nine decimals are closer to a float32 below 1 than its neighbours are, and half as long.
    return np.round(z.astype(np.float64), 9).tolist()


def _to_base64(z: np.ndarray) -> Sequence[str]:
    return [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in z]


def _read_page() -> dict[str, tuple[str, bytes]]:
    """Returns name -> (media type, content) of the files that make the page."""
    folder = resources.files("align_jax.serve") / "page"
    if not folder.is_dir():
        return {}
    return {
        file.name: (_PAGE_TYPES[suffix], file.read_bytes())
        for file in folder.iterdir()
        if (suffix := file.name.rpartition(".")[2]) in _PAGE_TYPES
    }


async def _on_error(request: Request, error: ApiError) -> Response:
    return error_response(error)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    text = {404: "There is no such address.", 405: "This method is not for this address."}
    message = text.get(error.status_code, "The request cannot be answered.")
    return error_response(ApiError(error.status_code, message, headers=error.headers))


async def _on_bug(request: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "The server failed; its log says why."))
