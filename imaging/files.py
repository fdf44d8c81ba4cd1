"""Files as a promise: durable publishing, sparse and shared copies, holes, free space, one owner per directory.

Everything that becomes visible does so in one order: write a temporary beside the target, fsync it, verify it, rename it,
fsync the directory. A crash leaves the old state or the new one, and at worst a temporary whose name starts with TEMPORARY_PREFIX, which
the owner of the directory removes at start (:func:`remove_temporaries`).

Errors: OSError is translated here (:func:`os_errors`); nothing else leaves these functions.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

from imaging.errors import BadDataError, BusyError, from_os_error

TEMPORARY_PREFIX = ".tmp-"
"""No published name starts so; what does is garbage after a crash."""

COPY_CHUNK_BYTES = 1 << 20
"""Large enough that the system calls vanish beside the copying, small enough to stay out of anybody's memory limit."""

COPY_RANGE_MAX_BYTES = 1 << 30
"""One copy_file_range call; the kernel caps a call at 2 GiB, and a signal should not wait longer than this."""

BOOT_ID_PATH = Path("/proc/sys/kernel/random/boot_id")

_FICLONE = 0x40049409
_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_SYNC_FILE_RANGE_WRITE = 0x02

_NOT_HERE = frozenset({errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS})
"""What the kernel says when this file system, or this pair of file systems, lacks an operation."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


@contextmanager
def os_errors(what: str) -> Iterator[None]:
    """Translate every OSError of the block; ``what`` says what failed and on what."""
    try:
        yield
    except OSError as err:
        raise from_os_error(err, what) from err


def boot_id() -> str:
    """Names this run of the machine: what a process wrote and nobody synced is there as long as it lasts, and may be lost after it."""
    with os_errors("cannot read the boot id"):
        return BOOT_ID_PATH.read_text(encoding="ascii").strip()


# -- durable publishing ------------------------------------------------------------------------------------------------


def fsync_directory(path: Path | str) -> None:
    """Make the names in a directory durable."""
    with os_errors(f"cannot sync directory {path}"):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def make_directory(path: Path) -> Path:
    """Ensure a directory (and its parents) durably exists; returns it."""
    with os_errors(f"cannot make directory {path}"):
        missing = [p for p in (path, *path.parents) if not p.exists()]
        path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        fsync_directory(made.parent)
    return path


def temporary_beside(target: Path) -> Path:
    """A fresh name in the target's directory for what will be renamed to ``target``."""
    return target.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")


def remove_temporaries(directory: Path) -> int:
    """Remove what a crash left in a directory the caller owns; how many."""
    with os_errors(f"cannot clean {directory}"):
        stale = list(directory.glob(f"{TEMPORARY_PREFIX}*"))
        for path in stale:
            path.unlink(missing_ok=True)
    return len(stale)


def publish(temporary: Path, target: Path, *, replace: bool = True) -> None:
    """Give a complete, already synced temporary its name, durably.

    Without ``replace`` an existing target raises AlreadyExistsError and stays; the temporary then stays too.
    """
    with os_errors(f"cannot publish {target}"):
        if replace:
            temporary.replace(target)
        else:
            os.link(temporary, target)  # unlike rename, link refuses what exists, in one step
            temporary.unlink()
    fsync_directory(target.parent)


@contextmanager
def durable_file(
    target: Path, *, mode: int = 0o644, replace: bool = True, verify: Callable[[int], None] | None = None
) -> Iterator[int]:
    """A descriptor to write; leaving the block publishes it as ``target``, an exception leaves no trace.

    ``verify`` gets the descriptor after the fsync and raises to refuse.
    """
    temporary = temporary_beside(target)
    with os_errors(f"cannot write {target}"):
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
    try:
        try:
            yield fd
            with os_errors(f"cannot write {target}"):
                os.fsync(fd)
            if verify is not None:
                verify(fd)
        finally:
            os.close(fd)
        publish(temporary, target, replace=replace)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell; a leftover is removed at the next start
            temporary.unlink(missing_ok=True)
        raise


