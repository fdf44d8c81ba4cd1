"""Volumes whose devices have another size than the index says: ``zfs set volsize`` leaves no event.

Reading the files of /sys costs little, asking a device which volume it is costs an open. So a device is asked when it is met for
the first time, as its volume may have been given another size before, and when its size changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from agent_image.drivers.zfs.devices import DEVICE_NAME, SYS_BLOCK, Node, volume_of
from agent_image.drivers.zfs.index import PoolIndex
from imaging.errors import InvalidNameError
from imaging.names import DatasetName, PoolName

SECTOR_BYTES = 512
"""What /sys counts in, whatever the device."""


class DeviceSizes:
    """Remembers the sizes of volumes' devices from one look to the next."""

    def __init__(
        self,
        pool: PoolName,
        *,
        sys_block: Path = SYS_BLOCK,
        volume_behind: Callable[[Path], str | None] = volume_of,
    ) -> None:
        self._pool = pool
        self._sys_block = sys_block
        self._volume_behind = volume_behind
        self._seen: dict[Node, int] = {}

    def remember(self) -> None:
        """Take the sizes there are as those of the index, which is about to be filled."""
        self._seen = self._read()

    def differing(self, index: PoolIndex) -> list[DatasetName]:
        """Volumes the index should be told about, among the devices that are new or changed since the last look."""
        before, self._seen = self._seen, self._read()
        asked = [node for node, size_bytes in self._seen.items() if before.get(node) != size_bytes]
        return [name for node in asked if (name := self._differing(node, index)) is not None]

    def _differing(self, node: Node, index: PoolIndex) -> DatasetName | None:
        name = self._name(node)
        if name is None or name.pool != self._pool:
            return None
        info = index.find(name)
        if info is not None and (info.guid == 0 or info.volsize_bytes == self._seen[node]):
            return None  # one with guid 0 is being received
        return name

    def _name(self, node: Node) -> DatasetName | None:
        """None also for devices of snapshots."""
        name = self._volume_behind(Path("/dev", node.name))
        try:
            return None if name is None else DatasetName.parse(name)
        except InvalidNameError:
            return None

    def _read(self) -> dict[Node, int]:
        sizes = {}
        with os.scandir(self._sys_block) as entries:
            for entry in entries:
                if DEVICE_NAME.match(entry.name):
                    try:
                        sectors = int(Path(entry.path, "size").read_text())
                    except OSError:  # destroyed while we look
                        continue
                    sizes[Node(entry.name, entry.inode())] = sectors * SECTOR_BYTES
        return sizes
