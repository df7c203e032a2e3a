"""Bodies of requests and responses, as types; their JSON schemas are made from them (openapi.py).

`/v1/embeddings` takes the union of what four kinds of clients send: OpenAI's strings, data URIs
with infinity's `modality`, Jina's {"text"} and {"image"}, and vLLM's `messages`; `/v2/embed` is
Cohere's. Fields of those that are not named here are ignored, as their servers do; unknown fields
of our own endpoints are errors.
"""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

MAX_INPUTS = 2048
MAX_LABELS = 1000
MAX_TEMPLATES = 100
MAX_K = 1000
MAX_TERMS = 16  # texts that a query adds or removes
MAX_ITEMS = 256

_Text = Annotated[str, Meta(min_length=1)]
_Terms = Annotated[list[_Text], Meta(max_length=MAX_TERMS)]


class ImageUrl(Struct):
    """OpenAI's part of a message: {"url": "data:image/png;base64,..."}."""

    url: _Text


class InputItem(Struct):
    """One input: exactly one of text, image and image_url."""

    text: _Text | UnsetType = UNSET
    image: _Text | UnsetType = UNSET
    image_url: _Text | ImageUrl | UnsetType = UNSET
    type: Literal["text", "image", "image_url", "input_text", "input_image"] | UnsetType = UNSET


class Message(Struct):
    """One message, whose content is one text or one image."""

    content: _Text | Annotated[list[InputItem], Meta(min_length=1)]
    role: str = "user"


class EmbeddingRequest(Struct):
    """Of /v1/embeddings: `input`, or `messages` with one vector each."""

    input: (
        _Text
        | InputItem
        | Annotated[list[_Text | InputItem], Meta(min_length=1, max_length=MAX_INPUTS)]
        | None
    ) = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_INPUTS)] | None = None
    model: str | None = None
    modality: Literal["text", "image"] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=0)] | None = None
    user: str | None = None


class Embedding(Struct):
    """One vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(Struct):
    """Tokens of the texts, as they were cut; images count none."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(Struct):
    """Of /v1/embeddings; `data` in the order of the inputs."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class CohereInput(Struct):
    """One input of Cohere: a content of one text or one image."""

    content: Annotated[list[InputItem], Meta(min_length=1)]


class CohereRequest(Struct):
    """Of /v2/embed."""

    texts: Annotated[list[_Text], Meta(max_length=MAX_INPUTS)] | None = None
    images: Annotated[list[_Text], Meta(max_length=MAX_INPUTS)] | None = None
    inputs: Annotated[list[CohereInput], Meta(max_length=MAX_INPUTS)] | None = None
    model: str | None = None
    input_type: str | None = None
    embedding_types: list[Literal["float", "base64"]] | None = None
    output_dimension: Annotated[int, Meta(ge=0)] | None = None
    truncate: Literal["END"] | None = None


class CohereEmbeddings(Struct, omit_defaults=True):
    """Vectors in the types that were asked for."""

    floats: list[list[float]] | UnsetType = field(name="float", default=UNSET)
    base64: list[str] | UnsetType = UNSET


class CohereResponse(Struct):
    """Of /v2/embed."""

    id: str
    embeddings: CohereEmbeddings
    texts: list[str]
    meta: dict[str, Any]


class ClassifyRequest(Struct, forbid_unknown_fields=True):
    """Of /v1/classify."""

    images: Annotated[list[_Text], Meta(min_length=1, max_length=MAX_INPUTS)]
    labels: Annotated[list[_Text], Meta(min_length=1, max_length=MAX_LABELS)]
    templates: Annotated[list[_Text], Meta(min_length=1, max_length=MAX_TEMPLATES)] | None = None
    model: str | None = None


class Label(Struct):
    """One label and its probability."""

    label: str
    probability: float


class Classified(Struct):
    """One image: labels, the most probable first."""

    index: int
    labels: list[Label]


class ClassifyResponse(Struct):
    """Of /v1/classify."""

    object: Literal["list"]
    data: list[Classified]
    model: str
    temperature: float


class SearchRequest(Struct, forbid_unknown_fields=True):
    """Of /v1/search: an image, a text or a vector; texts to add and remove; a filter."""

    image: _Text | None = None
    text: _Text | None = None
    add: _Terms = []
    remove: _Terms = []
    weight: float | None = None
    vector: Annotated[list[float], Meta(min_length=1, max_length=65_536)] | None = None
    kind: Literal["image", "text", "any"] = "image"
    filter: dict[str, Any] | None = None
    k: Annotated[int, Meta(ge=1, le=MAX_K)] = 10
    offset: Annotated[int, Meta(ge=0, le=MAX_K)] = 0
    model: str | None = None


class SearchHit(Struct):
    """One row; `image` is where its picture is, None for a text."""

    key: str
    score: float
    kind: str
    caption: str
    meta: dict[str, Any]
    image: str | None


class SearchResponse(Struct):
    """Of /v1/search, best first."""

    object: Literal["list"]
    data: list[SearchHit]
    index: str
    exact: bool
    took_ms: dict[str, float]


class NewItem(Struct, forbid_unknown_fields=True):
    """A row to add: exactly one of image and text."""

    key: _Text
    image: _Text | None = None
    text: _Text | None = None
    caption: str | None = None
    meta: dict[str, Any] = {}


class AddRequest(Struct, forbid_unknown_fields=True):
    """Of POST /v1/items."""

    items: Annotated[list[NewItem], Meta(min_length=1, max_length=MAX_ITEMS)]


class AddResponse(Struct):
    """Rows by what became of them."""

    added: int
    updated: int
    unchanged: int


class DeleteRequest(Struct, forbid_unknown_fields=True):
    """Of DELETE /v1/items."""

    keys: Annotated[list[_Text], Meta(min_length=1, max_length=MAX_INPUTS)]


class DeleteResponse(Struct):
    """How many of the rows were there."""

    deleted: int


class Model(Struct):
    """A model, in OpenAI's shape, with what a client of ours needs to know."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    dimensions: int
    max_tokens: int
    image_size: int
    fingerprint: str
    index: dict[str, Any] | None


class ModelsResponse(Struct):
    """Of /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Health(Struct):
    """Of /health."""

    status: Literal["ok"]


class Ready(Struct, omit_defaults=True):
    """Of /ready; `warming` counts compiled shapes, "7/18"."""

    status: Literal["ready", "warming", "draining"]
    warming: str | UnsetType = UNSET


class Error(Struct):
    """What is wrong; `param` names the input."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Struct):
    """Of every error."""

    error: Error
