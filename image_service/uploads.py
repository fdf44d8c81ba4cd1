"""Uploads that come in parts, over any number of requests and restarts, until they are whole and become an image.

An upload is a record (:mod:`image_service.upload_records`) and an ingest of the blob store. Its id becomes the image's id; until then
no list shows it. Each part that was acknowledged is durable. The length is told at the start, so its room is reserved until it is
whole, given up, or has expired. Parts follow each other: one writer at a time, at exactly the offset that is durable.

The ingest stays open between two parts, so that nothing is hashed or looked at twice; a restart, or too many open ones, costs one pass over
what is there. So does a part that comes to another replica: it asks for the turn at the upload, and who holds it idly gives it away. Where
a balancer can send one client's parts to one replica, it should.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime

import msgspec

from image_service.bodies import Piece
from image_service.collector import TUS_PREFIX, Collector
from image_service.facts import Facts
from image_service.importer import utc_now
from image_service.inspection import Inspection
from image_service.inspector import Inspector
from image_service.lifecycle import Details, Expected, ImageType, new_upload, set_finished
from image_service.metadata import MetadataStore
from image_service.service import check_expected
from image_service.spool import Pools, Spool, find_committed, settled
from image_service.turns import find_turn
from image_service.upload_records import Upload, UploadRecords
from image_service.upload_session import Session, check_end, free
from imaging.blobs.base import BlobInfo, BlobStore
from imaging.digests import Digest
from imaging.errors import (
    BadDataError,
    BusyError,
    ConflictError,
    InvalidArgumentError,
    LeaseLostError,
    MistifyError,
    NoSpaceError,
    NotFoundError,
    TooLargeError,
    UnavailableError,
)

GIVE_INTERVAL_S = 0.5
"""How often to look for somebody who waits for a turn that is held idly: one short call."""

ASK_INTERVAL_S = 0.3
"""How often whoever waits for a turn tries again."""

ASK_MARGIN_S = 2.0
"""Waited for longer than a dead holder keeps its turn."""

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
        self._records = UploadRecords(records)
        self._blobs = blobs
        self._collector = collector
        self._inspector = inspector
        self._admission = inspector.admission
        self._offload = pools.records
        self._data = pools.data
        self._limits = limits
        self._now = now
        self._clock = clock
        self._sessions: dict[str, Session] = {}
        self._finishing: set[asyncio.Task[None]] = set()
        self._parked = False
        collector.add_refs(self._records.is_wanted)

    # -- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take up what was under way at the last stop; what is whole and nobody's becomes an image."""
        held = await self._offload(self._records.replica.held, TUS_PREFIX)
        for upload in await self._offload(self._records.list):
            session = Session(upload)
            session.offset_bytes = await self._stored(session)
            self._sessions[upload.image.id] = session
            await self._reserve_again(session)
            if session.whole and session.ref not in held:
                task = asyncio.create_task(self._finish_alone(session))
                self._finishing.add(task)
                task.add_done_callback(self._finishing.discard)

    async def _stored(self, session: Session) -> int:
        """How much of it is durable."""
        info = await self._data(self._blobs.find_ingest, session.ref)
        if info is not None:
            return info.offset_bytes
        committed = await self._data(find_committed, self._blobs, session.ref)
        return 0 if committed is None else committed.size_bytes

    async def _reserve_again(self, session: Session) -> None:
        try:
            session.room = await self._offload(self._admission.reserve, session.ref, 0)
            announce = session.room.announce
            await self._offload(announce, session.upload.length_bytes, received_bytes=session.offset_bytes)
        except NoSpaceError as err:
            log.warning("no room for the rest of an upload: %s", err.message, extra={"ref": session.ref})

    async def _finish_alone(self, session: Session) -> None:
        try:
            async with session.lock:
                await self._own(session, wait_s=0)
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
        for upload in await self._offload(self._records.list):
            session = self._sessions.setdefault(upload.image.id, Session(upload))
            if upload.expires_s > self._clock() or session.lock.locked():
                continue
            async with session.lock:
                try:
                    await self._own(session, wait_s=0)
                except (BusyError, NotFoundError):
                    continue  # another replica's, or given up by it
                if session.upload.expires_s <= self._clock():
                    log.info("upload has expired", extra={"ref": session.ref})
                    await self._remove(session)
        await self._forget_ended()

    async def _forget_ended(self) -> None:
        """What another replica brought to its end holds no room here."""
        known = {upload.image.id for upload in await self._offload(self._records.list)}
        for session in list(self._sessions.values()):
            if session.upload.image.id not in known and not session.has_turn and not session.lock.locked():
                self._forget(session)

    async def keep_giving(self) -> None:
        """Give away turns that are held idly and that somebody waits for, until cancelled."""
        while True:
            try:
                await self._give()
            except MistifyError as err:
                log.warning("can't see who waits for an upload: %s", err.message)
            await asyncio.sleep(GIVE_INTERVAL_S)

    async def _give(self) -> None:
        for name, ask in await self._offload(self._records.asked):
            session = self._sessions.get(name.removeprefix(TUS_PREFIX))
            if session is not None and session.has_turn and not session.lock.locked():
                async with session.lock:
                    await settled(self._shut(session))
                await self._offload(self._records.heard, ask)

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
        there = await self._offload(self._records.list, self._limits.uploads_max)
        if self._parked or len(there) >= self._limits.uploads_max:
            raise UnavailableError("too many uploads are under way; try again later")
        if len(metadata) > METADATA_MAX_CHARS:
            raise InvalidArgumentError(f"upload metadata is longer than {METADATA_MAX_CHARS} characters")
        if expected.size_bytes not in {-1, length_bytes}:
            raise InvalidArgumentError(f"the upload has {length_bytes} bytes, not {expected.size_bytes}")
        image = new_upload(str(uuid.uuid4()), image_type, details, check_expected(expected), now=self._now())
        expires_s = self._clock() + self._limits.expiry_s
        upload = Upload(image=image, length_bytes=length_bytes, metadata=metadata, expires_s=expires_s)
        session = Session(upload)
        session.room = await self._offload(self._admission.reserve, session.ref, length_bytes)
        try:
            await settled(self._offload(self._records.add, upload))
        except BaseException:
            session.room.end()
            raise
        self._sessions[image.id] = session
        return upload

    async def _get(self, upload_id: str) -> Session:
        """The upload as it is now; NotFoundError."""
        session = self._sessions.get(upload_id)
        if self._parked:
            raise UnavailableError("the service is stopping; try again later")
        if session is not None and (session.has_turn or session.lock.locked()):
            return session
        upload = await self._offload(self._records.find, upload_id)
        if upload is None:
            if session is not None:
                self._forget(session)
            raise NotFoundError("not found")
        session = self._sessions.setdefault(upload_id, Session(upload))
        if not session.has_turn:
            session.upload, session.offset_bytes = upload, upload.offset_bytes
        return session

    async def _own(self, session: Session, *, wait_s: float) -> None:
        """Have the turn at an upload (called with its lock); BusyError, NotFoundError if it has ended meanwhile."""
        await self._offload(self._records.replica.session)  # refuses at once what could not be written down
        if session.has_turn:
            return
        if session.spool is not None:  # of a turn that was lost
            await self._shut(session)
        deadline, asked = time.monotonic() + wait_s, False
        while (turn := await find_turn(session.ref, self._records.replica, self._offload)) is None:
            if time.monotonic() >= deadline:
                raise BusyError("another part of this upload is being written", [session.upload.image.id])
            await self._offload(self._records.ask, session.ref)
            asked = True
            await asyncio.sleep(ASK_INTERVAL_S)
        session.turn = turn
        if asked:
            await self._offload(self._records.unask, session.ref)
        upload = await self._offload(self._records.find, session.upload.image.id)
        if upload is None:
            await self._release(session)
            self._forget(session)
            raise NotFoundError("not found")
        session.upload, session.offset_bytes = upload, await self._stored(session)

    async def _release(self, session: Session) -> None:
        turn, session.turn = session.turn, None
        if turn is not None:
            await settled(self._offload(turn.release))

    def _forget(self, session: Session) -> None:
        self._sessions.pop(session.upload.image.id, None)
        if session.room is not None:
            session.room.end()

    @property
    def _wait_s(self) -> float:
        """How long a part waits for its turn: for as long as a replica that has died is waited for."""
        return self._records.replica.ttl_s + ASK_MARGIN_S

    async def state(self, upload_id: str) -> tuple[Upload, int]:
        """An upload and how much of it is durable; NotFoundError. A whole one is seen only when it is an image."""
        session = await self._get(upload_id)
        if not session.has_turn and not session.lock.locked():
            session.offset_bytes = await self._stored(session)
        if session.whole:
            async with session.lock:
                if upload_id in self._sessions:
                    async with self._owned(session):
                        if session.whole:
                            await self._finish(session)
        return session.upload, session.offset_bytes

    @asynccontextmanager
    async def _owned(self, session: Session) -> AsyncIterator[None]:
        """Hold the turn at an upload; UnavailableError if it is lost meanwhile. With the session's lock held."""
        try:
            await self._own(session, wait_s=self._wait_s)
            yield
        except LeaseLostError as err:
            await self._shut(session)
            raise UnavailableError("the upload was paused for too long; ask where it is and go on") from err

    async def append(self, upload_id: str, offset_bytes: int, chunks: AsyncIterator[Piece]) -> tuple[Upload, int]:
        """Add a part; the new offset, durable. With the last byte the upload has become an image when the call returns.

        ConflictError if it does not begin where the upload ends, BusyError if another part is being written, BadDataError and
        TooLargeError if the bytes are no image (the upload is gone then). Whatever else goes wrong keeps what came in.
        """
        session = await self._get(upload_id)
        async with free(session), self._owned(session):
            return await self._append(session, offset_bytes, chunks)

    async def _append(self, session: Session, offset_bytes: int, chunks: AsyncIterator[Piece]) -> tuple[Upload, int]:
        if offset_bytes != session.offset_bytes:
            raise ConflictError(f"the upload is at {session.offset_bytes}, not at {offset_bytes}")
        await self._open(session)
        await self._take(session, chunks)
        if session.whole:
            await self._finish(session)
        return session.upload, session.offset_bytes

    async def delete(self, upload_id: str) -> None:
        """Give up an upload; NotFoundError. Waits for a part that is being written."""
        session = await self._get(upload_id)
        async with session.lock:
            await self._own(session, wait_s=self._wait_s)
            await settled(self._remove(session))

    # -- one part ----------------------------------------------------------------------------------------------------

    async def _open(self, session: Session) -> None:
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
        session.spool = await Spool.open(
            self._blobs, self._data, room, max_bytes=limit, inspect=inspect, turn=session.turn
        )
        session.offset_bytes = session.spool.offset_bytes

    async def _shut_idle(self) -> None:
        """Close the ingest that was used longest ago if too many are open."""
        idle = [one for one in self._sessions.values() if one.spool is not None and not one.lock.locked()]
        if len(idle) >= self._limits.open_max:
            await self._shut(min(idle, key=lambda one: one.used_s))

    async def _take(self, session: Session, chunks: AsyncIterator[Piece]) -> None:
        assert session.spool is not None
        try:
            async for chunk in chunks:
                check_end(session.upload, session.spool.offset_bytes + len(chunk))
                await session.spool.write(chunk)
        except (BadDataError, TooLargeError):
            await settled(self._remove(session))
            raise
        except BaseException:
            await settled(self._keep(session))
            raise
        await settled(self._keep(session))

    async def _keep(self, session: Session) -> None:
        """Make durable what came in. If that fails, what is durable counts."""
        assert session.spool is not None
        try:
            session.offset_bytes = await session.spool.checkpoint()
            await self._note(session)
        except (BadDataError, TooLargeError):
            await self._remove(session)
            raise
        except MistifyError:
            await self._shut(session)
            raise

    async def _note(self, session: Session) -> None:
        """Write down how far it is, and let it live longer."""
        assert session.turn is not None
        session.upload = msgspec.structs.replace(
            session.upload, offset_bytes=session.offset_bytes, expires_s=self._clock() + self._limits.expiry_s
        )
        await self._offload(self._records.save, session.upload, session.turn)
        await self._data(self._blobs.lease, session.ref, ttl_s=self._limits.expiry_s)

    async def _shut(self, session: Session) -> None:
        """Let go of the ingest, then of the turn; a part that is being written is waited for by the ingest itself."""
        spool, session.spool = session.spool, None
        try:
            if spool is not None:
                await spool.close()
                session.offset_bytes = await self._stored(session)
        except MistifyError as err:
            log.warning("upload could not be closed: %s", err.message, extra={"ref": session.ref})
        finally:
            await self._release(session)

    # -- the end -----------------------------------------------------------------------------------------------------

    async def _finish(self, session: Session) -> None:
        """All bytes are here: an image, or nothing."""
        if await self._offload(self._records.is_image, session.upload):
            await settled(self._remove(session))  # a crash came between the two
            return
        try:
            if session.spool is None:
                committed = await self._data(find_committed, self._blobs, session.ref)
                if committed is not None:  # a crash came before there was an image
                    await settled(self._look(session, committed, None))
                    return
            await self._open(session)
            await settled(self._publish(session))
        except (BadDataError, TooLargeError):
            await settled(self._remove(session))
            raise

    async def _publish(self, session: Session) -> None:
        spool, image = session.spool, session.upload.image
        assert spool is not None
        wanted = Digest.parse(image.expected_digest) if image.expected_digest else None
        info = await spool.commit(digest=wanted, size_bytes=session.upload.length_bytes)
        session.spool = None
        await self._look(session, info, spool.inspection)

    async def _look(self, session: Session, info: BlobInfo, inspection: Inspection | None) -> None:
        """The bytes are stored: find out to the end what they are, and make an image of them."""
        image, turn = session.upload.image, session.turn
        assert turn is not None

        def record(facts: Facts) -> None:
            finished = set_finished(image, info.digest, info.size_bytes, facts, now=self._now())
            self._records.put_image(finished, turn)

        await self._data(self._inspector.publish, session.ref, image, info, inspection, record)
        await self._remove(session)

    async def _remove(self, session: Session) -> None:
        """Forget the upload and its bytes, if it has any left."""
        assert session.turn is not None
        await self._offload(self._records.remove, session.upload, session.turn)  # first: it tells whose the bytes are
        spool, session.spool = session.spool, None
        if spool is not None:
            await spool.abort()
        await self._data(self._collector.forget, session.ref)
        await self._release(session)
        self._forget(session)
