"""The bytes of volumes and snapshots: descriptors, the path a guest opens, and the private file that comes with it.

A volume that was made, cloned or received shares the file of a snapshot (or has none, being zeros). The first call that hands out a way to
write gives it a private copy, whose path then stays valid through snapshots, renames and rollbacks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from agent_image.drivers.file_contents import VOLUME_MODE
from agent_image.drivers.file_records import Change, DatasetRecord
from agent_image.drivers.file_space import FileSpace
from imaging import files
from imaging.errors import BusyError, NotPermittedError, UnavailableError
from imaging.names import DatasetName, SnapshotName

ATTEMPTS_MAX = 8
"""How often a copy is begun anew because the volume changed meanwhile; then the caller hears that it is busy."""


class FileAccess(FileSpace):
    """Adds the calls on content."""

    def device(self, name: DatasetName, *, timeout_s: float = 10.0) -> Path:
        """A path a guest can open as its disk. A file that has to be made for it takes as long as it takes."""
        if timeout_s <= 0:
            with self._shared(name) as volume:
                if not volume.private:
                    raise UnavailableError(f"{name} has no file of its own yet")
        with self._private(name) as volume:
            return self._links.point(name, self._contents.path(volume.content))

    @contextmanager
    def open_volume(self, name: DatasetName, *, writable: bool = False) -> Iterator[int]:
        """The volume's bytes as a file descriptor."""
        with ExitStack() as opened:
            if writable:
                self._refuse_readonly(name)
            with self._private(name) if writable else self._shared(name) as volume:
                opened.enter_context(self._counted(self._uses, volume.id))
                fd = opened.enter_context(self._contents.open(volume.content, volume.volsize_bytes, writable=writable))
            yield fd
            if writable:
                self._settle(volume.id, fd, name)

    def _settle(self, volume_id: str, fd: int, name: DatasetName) -> None:
        """Make what was written durable, and cut what was written past the end (a real volume would have refused it)."""
        with self._lock, files.os_errors(f"cannot sync {name}"):
            volume = self._catalog.dataset(volume_id)
            if volume is not None and os.fstat(fd).st_size != volume.volsize_bytes:
                os.ftruncate(fd, volume.volsize_bytes)
        with files.os_errors(f"cannot sync {name}"):
            os.fsync(fd)

    @contextmanager
    def open_snapshot(self, name: SnapshotName) -> Iterator[int]:
        """A volume snapshot's bytes as a read-only file descriptor."""
        with ExitStack() as opened:
            with self._locked():
                snapshot = self._volume_snapshot(name)
                opened.enter_context(self._pinned(snapshot))
                fd = opened.enter_context(self._contents.open(snapshot.content, snapshot.volsize_bytes))
            yield fd

    def _refuse_readonly(self, name: DatasetName) -> None:
        """What the nearest dataset says that says anything counts, as properties are inherited."""
        with self._locked():
            said = (above.properties.get("readonly") for above in self._above(self._volume(name)))
            if next((value for value in said if value is not None), "off") == "on":
                raise NotPermittedError(f"volume is read-only: {name}")

    # -- private files -----------------------------------------------------------------------------------------------

    @contextmanager
    def _shared(self, name: DatasetName) -> Iterator[DatasetRecord]:
        """A volume as it is, under the lock."""
        with self._locked():
            yield self._volume(name)

    @contextmanager
    def _private(self, name: DatasetName, *, resizing: bool = False) -> Iterator[DatasetRecord]:
        """A volume that has a file of its own (or, for a resize, none), under the lock."""
        for _ in range(ATTEMPTS_MAX):
            with ExitStack() as opened:
                with self._locked():
                    volume = self._volume(name)
                    if volume.private or (resizing and not volume.content):
                        yield volume
                        return
                    self._admit_private(volume, volume.content, f"cannot give {name} a file of its own")
                    source = opened.enter_context(self._contents.open(volume.content, volume.volsize_bytes))
                content = self._contents.copy_of(source, volume.volsize_bytes, mode=VOLUME_MODE)
            self._adopt(volume, content)
        raise BusyError(f"{name} kept changing while its file was copied")

    def _adopt(self, volume: DatasetRecord, content: str) -> None:
        """Make a copy the volume's own file, or remove it if the volume is no longer what was copied."""
        with self._lock:
            try:
                if self._catalog.dataset(volume.id) is volume:
                    change = Change()
                    change.put(self._as_private(volume, content, volume.content))
                    self._commit(change)
            finally:
                self._discard([content])

    def _as_private(self, volume: DatasetRecord, content: str, same_as: str) -> DatasetRecord:
        """The volume with a file of its own that has the bytes of the unchanging ``same_as``."""
        return msgspec.structs.replace(
            volume,
            content=content,
            private=True,
            synced_content=same_as,
            synced_mtime_ns=self._contents.mark(content),
        )
