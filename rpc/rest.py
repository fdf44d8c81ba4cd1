"""Errors of plain HTTP endpoints: as JSON with the three keys old clients know, or as a line of text."""

from __future__ import annotations

from collections.abc import Callable

import orjson
from aiohttp import web

from imaging.errors import BusyError, InternalError, MistifyError
from rpc.dispatch import new_incident

RETRY_AFTER_S = 5
"""What a caller is told to wait when the same request may succeed later; a drain or a full queue lasts about that long."""

CODE_HEADER = "X-Error-Code"
"""The error's code, whatever the shape of the body: clients of ours make the same class of it again."""

ErrorRenderer = Callable[[int, str, str], web.Response]
"""Makes the response of an error: HTTP status, message, code."""


def render_json_error(status: int, message: str, code: str) -> web.Response:
    """``{"message", "code", "stack"}``; the stack is always empty."""
    body = orjson.dumps({"message": message, "code": code, "stack": []})
    return web.Response(status=status, body=body, content_type="application/json", charset="utf-8")


def render_text_error(status: int, message: str, _code: str) -> web.Response:
    """The message and a newline."""
    return web.Response(status=status, text=f"{message}\n")


def respond_to_error(err: Exception, render: ErrorRenderer = render_json_error) -> web.Response:
    """The response an error stands for. What is our own fault is logged and shown as an incident id only."""
    if not isinstance(err, MistifyError) or err.code == InternalError.code:
        return _coded(
            render(500, f"internal error, incident {new_incident(err)}", InternalError.code), InternalError.code
        )
    response = _coded(render(err.http_status, err.message, err.code), err.code)
    if err.retryable and not isinstance(err, BusyError):
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return response


def _coded(response: web.Response, code: str) -> web.Response:
    response.headers[CODE_HEADER] = code
    return response
