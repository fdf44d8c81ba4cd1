"""A raw disk, as it streams in, turned into a volume stream, so that the pool takes both kinds of image the same way.

A receive is published whole or not at all, keeps no second copy of the data, and skips zeros; nobody has to say beforehand how
large the disk is.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

from agent_image.drivers.base import Readable
from imaging.errors import TooLargeError
from imaging.sendstream.sending import make_stream_from
from imaging.sendstream.writer import StreamHeader

VOLBLOCKSIZE_BYTES = 16 << 10
"""The default of ZFS 2.2 and later. Clones inherit it, and guests write small blocks."""


class _Metered:
    """A source that is told off when it gives too much."""

    def __init__(self, source: Readable, size_max_bytes: int) -> None:
        self._source = source
        self._size_max_bytes = size_max_bytes
        self._size_bytes = 0

    def read(self, size: int = -1, /) -> bytes:
        """The next piece; TooLargeError beyond the limit."""
        piece = self._source.read(size)
        self._size_bytes += len(piece)
        if self._size_bytes > self._size_max_bytes:
            raise TooLargeError(f"the image is larger than {self._size_max_bytes} bytes")
        return piece


class _Pieces:
    """An iterator of bytes as a source of bytes."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes; empty at the end."""
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            if size < 0 or len(piece) <= size:
                if piece:
                    return piece
                continue
            self._rest = memoryview(piece)
        end = len(self._rest) if size < 0 else min(size, len(self._rest))
        data, self._rest = bytes(self._rest[:end]), self._rest[end:]
        return data


def stream_of_raw(source: Readable, toname: str, *, size_bytes: int | None, size_max_bytes: int) -> Readable:
    """The volume stream of a raw disk read from ``source``. TooLargeError; BadDataError if it is empty or not of its size."""
    if size_bytes is not None and size_bytes > size_max_bytes:
        raise TooLargeError(f"the image is larger than {size_max_bytes} bytes")
    header = StreamHeader(
        guid=secrets.randbits(64) or 1,
        toname=toname,
        volblocksize_bytes=VOLBLOCKSIZE_BYTES,
        creation_s=int(time.time()),
    )
    metered = _Metered(source, size_max_bytes)
    return _Pieces(make_stream_from(metered, header, size_bytes=size_bytes))
