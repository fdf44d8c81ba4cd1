"""The bodies of uploads: as aiohttp gives them, or, long ones, received straight into buffers that are used again and again.

aiohttp makes two new objects of every piece it reads, holds 128 KiB of them and stops the connection until somebody has taken
those. For a long body of a known length the connection is therefore handed to a :class:`_Receiver` once the headers are read: the
kernel then writes into a few large buffers, which fill while the one before is hashed and stored. aiohttp gets the connection
back for the answer and closes it afterwards, as the answer says (``Connection: close``): its parser has not seen the body.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import AsyncGenerator
from typing import cast

from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from imaging.errors import UnavailableError

Piece = bytes | bytearray | memoryview
"""Some bytes of a body. A memoryview is good until the next piece is asked for."""

DIRECT_MIN_BYTES = 4 << 20
"""Shorter bodies are through before the detour pays, and keep their connection."""

DIRECT_MAX = 8
"""Bodies received directly at once; further ones come as aiohttp gives them. With the next two this bounds memory at 24 MiB."""

BUFFER_BYTES = 1 << 20
"""One hop to a thread per MiB: the hop (about 50 us) is then a twentieth of the hashing and writing."""

BUFFERS = 3
"""One is stored, one is full, one is filled."""

LOW_WATER_BYTES = 256 << 10
"""The kernel wakes us for so much at once, not for every packet: a wake-up costs as much as copying 200 KiB."""

QUIET_S = 1.0
"""A connection that does not bring that much in so long is slow: then every packet is taken as it comes."""

_TAKEN = "mistify.body_taken"
"""Key of a request whose connection ends with its answer."""


class Bodies:
    """Gives request bodies piece by piece."""

    def __init__(self, stall_timeout_s: float) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._direct = 0

    def add_to(self, app: web.Application) -> None:
        """Let answers say when their connection ends."""
        app.on_response_prepare.append(_say_close)

    async def pieces(self, request: web.Request) -> AsyncGenerator[Piece, None]:
        """The body as it comes in; an error if it stops coming or the client goes away. Close the generator (``aclosing``)."""
        if request.headers.get(hdrs.EXPECT, "").lower() == "100-continue" and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._direct < DIRECT_MAX and _is_long_and_plain(request):
            self._direct += 1
            try:
                async for piece in self._received(request):
                    yield piece
            finally:
                self._direct -= 1
        else:
            async for chunk in self._parsed(request):
                yield chunk

    async def _parsed(self, request: web.Request) -> AsyncGenerator[bytes, None]:
        """As aiohttp gives them."""
        while True:
            try:
                async with asyncio.timeout(self._stall_timeout_s):
                    chunk = await request.content.readany()
            except TimeoutError as err:
                raise self._stalled() from err
            except (OSError, web.PayloadAccessError, web.RequestPayloadError, HttpProcessingError) as err:
                raise _gone() from err
            if not chunk and request.content.at_eof():
                return
            yield chunk

    async def _received(self, request: web.Request) -> AsyncGenerator[Piece, None]:
        """By a receiver. What had come with the headers is given first."""
        early, receiver = _take_over(request)
        try:
            for chunk in early:
                yield chunk
            while receiver is not None and not receiver.ended:
                piece = await receiver.take(self._stall_timeout_s)
                if piece is None:
                    raise self._stalled() if receiver.is_connected else _gone()
                yield piece
            request.content.feed_eof()
        finally:
            if receiver is not None:
                receiver.give_back()

    def _stalled(self) -> web.HTTPRequestTimeout:
        return web.HTTPRequestTimeout(reason=f"No byte of the upload for {self._stall_timeout_s:g} s")


def _gone() -> UnavailableError:
    return UnavailableError("the client went away during the upload")


def _is_long_and_plain(request: web.Request) -> bool:
    """Whether a body is exactly the next so many bytes of the connection, and worth it."""
    return (
        (request.content_length or 0) >= DIRECT_MIN_BYTES
        and hdrs.TRANSFER_ENCODING not in request.headers
        and hdrs.CONTENT_ENCODING not in request.headers  # aiohttp would undo it
        and request.transport is not None
        and request.transport.get_extra_info("sslcontext") is None
    )


def _take_over(request: web.Request) -> tuple[list[bytes], _Receiver | None]:
    """What aiohttp has of a body, and a receiver of the rest. Nothing may come in between, so nothing is awaited here."""
    early: list[bytes] = []
    try:
        while chunk := request.content.read_nowait():
            early.append(chunk)
    except (OSError, web.PayloadAccessError, web.RequestPayloadError, HttpProcessingError) as err:
        raise _gone() from err
    left_bytes = (request.content_length or 0) - sum(map(len, early))
    if not left_bytes:
        return early, None
    if request.transport is None:
        raise _gone()
    request[_TAKEN] = True
    request.protocol.close()  # after this request: its parser will not know where the next one begins
    return early, _Receiver(request.transport, left_bytes)


async def _say_close(request: web.BaseRequest, response: web.StreamResponse) -> None:
    if _TAKEN in request:
        response.force_close()
        response.headers[hdrs.CONNECTION] = "close"


class _Receiver(asyncio.BufferedProtocol):
    """Has a connection for the rest of one body. What concerns the connection itself is passed on to its own protocol."""

    def __init__(self, transport: asyncio.Transport, left_bytes: int) -> None:
        self._transport = transport
        self._owner = cast("asyncio.Protocol", transport.get_protocol())
        self._left_bytes = left_bytes
        self._free = [memoryview(bytearray(BUFFER_BYTES)) for _ in range(BUFFERS)]
        self._filling = self._free.pop()
        self._filled = 0
        self._ready: deque[tuple[memoryview, int]] = deque()
        self._lent: memoryview | None = None
        self._changed = asyncio.Event()
        self._dried_up = False
        self.is_connected = True
        self._low_water_bytes = 1
        self._set_low_water(min(LOW_WATER_BYTES, left_bytes))
        transport.set_protocol(self)
        transport.resume_reading()

    # -- for the taker -----------------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether every byte was taken."""
        return not self._left_bytes and not self._ready

    async def take(self, stall_timeout_s: float) -> memoryview | None:
        """The next bytes, a bufferful unless no more come; None if none have come for so long, or the client is gone.

        The piece before is over: its buffer is filled again.
        """
        self._lend(None)
        while not self._ready and self.is_connected and not self._dried_up:
            await self._wait(stall_timeout_s)
        if not self._ready:
            self._end_piece()  # what came before the connection broke, or dried up, still counts
        if not self._ready:
            return None
        buffer, count = self._ready.popleft()
        self._lend(buffer)
        return buffer[:count]

    async def _wait(self, stall_timeout_s: float) -> None:
        """Until something has changed, or nothing has come for so long."""
        before = self._left_bytes
        for timeout_s in (min(QUIET_S, stall_timeout_s), max(stall_timeout_s - QUIET_S, 0)):
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
                return
            if self._left_bytes != before:
                return
            self._set_low_water(1)
        self._dried_up = True

    def _lend(self, buffer: memoryview | None) -> None:
        back, self._lent = self._lent, buffer
        if back is not None:
            self._free.append(back)
            self._fill_next()

    def give_back(self) -> None:
        """Let the connection's own protocol have it again."""
        self._set_low_water(1)
        if self.is_connected and self._transport.get_protocol() is self:
            self._transport.set_protocol(self._owner)
            if not self._transport.is_closing():
                self._transport.resume_reading()

    # -- buffers -----------------------------------------------------------------------------------------------------

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._filling[self._filled : self._filled + self._left_bytes]

    def buffer_updated(self, nbytes: int) -> None:
        """They are there."""
        self._filled += nbytes
        self._left_bytes -= nbytes
        if self._left_bytes < self._low_water_bytes:
            self._set_low_water(max(self._left_bytes, 1))
        if self._filled == len(self._filling) or not self._left_bytes:
            self._end_piece()

    def _end_piece(self) -> None:
        """What is in the buffer is a piece."""
        if not self._filled:
            return
        self._ready.append((self._filling, self._filled))
        self._filling, self._filled = memoryview(b""), 0
        self._fill_next()
        self._changed.set()

    def _fill_next(self) -> None:
        """Go on with a free buffer; stop the connection while there is none, or nothing more to come."""
        if not self._filling and self._free:
            self._filling = self._free.pop()
        if not self.is_connected or self._transport.is_closing():
            return
        if self._filling and self._left_bytes:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def _set_low_water(self, count_bytes: int) -> None:
        if count_bytes == self._low_water_bytes or not self.is_connected or self._transport.is_closing():
            return
        self._low_water_bytes = count_bytes
        self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count_bytes)

    # -- the connection ----------------------------------------------------------------------------------------------

    def eof_received(self) -> None:
        """The client sends no more: the transport closes itself."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self.is_connected = False
        self._changed.set()
        self._owner.connection_lost(exc)

    def pause_writing(self) -> None:
        """Passed on."""
        self._owner.pause_writing()

    def resume_writing(self) -> None:
        """Passed on."""
        self._owner.resume_writing()
