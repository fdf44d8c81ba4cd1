"""A raw disk: the file is the disk; holes of the file system are zeros that need not be read."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from imaging.diskimage.base import EXTENT_MAX_BYTES, SECTOR_BYTES, DiskFormat, Extent
from imaging.errors import BadDataError


class RawDisk:
    """A raw disk in a regular file or block device. Its virtual size is rounded up to whole sectors."""

    format = DiskFormat.RAW

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._file_bytes = os.lseek(fd, 0, os.SEEK_END)

    @property
    def virtual_size_bytes(self) -> int:
        """The file's size in whole sectors."""
        return -(-self._file_bytes // SECTOR_BYTES) * SECTOR_BYTES

    def extents(self) -> Iterator[Extent]:
        """Runs the file system says hold data (SEEK_DATA, SEEK_HOLE)."""
        position = 0
        while (start := self._seek_data(position)) is not None:
            end = os.lseek(self._fd, start, os.SEEK_HOLE)
            for offset in range(start, end, EXTENT_MAX_BYTES):
                yield Extent(offset, min(EXTENT_MAX_BYTES, end - offset), offset)
            position = end

    def _seek_data(self, position: int) -> int | None:
        if position >= self._file_bytes:
            return None
        try:
            return os.lseek(self._fd, position, os.SEEK_DATA)
        except OSError as err:
            if err.errno == errno.ENXIO:
                return None
            raise

    def read(self, extent: Extent) -> bytes:
        """Read one extent; BadDataError if the file shrank meanwhile."""
        data = read_exactly(self._fd, extent.where, extent.size_bytes)
        if len(data) != extent.size_bytes:
            raise BadDataError(
                f"the disk image ends at byte {extent.where + len(data)}; it was longer when it was opened"
            )
        return data


def read_exactly(fd: int, offset: int, size: int) -> bytes:
    """Up to ``size`` bytes from ``offset``; fewer only at the end of the file."""
    pieces = []
    while size > 0:
        piece = os.pread(fd, size, offset)
        if not piece:
            break
        pieces.append(piece)
        offset += len(piece)
        size -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
