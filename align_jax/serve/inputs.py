"""Bodies of requests to inputs: JSON without ambiguity, and what four kinds of clients send.

Every input keeps its name in the request, so that an error can say which one is meant.
"""

import base64
import binascii
import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec import UNSET

from align_jax.serve import schemas
from align_jax.serve.batcher import IMAGE, TEXT
from align_jax.serve.errors import ApiError
from align_jax.storage import text as text_lib

_DATA_URI = re.compile(r"data:([^,;]*)((?:;[^,;]*)*),", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_URL = re.compile(r"https?:", re.IGNORECASE)

T = TypeVar("T")


class Input(NamedTuple):
    """One text or image, as it came.

    Attributes:
      tower: IMAGE or TEXT.
      value: the text; or a data URI, base64, or URL of an image.
      param: its name in the request.
    """

    tower: str
    value: str
    param: str


def parse(body: bytes, kind: type[T]) -> T:
    """Returns the body as one of the structs of `schemas`; half surrogate pairs become U+FFFD.

    Raises:
      ApiError: 400; it is no JSON (numbers that are not finite and repeated keys included), or does
        not fit the schema.
    """
    if body.startswith(b"\xef\xbb\xbf"):
        raise ApiError(400, "The body starts with a byte order mark.", code="invalid_json")
    try:
        content = _clean(
            json.loads(
                body.decode(),
                object_pairs_hook=_without_repeats,
                parse_constant=_refuse_constant,
                parse_float=_finite,
            )
        )
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"The body is no JSON: {reason}.", code="invalid_json") from None
    if kind is schemas.EmbeddingRequest and isinstance(content, dict):
        _refuse_tokens(content.get("input"))
    try:
        return msgspec.convert(content, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        message, _, path = str(error).partition(" - at `$")
        param = path.rstrip("`").lstrip(".") or None
        where = f"{param}: " if param else ""
        raise ApiError(400, f"{where}{message}.", param=param, code="invalid_value") from None


def of_embedding_request(request: schemas.EmbeddingRequest) -> list[Input]:
    """Returns the inputs of `input` or of `messages`."""
    if (request.input is None) == (request.messages is None):
        raise ApiError(400, "Give either 'input' or 'messages'.", param="input")
    if request.messages is not None:
        return [
            _of_content(message.content, f"messages[{number}].content")
            for number, message in enumerate(request.messages)
        ]
    given = request.input
    if not isinstance(given, list):
        return [_of_one(given, "input", request.modality)]
    return [_of_one(one, f"input[{number}]", request.modality) for number, one in enumerate(given)]


def of_cohere_request(request: schemas.CohereRequest) -> list[Input]:
    """Returns the inputs of `texts`, `images` and `inputs`, in this order."""
    found = [Input(TEXT, text, f"texts[{i}]") for i, text in enumerate(request.texts or ())]
    found += of_images(request.images or ())
    found += [
        _of_content(one.content, f"inputs[{number}].content")
        for number, one in enumerate(request.inputs or ())
    ]
    if not 1 <= len(found) <= schemas.MAX_INPUTS:
        raise ApiError(400, f"Give 1 to {schemas.MAX_INPUTS:,} texts and images.", param="texts")
    return found


def of_images(images: Sequence[str]) -> list[Input]:
    """Returns the inputs of a list `images`."""
    return [Input(IMAGE, image, f"images[{number}]") for number, image in enumerate(images)]


def text_of(given: Input, most_chars: int) -> str:
    """Returns the text; ApiError if it is too long."""
    if len(given.value) > most_chars:
        message = f"{given.param} has {len(given.value):,} characters; at most {most_chars:,}."
        raise ApiError(400, message, param=given.param, code="text_too_long")
    return given.value


def url_of(given: Input) -> str | None:
    """Returns the http(s) URL of an image; None if the input holds the image itself."""
    return given.value if _URL.match(given.value) else None


def image_bytes(given: Input, most_bytes: int) -> bytes:
    """Returns the encoded image of a data URI, or of plain base64.

    Raises:
      ApiError: 400; it is neither, or larger than `most_bytes`.
    """
    value = given.value
    start = 0
    if match := _DATA_URI.match(value):
        if ";base64" not in match[2].lower():
            raise _no_image(given, "is a data URI without ';base64'")
        start = match.end()
    elif _SCHEME.match(value):
        raise _no_image(given, "is neither a data:image/...;base64 URI nor base64")
    if (len(value) - start) * 3 // 4 > most_bytes + 2:
        message = f"{given.param} is larger than {most_bytes:,} bytes."
        raise ApiError(400, message, param=given.param, code="image_too_large")
    try:
        return base64.b64decode(value[start:] if start else value, validate=True)
    except (binascii.Error, ValueError):
        raise _no_image(given, "is neither a data:image/...;base64 URI nor base64") from None


def _no_image(given: Input, reason: str) -> ApiError:
    message = f"{given.param} {reason}."
    return ApiError(400, message, param=given.param, code="invalid_image")


def _of_one(given: str | schemas.InputItem, name: str, modality: str | None) -> Input:
    if isinstance(given, schemas.InputItem):
        return _of_item(given, name)
    is_image = modality == IMAGE or (modality is None and given[:11].lower() == "data:image/")
    return Input(IMAGE if is_image else TEXT, given, name)


def _of_item(item: schemas.InputItem, name: str) -> Input:
    given = [key for key in ("text", "image", "image_url") if getattr(item, key) is not UNSET]
    if len(given) != 1:
        message = f"{name} holds {' and '.join(given) or 'neither'}; give one of text, image."
        raise ApiError(400, message, param=name, code="invalid_value")
    value, name = getattr(item, given[0]), f"{name}.{given[0]}"
    if isinstance(value, schemas.ImageUrl):
        value, name = value.url, f"{name}.url"
    return Input(TEXT if given[0] == "text" else IMAGE, value, name)


def _of_content(content: str | list[schemas.InputItem], name: str) -> Input:
    if isinstance(content, str):
        return Input(TEXT, content, name)
    if len(content) != 1:
        message = f"{name} has {len(content)} parts; one vector is of one text or one image."
        raise ApiError(400, message, param=name, code="invalid_value")
    return _of_item(content[0], f"{name}[0]")


def _clean(content: Any) -> Any:
    if isinstance(content, str):
        return text_lib.clean_halves(content)
    if isinstance(content, list):
        return [_clean(one) for one in content]
    if isinstance(content, dict):
        return {_clean(key): _clean(value) for key, value in content.items()}
    return content


def _refuse_tokens(given: Any) -> None:
    first = given[0] if isinstance(given, list) and given else None
    if isinstance(first, int | list) and not isinstance(first, bool):
        raise ApiError(
            400,
            "input holds token ids; send texts (langchain: check_embedding_ctx_length=False).",
            param="input",
            code="token_input_unsupported",
        )


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice in one object")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is too large")
    return value
