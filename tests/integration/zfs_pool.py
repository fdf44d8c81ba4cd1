"""Real pools for tests: the one the ZFS lab made, and small ones of a test's own. Run them with tests/lab/test-zfs."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent_image.drivers.zfs import ZfsDriver
from imaging.names import DatasetName, PoolName
from tests.contracts.storage_driver_tools import clear
from tests.waiting import wait_until

PROGRAM_TIMEOUT_S = 120

_serial = itertools.count(1)


def lab_pool() -> PoolName:
    """The pool the lab made for us; without a lab the test fails and says where there is one."""
    text = os.environ.get("MISTIFY_LAB_POOL")
    if text is None:
        pytest.fail("there is no pool to test on; run tests/lab/test-zfs (or leave out: --without zfs)", pytrace=False)
    return PoolName.parse(text)


@contextmanager
def lab_driver(**settings: Any) -> Iterator[ZfsDriver]:
    """A driver on the lab's pool, open for the block."""
    driver = ZfsDriver(lab_pool(), **settings)
    driver.open()
    try:
        yield driver
    finally:
        driver.close()


@contextmanager
def new_place(driver: ZfsDriver, what: str) -> Iterator[DatasetName]:
    """An empty filesystem for the block, and nothing of it afterwards."""
    name = driver.pool.root / f"{what}-{next(_serial)}"
    driver.create_filesystem(name)
    yield name
    clear(driver, name)


def run(*command: object, check: bool = True, timeout_s: float = PROGRAM_TIMEOUT_S) -> str:
    """Run a program as an administrator would; what it printed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False)
    if check:
        assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def there(root: DatasetName | PoolName | str) -> list[str]:
    """Everything below ``root`` as ZFS itself lists it, hidden datasets included."""
    return run("zfs", "list", "-H", "-r", "-t", "all", "-o", "name", root).splitlines()


def sparse_file(path: Path, size_bytes: int) -> Path:
    """A file that takes no space yet, to be a pool's disk."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


@contextmanager
def made_pool(name: str, disk: Path) -> Iterator[PoolName]:
    """A pool on ``disk`` for the block. At its end it is scrubbed, and must be whole: nothing a test does may damage it.

    A file is removed then: in the lab it lies in memory.
    """
    run("zpool", "create", "-f", "-o", "cachefile=none", "-O", "mountpoint=none", name, disk)
    try:
        yield PoolName.parse(name)
        assert_whole(name)
    finally:
        run("zpool", "destroy", "-f", name)
        if disk.is_file():
            disk.unlink()


def assert_whole(pool: PoolName | str) -> None:
    """Read everything in the pool: no checksum error anywhere."""
    run("zpool", "scrub", "-w", pool)
    assert "No known data errors" in run("zpool", "status", pool)


def make_empty(pool: str) -> None:
    """Destroy everything in a pool that nobody serves, as soon as udev lets go of its devices."""

    def is_empty() -> bool:
        for child in run("zfs", "list", "-H", "-d", "1", "-o", "name", pool).splitlines()[1:]:
            run("zfs", "destroy", "-R", child, check=False)
        return there(pool) == [pool]

    wait_until(is_empty, f"pool {pool} to be empty")
