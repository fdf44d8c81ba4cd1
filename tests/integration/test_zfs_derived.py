"""Derived images on real ZFS: streams and increments made without ZFS are received by the kernel, and give the disks they were made of."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent_image.drivers.zfs import ZfsDriver
from imaging.digests import Digest
from imaging.errors import ConflictError
from imaging.names import DatasetName, SnapshotName
from tests.contracts.storage_driver_tools import read_all, stream_of, take, write
from tests.fakes.derive_world import DeriveWorld, open_derive_world, unpack
from tests.fakes.disk_files import changed, disk_bytes, qcow2
from tests.integration.zfs_pool import lab_driver, new_place

pytestmark = pytest.mark.backend("zfs")

OLD = disk_bytes(1, 256)
NEW = changed(OLD, 3, 40, 200)
LONGER = changed(NEW, 7) + disk_bytes(4, 16)


@pytest.fixture(scope="module")
def driver() -> Iterator[ZfsDriver]:
    with lab_driver() as driver:
        yield driver


@pytest.fixture
def place(driver: ZfsDriver) -> Iterator[DatasetName]:
    with new_place(driver, "derived") as name:
        yield name


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[DeriveWorld]:
    async with open_derive_world(tmp_path / "world") as world:
        yield world


def take_in(driver: ZfsDriver, target: SnapshotName, stream: bytes, origin: SnapshotName | None = None) -> int:
    """Receive a stream; the snapshot's guid."""
    return driver.receive(target, io.BytesIO(unpack(stream)), origin=origin).guid


async def test_derived_streams_of_every_format_make_the_disk(
    driver: ZfsDriver, place: DatasetName, world: DeriveWorld, tmp_path: Path
) -> None:
    guids = set()
    for number, data in enumerate([OLD, qcow2(tmp_path, OLD), qcow2(tmp_path, OLD, "-c")]):
        world.add(f"img{number}", data)
        target = (place / f"v{number}") @ "image"
        guids.add(take_in(driver, target, await world.get(f"img{number}", format="zvol")))
        assert read_all(driver, target) == OLD
    assert len(guids) == 1


async def test_derived_increments_make_the_newer_disk_in_place_and_as_a_clone(
    driver: ZfsDriver, place: DatasetName, world: DeriveWorld, tmp_path: Path
) -> None:
    world.add("old", OLD)
    world.add("new", qcow2(tmp_path, NEW, "-c"))
    world.add("longer", LONGER)
    base = (place / "v") @ "old"
    take_in(driver, base, await world.get("old", format="zvol"))
    first, second = await world.get("new", base="old"), await world.get("longer", base="new")
    take_in(driver, (place / "v") @ "new", first)
    take_in(driver, (place / "v") @ "longer", second)
    assert read_all(driver, (place / "v") @ "new") == NEW
    assert read_all(driver, (place / "v") @ "longer") == LONGER
    clone = (place / "w") @ "image"
    guid = take_in(driver, clone, first, origin=base)
    assert read_all(driver, clone) == NEW
    assert driver.get(place / "w").origin == base
    assert guid == take_in(driver, (place / "x") @ "image", await world.get("new", format="zvol"))
    take_in(driver, (place / "y") @ "image", second, origin=clone)
    assert read_all(driver, (place / "y") @ "image") == LONGER
    with pytest.raises(ConflictError):
        take_in(driver, (place / "z") @ "image", second, origin=base)


async def test_stream_of_a_real_send_is_the_same_image_and_a_base(
    driver: ZfsDriver, place: DatasetName, world: DeriveWorld
) -> None:
    """A volume written here and sent by the kernel has the disk's content, and an increment made from it fits the volume."""
    volume = place / "v"
    driver.create_volume(volume, len(OLD), thin=True, volblocksize_bytes=16 << 10)
    write(driver, volume, 0, OLD)
    take(driver, volume @ "sent")
    world.add("sent", stream_of(driver, volume @ "sent"))
    world.add("new", NEW)
    raw = await world.get("sent", format="raw", compression="none")
    assert Digest.of(raw) == Digest.of(OLD)
    take_in(driver, volume @ "new", await world.get("new", base="sent"))
    assert read_all(driver, volume @ "new") == NEW
