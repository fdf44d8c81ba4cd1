"""Reading an archive with a look at its digest on the way."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, BinaryIO, cast

from image_service.imagestore.keys import hash_to_key
from imaging.digests import MultiHasher
from imaging.errors import BadDataError
from imaging.files import os_errors

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BUFFER_BYTES = 1 << 20
"""What a caller's small reads are served from."""


class VerifyingReader(io.RawIOBase):
    """Reads an archive once, forwards; the last piece of a damaged one raises BadDataError instead."""

    def __init__(self, file: BinaryIO, key: str) -> None:
        super().__init__()
        self._file = file
        self._key = key
        self._hasher = MultiHasher(["sha512"])
        self._ahead = file.read(BUFFER_BYTES)

    @classmethod
    def over(cls, file: BinaryIO, key: str) -> BinaryIO:
        """A buffered reader of ``file``, which it closes."""
        return cast("BinaryIO", io.BufferedReader(cls(file, key), BUFFER_BYTES))

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """The piece that was read ahead, once it is known not to be the last or the digest is right."""
        view = memoryview(buffer).cast("B")
        if not self._ahead:
            return 0
        piece, rest = self._ahead[: len(view)], self._ahead[len(view) :]
        self._hasher.update(piece)
        if not rest:
            with os_errors(f"cannot read image {self._key}"):
                rest = self._file.read(BUFFER_BYTES)
        if not rest and hash_to_key(self._hasher.digest("sha512")) != self._key:
            raise BadDataError(f"the stored image is damaged: {self._key}")
        self._ahead = rest
        view[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        """Close the file below as well."""
        if not self.closed:
            self._file.close()
        super().close()
