"""One ingest on disk: ``data`` (the bytes so far) and ``state.json`` (what a resume needs to know).

How much of ``data`` a resume may trust: after a crash of this process alone, all of it (the kernel still has every byte written); after a
reboot, what the last checkpoint made durable. ``state.json`` holds the kernel's boot id to tell the two apart. hashlib cannot store its
state, so the trusted prefix is hashed again; that runs at 1-2 GB/s and only after a break.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import msgspec

from imaging.digests import MultiHasher
from imaging.errors import InvalidArgumentError
from imaging.files import (
    atomic_write_bytes,
    boot_id,
    fsync_directory,
    make_directory,
    os_errors,
    remove_temporaries,
    start_writeback,
    write_all,
)

REF_MAX_BYTES = 1024
"""Long enough for a URL's digest with a prefix; refs are stored, not used as file names."""

READ_CHUNK_BYTES = 1 << 20
"""Hashing a prefix: large enough to release the interpreter lock for long stretches."""

WRITEBACK_BYTES = 8 << 20
"""The kernel is asked to start writing every so many bytes: the final fsync then waits for a fraction of a second's work."""


_DATA_MODE = 0o600
"""Nobody else reads what is not verified."""


class IngestState(msgspec.Struct, kw_only=True):
    """One ingest's state as stored."""

    ref: str
    lease: str | None = None
    offset_bytes: int = 0
    updated_s: float = 0.0
    boot_id: str = ""


def ref_key(ref: str) -> str:
    """The directory name of an ingest."""
    try:
        encoded = ref.encode()
    except UnicodeEncodeError as err:
        raise InvalidArgumentError(f"an ingest's ref is not valid text: {ref[:80]!r}") from err
    if not encoded or len(encoded) > REF_MAX_BYTES:
        raise InvalidArgumentError(f"an ingest's ref has 1 to {REF_MAX_BYTES} bytes: {ref[:80]!r}")
    return hashlib.sha256(encoded).hexdigest()


def load_state(directory: Path) -> IngestState | None:
    """The stored state; None if there is none that can be read (a crash in its first or last moment)."""
    try:
        return msgspec.json.decode((directory / "state.json").read_bytes(), type=IngestState)
    except (OSError, msgspec.MsgspecError):
        return None


def remove_ingest(directory: Path, *, durably: bool = True) -> None:
    """Forget an ingest; what a crash leaves half removed is removed at the next start.

    After a commit it need not be durable: an ingest without data that comes back after a power cut is removed as well.
    """
    with os_errors(f"cannot remove ingest {directory.name}"), suppress(FileNotFoundError):
        for path in list(directory.iterdir()):
            path.unlink(missing_ok=True)
        directory.rmdir()
    if durably:
        fsync_directory(directory.parent)


def recover_ingest(directory: Path) -> int | None:
    """After a start: cut the data to what may be trusted; its size, or None if nothing usable is left."""
    remove_temporaries(directory)
    state, data = load_state(directory), directory / "data"
    if state is None or not data.is_file():
        return None
    with os_errors(f"cannot recover ingest {directory.name}"):
        data.chmod(_DATA_MODE)  # a commit may have been cut off after it made the file read-only
        size = data.stat().st_size
        trusted = size if state.boot_id == boot_id() else min(size, state.offset_bytes)
        os.truncate(data, trusted)
    state.boot_id, state.offset_bytes = boot_id(), min(trusted, state.offset_bytes)
    atomic_write_bytes(directory / "state.json", msgspec.json.encode(state))
    return trusted


class Ingest:
    """The files and running digest of one ingest, for one writer at a time."""

    def __init__(self, directory: Path, ref: str, *, lease: str | None, now_s: float) -> None:
        self.directory = directory
        self.data_path = directory / "data"
        self.state = load_state(directory) or IngestState(ref=ref, boot_id=boot_id())
        self.state.lease = lease if lease is not None else self.state.lease
        make_directory(directory)
        with os_errors(f"cannot open ingest {ref!r}"):
            if self.data_path.exists():
                self.data_path.chmod(_DATA_MODE)  # a commit that failed leaves it read-only
            self.fd = os.open(self.data_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _DATA_MODE)
        self.hasher = MultiHasher()
        self._writeback_from = 0
        try:
            self._hash_prefix(os.fstat(self.fd).st_size)
            self.sync(now_s)
        except BaseException:
            os.close(self.fd)
            raise

    @property
    def offset_bytes(self) -> int:
        """Bytes in the file, all of them hashed."""
        return self.hasher.size_bytes

    def _hash_prefix(self, length_bytes: int) -> None:
        self.hasher = MultiHasher()
        with os_errors(f"cannot read ingest {self.state.ref!r}"):
            while self.offset_bytes < length_bytes:
                piece = os.pread(self.fd, min(READ_CHUNK_BYTES, length_bytes - self.offset_bytes), self.offset_bytes)
                if not piece:
                    break
                self.hasher.update(piece)
            os.ftruncate(self.fd, self.offset_bytes)
        self._writeback_from = self.offset_bytes

    def append(self, data: bytes | bytearray | memoryview) -> None:
        """Write and hash; an error leaves file and digest as they were."""
        with os_errors(f"cannot write ingest {self.state.ref!r}"):
            try:
                write_all(self.fd, data, self.offset_bytes)
            except OSError:
                with suppress(OSError):  # a resume would overwrite the piece anyway
                    os.ftruncate(self.fd, self.offset_bytes)
                raise
        self.hasher.update(data)
        pending = self.offset_bytes - self._writeback_from
        if pending >= WRITEBACK_BYTES:
            start_writeback(self.fd, self._writeback_from, pending)
            self._writeback_from = self.offset_bytes

    def sync_data(self) -> None:
        """Make the bytes durable; if that fails fall back to the last checkpoint.

        After a failed fsync the kernel may forget the pages it could not write, so the next fsync would succeed without them.
        """
        try:
            with os_errors(f"cannot sync ingest {self.state.ref!r}"):
                os.fsync(self.fd)
        except BaseException:
            self._hash_prefix(min(self.state.offset_bytes, self.offset_bytes))
            raise

    def sync(self, now_s: float) -> None:
        """Checkpoint: bytes first, then the state that vouches for them."""
        self.sync_data()
        self.state.offset_bytes, self.state.updated_s, self.state.boot_id = self.offset_bytes, now_s, boot_id()
        atomic_write_bytes(self.directory / "state.json", msgspec.json.encode(self.state))

    def restart(self, now_s: float) -> None:
        """Forget the bytes."""
        self._hash_prefix(0)
        self.sync(now_s)

    def close(self) -> None:
        """Let go of the file; idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
