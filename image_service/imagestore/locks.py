"""Locks between processes: one on the store's directory, one on every key. All are the kernel's (flock): a dead process holds none.

Shared is for who uses, exclusive for who changes. The order is: directory, key, index. A key's file may be removed by
:func:`clean_key_locks` while somebody waits for it, so whoever gets the lock looks whether the file is still the one at the path.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imaging.errors import BusyError, UnavailableError
from imaging.files import os_errors

RETRIES_MAX = 3
"""How often the file may be exchanged under a waiter. Cleaning is rare; three times in a row is a fault."""

WAIT_TIMEOUT_S = 900.0
"""The longest another holder works under a key lock: publishing and hashing the largest image from a slow disk."""

POLL_MAX_S = 0.05
"""A waiter that has waited long looks this often. Flock itself cannot wait with a bound."""

_NEVER = threading.Event()


def acquire(fd: int, path: Path, *, exclusive: bool, timeout_s: float) -> None:
    """Lock an open file; BusyError at once (time-out 0) or UnavailableError after the time-out."""
    mode = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB
    deadline, pause_s = time.monotonic() + timeout_s, 0.001
    while True:
        try:
            fcntl.flock(fd, mode)
        except BlockingIOError as err:
            if timeout_s <= 0:
                raise BusyError(f"file already locked by another process: {path}") from err
            if time.monotonic() > deadline:
                raise UnavailableError(f"{path} stayed locked for {timeout_s:g} s") from err
        else:
            return
        _NEVER.wait(pause_s)
        pause_s = min(pause_s * 2, POLL_MAX_S)


def _same_file(fd: int, path: Path) -> bool:
    mine = os.fstat(fd)
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def open_locked(path: Path, *, exclusive: bool, timeout_s: float = WAIT_TIMEOUT_S) -> int:
    """A descriptor that holds the lock on the file at ``path``, made if need be; closing it unlocks."""
    for _ in range(RETRIES_MAX):
        with os_errors(f"cannot open lock {path}"):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
        try:
            with os_errors(f"cannot lock {path}"):
                acquire(fd, path, exclusive=exclusive, timeout_s=timeout_s)
                if _same_file(fd, path):
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    raise UnavailableError(f"cannot acquire lock after {RETRIES_MAX} retries")


def open_directory(path: Path, *, exclusive: bool, timeout_s: float = WAIT_TIMEOUT_S) -> int:
    """The same for a directory that exists: shared by its users, exclusive for who rebuilds it."""
    with os_errors(f"cannot lock {path}"):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            acquire(fd, path, exclusive=exclusive, timeout_s=timeout_s)
        except BaseException:
            os.close(fd)
            raise
    return fd


@contextmanager
def directory_lock(path: Path, *, exclusive: bool, timeout_s: float = WAIT_TIMEOUT_S) -> Iterator[None]:
    """Hold the lock on a directory."""
    fd = open_directory(path, exclusive=exclusive, timeout_s=timeout_s)
    try:
        yield
    finally:
        os.close(fd)


class KeyLocks:
    """One lock per key, as files of one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @contextmanager
    def hold(self, key: str, *, exclusive: bool, timeout_s: float = WAIT_TIMEOUT_S) -> Iterator[None]:
        """Hold a key's lock. ``timeout_s`` 0 only tries: BusyError."""
        fd = open_locked(self.directory / key, exclusive=exclusive, timeout_s=timeout_s)
        try:
            yield
        finally:
            os.close(fd)

    def clean(self) -> int:
        """CleanKeyLocks: remove the files nobody holds; how many."""
        removed = 0
        with os_errors(f"cannot clean {self.directory}"):
            for path in sorted(self.directory.iterdir()):
                removed += self._clean_one(path)
        return removed

    def _clean_one(self, path: Path) -> bool:
        try:
            with self.hold(path.name, exclusive=True, timeout_s=0):
                path.unlink()
        except BusyError:
            return False
        return True
