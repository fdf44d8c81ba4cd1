"""The content files of a pool: one flat directory, each file named by an id that is never used twice.

A content file is written, synced and only then named by a record; once a snapshot refers to it, it is read-only for ever. Files no record
names are what a crash left: :meth:`ContentFiles.sweep` removes them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from agent_image.drivers.file_records import NO_CONTENT, new_id
from imaging import files

SNAPSHOT_MODE = 0o444
"""Nobody writes to what snapshots share; root could, but our own code then notices by opening read-only."""

VOLUME_MODE = 0o660
"""A guest's process gets in by its group, as with the nodes of a real volume."""

COMPARE_CHUNK_BYTES = 1 << 20
"""Compared at once: memory of two chunks, and one system call for each."""

NEVER_WRITTEN_MTIME_S = 86_400
"""Modification times this module sets lie in the first days of 1970, where no writer's clock can put one."""


class ContentFiles:
    """Makes, copies, measures and removes content files."""

    def __init__(self, directory: Path) -> None:
        self._directory = files.make_directory(directory)
        self._allocated: dict[str, int] = {}  # of files that never change

    def path(self, content: str) -> Path:
        """Where a content file is."""
        return self._directory / content

    def sweep(self, wanted: set[str]) -> list[str]:
        """Remove every file that is not wanted; their names."""
        with files.os_errors(f"cannot clean {self._directory}"):
            stale = sorted(self._names() - wanted)
            for name in stale:
                (self._directory / name).unlink()
        return stale

    def missing(self, wanted: set[str]) -> list[str]:
        """Wanted files that are not there."""
        with files.os_errors(f"cannot list {self._directory}"):
            return sorted(wanted - self._names())

    def _names(self) -> set[str]:
        return {path.name for path in self._directory.iterdir()}

    def remove(self, content: str) -> None:
        """Remove a file no record names any more; a failure leaves it to the next sweep."""
        self._allocated.pop(content, None)
        with suppress(OSError):
            self.path(content).unlink()

    # -- opening -----------------------------------------------------------------------------------------------------

    @contextmanager
    def open(self, content: str, size_bytes: int, *, writable: bool = False) -> Iterator[int]:
        """A descriptor of ``size_bytes``; without content, of as many zeros."""
        with files.os_errors(f"cannot open content {content or 'zeros'}"):
            fd = self._zeros(size_bytes) if content == NO_CONTENT else self._existing(content, writable=writable)
        try:
            yield fd
        finally:
            os.close(fd)

    def _existing(self, content: str, *, writable: bool) -> int:
        return os.open(self.path(content), (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)

    def _zeros(self, size_bytes: int) -> int:
        fd = os.memfd_create("zeros", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size_bytes)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return fd

    # -- making ------------------------------------------------------------------------------------------------------

    @contextmanager
    def new(self, *, mode: int) -> Iterator[tuple[str, int]]:
        """A new file, durable when the block ends; an exception removes it. Nothing refers to it yet."""
        content = new_id()
        path = self.path(content)
        with files.os_errors(f"cannot make content {content}"):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                yield content, fd
                with files.os_errors(f"cannot sync content {content}"):
                    os.fchmod(fd, mode)
                    os.fsync(fd)
            finally:
                os.close(fd)
            files.fsync_directory(self._directory)
        except BaseException:
            self.remove(content)
            raise

    def copy_of(self, source_fd: int, size_bytes: int, *, mode: int) -> str:
        """A new file with the bytes of an open one, sharing blocks where the file system can."""
        with self.new(mode=mode) as (content, fd):
            files.copy_file(source_fd, fd)
            with files.os_errors(f"cannot size content {content}"):
                os.ftruncate(fd, size_bytes)
        return content

    def snapshot_of(self, source_fd: int, size_bytes: int) -> str:
        """An immutable copy of an open file; NO_CONTENT if there is nothing but holes."""
        if next(files.data_ranges(source_fd), None) is None:
            return NO_CONTENT
        return self.copy_of(source_fd, size_bytes, mode=SNAPSHOT_MODE)

    def freeze(self, content: str) -> None:
        """Nothing writes to this file from now on: what is known about it stays true."""
        self._allocated[content] = self.allocated(content)

    def resize(self, content: str, size_bytes: int) -> None:
        """Cut or extend with zeros, durably."""
        with self.open(content, size_bytes, writable=True) as fd, files.os_errors(f"cannot resize content {content}"):
            if os.fstat(fd).st_size != size_bytes:
                os.ftruncate(fd, size_bytes)
                os.fsync(fd)

    # -- has it changed? -----------------------------------------------------------------------------------------------

    def mark(self, content: str) -> int:
        """Give a file a modification time no writer can; as long as it stays nobody has written. Returns it."""
        mtime_ns = NEVER_WRITTEN_MTIME_S * 1_000_000_000 + int(new_id(), 16) % 1_000_000_000
        with files.os_errors(f"cannot mark content {content}"):
            os.utime(self.path(content), ns=(mtime_ns, mtime_ns))
        return self.mtime_ns(content)  # as the file system rounds it

    def mtime_ns(self, content: str) -> int:
        """When somebody last wrote."""
        with files.os_errors(f"cannot stat content {content}"):
            return self.path(content).stat().st_mtime_ns

    def is_open(self, content: str) -> bool:
        """Whether any process has the file open, found by asking for a lease only a sole opener gets."""
        with files.os_errors(f"cannot open content {content}"):
            fd = self._existing(content, writable=False)
        try:
            # Who opens the file while the lease lasts makes the kernel signal us: by a signal nobody dies of.
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError as err:
            return err.errno in {errno.EAGAIN, errno.EBUSY}  # anything else: no leases here, so nothing is known
        finally:
            os.close(fd)  # gives the lease back
        return False

    # -- sizes -------------------------------------------------------------------------------------------------------

    def allocated(self, content: str) -> int:
        """Bytes of disk a file takes; blocks it shares count in full."""
        if content == NO_CONTENT:
            return 0
        known = self._allocated.get(content)
        if known is not None:
            return known
        with files.os_errors(f"cannot stat content {content}"):
            return self.path(content).stat().st_blocks * 512


def changed_bytes(fd: int, base_fd: int, block_bytes: int) -> int:
    """Bytes in blocks of a file that are not zero and not what the base has there."""
    total, done = 0, 0
    chunk = max(COMPARE_CHUNK_BYTES, block_bytes)
    with files.os_errors("cannot compare two content files"):
        for start, length in files.data_ranges(fd):
            offset = max(done, start - start % block_bytes)
            while offset < start + length:
                mine, theirs = os.pread(fd, chunk, offset), os.pread(base_fd, chunk, offset)
                if mine != theirs:
                    total += _changed_blocks(mine, theirs, block_bytes) * block_bytes
                offset += chunk
            done = offset
    return total


def same_bytes(fd: int, other_fd: int) -> bool:
    """Whether two files of one size hold the same bytes; looks only where either has data."""
    with files.os_errors("cannot compare two content files"):
        for one, other in ((fd, other_fd), (other_fd, fd)):
            for start, length in files.data_ranges(one):
                for offset in range(start, start + length, COMPARE_CHUNK_BYTES):
                    size = min(COMPARE_CHUNK_BYTES, start + length - offset)
                    if os.pread(one, size, offset) != os.pread(other, size, offset):
                        return False
    return True


def _changed_blocks(mine: bytes, theirs: bytes, block_bytes: int) -> int:
    theirs = theirs.ljust(len(mine), b"\0")
    zeros = bytes(block_bytes)
    changed = 0
    for at in range(0, len(mine), block_bytes):
        block = mine[at : at + block_bytes]
        changed += block != theirs[at : at + block_bytes] and block != zeros[: len(block)]
    return changed
