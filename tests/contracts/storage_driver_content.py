"""Rules on the bytes of volumes."""

from __future__ import annotations

import os

import pytest

from agent_image.drivers.base import StorageDriver
from imaging.errors import NotPermittedError
from imaging.names import DatasetName
from tests.contracts.storage_driver_tools import (
    BLOCK_BYTES,
    VOLUME_BYTES,
    Suite,
    make_volume,
    noise,
    read,
    read_all,
    take,
    write,
)


class ContentRules(Suite):
    """device, open_volume, open_snapshot."""

    def test_device_is_the_volume(self, driver: StorageDriver, place: DatasetName) -> None:
        """A guest writes there, the driver reads it, and the other way round."""
        make_volume(driver, place / "v")
        write(driver, place / "v", 0, noise(1))
        path = driver.device(place / "v")
        assert path.is_absolute()
        with path.open("r+b", buffering=0) as device:
            assert device.seek(0, os.SEEK_END) == VOLUME_BYTES
            device.seek(0)
            assert device.read(BLOCK_BYTES) == noise(1)
            device.write(noise(2))
            os.fsync(device.fileno())
        assert read(driver, place / "v", 0, 2 * BLOCK_BYTES) == noise(1) + noise(2)

    def test_device_stays_the_same_path(self, driver: StorageDriver, place: DatasetName) -> None:
        """It stands in a guest's configuration: snapshots, writes and rollbacks must not move it."""
        make_volume(driver, place / "v")
        path = driver.device(place / "v")
        take(driver, (place / "v") @ "s")
        write(driver, place / "v", 0, noise(1))
        driver.rollback((place / "v") @ "s")
        assert driver.device(place / "v") == path
        with path.open("r+b", buffering=0) as device:
            device.write(noise(2))
        assert read(driver, place / "v", 0, BLOCK_BYTES) == noise(2)

    def test_device_of_a_clone_is_its_own(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        write(driver, place / "v", 0, noise(1))
        take(driver, (place / "v") @ "s")
        driver.clone((place / "v") @ "s", place / "c")
        with driver.device(place / "c").open("r+b", buffering=0) as device:
            assert device.read(BLOCK_BYTES) == noise(1)
            device.seek(0)
            device.write(noise(2))
        assert driver.device(place / "c") != driver.device(place / "v")
        assert read(driver, place / "v", 0, BLOCK_BYTES) == noise(1)
        assert read(driver, (place / "v") @ "s", 0, BLOCK_BYTES) == noise(1)

    def test_device_follows_a_rename(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        with driver.device(place / "v").open("r+b", buffering=0) as device:
            device.write(noise(1))
        driver.rename(place / "v", place / "w")
        with driver.device(place / "w").open("rb", buffering=0) as device:
            assert device.read(BLOCK_BYTES) == noise(1)

    def test_device_of_a_new_volume_under_an_old_name_is_the_new_one(
        self, driver: StorageDriver, place: DatasetName
    ) -> None:
        make_volume(driver, place / "v")
        with driver.device(place / "v").open("r+b", buffering=0) as device:
            device.write(noise(1))
        driver.destroy(place / "v")
        make_volume(driver, place / "v")
        with driver.device(place / "v").open("rb", buffering=0) as device:
            assert device.read(BLOCK_BYTES) == bytes(BLOCK_BYTES)

    def test_device_after_a_resize_has_the_new_size(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        driver.device(place / "v")
        driver.resize(place / "v", 2 * VOLUME_BYTES)
        with driver.device(place / "v").open("rb", buffering=0) as device:
            assert device.seek(0, os.SEEK_END) == 2 * VOLUME_BYTES

    def test_volume_opened_to_read_cannot_be_written(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        take(driver, (place / "v") @ "s")
        for opened in (driver.open_volume(place / "v"), driver.open_snapshot((place / "v") @ "s")):
            with opened as fd, pytest.raises(OSError):  # noqa: PT011 -- EBADF or EPERM, as the kernel likes
                os.pwrite(fd, b"x", 0)

    def test_written_volume_reads_the_same_after_close_and_open(
        self, driver: StorageDriver, place: DatasetName
    ) -> None:
        make_volume(driver, place / "v")
        write(driver, place / "v", VOLUME_BYTES - BLOCK_BYTES, noise(1))
        driver.close()
        driver.open()
        assert read_all(driver, place / "v") == bytes(VOLUME_BYTES - BLOCK_BYTES) + noise(1)

    def test_snapshot_sees_what_an_open_writer_has_written(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        with driver.open_volume(place / "v", writable=True) as fd:
            os.pwrite(fd, noise(1), 0)
            os.fsync(fd)
            take(driver, (place / "v") @ "s1")
            os.pwrite(fd, noise(2), 0)
            os.fsync(fd)
            take(driver, (place / "v") @ "s2")
        assert read(driver, (place / "v") @ "s1", 0, BLOCK_BYTES) == noise(1)
        assert read(driver, (place / "v") @ "s2", 0, BLOCK_BYTES) == noise(2)

    def test_readonly_volume_is_not_opened_to_write(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        write(driver, place / "v", 0, noise(1))
        driver.set_properties(place / "v", {"readonly": "on"})
        with pytest.raises(NotPermittedError), driver.open_volume(place / "v", writable=True):
            pass
        assert read(driver, place / "v", 0, BLOCK_BYTES) == noise(1)
        driver.set_properties(place / "v", {"readonly": "off"})
        write(driver, place / "v", 0, noise(2))
        assert read(driver, place / "v", 0, BLOCK_BYTES) == noise(2)

    def test_readonly_is_inherited_until_something_nearer_says_otherwise(
        self, driver: StorageDriver, place: DatasetName
    ) -> None:
        driver.create_filesystem(place / "f", properties={"readonly": "on"})
        make_volume(driver, place / "f" / "v")
        with pytest.raises(NotPermittedError), driver.open_volume(place / "f" / "v", writable=True):
            pass
        driver.set_properties(place / "f" / "v", {"readonly": "off"})
        write(driver, place / "f" / "v", 0, noise(1))
        driver.set_properties(place / "f" / "v", {"readonly": None})
        with pytest.raises(NotPermittedError), driver.open_volume(place / "f" / "v", writable=True):
            pass
        driver.set_properties(place / "f", {"readonly": None})
        write(driver, place / "f" / "v", 0, noise(2))
        assert read(driver, place / "f" / "v", 0, BLOCK_BYTES) == noise(2)
