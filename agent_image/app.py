"""The composition root: nothing else in the agent constructs a concrete store or opens a file of the state directory."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from aiohttp import web

from agent_image.config import AgentSettings
from agent_image.drivers.base import StorageDriver
from agent_image.drivers.registry import make_driver
from agent_image.fetch import Fetcher
from agent_image.fetch_server import ImageServer
from agent_image.fetch_spool import Spools
from agent_image.guests import Guests
from agent_image.guests_space import SpaceLedger
from agent_image.jobs_kv import KeyValueJobQueue
from agent_image.methods import register_methods
from agent_image.metrics import AgentMetrics
from agent_image.records import ImageRecords
from agent_image.records_kvite import FILE_NAME, migrate
from agent_image.store import ImageStore
from agent_image.store_images import Images
from agent_image.store_pool import Pool
from agent_image.store_snapshots import Snapshots
from agent_image.store_volumes import Volumes
from agent_image.web import PATH, SnapshotDownloads
from agent_image.workers import FetchPool
from imaging.errors import MistifyError, from_os_error
from imaging.kv.base import KeyValue
from imaging.kv.sqlite import SqliteKeyValue
from imaging.threads import Offload
from rpc.dispatch import Registry
from rpc.rest import render_text_error
from rpc.server import LIFECYCLE, METRICS, ReadyCheck, ServerSettings, create_app

CHANGE_THREADS = 8
"""Changes of the pool at once: most wait for the driver's own locks or for the disk."""
ANSWER_THREADS = 4
"""Looks at the pool at once: they come from memory as a rule."""

TABLE_NAME = "agent.db"
"""Image records and jobs."""

SPOOL_NAME = "fetching"
"""What has arrived of images that are not whole yet."""

QUEUE_LOOK_S = 5.0
"""How often the gauge of pending jobs is brought up to date."""

TIDY_S = 60.0
"""How often old results are forgotten, and deleted images whose device was still open are tried again."""

log = logging.getLogger(__name__)


def steady_clock() -> Callable[[], float]:
    """Seconds since the epoch as of now, from then on by a clock that nobody sets: a step must not make claims lapse."""
    offset_s = time.time() - time.monotonic()
    return lambda: offset_s + time.monotonic()


class AgentParts:
    """The agent's objects, made once and wired together."""

    def __init__(self, settings: AgentSettings, driver: StorageDriver, table: KeyValue, metrics: AgentMetrics) -> None:
        self.changes, self.answers = Offload("change", CHANGE_THREADS), Offload("answer", ANSWER_THREADS)
        self.pool = Pool(driver, self.changes, self.answers, observe=metrics.driver_call)
        self.records = ImageRecords(table)
        volumes = Volumes(self.pool)
        self.images = Images(self.pool, self.records, volumes)
        ledger = SpaceLedger(lambda: driver.usage(self.pool.root).available_bytes)
        server = ImageServer(settings.image_service, token=settings.image_service_token)
        spools = Spools(settings.state_dir / SPOOL_NAME)
        fetcher = Fetcher(self.images, server, settings.limits, ledger, spools, count_bytes=metrics.received)
        self.queue = KeyValueJobQueue(table, pending_max=settings.pending_max)
        self.fetches = FetchPool(
            self.queue, self.images, fetcher, fetchers=settings.fetchers, metrics=metrics, clock=steady_clock()
        )
        guests = Guests(self.pool, self.images, volumes, ledger, block_bytes=settings.volblocksize_bytes)
        self.store = ImageStore(self.pool, self.images, volumes, Snapshots(self.pool), guests, self.fetches)

    def close(self) -> None:
        """Let calls to the pool end, refuse new ones."""
        self.changes.close()
        self.answers.close()


async def create_agent(settings: AgentSettings, server: ServerSettings) -> web.Application:
    """The agent's application, open and at work; its cleanup closes everything."""
    stack = AsyncExitStack()
    try:
        metrics = AgentMetrics()
        driver, table = await asyncio.to_thread(_open_stores, settings)
        stack.callback(driver.close)
        stack.callback(table.close)
        parts = AgentParts(settings, driver, table, metrics)
        stack.callback(parts.close)
        await asyncio.to_thread(_load_records, settings, parts)
        stack.callback(parts.fetches.close)
        stack.push_async_callback(parts.fetches.stop)
        await parts.store.open()
        downloads = SnapshotDownloads(parts.store, driver, count=metrics.sent)
        stack.callback(downloads.close)
        app = _application(server, parts, downloads, metrics)
        watcher = asyncio.create_task(_look_after(parts, metrics))
        stack.callback(watcher.cancel)
    except BaseException:
        await stack.aclose()
        raise

    async def close(_app: web.Application) -> None:
        await stack.aclose()

    app.on_cleanup.append(close)
    return app


def _open_stores(settings: AgentSettings) -> tuple[StorageDriver, KeyValue]:
    """Blocking: the pool and the table, both locked for us."""
    try:
        settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as err:
        raise from_os_error(err, f"can't make the state directory {settings.state_dir}") from err
    driver = make_driver(
        settings.driver,
        settings.pool,
        settings.state_dir,
        volblocksize_default_bytes=settings.volblocksize_bytes,
    )
    driver.open()
    try:
        return driver, SqliteKeyValue(settings.state_dir / TABLE_NAME)
    except BaseException:
        driver.close()
        raise


def _load_records(settings: AgentSettings, parts: AgentParts) -> None:
    """Blocking: the table of images, and once what an older version left."""
    parts.records.load()
    for path in _old_tables(settings):
        migrate(parts.records, path, settings.pool)


def _old_tables(settings: AgentSettings) -> Sequence[Path]:
    """Where an older version kept its table: in the root of the file system of images."""
    found = [settings.state_dir / FILE_NAME]
    if settings.driver == "zfs":
        found.append(Path("/") / settings.pool.text / "images" / FILE_NAME)
    return found


def _application(
    server: ServerSettings, parts: AgentParts, downloads: SnapshotDownloads, metrics: AgentMetrics
) -> web.Application:
    registry = Registry()
    register_methods(registry, parts.store)
    app = create_app(server, registry=registry, render_error=render_text_error)
    app.router.add_route("*", PATH, downloads.handle)
    app[LIFECYCLE].park_hooks.append(parts.fetches.stop)
    app[LIFECYCLE].ready_checks.update(pool=_pool_check(parts.pool), fetchers=_fetchers_check(parts.fetches))
    metrics.expose(
        app[METRICS].registry, running=lambda: parts.fetches.running, images=lambda: len(parts.records.list())
    )
    return app


def _pool_check(pool: Pool) -> ReadyCheck:
    async def check() -> str | None:
        await pool.get(pool.images)
        return None

    return check


def _fetchers_check(fetches: FetchPool) -> ReadyCheck:
    async def check() -> str | None:
        return None if fetches.alive else "a worker has died"

    return check


async def _look_after(parts: AgentParts, metrics: AgentMetrics) -> None:
    """Keep the gauge of the queue up to date, and tidy up now and then."""
    loop = asyncio.get_running_loop()
    tidy_at_s = loop.time() + TIDY_S
    while True:
        try:
            metrics.pending.set(await parts.fetches.pending_count())
            if loop.time() >= tidy_at_s:
                tidy_at_s = loop.time() + TIDY_S
                await parts.store.tidy()
        except MistifyError:
            log.exception("can't look after the queue; will try again")
        await asyncio.sleep(QUEUE_LOOK_S)
