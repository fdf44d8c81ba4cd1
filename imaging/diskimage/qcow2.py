"""qcow2 versions 2 and 3, read from an untrusted file (format: qemu's docs/interop/qcow2.txt).

Refused by name: backing files, external data files, encryption, the corrupt bit, extended L2 entries, unknown incompatible
features. Internal snapshots are ignored: the active state is what is read. Every table is bounded by the file that
holds it, and no table or data cluster may be named twice, so a small file cannot expand beyond its own size but for zeros and
compression, and compression is bounded by PACKED_MIN_BYTES a cluster.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import zstandard
from numpy.typing import NDArray

from imaging.diskimage.base import EXTENT_MAX_BYTES, SECTOR_BYTES, DiskFormat, Extent
from imaging.diskimage.raw import read_exactly
from imaging.errors import BadDataError, UnsupportedError

L1_MAX_BYTES = 32 << 20
"""qemu's own limit: 4 Mi entries, 2 PiB with 64 KiB clusters."""

HEADER_MAX_BYTES = 1 << 20
"""The header and its extensions fill at most the first cluster (2 MiB at most); a real one is under 1 KiB."""

PACKED_MIN_BYTES = 16
"""No compressed cluster is smaller: bounds how many of them a file of a given size may claim."""

_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_HEADER_V3 = struct.Struct(">QQQII")
_OFFSET_MASK = 0x00FFFFFFFFFFFE00
_COMPRESSED = 1 << 62
_ZERO = 1

_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in range(5))
_EXTENSION_END = 0
_EXTENSION_DATA_FILE = 0x44415441
_EXTENSION_CRYPTO = 0x0537BE77


@dataclass(frozen=True, slots=True)
class Qcow2Header:
    """The header's fields that reading needs, checked against the file."""

    version: int
    cluster_bits: int
    size_bytes: int
    l1_entries: int
    l1_offset: int
    zstd: bool

    @property
    def cluster_bytes(self) -> int:
        """Size of a cluster."""
        return 1 << self.cluster_bits

    @property
    def l2_entries(self) -> int:
        """Entries of one L2 table: it fills one cluster."""
        return self.cluster_bytes // 8


def parse_header(head: bytes, file_bytes: int) -> Qcow2Header:
    """Check the first bytes of a qcow2 file of ``file_bytes`` bytes and give what reading needs."""
    if len(head) < _HEADER.size:
        raise BadDataError(f"qcow2 header is cut off: {len(head)} of {_HEADER.size} bytes")
    magic, version, backing, _, bits, size, crypt, l1_entries, l1_offset, *_ = _HEADER.unpack_from(head)
    if magic != b"QFI\xfb" or version not in {2, 3}:
        raise UnsupportedError(f"qcow2 version {version} is not supported (2 and 3 are)")
    if backing:
        raise UnsupportedError("qcow2 with a backing file is refused: it would read another file; flatten it first")
    if crypt:
        raise UnsupportedError("qcow2 with encryption is refused; decrypt it first")
    if not 9 <= bits <= 21:
        raise BadDataError(f"qcow2 cluster_bits is {bits}; it must be from 9 to 21")
    zstd = version == 3 and _check_features(head, 1 << bits)
    header = Qcow2Header(version, bits, size, l1_entries, l1_offset, zstd)
    _check_l1(header, file_bytes)
    return header


def _check_features(head: bytes, cluster_bytes: int) -> bool:
    """Check a version 3 header; whether compressed clusters are zstd."""
    if len(head) < _HEADER.size + _HEADER_V3.size:
        raise BadDataError("qcow2 version 3 header is cut off")
    incompatible, _, _, refcount_order, length = _HEADER_V3.unpack_from(head, _HEADER.size)
    _refuse_features(incompatible)
    if refcount_order > 6 or not 104 <= length <= min(cluster_bytes, HEADER_MAX_BYTES) or length % 8:
        raise BadDataError(f"qcow2 header has refcount order {refcount_order} and length {length}")
    _check_extensions(head[length:cluster_bytes])
    compression = head[104] if length > 104 and len(head) > 104 else 0
    if compression > 1 or bool(compression) != bool(incompatible & _COMPRESSION):
        raise UnsupportedError(f"qcow2 compression type {compression} is not supported (0 zlib and 1 zstd are)")
    return compression == 1


