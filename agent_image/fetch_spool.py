"""What has arrived of an image, kept beside the state until the image is whole: the death of the agent costs no byte twice.

A fetch appends each piece to ``ID.part`` before it hands it on. ``ID.json`` says, before the first byte is kept, which body that is: its
URL, ETag, length and digest. The next attempt, in this life of the agent or a later one, takes what is kept first and asks the server
for the rest only; when all of it is there it asks for nothing. Nothing is synced: the kernel keeps what was written when a process
dies. What may have been lost with the machine itself is used again only where a digest of the whole body will tell.

Keeping is a service, not a condition: where the file system has little room left, or a write fails, what is kept is given up, its space
is free at once, and the fetch goes on without.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import msgspec

from agent_image.drivers.base import Readable
from agent_image.fetch_qcow2 import disk_of_qcow2
from imaging import files
from imaging.diskimage.base import Disk
from imaging.errors import MistifyError, UnavailableError

FREE_MIN_BYTES = 512 << 20
"""Nothing is kept while the file system has less room than this: it is for the volumes, and for other programs."""

log = logging.getLogger(__name__)


class BodyFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Which bytes a body has."""

    url: str
    """Without user and password."""
    etag: str = ""
    """A strong one, or empty."""
    size_bytes: int | None = None
    digest: str = ""
    """Of the whole body, as its server says; empty if it does not."""
    kind: str = ""
    """What the image is for, as its server says."""


class _Kept(msgspec.Struct, frozen=True):
    """Content of ``ID.json``."""

    facts: BodyFacts
    boot_id: str


class Spool:
    """What is kept of one image; used by one thread at a time. A context: leaving it closes the file and keeps what is in it."""

    def __init__(self, directory: Path, image_id: str) -> None:
        self._directory = directory
        self._part = directory / f"{image_id}.part"
        self._facts = directory / f"{image_id}.json"
        self._fd = -1
        self._size_bytes = 0
        self._replayed_bytes = 0
        self.was_used = False
        """Whether bytes of an earlier attempt were handed on."""

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    @property
    def size_bytes(self) -> int:
        """How much is kept of the body that was found or begun."""
        return self._size_bytes

    def find(self, url: str) -> BodyFacts | None:
        """What is kept of the body at ``url``, to be read from its start; None if there is nothing, or nothing to rely on."""
        self._close()
        try:
            kept = msgspec.json.decode(self._facts.read_bytes(), type=_Kept)
            if kept.facts.url != url or not (kept.boot_id == files.boot_id() or kept.facts.digest):
                return None
            self._fd = os.open(self._part, os.O_RDWR | os.O_CLOEXEC)
            self._size_bytes = os.fstat(self._fd).st_size
        except (OSError, MistifyError, msgspec.DecodeError):
            self._close()
            return None
        return kept.facts

    def begin(self, facts: BodyFacts) -> None:
        """Keep a body from its start; what was kept before is gone."""
        self.discard()
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            # A body and the volume it becomes, of about the same size if it is not packed.
            if not self._has_room(2 * (facts.size_bytes or 0)):
                return
            self._fd = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            files.atomic_write_bytes(self._facts, msgspec.json.encode(_Kept(facts, files.boot_id())), mode=0o600)
        except (OSError, MistifyError) as err:
            self._give_up(err)

    def read(self, size: int) -> bytes:
        """The next bytes of what is kept; empty behind the last."""
        length = min(size, self._size_bytes - self._replayed_bytes)
        if self._fd < 0 or length <= 0:
            return b""
        try:
            data = os.pread(self._fd, length, self._replayed_bytes)
        except OSError as err:
            self.discard()
            raise UnavailableError(f"cannot read {self._part}: it has to be fetched again") from err
        self._replayed_bytes += len(data)
        self.was_used = True
        return data

    def cut(self, size_bytes: int) -> None:
        """Forget what is kept from there on; reading is over."""
        if self._fd < 0:
            return
        self._size_bytes = self._replayed_bytes = size_bytes
        try:
            os.ftruncate(self._fd, size_bytes)
        except OSError as err:
            self._give_up(err)

    def append(self, data: bytes | bytearray) -> None:
        """Keep the next bytes, which are then not to be read again."""
        if self._fd < 0:
            return
        try:
            if not self._has_room(len(data)):
                self.discard()
                return
            files.write_all(self._fd, data, self._size_bytes)
        except (OSError, MistifyError) as err:
            self._give_up(err)
            return
        self._size_bytes += len(data)
        self._replayed_bytes = self._size_bytes

    def discard(self) -> None:
        """Forget everything; idempotent. What can't be removed is tried again at the next start."""
        self._close()
        self.was_used = False
        try:
            for path in (self._facts, self._part):  # facts first: without them the bytes mean nothing
                path.unlink(missing_ok=True)
        except OSError as err:
            log.warning("what was kept of a download can't be removed", extra={"cause": repr(err)})

    def _has_room(self, size_bytes: int) -> bool:
        if files.free_bytes(self._directory) >= FREE_MIN_BYTES + size_bytes:
            return True
        log.info("little room is left: a download is not kept", extra={"path": str(self._part)})
        return False

    def _close(self) -> None:
        self._size_bytes = self._replayed_bytes = 0
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _give_up(self, err: Exception) -> None:
        log.warning("a download can't be kept", extra={"path": str(self._part), "cause": repr(err)})
        self.discard()


class Spools:
    """Everything that is kept."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def of(self, image_id: str) -> Spool:
        """What is kept of an image; ``image_id`` is well-formed."""
        return Spool(self._directory, image_id)

    def disk_of_qcow2(self, source: Readable, *, size_max_bytes: int) -> AbstractContextManager[Disk]:
        """The virtual disk of a qcow2 file, which is kept here while it is read."""
        return disk_of_qcow2(source, self._directory, size_max_bytes=size_max_bytes, free_min_bytes=FREE_MIN_BYTES)

    def keep_only(self, image_ids: Collection[str]) -> None:
        """Remove what is kept of any other image, and leftovers."""
        with files.os_errors(f"cannot clean {self._directory}"):
            found = list(self._directory.iterdir()) if self._directory.exists() else []
            for path in found:
                if path.suffix not in {".part", ".json"} or path.stem not in image_ids:
                    path.unlink()
