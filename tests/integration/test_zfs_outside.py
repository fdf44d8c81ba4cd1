"""Changes others make to the pool show in the driver's index, and nothing of theirs is touched."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from agent_image.drivers.zfs import ZfsDriver
from agent_image.drivers.zfs.hidden import MARK
from imaging.errors import BusyError, NotFoundError
from imaging.names import DatasetName
from tests.contracts.storage_driver_tools import MIB, make_volume, take
from tests.integration.zfs_pool import lab_driver, new_place, run, there
from tests.waiting import wait_until

pytestmark = pytest.mark.backend("zfs")

OTHERS = 12


@pytest.fixture(scope="module")
def driver() -> Iterator[ZfsDriver]:
    with lab_driver() as driver:
        yield driver


@pytest.fixture
def place(driver: ZfsDriver) -> Iterator[DatasetName]:
    with new_place(driver, "outside") as name:
        yield name


def seen(condition: Callable[[], bool], what: str) -> None:
    """The condition comes true; what is not there yet counts as false."""

    def holds() -> bool:
        try:
            return condition()
        except NotFoundError:
            return False

    wait_until(holds, what)


def test_made_and_destroyed_outside_shows(driver: ZfsDriver, place: DatasetName) -> None:
    run("zfs", "create", "-s", "-V", "2M", place / "v")
    run("zfs", "create", "-o", "test:who=somebody", place / "f")
    run("zfs", "snapshot", "-r", f"{place}@s")
    seen(lambda: driver.get(place / "v").volsize_bytes == 2 * MIB, "the volume")
    seen(lambda: driver.get(place / "f").properties == {"test:who": "somebody"}, "the filesystem")
    seen(lambda: len(driver.list_snapshots(place)) == 3, "the snapshots")
    run("zfs", "clone", f"{place}/v@s", place / "c")
    seen(lambda: list(driver.clones((place / "v") @ "s")) == [place / "c"], "the clone")
    run("zfs", "destroy", place / "c")
    run("zfs", "destroy", "-r", f"{place}@s")
    run("zfs", "destroy", place / "v")
    seen(lambda: [info.name for info in driver.list(place)] == [place, place / "f"], "that they are gone")
    seen(lambda: not driver.list_snapshots(place), "that the snapshots are gone")


def test_changed_outside_shows(driver: ZfsDriver, place: DatasetName) -> None:
    make_volume(driver, place / "v", size_bytes=MIB)
    driver.device(place / "v")
    run("zfs", "set", "volsize=4M", place / "v")
    run("zfs", "set", "test:a=x y", place / "v")
    seen(lambda: driver.get(place / "v").volsize_bytes == 4 * MIB, "the new size, which no event tells")
    seen(lambda: driver.get(place / "v").properties == {"test:a": "x y"}, "the property")
    run("zfs", "set", "readonly=on", place / "v")
    seen(lambda: driver.get(place / "v").properties.get("readonly") == "on", "that it is read-only")
    run("zfs", "inherit", "test:a", place / "v")
    seen(lambda: driver.get(place / "v").properties == {"readonly": "on"}, "that the property is gone")


def test_renamed_promoted_and_rolled_back_outside_shows(driver: ZfsDriver, place: DatasetName) -> None:
    driver.create_filesystem(place / "a")
    make_volume(driver, place / "a" / "v", size_bytes=MIB)
    guid = take(driver, (place / "a" / "v") @ "s").guid
    driver.clone((place / "a" / "v") @ "s", place / "c")
    run("zfs", "rename", place / "a", place / "b")
    seen(lambda: driver.get_snapshot((place / "b" / "v") @ "s").guid == guid, "the renamed snapshot")
    seen(lambda: driver.get(place / "c").origin == (place / "b" / "v") @ "s", "the renamed origin")
    run("zfs", "promote", place / "c")
    seen(lambda: driver.get(place / "b" / "v").origin == (place / "c") @ "s", "the new origin")
    run("zfs", "set", "volsize=3M", place / "c")
    seen(lambda: driver.get(place / "c").volsize_bytes == 3 * MIB, "the size")
    run("zfs", "rollback", f"{place}/c@s")
    seen(lambda: driver.get(place / "c").volsize_bytes == MIB, "the size of the snapshot")


def test_snapshots_of_others_show_while_we_take_our_own(driver: ZfsDriver, place: DatasetName) -> None:
    """A look at somebody else's that is overtaken by a change of ours is repeated."""
    make_volume(driver, place / "v", size_bytes=MIB)
    others_are_done = threading.Event()

    def take_own() -> int:
        for number in itertools.count(1):
            take(driver, (place / "v") @ f"own{number}")
            if others_are_done.is_set():
                return number
        raise AssertionError

    with ThreadPoolExecutor(1) as executor:
        own = executor.submit(take_own)
        for number in range(OTHERS):
            run("zfs", "snapshot", f"{place}/v@other{number}")
        others_are_done.set()
        expected = own.result() + OTHERS
    seen(lambda: len(driver.list_snapshots(place)) == expected, "all snapshots")


def test_destruction_finds_what_somebody_took_a_moment_ago(driver: ZfsDriver, place: DatasetName) -> None:
    make_volume(driver, place / "v", size_bytes=MIB)
    run("zfs", "snapshot", f"{place}/v@late")
    with pytest.raises(BusyError) as caught:
        driver.destroy(place / "v")
    assert caught.value.dependants == (f"{place}/v@late",)
    run("zfs", "snapshot", f"{place}/v@later")
    driver.destroy(place / "v", recursive=True)
    assert there(place) == [str(place)]


def test_names_that_are_not_ours_do_not_matter(driver: ZfsDriver, place: DatasetName) -> None:
    """Spaces, bookmarks, a hold, a name like our temporary ones without our mark (F21)."""
    foreign = [f"{place}/with space", f"{place}/.mistify-receive-0123456789abcdef", f"{place}/x#mark"]
    run("zfs", "create", foreign[0])
    run("zfs", "create", "-s", "-V", "1M", foreign[1])
    run("zfs", "create", "-s", "-V", "1M", place / "x")
    run("zfs", "snapshot", f"{place}/x@s")
    run("zfs", "bookmark", f"{place}/x@s", foreign[2])
    seen(lambda: len(driver.list_snapshots(place)) == 1, "the snapshot")
    assert [info.name for info in driver.list(place)] == [place, place / "x"]
    driver.close()
    driver.open()
    assert [info.name for info in driver.list(place)] == [place, place / "x"]
    listed = run("zfs", "list", "-H", "-r", "-t", "all", "-o", "name", place).splitlines()
    assert set(foreign) <= set(listed)
    run("zfs", "destroy", foreign[1])
    run("zfs", "destroy", foreign[0])


def test_leftovers_of_a_dead_process_are_removed_at_start(driver: ZfsDriver, place: DatasetName) -> None:
    make_volume(driver, place / "v", size_bytes=MIB)
    take(driver, (place / "v") @ "s")
    identity = "00112233445566ff"
    received, view = f"{place}/.mistify-receive-{identity}", f"{place}/.mistify-view-{identity}"
    driver.close()
    run("zfs", "create", "-s", "-V", "1M", "-o", f"{MARK}={identity}", received)
    run("zfs", "snapshot", f"{received}@s")
    run("zfs", "clone", "-o", f"{MARK}={identity}", "-o", "readonly=on", f"{place}/v@s", view)
    driver.open()
    assert there(place) == [str(place), f"{place}/v", f"{place}/v@s"]
    assert driver.clones((place / "v") @ "s") == []
