"""S3BlobStore: blobs as objects of any S3-compatible service, shared by any number of processes.

    blobs/sha256/<hex>.<nonce>   a copy of a blob; its modification time says when it was committed
    ingest/<sha256 of ref>/...   an ingest (:mod:`imaging.blobs.s3_ingest`)
    quarantine/<hex>.<nonce>     a copy whose bytes no longer match its name
    leases/<sha256 of name>      a lease

Why copies have names of their own. S3 can't remove an object only if nothing happened to it meanwhile. If a blob had one name,
a collector that has just found it unneeded could remove what another replica commits in the same moment. So every commit
writes a copy nobody else has a name for, and whoever removes, removes only the copies it saw *before* it looked at the leases. A
commit therefore survives every collection that began before it, whoever runs it. Copies that are not needed go with the next collection.

What it needs of the service: listings that show what was written (all services of today; Swift with its container servers up),
and multipart uploads with copied parts. Conditional writes are not needed.

One ref has one writer in this process; across processes the caller sees to it (a lease of :mod:`imaging.kv.leases`).
"""

from __future__ import annotations

import io
import itertools
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import BinaryIO, cast

from imaging.blobs.aftermath import logged_after
from imaging.blobs.base import BlobInfo, CollectReport, IngestInfo, needs_none
from imaging.blobs.ingest import ref_key
from imaging.blobs.s3_assembly import Source, assemble, copy_object
from imaging.blobs.s3_bucket import S3Bucket, S3Settings, StoredObject
from imaging.blobs.s3_ingest import (
    INGESTS,
    PartLimits,
    S3BlobWriter,
    ingest_prefix,
    load_state,
    remove_ingest,
)
from imaging.blobs.s3_leases import S3Leases
from imaging.blobs.s3_reading import BUFFER_BYTES, S3Reader, VerifyingS3Reader
from imaging.blobs.s3_sweep import QUARANTINE, UPLOAD_KEEP_S, Sweep
from imaging.blobs.sweep import QUARANTINE_KEEP_S
from imaging.digests import Digest
from imaging.errors import (
    BusyError,
    ConflictError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)

BLOBS = "blobs/sha256/"

LEASES_AGE_S = 1.0
"""A collection reads the leases anew when what it knows of other processes' leases is older."""

_HEX = re.compile(r"[0-9a-f]{64}\Z")
_KEY = re.compile(re.escape(BLOBS) + r"([0-9a-f]{64})\.[0-9a-f]+\Z")
_log = logging.getLogger(__name__)


def digest_of(stored: StoredObject) -> Digest | None:
    """The blob an object is a copy of; None for a stranger's object."""
    match = _KEY.match(stored.key)
    return Digest("sha256", match[1]) if match else None


def newest(copies: Iterable[StoredObject]) -> StoredObject:
    """The copy that counts: the one committed last."""
    return max(copies, key=lambda stored: (stored.modified_s, stored.key))


def grouped(objects: Iterable[StoredObject]) -> Iterator[tuple[Digest, list[StoredObject]]]:
    """Blobs with all their copies, from a listing in key order."""
    for digest, copies in itertools.groupby(objects, digest_of):
        if digest is not None:
            yield digest, list(copies)


