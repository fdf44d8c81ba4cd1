"""Hundreds of volumes at once, with udev at work and with none that makes links to their devices: what callers of the zfs driver see."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent_image.drivers.zfs import ZfsDriver
from agent_image.drivers.zfs.devices import UDEV_CONTROL, Devices, volume_of
from imaging.names import DatasetName
from tests.contracts.storage_driver_tools import MIB
from tests.integration.zfs_pool import lab_driver, lab_pool, run, there

pytestmark = pytest.mark.backend("zfs")

VOLUMES_AT_ONCE = 300
LONG_TIMEOUT_S = 1200
DEVICE_TIMEOUT_S = 600.0
"""udev looks into each new device; under emulation that takes it the better part of a second."""
SETTLE_TIMEOUT_S = 600


@contextmanager
def no_udev() -> Iterator[None]:
    """udev does nothing in the lab's virtual machine, if it runs there at all; elsewhere it is not ours to stop."""
    if os.environ.get("MISTIFY_LAB_KIND") != "vm" or not UDEV_CONTROL.exists():
        yield
        return
    run("udevadm", "settle", "--timeout=60")
    run("udevadm", "control", "--stop-exec-queue")
    try:
        yield
    finally:
        run("udevadm", "control", "--start-exec-queue")


def make_many(driver: ZfsDriver, place: DatasetName) -> list[DatasetName]:
    """Make them at once and ask for their devices meanwhile: each caller is given the device of its own volume."""
    names = [place / f"v{number}" for number in range(VOLUMES_AT_ONCE)]
    with ThreadPoolExecutor(4) as executor:
        made = [executor.submit(driver.create_volume, name, MIB, thin=True) for name in names]
        paths = [executor.submit(driver.device, name, timeout_s=DEVICE_TIMEOUT_S) for name in names]
        assert {future.result().name for future in made} == set(names)
        found = [future.result() for future in paths]
    assert [volume_of(path) for path in found] == [str(name) for name in names]
    assert len(set(found)) == VOLUMES_AT_ONCE
    assert [str(info.name) for info in driver.list(place)] == there(place)
    return names


@pytest.mark.timeout(LONG_TIMEOUT_S)
def test_hundreds_of_volumes_without_udev_all_get_their_own_device(tmp_path: Path) -> None:
    """No links: each device must be found by asking the kernel whose it is."""
    blind = ZfsDriver(lab_pool(), link_directory=tmp_path / "no-links", link_timeout_s=0.0, device_busy_timeout_s=30.0)
    blind.open()
    try:
        place = blind.create_filesystem(blind.pool.root / "many").name
        with no_udev():
            make_many(blind, place)
            blind.destroy(place, recursive=True)
    finally:
        blind.close()


@pytest.mark.timeout(LONG_TIMEOUT_S)
def test_hundreds_of_volumes_while_udev_is_busy_with_them_all_get_their_own_device() -> None:
    """Links come late, in any order, and udev has devices open: nobody is told another's, and in the end all have their links."""
    with lab_driver(device_busy_timeout_s=DEVICE_TIMEOUT_S) as driver:
        place = driver.create_filesystem(driver.pool.root / "many").name
        names = make_many(driver, place)
        if UDEV_CONTROL.exists():
            run("udevadm", "settle", f"--timeout={SETTLE_TIMEOUT_S}", timeout_s=SETTLE_TIMEOUT_S)
            linked = [Devices().wait_linked(str(name), DEVICE_TIMEOUT_S) for name in names]
            assert linked == [Path("/dev/zvol", str(name)) for name in names]
        driver.destroy(place, recursive=True)
