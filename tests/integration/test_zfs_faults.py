"""What callers of the zfs driver see when something is in the way: holders, no space, no links, no pool."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from agent_image.drivers.zfs import ZfsDriver
from agent_image.drivers.zfs.devices import volume_of
from imaging.errors import BusyError, NoSpaceError, UnavailableError
from imaging.names import DatasetName, PoolName
from tests.codec import samples
from tests.contracts.storage_driver_tools import MIB, make_volume, noise, read, receive, stream_of, take, write
from tests.integration.zfs_pool import lab_driver, made_pool, new_place, run, sparse_file, there
from tests.waiting import wait_until

pytestmark = pytest.mark.backend("zfs")

DEVICE_TIMEOUT_S = 120.0
SMALL_POOL_BYTES = 96 * MIB


@pytest.fixture(scope="module")
def driver() -> Iterator[ZfsDriver]:
    with lab_driver(device_busy_timeout_s=30.0) as driver:
        yield driver


@pytest.fixture
def place(driver: ZfsDriver) -> Iterator[DatasetName]:
    with new_place(driver, "faults") as name:
        yield name


# -- holders -------------------------------------------------------------------------------------------------------------


@contextmanager
def holder(device: Path) -> Iterator[int]:
    """Another process that has the device open."""
    script = "import sys; file = open(sys.argv[1], 'rb'); print('open', flush=True); sys.stdin.read()"
    command = [sys.executable, "-S", "-E", "-c", script, str(device)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        yield process.pid
        process.communicate(timeout=60)


def test_device_somebody_holds_is_named_and_nothing_is_destroyed(driver: ZfsDriver, place: DatasetName) -> None:
    make_volume(driver, place / "v")
    write(driver, place / "v", 0, noise(1))
    take(driver, (place / "v") @ "s")
    make_volume(driver, place / "plain")
    before = there(place)
    for name in ("v", "plain"):
        with holder(driver.device(place / name)) as process:
            with pytest.raises(BusyError) as caught:
                driver.destroy(place / name, recursive=True)
            assert any(f"process {process} (" in text for text in caught.value.dependants)
            with pytest.raises(BusyError):
                driver.destroy(place, recursive=True)
    with holder(driver.device(place / "v")) as process:
        with pytest.raises(BusyError) as caught:
            driver.rollback((place / "v") @ "s")
        assert any(f"process {process} (" in text for text in caught.value.dependants)
    assert there(place) == before
    assert read(driver, place / "v", 0, 8192) == noise(1)


def test_view_somebody_held_goes_before_the_next_destruction(driver: ZfsDriver, place: DatasetName) -> None:
    make_volume(driver, place / "v")
    snapshot = take(driver, (place / "v") @ "s").name
    with ExitStack() as held:
        with driver.open_snapshot(snapshot) as fd:
            held.enter_context(holder(Path(f"/proc/self/fd/{fd}").resolve()))
        with pytest.raises(BusyError) as caught:
            driver.destroy_snapshot(snapshot)
        assert caught.value.dependants == (f"{snapshot} is being read",)
    driver.destroy_snapshot(snapshot)
    assert there(place) == [str(place), f"{place}/v"]


def test_snapshot_that_is_being_sent_is_kept(driver: ZfsDriver, place: DatasetName) -> None:
    make_volume(driver, place / "v")
    write(driver, place / "v", 0, noise(1, 2 * MIB))
    snapshot = take(driver, (place / "v") @ "s").name
    read_end, write_end = os.pipe()
    with ThreadPoolExecutor(1) as executor:
        sending = executor.submit(driver.send, snapshot, write_end)
        assert os.read(read_end, 8) == bytes(8)  # it has begun: record type and payload length of BEGIN
        for defer in (False, True):
            with pytest.raises(BusyError) as caught:
                driver.destroy_snapshot(snapshot, defer=defer)
            assert caught.value.dependants == (f"{snapshot} is being sent",)
        assert driver.holds(snapshot) == []
        os.close(read_end)
        with pytest.raises(UnavailableError):
            sending.result(60)
    os.close(write_end)
    driver.destroy_snapshot(snapshot)


# -- devices -------------------------------------------------------------------------------------------------------------


def test_device_of_a_renamed_volume_is_found_under_its_new_name(driver: ZfsDriver, place: DatasetName) -> None:
    make_volume(driver, place / "v")
    driver.device(place / "v")
    driver.rename(place / "v", place / "w")
    make_volume(driver, place / "v")
    for leaf in ("v", "w"):
        assert volume_of(driver.device(place / leaf, timeout_s=DEVICE_TIMEOUT_S)) == str(place / leaf)


def test_device_that_does_not_come_is_unavailable_after_the_bound(driver: ZfsDriver, place: DatasetName) -> None:
    make_volume(driver, place / "v")
    run("zfs", "set", "volmode=none", place / "v")
    wait_until(lambda: volume_of(Path("/dev/zvol", str(place / "v"))) is None, "the device's end")
    with pytest.raises(UnavailableError, match="did not appear within"):
        driver.device(place / "v", timeout_s=0.3)


def test_link_that_leads_elsewhere_is_not_believed(driver: ZfsDriver, place: DatasetName, tmp_path: Path) -> None:
    make_volume(driver, place / "v")
    make_volume(driver, place / "other")
    wrong = tmp_path / str(place / "v")
    wrong.parent.mkdir(parents=True)
    wrong.symlink_to(driver.device(place / "other").resolve())
    driver.close()
    misled = ZfsDriver(driver.pool, link_directory=tmp_path)
    misled.open()
    try:
        assert volume_of(misled.device(place / "v")) == str(place / "v")
    finally:
        misled.close()
        driver.open()


# -- space and pools -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[ZfsDriver]:
    """A pool of its own in a file, which must be whole afterwards."""
    with made_pool(f"small{os.getpid()}", sparse_file(tmp_path / "disk", SMALL_POOL_BYTES)) as pool:
        driver = ZfsDriver(pool)
        driver.open()
        yield driver
        driver.close()


def test_pool_that_fills_up_in_mid_receive_is_as_before(
    driver: ZfsDriver, place: DatasetName, small: ZfsDriver
) -> None:
    size_bytes = SMALL_POOL_BYTES
    make_volume(driver, place / "v", size_bytes=size_bytes)
    for offset in range(0, size_bytes, 8 * MIB):
        write(driver, place / "v", offset, random.randbytes(8 * MIB))
    take(driver, (place / "v") @ "s")
    stream = stream_of(driver, (place / "v") @ "s")
    root = small.pool.root
    with pytest.raises(NoSpaceError):
        receive(small, (root / "v") @ "s", stream)
    assert there(root) == [str(root)]
    receive(small, (root / "w") @ "s", stream_of(small, take(small, (make_volume(small, root / "x").name) @ "s").name))


def test_exported_pool_is_unavailable_until_it_is_back(small: ZfsDriver, tmp_path: Path) -> None:
    root = small.pool.root
    make_volume(small, root / "v")
    take(small, (root / "v") @ "s")
    wait_until(lambda: _exported(small.pool), "udev to let go of the volume", timeout_s=120.0)
    for call in (
        lambda: small.create_filesystem(root / "f"),
        lambda: small.snapshot((root / "v") @ "t"),
        lambda: small.destroy(root / "v", recursive=True),
        lambda: receive(small, (root / "w") @ "s", samples.load("gen-empty")),
    ):
        with pytest.raises(UnavailableError):
            call()
    wait_until(lambda: _is_unavailable(small, root), "the driver to notice")
    run("zpool", "import", "-N", "-d", tmp_path, small.pool)
    wait_until(lambda: not _is_unavailable(small, root), "the driver to notice that the pool is back")
    assert small.get_snapshot((root / "v") @ "s").name.snapshot == "s"
    small.snapshot((root / "v") @ "t")


def _exported(pool: PoolName) -> bool:
    run("zpool", "export", pool, check=False)
    return str(pool) not in run("zpool", "list", "-H", "-o", "name").split()


def _is_unavailable(driver: ZfsDriver, root: DatasetName) -> bool:
    try:
        driver.get(root)
    except UnavailableError:
        return True
    return False
