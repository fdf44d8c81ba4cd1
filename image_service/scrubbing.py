"""Reading every stored blob again, now and then, so that damage is known before somebody needs the image.

A damaged blob is quarantined by the store; images that name it (or one that is not there at all) get status ``error`` and are not
offered any more. One pass runs at a time and rests three times as long as it reads, so that it takes a quarter of the disk.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from image_service.lifecycle import ImageStatus, set_damaged
from image_service.metadata import MARKS, MetadataStore
from image_service.spool import Pools, settled
from imaging.blobs.base import BlobStore
from imaging.digests import Digest
from imaging.errors import BadDataError, ConflictError, MistifyError, NotFoundError
from imaging.kv.base import Put

INTERVAL_S = 7 * 86400.0
"""Between two passes. Disks lose sectors over months; reading 10 TB in a week is 17 MB/s."""

LOOK_INTERVAL_S = 3600.0
"""How often to see whether a pass is due."""

REST_FACTOR = 3.0
REST_MAX_S = 60.0

DAMAGED = "the stored data was found damaged"
GONE = "the stored data is gone"

_MARK = MARKS + "scrub"

log = logging.getLogger(__name__)


@dataclass(slots=True)
class ScrubReport:
    """One pass, as far as it is."""

    running: bool = False
    checked: int = 0
    checked_bytes: int = 0
    damaged: list[str] = field(default_factory=list)
    """Digests of blobs that were damaged or gone."""
    images: list[str] = field(default_factory=list)
    """Ids of the images that had them."""


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
        self.report = ScrubReport()
        """The pass that runs, or the last one."""

    def start(self) -> None:
        """Begin a pass, unless one is running."""
        if not self.report.running:
            self.report = ScrubReport(running=True)
            self._task = asyncio.create_task(self._run(), name="scrub")

    async def keep_scrubbing(self) -> None:
        """Begin a pass whenever one is due, also over restarts; until cancelled."""
        while True:
            try:
                entry = await self._offload(self._records.engine.get, _MARK)
                if entry is None or float(entry.value) + self._interval_s <= self._clock():
                    await self._offload(self._note)
                    if entry is not None:
                        self.start()
            except MistifyError:
                log.exception("can't see whether a scrub is due")
            await asyncio.sleep(min(LOOK_INTERVAL_S, self._interval_s))

    def _note(self) -> None:
        self._records.engine.transact([Put(_MARK, str(self._clock()).encode())])

    async def close(self) -> None:
        """End the pass; the next start begins a new one when it is due."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        report = self.report
        try:
            await self._find_gone(report)
            for blob in await self._data(lambda: list(self._blobs.list())):
                began = time.monotonic()
                await self._check(blob.digest, report)
                report.checked += 1
                report.checked_bytes += blob.size_bytes
                await asyncio.sleep(min((time.monotonic() - began) * REST_FACTOR, REST_MAX_S))
            found = {"checked": report.checked, "damaged": len(report.damaged)}
            log.info("scrub has ended", extra=found)
        except MistifyError:
            log.exception("scrub was given up")
        finally:
            report.running = False

    async def _check(self, digest: Digest, report: ScrubReport) -> None:
        try:
            await settled(self._data(self._blobs.verify, digest))
        except NotFoundError:
            return  # deleted since the pass began
        except BadDataError:
            await self._give_up(digest, DAMAGED, report)

    async def _find_gone(self, report: ScrubReport) -> None:
        """Images whose blob is not there: quarantined by another reader, or taken away."""
        for image in await self._offload(lambda: list(self._records.iterate())):
            if image.status is not ImageStatus.COMPLETE:
                continue
            try:
                await self._data(self._blobs.info, image.blob)
            except NotFoundError:
                await self._give_up(image.blob, GONE, report)

    async def _give_up(self, digest: Digest, reason: str, report: ScrubReport) -> None:
        """No image offers that blob any more. One that was deleted meanwhile, or names another blob by now, is left alone."""
        report.damaged.append(str(digest))
        for image_id in await self._offload(self._records.ids_by_digest, digest):
            try:
                await settled(
                    self._offload(self._records.update, image_id, lambda image: set_damaged(image, digest, reason))
                )
            except (NotFoundError, ConflictError):
                continue
            log.error("image is damaged", extra={"image_id": image_id, "digest": str(digest)})
            report.images.append(image_id)
