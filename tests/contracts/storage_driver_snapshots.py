"""Rules on taking snapshots, going back to them, and keeping them."""

from __future__ import annotations

import threading

import pytest

from agent_image.drivers.base import StorageDriver
from imaging.errors import AlreadyExistsError, BusyError, InvalidArgumentError, InvalidNameError, NotFoundError
from imaging.names import DatasetName
from tests.contracts.storage_driver_tools import (
    BLOCK_BYTES,
    MIB,
    VOLUME_BYTES,
    Suite,
    make_volume,
    names,
    noise,
    read,
    read_all,
    take,
    write,
)


class SnapshotRules(Suite):
    """snapshot, rollback, hold, release, bookmark."""

    def test_snapshot_is_there_with_what_it_was_made_with(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        made = take(driver, (place / "v") @ "s")
        assert made == driver.get_snapshot((place / "v") @ "s")
        assert made.guid > 0
        assert made.creation_s > 0
        assert made.volsize_bytes == VOLUME_BYTES
        assert take(driver, place @ "s").volsize_bytes is None

    def test_snapshot_never_changes(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        write(driver, place / "v", 0, noise(1, 4 * BLOCK_BYTES))
        take(driver, (place / "v") @ "s")
        before = read_all(driver, (place / "v") @ "s")
        write(driver, place / "v", BLOCK_BYTES, noise(2))
        driver.resize(place / "v", MIB)
        assert read_all(driver, (place / "v") @ "s") == before
        assert driver.get_snapshot((place / "v") @ "s").volsize_bytes == VOLUME_BYTES

    def test_snapshots_are_listed_by_dataset_then_by_age(self, driver: StorageDriver, place: DatasetName) -> None:
        for leaf in ("b", "a"):
            make_volume(driver, place / leaf)
            for name in ("z", "m", "a"):
                take(driver, (place / leaf) @ name)
        listed = driver.list_snapshots(place)
        assert names(listed) == [f"{place}/{leaf}@{name}" for leaf in ("a", "b") for name in ("z", "m", "a")]
        txgs = [info.createtxg for info in driver.list_snapshots(place / "a")]
        assert txgs == sorted(set(txgs))
        assert list(driver.list_snapshots(place, recursive=False)) == []
        assert len({info.guid for info in listed}) == 6

    def test_snapshot_of_a_taken_name_is_refused(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        made = take(driver, (place / "v") @ "s")
        with pytest.raises(AlreadyExistsError):
            driver.snapshot((place / "v") @ "s")
        assert driver.get_snapshot(made.name) == made

    def test_recursive_snapshot_takes_all_in_list_order(self, driver: StorageDriver, place: DatasetName) -> None:
        for leaf in ("b", "a"):
            driver.create_filesystem(place / leaf)
            make_volume(driver, place / leaf / "v")
        made = driver.snapshot(place @ "s", recursive=True)
        assert names(made) == [f"{place}{n}@s" for n in ("", "/a", "/a/v", "/b", "/b/v")]
        assert list(made) == list(driver.list_snapshots(place))

    def test_recursive_snapshot_takes_none_if_one_name_is_taken(
        self, driver: StorageDriver, place: DatasetName
    ) -> None:
        make_volume(driver, place / "a")
        make_volume(driver, place / "b")
        take(driver, (place / "b") @ "s")
        with pytest.raises(AlreadyExistsError):
            driver.snapshot(place @ "s", recursive=True)
        assert names(driver.list_snapshots(place)) == [f"{place}/b@s"]

    def test_recursive_snapshot_takes_none_if_one_name_gets_too_long(
        self, driver: StorageDriver, place: DatasetName
    ) -> None:
        driver.create_filesystem(place / ("a" * 120))
        with pytest.raises(InvalidNameError):
            driver.snapshot(place @ ("s" * 125), recursive=True)
        assert list(driver.list_snapshots(place)) == []

    def test_recursive_snapshot_is_of_one_instant(self, driver: StorageDriver, place: DatasetName) -> None:
        """One writer puts each number into the first volume, then into the second: no snapshot has it the other way round."""
        first, second = place / "a", place / "b"
        for name in (first, second):
            make_volume(driver, name)
            write(driver, name, 0, bytes(BLOCK_BYTES))
        go, stop = threading.Event(), threading.Event()

        def count() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                for name in (first, second):
                    write(driver, name, 0, number.to_bytes(8, "big") * (BLOCK_BYTES // 8))
                go.set()

        writer = threading.Thread(target=count)
        writer.start()
        try:
            assert go.wait(30)
            taken = [name for name in (f"s{n}" for n in range(10)) if _try_snapshot(driver, place, name)]
        finally:
            stop.set()
            writer.join()
        for snapshot in taken:
            one, two = (int.from_bytes(read(driver, volume @ snapshot, 0, 8), "big") for volume in (first, second))
            assert two in {one, one - 1}, snapshot
        driver.snapshot(place @ "quiet", recursive=True)

    # -- rollback ----------------------------------------------------------------------------------------------------

    def test_rollback_brings_bytes_and_size_back(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        write(driver, place / "v", 0, noise(1))
        take(driver, (place / "v") @ "s")
        write(driver, place / "v", 0, noise(2, 4 * BLOCK_BYTES))
        driver.resize(place / "v", MIB)
        driver.rollback((place / "v") @ "s")
        assert driver.get(place / "v").volsize_bytes == VOLUME_BYTES
        assert read_all(driver, place / "v") == noise(1) + bytes(VOLUME_BYTES - BLOCK_BYTES)
        write(driver, place / "v", 0, noise(3))
        driver.rollback((place / "v") @ "s")
        assert read(driver, place / "v", 0, BLOCK_BYTES) == noise(1)

    def test_device_shows_what_was_rolled_back_to(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        write(driver, place / "v", 0, noise(1))
        take(driver, (place / "v") @ "s")
        with driver.device(place / "v").open("r+b", buffering=0) as device:
            device.write(noise(2))
        driver.rollback((place / "v") @ "s")
        with driver.device(place / "v").open("rb", buffering=0) as device:
            assert device.read(BLOCK_BYTES) == noise(1)

    def test_rollback_over_newer_snapshots_is_busy_and_names_them(
        self, driver: StorageDriver, place: DatasetName
    ) -> None:
        make_volume(driver, place / "v")
        for name in ("s0", "s1", "s2"):
            write(driver, place / "v", 0, noise(ord(name[1])))
            take(driver, (place / "v") @ name)
        with pytest.raises(BusyError) as caught:
            driver.rollback((place / "v") @ "s0")
        assert {f"{place}/v@s1", f"{place}/v@s2"} <= set(caught.value.dependants)
        assert read(driver, place / "v", 0, BLOCK_BYTES) == noise(ord("2"))
        driver.rollback((place / "v") @ "s0", destroy_newer=True)
        assert names(driver.list_snapshots(place)) == [f"{place}/v@s0"]
        assert read(driver, place / "v", 0, BLOCK_BYTES) == noise(ord("0"))

    def test_rollback_never_destroys_what_a_clone_or_hold_needs(
        self, driver: StorageDriver, place: DatasetName
    ) -> None:
        make_volume(driver, place / "v")
        for name in ("s0", "s1", "s2"):
            take(driver, (place / "v") @ name)
        driver.clone((place / "v") @ "s1", place / "c")
        driver.hold((place / "v") @ "s2", "keeper")
        with pytest.raises(BusyError) as caught:
            driver.rollback((place / "v") @ "s0", destroy_newer=True)
        assert any("keeper" in d or d == f"{place}/c" for d in caught.value.dependants)
        assert len(driver.list_snapshots(place)) == 3
        driver.release((place / "v") @ "s2", "keeper")
        with pytest.raises(BusyError) as caught:
            driver.rollback((place / "v") @ "s0", destroy_newer=True)
        assert f"{place}/c" in caught.value.dependants
        assert len(driver.list_snapshots(place)) == 3

    def test_clone_rolls_back_to_its_own_snapshot(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        write(driver, place / "v", 0, noise(1))
        take(driver, (place / "v") @ "s")
        driver.clone((place / "v") @ "s", place / "c")
        write(driver, place / "c", BLOCK_BYTES, noise(2))
        take(driver, (place / "c") @ "mine")
        write(driver, place / "c", 0, noise(3))
        driver.rollback((place / "c") @ "mine")
        assert read(driver, place / "c", 0, 2 * BLOCK_BYTES) == noise(1) + noise(2)
        assert driver.get(place / "c").origin == (place / "v") @ "s"

    # -- holds and bookmarks -----------------------------------------------------------------------------------------

    def test_holds_keep_a_snapshot_until_released(self, driver: StorageDriver, place: DatasetName) -> None:
        take(driver, place @ "s")
        assert list(driver.holds(place @ "s")) == []
        driver.hold(place @ "s", "b")
        driver.hold(place @ "s", "a")
        assert list(driver.holds(place @ "s")) == ["a", "b"]
        with pytest.raises(AlreadyExistsError):
            driver.hold(place @ "s", "a")
        driver.release(place @ "s", "a")
        with pytest.raises(BusyError):
            driver.destroy_snapshot(place @ "s")
        with pytest.raises(NotFoundError):
            driver.release(place @ "s", "a")
        driver.release(place @ "s", "b")
        driver.destroy_snapshot(place @ "s")

    @pytest.mark.parametrize("tag", ["", "x" * 256])
    def test_hold_with_an_impossible_tag_is_refused(self, driver: StorageDriver, place: DatasetName, tag: str) -> None:
        take(driver, place @ "s")
        with pytest.raises(InvalidArgumentError):
            driver.hold(place @ "s", tag)
        assert list(driver.holds(place @ "s")) == []

    def test_bookmark_outlives_its_snapshot_and_keeps_nothing(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        take(driver, (place / "v") @ "s")
        driver.bookmark((place / "v") @ "s", "b")
        driver.destroy_snapshot((place / "v") @ "s")
        take(driver, (place / "v") @ "s")
        with pytest.raises(AlreadyExistsError):
            driver.bookmark((place / "v") @ "s", "b")
        assert names(driver.list_snapshots(place)) == [f"{place}/v@s"]

    def test_rollback_over_newer_bookmarks_is_busy(self, driver: StorageDriver, place: DatasetName) -> None:
        """As in ZFS: after going back nothing could be sent from them."""
        make_volume(driver, place / "v")
        for name in ("s0", "s1"):
            take(driver, (place / "v") @ name)
        driver.bookmark((place / "v") @ "s1", "b")
        driver.destroy_snapshot((place / "v") @ "s1")
        with pytest.raises(BusyError) as caught:
            driver.rollback((place / "v") @ "s0")
        assert f"{place}/v#b" in caught.value.dependants
        driver.rollback((place / "v") @ "s0", destroy_newer=True)
        driver.rollback((place / "v") @ "s0")


def _try_snapshot(driver: StorageDriver, place: DatasetName, name: str) -> bool:
    """A driver may find the volumes too busy to take them at one instant."""
    try:
        driver.snapshot(place @ name, recursive=True)
    except BusyError:
        return False
    return True
