"""Temporary files of the store: complete files become blobs by a rename, all others vanish.

Every temporary is locked by whoever writes it, so that :meth:`TemporaryFiles.sweep` knows the files of the dead from those of the living: a
file without a lock has no owner. Making one and locking it is a step nobody sweeps into (a shared lock on the directory).
"""

from __future__ import annotations

import fcntl
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

WRITEBACK_BYTES = 16 << 20
"""The kernel is asked to write so much at a time, so that the fsync at the end finds little to do."""

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
        self._left_bytes -= len(piece)
        if self._left_bytes < 0:
            raise TooLargeError("the image is larger than the limit")
        return piece


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
    """Write all of ``source`` durably; its sha512 and length. Reading, hashing and writing go on beside each other."""
    hasher = MultiHasher(["sha512"])
    size = flushed = 0
    with ThreadPoolExecutor(2, thread_name_prefix="import") as pool:
        hashing: Future[None] | None = None
        reading = pool.submit(source.read, PIECE_BYTES)
        while piece := reading.result():
            reading = pool.submit(source.read, PIECE_BYTES)
            if hashing is not None:
                hashing.result()
            hashing = pool.submit(hasher.update, piece)
            write_all(target.fd, piece, size)
            size += len(piece)
            if size - flushed >= WRITEBACK_BYTES:
                start_writeback(target.fd, flushed, size - flushed)
                flushed = size
    with os_errors("cannot write a temporary file"):
        os.fsync(target.fd)
    return hasher.digest("sha512"), size


def hash_file(path: Path) -> Digest:
    """The sha512 of a file."""
    hasher = MultiHasher(["sha512"])
    with os_errors(f"cannot read {path}"), path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            hasher.update(piece)
    return hasher.digest("sha512")
