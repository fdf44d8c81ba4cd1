"""Admission: who may write how much, so that requests that fit alone do not fill the pool together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from imaging.errors import NoSpaceError

_POINTERS_PER_BLOCK = 1024
_INDIRECT_BLOCK_BYTES = 128 * 1024
_LEVELS = 7
_METADATA_COPIES = 2


def thick_volume_bytes(size_bytes: int, block_bytes: int) -> int:
    """What ZFS reserves for a volume of that size: its bytes, and its block pointers in two copies (zvol_volsize_to_reservation)."""
    blocks = -(-size_bytes // block_bytes)
    indirect = _LEVELS
    while blocks > 1:
        blocks = -(-blocks // _POINTERS_PER_BLOCK)
        indirect += blocks
    return size_bytes + indirect * _METADATA_COPIES * _INDIRECT_BLOCK_BYTES


class SpaceLedger:
    """Space promised to requests that are under way, on top of what the pool already counts as used.

    ``available`` is read under the same lock that promises and takes back, so a request sees another's space either as promised or
    as used, never as free.
    """

    def __init__(self, available: Callable[[], int]) -> None:
        self._available = available
        self._lock = threading.Lock()
        self._promised_bytes = 0

    def check(self, need_bytes: int) -> None:
        """NoSpaceError unless that much is left now."""
        with self._lock:
            self._check(need_bytes)

    def _check(self, need_bytes: int) -> None:
        if need_bytes > 0 and need_bytes > self._available() - self._promised_bytes:
            raise NoSpaceError("no space left on device")

    @contextmanager
    def promise(self, need_bytes: int) -> Iterator[None]:
        """Keep that much for the caller until the block ends; NoSpaceError unless it is left."""
        with self._lock:
            self._check(need_bytes)
            self._promised_bytes += need_bytes
        try:
            yield
        finally:
            with self._lock:
                self._promised_bytes -= need_bytes
