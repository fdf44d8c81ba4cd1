"""A reader that checks a blob's digest on the way."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from imaging.digests import Digest, MultiHasher
from imaging.errors import BadDataError
from imaging.files import os_errors

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BUFFER_BYTES = 1 << 20
"""What a caller's small reads are served from."""


class VerifyingReader(io.RawIOBase):
    """Reads a whole file once, forwards; raises BadDataError instead of handing out the last piece of a damaged one."""

    def __init__(self, fd: int, digest: Digest, on_damage: Callable[[], None]) -> None:
        super().__init__()
        self._fd = fd
        self._digest = digest
        self._on_damage = on_damage
        self._hasher = MultiHasher()
        self._size_bytes = os.fstat(fd).st_size
        self._check_end()  # an empty file has no last piece to hold back

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Up to a buffer's length of bytes; 0 at the end."""
        view = memoryview(buffer).cast("B")
        with os_errors(f"cannot read blob {self._digest}"):
            count = os.preadv(self._fd, [view], self._hasher.size_bytes)
        if count == 0 and self._hasher.size_bytes < self._size_bytes:
            self._damaged()  # the file shrank while it was read
        self._hasher.update(view[:count])
        self._check_end()
        return count

    def _check_end(self) -> None:
        if self._hasher.size_bytes >= self._size_bytes and not self._hasher.digest().matches(self._digest):
            self._damaged()

    def _damaged(self) -> None:
        self._on_damage()
        raise BadDataError(f"the stored blob is damaged: {self._digest}")
