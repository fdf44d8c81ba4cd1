"""What a stored blob is, and the disk in it: whatever format and packing it has, opened as a file descriptor.

What has to be unpacked goes to a sparse file without a name in the directory of temporary files: the kernel removes it with
its descriptor, so that not even a kill leaves it behind.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum

from image_service.derive_work import Work
from imaging.blobs.base import BlobStore
from imaging.compression import (
    Compression,
    DecompressionLimits,
    Readable,
    open_decompressed,
)
from imaging.digests import Digest, MultiHasher
from imaging.diskimage import DiskFormat, open_disk, sniff_disk
from imaging.errors import BadDataError, TooLargeError, UnsupportedError, WrongKindError
from imaging.files import TEMPORARY_PREFIX, os_errors
from imaging.sendstream.image import VolumeImage
from imaging.sendstream.records import HEADER_BYTES, MAGIC, Begin, HeaderType, StreamKind, parse
from imaging.sendstream.rules import Limits
from imaging.sendstream.volume import apply_stream, data_ranges, derive_guid, padded_size

VOLBLOCKSIZE_BYTES = 16 << 10
"""Of volumes made from disks: the default of ZFS 2.2 and later. Part of every derived guid: never change it."""

READ_BYTES = 1 << 20
HEAD_BYTES = 512
"""Enough for every magic and a stream's first record."""

HOLE_BYTES = 64 << 10
"""Zeros are looked for in pieces of this size when a packed disk is unpacked."""

_ZEROS = bytes(READ_BYTES)


class Payload(StrEnum):
    """What is inside, once unpacked."""

    VOLUME_STREAM = "zvol"
    FILESYSTEM_STREAM = "zfs"
    RAW = "raw"
    QCOW2 = "qcow2"
    TAR = "tar"

    @property
    def is_disk(self) -> bool:
        """Whether there is a disk in it."""
        return self in {Payload.VOLUME_STREAM, Payload.RAW, Payload.QCOW2}


@dataclass(frozen=True, slots=True)
class Content:
    """What a blob is: ``payload``, packed with ``compression``."""

    payload: Payload
    compression: Compression
    disk_size_bytes: int = 0
    disk_digest: str = ""
    """Of the disk of that size, if it was computed when the image came."""

    def volume_digest(self, size_bytes: int) -> Digest | None:
        """The digest of the volume the disk becomes, if it is known: a disk that does not fill its last block is padded."""
        known = self.disk_digest and self.disk_size_bytes == size_bytes and size_bytes % VOLBLOCKSIZE_BYTES == 0
        return Digest.parse(self.disk_digest) if known else None


def identify(blobs: BlobStore, digest: Digest) -> Content:
    """What a blob is, by its first bytes. UnsupportedError for formats nobody here reads, BadDataError for damaged packing."""
    with blobs.open(digest) as source:
        reader = open_decompressed(source)
        head = b""
        while len(head) < HEAD_BYTES and (more := reader.read(HEAD_BYTES - len(head))):
            head += more
        return Content(_payload(head), reader.compression)


def _payload(head: bytes) -> Payload:
    if head[8:16] == MAGIC.to_bytes(8, "big"):
        raise UnsupportedError("the image is a big-endian send stream")
    if len(head) >= HEADER_BYTES and head[8:16] == MAGIC.to_bytes(8, "little"):
        begin = parse(head[:HEADER_BYTES])
        plain = isinstance(begin, Begin) and begin.header_type != HeaderType.PACKAGE
        is_volume = not (plain and isinstance(begin, Begin)) or begin.kind == StreamKind.VOLUME
        return Payload.VOLUME_STREAM if is_volume else Payload.FILESYSTEM_STREAM
    if head[257:262] == b"ustar":
        return Payload.TAR
    return Payload.QCOW2 if sniff_disk(head) is DiskFormat.QCOW2 else Payload.RAW


@dataclass(frozen=True, slots=True)
class OpenedDisk:
    """A disk behind a descriptor. ``guid`` and block size are those of the volume it becomes (or came as)."""

    fd: int
    size_bytes: int
    volblocksize_bytes: int
    guid: int


@contextmanager
def open_disk_of(blobs: BlobStore, digest: Digest, content: Content, work: Work) -> Iterator[OpenedDisk]:
    """The disk in a blob, read-only in spirit. WrongKindError if there is none, TooLargeError, BadDataError."""
    with ExitStack() as stack:
        if not content.payload.is_disk:
            raise WrongKindError(f"there is no disk in an image of format {content.payload}")
        if content.payload is Payload.VOLUME_STREAM:
            yield _applied(blobs, digest, work, stack)
            return
        fd = _plain_file(blobs, digest, content, work, stack)
        fd, size_bytes = _raw_disk(fd, content, work, stack)
        padded_bytes = padded_size(size_bytes, VOLBLOCKSIZE_BYTES)
        digest = content.volume_digest(size_bytes) or hash_padded(fd, size_bytes, padded_bytes, work)
        guid = derive_guid(digest, VOLBLOCKSIZE_BYTES)
        yield OpenedDisk(fd, size_bytes, VOLBLOCKSIZE_BYTES, guid)


