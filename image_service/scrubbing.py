"""Reading every stored blob again, now and then, so that damage is known before somebody needs the image.

A damaged blob is quarantined by the store; images that name it (or one that is not there at all) get status ``error`` and are not
offered any more. One pass runs at a time, in one of the processes that share the stores, and rests three times as long as it reads, so
that it takes a quarter of the disk. How far it is is kept beside the records: everybody can tell, and when its process dies
another goes on behind the last blob.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from image_service.lifecycle import Image, ImageStatus, set_damaged
from image_service.metadata import MARKS, MetadataStore
from image_service.spool import Pools, settled
from image_service.turns import turn_at
from imaging.blobs.base import BlobStore
from imaging.digests import Digest
from imaging.errors import BadDataError, ConflictError, LeaseLostError, MistifyError, NotFoundError
from imaging.kv.base import ABSENT, Entry, Put, put
from imaging.kv.leases import Fence

INTERVAL_S = 7 * 86400.0
"""Between two passes. Disks lose sectors over months; reading 10 TB in a week is 17 MB/s."""

LOOK_INTERVAL_S = 600.0
"""How often to see whether a pass is due, or was left by a process that died."""

SAVE_S = 5.0
"""How often it is written down how far a pass is."""

TURN = "scrub"
"""The lease of whoever reads."""

REST_FACTOR = 3.0
REST_MAX_S = 60.0

DAMAGED = "the stored data was found damaged"
GONE = "the stored data is gone"

_MARK = MARKS + "scrub"
_REPORT = MARKS + "scrub-report"

log = logging.getLogger(__name__)


class ScrubReport(msgspec.Struct):
    """One pass, as far as it is."""

    running: bool = False
    checked: int = 0
    checked_bytes: int = 0
    damaged: list[str] = msgspec.field(default_factory=list)
    """Digests of blobs that were damaged or gone."""
    images: list[str] = msgspec.field(default_factory=list)
    """Ids of the images that had them."""
    at: str = ""
    """The last blob that was read: they are read in the order of their digests."""


class Scrubber:
    """See the module's docstring. Lives on one event loop."""

    def __init__(
        self,
        records: MetadataStore,
        blobs: BlobStore,
        pools: Pools,
        *,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._records = records
        self._blobs = blobs
        self._offload = pools.records
        self._data = pools.data
        self._interval_s = interval_s
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self._saved_s = 0.0

    async def report(self) -> ScrubReport:
        """The pass that runs, here or elsewhere, or the last one."""
        return await self._offload(self._load)

    def _load(self) -> ScrubReport:
        entry = self._records.engine.get(_REPORT)
        return ScrubReport() if entry is None else msgspec.json.decode(entry.value, type=ScrubReport)

    async def start(self) -> None:
        """Begin a pass, or go on with one whose process died; unless one is running."""
        if self._task is not None and not self._task.done():
            return
        begun = asyncio.Event()
        self._task = asyncio.create_task(self._run(begun), name="scrub")
        waiter = asyncio.create_task(begun.wait())
        await asyncio.wait([waiter, self._task], return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()

    async def keep_scrubbing(self) -> None:
        """Begin a pass whenever one is due, also over restarts; until cancelled."""
        while True:
            try:
                entry = await self._offload(self._records.engine.get, _MARK)
                if entry is None or float(entry.value) + self._interval_s <= self._clock():
                    if await self._offload(self._note, entry) and entry is not None:
                        await self.start()
                elif (await self.report()).running:
                    await self.start()  # nobody's, unless the turn is held
            except MistifyError:
                log.exception("can't see whether a scrub is due")
            await asyncio.sleep(min(LOOK_INTERVAL_S, self._interval_s))

    def _note(self, entry: Entry | None) -> bool:
        """Whether this process was the first to see that a pass is due."""
        try:
            put(self._records.engine, _MARK, str(self._clock()).encode(), expect=entry.revision if entry else ABSENT)
        except ConflictError:
            return False
        return True

    async def close(self) -> None:
        """End the pass; the next start begins a new one when it is due."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self, begun: asyncio.Event) -> None:
        try:
            async with turn_at(TURN, self._records.replica, self._offload) as turn:
                if turn is not None:
                    await self._read_all(turn, begun)
        except MistifyError:
            log.exception("scrub was given up")

    async def _read_all(self, turn: Fence, begun: asyncio.Event) -> None:
        """A pass that ended in an error is over; one whose process died is still written down as running."""
        left = await self._offload(self._load)
        report = left if left.running else ScrubReport(running=True)
        await self._save(report, turn)
        begun.set()
        try:
            await self._read(report, turn)
        except MistifyError:
            report.running = False
            await self._save(report, turn)
            raise
        report.running = False
        await self._save(report, turn)
        found = {"checked": report.checked, "damaged": len(report.damaged)}
        log.info("scrub has ended", extra=found)

    async def _read(self, report: ScrubReport, turn: Fence) -> None:
        await self._find_gone(report, turn)
        for blob in await self._data(lambda: list(self._blobs.list())):
            if str(blob.digest) <= report.at:
                continue
            began = time.monotonic()
            await self._check(blob.digest, report, turn)
            report.checked += 1
            report.checked_bytes += blob.size_bytes
            report.at = str(blob.digest)
            if time.monotonic() - self._saved_s >= SAVE_S:
                await self._save(report, turn)
            await asyncio.sleep(min((time.monotonic() - began) * REST_FACTOR, REST_MAX_S))

    async def _save(self, report: ScrubReport, turn: Fence) -> None:
        self._saved_s = time.monotonic()
        entry = Put(_REPORT, msgspec.json.encode(report))
        await settled(self._offload(self._records.engine.transact, [entry], [turn.compare]))

    async def _check(self, digest: Digest, report: ScrubReport, turn: Fence) -> None:
        try:
            await settled(self._data(self._blobs.verify, digest))
        except NotFoundError:
            return  # deleted since the pass began
        except BadDataError:
            await self._give_up(digest, DAMAGED, report, turn)

    async def _find_gone(self, report: ScrubReport, turn: Fence) -> None:
        """Images whose blob is not there: quarantined by another reader, or taken away."""
        for image in await self._offload(lambda: list(self._records.iterate())):
            if image.status is not ImageStatus.COMPLETE:
                continue
            try:
                await self._data(self._blobs.info, image.blob)
            except NotFoundError:
                await self._give_up(image.blob, GONE, report, turn)

    async def _give_up(self, digest: Digest, reason: str, report: ScrubReport, turn: Fence) -> None:
        """No image offers that blob any more. One that was deleted meanwhile, or names another blob by now, is left alone."""
        report.damaged.append(str(digest))

        def damage(image: Image) -> Image:
            return set_damaged(image, digest, reason)

        for image_id in await self._offload(self._records.ids_by_digest, digest):
            try:
                await settled(self._offload(self._records.update, image_id, damage, fence=turn))
            except LeaseLostError:
                raise
            except (NotFoundError, ConflictError):
                continue
            log.error("image is damaged", extra={"image_id": image_id, "digest": str(digest)})
            report.images.append(image_id)
