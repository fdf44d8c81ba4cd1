"""A raw disk as it streams in, or a virtual disk that is here, turned into a volume stream: the pool takes all kinds of image the same way.

A receive is published whole or not at all, keeps no second copy of the data, and skips zeros; nobody has to say beforehand how
large the disk is.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

from agent_image.drivers.base import Readable
from imaging.digests import Digest
from imaging.diskimage.base import Disk
from imaging.errors import InvalidArgumentError, TooLargeError
from imaging.sendstream.sending import derive_guid, make_stream_from, make_stream_of
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


def guid_of_disk(content_digest: str, size_bytes: int) -> int | None:
    """The guid that the image service gives the stream of this disk; None if it can't be told from what is known.

    A disk that does not fill its last block is padded, and then its digest is not the volume's.
    """
    try:
        content = Digest.parse(content_digest)
    except InvalidArgumentError:
        return None
    if content.algorithm != "sha256" or size_bytes <= 0 or size_bytes % VOLBLOCKSIZE_BYTES:
        return None
    return derive_guid(content, VOLBLOCKSIZE_BYTES)


def stream_of_raw(
    source: Readable, toname: str, *, size_bytes: int | None, size_max_bytes: int, guid: int | None = None
) -> Readable:
    """The volume stream of a raw disk read from ``source``; without a ``guid`` it gets one nobody else has.

    TooLargeError; BadDataError if the disk is empty or not of its size.
    """
    if size_bytes is not None and size_bytes > size_max_bytes:
        raise TooLargeError(f"the image is larger than {size_max_bytes} bytes")
    metered = _Metered(source, size_max_bytes)
    return _Pieces(make_stream_from(metered, _header(toname, guid), size_bytes=size_bytes))


def stream_of_disk(disk: Disk, toname: str, *, guid: int | None = None) -> Readable:
    """The volume stream of a virtual disk that is all here; BadDataError if it turns out malformed."""
    return _Pieces(make_stream_of(disk, _header(toname, guid)))


def _header(toname: str, guid: int | None) -> StreamHeader:
    return StreamHeader(
        guid=guid or secrets.randbits(64) or 1,
        toname=toname,
        volblocksize_bytes=VOLBLOCKSIZE_BYTES,
        creation_s=int(time.time()),
    )
