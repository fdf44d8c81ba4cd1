"""Garbage: blobs no record names, and ingests nobody goes on with.

Online and safe against writers: whoever writes holds a lease from the first byte until its record is stored, and the store honours leases
and a grace. A blob is removed at once when the last record that names it is deleted; what a crash left is found by
:meth:`Collector.collect`, at start and from time to time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable
from typing import Protocol

from image_service.lifecycle import UNFINISHED, Image
from image_service.metadata import MetadataStore
from imaging.blobs.base import BlobStore, CollectReport
from imaging.digests import Digest
from imaging.errors import BusyError, MistifyError, NotFoundError

GRACE_S = 3600.0
"""Nothing younger is collected: an hour covers every step between a commit and its record, on any machine."""

GRACE_MIN_S = 60.0
"""From a commit to its record takes milliseconds. Less than a minute would bet on no machine ever pausing between the two."""

INTERVAL_S = 3600.0
"""How often to look; a look reads every record and lists every blob."""

FETCH_PREFIX = "fetch-"
UPLOAD_PREFIX = "upload-"
TUS_PREFIX = "tus-"
"""The ingest (and lease) of an upload in parts: the same after a restart."""

log = logging.getLogger(__name__)


def fetch_ref(image_id: str) -> str:
    """The ingest (and lease) of an image that is fetched: the same after a restart, so that the fetch goes on."""
    return FETCH_PREFIX + image_id


def upload_ref(image_id: str) -> str:
    """The ingest (and lease) of an upload: it ends with its connection."""
    return UPLOAD_PREFIX + image_id


class BlobCache(Protocol):
    """Keeps blobs no record names, and gives them up by rules of its own."""

    def recover(self) -> None:
        """At start: end what the dead were making."""

    def sweep(self, wanted: Callable[[Digest], bool]) -> None:
        """Give up what it no longer wants to keep; ``wanted`` says whether a record names a blob."""

    def source_gone(self, digest: Digest) -> None:
        """No record names this blob any more: what was made from it is not wanted either."""

    def digests(self) -> Collection[Digest]:
        """What it keeps."""

    def needs(self, digest: Digest) -> bool:
        """Whether it keeps a blob."""


class Collector:
    """Removes what nothing needs. Blocking; threads may share it."""

    def __init__(self, records: MetadataStore, blobs: BlobStore, *, grace_s: float = GRACE_S) -> None:
        self._records = records
        self._blobs = blobs
        self._grace_s = max(grace_s, GRACE_MIN_S)
        self._naming = threading.Lock()
        self._caches: list[BlobCache] = []
        self._refs: list[Callable[[], Collection[str]]] = []

    def add_cache(self, cache: BlobCache) -> None:
        """From now on keep what ``cache`` keeps."""
        self._caches.append(cache)

    def add_refs(self, refs: Callable[[], Collection[str]]) -> None:
        """From now on keep the ingests ``refs`` names over a restart."""
        self._refs.append(refs)

    def publish(self, lease: str, digest: Digest, record: Callable[[], None]) -> None:
        """Let a record name a blob that was just committed under a lease, and end the lease.

        If ``record`` fails the blob goes, unless somebody else needs it. The lock keeps :meth:`drop` from looking before the
        record is there and removing after the lease has ended.
        """
        try:
            with self._naming:
                record()
        except MistifyError:
            self.discard(lease, digest)
            raise
        self._blobs.release(lease)

    def discard(self, lease: str, digest: Digest) -> None:
        """A blob was committed under a lease, and no record shall name it."""
        self._blobs.release(lease)
        self.drop(digest)

    def drop(self, digest: Digest) -> None:
        """Remove a blob now unless a record or a writer needs it; absent is fine. What caches made of it goes too."""
        if not self._remove(digest):
            return
        for cache in self._caches:
            cache.source_gone(digest)

    def _remove(self, digest: Digest) -> bool:
        """Whether nothing names the blob: then it is removed, or left to the collector while it is leased."""
        with self._naming:
            if self.is_named(digest):
                return False
            try:
                self._blobs.delete(digest)
            except NotFoundError:
                return True
            except BusyError:
                log.info("blob is leased and left to the collector", extra={"digest": str(digest)})
            return True

    def is_named(self, digest: Digest) -> bool:
        """Whether a record or a cache names a blob: others are on their way in or out, and nobody's business."""
        return self._records.needs(digest) or any(cache.needs(digest) for cache in self._caches)

    def forget(self, ref: str) -> None:
        """Remove an ingest and its lease; absent is fine."""
        self._blobs.abort(ref)
        self._blobs.release(ref)

    def recover(self) -> None:
        """At start, when nobody writes here: end the leases of the dead and remove what only they needed."""
        wanted = {fetch_ref(image.id) for image in self._records.iterate() if image.status in UNFINISHED}
        wanted.update(*(refs() for refs in self._refs))
        for lease in self._blobs.leases():
            if lease.startswith((FETCH_PREFIX, UPLOAD_PREFIX, TUS_PREFIX)) and lease not in wanted:
                self._blobs.release(lease)
        for ingest in self._blobs.ingests():
            if ingest.ref not in wanted:
                log.info("ingest left behind is removed", extra={"ref": ingest.ref, "size_bytes": ingest.offset_bytes})
                self.forget(ingest.ref)
        for cache in self._caches:
            cache.recover()
            cache.sweep(self._records.needs)
        self._report(self._blobs.collect(self._kept(), grace_s=0))

    def collect(self, *, dry_run: bool = False, limit: int | None = None) -> CollectReport:
        """One round of garbage collection; what was (or would be) removed."""
        for cache in self._caches if not dry_run else ():
            cache.sweep(self._records.needs)
        return self._report(self._blobs.collect(self._kept(), grace_s=self._grace_s, dry_run=dry_run, limit=limit))

    def _kept(self) -> set[Digest]:
        """Every blob a record or a cache names."""
        return _named(self._records.iterate()).union(*(cache.digests() for cache in self._caches))

    @staticmethod
    def _report(report: CollectReport) -> CollectReport:
        removed = {"blobs": len(report.blobs), "ingests": len(report.refs), "freed_bytes": report.freed_bytes}
        log.info("garbage collected", extra=removed)
        return report


def _named(images: Iterable[Image]) -> set[Digest]:
    return {image.blob for image in images if image.digest}
