"""JSON-RPC, bytes to calls and results to bytes; both dialects, no IO.

The *1.0 dialect* is what existing clients speak: one object, ``params`` an array with one struct, errors as text, errors of the
transport as HTTP statuses with plain text. The *2.0 dialect* is JSON-RPC 2.0 by the book: one object or a batch, structured errors.
:func:`parse` tells them apart by ``"jsonrpc": "2.0"``. An array is always 2.0, because 1.0 has no batches.

The id of a call is kept as the bytes that came, so that the echo is exact whatever its type.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import msgspec

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603

BATCH_MAX_CALLS = 100
"""Calls in one batch: they run at the same time, and each may hold a thread."""

JSON_TYPE = "application/json; charset=utf-8"
TEXT_TYPE = "text/plain; charset=utf-8"

MISSING = msgspec.UNSET
"""``params`` of a call that has none."""

NO_ID = msgspec.Raw(b"")
"""Id of a 2.0 notification; in 1.0 ``null`` and a missing id are the same."""

_NULL = msgspec.Raw(b"null")


class Reply(NamedTuple):
    """What goes back over HTTP."""

    status: int
    content_type: str
    body: bytes


class LegacyCall(NamedTuple):
    """One call of the 1.0 dialect. ``params`` is what came, of any type, or MISSING."""

    method: str
    params: Any
    id: msgspec.Raw

    @property
    def is_notification(self) -> bool:
        """Whether nobody waits for the reply."""
        return self.id in (NO_ID, _NULL)


class Call(NamedTuple):
    """One call of the 2.0 dialect, checked; ``params`` holds at most one struct or MISSING ones."""

    method: str
    params: list[Any]
    id: msgspec.Raw

    @property
    def is_notification(self) -> bool:
        """Whether nobody waits for the reply."""
        return self.id == NO_ID


class Fault(msgspec.Struct, omit_defaults=True):
    """The error object of the 2.0 dialect."""

    code: int
    message: str
    data: Any = None


class Rejected(NamedTuple):
    """One call of a batch that is no call."""

    fault: Fault
    id: msgspec.Raw


class Batch(NamedTuple):
    """A body of the 2.0 dialect: the calls in order, and whether they came as an array."""

    items: list[Call | Rejected]
    is_array: bool


Parsed: TypeAlias = LegacyCall | Batch | Reply
"""A Reply is the answer already: the body could not be read."""


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    """The common request. Anything else (other spellings, other keys, other types) takes the patient way."""

    method: str
    params: Any = MISSING
    id: msgspec.Raw = NO_ID
    jsonrpc: Any = None


_QUICK = msgspec.json.Decoder(_Envelope)
_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ANY = msgspec.json.Decoder()
_SCANNER = json.JSONDecoder()
_ENCODER = msgspec.json.Encoder()
_BLANKS = b" \t\r\n"
_BAD_JSON = (ValueError, RecursionError, msgspec.MsgspecError)


# -- reading ---------------------------------------------------------------------------------------------------------------


def check_transport(http_method: str, content_type: str) -> Reply | None:
    """The reply to a request that is not even a candidate, None for one that is."""
    if http_method not in {"GET", "POST"}:
        return _text(405, f"rpc: POST method required, received {http_method}")
    media_type = content_type.partition(";")[0].strip()
    if media_type.lower() != "application/json":
        return _text(415, f"rpc: unrecognized Content-Type: {media_type}")
    return None


def parse(body: bytes) -> Parsed:
    """Read a body of either dialect. Never raises."""
    try:
        envelope = _QUICK.decode(body)
    except _BAD_JSON:
        return _parse_patiently(body)
    if envelope.jsonrpc == "2.0":
        return Batch([_check(envelope.method, envelope.params, envelope.id)], is_array=False)
    return LegacyCall(envelope.method, envelope.params, envelope.id)


def _parse_patiently(body: bytes) -> Parsed:
    try:
        value = _first_value(body)
        if value.startswith(b"["):
            return _read_array(msgspec.json.decode(value, type=list[msgspec.Raw]))
        return _read_object(_OBJECT.decode(value))
    except _BAD_JSON as err:
        if body.lstrip(_BLANKS).startswith(b"[") or b'"jsonrpc"' in body:
            return reply_to_batch([(Fault(PARSE_ERROR, "Parse error", {"detail": _words(err)}), _NULL)], is_array=False)
        return _text(400, _words(err) if body.strip(_BLANKS) else "EOF")


def _first_value(body: bytes) -> bytes:
    """The first JSON value of the body; what follows it is nobody's business. ValueError if there is none."""
    text = body.decode("utf-8", "replace")
    start = len(text) - len(text.lstrip(" \t\r\n"))
    _, end = _SCANNER.raw_decode(text, start)
    return text[start:end].encode("utf-8", "replace")


def _words(err: Exception) -> str:
    return "exceeded max depth" if isinstance(err, RecursionError) else str(err)


