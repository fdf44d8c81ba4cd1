"""A name to a handler: decode the struct, call, map the error, encode the answer. A method is written once for both dialects.

The calls go through jsonrpcserver's dispatcher, one request at a time: its front door validates against a JSON schema and makes
a task for every call, which costs more than everything else together; the checks it would make are made before, in
:mod:`rpc.jsonrpc`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
import time
import warnings
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from imaging.errors import (
    AlreadyExistsError,
    BadDataError,
    BusyError,
    ConflictError,
    InternalError,
    InvalidArgumentError,
    MistifyError,
    NoSpaceError,
    NotFoundError,
    NotPermittedError,
    StoreRemovalError,
    TooLargeError,
    UnavailableError,
    UnsupportedError,
)
from rpc import jsonrpc
from rpc.jsonrpc import Batch, Call, Fault, LegacyCall, Rejected, Reply
from rpc.messages import Message, from_wire, to_wire
from rpc.methods import AgentMethod

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # jsonrpcserver reads its schema the way of Python 3.8
    from jsonrpcserver import Error, Result, Success
    from jsonrpcserver.async_dispatcher import dispatch_request
    from jsonrpcserver.request import Request
    from jsonrpcserver.sentinels import NOCONTEXT
    from oslash.either import Left

log = logging.getLogger(__name__)

Q = TypeVar("Q", bound=Message)
A = TypeVar("A")
M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=Message)

_CODES: dict[type[MistifyError], int] = {
    InvalidArgumentError: jsonrpc.INVALID_PARAMS,
    NotFoundError: -32001,
    AlreadyExistsError: -32002,
    BusyError: -32003,
    ConflictError: -32004,
    BadDataError: -32005,
    TooLargeError: -32006,
    NoSpaceError: -32007,
    UnsupportedError: -32008,
    NotPermittedError: -32009,
    UnavailableError: -32010,
    StoreRemovalError: -32011,
}
"""Numbers of the 2.0 dialect, from the range it leaves to servers; ``data.code`` is the name to go by."""


class ErrorData(msgspec.Struct, kw_only=True, omit_defaults=True):
    """``data`` of a 2.0 error: what a program needs to decide what to do."""

    code: str
    retryable: bool = msgspec.field(default_factory=bool)
    dependants: tuple[str, ...] = ()
    incident: str = ""


class _Malformed(ErrorData, kw_only=True):
    """The struct itself could not be read: the 1.0 dialect answers that on the level of HTTP."""


@dataclass(frozen=True, slots=True)
class Method:
    """One method as registered."""

    name: str
    request: type[Message]
    answer: Any
    handler: Callable[[Any], Awaitable[Any]]
    summary: str
    alias_of: str = ""


Observer = Callable[[str, str, float], None]
"""Told of each call: method, ``ok`` or the code of the error, seconds."""


def _observe_nothing(_method: str, _outcome: str, _duration_s: float) -> None:
    """Nobody counts."""


class Registry:
    """The methods a daemon offers."""

    def __init__(self) -> None:
        self._methods: dict[str, Method] = {}

    def register(
        self,
        name: str,
        handler: Callable[[Q], Awaitable[A]],
        *,
        request: type[Q],
        answer: type[A],
        aliases: tuple[str, ...] = (),
        summary: str = "",
    ) -> None:
        """Offer ``handler`` as ``Service.Method`` and under its aliases. The summary defaults to the handler's docstring."""
        words = summary or (inspect.getdoc(handler) or "").partition("\n")[0]
        for spelling in (name, *aliases):
            if spelling in self._methods:
                raise InternalError(f"method {spelling} is registered twice")
            alias_of = "" if spelling == name else name
            self._methods[spelling] = Method(spelling, request, answer, handler, words, alias_of)

    def offer(self, method: AgentMethod[M, R], handler: Callable[[M], Awaitable[R]]) -> None:
        """Register the handler of one of the agent's methods under every spelling of it."""
        self.register(method.name, handler, request=method.request, answer=method.answer, aliases=method.aliases)

    def __iter__(self) -> Iterator[Method]:
        return iter(self._methods.values())

    def __contains__(self, name: str) -> bool:
        return name in self._methods

    def has_service(self, service: str) -> bool:
        """Whether any method belongs to the service."""
        return any(name.partition(".")[0] == service for name in self._methods)


