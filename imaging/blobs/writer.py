"""LocalBlobWriter: one ingest as its writer sees it: buffering, admission, limits, commit."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Protocol

from imaging.blobs.base import BlobInfo
from imaging.blobs.ingest import Ingest, remove_ingest
from imaging.blobs.space import Space
from imaging.digests import Digest
from imaging.errors import BadDataError, InvalidArgumentError, TooLargeError
from imaging.files import os_errors

FLUSH_BYTES = 256 << 10
"""Smaller pieces are gathered to this: hashing and writing below it cost more in calls than in bytes."""

CHECKPOINT_BYTES = 1 << 30
"""A power cut costs at most this much of an ingest whose writer never asks for a checkpoint; each makes it wait for the disk."""

BLOB_MODE = 0o444
"""Blobs never change."""


class Publisher(Protocol):
    """What a writer needs of its store."""

    def publish(self, files: Ingest) -> BlobInfo:
        """Make a complete, synced ingest a blob."""

    def let_go(self, files: Ingest) -> None:
        """The ingest has no writer any more."""


class LocalBlobWriter:
    """See BlobWriter. Calls from several threads are taken one after another."""

    def __init__(
        self,
        store: Publisher,
        files: Ingest,
        space: Space,
        clock: Callable[[], float],
        max_bytes: int | None,
    ) -> None:
        self._store = store
        self._files = files
        self._space = space
        self._clock = clock
        self._max_bytes = max_bytes
        self._lock = threading.RLock()
        self._buffer = bytearray()
        self._counted_bytes = files.offset_bytes
        self._open = True

    @property
    def offset_bytes(self) -> int:
        """See BlobWriter."""
        return self._files.offset_bytes + len(self._buffer)

    @property
    def ref(self) -> str:
        """The ingest's name."""
        return self._files.state.ref

    def _check_open(self) -> None:
        if not self._open:
            raise InvalidArgumentError(f"the ingest was committed, aborted or closed: {self.ref[:80]!r}")

    def _settle(self) -> None:
        """Let the store count exactly what this ingest holds now."""
        self._space.give(self._counted_bytes - self.offset_bytes)
        self._counted_bytes = self.offset_bytes

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """See BlobWriter."""
        view = memoryview(data).cast("B")
        with self._lock:
            self._check_open()
            if not view:
                return
            self._check_size(self.offset_bytes + len(view))
            self._space.take(len(view))
            self._counted_bytes += len(view)
            try:
                self._append(view)
                if self._files.offset_bytes - self._files.state.offset_bytes >= CHECKPOINT_BYTES:
                    self._files.sync(self._clock())
            finally:
                self._settle()

    def _check_size(self, size_bytes: int) -> None:
        if self._max_bytes is not None and size_bytes > self._max_bytes:
            raise TooLargeError(f"the ingest {self.ref[:80]!r} would be larger than {self._max_bytes} bytes")

    def _append(self, view: memoryview) -> None:
        if len(self._buffer) + len(view) < FLUSH_BYTES:
            self._buffer += view
            return
        self._flush()
        if len(view) < FLUSH_BYTES:
            self._buffer += view
        else:
            self._files.append(view)

    def _flush(self) -> None:
        if self._buffer:
            self._files.append(self._buffer)
            self._buffer = bytearray()

    def checkpoint(self) -> int:
        """See BlobWriter."""
        with self._lock:
            self._check_open()
            try:
                self._flush()
                self._files.sync(self._clock())
            finally:
                self._settle()
            return self.offset_bytes

    def digest(self) -> Digest:
        """See BlobWriter."""
        with self._lock:
            self._check_open()
            self._flush()
            return self._files.hasher.digest()

    def restart(self) -> None:
        """See BlobWriter."""
        with self._lock:
            self._check_open()
            self._buffer = bytearray()
            try:
                self._files.restart(self._clock())
            finally:
                self._settle()

    def commit(self, *, digest: Digest | None = None, size_bytes: int | None = None) -> BlobInfo:
        """See BlobWriter. An error other than BadDataError leaves the ingest open, to be tried again or resumed."""
        with self._lock:
            self._check_open()
            self._check_size(self.offset_bytes)
            try:
                self._flush()
                self._refuse_unexpected(digest, size_bytes)
                self._seal()
            finally:
                self._settle()
            info = self._store.publish(self._files)
            self._end()
            return info

    def _refuse_unexpected(self, digest: Digest | None, size_bytes: int | None) -> None:
        computed = self._files.hasher.digest()
        problem = None
        if size_bytes is not None and size_bytes != self.offset_bytes:
            problem = f"has {self.offset_bytes} bytes, not {size_bytes}"
        elif digest is not None and not computed.matches(digest):
            problem = f"has digest {computed}, not {digest}"
        if problem is not None:
            self._drop()
            raise BadDataError(f"the ingest {self.ref[:80]!r} {problem}")

    def _seal(self) -> None:
        """Read-only and durable: all that may fail happens before the rename."""
        with os_errors(f"cannot seal ingest {self.ref[:80]!r}"):
            os.fchmod(self._files.fd, BLOB_MODE)
        self._files.sync_data()
        if os.fstat(self._files.fd).st_size != self.offset_bytes:
            self._drop()
            raise BadDataError(f"the ingest {self.ref[:80]!r} was changed by somebody else")

    def _drop(self) -> None:
        remove_ingest(self._files.directory)
        self._space.give(self._counted_bytes)
        self._counted_bytes = self.offset_bytes  # settled: nothing is held any more
        self._end()

    def _end(self) -> None:
        self._open = False
        self._buffer = bytearray()
        self._files.close()
        self._store.let_go(self._files)

    def abort(self) -> None:
        """See BlobWriter; a second abort, or one after close, does nothing."""
        with self._lock:
            if self._open:
                self._drop()

    def close(self) -> None:
        """See BlobWriter: what was written is made durable for a later resume."""
        with self._lock:
            if not self._open:
                return
            try:
                self._flush()
                self._files.sync(self._clock())
            finally:
                self._buffer = bytearray()
                self._settle()
                self._end()

    def abandon(self) -> None:
        """See BlobWriter. A local store has one process: the next writer of this ref is one of ours."""
        self.close()

    def __enter__(self) -> LocalBlobWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
