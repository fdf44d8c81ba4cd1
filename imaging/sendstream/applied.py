"""A volume kept as a plain file (or block device) to which streams are applied one after another.

Beside the volume stands a small JSON file, ``VOLUME.stream.json``: the state after the last stream and the content's digest. A stream
is applied to a private copy that shares the old one's blocks where the file system can, and takes the volume's name only when
all of it was verified: a failed apply leaves the old volume as it was. A block device cannot be replaced; it is marked as
incomplete before the first change, and the mark goes only after END was verified.

One apply at a time: a second one onto the same volume is told so at once.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from imaging.compression import Readable
from imaging.digests import Digest
from imaging.errors import AlreadyExistsError, BadDataError, BusyError, ConflictError, WrongKindError
from imaging.files import atomic_write_json, copy_file, durable_file, os_errors, read_json
from imaging.sendstream.image import hash_image
from imaging.sendstream.receiving import apply_stream
from imaging.sendstream.rules import DEFAULT_LIMITS, Limits
from imaging.sendstream.state import VolumeState

SIDECAR_SUFFIX = ".stream.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class AppliedState:
    """A volume's state and the digest of all its bytes."""

    volume: VolumeState
    digest: Digest

    def to_wire(self) -> dict[str, object]:
        """As JSON-ready values."""
        return {"state": self.volume.to_wire(), "digest": str(self.digest)}

    @classmethod
    def from_wire(cls, wire: object) -> AppliedState:
        """What ``to_wire`` gave; BadDataError otherwise."""
        if not isinstance(wire, dict) or not isinstance(wire.get("digest"), str):
            raise BadDataError("a volume's record is malformed")
        return cls(VolumeState.from_wire(wire.get("state")), Digest.parse(wire["digest"]))


