"""What every disk format offers: its virtual size, its data extents in ascending order, and their bytes.

Images come from strangers. A format's reader checks every number of a header against the file and against named limits
before it uses it, follows no reference to another file, and calls no outside program.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

EXTENT_MAX_BYTES = 2 << 20
"""Largest piece handed out at once: the largest qcow2 cluster; bounds memory, and large enough that calls do not dominate."""

VIRTUAL_SIZE_MAX_BYTES = 64 << 40
"""A few bytes of header can claim exabytes; nobody boots a guest from more than 64 TiB."""

SECTOR_BYTES = 512


class DiskFormat(StrEnum):
    """Formats that can be read."""

    RAW = "raw"
    QCOW2 = "qcow2"


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of data: at most EXTENT_MAX_BYTES at ``offset_bytes`` of the virtual disk."""

    offset_bytes: int
    size_bytes: int
    where: int
    """Where the format keeps it; meaningful to the disk that made the extent."""
    packed_bytes: int = 0
    """Size of the compressed form at ``where``; 0 if it is stored as it is."""


class Disk(Protocol):
    """A disk image opened for reading. Not safe for several threads."""

    @property
    def format(self) -> DiskFormat:
        """Which format it is."""

    @property
    def virtual_size_bytes(self) -> int:
        """The size a guest sees."""

    def extents(self) -> Iterator[Extent]:
        """Data extents, ascending and disjoint; BadDataError where the tables are malformed."""

    def read(self, extent: Extent) -> bytes:
        """The bytes of one extent; BadDataError if they are missing or do not decompress."""
