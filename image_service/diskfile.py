"""The second look at a stored disk image whose bytes tell what they are only out of order: qcow2, or a raw disk that ends within a sector.

A compressed one is unpacked into a file without a name, which is gone with its descriptor, whatever happens. Blocking.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from image_service.facts import Facts, ImageFormat, InspectionLimits
from image_service.inspection import judged
from imaging.blobs.base import BlobStore
from imaging.compression import Compression, open_decompressed
from imaging.digests import Digest
from imaging.diskimage import Disk, DiskFormat, content_digest, open_disk
from imaging.files import os_errors

COPY_BYTES = 1 << 20
"""Copied at once; a piece of zeros stays a hole."""

ROOM_STEP_BYTES = 64 << 20
"""Free space is asked for in steps of this: how far the unpacked size may run ahead of what was admitted."""

_ZEROS = bytes(COPY_BYTES)

Room = Callable[[int, int], None]
"""Called with what the file may grow to and what it holds; raises if there is no room."""


def needs_look(facts: Facts) -> bool:
    """Whether the bytes must be read again."""
    return facts.format is ImageFormat.QCOW2 or (facts.format is ImageFormat.RAW and not facts.content_digest)


def look(
    blobs: BlobStore, digest: Digest, facts: Facts, *, directory: Path | None, limits: InspectionLimits, room: Room
) -> Facts:
    """Read the whole disk; what was missing in ``facts``. BadDataError, TooLargeError, NoSpaceError."""
    chosen = DiskFormat.QCOW2 if facts.format is ImageFormat.QCOW2 else DiskFormat.RAW
    if not facts.unpacked_size_bytes:
        return facts  # nothing is in it
    with unpacked(blobs, digest, facts, directory, limits, room) as fd, judged():
        disk = open_disk(fd, disk_format=chosen, virtual_size_max_bytes=limits.virtual_size_max_bytes)
        content = _read_all(disk, limits)
        return replace(facts, virtual_size_bytes=disk.virtual_size_bytes, content_digest=content)


def _read_all(disk: Disk, limits: InspectionLimits) -> str:
    """The content's digest or, if so many zeros are not worth it, an empty string after every cluster was read."""
    if disk.virtual_size_bytes <= limits.digest_size_max_bytes:
        return str(content_digest(disk))
    for extent in disk.extents():
        disk.read(extent)
    return ""


@contextmanager
def unpacked(
    blobs: BlobStore, digest: Digest, facts: Facts, directory: Path | None, limits: InspectionLimits, room: Room
) -> Iterator[int]:
    """A descriptor of a regular file with the unpacked bytes."""
    path = blobs.path(digest)
    if facts.compression is Compression.NONE and path is not None:
        with os_errors(f"cannot open blob {digest}"):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)
        return
    with os_errors("cannot make a temporary file"), tempfile.TemporaryFile(dir=directory) as file:
        with blobs.open(digest) as stored:
            _unpack(stored, file.fileno(), facts, limits, room)
        yield file.fileno()


def _unpack(stored: BinaryIO, fd: int, facts: Facts, limits: InspectionLimits, room: Room) -> None:
    reader = open_decompressed(stored, compression=facts.compression, limits=limits.decompression())
    size = admitted = 0
    while piece := reader.read(COPY_BYTES):
        if size + len(piece) > admitted:
            admitted = min(size + ROOM_STEP_BYTES, max(facts.unpacked_size_bytes, size + len(piece)))
            room(admitted, size)
        if piece != _ZEROS[: len(piece)]:
            _write(fd, piece, size)
        size += len(piece)
    with os_errors("cannot unpack an image"):
        os.ftruncate(fd, size)


def _write(fd: int, piece: bytes, offset: int) -> None:
    with os_errors("cannot unpack an image"):
        done = 0
        while done < len(piece):
            done += os.pwrite(fd, memoryview(piece)[done:], offset + done)
