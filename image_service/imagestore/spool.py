"""Temporary files of the store: complete files become blobs by a rename, all others vanish.

Every temporary is locked by whoever writes it, so that :meth:`TemporaryFiles.sweep` knows the files of the dead from those of the living: a
file without a lock has no owner. Making one and locking it is a step nobody sweeps into (a shared lock on the directory).
"""

from __future__ import annotations

import errno
import fcntl
import io
import itertools
import mmap
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from image_service.imagestore.locks import directory_lock, open_locked
from image_service.imagestore.steps import step
from imaging.aci_image import HEAD_BYTES, detect_compression
from imaging.compression import Compression, DecompressingReader, DecompressionLimits, Readable
from imaging.digests import Digest, MultiHasher
from imaging.errors import BadDataError, TooLargeError
from imaging.files import TEMPORARY_PREFIX, os_errors, publish, start_writeback, write_all
from imaging.tarball import CUT_OFF

NAMED_PREFIX = "named-"
NAMED_KEEP_S = 86400.0
"""An interrupted download is worth continuing for a day; then its bytes are given back."""

PIECE_BYTES = 1 << 20
"""Read, hashed and written at once."""

BUFFERS = 3
"""One is read into while one is hashed and written; a third, so that no stage waits for the next to take its turn."""

DIRECT_FROM_BYTES = 64 << 20
"""From here on an image is written past the page cache, which costs more than hashing and pushes out what others need. What comes before
stays cached: the whole of most images, which are read again at once for their manifest."""

IMPORT_LIMITS = DecompressionLimits(output_max_bytes=256 << 30, ratio_max=200, ratio_floor_bytes=1 << 30)
"""256 GiB is far beyond any container image. Real ones shrink to a third; what grows two hundredfold beyond 1 GiB is a bomb."""


@dataclass(slots=True)
class Temporary:
    """A file being written, locked. ``path`` is None once it was given away."""

    fd: int
    path: Path