def _read_object(fields: dict[str, msgspec.Raw]) -> Parsed:
    if _plain(fields.get("jsonrpc")) == "2.0":
        return Batch([_check_object(fields)], is_array=False)
    folded = {key.casefold(): value for key, value in fields.items()}
    folded.update(fields)
    method = _plain(folded.get("method"))
    if not isinstance(method, str | None):
        return _text(400, "json: method is not a string")
    params = MISSING if "params" not in folded else _plain(folded["params"])
    return LegacyCall(method or "", params, msgspec.Raw(bytes(folded.get("id", NO_ID))))


def _read_array(values: list[msgspec.Raw]) -> Parsed:
    if not values:
        return reply_to_batch(
            [(Fault(INVALID_REQUEST, "Invalid Request", {"detail": "empty batch"}), _NULL)], is_array=False
        )
    if len(values) > BATCH_MAX_CALLS:
        fault = Fault(INVALID_REQUEST, "Invalid Request", {"detail": f"more than {BATCH_MAX_CALLS} calls in a batch"})
        return reply_to_batch([(fault, _NULL)], is_array=False)
    return Batch([_read_element(value) for value in values], is_array=True)


def _read_element(value: msgspec.Raw) -> Call | Rejected:
    try:
        return _check_object(_OBJECT.decode(value))
    except _BAD_JSON:
        return _reject("a call is an object", NO_ID)


def _check_object(fields: dict[str, msgspec.Raw]) -> Call | Rejected:
    given = msgspec.Raw(bytes(fields.get("id", NO_ID)))
    if _plain(fields.get("jsonrpc")) != "2.0":
        return _reject('"jsonrpc" is not "2.0"', given)
    params = MISSING if "params" not in fields else _plain(fields["params"])
    return _check(_plain(fields.get("method")), params, given)


def _check(method: Any, params: Any, given: msgspec.Raw) -> Call | Rejected:
    """The checks of a request object, cheaper than a JSON schema and with words of their own."""
    if not isinstance(method, str):
        return _reject('"method" is not a string', given)
    if bytes(given)[:1] in {b"{", b"[", b"t", b"f"}:
        return _reject('"id" is not a string, a number or null', NO_ID)
    if isinstance(params, dict):
        return Call(method, [params], given)
    if isinstance(params, list):
        return Call(method, params, given)
    return Call(method, [], given) if params is MISSING else _reject('"params" is not an array or an object', given)


def _reject(detail: str, given: msgspec.Raw) -> Rejected:
    usable = bytes(given)[:1] not in {b"", b"{", b"[", b"t", b"f"}
    return Rejected(Fault(INVALID_REQUEST, "Invalid Request", {"detail": detail}), given if usable else _NULL)


def _plain(raw: msgspec.Raw | None) -> Any:
    return None if raw is None else _ANY.decode(raw)


# -- writing ---------------------------------------------------------------------------------------------------------------


def refuse_ill_formed(method: str) -> Reply:
    """Not ``Service.Method``."""
    return _text(400, f'rpc: service/method request ill-formed: "{method}"')


def refuse_unknown_service(method: str) -> Reply:
    """Nobody offers the service."""
    return _text(400, f'rpc: can\'t find service "{method}"')


def refuse_unknown_method(method: str) -> Reply:
    """The service has no such method."""
    return _text(400, f'rpc: can\'t find method "{method}"')


def refuse_missing_params() -> Reply:
    """No ``params``, or null."""
    return _text(400, "rpc: method request ill-formed: missing params field")


def refuse_malformed(words: str) -> Reply:
    """JSON of the wrong shape."""
    return _text(400, words)


def reply_to_legacy(call: LegacyCall, result: Any) -> Reply:
    """A result of the 1.0 dialect; nothing for a notification."""
    if call.is_notification:
        return Reply(200, JSON_TYPE, b"")
    return Reply(
        200, JSON_TYPE, b"".join((b'{"result":', _ENCODER.encode(result), b',"error":null,"id":', call.id, b"}\n"))
    )


def reply_error_to_legacy(call: LegacyCall, text: str) -> Reply:
    """A method's error in the 1.0 dialect: status 200 and a string."""
    if call.is_notification:
        return Reply(200, JSON_TYPE, b"")
    return Reply(
        200, JSON_TYPE, b"".join((b'{"result":null,"error":', _ENCODER.encode(text), b',"id":', call.id, b"}\n"))
    )


def reply_to_batch(outcomes: Iterable[tuple[Any, msgspec.Raw]], *, is_array: bool) -> Reply:
    """Replies of the 2.0 dialect, each a result or a :class:`Fault` with its id; an empty body if there are none."""
    replies = [_reply_object(outcome, given) for outcome, given in outcomes]
    if not replies:
        return Reply(200, JSON_TYPE, b"")
    return Reply(200, JSON_TYPE, b"[" + b",".join(replies) + b"]\n" if is_array else replies[0] + b"\n")


def _reply_object(outcome: Any, given: msgspec.Raw) -> bytes:
    key = b'{"jsonrpc":"2.0","error":' if isinstance(outcome, Fault) else b'{"jsonrpc":"2.0","result":'
    return b"".join((key, _ENCODER.encode(outcome), b',"id":', given, b"}"))


def _text(status: int, body: str) -> Reply:
    return Reply(status, TEXT_TYPE, body.encode("utf-8", "replace"))
