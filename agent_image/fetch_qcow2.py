"""A qcow2 disk that is fetched, as a virtual disk to be read.

Its tables may stand anywhere in the file, so all of it has to be here first: in a file without a name beside the state, which goes
with the process however that ends. Only what the disk keeps is read after that, never its holes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent_image.drivers.base import Readable
from imaging import files
from imaging.diskimage.base import Disk, DiskFormat
from imaging.diskimage.probe import open_disk
from imaging.errors import NoSpaceError, TooLargeError

PIECE_BYTES = 1 << 20


@contextmanager
def disk_of_qcow2(source: Readable, directory: Path, *, size_max_bytes: int, free_min_bytes: int) -> Iterator[Disk]:
    """The virtual disk of the qcow2 file read from ``source``, for the block.

    ``size_max_bytes`` bounds the file and the disk; ``free_min_bytes`` is what must stay free where the file is kept.
    TooLargeError, NoSpaceError, BadDataError (malformed), UnsupportedError (a backing file, encryption and other ways out of the file).
    """
    with files.os_errors(f"cannot keep a qcow2 image in {directory}"):
        directory.mkdir(mode=0o700, exist_ok=True)
        file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - closed below
    with file:
        _keep(source, file.fileno(), directory, size_max_bytes, free_min_bytes)
        yield open_disk(file.fileno(), disk_format=DiskFormat.QCOW2, virtual_size_max_bytes=size_max_bytes)


def _keep(source: Readable, fd: int, directory: Path, size_max_bytes: int, free_min_bytes: int) -> None:
    size_bytes = 0
    while piece := source.read(PIECE_BYTES):
        size_bytes += len(piece)
        if size_bytes > size_max_bytes:
            raise TooLargeError(f"the image is larger than {size_max_bytes} bytes")
        if files.free_bytes(directory) < free_min_bytes + len(piece):
            raise NoSpaceError(f"no space left on device for a qcow2 image in {directory}")
        files.write_all(fd, piece, size_bytes - len(piece))


def first_bytes(disk: Disk, count: int) -> bytes:
    """What a disk begins with; zeros where it keeps nothing."""
    begin = bytearray(min(count, disk.virtual_size_bytes))
    for extent in disk.extents():
        if extent.offset_bytes >= len(begin):
            break
        data = disk.read(extent)[: len(begin) - extent.offset_bytes]
        begin[extent.offset_bytes : extent.offset_bytes + len(data)] = data
    return bytes(begin)
