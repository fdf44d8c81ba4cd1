"""An ingest in a bucket: full parts as objects of their own, a state object that names them, and the writer.

    ingest/<sha256 of ref>/state            ref, lease, the parts in order
    ingest/<sha256 of ref>/<number>.<nonce> a part

Why objects and not the parts of one multipart upload: parts of an upload can't be read back before it is complete, so whoever
resumed after a break could not compute the digest of what was there (hashlib can't store its state). Part objects can be read, in
any replica. At commit the service itself puts them together by a multipart upload of copies, each bound to the ETag that was
hashed. No byte travels twice, except after a break.

Zombies. A writer that was paused and whose ref another replica took over writes parts under names of its own nonce: they are in
nobody's state and vanish with the ingest. At worst it replaces the state with its own, also consistent, one.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from imaging.blobs.base import BlobInfo
from imaging.blobs.ingest import ref_key
from imaging.blobs.s3_bucket import S3Bucket
from imaging.digests import Digest
from imaging.errors import BadDataError, ConflictError, InvalidArgumentError, NotFoundError, TooLargeError

INGESTS = "ingest/"

PART_SIZE_BYTES = 16 << 20
"""Held in memory by each writer. With 10,000 parts an image may have 156 GiB."""

PART_SIZE_MIN_BYTES = 5 << 20
"""The least S3 takes for any part but the last."""

PARTS_MAX = 10_000
"""S3's limit on one upload. Swift's default is 1,000."""


class Part(msgspec.Struct, frozen=True):
    """One part as stored."""

    name: str
    size_bytes: int
    etag: str


class S3IngestState(msgspec.Struct, kw_only=True):
    """One ingest's state as stored."""

    ref: str
    lease: str | None = None
    updated_s: float = 0.0
    parts: list[Part] = msgspec.field(default_factory=list)

    @property
    def offset_bytes(self) -> int:
        """How much is durable."""
        return sum(part.size_bytes for part in self.parts)


def ingest_prefix(ref: str) -> str:
    """Where everything of an ingest is."""
    return f"{INGESTS}{ref_key(ref)}/"


def load_state(bucket: S3Bucket, prefix: str) -> S3IngestState | None:
    """The stored state; None if there is none that can be read."""
    try:
        return msgspec.json.decode(bucket.read(f"{prefix}state"), type=S3IngestState)
    except (NotFoundError, msgspec.MsgspecError):
        return None


def remove_ingest(bucket: S3Bucket, prefix: str) -> None:
    """Forget an ingest, its state last: what a crash leaves is still listed as an ingest."""
    for stored in list(bucket.list(prefix)):
        if stored.key != f"{prefix}state":
            bucket.delete(stored.key)
    bucket.delete(f"{prefix}state")


class Publisher(Protocol):
    """What a writer needs of its store."""

    def publish(self, writer: S3BlobWriter) -> BlobInfo:
        """Make a complete ingest a blob."""

    def let_go(self, ref: str) -> None:
        """The ingest has no writer any more."""


@dataclass(frozen=True, slots=True)
class PartLimits:
    """Sizes of parts."""

    size_bytes: int = PART_SIZE_BYTES
    count_max: int = PARTS_MAX

    def check(self) -> None:
        """InvalidArgumentError unless S3 can take such parts."""
        if self.size_bytes < PART_SIZE_MIN_BYTES or not 1 <= self.count_max <= PARTS_MAX:
            raise InvalidArgumentError(
                f"parts have at least {PART_SIZE_MIN_BYTES} bytes and there are at most {PARTS_MAX} of them"
            )


