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


class SpacePromise:
    """Space kept for one holder; shrinks as the holder takes what it was promised."""

    def __init__(self, ledger: SpaceLedger, size_bytes: int) -> None:
        self._ledger = ledger
        self.left_bytes = size_bytes

    def taken(self, size_bytes: int) -> None:
        """So much is used now: the pool counts it, the promise no longer does."""
        self._ledger.shrink(self, size_bytes)


class SpaceLedger:
    """Who may still take how much, beside what the pool already counts as used.

    A request that takes its space quickly (:meth:`admit`) does so alone: what it takes is seen by others either not at all or as
    used. One that takes it over minutes (:meth:`promise`) is counted with what it has not taken yet.
    """

    def __init__(self, available: Callable[[], int]) -> None:
        self._available = available
        self._admission = threading.Lock()
        self._lock = threading.Lock()
        self._promised_bytes = 0

    def check(self, need_bytes: int) -> None:
        """NoSpaceError unless that much is left now."""
        with self._admission:
            self._check(need_bytes)

    def _check(self, need_bytes: int) -> None:
        if need_bytes <= 0:
            return
        with self._lock:
            promised_bytes = self._promised_bytes
        if need_bytes > self._available() - promised_bytes:
            raise NoSpaceError("no space left on device")

    @contextmanager
    def admit(self, need_bytes: int) -> Iterator[None]:
        """Take that much inside the block, with nobody else admitted meanwhile; NoSpaceError unless it is left."""
        with self._admission:
            self._check(need_bytes)
            yield

    @contextmanager
    def promise(self, need_bytes: int) -> Iterator[SpacePromise]:
        """Keep that much for the caller until the block ends; NoSpaceError unless it is left."""
        promise = SpacePromise(self, need_bytes)
        with self._admission:
            self._check(need_bytes)
            with self._lock:
                self._promised_bytes += need_bytes
        try:
            yield promise
        finally:
            self.shrink(promise, promise.left_bytes)

    def shrink(self, promise: SpacePromise, size_bytes: int) -> None:
        """Take back a part of a promise, at most what is left of it."""
        with self._lock:
            size_bytes = min(size_bytes, promise.left_bytes)
            promise.left_bytes -= size_bytes
            self._promised_bytes -= size_bytes
