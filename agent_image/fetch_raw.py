"""A raw disk, as it streams in, written to a new volume: zeros are skipped, the volume grows if nobody said how large it will be."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from agent_image.drivers.base import Readable, StorageDriver
from imaging.errors import BadDataError, TooLargeError, from_os_error
from imaging.names import DatasetName

BLOCK_BYTES = 64 << 10
"""Zeros are looked for in blocks of this size: as fine as the holes of disk images are, coarse enough to compare fast."""

PIECE_BYTES = 1 << 20

GROW_FROM_BYTES = 64 << 20
"""First size of a volume whose length is not known; doubled whenever it is full."""

_ZEROS = bytes(BLOCK_BYTES)


class RawWriter:
    """Writes one stream of bytes into one new thin volume."""

    def __init__(
        self, driver: StorageDriver, name: DatasetName, size_max_bytes: int, *, written: Callable[[int], None]
    ) -> None:
        self._driver = driver
        self._name = name
        self._size_max_bytes = size_max_bytes
        self._written = written
        self._size_bytes = 0
        self._fd = -1
        self._open = ExitStack()

    def write(self, source: Readable, size_bytes: int | None) -> int:
        """Make the volume and write everything; the number of bytes. BadDataError if there is nothing, TooLargeError, NoSpaceError."""
        if size_bytes is not None and size_bytes > self._size_max_bytes:
            raise self._too_large()
        self._size_bytes = max(1, GROW_FROM_BYTES if size_bytes is None else size_bytes)
        self._size_bytes = self._driver.create_volume(self._name, self._size_bytes, thin=True).volsize_bytes or 0
        with self._open:
            self._reopen()
            length_bytes = self._write_all(source)
        if not length_bytes:
            raise BadDataError("the image is empty")
        if length_bytes < self._size_bytes:
            self._driver.resize(self._name, length_bytes)
        return length_bytes

    def _reopen(self) -> None:
        self._fd = self._open.enter_context(self._driver.open_volume(self._name, writable=True))

    def _write_all(self, source: Readable) -> int:
        offset = 0
        while piece := source.read(PIECE_BYTES):
            if offset + len(piece) > self._size_bytes:
                self._grow(offset + len(piece))
            for start, data in runs_of_data(piece, offset):
                self._pwrite(data, start)
            offset += len(piece)
            self._written(len(piece))
        return offset

    def _grow(self, need_bytes: int) -> None:
        if need_bytes > self._size_max_bytes:
            raise self._too_large()
        self._open.close()  # a volume is not resized under an open descriptor
        wanted = min(max(2 * self._size_bytes, need_bytes), self._size_max_bytes)
        self._size_bytes = self._driver.resize(self._name, wanted).volsize_bytes or 0
        self._reopen()

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"the image is larger than {self._size_max_bytes} bytes")

    def _pwrite(self, data: memoryview, offset: int) -> None:
        try:
            while data:
                written = os.pwrite(self._fd, data, offset)
                data, offset = data[written:], offset + written
        except OSError as err:
            raise from_os_error(err, f"can't write to {self._name}") from err


def runs_of_data(piece: bytes, offset: int) -> Iterator[tuple[int, memoryview]]:
    """The parts of a piece that are not zeros, joined, with their offsets; blocks are aligned to the volume."""
    view, start, at = memoryview(piece), None, 0
    while at < len(view):
        end = min(len(view), at + BLOCK_BYTES - (offset + at) % BLOCK_BYTES)
        # startswith is a memcmp; comparing views goes element by element, sixty times slower
        if piece.startswith(_ZEROS if end - at == BLOCK_BYTES else _ZEROS[: end - at], at):
            if start is not None:
                yield offset + start, view[start:at]
            start = None
        elif start is None:
            start = at
        at = end
    if start is not None:
        yield offset + start, view[start:]
