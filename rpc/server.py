"""What both daemons share on aiohttp: request ids, limits, who may call, logs, metrics, health, and the RPC endpoint."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import secrets
import time
import zlib
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

import orjson
from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware

from imaging.errors import InvalidArgumentError, TooLargeError
from rpc import jsonrpc
from rpc.auth import LOOPBACK, HostCheck, TokenCheck
from rpc.dispatch import Dispatcher, Registry, new_incident
from rpc.jsonrpc import Reply
from rpc.logs import REQUEST_ID
from rpc.metrics import Metrics
from rpc.openrpc import register_discovery
from rpc.rest import ErrorRenderer, render_json_error, respond_to_error

RPC_PATH = "/_mistify_RPC_"

BODY_MAX_BYTES = 1 << 20
"""A guest with a thousand disks is 200 KiB; more is not a call."""

BODY_TIMEOUT_S = 30.0
"""A body of a megabyte over the slowest sane link; a caller that stalls must not hold its connection for ever."""

ACCESS_LINES_MAX_PER_S = 100
"""Access lines beyond it are counted, not written: at 15,000 calls a second the log would be the load."""

COMPRESS_INLINE_MAX_BYTES = 64 << 10
"""Compressing more takes over a millisecond and goes to a thread."""

COMPRESS_LEVEL = 1
"""JSON shrinks to a fifth at level 1 already; higher levels cost three times the time for a few percent."""

READY_CHECK_TIMEOUT_S = 5.0
"""A check that hangs is a reason not to be ready."""

log = logging.getLogger(__name__)
access_log = logging.getLogger("rpc.access")

ReadyCheck = Callable[[], Awaitable[str | None]]
"""None when fine, otherwise the reason."""

ParkHook = Callable[[], Awaitable[None]]
"""Puts unfinished work where the next start finds it."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a daemon presents itself."""

    component: str
    version: str = "0"
    address: str = LOOPBACK
    token: str | None = None
    host_names: tuple[str, ...] = ()
    body_max_bytes: int = BODY_MAX_BYTES


@dataclass
class Lifecycle:
    """What a daemon adds to readiness and to its end, and where it is in its life."""

    ready_checks: dict[str, ReadyCheck] = field(default_factory=dict)
    park_hooks: list[ParkHook] = field(default_factory=list)
    in_flight: int = 0
    draining: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)


_BEGUN: ContextVar[web.StreamResponse | None] = ContextVar("begun", default=None)
"""The response to this request whose head has been sent."""

LIFECYCLE: web.AppKey[Lifecycle] = web.AppKey("lifecycle", Lifecycle)
METRICS: web.AppKey[Metrics] = web.AppKey("metrics", Metrics)
OPEN_PATHS: web.AppKey[set[str]] = web.AppKey("open_paths", set)
"""What is given to callers without a token, too, because it tells nothing: a daemon may add to it."""


def create_app(
    settings: ServerSettings, *, registry: Registry | None = None, render_error: ErrorRenderer = render_json_error
) -> web.Application:
    """An application with everything shared; the daemon adds its routes, checks and hooks. A registry gives it the RPC endpoint."""
    lifecycle = Lifecycle()
    metrics = Metrics(settings.component, settings.version, in_flight=lambda: lifecycle.in_flight)
    guard = _Guard(settings, metrics, lifecycle, render_error)
    logging.getLogger("aiohttp.server").addFilter(_is_our_error)
    app = web.Application(middlewares=[guard.middleware], client_max_size=settings.body_max_bytes)
    app.on_response_prepare.append(guard.finish_headers)
    app[LIFECYCLE], app[METRICS], app[OPEN_PATHS] = lifecycle, metrics, guard.open_paths
    app.router.add_get("/healthz", _healthz)
    app.router.add_get("/readyz", _readyz)
    app.router.add_get("/metrics", _metrics)
    if registry is not None:
        register_discovery(registry, settings.component, settings.version)
        app.router.add_route("*", RPC_PATH, _RpcEndpoint(Dispatcher(registry, observe=metrics.count_call)).handle)
    return app


def _is_our_error(record: logging.LogRecord) -> bool:
    """Whether aiohttp's record of an error is one: what is no HTTP is its sender's, who could fill the log with it."""
    error = record.exc_info[1] if record.exc_info else None
    if not isinstance(error, HttpProcessingError):
        return True
    log.debug("a request that is no HTTP", extra={"cause": error.message})
    return False


# -- around every request --------------------------------------------------------------------------------------------------


