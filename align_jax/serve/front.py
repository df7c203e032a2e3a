"""What every request passes before an endpoint sees it: host, origin, key, body, deadline.

An endpoint gets the whole body in `scope["align.body"]`, and is cancelled when its client has gone.
"""

import asyncio
import base64
import binascii
import contextlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import msgspec
from starlette.responses import Response

from align_jax.serve.errors import ApiError, retry_later
from align_jax.serve.limits import Limits
from align_jax.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY = "align.body"
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")

_OPEN = "/health"
_MAX_HEADERS = 100
_DISCARDED_S = 2.0  # a client that is refused while it sends may go on for so long
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]

_logger = logging.getLogger(__name__)


class Front:
    """ASGI application around another one.

    Attributes:
      is_draining: whether the server stops; /ready says so.
    """

    def __init__(
        self,
        app: App,
        limits: Limits,
        metrics: Metrics,
        *,
        key: str | None = None,
        hosts: tuple[str, ...] = LOCAL_HOSTS,
    ):
        """Wraps an application.

        Args:
          app: with the endpoints.
          limits: what is admitted.
          metrics: what is counted.
          key: that clients must send; None takes everybody.
          hosts: names that a request may be sent to, without ports; () allows any.
        """
        self._app = app
        self._limits = limits
        self._metrics = metrics
        self._key = None if key is None else key.encode()
        self._hosts = hosts
        self._body_bytes = 0  # of all requests that are being answered
        self.is_draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; other kinds of connections are refused."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        started, state = time.monotonic(), {"code": 499}  # nginx's for a client that has gone

        async def send_counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                state["code"] = message["status"]
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        try:
            await self._answer(scope, receive, send_counted)
        except _Gone:
            pass
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(state["code"])).inc()
            self._metrics.request_seconds.labels(route).observe(time.monotonic() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        held, is_whole, has_started = 0, False, False

        async def send_once(message: MutableMapping[str, Any]) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            headers = _read_headers(scope)
            self._check(scope, headers)
            body = bytearray()
            async for part in self._body(headers, receive):
                held += len(part)
                self._body_bytes += len(part)
                if self._body_bytes > self._limits.bodies_bytes:
                    self._metrics.rejected.labels("bodies_full").inc()
                    raise retry_later(429, "Too much is being sent; come again.", "queue_full")
                body += part
            is_whole = True
            scope[BODY] = bytes(body)
            del body
            await self._run(scope, receive, send_once)
        except ApiError as error:
            if has_started:  # the client reads too slowly: the connection is closed
                return
            if not is_whole:
                await self._discard(receive)
                error.headers["Connection"] = "close"
            await error_response(error)(scope, receive, send)
        finally:
            self._body_bytes -= held

    def _check(self, scope: Scope, headers: Mapping[str, str]) -> None:
        """Raises ApiError unless host, origin, key and form of the request are right."""
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if self._hosts and name.lower() not in self._hosts:
            raise ApiError(400, "This host name is not served here.", code="host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise ApiError(400, "Pages of other sites may not ask.", code="origin_not_allowed")
        if self._key is not None and scope["path"] != _OPEN:
            self._check_key(scope["path"], headers.get("authorization", ""))
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(
                415, "Send the body as it is, uncompressed.", code="unsupported_encoding"
            )
        if "content-length" in headers and "transfer-encoding" in headers:
            raise ApiError(400, "Content-Length and Transfer-Encoding exclude each other.")

    def _check_key(self, path: str, given: str) -> None:
        scheme, _, value = given.partition(" ")
        offered = value.encode("utf-8", "replace") if scheme == "Bearer" else b""
        if scheme == "Basic":  # what a browser sends after it has asked for a password
            with contextlib.suppress(binascii.Error, ValueError):
                offered = base64.b64decode(value, validate=True).partition(b":")[2]
        if not hmac.compare_digest(offered, self._key):
            self._metrics.rejected.labels("key").inc()
            message = "The API key is missing or wrong; send Authorization: Bearer KEY."
            is_page = path == "/" or path.startswith("/page/")
            ask = 'Basic realm="align", charset="UTF-8"' if is_page else "Bearer"
            headers = {"WWW-Authenticate": ask}
            raise ApiError(401, message, code="invalid_api_key", headers=headers)

    async def _body(self, headers: Mapping[str, str], receive: Receive) -> Any:
        """Yields the parts of the body; ends with an error at the limits of size and time."""
        most = self._limits.body_bytes
        too_large = ApiError(413, f"The body is larger than {most:,} bytes.", code="body_too_large")
        declared = headers.get("content-length", "0")
        if not declared.isdecimal():
            raise ApiError(400, "Content-Length is no number.")
        if int(declared) > most:
            raise too_large
        size, end = 0, time.monotonic() + self._limits.body_s
        while True:
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                text = f"The body was not there after {self._limits.body_s:g} s."
                raise ApiError(408, text, code="body_too_slow") from None
            if message["type"] == "http.disconnect":
                raise _Gone
            part = message.get("body", b"")
            size += len(part)
            if size > most:
                raise too_large
            yield part
            if not message.get("more_body", False):
                return

    async def _discard(self, receive: Receive) -> None:
        """Reads on for a while: a client that still sends would not see the error otherwise."""
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DISCARDED_S):
                while size <= self._limits.body_bytes:
                    message = await receive()
                    size += len(message.get("body", b""))
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        return

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the endpoint until its answer, its deadline, or its client's end."""

        async def no_more() -> MutableMapping[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        work = asyncio.ensure_future(self._app(scope, no_more, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            done, _ = await asyncio.wait(
                (work, gone),
                timeout=self._limits.request_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if work in done:
                work.result()
            elif gone in done:
                raise _Gone
            else:
                self._metrics.rejected.labels("deadline").inc()
                message = f"No answer within {self._limits.request_s:g} s; send less, or later."
                raise retry_later(503, message, "deadline_exceeded")
        finally:
            for task in (work, gone):
                if not task.done():
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError, Exception):
                        await task


class _Gone(Exception):
    """The client has closed the connection."""


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Returns a struct of `schemas` as a response."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    """Returns an error as a response."""
    return json_response(error.content(), error.status, error.headers)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _read_headers(scope: Scope) -> dict[str, str]:
    """Returns the headers; ApiError where one that decides something comes twice."""
    if len(scope["headers"]) > _MAX_HEADERS:
        raise ApiError(431, f"There are more than {_MAX_HEADERS} headers.")
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        name = name.decode("latin-1").lower()
        if name in found and name in _SINGLE:
            raise ApiError(400, f"The header {name} comes twice.")
        found[name] = value.decode("latin-1")
    return found


_SINGLE = (
    "authorization",
    "content-encoding",
    "content-length",
    "content-type",
    "host",
    "origin",
    "transfer-encoding",
)
