"""The description of the endpoints in OpenAPI 3.1, made from the types of `schemas`."""

from collections.abc import Collection
from typing import Any, NamedTuple

import msgspec

from align_jax import __version__
from align_jax.serve import schemas

_ERRORS = {
    400: "an input cannot be used; `param` names it",
    401: "the key is missing or wrong",
    404: "no such address, model or row",
    405: "another method",
    408: "the body came too slowly",
    413: "the body is too large",
    415: "the body is no JSON, or compressed",
    431: "too many headers",
    429: "the queue is full; see Retry-After",
    500: "the server failed",
    503: "warming up, stopping, or no answer in time; see Retry-After",
}
_REF = "#/components/schemas/{name}"


class _Operation(NamedTuple):
    method: str
    path: str
    about: str
    request: type | None
    response: type | str  # a struct, or a media type


_OPERATIONS = (
    _Operation(
        "post",
        "/v1/embeddings",
        "Embeddings of texts and images",
        schemas.EmbeddingRequest,
        schemas.EmbeddingResponse,
    ),
    _Operation(
        "post",
        "/v2/embed",
        "The same, in Cohere's form",
        schemas.CohereRequest,
        schemas.CohereResponse,
    ),
    _Operation(
        "post",
        "/v1/classify",
        "Probabilities of labels for images",
        schemas.ClassifyRequest,
        schemas.ClassifyResponse,
    ),
    _Operation(
        "post",
        "/v1/search",
        "Rows of the index by text, image, image and words, or vector",
        schemas.SearchRequest,
        schemas.SearchResponse,
    ),
    _Operation(
        "post", "/v1/items", "Adds or replaces rows", schemas.AddRequest, schemas.AddResponse
    ),
    _Operation(
        "delete", "/v1/items", "Deletes rows", schemas.DeleteRequest, schemas.DeleteResponse
    ),
    _Operation(
        "get", "/v1/items/{key}/image", "The picture of a row, at most 512 px", None, "image/jpeg"
    ),
    _Operation("get", "/v1/models", "The model", None, schemas.ModelsResponse),
    _Operation("get", "/health", "Whether the process is up; needs no key", None, schemas.Health),
    _Operation("get", "/ready", "Whether every shape is compiled", None, schemas.Ready),
    _Operation("get", "/metrics", "Counters, for Prometheus", None, "text/plain"),
)


def document(served: Collection[tuple[str, str]], *, has_key: bool) -> dict[str, Any]:
    """Returns the description of the endpoints that a server has.

    Args:
      served: (method, path) of each, as in ("post", "/v1/search").
      has_key: whether clients must send one.
    """
    operations = [one for one in _OPERATIONS if (one.method, one.path) in served]
    named = [kind for one in operations for kind in (one.request, one.response)]
    types = {kind for kind in named if isinstance(kind, type)} | {schemas.ErrorResponse}
    ordered = sorted(types, key=lambda kind: kind.__name__)
    references, components = msgspec.json.schema_components(ordered, ref_template=_REF)
    schema_of = dict(zip(ordered, references, strict=True))
    paths: dict[str, Any] = {}
    for one in operations:
        paths.setdefault(one.path, {})[one.method] = _describe(one, schema_of, has_key)
    found = {
        "openapi": "3.1.0",
        "info": {"title": "align_jax", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }
    if has_key:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return found


def _describe(one: _Operation, schema_of: dict[type, Any], has_key: bool) -> dict[str, Any]:
    if isinstance(one.response, str):
        content = {one.response: {"schema": {"type": "string"}}}
    else:
        content = _json(schema_of[one.response])
    responses: dict[str, Any] = {"200": {"description": "done", "content": content}}
    for status, text in _ERRORS.items():
        kind = schema_of[schemas.ErrorResponse]
        if one.response is schemas.Ready and status == 503:
            kind = {"anyOf": [kind, schema_of[schemas.Ready]]}
        responses[str(status)] = {"description": text, "content": _json(kind)}
    found: dict[str, Any] = {"summary": one.about, "responses": responses}
    if one.request is not None:
        found["requestBody"] = {"required": True, "content": _json(schema_of[one.request])}
    if "{key}" in one.path:
        key = {"type": "string", "minLength": 1}
        found["parameters"] = [{"name": "key", "in": "path", "required": True, "schema": key}]
    if has_key and one.path != "/health":
        found["security"] = [{"key": []}]
    return found


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
