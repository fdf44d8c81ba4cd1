"""The service's own catalogue: images become simplestreams documents.

Generated, never edited: what the records and their labels say is what the catalogue says, as of the moment a client asks for its index.
Nothing is built before the first client asks. Labels are kept beside the records; what is in the directory can be built again at any time,
and is the same on every replica, so that an index read at one leads to documents that any other can give.

A file that leaves the catalogue, because its image was deleted, stays readable for LEASE_TTL_S: clients work with an index they read up
to an hour ago.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from image_service.catalog_entries import LEASE_TTL_S, CatalogEntry, CatalogLabels, EntryBuilder, entry_key
from image_service.catalog_labels import LabelStore
from image_service.lifecycle import Image, ImageStatus
from image_service.metadata import MetadataStore
from image_service.spool import Pools, settled
from imaging.blobs.base import BlobStore
from imaging.digests import Digest
from imaging.errors import MistifyError, NotFoundError, UnavailableError
from imaging.files import atomic_write_bytes, make_directory, os_errors
from imaging.simplestreams.constraint import product_id
from imaging.simplestreams.paths import IMAGE_CONTENT_ID, IMAGE_DOWNLOADS, IMAGE_IDS
from imaging.simplestreams.publishing import Document, Publisher
from imaging.simplestreams.signing import Signer

CONTENT_ID = "images"
"""The content id other image servers use for downloads, too."""

BUILD_WAIT_S = 20.0
"""How long a client waits for a new catalogue before it gets the last one: below the 30 s after which Incus gives up."""

RENEW_S = 600.0
"""How often the lease on the catalogue's files is renewed; many times in its life."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CatalogSettings:
    """What an operator may say about the catalogue."""

    directory: Path
    key_file: Path | None = None
    region: str = ""
    endpoint: str = ""


class CatalogBuilder:
    """Builds and publishes the catalogue. Blocking; one thread at a time."""

    def __init__(self, records: MetadataStore, blobs: BlobStore, settings: CatalogSettings) -> None:
        self._records = records
        self._blobs = blobs
        self._settings = settings
        self.directory = make_directory(settings.directory)
        self.labels = LabelStore(records, older=settings.directory / "labels")
        self._entries_dir = make_directory(settings.directory / "entries")
        self._builder = EntryBuilder(blobs, settings.directory, owner=records.replica.id)
        self._published = ""
        self._renewed_s = 0.0

    def refresh(self) -> None:
        """Make the catalogue say what the records say now."""
        labelled, known = self._labelled()
        keys = "".join(entry_key(image, labels) for image, labels in labelled)
        wanted = hashlib.sha256(keys.encode()).hexdigest()
        if wanted != self._published:
            self._publish(labelled)
            self.labels.forget_gone(
                {image_id: known[image_id] for image_id in known.keys() - {i.id for i, _ in labelled}}
            )
            self._published = wanted
        elif time.monotonic() - self._renewed_s > RENEW_S:
            self._lease(self._offered(labelled))

    def entries(self) -> list[CatalogEntry]:
        """Every image and how it is offered, or why not."""
        return [self._entry(image, labels) for image, labels in self._labelled()[0]]

    def _labelled(self) -> tuple[Sequence[tuple[Image, CatalogLabels]], Mapping[str, CatalogLabels]]:
        """Every complete image with its labels; and all labels there are."""
        known = self.labels.all()
        images = [image for image in self._records.iterate() if image.status is ImageStatus.COMPLETE]
        return [(image, known.get(image.id, CatalogLabels())) for image in images], known

    def _publish(self, labelled: Sequence[tuple[Image, CatalogLabels]]) -> None:
        offered = self._offered(labelled)
        self._lease(offered)
        documents = [downloads_document(offered), ids_document(offered, self._settings)]
        if self._settings.key_file is None:
            Publisher(self.directory).publish(documents)
        else:
            with Signer.from_file(self._settings.key_file) as signer:
                Publisher(self.directory, signer).publish(documents)
        known = {image.id for image, _ in labelled}
        for path in self._entries_dir.glob("*.json"):
            if path.stem not in known:
                path.unlink(missing_ok=True)
        log.info("catalogue published", extra={"images": len(offered)})

    def _offered(self, labelled: Sequence[tuple[Image, CatalogLabels]]) -> list[CatalogEntry]:
        offered = [(image, labels) for image, labels in labelled if labels.published]
        self._builder.hold(digest for image, _ in offered for digest in self._digests(image))
        entries = [self._entry(image, labels) for image, labels in offered]
        return [entry for entry in entries if entry.items]

    def _lease(self, entries: Sequence[CatalogEntry]) -> None:
        """Protect exactly these files: an earlier catalogue's lease runs out by itself, later than any client can mind."""
        digests = {digest for entry in entries for digest in entry.digests()}
        name = hashlib.sha256("".join(sorted(digest.hex for digest in digests)).encode()).hexdigest()[:16]
        self._blobs.lease(f"catalog-{name}", digests, ttl_s=LEASE_TTL_S)
        self._renewed_s = time.monotonic()

    # -- entries -----------------------------------------------------------------------------------------------------

    def _entry(self, image: Image, labels: CatalogLabels) -> CatalogEntry:
        """The entry as it was built before if it still holds and its files are there, else a new one."""
        path = self._entries_dir / f"{image.id}.json"
        entry = self._load(path)
        if entry is not None and entry.key == entry_key(image, labels) and self._is_whole(entry):
            return entry
        try:
            entry = self._builder.build(image, labels)
        except UnavailableError:
            raise  # something is down, or we are stopping: that says nothing about the image
        except MistifyError as err:
            log.warning("image is not offered: %s", err.message, extra={"image_id": image.id})
            filled = labels.filled(image)
            return CatalogEntry(image_id=image.id, labels=filled, serial="", key="", reason=err.message)
        atomic_write_bytes(path, msgspec.json.encode(entry))
        return entry

    def _digests(self, image: Image) -> set[Digest]:
        """What its entry named when it was built here last."""
        entry = self._load(self._entries_dir / f"{image.id}.json")
        return set() if entry is None else entry.digests()

    @staticmethod
    def _load(path: Path) -> CatalogEntry | None:
        try:
            with os_errors(f"cannot read {path}"):
                return msgspec.json.decode(path.read_bytes(), type=CatalogEntry)
        except (NotFoundError, msgspec.DecodeError):
            return None  # built anew, then

    def _is_whole(self, entry: CatalogEntry) -> bool:
        try:
            for digest in entry.digests():
                self._blobs.info(digest)
        except NotFoundError:
            return False
        return True

    def stop(self) -> None:
        """End what is being built, from another thread."""
        self._builder.stop()


