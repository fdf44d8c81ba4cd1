"""Opening a disk image by its content, and what can be done with any of them."""

from __future__ import annotations

import hashlib
import os

from imaging.digests import Digest
from imaging.diskimage.base import EXTENT_MAX_BYTES, VIRTUAL_SIZE_MAX_BYTES, Disk, DiskFormat
from imaging.diskimage.qcow2 import Qcow2Disk
from imaging.diskimage.raw import RawDisk
from imaging.errors import BadDataError, TooLargeError, UnsupportedError

_ZEROS = bytes(EXTENT_MAX_BYTES)

_FOREIGN_MAGICS = {
    b"KDMV": "vmdk",
    b"# Disk DescriptorFile": "vmdk descriptor",
    b"conectix": "vhd",
    b"vhdxfile": "vhdx",
    b"<<< ": "vdi",
    b"QED\0": "qed",
    b"\x7fELF": "ELF program",
}


def sniff_disk(head: bytes) -> DiskFormat:
    """The format by content. Anything without a known magic is a raw disk; formats we cannot read are refused by name."""
    if head.startswith(b"QFI\xfb"):
        return DiskFormat.QCOW2
    for magic, name in _FOREIGN_MAGICS.items():
        if head.startswith(magic):
            raise UnsupportedError(f"disk format {name} is not supported; convert it to qcow2 or raw")
    return DiskFormat.RAW


def open_disk(
    fd: int, *, disk_format: DiskFormat | None = None, virtual_size_max_bytes: int = VIRTUAL_SIZE_MAX_BYTES
) -> Disk:
    """Open the disk image in a regular file. The descriptor stays the caller's.

    Raises BadDataError (malformed), UnsupportedError (a feature or format that is refused), TooLargeError (virtual size).
    """
    chosen = disk_format or sniff_disk(os.pread(fd, 512, 0))
    disk: Disk = Qcow2Disk(fd) if chosen is DiskFormat.QCOW2 else RawDisk(fd)
    if disk.virtual_size_bytes > virtual_size_max_bytes:
        raise TooLargeError(
            f"virtual size {disk.virtual_size_bytes} bytes is over the limit of {virtual_size_max_bytes}"
        )
    if disk.virtual_size_bytes == 0:
        raise BadDataError("the disk image is empty")
    return disk


def write_raw(disk: Disk, fd: int) -> None:
    """Write the virtual disk to an empty file (or a zeroed device); holes stay holes. The caller makes it durable."""
    for extent in disk.extents():
        data = disk.read(extent)
        written = 0
        while written < len(data):
            written += os.pwrite(fd, memoryview(data)[written:], extent.offset_bytes + written)


def content_digest(disk: Disk) -> Digest:
    """sha256 of the virtual disk, zeros included: equal for every format of one disk."""
    hasher = hashlib.sha256()
    position = 0
    for extent in disk.extents():
        _feed_zeros(hasher, extent.offset_bytes - position)
        hasher.update(disk.read(extent))
        position = extent.offset_bytes + extent.size_bytes
    _feed_zeros(hasher, disk.virtual_size_bytes - position)
    return Digest("sha256", hasher.hexdigest())


def _feed_zeros(hasher: hashlib._Hash, count: int) -> None:
    while count > 0:
        piece = min(count, len(_ZEROS))
        hasher.update(memoryview(_ZEROS)[:piece])
        count -= piece
