"""Hundreds of volumes at once, and no udev that makes links to their devices: what callers of the zfs driver see."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent_image.drivers.zfs import ZfsDriver
from agent_image.drivers.zfs.devices import UDEV_CONTROL, volume_of
from tests.contracts.storage_driver_tools import MIB
from tests.integration.zfs_pool import lab_pool, run, there

pytestmark = pytest.mark.backend("zfs")

VOLUMES_AT_ONCE = 300
LONG_TIMEOUT_S = 1200
DEVICE_TIMEOUT_S = 120.0


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


@pytest.mark.timeout(LONG_TIMEOUT_S)
def test_hundreds_of_volumes_without_udev_all_get_their_own_device(tmp_path: Path) -> None:
    """No links: each device must be found by asking the kernel whose it is."""
    blind = ZfsDriver(lab_pool(), link_directory=tmp_path / "no-links", link_timeout_s=0.0, device_busy_timeout_s=30.0)
    blind.open()
    place = blind.pool.root / "many"
    blind.create_filesystem(place)
    try:
        with no_udev(), ThreadPoolExecutor(4) as executor:
            names = [place / f"v{number}" for number in range(VOLUMES_AT_ONCE)]
            made = [executor.submit(blind.create_volume, name, MIB, thin=True) for name in names]
            paths = [executor.submit(blind.device, name, timeout_s=DEVICE_TIMEOUT_S) for name in names]
            assert {future.result().name for future in made} == set(names)
            found = [future.result() for future in paths]
            assert [volume_of(path) for path in found] == [str(name) for name in names]
            assert len(set(found)) == VOLUMES_AT_ONCE
            assert [str(info.name) for info in blind.list(place)] == there(place)
            blind.destroy(place, recursive=True)
    finally:
        blind.close()
