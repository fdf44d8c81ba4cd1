"""Errors as they come over the wire, back to the classes of :mod:`imaging.errors`."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import msgspec

from imaging import errors
from imaging.errors import BusyError, InternalError, MistifyError

_CODES: dict[str, type[MistifyError]] = {
    kind.code: kind
    for kind in (
        errors.InvalidArgumentError,
        errors.InvalidNameError,
        errors.WrongKindError,
        errors.NotFoundError,
        errors.AlreadyExistsError,
        errors.BusyError,
        errors.ConflictError,
        errors.LeaseLostError,
        errors.BadDataError,
        errors.TooLargeError,
        errors.NoSpaceError,
        errors.UnsupportedError,
        errors.NotPermittedError,
        errors.UnavailableError,
        errors.StoreRemovalError,
        errors.InternalError,
    )
}

_STATUSES: dict[int, type[MistifyError]] = {
    HTTPStatus.BAD_REQUEST: errors.InvalidArgumentError,
    HTTPStatus.UNAUTHORIZED: errors.NotPermittedError,
    HTTPStatus.FORBIDDEN: errors.NotPermittedError,
    HTTPStatus.NOT_FOUND: errors.NotFoundError,
    HTTPStatus.METHOD_NOT_ALLOWED: errors.UnsupportedError,
    HTTPStatus.REQUEST_TIMEOUT: errors.UnavailableError,
    HTTPStatus.CONFLICT: errors.ConflictError,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: errors.TooLargeError,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: errors.UnsupportedError,
    HTTPStatus.UNPROCESSABLE_ENTITY: errors.BadDataError,
    HTTPStatus.TOO_MANY_REQUESTS: errors.UnavailableError,
    HTTPStatus.NOT_IMPLEMENTED: errors.UnsupportedError,
    HTTPStatus.BAD_GATEWAY: errors.UnavailableError,
    HTTPStatus.SERVICE_UNAVAILABLE: errors.UnavailableError,
    HTTPStatus.GATEWAY_TIMEOUT: errors.UnavailableError,
    HTTPStatus.INSUFFICIENT_STORAGE: errors.NoSpaceError,
}

_MESSAGE_MAX_CHARS = 1000
"""A proxy's error page is not a message."""


def error_from_status(status: int, body: bytes, code: str = "") -> MistifyError:
    """The error an HTTP response with status 400 or more stands for.

    By its code if it says one, in the header (:data:`rpc.rest.CODE_HEADER`) or in the body, else by the status.
    """
    text = body.decode("utf-8", "replace").strip()
    said = _said(body)
    message = said.get("message")
    kind = _CODES.get(code) or _CODES.get(str(said.get("code"))) or _STATUSES.get(status, InternalError)
    return kind(message if isinstance(message, str) else text[:_MESSAGE_MAX_CHARS] or f"the server answered {status}")


def _said(body: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(body)
    except (ValueError, RecursionError, msgspec.MsgspecError):
        return {}
    return value if isinstance(value, dict) else {}


def error_from_rpc(error: Any) -> MistifyError:
    """The error of a reply: an object of the 2.0 dialect, or the text of a server that knows only 1.0."""
    if isinstance(error, str):
        return (errors.NotFoundError if error == "not found" else InternalError)(error)
    if not isinstance(error, dict):
        return InternalError(f"the server's error is neither text nor object: {error!r:.200}")
    message = str(error.get("message", ""))
    data = error.get("data")
    details = data if isinstance(data, dict) else {}
    kind = _CODES.get(str(details.get("code"))) or _unknown(details)
    if kind is BusyError:
        return BusyError(message, [str(name) for name in details.get("dependants") or ()])
    return kind(message)


def _unknown(details: dict[str, Any]) -> type[MistifyError]:
    """A code of a newer server: what matters is whether to try again."""
    return errors.UnavailableError if details.get("retryable") is True else InternalError