class AppliedVolume:
    """One such volume."""

    def __init__(self, path: Path, sidecar: Path | None = None) -> None:
        self.path = Path(os.path.realpath(path))  # a rename must not replace a link by the volume
        if not path.name or path.name == "..":
            raise WrongKindError(f"neither a file nor a block device: {path}")
        self.sidecar = sidecar or path.with_name(path.name + SIDECAR_SUFFIX)

    def find(self) -> AppliedState | None:
        """The state, or None if there is no volume yet (or an empty file that waits to become one).

        ConflictError: the volume is not what the last stream made it (changed since, or left incomplete).
        """
        if not self.sidecar.exists():
            return None
        wire = read_json(self.sidecar)
        if not isinstance(wire, dict) or wire.get("format") != _FORMAT:
            raise BadDataError(f"not a record of applied streams: {self.sidecar}")
        if not self._has_content() and not wire.get("current"):
            return None  # the first apply was cut off before the volume got its name
        if not self.path.exists():
            return None
        candidates = [AppliedState.from_wire(wire[name]) for name in ("pending", "current") if wire.get(name)]
        # A device shows no time of its last write that one could rely on.
        if not wire.get("pending") and candidates and not self._is_device() and self._stamp() == wire.get("stamp"):
            return candidates[0]
        return self._recognise(candidates)

    def apply(
        self,
        source: Readable,
        *,
        dataset: str | None = None,
        limits: Limits = DEFAULT_LIMITS,
        replace: bool = False,
    ) -> AppliedState:
        """Apply a stream; see :func:`~imaging.sendstream.volume.apply_stream` for its errors.

        A full stream makes a new volume: AlreadyExistsError if there is one, unless ``replace`` allows to discard it. BusyError:
        another process is applying a stream to this volume.
        """
        if self.path.exists() and not self.path.is_file() and not self._is_device():
            raise WrongKindError(f"neither a file nor a block device: {self.path}")
        with self._alone():
            return self._apply(source, dataset, limits, replace=replace)

    def _apply(self, source: Readable, dataset: str | None, limits: Limits, *, replace: bool) -> AppliedState:
        base = None if replace else self.find()
        if base is None and not replace and self._has_content():
            what = "no stream has been applied to the device" if self._is_device() else "no stream made what is there"
            raise AlreadyExistsError(f"{what}: {self.path}")
        before = base.volume if base else None
        if self._is_device():
            return self._apply_in_place(source, base, dataset, limits)
        mode = self.path.stat().st_mode & 0o777 if self.path.exists() else 0o644
        with durable_file(self.path, mode=mode) as fd:
            if base is not None:
                self._copy_to(fd)
            state = apply_stream(source, fd, before, dataset=dataset, limits=limits)
            after = AppliedState(state, hash_image(fd, state.volsize_bytes))
            self._record(base, pending=after)
        self._record(after)
        return after

    def _apply_in_place(
        self, source: Readable, base: AppliedState | None, dataset: str | None, limits: Limits
    ) -> AppliedState:
        self._record(None)
        with self._opened(os.O_RDWR) as fd:
            state = apply_stream(source, fd, base.volume if base else None, dataset=dataset, limits=limits)
            with os_errors(f"cannot sync {self.path}"):
                os.fsync(fd)
            after = AppliedState(state, hash_image(fd, state.volsize_bytes))
        self._record(after)
        return after

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the volume's lock: on a device itself, for a file (which a rename replaces) on a file beside it that goes afterwards."""
        lock_path = self.path if self._is_device() else self.path.with_name(f".{self.path.name}.lock")
        flags = os.O_RDONLY if self._is_device() else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        fd = self._lock(lock_path, flags)
        try:
            yield
        finally:
            if lock_path != self.path:
                lock_path.unlink(missing_ok=True)  # before the lock goes: who waits for nothing finds a new one
            os.close(fd)

    def _lock(self, lock_path: Path, flags: int) -> int:
        while True:
            with os_errors(f"cannot lock {self.path}"):
                fd = os.open(lock_path, flags | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _is_same_file(fd, lock_path):
                        return fd
                except BlockingIOError as err:
                    os.close(fd)
                    raise BusyError(f"another process is applying a stream to {self.path}") from err
                except BaseException:
                    os.close(fd)
                    raise
            os.close(fd)  # its last holder removed it between our open and our lock

    def _recognise(self, candidates: list[AppliedState]) -> AppliedState:
        """Which state the content shows; an interrupted publish leaves two to choose from."""
        for candidate in candidates:
            with self._opened(os.O_RDONLY) as fd:
                if hash_image(fd, candidate.volume.volsize_bytes) == candidate.digest:
                    return candidate
        why = "was changed after the last stream was applied" if candidates else "was left incomplete by a failed apply"
        raise ConflictError(f"the volume {why}: {self.path}")

    def _record(self, current: AppliedState | None, pending: AppliedState | None = None) -> None:
        wire: dict[str, object] = {"format": _FORMAT, "current": current.to_wire() if current else None}
        if pending is not None:
            wire["pending"] = pending.to_wire()
        else:
            wire["stamp"] = self._stamp()
        atomic_write_json(self.sidecar, wire)

    def _stamp(self) -> list[int]:
        """Changes whenever somebody writes to the file."""
        with os_errors(f"cannot look at {self.path}"):
            status = self.path.stat()
        return [status.st_size, status.st_mtime_ns, status.st_ino]

    def _is_device(self) -> bool:
        return self.path.exists() and stat.S_ISBLK(self.path.stat().st_mode)

    def _has_content(self) -> bool:
        return self.path.exists() and (self._is_device() or self.path.stat().st_size > 0)

    def _copy_to(self, fd: int) -> None:
        with self._opened(os.O_RDONLY) as old:
            copy_file(old, fd)

    @contextmanager
    def _opened(self, flags: int) -> Iterator[int]:
        with os_errors(f"cannot open {self.path}"):
            fd = os.open(self.path, flags | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)


def _is_same_file(fd: int, path: Path) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