def write_all(fd: int, data: bytes | bytearray | memoryview, offset_bytes: int) -> None:
    """Write every byte at an offset; OSError stays OSError (the caller's border translates)."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset_bytes)
        view = view[written:]
        offset_bytes += written


def atomic_write_bytes(path: Path, data: bytes, *, mode: int = 0o644, replace: bool = True) -> None:
    """Replace (or make) a small file: old content or new content, never a mixture, durable on return."""
    with durable_file(path, mode=mode, replace=replace) as fd, os_errors(f"cannot write {path}"):
        write_all(fd, data, 0)


def atomic_write_json(path: Path, value: Any, *, mode: int = 0o644) -> None:
    """The same for a JSON document."""
    atomic_write_bytes(path, json.dumps(value, sort_keys=True).encode() + b"\n", mode=mode)


def read_json(path: Path) -> Any:
    """Read a JSON document; NotFoundError, or BadDataError if it is none."""
    with os_errors(f"cannot read {path}"):
        data = path.read_bytes()
    try:
        return json.loads(data)
    except ValueError as err:
        raise BadDataError(f"not a JSON document: {path}") from err


# -- space ---------------------------------------------------------------------------------------------------------------


def free_bytes(path: Path | str) -> int:
    """Bytes an unprivileged writer may still put on the file system that holds ``path``."""
    with os_errors(f"cannot ask for free space at {path}"):
        stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


def allocated_bytes(fd: int) -> int:
    """Bytes of disk the file takes (holes take none; shared extents count in full)."""
    with os_errors("cannot stat an open file"):
        return os.fstat(fd).st_blocks * 512


def punch_hole(fd: int, offset_bytes: int, length_bytes: int) -> None:
    """Make a range read as zeros and give its blocks back; where holes cannot be made the zeros are written.

    The file's size stays.
    """
    with os_errors("cannot punch a hole"):
        length_bytes = min(length_bytes, os.fstat(fd).st_size - offset_bytes)
        if length_bytes <= 0:
            return
        if _libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset_bytes, length_bytes) == 0:
            return
        code = ctypes.get_errno()
        if code not in _NOT_HERE:
            raise OSError(code, os.strerror(code))
        _write_zeros(fd, offset_bytes, length_bytes)


def _write_zeros(fd: int, offset_bytes: int, length_bytes: int) -> None:
    zeros = memoryview(bytes(min(length_bytes, COPY_CHUNK_BYTES)))
    end = offset_bytes + length_bytes
    while offset_bytes < end:
        piece = zeros[: end - offset_bytes]
        write_all(fd, piece, offset_bytes)
        offset_bytes += len(piece)


def start_writeback(fd: int, offset_bytes: int, length_bytes: int) -> None:
    """Ask the kernel to start writing a range now, so that the final fsync finds little to do. A hint: never fails."""
    _libc.sync_file_range(fd, offset_bytes, length_bytes, _SYNC_FILE_RANGE_WRITE)


# -- copies --------------------------------------------------------------------------------------------------------------


class CopyKind(StrEnum):
    """How a copy was made."""

    REFLINK = "reflink"
    SPARSE = "sparse"


def reflink(source_fd: int, target_fd: int) -> bool:
    """Make the target share all blocks of the source (FICLONE); False where the file system cannot."""
    try:
        fcntl.ioctl(target_fd, _FICLONE, source_fd)
    except OSError as err:
        if err.errno in _NOT_HERE:
            return False
        raise from_os_error(err, "cannot share blocks of a file") from err
    return True


def data_ranges(fd: int) -> Iterator[tuple[int, int]]:
    """``(offset, length)`` of each range that is not a hole, in order; one range for all where holes are not told."""
    size, offset = os.fstat(fd).st_size, 0
    while offset < size:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as err:
            if err.errno == errno.ENXIO:  # only a hole is left
                return
            if err.errno not in _NOT_HERE:
                raise from_os_error(err, "cannot find the holes of a file") from err
            start, end = offset, size
        yield start, end - start
        offset = end


def copy_sparse(source_fd: int, target_fd: int) -> None:
    """Make the target's content and size those of the source; holes stay holes. What the target held is gone."""
    with os_errors("cannot copy a file"):
        os.ftruncate(target_fd, 0)
        os.ftruncate(target_fd, os.fstat(source_fd).st_size)
        for offset, length in data_ranges(source_fd):
            copy_range(source_fd, target_fd, offset, length)


def copy_range(source_fd: int, target_fd: int, offset_bytes: int, length_bytes: int) -> None:
    """Copy a range to the same place in another file, in the kernel where it can."""
    end = offset_bytes + length_bytes
    with os_errors("cannot copy a range of a file"):
        while offset_bytes < end:
            copied = _copy_once(source_fd, target_fd, offset_bytes, end - offset_bytes)
            if copied == 0:  # the source shrank under us: the rest reads as zeros
                return
            offset_bytes += copied


def _copy_once(source_fd: int, target_fd: int, offset_bytes: int, length_bytes: int) -> int:
    try:
        count = min(length_bytes, COPY_RANGE_MAX_BYTES)
        copied = os.copy_file_range(source_fd, target_fd, count, offset_bytes, offset_bytes)
        if copied:
            return copied
    except OSError as err:
        if err.errno not in _NOT_HERE:
            raise
    # Some file systems answer 0 or refuse although there are bytes: read and write them ourselves.
    data = os.pread(source_fd, min(length_bytes, COPY_CHUNK_BYTES), offset_bytes)
    write_all(target_fd, data, offset_bytes)
    return len(data)


def copy_file(source_fd: int, target_fd: int) -> CopyKind:
    """Copy a whole file the cheapest way there is: shared blocks, else a sparse copy. Not yet durable: fsync the target."""
    with os_errors("cannot copy a file"):
        os.ftruncate(target_fd, 0)  # sharing blocks would leave a longer target's tail
    if reflink(source_fd, target_fd):
        return CopyKind.REFLINK
    copy_sparse(source_fd, target_fd)
    return CopyKind.SPARSE


# -- one owner -----------------------------------------------------------------------------------------------------------


class LockFile:
    """An exclusive lock on a path, held until :meth:`release` or the death of the process.

    The file stays after release: removing it would let two owners lock two different files of one name. It holds the owner's pid for people
    and for the error of whoever comes second; the lock itself is the kernel's (flock), so a stale pid locks nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._fd is not None

    def acquire(self) -> LockFile:
        """Take the lock at once or raise BusyError that names the holder's pid; idempotent."""
        if self._fd is not None:
            return self
        with os_errors(f"cannot open lock {self.path}"):
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._lock(fd)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        return self

    def _lock(self, fd: int) -> None:
        with os_errors(f"cannot lock {self.path}"):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as err:
                holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
                raise BusyError(f"{self.path} is locked by process {holder}", [f"process {holder}"]) from err
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Give the lock back; idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with suppress(OSError):  # the pid is a courtesy; closing is what unlocks
                os.ftruncate(fd, 0)
            os.close(fd)

    def __enter__(self) -> LockFile:
        return self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()
