"""An upload in parts as one process knows it, while the service lives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from image_service.admission import Reservation
from image_service.spool import Spool
from image_service.upload_records import Upload
from imaging.errors import BusyError, InvalidArgumentError
from imaging.kv.leases import Fence

LAST_MOMENT_S = 1.0
"""A part that has ended is seen a moment before it is out of the way."""


@dataclass(slots=True)
class Session:
    """An upload as this process knows it. Without the turn that is what it was some time ago."""

    upload: Upload
    offset_bytes: int = 0
    turn: Fence | None = None
    room: Reservation | None = None
    spool: Spool | None = None
    used_s: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def ref(self) -> str:
        """The ingest's name, and its lease's."""
        return self.upload.ref

    @property
    def has_turn(self) -> bool:
        """Whether nobody else writes it, as far as we know."""
        return self.turn is not None and not self.turn.is_lost

    @property
    def whole(self) -> bool:
        """Whether every byte is here."""
        return self.offset_bytes == self.upload.length_bytes


@asynccontextmanager
async def free(session: Session) -> AsyncIterator[None]:
    """Hold the session's lock; BusyError if somebody else does, and not only for its last moment."""
    try:
        async with asyncio.timeout(LAST_MOMENT_S):
            await session.lock.acquire()
    except TimeoutError as err:
        raise BusyError("another part of this upload is being written", [session.upload.image.id]) from err
    try:
        yield
    finally:
        session.lock.release()


def check_end(upload: Upload, end_bytes: int) -> None:
    """InvalidArgumentError if the upload would become longer than was said."""
    if end_bytes > upload.length_bytes:
        raise InvalidArgumentError(f"more than the {upload.length_bytes} bytes of the upload")