class Dispatcher:
    """Turns a body into a reply by way of a registry."""

    def __init__(self, registry: Registry, *, observe: Observer = _observe_nothing) -> None:
        self._registry = registry
        self._bound = {method.name: _bind(method, observe) for method in registry}

    async def dispatch(self, body: bytes) -> Reply:
        """The reply to a body of either dialect. Never raises, except to be cancelled."""
        parsed = jsonrpc.parse(body)
        if isinstance(parsed, LegacyCall):
            return await self._answer_legacy(parsed)
        return await self._answer_batch(parsed) if isinstance(parsed, Batch) else parsed

    async def _answer_legacy(self, call: LegacyCall) -> Reply:
        refusal = self._refuse(call)
        if refusal is not None:
            return refusal
        outcome = await self._call(call.method, call.params[:1], call.id)
        if not isinstance(outcome, Fault):
            return jsonrpc.reply_to_legacy(call, outcome)
        if isinstance(outcome.data, _Malformed):
            return jsonrpc.refuse_malformed(outcome.message)
        return jsonrpc.reply_error_to_legacy(call, outcome.message)

    def _refuse(self, call: LegacyCall) -> Reply | None:
        """The errors of the transport, in the order old servers checked them."""
        if call.method not in self._bound:
            if call.method.count(".") != 1:
                return jsonrpc.refuse_ill_formed(call.method)
            if not self._registry.has_service(call.method.partition(".")[0]):
                return jsonrpc.refuse_unknown_service(call.method)
            return jsonrpc.refuse_unknown_method(call.method)
        if call.params is jsonrpc.MISSING or call.params is None:
            return jsonrpc.refuse_missing_params()
        return None if isinstance(call.params, list) else jsonrpc.refuse_malformed("json: params is not an array")

    async def _answer_batch(self, batch: Batch) -> Reply:
        if len(batch.items) == 1:
            outcomes = [await self._answer_item(batch.items[0])]
        else:
            outcomes = await asyncio.gather(*map(self._answer_item, batch.items))
        wanted = ((outcome, item.id) for outcome, item in zip(outcomes, batch.items, strict=True) if _is_wanted(item))
        return jsonrpc.reply_to_batch(wanted, is_array=batch.is_array)

    async def _answer_item(self, item: Call | Rejected) -> Any:
        return item.fault if isinstance(item, Rejected) else await self._call(item.method, item.params, item.id)

    async def _call(self, name: str, params: list[Any], given: msgspec.Raw) -> Any:
        """What the method gave, or a Fault."""
        _, result = await dispatch_request(self._bound, NOCONTEXT, Request(name, params, given))
        # OSlash's Either has no public way to look inside
        return _fault(result._error) if isinstance(result, Left) else result._value.result  # noqa: SLF001


def _is_wanted(item: Call | Rejected) -> bool:
    return isinstance(item, Rejected) or not item.is_notification


def _fault(failure: Any) -> Fault:
    """A failure of ours as it is; one of jsonrpcserver (unknown method, arguments that do not fit) with our kind of data."""
    if isinstance(failure.data, ErrorData):
        return Fault(failure.code, failure.message, failure.data)
    code = UnsupportedError.code if failure.code == jsonrpc.METHOD_NOT_FOUND else InvalidArgumentError.code
    return Fault(failure.code, failure.message, ErrorData(code=code))


class _OneStruct(inspect.Signature):
    """What every bound method takes: one struct or none. jsonrpcserver binds arguments at every call; this costs a comparison."""

    def bind(self, /, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        """TypeError, for jsonrpcserver to answer with Invalid params, if there is more than one struct."""
        if len(args) > 1 or kwargs:
            raise TypeError("a call takes one struct")
        return inspect.BoundArguments(self, OrderedDict())


_ONE_STRUCT = _OneStruct()


def _bind(method: Method, observe: Observer) -> Callable[..., Awaitable[Result]]:
    """The method as jsonrpcserver wants it: takes the struct as it came, returns a Result."""

    async def call(params: Any = None) -> Result:
        started_s = time.perf_counter()
        result, outcome = await _attempt(method, params)
        observe(method.name, outcome, time.perf_counter() - started_s)
        return result

    call.__signature__ = _ONE_STRUCT  # type: ignore[attr-defined]  # where inspect.signature() looks first
    return call


async def _attempt(method: Method, params: Any) -> tuple[Result, str]:
    try:
        request = from_wire(method.request, params)
    except InvalidArgumentError as err:
        return Error(jsonrpc.INVALID_PARAMS, err.message, _Malformed(code=err.code)), err.code
    try:
        return Success(to_wire(await method.handler(request))), "ok"
    except MistifyError as err:
        if err.code == InternalError.code:
            return _report(method, err), err.code
        if log.isEnabledFor(logging.INFO):
            fields = {"method": method.name, "code": err.code, "error": err.message, "cause": repr(err.__cause__)}
            log.info("call failed", extra=fields)
        return Error(error_number(err), err.message, error_data(err)), err.code
    except Exception as err:  # noqa: BLE001  # whatever a handler raises must not take the connection with it
        return _report(method, err), InternalError.code


def _report(method: Method, err: Exception) -> Result:
    """Our own fault: the log gets the chain, the caller the id to ask about."""
    incident = new_incident(err, method=method.name)
    data = ErrorData(code=InternalError.code, incident=incident)
    return Error(jsonrpc.INTERNAL_ERROR, f"internal error, incident {incident}", data)


def new_incident(err: BaseException, **fields: str) -> str:
    """Log an error that is our own fault, once and with its chain; the id that names it to the caller."""
    incident = secrets.token_hex(6)
    log.error("internal error", exc_info=err, extra={"incident": incident, **fields})
    return incident


def error_number(err: MistifyError) -> int:
    """The 2.0 dialect's number for an error."""
    return next((_CODES[kind] for kind in type(err).__mro__ if kind in _CODES), jsonrpc.INTERNAL_ERROR)


def error_data(err: MistifyError) -> ErrorData:
    """The 2.0 dialect's data for an error."""
    dependants = err.dependants if isinstance(err, BusyError) else ()
    return ErrorData(code=err.code, retryable=err.retryable, dependants=dependants)
