"""Volumes whose devices have another size than the index says: ``zfs set volsize`` leaves no event.

One file of the kernel's tells the sizes of all devices, asking a device which volume it is costs an open. So a device is asked when it
is met for the first time, as its volume may have been given another size before, and when its size changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from agent_image.drivers.zfs.devices import volume_of
from agent_image.drivers.zfs.index import PoolIndex
from imaging.errors import InvalidNameError
from imaging.names import DatasetName, PoolName

PARTITIONS = Path("/proc/partitions")
UNIT_BYTES = 1024
"""What that file counts in: a change by less shows when everything is compared."""
_DEVICE = re.compile(rb"^ *\d+ +\d+ +(\d+) (zd\d+)$", re.MULTILINE)
"""major minor #blocks name; a partition has a p after the number."""


class DeviceSizes:
    """Remembers the sizes of volumes' devices from one look to the next."""

    def __init__(
        self,
        pool: PoolName,
        *,
        partitions: Path = PARTITIONS,
        volume_behind: Callable[[Path], str | None] = volume_of,
    ) -> None:
        self._pool = pool
        self._partitions = partitions
        self._volume_behind = volume_behind
        self._seen: dict[bytes, int] = {}

    def remember(self) -> None:
        """Take the sizes there are as those of the index, which is about to be filled."""
        self._seen = self._read()

    def differing(self, index: PoolIndex) -> list[DatasetName]:
        """Volumes the index should be told about, among the devices that are new or changed since the last look."""
        before, self._seen = self._seen, self._read()
        asked = [node for node, size in self._seen.items() if before.get(node) != size]
        return [name for node in asked if (name := self._differing(node, index)) is not None]

    def _differing(self, node: bytes, index: PoolIndex) -> DatasetName | None:
        name = self._name(node)
        if name is None or name.pool != self._pool:
            return None
        info = index.find(name)
        if info is None:
            return name
        is_known = info.guid == 0 or (info.volsize_bytes or 0) // UNIT_BYTES == self._seen[node]
        return None if is_known else name  # one with guid 0 is being received

    def _name(self, node: bytes) -> DatasetName | None:
        """None also for devices of snapshots."""
        name = self._volume_behind(Path("/dev", node.decode()))
        try:
            return None if name is None else DatasetName.parse(name)
        except InvalidNameError:
            return None

    def _read(self) -> dict[bytes, int]:
        return {name: int(size) for size, name in _DEVICE.findall(self._partitions.read_bytes())}