class _Guard:
    """One middleware for everything around a handler: several would cost a coroutine each for every call."""

    def __init__(
        self, settings: ServerSettings, metrics: Metrics, lifecycle: Lifecycle, render_error: ErrorRenderer
    ) -> None:
        self._hosts = HostCheck(settings.address, settings.host_names)
        self._token = TokenCheck(settings.token)
        self._metrics = metrics
        self._lifecycle = lifecycle
        self._render_error = render_error
        self._access = _AccessLog()
        self._request_ids = _RequestIds()
        self.open_paths: set[str] = set()

    @property
    def middleware(self) -> Middleware:
        """The middleware, as a function aiohttp takes for one."""

        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._answer(request, handler)

        return guard

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        REQUEST_ID.set(self._request_ids.of(request))
        _BEGUN.set(None)
        started_s = time.perf_counter()
        self._enter()
        status = 499  # the caller went away, unless we learn better
        try:
            response = self._refuse(request) or await self._run(request, handler)
            status = response.status
        except web.HTTPException as redirect:
            status = redirect.status
            raise
        else:
            return response
        finally:
            self._leave()
            duration_s = time.perf_counter() - started_s
            self._metrics.count_request(request.method, _route(request), status, duration_s)
            self._access.note(request, status, duration_s)

    def _enter(self) -> None:
        self._lifecycle.in_flight += 1
        self._lifecycle.idle.clear()

    def _leave(self) -> None:
        self._lifecycle.in_flight -= 1
        if not self._lifecycle.in_flight:
            self._lifecycle.idle.set()

    def _refuse(self, request: web.Request) -> web.Response | None:
        """What stands between a stranger and the handler. ``/healthz`` tells nothing and is open to all."""
        if request.path == "/healthz":
            return None
        host = request.headers.get(hdrs.HOST)
        if not self._hosts.passes(host) if host is not None else request.version >= (1, 1):
            return self._render_error(403, f"this server does not answer to the host name {host!r}", "not_permitted")
        if request.path not in self.open_paths and not self._token.passes(request.headers.get(hdrs.AUTHORIZATION, "")):
            response = self._render_error(
                401, "missing or wrong bearer token (Authorization: Bearer ...)", "not_permitted"
            )
            response.headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
            return response
        return None

    async def _run(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as err:
            if err.status < 400:
                raise
            return self._render_http_error(request, err)
        except Exception as err:  # noqa: BLE001  # whatever a handler raises becomes a response here
            return self._give_up(request, err)

    def _render_http_error(self, request: web.Request, err: web.HTTPException) -> web.StreamResponse:
        """Errors aiohttp makes itself, in the words and the shape of ours."""
        if err.status == 413:
            limit = request.client_max_size
            return respond_to_error(TooLargeError(f"the request body is larger than {limit} bytes"), self._render_error)
        codes = {404: "not_found", 405: "unsupported"}
        response = self._render_error(err.status, err.reason.lower(), codes.get(err.status, "invalid_argument"))
        if hdrs.ALLOW in err.headers:
            response.headers[hdrs.ALLOW] = err.headers[hdrs.ALLOW]
        return response

    def _give_up(self, request: web.Request, err: Exception) -> web.StreamResponse:
        """An error response or, if the answer has begun, a connection that breaks so that the caller notices."""
        begun = _BEGUN.get()
        if begun is None:
            return respond_to_error(err, self._render_error)
        new_incident(err, during="answer")
        if request.transport is not None:
            request.transport.abort()
        return begun

    async def finish_headers(self, _request: web.Request, response: web.StreamResponse) -> None:
        """Headers every answer carries, streams too."""
        _BEGUN.set(response)
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["X-Request-Id"] = REQUEST_ID.get()
        if self._lifecycle.draining:
            response.force_close()
            response.headers[hdrs.CONNECTION] = "close"  # aiohttp has written this header already


class _RequestIds:
    """The caller's id if it is sane, else one of ours: a random start and a number."""

    _SANE = re.compile(r"[A-Za-z0-9._:-]{1,64}\Z")

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(4)
        self._numbers = itertools.count(1)

    def of(self, request: web.Request) -> str:
        """The id of a request."""
        given = request.headers.get("X-Request-Id")
        if given is not None and self._SANE.match(given):
            return given
        return f"{self._prefix}-{next(self._numbers):x}"


class _AccessLog:
    """A line a request while there are few; beyond that a sample, which says how many it stands for."""

    def __init__(self) -> None:
        self._second = 0
        self._written = 0
        self._suppressed = 0

    def note(self, request: web.Request, status: int, duration_s: float) -> None:
        """Write the line, or count it."""
        level = logging.WARNING if status >= 500 else logging.INFO
        if not access_log.isEnabledFor(level) or not self._may_write():
            return
        fields = {
            "http_method": request.method,
            "path": request.path,
            "status": status,
            "duration_s": round(duration_s, 6),
        }
        access_log.log(
            level, "request", extra={**fields, "remote": request.remote, "suppressed": self._suppressed or None}
        )
        self._suppressed = 0

    def _may_write(self) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._written = second, 0
        if self._written >= ACCESS_LINES_MAX_PER_S:
            self._suppressed += 1
            return False
        self._written += 1
        return True


def _route(request: web.Request) -> str:
    """The pattern of the route, so that nobody can fill the metrics with paths."""
    resource = request.match_info.route.resource
    return "none" if resource is None else resource.canonical


# -- health ----------------------------------------------------------------------------------------------------------------


async def _healthz(_request: web.Request) -> web.Response:
    return web.Response(text="ok\n")


async def _readyz(request: web.Request) -> web.Response:
    lifecycle = request.app[LIFECYCLE]
    reasons = {"lifecycle": "draining"} if lifecycle.draining else await _reasons(lifecycle.ready_checks)
    body = orjson.dumps({"ready": not reasons, "reasons": reasons})
    return web.Response(status=503 if reasons else 200, body=body, content_type="application/json")


async def _reasons(checks: dict[str, ReadyCheck]) -> dict[str, str]:
    """Why the daemon is not ready, by check."""
    verdicts = await asyncio.gather(*map(_verdict, checks.values()))
    return {name: reason for name, reason in zip(checks, verdicts, strict=True) if reason}


async def _verdict(check: ReadyCheck) -> str | None:
    try:
        async with asyncio.timeout(READY_CHECK_TIMEOUT_S):
            return await check()
    except Exception as err:  # noqa: BLE001  # a check that fails in any way is a reason not to be ready
        return f"check failed: {type(err).__name__}: {err}"


async def _metrics(request: web.Request) -> web.Response:
    body, content_type = request.app[METRICS].render()
    return web.Response(body=body, headers={hdrs.CONTENT_TYPE: content_type})


# -- the RPC endpoint ------------------------------------------------------------------------------------------------------


class _RpcEndpoint:
    """Carries bodies to the dispatcher and replies back."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def handle(self, request: web.Request) -> web.Response:
        """Answer one request of any HTTP method."""
        refusal = jsonrpc.check_transport(request.method, request.headers.get(hdrs.CONTENT_TYPE, ""))
        reply = refusal or await self._dispatcher.dispatch(await read_body(request))
        headers = {hdrs.CONTENT_TYPE: reply.content_type}
        coding = _coding(request.headers.get(hdrs.ACCEPT_ENCODING, "")) if reply.body else None
        if coding is None:
            return web.Response(status=reply.status, body=reply.body, headers=headers)
        headers |= {hdrs.CONTENT_ENCODING: coding, hdrs.VARY: hdrs.ACCEPT_ENCODING}
        return web.Response(status=reply.status, body=await _compress(reply, coding), headers=headers)


async def read_body(request: web.Request) -> bytes:
    """A body that is a call or a document, whole; InvalidArgumentError if it stalls or ends early."""
    if request.content.is_eof():
        return await request.read()  # the usual case: without the cost of a timer
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError as err:
        raise InvalidArgumentError(f"the request body did not arrive within {BODY_TIMEOUT_S:g} s") from err
    except (web.RequestPayloadError, ConnectionError) as err:
        raise InvalidArgumentError("the request body is malformed or ended early") from err


def _coding(accept: str) -> str | None:
    """The first coding the caller names that we can write."""
    for part in accept.lower().split(","):
        coding, _, parameters = part.partition(";")
        if coding.strip() in {"gzip", "deflate"} and not re.fullmatch(r"\s*q\s*=\s*0(\.0*)?\s*", parameters):
            return coding.strip()
    return None


async def _compress(reply: Reply, coding: str) -> bytes:
    window_bits = zlib.MAX_WBITS + 16 if coding == "gzip" else zlib.MAX_WBITS
    if len(reply.body) <= COMPRESS_INLINE_MAX_BYTES:
        return _deflate(reply.body, window_bits)
    return await asyncio.to_thread(_deflate, reply.body, window_bits)


def _deflate(data: bytes, window_bits: int) -> bytes:
    compressor = zlib.compressobj(COMPRESS_LEVEL, zlib.DEFLATED, window_bits)
    return compressor.compress(data) + compressor.flush()
