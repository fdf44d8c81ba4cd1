"""Admission: whether more bytes may be written, decided before the disk is really full."""

from __future__ import annotations

import threading
from pathlib import Path

from imaging.errors import NoSpaceError
from imaging.files import free_bytes

RESERVE_FREE_BYTES = 256 << 20
"""Kept free for everybody else on the file system, first of all the metadata store, whose commits must not fail because of an upload."""


class Space:
    """Counts what a store holds (blobs, ingests, quarantine) against its quota, and watches the file system's free space."""

    def __init__(self, directory: Path, *, quota_bytes: int | None, reserve_free_bytes: int) -> None:
        self._directory = directory
        self._quota_bytes = quota_bytes
        self._reserve_free_bytes = reserve_free_bytes
        self._lock = threading.Lock()
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        """What the store holds."""
        return self._used_bytes

    def take(self, count_bytes: int) -> None:
        """Admit so many more bytes or raise NoSpaceError."""
        with self._lock:
            if self._quota_bytes is not None and self._used_bytes + count_bytes > self._quota_bytes:
                raise NoSpaceError(
                    f"the blob store's quota of {self._quota_bytes} bytes is used up: no space left on device"
                )
            if free_bytes(self._directory) - count_bytes < self._reserve_free_bytes:
                raise NoSpaceError(
                    f"less than {self._reserve_free_bytes} bytes would stay free: no space left on device"
                )
            self._used_bytes += count_bytes

    def give(self, count_bytes: int) -> None:
        """Count bytes that are gone (negative: that were found)."""
        with self._lock:
            self._used_bytes -= count_bytes
