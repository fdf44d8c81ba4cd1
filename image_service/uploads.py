"""Uploads that come in parts, over any number of requests and restarts, until they are whole and become an image.

An upload is a record (``uploads/<id>`` in the metadata engine) and an ingest of the blob store. Its id becomes the image's id; until then
no list shows it. Each part that was acknowledged is durable. The length is told at the start, so its room is reserved until it is
whole, given up, or has expired. Parts follow each other: one writer at a time, at exactly the offset that is durable.

The ingest stays open between two parts, so that nothing is hashed or looked at twice; a restart, or too many open ones, costs one pass over
what is there.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import msgspec

from image_service.admission import Reservation
from image_service.bodies import Piece
from image_service.collector import TUS_PREFIX, Collector
from image_service.facts import Facts
from image_service.importer import utc_now
from image_service.inspector import Inspector
from image_service.lifecycle import Details, Expected, Image, ImageType, new_upload, set_finished
from image_service.metadata import MetadataStore
from image_service.service import check_expected
from image_service.spool import Pools, Spool, settled
from imaging.blobs.base import BlobStore
from imaging.digests import Digest
from imaging.errors import (
    BadDataError,
    BusyError,
    ConflictError,
    InvalidArgumentError,
    MistifyError,
    NoSpaceError,
    NotFoundError,
    TooLargeError,
    UnavailableError,
)
from imaging.kv.base import Delete, Put

RECORDS = "uploads/"

METADATA_MAX_CHARS = 8192
"""Repeated to whoever asks; aiohttp takes no longer header."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """Limits on uploads in parts."""

    uploads_max: int = 1000
    """Begun and not ended; each holds room and a record."""
    open_max: int = 32
    """Ingests kept open between two parts; each has a descriptor and perhaps a decoder."""
    expiry_s: float = 24 * 3600.0
    """Without a part for so long an upload is given up: a day covers every outage and the night."""


class Upload(msgspec.Struct, frozen=True, kw_only=True):
    """One upload as stored."""

    image: Image
    """What the image will be; its id is the upload's."""
    length_bytes: int
    metadata: str = ""
    """What the client said, as it said it."""
    expires_s: float = 0.0


@dataclass(slots=True)
class _Session:
    """An upload while the service lives."""

    upload: Upload
    offset_bytes: int = 0
    room: Reservation | None = None
    spool: Spool | None = None
    used_s: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def ref(self) -> str:
        """The ingest's name, and its lease's."""
        return TUS_PREFIX + self.upload.image.id

    @property
    def whole(self) -> bool:
        """Whether every byte is here."""
        return self.offset_bytes == self.upload.length_bytes


