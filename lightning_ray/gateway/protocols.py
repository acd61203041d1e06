"""The protocols that pass through the door: their paths, and the shape of their errors."""

import json
from typing import Any

CALLS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
    }
)
"""Paths that agents may post to. Everything else an engine serves stays behind the door."""

LISTINGS = frozenset({"/v1/models"})
"""Paths that agents may get."""

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


def error_body(path: str, status: int, message: str) -> bytes:
    """An error as a client of the protocol at `path` expects it, JSON."""
    kind = _ERROR_TYPES.get(status, "api_error")
    error: dict[str, object] = {"type": kind, "message": message}
    if path.startswith("/v1/messages"):
        return json.dumps({"type": "error", "error": error}).encode()
    return json.dumps({"error": {**error, "param": None, "code": status}}).encode()


def parse_body(content: bytes) -> dict[str, Any]:
    """A request's JSON object. Raises ValueError when it is none."""
    try:
        request = json.loads(content)
    except RecursionError as error:
        raise ValueError("the body is nested too deeply") from error
    if not isinstance(request, dict):
        raise ValueError("the body is not a JSON object")
    return request