def _temporary(work: Work, stack: ExitStack) -> int:
    """A fresh file without a name."""
    work.check_room()
    with os_errors("cannot make a temporary file for a derived image"):
        file = tempfile.TemporaryFile(dir=work.directory, prefix=TEMPORARY_PREFIX)  # noqa: SIM115 - the stack's
    return stack.enter_context(file).fileno()


def _applied(blobs: BlobStore, digest: Digest, work: Work, stack: ExitStack) -> OpenedDisk:
    fd = _temporary(work, stack)
    limits = Limits(volume_size_max_bytes=work.limits.size_max_bytes)
    with blobs.open(digest) as source:
        plain = Watched(unpacked(source, work), work)
        state = apply_stream(plain, fd, limits=limits)
    return OpenedDisk(fd, state.volsize_bytes, state.volblocksize_bytes, state.guid)


def unpacked(source: Readable, work: Work) -> Readable:
    """The decompressed bytes of a blob; TooLargeError beyond what the framing of the largest disk could take."""
    return open_decompressed(source, limits=DecompressionLimits(output_max_bytes=2 * work.limits.size_max_bytes))


class Watched:
    """A source whose every piece is a step of the work."""

    def __init__(self, source: Readable, work: Work) -> None:
        self._source = source
        self._work = work

    def read(self, size: int = -1, /) -> bytes:
        """The next piece."""
        piece = self._source.read(size)
        self._work.step(len(piece))
        return piece


def _plain_file(blobs: BlobStore, digest: Digest, content: Content, work: Work, stack: ExitStack) -> int:
    """The blob without its packing, as a file: the blob's own where there is one."""
    path = blobs.path(digest)
    if content.compression is Compression.NONE and path is not None:
        with os_errors("the image's data can't be opened"):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        return fd
    fd = _temporary(work, stack)
    image = VolumeImage(fd)
    offset = 0
    with blobs.open(digest) as source:
        plain = Watched(unpacked(source, work), work)
        while piece := plain.read(READ_BYTES):
            for start in range(0, len(piece), HOLE_BYTES):
                image.write(offset + start, piece[start : start + HOLE_BYTES])
            offset += len(piece)
    image.resize(offset)
    return fd


def _raw_disk(fd: int, content: Content, work: Work, stack: ExitStack) -> tuple[int, int]:
    """The disk as a raw file, and its size."""
    limit = work.limits.size_max_bytes
    if content.payload is Payload.RAW:
        size_bytes = os.lseek(fd, 0, os.SEEK_END)
        if size_bytes > limit:
            raise TooLargeError(f"the disk has {size_bytes} bytes, over the limit of {limit}")
        if size_bytes == 0:
            raise BadDataError("the disk image is empty")
        return fd, size_bytes
    disk = open_disk(fd, disk_format=DiskFormat.QCOW2, virtual_size_max_bytes=limit)
    raw = _temporary(work, stack)
    image = VolumeImage(raw)
    for extent in disk.extents():
        image.write(extent.offset_bytes, disk.read(extent))
        work.step(extent.size_bytes)
    image.resize(disk.virtual_size_bytes)
    return raw, disk.virtual_size_bytes


def disk_pieces(fd: int, size_bytes: int, padded_bytes: int, work: Work) -> Iterator[bytes]:
    """Every byte of a raw disk, holes and padding as zeros; holes are not read."""
    position = 0
    for start, end in data_ranges(fd, size_bytes):
        yield from _zeros(start - position, work)
        for at in range(start, end, READ_BYTES):
            wanted = min(READ_BYTES, end - at)
            with os_errors("reading the image failed"):
                piece = os.pread(fd, wanted, at)
            if len(piece) != wanted:
                raise BadDataError(f"the image ends at byte {at + len(piece)}; it was longer when it was opened")
            work.step(wanted)
            yield piece
        position = end
    yield from _zeros(padded_bytes - position, work)


def _zeros(count_bytes: int, work: Work) -> Iterator[bytes]:
    while count_bytes > 0:
        piece = _ZEROS[:count_bytes]
        work.step(len(piece))
        yield piece
        count_bytes -= len(piece)


def hash_padded(fd: int, size_bytes: int, padded_bytes: int, work: Work) -> Digest:
    """sha256 of a disk, padded with zeros."""
    hasher = MultiHasher()
    for piece in disk_pieces(fd, size_bytes, padded_bytes, work):
        hasher.update(piece)
    return hasher.digest()
