"""Sizes of devices beside those of the index, on a file in the place of /proc/partitions."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_image.drivers.base import DatasetInfo, DatasetKind
from agent_image.drivers.zfs.index import PoolIndex
from agent_image.drivers.zfs.sizes import UNIT_BYTES, DeviceSizes
from imaging.names import DatasetName, PoolName

MIB = 1 << 20
VOLUME = DatasetName.parse("tank/v")


class World:
    """Devices by node, their volumes, and an index with one volume."""

    def __init__(self, partitions: Path) -> None:
        self.partitions = partitions
        self.shown = {"vda": 252 << 30, "vda1": 251 << 30}
        self.volumes: dict[str, str] = {}
        self.asked: list[str] = []
        self.index = PoolIndex()
        self.sizes = DeviceSizes(PoolName.parse("tank"), partitions=partitions, volume_behind=self._ask)

    def _ask(self, device: Path) -> str | None:
        self.asked.append(device.name)
        return self.volumes.get(device.name)

    def device(self, node: str, volume: str, size_bytes: int) -> None:
        self.volumes[node] = volume
        self.shown[node] = size_bytes

    def known(self, size_bytes: int, *, guid: int = 7) -> None:
        self.index.put(DatasetInfo(VOLUME, DatasetKind.VOLUME, guid, 1, 1, volsize_bytes=size_bytes))

    def show(self) -> None:
        lines = [
            f" 230 {number:8} {size // UNIT_BYTES:10} {node}" for number, (node, size) in enumerate(self.shown.items())
        ]
        self.partitions.write_text("\n".join(["major minor  #blocks  name", "", *lines, ""]))

    def remember(self) -> None:
        self.show()
        self.sizes.remember()

    def differing(self) -> list[DatasetName]:
        self.asked.clear()
        self.show()
        return self.sizes.differing(self.index)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "partitions")


def test_new_size_shows_once_it_is_there(world: World) -> None:
    world.known(MIB)
    world.device("zd0", "tank/v", MIB)
    assert world.differing() == []
    world.device("zd0", "tank/v", 3 * MIB)
    assert world.differing() == [VOLUME]
    world.known(3 * MIB)
    assert world.differing() == []
    assert world.asked == [], "a device that is as before is not opened"


def test_size_that_changed_before_the_device_was_ever_met_shows(world: World) -> None:
    world.known(MIB)
    world.device("zd0", "tank/v", 3 * MIB)
    assert world.differing() == [VOLUME]


def test_size_that_changed_while_the_index_was_filled_shows(world: World) -> None:
    world.device("zd0", "tank/v", MIB)
    world.remember()
    world.device("zd0", "tank/v", 3 * MIB)
    world.known(MIB)
    assert world.differing() == [VOLUME]


def test_own_resize_is_no_difference(world: World) -> None:
    world.known(MIB)
    world.device("zd0", "tank/v", MIB)
    world.remember()
    world.device("zd0", "tank/v", 3 * MIB)
    world.known(3 * MIB)
    assert world.differing() == []
    assert world.asked == ["zd0"]


def test_what_is_no_volume_of_the_pool_does_not_matter(world: World) -> None:
    world.device("zd0", "other/v", MIB)
    world.device("zd16", "tank/v@s", MIB)
    world.device("sda", "tank/v", MIB)
    world.device("zd32p1", "tank/v", MIB)
    assert world.differing() == []


def test_volume_that_is_being_received_is_not_looked_at(world: World) -> None:
    world.known(0, guid=0)
    world.device("zd0", "tank/v", MIB)
    assert world.differing() == []
