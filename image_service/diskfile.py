"""The second look at a stored disk image whose bytes tell what they are only out of order.

That is a qcow2, a raw disk that ends within a sector, and a package whose streams build on each other: a volume's snapshots. A compressed
one is unpacked into a file without a name, which is gone with its descriptor, whatever happens. Blocking.
"""

from __future__ import annotations

import logging
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
from imaging.errors import UnsupportedError
from imaging.files import os_errors
from imaging.sendstream.receiving import VolumeReceiver
from imaging.sendstream.rules import Limits

COPY_BYTES = 1 << 20
"""Copied at once; a piece of zeros stays a hole."""

ROOM_STEP_BYTES = 64 << 20
"""Free space is asked for in steps of this: how far the unpacked size may run ahead of what was admitted."""

STAT_BLOCK_BYTES = 512
"""The unit of ``st_blocks``, whatever the file system's own is."""

_ZEROS = bytes(COPY_BYTES)

log = logging.getLogger(__name__)

Room = Callable[[int, int], None]
"""Called with what the file may grow to and what it holds; raises if there is no room."""


def needs_look(facts: Facts) -> bool:
    """Whether the bytes must be read again."""
    return facts.format is ImageFormat.QCOW2 or (
        facts.format in {ImageFormat.RAW, ImageFormat.ZVOL} and not facts.content_digest
    )


def look(
    blobs: BlobStore, digest: Digest, facts: Facts, *, directory: Path | None, limits: InspectionLimits, room: Room
) -> Facts:
    """Read the whole disk; what was missing in ``facts``. BadDataError, TooLargeError, NoSpaceError."""
    chosen = DiskFormat.QCOW2 if facts.format is ImageFormat.QCOW2 else DiskFormat.RAW
    if not facts.unpacked_size_bytes:
        return facts  # nothing is in it
    if facts.format is ImageFormat.ZVOL:
        return _received(blobs, digest, facts, directory, limits, room)
    with unpacked(blobs, digest, facts, directory, limits, room) as fd, judged():
        disk = open_disk(fd, disk_format=chosen, virtual_size_max_bytes=limits.virtual_size_max_bytes)
        content = _read_all(disk, limits)
        return replace(facts, virtual_size_bytes=disk.virtual_size_bytes, content_digest=content)


def _received(
    blobs: BlobStore, digest: Digest, facts: Facts, directory: Path | None, limits: InspectionLimits, room: Room
) -> Facts:
    """The digest of the disk that streams make together, if it is one disk that is not too large to hash."""
    if facts.virtual_size_bytes > limits.digest_size_max_bytes:
        return facts
    with os_errors("cannot make a temporary file"), tempfile.TemporaryFile(dir=directory) as file, judged():
        receiver = VolumeReceiver(file.fileno(), limits=Limits(volume_size_max_bytes=limits.digest_size_max_bytes))
        try:
            with blobs.open(digest) as stored:
                reader = open_decompressed(stored, compression=facts.compression, limits=limits.decompression())
                while piece := reader.read(COPY_BYTES):
                    receiver.feed(piece)
                    held_bytes = os.fstat(file.fileno()).st_blocks * STAT_BLOCK_BYTES
                    room(held_bytes + ROOM_STEP_BYTES, held_bytes)
            receiver.finish()
        except UnsupportedError as err:  # it is encrypted, for a container
            log.info("an image has no digest of its disk: %s", err.message, extra={"digest": str(digest)})
            return facts
        disk = open_disk(file.fileno(), disk_format=DiskFormat.RAW, virtual_size_max_bytes=limits.digest_size_max_bytes)
        return replace(facts, virtual_size_bytes=disk.virtual_size_bytes, content_digest=str(content_digest(disk)))


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
