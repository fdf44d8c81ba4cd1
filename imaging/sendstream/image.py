"""The disk image a stream is applied to: a sparse file or a block device behind a descriptor."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Callable, Iterator
from fcntl import ioctl

from imaging.digests import Digest, MultiHasher
from imaging.errors import InvalidArgumentError, NoSpaceError, from_os_error
from imaging.sendstream import backend
from imaging.sendstream.reader import WriteRun
from imaging.sendstream.records import HEADER_BYTES

GATHER_MAX_BYTES = 1 << 20
"""Neighbouring blocks are written in one call up to here; larger calls are no faster."""
GATHER_MAX_PIECES = 512
"""Below IOV_MAX (1024), which is what one call takes."""
COPY_BYTES = 1 << 20
_PUNCH_HOLE = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_BLKGETSIZE64 = 0x80081272
_ZEROS = bytes(COPY_BYTES)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Make a range read as zeros and give its space back; plain zeros where the file system cannot."""
    if length <= 0 or _libc.fallocate(fd, _PUNCH_HOLE, offset, length) == 0:
        return
    for start in range(offset, offset + length, COPY_BYTES):
        _write_all(fd, [memoryview(_ZEROS)[: min(COPY_BYTES, offset + length - start)]], start)


def image_size(fd: int) -> int:
    """Size of the file or block device."""
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return int(struct.unpack("Q", ioctl(fd, _BLKGETSIZE64, bytes(8)))[0])
    return status.st_size


def data_ranges(fd: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Start and end of each stretch with data, ascending; one stretch if the file system cannot tell."""
    position = 0
    while position < size_bytes:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as err:
            if err.errno != errno.ENXIO:  # that one says: nothing but a hole up to the end
                yield position, size_bytes
            return
        if start >= size_bytes:
            return
        yield start, min(end, size_bytes)
        position = end


def hash_image(fd: int, size_bytes: int) -> Digest:
    """sha256 of the whole image, holes included."""
    hasher = MultiHasher()
    position = 0
    for start, end in data_ranges(fd, size_bytes):
        _hash_zeros(hasher, start - position)
        for at in range(start, end, COPY_BYTES):
            hasher.update(os.pread(fd, min(COPY_BYTES, end - at), at))
        position = end
    _hash_zeros(hasher, size_bytes - position)
    return hasher.digest()


def _hash_zeros(hasher: MultiHasher, count: int) -> None:
    zeros = memoryview(_ZEROS)
    while count > 0:
        piece = min(count, COPY_BYTES)
        hasher.update(zeros[:piece])
        count -= piece


def _write_all(fd: int, pieces: list[memoryview], offset: int) -> None:
    while pieces:
        written = os.pwritev(fd, pieces, offset)
        offset += written
        while pieces and written >= len(pieces[0]):
            written -= len(pieces.pop(0))
        if written:
            pieces[0] = pieces[0][written:]


def is_zero(block: bytes | memoryview) -> bool:
    """Whether a block is all zeros; looks at one word first, because most are not."""
    return block[:8] == _ZEROS[:8] and bytes(block) == _zeros(len(block))


def _zeros(size: int) -> bytes:
    return _ZEROS[:size] if size <= COPY_BYTES else bytes(size)


class VolumeImage:
    """Writes blocks and holes; neighbouring blocks are gathered. Zeros become holes."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._device = stat.S_ISBLK(os.fstat(fd).st_mode)
        self._data_end = image_size(fd)  # from here on everything reads as zeros
        self._pieces: list[memoryview] = []
        self._start = self._end = 0
        self._native = backend.native

    def clear(self) -> None:
        """Make everything zero, as a full stream expects."""
        self._guard(self._clear)

    def write(self, offset: int, block: bytes | memoryview) -> None:
        """Put a block."""
        if is_zero(block):
            self.free(offset, len(block))
        else:
            self._gather(offset, [memoryview(block)])

    def write_run(self, offset: int, run: WriteRun) -> None:
        """Put blocks that stand side by side."""
        stride = run.stride
        blocks = [run.view[at + HEADER_BYTES : at + stride] for at in range(0, len(run.view), stride)]
        if self._native is None or any(self._native.zero_blocks(run.view, stride, HEADER_BYTES)):
            for block in blocks:
                self.write(offset, block)
                offset += len(block)
            return
        for start in range(0, len(blocks), GATHER_MAX_PIECES):
            self._gather(offset, blocks[start : start + GATHER_MAX_PIECES])
            offset = self._end

    def _gather(self, offset: int, blocks: list[memoryview]) -> None:
        full = len(self._pieces) + len(blocks) > GATHER_MAX_PIECES or self._end - self._start >= GATHER_MAX_BYTES
        if offset != self._end or full:
            self.flush()
            self._start = self._end = offset
        self._pieces += blocks
        self._end += len(blocks) * len(blocks[0])

    def free(self, offset: int, length: int) -> None:
        """Make a range zero."""
        self.flush()
        length = min(length, self._data_end - offset)
        if length <= 0:
            return
        if offset + length == self._data_end and not self._device:
            self._guard(lambda: os.ftruncate(self._fd, offset))
            self._data_end = offset
        else:
            self._guard(lambda: punch_hole(self._fd, offset, length))

    def resize(self, size_bytes: int) -> None:
        """Give the image its final size."""
        self.flush()
        if not self._device:
            self._guard(lambda: os.ftruncate(self._fd, size_bytes))
        elif image_size(self._fd) < size_bytes:
            raise NoSpaceError(f"the device is smaller than the volume of {size_bytes} bytes")

    def flush(self) -> None:
        """Write what was gathered."""
        if self._pieces:
            pieces, self._pieces = self._pieces, []
            self._guard(lambda: _write_all(self._fd, pieces, self._start))
            self._data_end = max(self._data_end, self._end)
        self._start = self._end = -1

    def _clear(self) -> None:
        if self._device:
            punch_hole(self._fd, 0, self._data_end)
        else:
            os.ftruncate(self._fd, 0)
        self._data_end = 0

    def _guard(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as err:
            raise from_os_error(err, "writing the volume failed") from err
        except OverflowError as err:
            raise InvalidArgumentError("the volume's size does not fit a file") from err
