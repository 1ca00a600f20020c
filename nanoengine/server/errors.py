"""The errors that a client gets: made in one place, of one shape, and small whatever the request was."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from nanoengine.api.errors import NanoEngineError, ParamsError, RequestError, TokenizerMissing, UnsupportedError

MAX_BODY = 4096
_MAX_MESSAGE = 1500  # characters; JSON may need 6 bytes for one of them, or 2 bytes of UTF-8 for its half

# `RequestError.code` -> HTTP status. Those that are not here are 400 (the caller's) or 500 (`_failed`, see below).
_STATUS: Mapping[str, int] = {
    "unavailable": 503,
    "overloaded": 429,
    "deadline": 408,
    "duplicate_id": 409,
    "interrupted": 503,
    "bad_logits": 500,
    "out_of_memory": 500,
}
_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# Those that Anthropic has too.
_MESSAGE_TYPES = frozenset({
    "invalid_request_error", "authentication_error", "permission_error", "not_found_error", "request_too_large",
    "rate_limit_error", "overloaded_error", "timeout_error",
})  # fmt: skip
# Codes that clients know by OpenAI's name.
_CODES: Mapping[str, str] = {"too_long": "context_length_exceeded", "overloaded": "rate_limit_exceeded"}


@dataclass(slots=True)
class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP. message: for people. code: a fixed word for programs. param: the field that is wrong.
        headers: of the answer.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def type(self) -> str:
        """OpenAI's word for the kind of error."""
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")


def invalid(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """An error of the caller."""
    return ApiError(400, message, code, param)


def api_error(error: BaseException) -> ApiError:
    """The answer for what a request raised. An error that is no one's mistake gives away nothing of its text."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        status = _STATUS.get(error.code, 500 if error.code.endswith("_failed") else 400)
        headers = {}
        if status in (429, 503):
            after = error.retry_after
            headers["retry-after"] = str(1 if after is None else max(1, math.ceil(after)))
        return ApiError(status, str(error), _CODES.get(error.code, error.code), headers=headers)
    if isinstance(error, ParamsError):
        return invalid(str(error))
    if isinstance(error, UnsupportedError | TokenizerMissing):
        return invalid(str(error), code="not_supported")
    if isinstance(error, NanoEngineError):
        return ApiError(500, str(error), "engine_error")
    return ApiError(500, "the server failed on this request; its log has the cause", "internal_error")


def error_body(error: ApiError) -> bytes:
    """JSON in OpenAI's shape, of at most `MAX_BODY` bytes."""
    return msgspec.json.encode({"error": error_fields(error)})


def message_error(error: ApiError) -> bytes:
    """JSON in Anthropic's shape."""
    kind = error.type if error.type in _MESSAGE_TYPES else "api_error" if error.status >= 500 else _TYPES[400]
    fields = {"type": kind, "message": error_fields(error)["message"]}
    return msgspec.json.encode({"type": "error", "error": fields})


def body_of(path: str, error: ApiError) -> bytes:
    """The body of an error, in the shape that clients of this path know."""
    return message_error(error) if path.startswith("/v1/messages") else error_body(error)


def error_fields(error: ApiError) -> dict[str, str | int | None]:
    """message, type, param and code, shortened so that their JSON fits."""
    param = None if error.param is None else shortened(error.param, 200)
    fields = {"type": error.type, "param": param, "code": error.code}
    size, message = _MAX_MESSAGE, error.message
    while True:
        found: dict[str, str | int | None] = {"message": shortened(message, size), **fields}
        if len(msgspec.json.encode(found)) <= MAX_BODY - 256:
            return found
        size = size // 2


def shortened(text: str, most: int) -> str:
    """The text, or its beginning and end around "…"."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= most else f"{text[: most * 2 // 3]}…{text[-most // 3 + 1 :]}"