class Uploads:
    """See the module's docstring. Lives on one event loop: ``start``, use, ``close``."""

    def __init__(
        self,
        records: MetadataStore,
        blobs: BlobStore,
        collector: Collector,
        inspector: Inspector,
        *,
        pools: Pools,
        limits: UploadLimits = UploadLimits(),
        now: Callable[[], datetime] = utc_now,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._records = records
        self._blobs = blobs
        self._collector = collector
        self._inspector = inspector
        self._admission = inspector.admission
        self._offload = pools.records
        self._data = pools.data
        self._limits = limits
        self._now = now
        self._clock = clock
        self._sessions: dict[str, _Session] = {}
        self._finishing: set[asyncio.Task[None]] = set()
        self._parked = False
        collector.add_refs(self.wants)

    # -- life --------------------------------------------------------------------------------------------------------

    def wants(self, ref: str) -> bool:
        """Whether it is the ingest of an upload that may go on (blocking: for the collector)."""
        return (
            ref.startswith(TUS_PREFIX) and self._records.engine.get(RECORDS + ref.removeprefix(TUS_PREFIX)) is not None
        )

    def _load(self) -> Sequence[Upload]:
        entries = self._records.engine.list(RECORDS)
        try:
            return [msgspec.json.decode(entry.value, type=Upload) for entry in entries]
        except msgspec.MsgspecError as err:
            raise BadDataError("the record of an upload is damaged") from err

    async def start(self) -> None:
        """Take up what was under way at the last stop; what is whole becomes an image."""
        here = {info.ref: info.offset_bytes for info in await self._data(self._blobs.ingests)}
        for upload in await self._offload(self._load):
            session = _Session(upload)
            session.offset_bytes = here.get(session.ref, 0)
            if await self._offload(self._records.find_by_id, upload.image.id) is not None:
                await self._remove(session)  # it had become an image
                continue
            self._sessions[upload.image.id] = session
            await self._reserve_again(session)
            if session.whole:
                task = asyncio.create_task(self._finish_alone(session))
                self._finishing.add(task)
                task.add_done_callback(self._finishing.discard)

    async def _reserve_again(self, session: _Session) -> None:
        try:
            session.room = await self._offload(self._admission.reserve, session.ref, 0)
            announce = session.room.announce
            await self._offload(announce, session.upload.length_bytes, received_bytes=session.offset_bytes)
        except NoSpaceError as err:
            log.warning("no room for the rest of an upload: %s", err.message, extra={"ref": session.ref})

    async def _finish_alone(self, session: _Session) -> None:
        try:
            async with session.lock:
                await self._finish(session)
        except MistifyError as err:
            log.warning("upload did not become an image: %s", err.message, extra={"ref": session.ref})

    async def close(self) -> None:
        """Park: every acknowledged byte stays for the next start."""
        self._parked = True
        for task in self._finishing:
            task.cancel()
        for session in list(self._sessions.values()):
            await self._shut(session)

    async def expire(self) -> None:
        """Give up uploads that got no part for too long."""
        for session in list(self._sessions.values()):
            if session.upload.expires_s <= self._clock() and not session.lock.locked():
                async with session.lock:
                    log.info("upload has expired", extra={"ref": session.ref})
                    await self._remove(session)

    # -- what callers do ---------------------------------------------------------------------------------------------

    async def create(
        self,
        image_type: ImageType,
        length_bytes: int,
        *,
        details: Details,
        expected: Expected,
        metadata: str = "",
    ) -> Upload:
        """Begin an upload; TooLargeError, NoSpaceError, UnavailableError (too many)."""
        if self._parked or len(self._sessions) >= self._limits.uploads_max:
            raise UnavailableError("too many uploads are under way; try again later")
        if len(metadata) > METADATA_MAX_CHARS:
            raise InvalidArgumentError(f"upload metadata is longer than {METADATA_MAX_CHARS} characters")
        if expected.size_bytes not in {-1, length_bytes}:
            raise InvalidArgumentError(f"the upload has {length_bytes} bytes, not {expected.size_bytes}")
        image = new_upload(str(uuid.uuid4()), image_type, details, check_expected(expected), now=self._now())
        expires_s = self._clock() + self._limits.expiry_s
        upload = Upload(image=image, length_bytes=length_bytes, metadata=metadata, expires_s=expires_s)
        session = _Session(upload)
        session.room = await self._offload(self._admission.reserve, session.ref, length_bytes)
        try:
            await settled(self._save(session, upload))
        except BaseException:
            session.room.end()
            raise
        self._sessions[image.id] = session
        return upload

    async def _save(self, session: _Session, upload: Upload) -> None:
        session.upload = upload
        key = RECORDS + upload.image.id
        await self._offload(self._records.engine.transact, [Put(key, msgspec.json.encode(upload))])

    def _get(self, upload_id: str) -> _Session:
        session = self._sessions.get(upload_id)
        if session is None or self._parked:
            raise NotFoundError("not found")
        return session

    async def state(self, upload_id: str) -> tuple[Upload, int]:
        """An upload and how much of it is durable; NotFoundError. A whole one is seen only when it is an image."""
        session = self._get(upload_id)
        if session.whole:
            async with session.lock:
                if upload_id in self._sessions:
                    await self._finish(session)
        return session.upload, session.offset_bytes

    async def append(self, upload_id: str, offset_bytes: int, chunks: AsyncIterator[Piece]) -> tuple[Upload, int]:
        """Add a part; the new offset, durable. With the last byte the upload has become an image when the call returns.

        ConflictError if it does not begin where the upload ends, BusyError if another part is being written, BadDataError and
        TooLargeError if the bytes are no image (the upload is gone then). Whatever else goes wrong keeps what came in.
        """
        session = self._get(upload_id)
        if session.lock.locked():
            raise BusyError("another part of this upload is being written", [upload_id])
        async with session.lock:
            self._get(upload_id)
            if offset_bytes != session.offset_bytes:
                raise ConflictError(f"the upload is at {session.offset_bytes}, not at {offset_bytes}")
            await self._open(session)
            await self._take(session, chunks)
            if session.whole:
                await self._finish(session)
            else:
                await self._extend(session)
            return session.upload, session.offset_bytes

    async def delete(self, upload_id: str) -> None:
        """Give up an upload; NotFoundError. Waits for a part that is being written."""
        session = self._get(upload_id)
        async with session.lock:
            self._get(upload_id)
            await settled(self._remove(session))

    # -- one part ----------------------------------------------------------------------------------------------------

    async def _open(self, session: _Session) -> None:
        session.used_s = time.monotonic()
        if session.spool is not None:
            return
        await self._shut_idle()
        if session.room is None:
            session.room = await self._offload(self._admission.reserve, session.ref, 0)
        room, length = session.room, session.upload.length_bytes
        await self._offload(room.announce, length, received_bytes=session.offset_bytes)
        inspect = functools.partial(self._inspector.begin, session.upload.image.type)
        limit = self._admission.size_max_bytes
        session.spool = await Spool.open(self._blobs, self._data, room, max_bytes=limit, inspect=inspect)
        session.offset_bytes = session.spool.offset_bytes

    async def _shut_idle(self) -> None:
        """Close the ingest that was used longest ago if too many are open."""
        idle = [one for one in self._sessions.values() if one.spool is not None and not one.lock.locked()]
        if len(idle) >= self._limits.open_max:
            await self._shut(min(idle, key=lambda one: one.used_s))

    async def _take(self, session: _Session, chunks: AsyncIterator[Piece]) -> None:
        assert session.spool is not None
        try:
            async for chunk in chunks:
                _check_end(session.upload, session.spool.offset_bytes + len(chunk))
                await session.spool.write(chunk)
        except (BadDataError, TooLargeError):
            await settled(self._remove(session))
            raise
        except BaseException:
            await settled(self._keep(session))
            raise
        await settled(self._keep(session))

    async def _keep(self, session: _Session) -> None:
        """Make durable what came in. If that fails, what is durable counts."""
        assert session.spool is not None
        try:
            session.offset_bytes = await session.spool.checkpoint()
        except (BadDataError, TooLargeError):
            await self._remove(session)
            raise
        except MistifyError:
            await self._shut(session)
            raise

    async def _shut(self, session: _Session) -> None:
        """Let go of the ingest; a part that is being written is waited for by the ingest itself."""
        spool, session.spool = session.spool, None
        if spool is None:
            return
        try:
            await spool.close()
        except MistifyError as err:
            log.warning("upload could not be closed: %s", err.message, extra={"ref": session.ref})
        here = {info.ref: info.offset_bytes for info in await self._data(self._blobs.ingests)}
        session.offset_bytes = here.get(session.ref, 0)

    async def _extend(self, session: _Session) -> None:
        expires_s = self._clock() + self._limits.expiry_s
        await settled(self._save(session, msgspec.structs.replace(session.upload, expires_s=expires_s)))
        await self._data(self._blobs.lease, session.ref, ttl_s=self._limits.expiry_s)

    # -- the end -----------------------------------------------------------------------------------------------------

    async def _finish(self, session: _Session) -> None:
        """All bytes are here: an image, or nothing."""
        await self._open(session)
        try:
            await settled(self._publish(session))
        except (BadDataError, TooLargeError):
            await settled(self._remove(session))
            raise

    async def _publish(self, session: _Session) -> None:
        spool, image = session.spool, session.upload.image
        assert spool is not None
        wanted = Digest.parse(image.expected_digest) if image.expected_digest else None
        info = await spool.commit(digest=wanted, size_bytes=session.upload.length_bytes)
        session.spool = None

        def record(facts: Facts) -> None:
            self._records.put(set_finished(image, info.digest, info.size_bytes, facts, now=self._now()))

        await self._data(self._inspector.publish, session.ref, image, info, spool.inspection, record)
        await self._remove(session)

    async def _remove(self, session: _Session) -> None:
        """Forget the upload and its bytes, if it has any left."""
        spool, session.spool = session.spool, None
        if spool is not None:
            await spool.abort()
        await self._data(self._collector.forget, session.ref)
        await self._offload(self._records.engine.transact, [Delete(RECORDS + session.upload.image.id)])
        self._sessions.pop(session.upload.image.id, None)
        if session.room is not None:
            session.room.end()


def _check_end(upload: Upload, end_bytes: int) -> None:
    if end_bytes > upload.length_bytes:
        raise InvalidArgumentError(f"more than the {upload.length_bytes} bytes of the upload")