class S3BlobStore:
    """BlobStore in a bucket; see the module's docstring and the contract's."""

    def __init__(self, settings: S3Settings, *, parts: PartLimits | None = None, redirect_s: int = 0) -> None:
        self._redirect_s = redirect_s
        self._limits = parts or PartLimits()
        self._limits.check()
        self._bucket = S3Bucket(settings)
        self._leases = S3Leases(self._bucket)
        self._lock = threading.RLock()
        self._writers: dict[str, S3BlobWriter | None] = {}
        self._lease_changes = 0
        self._closed = False

    def _check_open(self) -> None:
        if self._closed:
            raise UnavailableError("the blob store is closed")

    @staticmethod
    def _prefix(digest: Digest) -> str:
        if digest.algorithm != "sha256" or not _HEX.match(digest.hex):
            raise InvalidArgumentError(f"a blob is named by its sha256 digest, not by {str(digest)[:160]!r}")
        return f"{BLOBS}{digest.hex}."

    # -- writing ---------------------------------------------------------------------------------------------------------

    def ingest(self, ref: str, *, lease: str | None = None, max_bytes: int | None = None) -> S3BlobWriter:
        """See BlobStore."""
        ref_key(ref)
        with self._lock:
            self._check_open()
            if lease is not None:
                self._leases.require(lease)
            if ref in self._writers:
                raise BusyError(f"the ingest has a writer: {ref[:80]!r}", [ref])
            self._writers[ref] = None  # ours from here on, though reading a long prefix may take a while
        try:
            writer = S3BlobWriter(self, self._bucket, ref, lease=lease, limits=self._limits, max_bytes=max_bytes)
        except BaseException:
            self.let_go(ref)
            raise
        with self._lock:
            self._writers[ref] = writer
        if self._closed:  # closed while the prefix was read
            writer.close()
            self._check_open()
        return writer

    def publish(self, writer: S3BlobWriter) -> BlobInfo:
        """Make a complete ingest a blob (called by its writer). Once the copy is there nothing fails the call."""
        digest = writer.digest()
        key = self._prefix(digest) + secrets.token_hex(8)
        with self._lock:
            self._check_open()
            self._lease_changes += 1
            self._leases.add(writer.state.lease, digest)  # before the copy: see the module's docstring
        if writer.parts:
            sources = [Source(writer.prefix + part.name, part.etag) for part in writer.all_parts()]
            self._assemble(writer.ref, key, sources)
        else:
            self._bucket.put(key, writer.buffer)
        stored = self._bucket.head(key)
        if stored.size_bytes != writer.offset_bytes:
            self._bucket.delete(key)
            raise UnavailableError(f"the object store has {stored.size_bytes} bytes of blob {digest}")
        with logged_after("cannot finish publishing", digest):
            remove_ingest(self._bucket, writer.prefix)
        return BlobInfo(digest, stored.size_bytes, stored.modified_s)

    def _assemble(self, ref: str, key: str, sources: Sequence[Source]) -> None:
        """Parts that are gone were removed by another process that took the ingest for its own: what is left can be resumed."""
        try:
            assemble(self._bucket, key, sources)
        except (NotFoundError, ConflictError) as err:
            raise UnavailableError(f"parts of the ingest are gone: {ref[:80]!r}") from err

    def let_go(self, ref: str) -> None:
        """The writer of this ingest is done (called by the writer)."""
        with self._lock:
            self._writers.pop(ref, None)

    def ingests(self) -> Sequence[IngestInfo]:
        """See BlobStore."""
        self._check_open()
        infos = []
        for prefix in self._ingest_prefixes():
            state = load_state(self._bucket, prefix)
            if state is not None:
                infos.append(IngestInfo(state.ref, state.offset_bytes, state.updated_s))
        return sorted(infos, key=lambda info: info.ref)

    def find_ingest(self, ref: str) -> IngestInfo | None:
        """See BlobStore."""
        self._check_open()
        state = load_state(self._bucket, ingest_prefix(ref))
        return None if state is None else IngestInfo(state.ref, state.offset_bytes, state.updated_s)

    def _ingest_prefixes(self) -> Sequence[str]:
        """Of everything that looks like an ingest, with a state or without."""
        keys = (stored.key.split("/") for stored in self._bucket.list(INGESTS))
        return sorted({f"{INGESTS}{parts[1]}/" for parts in keys if len(parts) == 3 and _HEX.match(parts[1])})

    def abort(self, ref: str) -> None:
        """See BlobStore."""
        prefix = ingest_prefix(ref)
        with self._lock:
            self._check_open()
            if ref in self._writers:
                raise BusyError(f"the ingest has a writer: {ref[:80]!r}", [ref])
            remove_ingest(self._bucket, prefix)

    # -- reading ---------------------------------------------------------------------------------------------------------

    def _copies(self, digest: Digest) -> list[StoredObject]:
        """All copies of a blob; NotFoundError if there is none."""
        self._check_open()
        copies = list(self._bucket.list(self._prefix(digest)))
        if not copies:
            raise NotFoundError(f"no such blob: {digest}")
        return copies

    def info(self, digest: Digest) -> BlobInfo:
        """See BlobStore."""
        stored = newest(self._copies(digest))
        return BlobInfo(digest, stored.size_bytes, stored.modified_s)

    @contextmanager
    def open(self, digest: Digest, *, offset_bytes: int = 0, verify: bool = False) -> Iterator[BinaryIO]:
        """See BlobStore. A read that breaks goes on where it was, from another copy if this one is gone."""
        copy = newest(self._copies(digest))
        if not 0 <= offset_bytes <= copy.size_bytes or (verify and offset_bytes):
            raise InvalidArgumentError(f"cannot read blob {digest} from {offset_bytes} of {copy.size_bytes} bytes")
        source = self._reader(digest, copy, offset_bytes, verify=verify)
        raw: io.RawIOBase = source
        if verify:
            raw = VerifyingS3Reader(source, digest, copy.size_bytes, lambda: self._set_aside(digest, copy))
        with io.BufferedReader(raw, BUFFER_BYTES) as reader:
            yield cast("BinaryIO", reader)

    def _reader(self, digest: Digest, copy: StoredObject, offset_bytes: int, *, verify: bool) -> S3Reader:
        """A reader that begins to read. What is verified comes from one copy: then a wrong digest tells which is damaged."""
        if verify:
            return S3Reader(self._bucket, lambda: copy, copy, offset_bytes=offset_bytes)
        return S3Reader(self._bucket, lambda: newest(self._copies(digest)), copy, offset_bytes=offset_bytes)

    def path(self, digest: Digest) -> str | None:
        """See BlobStore: an object is no local file."""
        self.info(digest)
        return None

    def presigned_url(self, digest: Digest, *, expires_s: int) -> str:
        """An address of the service from which a client may read the blob itself; NotFoundError."""
        return self._bucket.presigned_url(newest(self._copies(digest)).key, expires_s=expires_s)

    def redirect_url(self, digest: Digest) -> str | None:
        """See BlobStore."""
        return self.presigned_url(digest, expires_s=self._redirect_s) if self._redirect_s else None

    def list(self) -> Iterator[BlobInfo]:
        """See BlobStore."""
        self._check_open()
        for digest, copies in grouped(self._bucket.list(BLOBS)):
            stored = newest(copies)
            yield BlobInfo(digest, stored.size_bytes, stored.modified_s)

    def verify(self, digest: Digest) -> None:
        """See BlobStore."""
        with self.open(digest, verify=True) as reader:
            while reader.read(BUFFER_BYTES):
                pass

    def _set_aside(self, digest: Digest, copy: StoredObject) -> None:
        """Move a damaged copy out of the readers' way."""
        with logged_after("cannot quarantine", digest):
            copy_object(self._bucket, copy, f"{QUARANTINE}{copy.key.removeprefix(BLOBS)}")
            self._bucket.delete(copy.key)
            _log.error("blob quarantined", extra={"component": "blobs", "digest": str(digest)})

    # -- leases ----------------------------------------------------------------------------------------------------------

    def lease(self, name: str, digests: Collection[Digest] = (), *, ttl_s: float) -> None:
        """See BlobStore. A blob that no record needs may go to another process's collection until this returns."""
        with self._lock:
            self._check_open()
            self._lease_changes += 1
            self._leases.extend(name, digests, ttl_s=ttl_s)

    def leases(self) -> Sequence[str]:
        """See BlobStore."""
        self._check_open()
        return [record.name for record in self._leases.live()]

    def leased(self, name: str) -> Sequence[Digest]:
        """See BlobStore."""
        self._check_open()
        record = self._leases.find(name)
        return [Digest.parse(text) for text in sorted(record.digests)] if record is not None else []

    def release(self, name: str) -> None:
        """See BlobStore."""
        with self._lock:
            self._check_open()
            self._leases.release(name)

    def _holders(self, digest: Digest) -> Sequence[str]:
        return [record.name for record in self._leases.live() if str(digest) in record.digests]

    # -- removing --------------------------------------------------------------------------------------------------------

    def delete(self, digest: Digest, *, needed: Callable[[Digest], bool] = needs_none) -> None:
        """See BlobStore."""
        with self._lock:
            copies = self._copies(digest)  # before the leases: see the module's docstring
            holders = self._holders(digest)
            if holders:
                raise BusyError(f"the blob is leased: {digest}", holders)
            if needed(digest):
                raise BusyError(f"the blob is needed: {digest}")
            for copy in copies:
                self._bucket.delete(copy.key)

    def collect(
        self,
        keep: Collection[Digest],
        *,
        grace_s: float,
        dry_run: bool = False,
        limit: int | None = None,
        needed: Callable[[Digest], bool] = needs_none,
    ) -> CollectReport:
        """See BlobStore. Ages are told by the service's clock."""
        self._check_open()
        self._bucket.sync_clock()
        now = self._bucket.now_s()
        sweep = Sweep(frozenset(keep), now - grace_s, dry_run, limit, needed)
        if not dry_run:
            with self._lock:
                self._leases.prune()
        for prefix in self._ingest_prefixes():
            if sweep.complete:
                self._sweep_ingest(prefix, sweep)
        self._sweep_blobs(sweep)
        if not dry_run:
            self._sweep_leftovers(now, grace_s)
        return sweep.report()

    def _sweep_ingest(self, prefix: str, sweep: Sweep) -> None:
        with self._lock:
            state = load_state(self._bucket, prefix)
            objects = list(self._bucket.list(prefix))
            if not objects:
                return
            if (
                state is not None
                and (state.ref in self._writers or (state.lease is not None and self._leases.find(state.lease)))
            ) or not all(sweep.is_old(stored) for stored in objects):
                sweep.kept += 1
            elif sweep.may_remove():
                sweep.freed_bytes += state.offset_bytes if state else sum(stored.size_bytes for stored in objects)
                sweep.refs += [state.ref] if state else []
                if not sweep.dry_run:
                    remove_ingest(self._bucket, prefix)

    def _sweep_blobs(self, sweep: Sweep) -> None:
        listed = list(grouped(self._bucket.list(BLOBS)))  # all of it before the leases: see the module's docstring
        leased = _LeasedDigests(self._leases, lambda: self._lease_changes)
        for digest, copies in listed:
            if not sweep.complete:
                return
            with self._lock:
                needed = digest in sweep.keep or not sweep.is_old(newest(copies)) or leased.has(digest)
                needed = needed or sweep.needed(digest)
                self._sweep_blob(digest, copies, sweep, needed=needed)

    def _sweep_blob(self, digest: Digest, copies: Sequence[StoredObject], sweep: Sweep, *, needed: bool) -> None:
        gone = list(copies)
        if needed:
            sweep.kept += 1
            gone = [copy for copy in copies if copy is not newest(copies) and sweep.is_old(copy)]
        if not gone or not sweep.may_remove():
            return
        if not needed:
            sweep.blobs.append(digest)
        for copy in gone:
            sweep.freed_bytes += copy.size_bytes
            if not sweep.dry_run:
                self._bucket.delete(copy.key)

    def _sweep_leftovers(self, now_s: float, grace_s: float) -> None:
        """Old quarantine, and uploads whose commit died."""
        for stored in list(self._bucket.list(QUARANTINE)):
            if stored.modified_s < now_s - QUARANTINE_KEEP_S:
                self._bucket.delete(stored.key)
        for key, upload, begun_s in list(self._bucket.uploads("")):
            if begun_s < now_s - max(grace_s, UPLOAD_KEEP_S):
                with suppress(NotFoundError):
                    self._bucket.abort_upload(key, upload)

    def close(self) -> None:
        """Release the store; writers still open are closed and their ingests kept."""
        with self._lock:
            writers = [writer for writer in self._writers.values() if writer is not None]
        for writer in writers:
            writer.close()
        with self._lock:
            if not self._closed:
                self._closed = True
                self._bucket.close()

    def __enter__(self) -> S3BlobStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _LeasedDigests:
    """What the leases hold: exact for leases of this process, not older than LEASES_AGE_S for those of others."""

    def __init__(self, leases: S3Leases, changes: Callable[[], int]) -> None:
        self._leases = leases
        self._changes = changes
        self._seen = -1
        self._read_s = 0.0
        self._held: set[str] = set()

    def has(self, digest: Digest) -> bool:
        """Whether any live lease holds the digest."""
        now_s = time.monotonic()
        if self._seen != self._changes() or now_s - self._read_s > LEASES_AGE_S:
            self._seen, self._read_s = self._changes(), now_s
            self._held = {text for record in self._leases.live() for text in record.digests}
        return str(digest) in self._held
