"""What runs beside the requests: garbage collection, expiry of uploads, scrubbing; and the operator's hand on them."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec
from aiohttp import web

from image_service.collector import Collector
from image_service.importer import Importer
from image_service.inspector import Inspector
from image_service.lifecycle import Image
from image_service.said import parse_size
from image_service.scrubbing import Scrubber
from image_service.spool import Pools, settled
from image_service.turns import turn_at
from image_service.uploads import Uploads
from imaging.errors import BusyError, InvalidArgumentError, MistifyError

log = logging.getLogger(__name__)

_FLAGS = {"": False, "0": False, "false": False, "1": True, "true": True}


class Upkeep:
    """Keeps the service's stores tidy and sound."""

    def __init__(
        self,
        collector: Collector,
        uploads: Uploads,
        scrubber: Scrubber,
        inspector: Inspector,
        importer: Importer,
        pools: Pools,
    ) -> None:
        self._inspector = inspector
        self._importer = importer
        self._collector = collector
        self._uploads = uploads
        self._scrubber = scrubber
        self._data = pools.data

    async def keep_collecting(self, interval_s: float) -> None:
        """Collect garbage from time to time, until cancelled. A round that fails is logged; the next one comes."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self._uploads.expire()
                await self._data(self._collector.collect)
            except BusyError as err:
                log.info("garbage is another's business: %s", err.message)
            except Exception:
                log.exception("garbage collection failed")

    async def catch_up(self) -> None:
        """Look at complete images nobody has looked at, one after the other."""
        try:
            async with turn_at("catch-up", self._collector.replica, self._data) as turn:
                for image in await self._data(self._inspector.unseen) if turn is not None else ():
                    await settled(self._data(self._catch_up, image))
        except MistifyError:
            log.exception("can't look at what was stored before")

    def _catch_up(self, image: Image) -> None:
        try:
            self._inspector.catch_up(image)
        except MistifyError as err:
            log.warning("image was not looked at: %s", err.message, extra={"image_id": image.id})

    async def run(self, interval_s: float) -> None:
        """Everything, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.keep_collecting(interval_s), name="collect garbage")
            group.create_task(self._importer.keep_taking_over(), name="take over fetches")
            group.create_task(self._uploads.keep_giving(), name="give uploads away")
            group.create_task(self.catch_up(), name="look at older images")
            group.create_task(self._scrubber.keep_scrubbing(), name="look whether to scrub")

    async def close(self) -> None:
        """End a scrub."""
        await self._scrubber.close()

    def add_to(self, app: web.Application) -> None:
        """Route the operator's requests here."""
        app.router.add_post("/upkeep/collect", self.collect)
        app.router.add_post("/upkeep/scrub", self.scrub)
        app.router.add_get("/upkeep/scrub", self.scrubbed)

    async def collect(self, request: web.Request) -> web.Response:
        """POST /upkeep/collect: one round of garbage collection; ``dry_run=true`` only tells."""
        flag, limit = request.query.get("dry_run", "").lower(), request.query.get("limit", "")
        if flag not in _FLAGS:
            raise InvalidArgumentError("dry_run must be true or false")
        report = await self._data(
            self._collector.collect, dry_run=_FLAGS[flag], limit=parse_size(limit) if limit else None
        )
        return _json(
            200,
            {
                "dry_run": _FLAGS[flag],
                "blobs": [str(digest) for digest in report.blobs],
                "ingests": list(report.refs),
                "freed": report.freed_bytes,
                "kept": report.kept,
                "complete": report.complete,
            },
        )

    async def scrub(self, request: web.Request) -> web.Response:
        """POST /upkeep/scrub: begin to read everything again."""
        await self._scrubber.start()
        return await self.scrubbed(request, status=202)

    async def scrubbed(self, _request: web.Request, *, status: int = 200) -> web.Response:
        """GET /upkeep/scrub: the pass that runs, or the last one."""
        report = await self._scrubber.report()
        return _json(
            status,
            {
                "running": report.running,
                "checked": report.checked,
                "checked_size": report.checked_bytes,
                "damaged": report.damaged,
                "images": report.images,
            },
        )


def _json(status: int, value: Any) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")
