"""ZfsDriver: the storage driver of real hypervisors. The contract is agent_image/drivers/base.py, the workings docs/zfs.md."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from agent_image.drivers.base import DatasetKind
from agent_image.drivers.zfs import programs
from agent_image.drivers.zfs.devices import BLKFLSBUF
from agent_image.drivers.zfs.hidden import MARK, Purpose, new_name
from agent_image.drivers.zfs.properties import Changes
from agent_image.drivers.zfs.streams import ZfsStreams
from imaging.errors import NotPermittedError, WrongKindError, from_os_error
from imaging.names import DatasetName, SnapshotName

DEVICE_TIMEOUT_S = 10.0
"""What the contract promises; the link of a volume comes 35-400 ms after it, later when hundreds are made at once."""
OPEN_POLL_S = 0.05


class ZfsDriver(ZfsStreams):
    """Adds the bytes of volumes and snapshots, through their devices."""

    def device(self, name: DatasetName, *, timeout_s: float = DEVICE_TIMEOUT_S) -> Path:
        """The volume's device, once it is there and is this volume."""
        return self._devices.wait_linked(str(name), timeout_s, guid=self._volume(name).guid)

    @contextlib.contextmanager
    def open_volume(self, name: DatasetName, *, writable: bool = False) -> Iterator[int]:
        """The volume's device. Not exclusively: a guest's disk may be read while the guest runs, and qemu claims nothing either."""
        path = self._devices.wait(str(name), DEVICE_TIMEOUT_S, guid=self._volume(name).guid)
        if writable:
            self._refuse_readonly(name)
        fd = _open_writable(path, name, self._device_busy_timeout_s) if writable else _open_readable(path, name)
        with _closing(fd, durable=writable):
            yield fd

    def _refuse_readonly(self, name: DatasetName) -> None:
        """The kernel may still open a volume for writing that was made read-only while somebody had it open."""
        entry = self._lzc.program(programs.READONLY, [str(name)]).get(str(name).encode(), {})
        if entry.get(b"readonly") == b"on":
            raise NotPermittedError(f"{name} is read-only")

    @contextlib.contextmanager
    def open_snapshot(self, name: SnapshotName) -> Iterator[int]:
        """The snapshot's bytes, by a hidden read-only clone that lasts as long as the block.

        Devices of snapshots themselves (``snapdev=visible``) would appear for all snapshots of the volume at once and stay.
        """
        self.get_snapshot(name)
        if self._find(name.dataset).kind is not DatasetKind.VOLUME:
            raise WrongKindError(f"{name} is not a snapshot of a volume")
        view = self._make_view(name)
        try:
            fd = _open_readable(self._devices.wait(str(view), DEVICE_TIMEOUT_S), name)
            with _closing(fd, durable=False):
                yield fd
        finally:
            self._destroy_temporary(view)

    def _make_view(self, name: SnapshotName) -> DatasetName:
        with self._lock.shared():
            taken, volume = self.get_snapshot(name), self._volume(name.dataset)
            view, mark = new_name(name.dataset, Purpose.VIEW)
            changes = Changes({MARK: mark[MARK]}, readonly="on")
            self._lzc.clone(str(view), str(name), changes.for_creation())
            self._made(
                view,
                DatasetKind.VOLUME,
                changes,
                origin=name,
                volsize_bytes=taken.volsize_bytes,
                volblocksize_bytes=volume.volblocksize_bytes,
            )
            return view


def _open_readable(path: Path, name: DatasetName | SnapshotName) -> int:
    """A reader starts without pages others may have left in the cache."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as err:
        raise from_os_error(err, f"cannot open the device of {name}") from err
    with contextlib.suppress(OSError):  # needs CAP_SYS_ADMIN; without, the cache is as it is
        fcntl.ioctl(fd, BLKFLSBUF, 0)
    return fd


def _open_writable(path: Path, name: DatasetName, timeout_s: float) -> int:
    """A volume that is no longer read-only opens as such until the last who has it open, udev as a rule, lets go."""
    deadline, tick = time.monotonic() + timeout_s, threading.Event()
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as err:
            if err.errno != errno.EROFS or time.monotonic() > deadline:
                raise from_os_error(err, f"cannot open the device of {name}") from err
        tick.wait(OPEN_POLL_S)


@contextlib.contextmanager
def _closing(fd: int, *, durable: bool) -> Iterator[None]:
    try:
        yield
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)
