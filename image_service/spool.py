"""One ingest of a blob store, written from the event loop.

A :class:`Spool` gathers what arrives into pieces large enough to hash without the interpreter lock, and hands them to a thread one
after the other. Whoever waits for it waits until the thread has let go: a cancelled upload never leaves a thread writing to
an ingest that is being aborted.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

from image_service.admission import Reservation
from image_service.bodies import BUFFER_BYTES, Piece
from image_service.inspection import Inspection
from imaging.blobs.base import BlobInfo, BlobStore, BlobWriter
from imaging.digests import Digest
from imaging.errors import NoSpaceError, NotFoundError
from imaging.kv.leases import Fence
from imaging.threads import Offload

T = TypeVar("T")

LEASE_TTL_S = 3600.0
"""How long a writer is protected without a sign of life; a sign is given many times in that span."""

RECORD_THREADS = 4
"""Calls on the metadata store: it writes one at a time, and its reads take microseconds."""

DATA_THREADS = 16
"""Writes, fsyncs and opens of image data: enough that a few slow ones do not hold up the rest."""


class Pools:
    """The service's threads: records never wait behind data."""

    def __init__(self) -> None:
        self.records = Offload("records", RECORD_THREADS)
        self.data = Offload("data", DATA_THREADS)

    def close(self) -> None:
        """Let running calls end, refuse new ones."""
        self.data.close()
        self.records.close()


async def settled(call: Awaitable[T]) -> T:
    """Wait for ``call``; if the waiter is cancelled, wait all the same until the call has ended, then be cancelled."""
    task = asyncio.ensure_future(call)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:  # a second cancel must not let go of the thread either
                continue
        if not task.cancelled():
            task.exception()  # looked at: who is cancelled has no use for it, and the loop would report it as forgotten
        raise


def find_committed(blobs: BlobStore, ref: str) -> BlobInfo | None:
    """The blob an ingest of that name (and lease) has become, if its owner died before anything could name it. Blocking."""
    for digest in blobs.leased(ref):
        with contextlib.suppress(NotFoundError):
            return blobs.info(digest)
    return None


class Spool:
    """See the module's docstring. Use as an async context manager.

    Leaving it without commit keeps the ingest for a later resume, or forgets it if it was opened with ``keep=False``. What is written
    from the first byte on is looked at meanwhile, on a thread beside the writing one.
    """

    def __init__(
        self,
        writer: BlobWriter,
        offload: Offload,
        reservation: Reservation,
        *,
        keep: bool,
        inspect: Callable[[], Inspection | None],
        seen: Inspection | None = None,
        turn: Fence | None = None,
    ) -> None:
        self._keep = keep
        self._turn = turn
        self._inspect = inspect
        self.inspection = seen if seen is not None and seen.fed_bytes == writer.offset_bytes else None
        """What has seen every byte so far; None if nothing has."""
        if not writer.offset_bytes:
            self.inspection = inspect()
        self._writer = writer
        self._offload = offload
        self._reservation = reservation
        self._buffer = bytearray()
        self._written_bytes = writer.offset_bytes

    @classmethod
    async def open(
        cls,
        blobs: BlobStore,
        offload: Offload,
        reservation: Reservation,
        *,
        max_bytes: int,
        keep: bool = True,
        inspect: Callable[[], Inspection | None] = lambda: None,
        seen: Inspection | None = None,
        turn: Fence | None = None,
    ) -> Spool:
        """Start or resume the ingest a reservation was made for; it is also the name of its lease.

        An inspection that has ``seen`` exactly what is there goes on; what is there and was seen by none is read when it is whole.
        With a ``turn`` nothing is written once that is over: LeaseLostError, and the ingest is left as it is.
        """

        def start() -> BlobWriter:
            blobs.lease(reservation.ref, ttl_s=LEASE_TTL_S)
            return blobs.ingest(reservation.ref, lease=reservation.ref, max_bytes=max_bytes)

        task = asyncio.ensure_future(offload(start))
        try:
            return cls(await settled(task), offload, reservation, keep=keep, inspect=inspect, seen=seen, turn=turn)
        except asyncio.CancelledError:
            if task.exception() is None:
                await settled(offload(task.result().close))
            raise

    @property
    def offset_bytes(self) -> int:
        """How many bytes were taken, those still in the buffer included."""
        return self._written_bytes + len(self._buffer)

    async def write(self, data: Piece) -> None:
        """Take the next bytes; they may change once this has returned."""
        if not self._buffer and len(data) >= BUFFER_BYTES:
            await self._take(data)
            return
        self._buffer += data
        if len(self._buffer) >= BUFFER_BYTES:
            await self._flush()

    async def _flush(self) -> None:
        piece, self._buffer = self._buffer, bytearray()
        if piece:
            await self._take(piece)

    async def _take(self, piece: Piece) -> None:
        await settled(self._store(piece))
        self._written_bytes += len(piece)

    async def _store(self, piece: Piece) -> None:
        """Write and look at the same time; wait for both, whatever one of them raises."""
        calls = [self._offload(self._write, piece)]
        if self.inspection is not None:
            calls.append(self._offload(self.inspection.feed, piece))
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    @property
    def _is_lost(self) -> bool:
        """Whether somebody else may be writing this ingest."""
        return self._turn is not None and self._turn.is_lost

    def _check_turn(self) -> None:
        if self._turn is not None:
            self._turn.check()

    def _write(self, piece: Piece) -> None:
        self._check_turn()
        try:
            self._writer.write(piece)
        except NoSpaceError:  # nobody had said that so much would come
            if not self._reservation.reclaim(len(piece)):
                raise
            self._writer.write(piece)
        self._reservation.receive(self._writer.offset_bytes)

    async def checkpoint(self) -> int:
        """Make everything taken so far durable; how much that is."""
        await self._flush()
        self._check_turn()
        return await settled(self._offload(self._writer.checkpoint))

    async def restart(self) -> None:
        """Forget everything taken so far."""
        self._check_turn()
        self._buffer = bytearray()
        await settled(self._offload(self._writer.restart))
        self._written_bytes = 0
        self.inspection = self._inspect()

    async def commit(self, *, digest: Digest | None = None, size_bytes: int | None = None) -> BlobInfo:
        """Publish the blob."""
        await self._flush()
        self._check_turn()
        return await settled(self._offload(self._writer.commit, digest=digest, size_bytes=size_bytes))

    async def abort(self) -> None:
        """Forget the ingest."""
        self._buffer = bytearray()
        await settled(self._offload(self._writer.abandon if self._is_lost else self._writer.abort))

    async def close(self) -> None:
        """Let go of the ingest and keep it, as far as it was handed on."""
        await settled(self._offload(self._writer.abandon if self._is_lost else self._writer.close))

    async def __aenter__(self) -> Spool:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await (self.close() if self._keep else self.abort())
