"""The life of a daemon: bind, tell the service manager, serve, drain on SIGTERM or SIGINT, end with status 0."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from aiohttp import web

from imaging.errors import MistifyError, UnavailableError, from_os_error
from rpc.auth import LOOPBACK, check_binding, is_loopback, load_token
from rpc.logs import Style, configure_logging
from rpc.notify import ServiceManager
from rpc.resources import claim_resources
from rpc.server import LIFECYCLE, Lifecycle, ServerSettings

DRAIN_S = 9.0
"""From the signal to the end; operators are promised 10 s, and the process needs a moment to go."""

CALLS_SHARE = 0.4
"""Part of the drain in which calls may end by themselves; then unfinished work is parked."""

PARK_SHARE = 0.3
"""Part of the drain in which unfinished work is put where the next start finds it; what remains closes connections."""

BACKLOG = 1024
"""Connections that wait to be accepted: a fleet reconnects at once after a restart."""

LINGER_S = 2.0
"""How long to read on after an early answer (413, 401), so that the caller gets to see it."""

IDLE_TIMEOUT_S = 120.0
"""A connection without a whole request head for so long is closed: one that dawdles or died must not hold a descriptor for ever.
Longer than clients keep idle connections (Go's 90 s), so that theirs is the decision."""

log = logging.getLogger(__name__)

CreateApp = Callable[[ServerSettings], Awaitable[web.Application]]
"""Builds the daemon's application (see :func:`rpc.server.create_app`), inside the loop; its ``on_cleanup`` closes what it opened."""


@dataclass(frozen=True, kw_only=True)
class DaemonSettings:
    """How a daemon listens, logs and lets callers in; made by :func:`rpc.options.daemon_settings` from the command line."""

    component: str
    version: str
    port: int
    address: str = LOOPBACK
    token_file: Path | None = None
    insecure: bool = False
    host_names: tuple[str, ...] = ()
    port_file: Path | None = None
    log_level: str = "warning"
    log_style: Style = "text"
    use_uvloop: bool = False
    """Faster calls, but no sendfile: on for RPC, off for serving files."""
    drain_s: float = DRAIN_S
    idle_timeout_s: float = IDLE_TIMEOUT_S


def run_daemon(settings: DaemonSettings, create: CreateApp) -> int:
    """Run until SIGTERM or SIGINT; the exit status. A start that fails says why in one line on stderr and gives 1.

    The last thing a process does: ``drain_s`` after the signal the process ends, even if a thread hangs in a call.
    """
    stop_logging = configure_logging(settings.log_level, style=settings.log_style)
    claim_resources()
    try:
        factory = uvloop.new_event_loop if settings.use_uvloop else None
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(_live(settings, create))
    except MistifyError as err:
        log.debug("start failed", exc_info=err)
        _tell(f"{settings.component}: {err.message}{_reason(err)}")
        return 1
    except Exception:
        log.critical("the daemon failed", exc_info=True)
        return 1
    finally:
        stop_logging()
    return 0


def _reason(err: MistifyError) -> str:
    """What the system said, for whoever has to put it right."""
    cause = err.__cause__
    text = cause.strerror if isinstance(cause, OSError) else None
    return f" ({text})" if text and text.lower() not in err.message.lower() else ""


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


async def _live(settings: DaemonSettings, create: CreateApp) -> None:
    """One life, start to end."""
    stop = _catch_signals()
    manager = ServiceManager()
    listener = _listen(settings)
    with contextlib.closing(listener):
        token = None if settings.token_file is None else load_token(settings.token_file)
        app = await create(_server_settings(settings, token))
        async with (
            _serving(app, listener, settings.idle_timeout_s) as site,
            _watchdog(manager),
            _announced(settings, listener, manager),
        ):
            await stop.wait()
            await _drain(app[LIFECYCLE], site, manager, settings.drain_s)
    log.info("ended")


def _server_settings(settings: DaemonSettings, token: str | None) -> ServerSettings:
    return ServerSettings(
        component=settings.component,
        version=settings.version,
        address=settings.address,
        token=token,
        host_names=settings.host_names,
    )


def _catch_signals() -> asyncio.Event:
    """Set by SIGTERM or SIGINT. Caught from the start, so that a signal during the start is not lost."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


def _listen(settings: DaemonSettings) -> socket.socket:
    """The listening socket, bound before anything else is touched: a second daemon fails here and disturbs nothing."""
    check_binding(settings.address, has_token=settings.token_file is not None, insecure=settings.insecure)
    if settings.insecure and settings.token_file is None and not is_loopback(settings.address):
        log.warning("serving everybody who reaches this address, without a token", extra={"address": settings.address})
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.address, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as err:
        raise UnavailableError(f"cannot listen on {settings.address}: {err}") from err
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as err:
        listener.close()
        raise UnavailableError(f"cannot listen on {settings.address} port {settings.port}: {err.strerror}") from err
    return listener


# -- serving ---------------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _serving(app: web.Application, listener: socket.socket, idle_timeout_s: float) -> AsyncIterator[web.BaseSite]:
    # handlers are not cancelled when their caller hangs up: what was asked for is done; leftovers at the end get a second
    runner = web.AppRunner(
        app,
        access_log=None,
        shutdown_timeout=1.0,
        lingering_time=LINGER_S,
        keepalive_timeout=idle_timeout_s,
        auto_decompress=False,  # a body is what came, as it always was: no bombs, and digests are of what was sent
    )
    await runner.setup()
    try:
        site = web.SockSite(runner, listener, backlog=BACKLOG)
        await site.start()
        yield site
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def _announced(settings: DaemonSettings, listener: socket.socket, manager: ServiceManager) -> AsyncIterator[None]:
    """Say where we listen: to the log, to stderr for programs that read it, to the port file, to the service manager."""
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    log.info("listening", extra={"url": url, "version": settings.version})
    _tell(f"listening on {url}")
    _write_port(settings.port_file, port)
    manager.ready(f"listening on {url}")
    try:
        yield
    finally:
        if settings.port_file is not None:
            settings.port_file.unlink(missing_ok=True)


def _write_port(path: Path | None, port: int) -> None:
    """Appears whole or not at all; need not survive a power cut, because the port does not either."""
    if path is None:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(f"{port}\n")
        temporary.replace(path)
    except OSError as err:
        raise from_os_error(err, f"cannot write the port file {path}") from err


@contextlib.asynccontextmanager
async def _watchdog(manager: ServiceManager) -> AsyncIterator[None]:
    """Ping from the loop itself: a loop that hangs is what the watchdog is to find."""
    interval_s = manager.watchdog_interval_s
    if interval_s is None:
        yield
        return
    task = asyncio.create_task(_ping(manager, interval_s))
    try:
        yield
    finally:
        task.cancel()


async def _ping(manager: ServiceManager, interval_s: float) -> None:
    while True:
        manager.alive()
        await asyncio.sleep(interval_s)


# -- ending ----------------------------------------------------------------------------------------------------------------


async def _drain(lifecycle: Lifecycle, site: web.BaseSite, manager: ServiceManager, drain_s: float) -> None:
    """Stop accepting, let calls end, park the rest, within ``drain_s`` together with the closing that follows."""
    _end_for_sure(drain_s)
    manager.stopping("draining")
    log.info("draining", extra={"in_flight": lifecycle.in_flight})
    lifecycle.draining = True
    await site.stop()
    started_s = time.monotonic()
    await _wait_until_idle(lifecycle, drain_s * CALLS_SHARE)
    await _park(lifecycle, drain_s * PARK_SHARE)
    used_s = time.monotonic() - started_s
    await _wait_until_idle(lifecycle, max(0.0, drain_s * (CALLS_SHARE + PARK_SHARE) - used_s))
    if lifecycle.in_flight:
        log.warning("closing connections with calls in flight", extra={"in_flight": lifecycle.in_flight})


def _end_for_sure(drain_s: float) -> None:
    """A thread that hangs (a device, a network file system) would keep the interpreter; what it does is safe to break off."""
    timer = threading.Timer(drain_s, _leave)
    timer.daemon = True
    timer.start()


def _leave() -> None:
    _tell("the time to drain is over: leaving threads behind")
    os._exit(0)


async def _wait_until_idle(lifecycle: Lifecycle, timeout_s: float) -> None:
    if lifecycle.in_flight:
        await _within(timeout_s, "calls in flight", lifecycle.idle.wait())


async def _park(lifecycle: Lifecycle, timeout_s: float) -> None:
    """Run the hooks side by side; one that fails or hangs does not keep the others from theirs."""
    await asyncio.gather(*(_within(timeout_s, "parking", _park_one(hook)) for hook in lifecycle.park_hooks))


async def _park_one(hook: Callable[[], Awaitable[None]]) -> None:
    try:
        await hook()
    except Exception:
        log.exception("a park hook failed")


async def _within(timeout_s: float, what: str, work: Coroutine[Any, Any, Any]) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await work
    except TimeoutError:
        log.warning("not done in time", extra={"timeout_s": timeout_s, "what": what})
