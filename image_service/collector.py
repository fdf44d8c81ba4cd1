"""Garbage: blobs no record names, and ingests nobody goes on with.

Online and safe against writers, in this process and in others: whoever writes holds a lease of the blob store from the first byte until its
record is stored, and the store asks for names after it has looked at the leases. A blob is removed at once when the last record that
names it is deleted; what a crash left is found by :meth:`Collector.collect`, at start and from time to time.

What the dead leave. An ingest belongs to whoever its ref says: a fetch to the holder of the turn of that name, an upload to a process's
session, an upload in parts to its record. It is left behind when there is no such holder and nobody will go on with it. Ingests
are listed before holders are: whoever begins one has its lease first.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Protocol

from image_service.lifecycle import UNFINISHED, Image
from image_service.metadata import MetadataStore
from image_service.replica import Replica
from imaging.blobs.base import BlobStore, CollectReport
from imaging.digests import Digest
from imaging.errors import BusyError, LeaseLostError, MistifyError, NotFoundError, UnavailableError
from imaging.kv.leases import Fence

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

COLLECT_TURN = "collect"
"""One process collects at a time."""

UNSURE_S = 600.0
"""How long a blob waits for a record that may yet come: etcd gives up a change within seconds."""

SESSION_MARK = "@"
"""In a ref: what follows is the session it lives and dies with."""

log = logging.getLogger(__name__)


@contextlib.contextmanager
def logged(what: str) -> Iterator[None]:
    """For steps after which the call has succeeded or failed already."""
    try:
        yield
    except MistifyError as err:
        log.warning("%s: %s", what, err.message)


def fetch_ref(image_id: str) -> str:
    """The ingest (and lease) of an image that is fetched: the same after a restart, so that the fetch goes on."""
    return FETCH_PREFIX + image_id


def upload_ref(image_id: str, session: str) -> str:
    """The ingest (and lease) of an upload: it ends with its connection, at the latest with the process's session."""
    return f"{UPLOAD_PREFIX}{image_id}{SESSION_MARK}{session}"


class BlobCache(Protocol):
    """Keeps blobs no record names, and gives them up by rules of its own."""

    @property
    def ref_prefix(self) -> str:
        """Its ingests, and the turns at making them, start with this."""

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
        self._caches: list[BlobCache] = []
        self._refs: list[Callable[[str], bool]] = [self._is_owed]

    @property
    def replica(self) -> Replica:
        """This process among those that share the stores."""
        return self._records.replica

    def add_cache(self, cache: BlobCache) -> None:
        """From now on keep what ``cache`` keeps."""
        self._caches.append(cache)

    def add_refs(self, wanted: Callable[[str], bool]) -> None:
        """From now on keep the ingests somebody may go on with, says ``wanted``."""
        self._refs.append(wanted)

    def _is_owed(self, ref: str) -> bool:
        """Whether it is the ingest of an unfinished fetch."""
        if not ref.startswith(FETCH_PREFIX):
            return False
        image = self._records.find_by_id(ref.removeprefix(FETCH_PREFIX))
        return image is not None and image.status in UNFINISHED

    def publish(self, lease: str, digest: Digest, record: Callable[[], None]) -> None:
        """Let a record name a blob that was just committed under a lease, and end the lease.

        If ``record`` fails the blob goes, unless somebody else needs it. If the turn was over, the lease may be another's by now. If nobody
        can tell whether it failed, the record may be there any moment: then the blob stays for a while.
        """
        try:
            record()
        except LeaseLostError:
            raise
        except UnavailableError:
            with logged("a blob whose record may come is not protected"):
                self._blobs.lease(f"unsure-{digest.hex}", [digest], ttl_s=UNSURE_S)
            raise
        except MistifyError:
            self.discard(lease, digest)
            raise
        with logged("a lease ends by itself"):
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
        if self.is_named(digest):
            return False
        try:
            self._blobs.delete(digest, needed=self.is_named)
        except NotFoundError:
            return True
        except BusyError:
            log.info("blob is leased and left to the collector", extra={"digest": str(digest)})
            return not self.is_named(digest)
        return True

    def is_named(self, digest: Digest) -> bool:
        """Whether a record or a cache names a blob: others are on their way in or out, and nobody's business."""
        return self._records.needs(digest) or any(cache.needs(digest) for cache in self._caches)

    def is_shown(self, digest: Digest) -> bool:
        """As :meth:`is_named`, for those who only read: good enough in an outage."""
        return self._records.shown.needs(digest) or self.is_named(digest)

    def clear(self, ref: str, digest: Digest | None = None) -> None:
        """As :meth:`forget` and :meth:`drop`, after something that stands whatever becomes of the bytes: a collection does what fails."""
        with logged("bytes are left to the collector"):
            self.forget(ref)
            if digest is not None:
                self.drop(digest)

    def forget(self, ref: str) -> None:
        """Remove an ingest and its lease; absent is fine."""
        self._blobs.abort(ref)
        self._blobs.release(ref)

    def recover(self) -> None:
        """At start: remove what the dead left behind; what others are at is theirs."""
        turn = self._records.replica.find_turn(COLLECT_TURN)
        if turn is None:
            return
        with turn:
            self._collect(turn, grace_s=0 if self._records.replica.is_alone() else self._grace_s)

    def collect(self, *, dry_run: bool = False, limit: int | None = None) -> CollectReport:
        """One round of garbage collection; what was (or would be) removed. BusyError while another process is at it."""
        if dry_run:
            return self._report(self._blobs.collect(self._kept(), grace_s=self._grace_s, dry_run=True, limit=limit))
        with self._records.replica.acquire(COLLECT_TURN) as turn:
            return self._collect(turn, grace_s=self._grace_s, limit=limit)

    def _collect(self, turn: Fence, *, grace_s: float, limit: int | None = None) -> CollectReport:
        """Whoever loses the turn on the way does no harm: nothing that is leased or named goes, whoever removes."""
        self._forget_dead()
        for cache in self._caches:
            turn.check()
            cache.sweep(self._records.needs)
        turn.check()
        return self._report(self._blobs.collect(self._kept(), grace_s=grace_s, limit=limit, needed=self.is_named))

    def is_left(self, ref: str) -> bool:
        """Whether whoever wrote this ingest is gone."""
        return self._is_left(ref, self._records.replica.held())

    def _forget_dead(self) -> None:
        """Remove the ingests and leases whose owners are gone."""
        refs = [ingest.ref for ingest in self._blobs.ingests()]
        refs += [lease for lease in self._blobs.leases() if lease not in refs]
        held = self._records.replica.held()
        for ref in refs:
            if self._is_left(ref, held):
                log.info("ingest left behind is removed", extra={"ref": ref})
                with contextlib.suppress(
                    BusyError
                ):  # a writer of this process whose turn is over; it lets go by itself
                    self.forget(ref)

    def _is_left(self, ref: str, held: Collection[str]) -> bool:
        """Whether nobody is at an ingest and nobody will be. One of a kind we do not know is left to its age."""
        prefixes = (FETCH_PREFIX, UPLOAD_PREFIX, TUS_PREFIX, *(cache.ref_prefix for cache in self._caches))
        if not ref.startswith(prefixes) or ref in held or ref.partition(SESSION_MARK)[2] in held:
            return False
        return not any(wanted(ref) for wanted in self._refs)

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
