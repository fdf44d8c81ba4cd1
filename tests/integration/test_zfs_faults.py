"""What callers of the zfs driver see when something is in the way: holders, no space, no udev, no pool, sudden death."""

from __future__ import annotations

import itertools
import os
import random
import signal
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
from tests.contracts.storage_driver_tools import MIB, clear, make_volume, noise, read, receive, stream_of, take, write
from tests.integration.zfs_pool import lab_pool, run, there
from tests.waiting import wait_until

pytestmark = pytest.mark.backend("zfs")

VOLUMES_AT_ONCE = 300
DEATHS = int(os.environ.get("MISTIFY_DEATHS", "6"))
LONG_TIMEOUT_S = 1200
"""Under emulation on a busy machine each start of an interpreter takes ten seconds, each death several."""
DEATH_TIMEOUT_S = 60.0
DEVICE_TIMEOUT_S = 120.0
SMALL_POOL_BYTES = 96 * MIB

_serial = itertools.count(1)


@pytest.fixture(scope="module")
def driver() -> Iterator[ZfsDriver]:
    driver = ZfsDriver(lab_pool(), device_busy_timeout_s=30.0)
    driver.open()
    yield driver
    driver.close()


@pytest.fixture
def place(driver: ZfsDriver) -> Iterator[DatasetName]:
    name = driver.pool.root / f"faults-{next(_serial)}"
    driver.create_filesystem(name)
    yield name
    clear(driver, name)


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
        with pytest.raises(BusyError) as caught:
            driver.destroy_snapshot(snapshot)
        assert caught.value.dependants == (f"{snapshot} is being sent",)
        assert driver.holds(snapshot) == []
        os.close(read_end)
        with pytest.raises(UnavailableError):
            sending.result(60)
    os.close(write_end)
    driver.destroy_snapshot(snapshot)


# -- devices -------------------------------------------------------------------------------------------------------------


@contextmanager
def no_udev() -> Iterator[None]:
    """udev does nothing in the lab's virtual machine; elsewhere it is not ours to stop."""
    if os.environ.get("MISTIFY_LAB_KIND") != "vm":
        yield
        return
    run("udevadm", "settle", "--timeout=60")
    run("udevadm", "control", "--stop-exec-queue")
    try:
        yield
    finally:
        run("udevadm", "control", "--start-exec-queue")


@pytest.mark.timeout(LONG_TIMEOUT_S)
def test_hundreds_of_volumes_without_udev_all_get_their_own_device(driver: ZfsDriver, tmp_path: Path) -> None:
    """No links: each device must be found by asking the kernel whose it is."""
    driver.close()
    blind = ZfsDriver(driver.pool, link_directory=tmp_path / "no-links", link_timeout_s=0.0, device_busy_timeout_s=30.0)
    blind.open()
    place = driver.pool.root / "many"
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
            blind.destroy(place, recursive=True)
    finally:
        blind.close()
        driver.open()


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
    """A pool of its own in a file."""
    pool, disk = PoolName.parse(f"small{os.getpid()}"), tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(SMALL_POOL_BYTES)
    run("zpool", "create", "-f", "-o", "cachefile=none", "-O", "mountpoint=none", pool, disk)
    driver = ZfsDriver(pool)
    driver.open()
    yield driver
    driver.close()
    run("zpool", "destroy", "-f", pool)


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


# -- sudden death --------------------------------------------------------------------------------------------------------

BUSY_AGENT = """
import io, os, sys
from agent_image.drivers.zfs import ZfsDriver
from imaging.names import PoolName

driver = ZfsDriver(PoolName.parse(sys.argv[1]))
driver.open()
place = driver.pool.root / sys.argv[2]
stream = open(sys.argv[3], "rb").read()
print("ready", flush=True)
while True:
    driver.receive((place / "v") @ "s", io.BytesIO(stream))
    driver.clone((place / "v") @ "s", place / "c")
    with driver.open_snapshot((place / "v") @ "s") as fd:
        os.pread(fd, 8192, 0)
    driver.destroy(place / "c")
    driver.destroy(place / "v", recursive=True)
"""


@pytest.mark.timeout(LONG_TIMEOUT_S)
def test_killed_at_any_moment_leaves_nothing_half_done(
    driver: ZfsDriver, place: DatasetName, tmp_path: Path, checkout: Path
) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    make_volume(driver, place / "source")
    write(driver, place / "source", 0, noise(1, MIB))
    guid = take(driver, (place / "source") @ "s").guid
    stream = tmp_path / "stream"
    stream.write_bytes(stream_of(driver, (place / "source") @ "s"))
    for _ in range(DEATHS):
        driver.close()
        _run_and_kill(driver.pool, place, stream, checkout, chance)
        driver.open()
        names = [line.removeprefix(f"{place}") for line in there(place)]
        assert set(names) <= {"", "/source", "/source@s", "/v", "/v@s", "/c"}, f"seed {seed}: {names}"
        assert ("/v" in names) == ("/v@s" in names) or "/c" not in names, f"seed {seed}: {names}"
        if "/v@s" in names:
            assert driver.get_snapshot((place / "v") @ "s").guid == guid
        if "/c" in names:
            driver.destroy(place / "c")
        if "/v" in names:
            driver.destroy(place / "v", recursive=True)


def _run_and_kill(pool: PoolName, place: DatasetName, stream: Path, checkout: Path, chance: random.Random) -> None:
    command = [sys.executable, "-c", BUSY_AGENT, str(pool), place.leaf, str(stream)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=checkout)
    assert process.stdout is not None
    with process.stdout as output:
        try:
            assert output.readline() == b"ready\n"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(chance.random() * 2.0)
        finally:
            process.send_signal(signal.SIGKILL)
            _wait_for_end(process)


def _wait_for_end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(DEATH_TIMEOUT_S)
    except subprocess.TimeoutExpired as err:
        raise AssertionError(f"the killed process does not end:\n{_kernel_stacks(process.pid)}") from err


def _kernel_stacks(process: int) -> str:
    """Where in the kernel the threads of a process wait."""
    tasks = sorted(Path(f"/proc/{process}/task").iterdir())
    return "\n".join(f"{task.name} {(task / 'comm').read_text()}{(task / 'stack').read_text()}" for task in tasks)