class TemporaryFiles:
    """The store's ``tmp`` directory."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        self.directory = directory
        self._clock = clock

    @contextmanager
    def file(self) -> Iterator[Temporary]:
        """TmpFile: a fresh file, gone at the end of the block unless it was renamed away."""
        path = self.directory / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
        with directory_lock(self.directory, exclusive=False):
            fd = open_locked(path, exclusive=True)
        try:
            yield Temporary(fd, path)
        finally:
            with suppress(OSError):  # swept later; the block's own error is the one to tell
                path.unlink(missing_ok=True)
            os.close(fd)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """TmpDir: a fresh directory, gone at the end of the block."""
        path = self.directory / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
        with os_errors("cannot make a temporary directory"), directory_lock(self.directory, exclusive=False):
            path.mkdir(mode=0o770)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            os.close(fd)

    @contextmanager
    def named(self, name: str) -> Iterator[Temporary]:
        """TmpNamedFile: the file of that name with what it holds already, locked. It stays until it is removed or old.

        BusyError if another process is writing it.
        """
        path = self.directory / f"{NAMED_PREFIX}{name}"
        with directory_lock(self.directory, exclusive=False):
            fd = open_locked(path, exclusive=True, timeout_s=0)
        try:
            yield Temporary(fd, path)
        finally:
            os.close(fd)

    def publish_bytes(self, data: bytes, target: Path, *, mode: int) -> None:
        """Replace (or make) a small file of the store durably."""
        with self.file() as temporary:
            with os_errors(f"cannot write {target}"):
                write_all(temporary.fd, data, 0)
                os.fchmod(temporary.fd, mode)
                os.fsync(temporary.fd)
            publish(temporary.path, target)

    def sweep(self) -> list[str]:
        """Remove what the dead left, and named files nobody came back for; their names."""
        with os_errors(f"cannot clean {self.directory}"), directory_lock(self.directory, exclusive=True):
            return [path.name for path in sorted(self.directory.iterdir()) if self._remove_dead(path)]

    def _remove_dead(self, path: Path) -> bool:
        if path.name.startswith(NAMED_PREFIX) and self._clock() - path.stat().st_mtime < NAMED_KEEP_S:
            return False
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


class _Source:
    """A source that remembers whether its end was seen, and gives back the head that was looked at."""

    def __init__(self, source: Readable) -> None:
        self._source = source
        self.ended = False
        self.head = b""
        while len(self.head) < HEAD_BYTES and (more := source.read(HEAD_BYTES - len(self.head))):
            self.head += more

    def read(self, size: int = -1, /) -> bytes:
        data = self._source.read(size)
        self.ended = self.ended or not data
        return data

    def readinto(self, buffer: memoryview, /) -> int:
        """Straight into the buffer if the source can do that."""
        if isinstance(self._source, io.FileIO | io.BufferedReader):
            return self._source.readinto(buffer) or 0
        data = self._source.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def open_image(source: Readable, limits: DecompressionLimits) -> Readable:
    """The unpacked bytes of an image, by its content; BadDataError for what is no image."""
    known = _Source(source)
    with step("error decompressing image"):
        compression = detect_compression(known.head)
    if compression is Compression.NONE:
        return _Plain(known, limits.output_max_bytes)
    return _Unpacked(known, compression, limits)


class _Plain:
    """The bytes as they are: no decoder, no copy."""

    def __init__(self, source: _Source, max_bytes: int) -> None:
        self._source = source
        self._left_bytes = max_bytes
        self._head = source.head

    def read(self, size: int = -1, /) -> bytes:
        piece, self._head = self._head or self._source.read(size), b""
        self._count(len(piece))
        return piece

    def readinto(self, buffer: memoryview, /) -> int:
        """The same without a copy between."""
        count = len(self._head)
        if count:
            buffer[:count], self._head = self._head, b""
        else:
            count = self._source.readinto(buffer)
        self._count(count)
        return count

    def _count(self, size_bytes: int) -> None:
        self._left_bytes -= size_bytes
        if self._left_bytes < 0:
            raise TooLargeError("the image is larger than the limit")


class _Unpacked:
    """The unpacked bytes. Packed data that ends too soon is told by the words for every archive that does."""

    def __init__(self, source: _Source, compression: Compression, limits: DecompressionLimits) -> None:
        self._source = source
        self._reader = DecompressingReader(source, compression, source.head, limits)

    def read(self, size: int = -1, /) -> bytes:
        try:
            return self._reader.read(size)
        except BadDataError as err:
            if self._source.ended:
                raise BadDataError(CUT_OFF) from err
            raise


def fill(target: Temporary, source: Readable) -> tuple[Digest, int]:
    """Write all of ``source``; its sha512 and length. Reading, hashing and writing go on beside each other.

    It is not durable yet: who publishes the file sees to that, once it is known to be worth it.
    """
    hasher, size = MultiHasher(["sha512"]), 0
    buffers = [memoryview(mmap.mmap(-1, PIECE_BYTES)) for _ in range(BUFFERS)]
    with ThreadPoolExecutor(2, thread_name_prefix="import") as pool:
        hashing: Future[None] | None = None
        reading = pool.submit(_read_into, source, buffers[0])
        for turn in itertools.count(1):
            piece = buffers[(turn - 1) % BUFFERS][: reading.result()]
            if not piece:
                break
            reading = pool.submit(_read_into, source, buffers[turn % BUFFERS])
            if hashing is not None:
                hashing.result()
            hashing = pool.submit(hasher.update, piece)
            _write(target.fd, piece, size)
            size += len(piece)
    _set_direct(target.fd, direct=False)
    return hasher.digest("sha512"), size


def _read_into(source: Readable, buffer: memoryview) -> int:
    """Fill the buffer, less only at the end of the source; how much."""
    filled = 0
    while filled < len(buffer):
        if isinstance(source, _Plain):
            count = source.readinto(buffer[filled:])
        else:
            data = source.read(len(buffer) - filled)
            count = len(data)
            buffer[filled : filled + count] = data
        if not count:
            break
        filled += count
    return filled


def _write(fd: int, piece: memoryview, offset_bytes: int) -> None:
    """A piece to its place, past the page cache once the image shows to be large."""
    direct = offset_bytes >= DIRECT_FROM_BYTES and len(piece) == PIECE_BYTES
    _set_direct(fd, direct=direct)
    try:
        write_all(fd, piece, offset_bytes)
    except OSError as err:
        if not direct or err.errno != errno.EINVAL:
            raise
        _set_direct(fd, direct=False)  # a file system that takes the wish and not the write
        write_all(fd, piece, offset_bytes)
    if not direct:
        start_writeback(fd, offset_bytes, len(piece))


def _set_direct(fd: int, *, direct: bool) -> None:
    """Write past the page cache from now on, or not; where that can't be, through it."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    wanted = flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT
    if wanted != flags:
        with suppress(OSError):  # a memory file system, for instance
            fcntl.fcntl(fd, fcntl.F_SETFL, wanted)


def hash_file(path: Path) -> Digest:
    """The sha512 of a file."""
    hasher = MultiHasher(["sha512"])
    with os_errors(f"cannot read {path}"), path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            hasher.update(piece)
    return hasher.digest("sha512")
