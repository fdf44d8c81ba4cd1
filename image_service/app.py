"""The image service's composition root: opens the stores, ties the parts together, closes them in the other order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from aiohttp import web
from prometheus_client import Gauge

from image_service.admission import Admission
from image_service.catalog import Catalog, CatalogBuilder
from image_service.catalog_web import CatalogEndpoints
from image_service.collector import Collector
from image_service.config import ServiceConfig
from image_service.derive import DerivedStore, Deriver
from image_service.derive_cache import DerivedIndex
from image_service.derive_web import DerivedEndpoints
from image_service.fetcher import Fetcher
from image_service.importer import Importer
from image_service.inspector import Inspector
from image_service.metadata import MetadataStore
from image_service.openapi import OpenApiEndpoint
from image_service.original import find_original, import_original
from image_service.page import PageEndpoint
from image_service.scrubbing import Scrubber
from image_service.service import ImageService
from image_service.serving import BlobEndpoints
from image_service.shared_admission import SharedAdmission
from image_service.spool import Pools
from image_service.stores import image_stores, metadata_stores
from image_service.tus import TusEndpoints
from image_service.upkeep import Upkeep
from image_service.uploads import Uploads
from image_service.web import ImageEndpoints, render_error
from imaging.blobs.base import BlobStore
from imaging.blobs.local import LocalBlobStore
from rpc.server import LIFECYCLE, METRICS, ServerSettings, create_app

log = logging.getLogger(__name__)


def _open_stores(config: ServiceConfig, undo: contextlib.ExitStack) -> tuple[MetadataStore, BlobStore]:
    """Both stores, open, with what the original left taken over; closed by ``undo``."""
    records = metadata_stores.new_store(config.metadata_store_type)
    images = image_stores.new_store(config.image_store_type)
    records.lease_ttl_s = config.lease_ttl_s
    records.init(config.metadata_store_config)
    undo.callback(records.shutdown)
    images.init(config.image_store_config)
    undo.callback(images.shutdown)
    original = find_original(config.metadata_store_config)
    if original is not None:
        import_original(original, records, images.blobs, config.images_dir)
    return records, images.blobs


def _admission(config: ServiceConfig, records: MetadataStore, blobs: BlobStore, collector: Collector) -> Admission:
    if isinstance(blobs, LocalBlobStore):
        return Admission(config.admission, used_bytes=lambda: blobs.used_bytes, directory=config.images_dir)
    index = DerivedIndex(records.engine, config.derive)
    return SharedAdmission(config.admission, records, index.stored_bytes, collector.is_left)


def _deriver(
    config: ServiceConfig,
    service: ImageService,
    records: MetadataStore,
    blobs: BlobStore,
    collector: Collector,
    admission: Admission,
    pools: Pools,
) -> Deriver:
    """Makes derived images; its temporary files are beside the blobs, where the room is."""
    store = DerivedStore(blobs, records.engine, collector, admission, config.derive)
    base = config.images_dir if isinstance(blobs, LocalBlobStore) else config.state_dir
    return Deriver(service.get_blob, store, pools.data, base / "derive", limits=config.derive)


def _directory(config: ServiceConfig) -> Path | None:
    """Where compressed disks are unpacked to be looked at: on the disk whose free space is watched."""
    return config.images_dir if config.images_dir.is_dir() else None


async def create(settings: ServerSettings, config: ServiceConfig) -> web.Application:
    """The application, with its stores open and its unfinished fetches running."""
    pools = Pools()
    async with contextlib.AsyncExitStack() as undo:
        undo.callback(pools.close)
        stores = contextlib.ExitStack()
        undo.push_async_callback(pools.data, stores.close)
        records, blobs = await pools.data(_open_stores, config, stores)
        fetcher = Fetcher(config.policy, config.conversation)
        undo.push_async_callback(fetcher.close)
        collector = Collector(records, blobs, grace_s=config.collect_grace_s)
        admission = _admission(config, records, blobs, collector)
        undo.callback(admission.close)
        inspector = Inspector(
            records, blobs, admission, collector, limits=config.inspection, directory=_directory(config)
        )
        importer = Importer(records, blobs, fetcher, collector, inspector, pools=pools, limits=config.fetches)
        service = ImageService(records, blobs, importer, collector, inspector, policy=config.policy, pools=pools)
        undo.push_async_callback(service.close)
        uploads = Uploads(records, blobs, collector, inspector, pools=pools, limits=config.uploads)
        undo.push_async_callback(uploads.close)
        scrubber = Scrubber(records, blobs, pools, interval_s=config.scrub_interval_s)
        upkeep = Upkeep(collector, uploads, scrubber, inspector, importer, pools)
        undo.push_async_callback(upkeep.close)
        deriver = await pools.data(_deriver, config, service, records, blobs, collector, admission, pools)
        undo.push_async_callback(deriver.close)
        app = create_app(settings, render_error=render_error)
        derived = DerivedEndpoints(deriver, pools.data)
        derived.add_to(app)
        images = ImageEndpoints(service, blobs, pools, config.web, derived)
        images.add_to(app)
        upkeep.add_to(app)
        TusEndpoints(
            uploads,
            service,
            pools,
            images.bodies.pieces,
            size_max_bytes=admission.size_max_bytes,
            directory=_directory(config),
        ).add_to(app)
        BlobEndpoints(collector, blobs, pools).add_to(app)
        catalog = Catalog(await pools.data(CatalogBuilder, records, blobs, config.catalog), pools)
        CatalogEndpoints(catalog, service, blobs, pools).add_to(app)
        OpenApiEndpoint(settings.component, settings.version).add_to(app)
        PageEndpoint().add_to(app)
        _observe(app, importer, config.images_dir)
        app[LIFECYCLE].park_hooks.extend([service.close, uploads.close, deriver.close])
        await service.start()
        await uploads.start()
        app.cleanup_ctx.append(_background(upkeep, config.collect_interval_s, undo.pop_all()))
    return app


def _observe(app: web.Application, importer: Importer, images: Path) -> None:
    """What only this daemon can count."""
    registry = app[METRICS].registry
    fetches = Gauge("mistify_image_fetches", "Fetches accepted and not ended", registry=registry)
    fetches.set_function(lambda: importer.running)
    log.info("image store is open", extra={"directory": str(images)})


def _background(
    upkeep: Upkeep, interval_s: float, closing: contextlib.AsyncExitStack
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Tidy up while the application lives; afterwards close everything."""

    async def run(_app: web.Application) -> AsyncIterator[None]:
        async with closing:
            task = asyncio.create_task(upkeep.run(interval_s), name="upkeep")
            yield
            task.cancel()
            await asyncio.wait([task])

    return run
