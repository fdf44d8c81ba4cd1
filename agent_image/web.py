"""Snapshots as streams over HTTP: ``/snapshots/download``. The RPC endpoint and health are :mod:`rpc.server`'s."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import HttpVersion11, web

from agent_image.drivers.base import SendFlags, StorageDriver
from agent_image.store import ImageStore
from agent_image.web_splice import Splicer, make_pipe
from imaging.errors import InvalidArgumentError, MistifyError, UnavailableError
from imaging.names import SnapshotName
from imaging.threads import Offload
from rpc.messages import DownloadRequest, from_wire
from rpc.rest import render_text_error, respond_to_error
from rpc.server import read_body

PATH = "/snapshots/download"

DOWNLOADS_MAX = 16
"""At once; each takes two threads, a megabyte of pipe and a share of the disk."""

FIRST_PIECE_BYTES = 64 << 10
"""What is read before the status is sent, so that a send that can't start is a proper error."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Download:
    """What is to be sent."""

    name: SnapshotName
    base: str | None
    flags: SendFlags
    resume_token: str | None


class SnapshotDownloads:
    """Serves send streams."""

    def __init__(self, store: ImageStore, driver: StorageDriver, *, count: Callable[[str], None]) -> None:
        self._store = store
        self._driver = driver
        self._count = count
        self._producers = Offload("send", DOWNLOADS_MAX)
        self._movers = Offload("splice", DOWNLOADS_MAX)
        self._active = 0

    def close(self) -> None:
        """End the threads; running downloads were cut off before."""
        self._producers.close()
        self._movers.close()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request of any HTTP method."""
        try:
            download = await self._wanted(await _read(request))
            if request.method == "HEAD":
                return web.Response(headers={"Content-Type": "application/octet-stream"})
            if self._active >= DOWNLOADS_MAX:
                raise UnavailableError(f"{DOWNLOADS_MAX} snapshots are being downloaded already")
        except MistifyError as err:
            return respond_to_error(err, render_text_error)
        self._active += 1
        try:
            return await self._download(request, download)
        finally:
            self._active -= 1

    async def _wanted(self, message: DownloadRequest) -> Download:
        """What the request asks for, its names parsed."""
        name, base = (await self._store.find_snapshot(message.id)).name, message.base or None
        if base is not None and base[0] not in "@#":
            base = str((await self._store.find_snapshot(base)).name)
        flags = SendFlags(**{flag.name: getattr(message, flag.name) for flag in dataclasses.fields(SendFlags)})
        return Download(name, base and base.removeprefix("@"), flags, message.resume_token or None)

    async def _download(self, request: web.Request, download: Download) -> web.StreamResponse:
        read_fd, write_fd = make_pipe()
        producer = asyncio.ensure_future(self._producers(self._produce, download, write_fd))
        try:
            first = await self._movers(os.read, read_fd, FIRST_PIECE_BYTES)
            if not first:
                await producer  # raises what kept it from starting
                raise UnavailableError(f"the stream of {download.name} is empty")
            response = await self._begin(request, first)
            await self._move(request, response, read_fd, producer)
        except MistifyError as err:
            self._count(err.code)
            return respond_to_error(err, render_text_error)
        finally:
            os.close(read_fd)  # a producer that still writes gets EPIPE and ends
            await asyncio.wait([producer])
            if not producer.cancelled():
                producer.exception()  # seen: it was raised above, or is the EPIPE
        return response

    def _produce(self, download: Download, write_fd: int) -> None:
        try:
            self._driver.send(
                download.name, write_fd, base=download.base, flags=download.flags, resume_token=download.resume_token
            )
        finally:
            os.close(write_fd)

    async def _begin(self, request: web.Request, first: bytes) -> web.StreamResponse:
        """Send the head and the first piece through aiohttp, and wait until none of it is left in our buffers."""
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        if request.version >= HttpVersion11:
            response.enable_chunked_encoding()  # aiohttp would do it by itself, but not tell us in `chunked`
        if request.transport is not None:
            request.transport.set_write_buffer_limits(0)
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):  # the mover meets the same broken connection and ends the send
            await response.write(first)
        return response

    async def _move(
        self, request: web.Request, response: web.StreamResponse, read_fd: int, producer: asyncio.Future[None]
    ) -> None:
        """Everything after the first piece; a connection that must not look complete is broken."""
        outcome = "gone"
        try:
            with _duplicate(request) as client:
                await self._splice(Splicer(read_fd, client, framed=response.chunked))
            await producer
            outcome = "ok"
        except MistifyError as err:
            failed = producer.done() and producer.exception() is err
            outcome = err.code if failed else "gone"
            log.log(logging.ERROR if failed else logging.INFO, "a download was cut off", extra={"error": err.message})
        finally:
            self._count(outcome)
            if outcome != "ok" and request.transport is not None:
                request.transport.abort()

    async def _splice(self, splicer: Splicer) -> None:
        task = asyncio.ensure_future(self._movers(splicer.run))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            splicer.stop()
            await asyncio.wait([task])
            raise


@contextlib.contextmanager
def _duplicate(request: web.Request) -> Any:
    """The request's socket under a descriptor of our own, once nothing is left in the transport's buffer."""
    transport = request.transport
    if transport is None or transport.is_closing() or transport.get_write_buffer_size():
        raise UnavailableError("the client went away before a snapshot was sent to it")
    owner = transport.get_extra_info("socket")
    # The duplicate shares O_NONBLOCK with the transport: whoever uses it polls.
    with socket.socket(fileno=os.dup(owner.fileno())) as client:
        yield client


async def _read(request: web.Request) -> DownloadRequest:
    """The query, or the JSON body; InvalidArgumentError for one that is none."""
    if "id" in request.query:
        return from_wire(DownloadRequest, {name: _value(text) for name, text in request.query.items()})
    body = await read_body(request)
    if not body.strip():
        return DownloadRequest()
    try:
        value, _ = json.JSONDecoder().raw_decode(body.decode().lstrip())
    except (ValueError, RecursionError) as err:
        raise InvalidArgumentError("the request is not valid JSON") from err
    if not isinstance(value, dict | None):
        raise InvalidArgumentError("the request is not a JSON object")
    return from_wire(DownloadRequest, value)


def _value(text: str) -> str | bool:
    """A query has text only; no name of a snapshot is one of these words, as each has an ``@``."""
    return {"true": True, "false": False}.get(text, text)
