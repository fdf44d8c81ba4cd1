"""A pool that goes away under calls that are under way: suspended because its disk fails, or exported by an administrator.

What is under way when the disk fails hangs in the kernel until the disk is back and ``zpool clear`` was said; nothing can end it
sooner. All other calls are answered: reads from the index, changes with UnavailableError. Afterwards each change has happened or has not.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from agent_image.app import CHANGE_THREADS
from agent_image.drivers.zfs import ZfsDriver
from imaging.errors import NotFoundError, UnavailableError
from imaging.names import PoolName
from tests.acceptance.daemons import Agent, start_agent
from tests.codec import samples
from tests.contracts.storage_driver_tools import make_volume, noise, read, receive, stream_of, take, write
from tests.integration.zfs_pool import PROGRAM_TIMEOUT_S, made_pool, run, sparse_file, there
from tests.waiting import PATIENCE, wait_until

pytestmark = pytest.mark.backend("zfs")

POOL_BYTES = 512 << 20
SECTOR_BYTES = 512
END_TIMEOUT_S = 60.0 * PATIENCE
CALLERS = 2 * CHANGE_THREADS
ROUNDS = 2
"""Of each worker, before and after the pool was away."""


class FailingDisk:
    """A disk that fails on demand: a mapped device whose table is changed to one that answers every request with an error."""

    def __init__(self, file: Path) -> None:
        sparse_file(file, POOL_BYTES)
        run("modprobe", "-a", "loop", "dm-mod")
        self._loop = run("losetup", "--find", "--show", file).strip()
        self._name = f"mistify-lab-{os.getpid()}"
        self._good = f"0 {POOL_BYTES // SECTOR_BYTES} linear {self._loop} 0"
        run("dmsetup", "create", "--noudevsync", self._name, "--table", self._good)
        run("dmsetup", "mknodes", self._name)
        self.path = Path("/dev/mapper", self._name)

    def _become(self, table: str) -> None:
        run("dmsetup", "suspend", "--noudevsync", "--noflush", "--nolockfs", self._name)
        run("dmsetup", "load", self._name, "--table", table)
        run("dmsetup", "resume", "--noudevsync", self._name)

    def fail(self) -> None:
        """Every request is an error from now on."""
        self._become(f"0 {POOL_BYTES // SECTOR_BYTES} error")

    def mend(self) -> None:
        """It works again."""
        self._become(self._good)

    def remove(self) -> None:
        """Give the devices back."""
        run("dmsetup", "remove", "--noudevsync", "--retry", self._name)
        run("losetup", "--detach", self._loop)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FailingDisk]:
    disk = FailingDisk(tmp_path / "disk")
    yield disk
    disk.mend()
    disk.remove()


@pytest.fixture
def lost(disk: FailingDisk) -> Iterator[ZfsDriver]:
    with made_pool(f"lost{os.getpid()}", disk.path) as pool:
        driver = ZfsDriver(pool)
        driver.open()
        yield driver
        driver.close()


class Halting:
    """A source that gives half of a stream, then waits to be told to give the rest."""

    def __init__(self, data: bytes) -> None:
        self._first, self._rest = data[: len(data) // 2], data[len(data) // 2 :]
        self.is_halfway, self.may_go_on = threading.Event(), threading.Event()

    def read(self, _size: int = -1, /) -> bytes:
        if self._first:
            data, self._first = self._first, b""
            return data
        self.is_halfway.set()
        assert self.may_go_on.wait(END_TIMEOUT_S)
        data, self._rest = self._rest, b""
        return data


def is_suspended(pool: PoolName) -> bool:
    return run("zpool", "list", "-H", "-o", "health", pool).strip() == "SUSPENDED"


def unless_refused(call: Callable[[], object]) -> None:
    try:
        call()
    except UnavailableError:
        return


def test_pool_suspended_in_mid_call_is_unavailable_until_its_disk_is_back(disk: FailingDisk, lost: ZfsDriver) -> None:
    root = lost.pool.root
    make_volume(lost, root / "v")
    write(lost, root / "v", 0, noise(1))
    snapshot = take(lost, (root / "v") @ "s")
    source = Halting(stream_of(lost, snapshot.name))
    run("zpool", "sync", lost.pool)
    with ThreadPoolExecutor(4) as executor:
        receiving: Future[object] = executor.submit(lost.receive, (root / "w") @ "s", source)
        assert source.is_halfway.wait(END_TIMEOUT_S)
        disk.fail()
        source.may_go_on.set()
        hanging = [
            executor.submit(lost.create_filesystem, root / "f"),
            executor.submit(lost.rename, root / "v", root / "x"),
        ]
        try:
            wait_until(lambda: is_suspended(lost.pool), "the pool to be suspended")
            with pytest.raises(UnavailableError):
                lost.create_filesystem(root / "g")
            with pytest.raises(UnavailableError):
                lost.usage(root)
            with pytest.raises(UnavailableError):
                lost.destroy_snapshot(snapshot.name)
            assert lost.get(root).name == root
        finally:
            disk.mend()
            run("zpool", "clear", lost.pool)
        for call in [receiving, *hanging]:
            unless_refused(lambda call=call: call.result(END_TIMEOUT_S))  # type: ignore[misc]
    wait_until(lambda: not is_suspended(lost.pool), "the pool to be back")
    check_whole_names(lost)
    volume = root / ("x" if f"{root}/x" in there(root) else "v")
    assert read(lost, volume @ "s", 0, 8192) == noise(1)
    if f"{root}/w" in there(root):
        assert lost.get_snapshot((root / "w") @ "s").guid == snapshot.guid
    else:
        receive(lost, (root / "w") @ "s", stream_of(lost, volume @ "s"))
    lost.create_filesystem(root / "g")


@pytest.fixture
def lost_agent(disk: FailingDisk, tmp_path: Path) -> Iterator[Agent]:
    with (
        made_pool(f"lost{os.getpid()}", disk.path) as pool,
        start_agent(tmp_path / "state", driver="zfs", zpool=str(pool)) as agent,
    ):
        yield agent


def test_agent_answers_while_its_pool_is_suspended(disk: FailingDisk, lost_agent: Agent) -> None:
    """More changes hang in the kernel, or wait for one that does, than the agent has threads for them."""
    pool = PoolName.parse(f"lost{os.getpid()}")
    volume = lost_agent.call("CreateVolume", id="v", size=1)["volumes"][0]
    snapshot = lost_agent.call("CreateSnapshot", id="v", dest="s")["snapshots"][0]
    run("zpool", "sync", pool)
    with ThreadPoolExecutor(CALLERS) as executor:
        disk.fail()
        changes = [
            executor.submit(lost_agent.raw_call, "CreateVolume", {"id": f"n{number}", "size": 1})
            for number in range(CALLERS)
        ]
        try:
            wait_until(lambda: is_suspended(pool), "the pool to be suspended")
            assert lost_agent.call("GetVolume", id="v")["volumes"] == [volume]
            assert lost_agent.call("ListSnapshots")["snapshots"] == [snapshot]
            assert "suspended" in lost_agent.error("CreateVolume", id="late", size=1)
        finally:
            disk.mend()
            run("zpool", "clear", pool)
        errors = [change.result(END_TIMEOUT_S)["error"] for change in changes]
    assert all(error is None or "suspended" in error for error in errors), errors
    wait_until(lambda: not is_suspended(pool), "the pool to be back")
    for number in range(CALLERS):
        lost_agent.call("CreateVolume", id=f"n{number}", size=1)
    shown = {one["id"] for one in lost_agent.call("ListVolumes")["volumes"]}
    assert shown == {f"{pool}/v"} | {f"{pool}/n{number}" for number in range(CALLERS)}


def check_whole_names(driver: ZfsDriver) -> None:
    """Nothing hidden is left, and the driver shows what ZFS shows."""
    root = driver.pool.root

    def agree() -> bool:
        shown = [str(info.name) for info in driver.list(root)] + [
            str(info.name) for info in driver.list_snapshots(root)
        ]
        return sorted(there(root)) == sorted(shown)

    wait_until(agree, f"the driver to show what is there: {there(root)}")


class Worker:
    """Makes, clones, receives and destroys in a place of its own, and keeps what it was told."""

    def __init__(self, driver: ZfsDriver, leaf: str) -> None:
        self._driver = driver
        self._place = driver.pool.root / leaf
        self._stop = threading.Event()
        self.rounds = 0
        self.refusals = 0
        self._thread = threading.Thread(target=self._work)
        self.failed: BaseException | None = None
        self._thread.start()

    def _work(self) -> None:
        while not self._stop.is_set() and self.failed is None:
            try:
                self._round()
                self.rounds += 1
            except UnavailableError:
                self.refusals += 1
            except BaseException as err:  # noqa: BLE001 - the test tells it
                self.failed = err

    def _round(self) -> None:
        try:
            self._driver.destroy(self._place, recursive=True)
        except NotFoundError:
            assert self._place.leaf
        self._driver.create_filesystem(self._place)
        target = (self._place / "v") @ "s"
        receive(self._driver, target, samples.load("gen-full-8k"))
        self._driver.clone(target, self._place / "c")

    def end(self) -> None:
        self._stop.set()
        self._thread.join(END_TIMEOUT_S)
        if self.failed is not None:
            raise self.failed


@pytest.fixture
def exported(tmp_path: Path) -> Iterator[ZfsDriver]:
    with made_pool(f"away{os.getpid()}", sparse_file(tmp_path / "away.disk", POOL_BYTES)) as pool:
        driver = ZfsDriver(pool, device_busy_timeout_s=PROGRAM_TIMEOUT_S)
        driver.open()
        yield driver
        driver.close()


def test_pool_exported_in_mid_call_is_unavailable_until_it_is_back(exported: ZfsDriver, tmp_path: Path) -> None:
    workers = [Worker(exported, f"w{number}") for number in range(2)]
    try:
        wait_until(lambda: _all(workers, lambda one: one.rounds >= ROUNDS), "calls to be under way")
        wait_until(lambda: _is_away(exported.pool), "ZFS to let the pool go between two calls", timeout_s=120.0)
        wait_until(lambda: _all(workers, lambda one: one.refusals > 0), "callers to be told")
        run("zpool", "import", "-N", "-d", tmp_path, exported.pool)
        before = [one.rounds for one in workers]
        wait_until(
            lambda: all(one.rounds >= seen + ROUNDS or one.failed for one, seen in zip(workers, before, strict=True)),
            "calls to go on",
        )
    finally:
        for worker in workers:
            worker.end()
    check_whole_names(exported)


def _all(workers: list[Worker], condition: Callable[[Worker], bool]) -> bool:
    return all(condition(worker) or worker.failed is not None for worker in workers)


def _is_away(pool: PoolName) -> bool:
    run("zpool", "export", pool, check=False)
    return str(pool) not in run("zpool", "list", "-H", "-o", "name").split()
