"""Reading a blob from a bucket: one request, taken up again where it broke, verified on the way if asked."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import urllib3

from imaging.blobs.s3_bucket import S3Bucket, StoredObject, s3_errors
from imaging.digests import Digest
from imaging.errors import BadDataError, ConflictError, MistifyError, NotFoundError, UnavailableError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BUFFER_BYTES = 1 << 20
"""What a caller's small reads are served from."""

BREAKS_MAX = 3
"""Breaks in a row without a byte between them, after which a reader gives up."""


class S3Reader(io.RawIOBase):
    """A blob from an offset. ``find`` names the copy to read, and another one if that vanished."""

    def __init__(
        self, bucket: S3Bucket, find: Callable[[], StoredObject], copy: StoredObject, *, offset_bytes: int
    ) -> None:
        super().__init__()
        self._bucket = bucket
        self._find = find
        self._copy = copy
        self._offset_bytes = offset_bytes
        self._stream: Any = None
        self._breaks = 0
        if offset_bytes < copy.size_bytes:
            self._reopen()

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Up to a buffer's length of bytes; 0 at the end."""
        view = memoryview(buffer).cast("B")
        while self._offset_bytes < self._copy.size_bytes and len(view):
            data = self._piece(min(len(view), BUFFER_BYTES))
            if data:
                self._breaks = 0
                view[: len(data)] = data
                self._offset_bytes += len(data)
                return len(data)
        return 0

    def _piece(self, most_bytes: int) -> bytes:
        """Some bytes; none after a break that was mended."""
        try:
            if self._stream is None:
                self._reopen()
            with s3_errors(f"cannot read {self._copy.key}"):
                data = bytes(self._stream.read(most_bytes))
        except (UnavailableError, NotFoundError, ConflictError, urllib3.exceptions.HTTPError, OSError) as err:
            self._broken(err)
            return b""
        if not data:  # it ended too soon
            self._broken(UnavailableError(f"the object store cut off {self._copy.key}"))
        return data

    def _broken(self, err: Exception) -> None:
        self._drop_stream()
        self._breaks += 1
        if self._breaks < BREAKS_MAX:
            return
        if isinstance(err, MistifyError):
            raise err
        raise UnavailableError(f"cannot read {self._copy.key}") from err

    def _reopen(self) -> None:
        """From where we are; of another copy of the same bytes if ours is gone."""
        try:
            self._stream = self._bucket.stream(self._copy.key, offset_bytes=self._offset_bytes, etag=self._copy.etag)
        except (NotFoundError, ConflictError):
            self._copy = self._find()
            self._stream = self._bucket.stream(self._copy.key, offset_bytes=self._offset_bytes, etag=self._copy.etag)

    def _drop_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def close(self) -> None:
        """Let go of the connection; idempotent."""
        self._drop_stream()
        super().close()


class VerifyingS3Reader(io.RawIOBase):
    """Reads one copy whole, once; raises BadDataError instead of handing out the last piece of a damaged one."""

    def __init__(self, source: S3Reader, digest: Digest, size_bytes: int, on_damage: Callable[[], None]) -> None:
        super().__init__()
        self._source = source
        self._digest = digest
        self._left_bytes = size_bytes
        self._on_damage = on_damage
        self._hasher = hashlib.sha256()
        self._check_end()  # an empty blob has no last piece to hold back

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Up to a buffer's length of bytes; 0 at the end."""
        view = memoryview(buffer).cast("B")
        count = self._source.readinto(view)
        self._hasher.update(view[:count])
        self._left_bytes -= count
        if count:
            self._check_end()
        return count

    def _check_end(self) -> None:
        if self._left_bytes <= 0 and self._hasher.hexdigest() != self._digest.hex:
            self._on_damage()
            raise BadDataError(f"the stored blob is damaged: {self._digest}")

    def close(self) -> None:
        """Let go of the source; idempotent."""
        self._source.close()
        super().close()
