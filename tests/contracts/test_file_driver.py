"""The file driver keeps the contract of storage drivers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_image.drivers.base import StorageDriver
from agent_image.drivers.file import FileDriver
from imaging.names import PoolName
from tests.contracts.storage_driver import StorageDriverContract

POOL = PoolName.parse("tank")


class TestFileDriver(StorageDriverContract):
    @pytest.fixture
    def driver(self, tmp_path: Path) -> Iterator[StorageDriver]:
        driver = FileDriver(POOL, tmp_path, size_bytes=self.POOL_BYTES)
        driver.open()
        yield driver
        driver.close()

    @pytest.fixture
    def rival(self, driver: StorageDriver, tmp_path: Path) -> StorageDriver:
        return FileDriver(POOL, tmp_path, size_bytes=self.POOL_BYTES)