def _refuse_features(incompatible: int) -> None:
    named = {
        _CORRUPT: "the corrupt mark (repair it first)",
        _DATA_FILE: "an external data file (it would read another file)",
        _EXTENDED_L2: "extended L2 entries",
    }
    for bit, name in named.items():
        if incompatible & bit:
            raise UnsupportedError(f"qcow2 with {name} is refused")
    unknown = incompatible & ~(_DIRTY | _COMPRESSION)
    if unknown:
        raise UnsupportedError(f"qcow2 with unknown incompatible features {unknown:#x} is refused")


def _check_extensions(area: bytes) -> None:
    position = 0
    while position + 8 <= len(area):
        kind, length = struct.unpack_from(">II", area, position)
        if kind == _EXTENSION_END:
            return
        if kind in {_EXTENSION_DATA_FILE, _EXTENSION_CRYPTO}:
            raise UnsupportedError("qcow2 with an external data file or encryption is refused")
        position += 8 + -(-length // 8) * 8


def _check_l1(header: Qcow2Header, file_bytes: int) -> None:
    if header.size_bytes % SECTOR_BYTES:
        raise BadDataError(f"qcow2 virtual size {header.size_bytes} is not a multiple of {SECTOR_BYTES}")
    needed = -(-header.size_bytes // (header.cluster_bytes * header.l2_entries))
    if header.l1_entries < needed:
        raise BadDataError(f"qcow2 L1 table has {header.l1_entries} entries; the virtual size needs {needed}")
    if header.l1_entries * 8 > L1_MAX_BYTES:
        raise BadDataError(f"qcow2 L1 table has {header.l1_entries} entries; the limit is {L1_MAX_BYTES // 8}")
    if header.l1_offset % header.cluster_bytes or header.l1_offset + needed * 8 > file_bytes:
        raise BadDataError(f"qcow2 L1 table at byte {header.l1_offset} is misaligned or outside the file")


class Qcow2Disk:
    """A qcow2 image in a regular file, opened for reading."""

    format = DiskFormat.QCOW2

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._file_bytes = os.lseek(fd, 0, os.SEEK_END)
        self.header = parse_header(read_exactly(fd, 0, HEADER_MAX_BYTES), self._file_bytes)
        self._zstd = zstandard.ZstdDecompressor(max_window_size=1 << 27) if self.header.zstd else None

    @property
    def virtual_size_bytes(self) -> int:
        """The size a guest sees."""
        return self.header.size_bytes

    # -- tables ------------------------------------------------------------------------------------------------------

    def extents(self) -> Iterator[Extent]:
        """Allocated clusters, neighbours merged; see the module's docstring for what is checked."""
        seen = _Seen(self.header.cluster_bytes, self._file_bytes)
        span = self.header.cluster_bytes * self.header.l2_entries
        needed = -(-self.header.size_bytes // span)
        l1 = self._table(self.header.l1_offset, needed)
        for index in np.flatnonzero(l1 & np.uint64(_OFFSET_MASK)):
            l2_offset = int(l1[index]) & _OFFSET_MASK
            seen.use(np.array([l2_offset], np.uint64), "L2 table")
            yield from self._l2_extents(self._table(l2_offset, self.header.l2_entries), int(index) * span, seen)

    def _table(self, offset: int, entries: int) -> NDArray[np.uint64]:
        data = read_exactly(self._fd, offset, entries * 8)
        if len(data) != entries * 8:
            raise BadDataError(f"qcow2 table at byte {offset} is cut off")
        return np.frombuffer(data, ">u8").astype(np.uint64)

    def _l2_extents(self, table: NDArray[np.uint64], base: int, seen: _Seen) -> Iterator[Extent]:
        clusters_left = -(-(self.header.size_bytes - base) // self.header.cluster_bytes)
        table = table[:clusters_left]
        compressed = (table & np.uint64(_COMPRESSED)) != 0
        hosts = table & np.uint64(_OFFSET_MASK)
        zero = np.uint64(_ZERO if self.header.version == 3 else 0)
        plain = ~compressed & (hosts != 0) & ((table & zero) == 0)
        seen.use(hosts[plain], "data cluster")
        seen.count_packed(int(compressed.sum()))
        run: Extent | None = None
        for index in np.flatnonzero(plain | compressed):
            extent = self._extent(base + (int(index) << self.header.cluster_bits), int(table[index]))
            joined = _join(run, extent)
            if run is not None and joined is None:
                yield run
            run = joined or extent
        if run is not None:
            yield run

    def _extent(self, offset: int, entry: int) -> Extent:
        size = min(self.header.cluster_bytes, self.header.size_bytes - offset)
        if not entry & _COMPRESSED:
            return Extent(offset, size, entry & _OFFSET_MASK)
        offset_bits = 62 - (self.header.cluster_bits - 8)
        where = entry & ((1 << offset_bits) - 1)
        sectors = ((entry & (_COMPRESSED - 1)) >> offset_bits) + 1
        packed = min(sectors * SECTOR_BYTES - where % SECTOR_BYTES, self._file_bytes - where)
        if packed <= 0:
            raise BadDataError(f"qcow2 compressed cluster for disk byte {offset} lies outside the file")
        return Extent(offset, size, where, packed)

    # -- data --------------------------------------------------------------------------------------------------------

    def read(self, extent: Extent) -> bytes:
        """The bytes of one extent."""
        if not extent.packed_bytes:
            data = read_exactly(self._fd, extent.where, extent.size_bytes)
        else:
            data = self._unpack(read_exactly(self._fd, extent.where, extent.packed_bytes))[: extent.size_bytes]
        if len(data) != extent.size_bytes:
            raise BadDataError(f"qcow2 data for disk byte {extent.offset_bytes} is cut off")
        return data

    def _unpack(self, packed: bytes) -> bytes:
        """One compressed cluster. What follows it in its last sector belongs to the next one and is ignored."""
        try:
            if self._zstd is None:
                return zlib.decompressobj(-15).decompress(packed, self.header.cluster_bytes)
            return self._zstd.stream_reader(packed).read(self.header.cluster_bytes)
        except (zlib.error, zstandard.ZstdError) as err:
            raise BadDataError("qcow2 compressed cluster does not decompress") from err


def _join(run: Extent | None, extent: Extent) -> Extent | None:
    """Both as one extent if they follow each other on the disk and in the file, else None."""
    if run is None or run.packed_bytes or extent.packed_bytes:
        return None
    size = run.size_bytes + extent.size_bytes
    follows = run.offset_bytes + run.size_bytes == extent.offset_bytes and run.where + run.size_bytes == extent.where
    return Extent(run.offset_bytes, size, run.where) if follows and size <= EXTENT_MAX_BYTES else None


class _Seen:
    """Which clusters of the file the tables have named; naming one twice is how small files expand without end."""

    def __init__(self, cluster_bytes: int, file_bytes: int) -> None:
        self._cluster_bytes = cluster_bytes
        self._used = np.zeros(-(-file_bytes // cluster_bytes), np.bool_)
        self._packed_left = file_bytes // PACKED_MIN_BYTES

    def use(self, offsets: NDArray[np.uint64], what: str) -> None:
        if not len(offsets):
            return
        if (offsets % np.uint64(self._cluster_bytes)).any():
            raise BadDataError(f"qcow2 {what} is not aligned to a cluster")
        indices = (offsets // np.uint64(self._cluster_bytes)).astype(np.int64)
        if int(indices.max()) >= len(self._used):
            raise BadDataError(f"qcow2 {what} lies outside the file")
        if self._used[indices].any() or len(np.unique(indices)) != len(indices):
            raise BadDataError(f"qcow2 {what} is named twice")
        self._used[indices] = True

    def count_packed(self, count: int) -> None:
        self._packed_left -= count
        if self._packed_left < 0:
            raise BadDataError("qcow2 names more compressed clusters than the file could hold")