def downloads_document(entries: Sequence[CatalogEntry]) -> Document:
    """Images to download, as Incus and LXD read them."""
    products: dict[str, Any] = {}
    for entry in sorted(entries, key=lambda entry: (entry.serial, entry.image_id)):
        labels = entry.labels
        name = f"{labels.os}:{labels.release}:{labels.arch}:{labels.variant}"
        product = products.setdefault(name, {"versions": {}})
        product |= _product_fields(labels)  # the newest image says what the product is called
        version, number = entry.serial, 0
        while version in product["versions"]:
            number += 1
            version = f"{entry.serial}.{number}"
        product["versions"][version] = {"items": entry.items}
    return Document(CONTENT_ID, IMAGE_DOWNLOADS, products)


def _product_fields(labels: CatalogLabels) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "os": labels.os,
        "release": labels.release,
        "release_title": labels.release_title,
        "arch": labels.arch,
        "variant": labels.variant,
        "aliases": ",".join(labels.aliases),
        "requirements": dict(labels.requirements),
    }
    optional = {"version": labels.version, "support_eol": labels.support_eol}
    return fields | {key: value for key, value in optional.items() if value}


def ids_document(entries: Sequence[CatalogEntry], settings: CatalogSettings) -> Document:
    """Images to deploy by id: those whose release has a version, if the operator named the site."""
    products: dict[str, Any] = {}
    cloud = {"region": settings.region, "endpoint": settings.endpoint}
    usable = [entry for entry in entries if entry.labels.version and settings.region and settings.endpoint]
    for entry in usable:
        labels = entry.labels
        fresh: Mapping[str, Any] = {"version": labels.version, "arch": labels.arch, "versions": {}}
        product = products.setdefault(product_id(labels.version, labels.arch), dict(fresh))
        version = product["versions"].setdefault(entry.serial, {"items": {}})
        version["items"][entry.image_id] = {"id": entry.image_id, "virt": "kvm", **cloud}
    return Document(IMAGE_CONTENT_ID, IMAGE_IDS, products, clouds=[cloud])


class Catalog:
    """The catalogue on the event loop: one build at a time, and clients that do not wait for ever."""

    def __init__(self, builder: CatalogBuilder, pools: Pools) -> None:
        self._builder = builder
        self._offload = pools.data
        self._lock = asyncio.Lock()

    @property
    def directory(self) -> Path:
        """Where the published documents are."""
        return self._builder.directory

    async def refresh(self) -> None:
        """Bring the catalogue up to date, or return after BUILD_WAIT_S while that goes on; UnavailableError if there is none yet."""
        task = asyncio.ensure_future(self._refresh())
        task.add_done_callback(_tell)
        done, _ = await asyncio.wait([task], timeout=BUILD_WAIT_S)
        if done:
            task.result()
        elif not (self.directory / "streams").exists():
            raise UnavailableError("the catalogue is being built; try again later")

    def stop(self) -> None:
        """End what is being built: the service is ending."""
        self._builder.stop()

    async def _refresh(self) -> None:
        async with self._lock:
            await settled(self._offload(self._builder.refresh))

    async def entries(self) -> list[CatalogEntry]:
        """Every image and how it is offered."""
        async with self._lock:
            return await settled(self._offload(self._builder.entries))

    async def put_labels(self, image_id: str, labels: CatalogLabels) -> None:
        """Say how an image appears."""
        await settled(self._offload(self._builder.labels.put, image_id, labels))

    async def find_labels(self, image_id: str) -> CatalogLabels:
        """How an image appears."""
        return await self._offload(self._builder.labels.find, image_id)


def _tell(task: asyncio.Task[None]) -> None:
    """Log why a build failed: whoever waited for it may be gone."""
    err = None if task.cancelled() else task.exception()
    if err is not None:
        log.warning("catalogue was not built: %s", err)
