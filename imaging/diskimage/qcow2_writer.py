"""Writing qcow2: any disk that can be read becomes a version 3 image of plain clusters; what is zero takes no room.

Equal disks become equal files, whatever format they came in. Clients of image catalogues take virtual machines in this format only.

Layout: header, L1 table, then data clusters with each L2 table behind the data it maps, then refcount blocks, then their table.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from imaging.diskimage.base import SECTOR_BYTES, Disk
from imaging.files import os_errors, write_all

CLUSTER_BITS = 16
CLUSTER_BYTES = 1 << CLUSTER_BITS
"""qemu's own default."""

_L2_ENTRIES = CLUSTER_BYTES // 8
_REFCOUNTS = CLUSTER_BYTES // 2
_COPIED = 1 << 63
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_HEADER_BYTES = 104
_ZEROS = bytes(CLUSTER_BYTES)


def _clusters(size_bytes: int) -> int:
    return -(-size_bytes // CLUSTER_BYTES)


class _Writer:
    """Clusters in the order they are written."""

    def __init__(self, fd: int, first: int) -> None:
        self._fd = fd
        self.next = first

    def add(self, data: bytes | bytearray) -> int:
        """Write at the next free clusters; the offset."""
        offset = self.next * CLUSTER_BYTES
        write_all(self._fd, data, offset)
        self.next += _clusters(len(data))
        return offset


def _virtual_clusters(disk: Disk) -> Iterator[tuple[int, bytearray]]:
    """``(number, content)`` of every cluster that may hold data, ascending; extents need not end at clusters."""
    number, content = -1, bytearray()
    for extent in disk.extents():
        data = memoryview(disk.read(extent))
        offset = extent.offset_bytes
        while data:
            if offset // CLUSTER_BYTES != number:
                if number >= 0:
                    yield number, content
                number, content = offset // CLUSTER_BYTES, bytearray(CLUSTER_BYTES)
            within = offset % CLUSTER_BYTES
            piece = data[: CLUSTER_BYTES - within]
            content[within : within + len(piece)] = piece
            data, offset = data[len(piece) :], offset + len(piece)
    if number >= 0:
        yield number, content


def write_qcow2(disk: Disk, fd: int) -> None:
    """Write the disk to an empty file. The caller makes it durable.

    A size that does not end at a sector is rounded up, as qemu does. Errors: those of ``disk``, NoSpaceError.
    """
    size = -(-disk.virtual_size_bytes // SECTOR_BYTES) * SECTOR_BYTES
    l1 = [0] * -(-size // (CLUSTER_BYTES * _L2_ENTRIES))
    l1_clusters = _clusters(len(l1) * 8)
    with os_errors("cannot write a qcow2 image"):
        writer = _Writer(fd, 1 + l1_clusters)
        l2, index = [0] * _L2_ENTRIES, -1
        for number, content in _virtual_clusters(disk):
            if content == _ZEROS:
                continue
            if number // _L2_ENTRIES != index:
                _end_table(writer, l1, index, l2)
                l2, index = [0] * _L2_ENTRIES, number // _L2_ENTRIES
            l2[number % _L2_ENTRIES] = writer.add(content) | _COPIED
        _end_table(writer, l1, index, l2)
        table_offset, table_clusters = _add_refcounts(writer)
        write_all(fd, _pack(l1).ljust(l1_clusters * CLUSTER_BYTES, b"\0"), CLUSTER_BYTES)
        write_all(fd, _header(size, len(l1), table_offset, table_clusters), 0)


def _end_table(writer: _Writer, l1: list[int], index: int, l2: list[int]) -> None:
    if index >= 0:
        l1[index] = writer.add(_pack(l2)) | _COPIED


def _pack(entries: list[int]) -> bytes:
    return struct.pack(f">{len(entries)}Q", *entries)


def _add_refcounts(writer: _Writer) -> tuple[int, int]:
    """Every cluster is used once, those of the refcounts too: as many blocks as cover both."""
    used, blocks, table = writer.next, 0, 0
    while blocks * _REFCOUNTS < used + blocks + table:
        blocks += 1
        table = _clusters(blocks * 8)
    total = used + blocks + table
    offsets = []
    for block in range(blocks):
        count = max(min(total - block * _REFCOUNTS, _REFCOUNTS), 0)
        offsets.append(writer.add((b"\0\1" * count).ljust(CLUSTER_BYTES, b"\0")))
    return writer.add(_pack(offsets).ljust(table * CLUSTER_BYTES, b"\0")), table


def _header(size: int, l1_entries: int, table_offset: int, table_clusters: int) -> bytes:
    # magic, version, backing (offset, length), cluster bits, size, encryption, L1, refcount table, snapshots,
    # incompatible, compatible and autoclear features, refcount order (16 bits), header length
    packed = _HEADER.pack(
        *(b"QFI\xfb", 3, 0, 0, CLUSTER_BITS, size, 0, l1_entries, CLUSTER_BYTES, table_offset, table_clusters),
        *(0, 0, 0, 0, 0, 4, _HEADER_BYTES),
    )
    return packed.ljust(CLUSTER_BYTES, b"\0")
