"""The zfs driver keeps the contract of storage drivers, on a real pool."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agent_image.drivers.base import StorageDriver
from agent_image.drivers.zfs import ZfsDriver
from tests.contracts.storage_driver import StorageDriverContract
from tests.integration.zfs_pool import lab_pool, there

pytestmark = pytest.mark.backend("zfs")


@pytest.fixture(scope="module")
def shared() -> Iterator[ZfsDriver]:
    driver = ZfsDriver(lab_pool())
    driver.open()
    yield driver
    driver.close()
    assert [name for name in there(driver.pool) if ".mistify-" in name] == []


class TestZfsDriver(StorageDriverContract):
    """Every rule of the contract."""

    @pytest.fixture
    def driver(self, shared: ZfsDriver) -> StorageDriver:
        return shared

    @pytest.fixture
    def rival(self, driver: StorageDriver) -> StorageDriver:
        return ZfsDriver(driver.pool)
