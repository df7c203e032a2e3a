"""Errors of a request, and the one shape that every client sees them in."""

from collections.abc import Mapping

from align_jax.serve import schemas

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that cannot be answered; the text says what, what is allowed, and where.

    Attributes:
      status: of HTTP.
      message: for people.
      param: name of the input, as in `input[3].image`; None where it is none of them.
      code: for programs.
      headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def content(self) -> schemas.ErrorResponse:
        """Returns the body of the response."""
        kind = _TYPES.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return schemas.ErrorResponse(schemas.Error(self.message, kind, self.param, self.code))


def retry_later(status: int, message: str, code: str) -> ApiError:
    """Returns an error that asks the client to come again in a second."""
    return ApiError(status, message, code=code, headers={"Retry-After": "1"})