class S3BlobWriter:
    """See BlobWriter. Calls from several threads are taken one after another."""

    def __init__(
        self,
        store: Publisher,
        bucket: S3Bucket,
        ref: str,
        *,
        lease: str | None,
        limits: PartLimits,
        max_bytes: int | None,
    ) -> None:
        self._store = store
        self._bucket = bucket
        self._limits = limits
        self._max_bytes = max_bytes
        self._lock = threading.RLock()
        self._open = True
        self.prefix = ingest_prefix(ref)
        self.state = load_state(bucket, self.prefix) or S3IngestState(ref=ref)
        self.state.lease = lease if lease is not None else self.state.lease
        self._nonce = secrets.token_hex(4)
        self._hasher = hashlib.sha256()
        self.parts: list[Part] = []
        self._tail: Part | None = None
        self.buffer = bytearray()
        self._resume()
        self._save()

    # -- resuming --------------------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        """Read back what the state names, up to the first part that is not what it was."""
        for part in self.state.parts:
            try:
                data = self._bucket.read(self.prefix + part.name, etag=part.etag)
            except (NotFoundError, ConflictError):
                return
            if len(data) < PART_SIZE_MIN_BYTES:  # a tail: it becomes part of a full part
                self._tail, self.buffer = part, bytearray(data)
                return
            self._hasher.update(data)
            self.parts.append(part)

    def _save(self) -> None:
        """Store the state that vouches for the parts."""
        self.state.parts = [*self.parts, *([self._tail] if self._tail else [])]
        self.state.updated_s = self._bucket.now_s()
        self._bucket.put(f"{self.prefix}state", msgspec.json.encode(self.state))

    # -- writing ---------------------------------------------------------------------------------------------------------

    @property
    def offset_bytes(self) -> int:
        """See BlobWriter."""
        return sum(part.size_bytes for part in self.parts) + len(self.buffer)

    @property
    def ref(self) -> str:
        """The ingest's name."""
        return self.state.ref

    def digest(self) -> Digest:
        """See BlobWriter."""
        hasher = self._hasher.copy()
        hasher.update(self.buffer)
        return Digest("sha256", hasher.hexdigest())

    def _check_open(self) -> None:
        if not self._open:
            raise InvalidArgumentError(f"the ingest was committed, aborted or closed: {self.ref[:80]!r}")

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """See BlobWriter. An error leaves everything as it was before the call."""
        view = memoryview(data).cast("B")
        with self._lock:
            self._check_open()
            self._check_size(self.offset_bytes + len(view))
            before = (self._hasher, len(self.parts), self.buffer, len(self.buffer))
            try:
                self._append(view)
            except BaseException:
                self._hasher, count, self.buffer, length = before
                del self.parts[count:]
                del self.buffer[length:]
                raise

    def _check_size(self, size_bytes: int) -> None:
        most = self._limits.size_bytes * self._limits.count_max
        if size_bytes > min(most, self._max_bytes if self._max_bytes is not None else most):
            raise TooLargeError(f"the ingest {self.ref[:80]!r} would be larger than {self._max_bytes or most} bytes")

    def _append(self, view: memoryview) -> None:
        while view:
            room = self._limits.size_bytes - len(self.buffer)
            self.buffer += view[:room]
            view = view[room:]
            if len(self.buffer) >= self._limits.size_bytes:
                self._flush_part()

    def _put_part(self) -> Part:
        name = f"{len(self.parts):05d}.{self._nonce}{secrets.token_hex(2)}"
        etag = self._bucket.put(self.prefix + name, self.buffer)
        return Part(name, len(self.buffer), etag)

    def _flush_part(self) -> None:
        """The buffer becomes a part: bytes first, then the state. The old buffer is left as it is for ``write`` to return to."""
        part = self._put_part()
        hasher = self._hasher.copy()
        hasher.update(self.buffer)
        old_tail, self._tail = self._tail, None
        self.parts.append(part)
        self._hasher, self.buffer = hasher, bytearray()
        self._save()
        if old_tail is not None:
            self._bucket.delete(self.prefix + old_tail.name)

    def _flush_tail(self) -> None:
        """Make the rest durable as a short part, to be replaced when there is more."""
        old = self._tail
        if old is not None and old.size_bytes == len(self.buffer):
            return
        self._tail = self._put_part() if self.buffer else None
        self._save()
        if old is not None:
            self._bucket.delete(self.prefix + old.name)

    def checkpoint(self) -> int:
        """See BlobWriter."""
        with self._lock:
            self._check_open()
            self._flush_tail()
            return self.offset_bytes

    def restart(self) -> None:
        """See BlobWriter."""
        with self._lock:
            self._check_open()
            gone = list(self.state.parts)
            self._hasher, self.parts, self._tail, self.buffer = hashlib.sha256(), [], None, bytearray()
            self._save()
            for part in gone:
                self._bucket.delete(self.prefix + part.name)

    # -- the end ---------------------------------------------------------------------------------------------------------

    def all_parts(self) -> Sequence[Part]:
        """Everything written as stored parts; what is in memory is stored first (called by the store's publish)."""
        self._flush_tail()
        return self.state.parts

    def commit(self, *, digest: Digest | None = None, size_bytes: int | None = None) -> BlobInfo:
        """See BlobWriter. An error other than BadDataError leaves the ingest open, to be tried again or resumed."""
        with self._lock:
            self._check_open()
            self._check_size(self.offset_bytes)
            self._refuse_unexpected(digest, size_bytes)
            info = self._store.publish(self)
            self._end()
            return info

    def _refuse_unexpected(self, digest: Digest | None, size_bytes: int | None) -> None:
        computed = self.digest()
        problem = None
        if size_bytes is not None and size_bytes != self.offset_bytes:
            problem = f"has {self.offset_bytes} bytes, not {size_bytes}"
        elif digest is not None and not computed.matches(digest):
            problem = f"has digest {computed}, not {digest}"
        if problem is not None:
            self._drop()
            raise BadDataError(f"the ingest {self.ref[:80]!r} {problem}")

    def _drop(self) -> None:
        remove_ingest(self._bucket, self.prefix)
        self._end()

    def _end(self) -> None:
        self._open = False
        self.buffer = bytearray()
        self._store.let_go(self.ref)

    def abort(self) -> None:
        """See BlobWriter; a second abort, or one after close, does nothing. What can't be removed now is collected later."""
        with self._lock:
            if not self._open:
                return
            try:
                remove_ingest(self._bucket, self.prefix)
            finally:
                self._end()

    def abandon(self) -> None:
        """See BlobWriter."""
        with self._lock:
            if self._open:
                self._end()

    def close(self) -> None:
        """See BlobWriter: what was written is made durable for a later resume."""
        with self._lock:
            if not self._open:
                return
            try:
                self._flush_tail()
            finally:
                self._end()

    def __enter__(self) -> S3BlobWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
