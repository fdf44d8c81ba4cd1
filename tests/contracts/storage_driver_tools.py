"""What the parts of the contract suite share: a place to work in, and short ways to put bytes in and get them out."""

from __future__ import annotations

import io
import itertools
import os
import random
import tempfile
from collections.abc import Iterator, Sequence

import pytest

from agent_image.drivers.base import DatasetInfo, SendFlags, SnapshotInfo, StorageDriver
from imaging.errors import BusyError
from imaging.names import DatasetName, SnapshotName
from tests.waiting import wait_until

MIB = 1 << 20
BLOCK_BYTES = 8192
VOLUME_BYTES = 4 * MIB

_serial = itertools.count(1)


class Suite:
    """Base of the parts of the suite."""

    POOL_BYTES = 512 * MIB

    @pytest.fixture
    def driver(self) -> StorageDriver:
        raise AssertionError("a subclass gives the driver")

    @pytest.fixture
    def rival(self) -> StorageDriver:
        raise AssertionError("a subclass gives the rival")

    @pytest.fixture
    def place(self, driver: StorageDriver) -> Iterator[DatasetName]:
        name = driver.pool.root / f"contract-{os.getpid()}-{next(_serial)}"
        driver.create_filesystem(name)
        yield name
        clear(driver, name)


def clear(driver: StorageDriver, name: DatasetName) -> None:
    """Destroy everything a test made, whatever holds it."""
    for snapshot in driver.list_snapshots(name):
        for tag in driver.holds(snapshot.name):
            driver.release(snapshot.name, tag)

    def destroyed() -> bool:
        try:
            driver.destroy(name, recursive=True)
        except BusyError:  # somebody (udev) looks at a device
            return False
        return True

    wait_until(destroyed, f"destruction of {name}")


def noise(seed: int, size_bytes: int = BLOCK_BYTES) -> bytes:
    """Bytes nothing can compress, the same for the same seed."""
    return random.Random(seed).randbytes(size_bytes)


def make_volume(
    driver: StorageDriver, name: DatasetName, *, size_bytes: int = VOLUME_BYTES, thin: bool = True
) -> DatasetInfo:
    return driver.create_volume(name, size_bytes, thin=thin, volblocksize_bytes=BLOCK_BYTES)


def write(driver: StorageDriver, name: DatasetName, offset: int, data: bytes) -> None:
    with driver.open_volume(name, writable=True) as fd:
        assert os.pwrite(fd, data, offset) == len(data)


def read(driver: StorageDriver, name: DatasetName | SnapshotName, offset: int, size_bytes: int) -> bytes:
    opened = driver.open_snapshot(name) if isinstance(name, SnapshotName) else driver.open_volume(name)
    with opened as fd:
        return os.pread(fd, size_bytes, offset)


def read_all(driver: StorageDriver, name: DatasetName | SnapshotName) -> bytes:
    info: DatasetInfo | SnapshotInfo
    info = driver.get_snapshot(name) if isinstance(name, SnapshotName) else driver.get(name)
    assert info.volsize_bytes is not None
    return read(driver, name, 0, info.volsize_bytes)


def take(driver: StorageDriver, name: SnapshotName) -> SnapshotInfo:
    (made,) = driver.snapshot(name)
    return made


def stream_of(
    driver: StorageDriver, name: SnapshotName, *, base: str | None = None, flags: SendFlags | None = None
) -> bytes:
    with tempfile.TemporaryFile() as target:
        driver.send(name, target.fileno(), base=base, flags=flags or SendFlags())
        target.seek(0)
        return target.read()


def receive(
    driver: StorageDriver, target: SnapshotName, stream: bytes, *, origin: SnapshotName | None = None
) -> SnapshotInfo:
    return driver.receive(target, io.BytesIO(stream), origin=origin)


def names(infos: Sequence[DatasetInfo] | Sequence[SnapshotInfo]) -> list[str]:
    return [str(info.name) for info in infos]
