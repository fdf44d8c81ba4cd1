"""Operations of the driver as the zfs program sees their outcome. The rules of the contract are in test_zfs_driver.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agent_image.drivers.zfs import ZfsDriver
from imaging.errors import BusyError
from imaging.names import DatasetName, SnapshotName
from tests.contracts.storage_driver_tools import MIB, make_volume, take
from tests.integration.zfs_pool import lab_driver, new_place, run, there

pytestmark = pytest.mark.backend("zfs")


@pytest.fixture(scope="module")
def driver() -> Iterator[ZfsDriver]:
    with lab_driver(volblocksize_default_bytes=32 << 10) as driver:
        yield driver


@pytest.fixture
def place(driver: ZfsDriver) -> Iterator[DatasetName]:
    with new_place(driver, "operations") as name:
        yield name


def value(name: DatasetName | SnapshotName, *properties: str) -> list[str]:
    """Values as the zfs program prints them."""
    return run("zfs", "get", "-Hp", "-o", "value", ",".join(properties), name).split()


@pytest.mark.parametrize("block_bytes", [512, 8 << 10, 64 << 10, 1 << 20])
@pytest.mark.parametrize("kind", ["thin", "thick"])
def test_volume_is_as_the_zfs_program_would_have_made_it(
    driver: ZfsDriver, place: DatasetName, kind: str, block_bytes: int
) -> None:
    driver.create_volume(place / "ours", 24 * MIB, thin=kind == "thin", volblocksize_bytes=block_bytes)
    sparse = ["-s"] if kind == "thin" else []
    run(
        "zfs",
        "create",
        *sparse,
        "-V",
        24 * MIB,
        "-o",
        f"volblocksize={block_bytes}",
        "-o",
        "compression=lz4",
        place / "theirs",
    )
    names = ("volsize", "volblocksize", "refreservation", "reservation", "compression")
    assert value(place / "ours", *names) == value(place / "theirs", *names)


def test_block_size_of_the_driver_is_used_where_none_is_asked_for(driver: ZfsDriver, place: DatasetName) -> None:
    driver.create_volume(place / "v", MIB, thin=True)
    assert value(place / "v", "volblocksize") == [str(32 << 10)]


def test_resized_thick_volume_reserves_what_a_new_one_of_that_size_would(driver: ZfsDriver, place: DatasetName) -> None:
    driver.create_volume(place / "ours", 8 * MIB)
    driver.create_volume(place / "new", 48 * MIB)
    driver.resize(place / "ours", 48 * MIB)
    assert value(place / "ours", "volsize", "refreservation") == value(place / "new", "volsize", "refreservation")


def test_deferred_snapshot_is_marked_and_goes_with_its_last_need(driver: ZfsDriver, place: DatasetName) -> None:
    make_volume(driver, place / "v")
    name = take(driver, (place / "v") @ "s").name
    driver.clone(name, place / "c")
    driver.hold(name, "kept")
    assert driver.destroy_snapshot(name, defer=True) == []
    assert value(name, "defer_destroy") == ["on"]
    driver.release(name, "kept")
    assert str(name) in there(place)
    driver.destroy(place / "c")
    assert str(name) not in there(place)
    assert driver.list_snapshots(place) == []


def test_hold_and_bookmark_are_what_the_zfs_program_shows(driver: ZfsDriver, place: DatasetName) -> None:
    make_volume(driver, place / "v")
    made = take(driver, (place / "v") @ "s")
    driver.hold(made.name, "first")
    driver.bookmark(made.name, "b")
    assert run("zfs", "holds", "-H", made.name).split()[:2] == [str(made.name), "first"]
    assert run("zfs", "list", "-Hp", "-t", "bookmark", "-o", "name,guid", place / "v").split() == [
        f"{place}/v#b",
        str(made.guid),
    ]
    run("zfs", "hold", "of-others", made.name)
    assert driver.holds(made.name) == ["first", "of-others"]
    with pytest.raises(BusyError) as caught:
        driver.destroy_snapshot(made.name)
    assert [word for word in ("first", "of-others") if word in str(caught.value)] == ["first", "of-others"]
    driver.release(made.name, "of-others")
    driver.release(made.name, "first")


def test_promoted_and_renamed_is_what_the_zfs_program_shows(driver: ZfsDriver, place: DatasetName) -> None:
    make_volume(driver, place / "v")
    name = take(driver, (place / "v") @ "s").name
    driver.clone(name, place / "c")
    driver.promote(place / "c")
    assert value(place / "v", "origin") == [f"{place}/c@s"]
    driver.rename(place / "c", place / "d")
    assert value(place / "v", "origin") == [f"{place}/d@s"]
    assert driver.get(place / "v").origin == (place / "d") @ "s"
    assert there(place) == [str(place), f"{place}/d", f"{place}/d@s", f"{place}/v"]


def test_recursive_snapshot_is_of_one_transaction_group(driver: ZfsDriver, place: DatasetName) -> None:
    for number in range(20):
        driver.create_volume(place / f"v{number}", MIB, thin=True)
    made = driver.snapshot(place @ "all", recursive=True)
    assert len(made) == 21
    assert len({info.createtxg for info in made}) == 1
    listed = run("zfs", "list", "-Hp", "-r", "-t", "snapshot", "-o", "createtxg", place).split()
    assert set(listed) == {str(made[0].createtxg)}


def test_snapshot_somebody_else_destroyed_is_not_missed(driver: ZfsDriver, place: DatasetName) -> None:
    """The index may still have it: it must neither stop what would destroy it, nor be in the way."""
    volume = driver.create_volume(place / "v", 1 << 20, thin=True).name
    for name in ("s0", "s1"):
        driver.snapshot(volume @ name)
    run("zfs", "destroy", volume @ "s1")
    driver.rollback(volume @ "s0")
    run("zfs", "destroy", volume @ "s0")
    driver.destroy(volume, recursive=True)
    assert there(place) == [str(place)]


def test_descendant_somebody_else_destroyed_does_not_stop_a_destruction(driver: ZfsDriver, place: DatasetName) -> None:
    for name in ("a", "b", "c"):
        driver.create_volume(place / "f" / name, MIB, thin=True, parents=True)
    run("zfs", "destroy", place / "f" / "b")
    driver.destroy(place / "f", recursive=True)
    assert there(place) == [str(place)]
