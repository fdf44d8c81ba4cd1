"""Rules on destroying: what needs something is named, and then nothing is gone."""

from __future__ import annotations

import pytest

from agent_image.drivers.base import StorageDriver
from imaging.errors import BusyError, MistifyError, NotFoundError
from imaging.names import DatasetName
from tests.contracts.storage_driver_tools import (
    BLOCK_BYTES,
    Suite,
    make_volume,
    names,
    noise,
    read,
    take,
    write,
)


class DestroyingRules(Suite):
    """destroy, destroy_snapshot."""

    def test_destroyed_dataset_is_gone_and_its_name_free(self, driver: StorageDriver, place: DatasetName) -> None:
        first = make_volume(driver, place / "v")
        write(driver, place / "v", 0, noise(1))
        driver.destroy(place / "v")
        with pytest.raises(NotFoundError):
            driver.get(place / "v")
        second = make_volume(driver, place / "v")
        assert second.guid != first.guid
        assert read(driver, place / "v", 0, BLOCK_BYTES) == bytes(BLOCK_BYTES)

    def test_dataset_with_children_is_busy_and_names_them(self, driver: StorageDriver, place: DatasetName) -> None:
        driver.create_filesystem(place / "f" / "g", parents=True)
        make_volume(driver, place / "f" / "v")
        with pytest.raises(BusyError) as caught:
            driver.destroy(place / "f")
        assert {f"{place}/f/g", f"{place}/f/v"} <= set(caught.value.dependants)
        assert len(driver.list(place / "f")) == 3

    def test_dataset_with_snapshots_is_busy_and_names_them(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        take(driver, (place / "v") @ "s")
        with pytest.raises(BusyError) as caught:
            driver.destroy(place / "v")
        assert f"{place}/v@s" in caught.value.dependants
        assert names(driver.list_snapshots(place)) == [f"{place}/v@s"]

    def test_recursive_destroy_takes_everything_below(self, driver: StorageDriver, place: DatasetName) -> None:
        """Clones of what goes, too, if they go themselves."""
        driver.create_filesystem(place / "f")
        make_volume(driver, place / "f" / "v")
        driver.snapshot((place / "f") @ "s", recursive=True)
        driver.clone((place / "f" / "v") @ "s", place / "f" / "c")
        driver.bookmark((place / "f" / "v") @ "s", "b")
        driver.destroy(place / "f", recursive=True)
        assert names(driver.list(place)) == [str(place)]
        assert list(driver.list_snapshots(place)) == []

    def test_recursive_destroy_never_takes_clones_elsewhere(self, driver: StorageDriver, place: DatasetName) -> None:
        driver.create_filesystem(place / "f")
        make_volume(driver, place / "f" / "a")
        make_volume(driver, place / "f" / "v")
        take(driver, (place / "f" / "v") @ "s")
        driver.clone((place / "f" / "v") @ "s", place / "c")
        with pytest.raises(BusyError) as caught:
            driver.destroy(place / "f", recursive=True)
        assert f"{place}/c" in caught.value.dependants
        assert names(driver.list(place)) == [f"{place}{n}" for n in ("", "/c", "/f", "/f/a", "/f/v")]
        assert names(driver.list_snapshots(place)) == [f"{place}/f/v@s"]
        driver.destroy(place / "c")
        driver.destroy(place / "f", recursive=True)

    def test_recursive_destroy_stops_at_a_hold(self, driver: StorageDriver, place: DatasetName) -> None:
        driver.create_filesystem(place / "f")
        make_volume(driver, place / "f" / "v")
        take(driver, (place / "f" / "v") @ "s")
        driver.hold((place / "f" / "v") @ "s", "keeper")
        with pytest.raises(BusyError) as caught:
            driver.destroy(place / "f", recursive=True)
        assert any("keeper" in dependant for dependant in caught.value.dependants)
        assert len(driver.list(place / "f")) == 2

    def test_open_volume_is_busy(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        with driver.open_volume(place / "v", writable=True):
            with pytest.raises(BusyError) as caught:
                driver.destroy(place / "v")
            assert caught.value.dependants
        driver.destroy(place / "v")

    def test_device_somebody_has_open_is_busy(self, driver: StorageDriver, place: DatasetName) -> None:
        """As a running guest has it."""
        make_volume(driver, place / "v")
        with driver.device(place / "v").open("r+b"), pytest.raises(BusyError):
            driver.destroy(place / "v")
        assert driver.get(place / "v").name == place / "v"
        driver.destroy(place / "v")

    def test_root_of_the_pool_stays(self, driver: StorageDriver, place: DatasetName) -> None:
        with pytest.raises(MistifyError):
            driver.destroy(driver.pool.root, recursive=True)
        assert driver.get(place).name == place

    # -- snapshots ---------------------------------------------------------------------------------------------------

    def test_destroyed_snapshot_is_gone_and_the_others_whole(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        for number in range(3):
            write(driver, place / "v", number * BLOCK_BYTES, noise(number))
            take(driver, (place / "v") @ f"s{number}")
        assert list(driver.destroy_snapshot((place / "v") @ "s1")) == [(place / "v") @ "s1"]
        assert names(driver.list_snapshots(place)) == [f"{place}/v@s0", f"{place}/v@s2"]
        assert read(driver, (place / "v") @ "s0", 0, 2 * BLOCK_BYTES) == noise(0) + bytes(BLOCK_BYTES)
        assert read(driver, (place / "v") @ "s2", 0, 3 * BLOCK_BYTES) == noise(0) + noise(1) + noise(2)

    def test_newest_snapshot_goes_without_the_volume_changing(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        write(driver, place / "v", 0, noise(1))
        take(driver, (place / "v") @ "s")
        driver.clone((place / "v") @ "s", place / "c")
        take(driver, (place / "c") @ "only")
        driver.destroy_snapshot((place / "c") @ "only")
        driver.promote(place / "c")
        driver.destroy(place / "v")
        driver.destroy_snapshot((place / "c") @ "s")
        assert read(driver, place / "c", 0, BLOCK_BYTES) == noise(1)

    def test_recursive_destroys_those_of_that_name_below(self, driver: StorageDriver, place: DatasetName) -> None:
        driver.create_filesystem(place / "f")
        make_volume(driver, place / "f" / "v")
        make_volume(driver, place / "f" / "w")
        driver.snapshot((place / "f") @ "s", recursive=True)
        take(driver, (place / "f" / "v") @ "other")
        driver.destroy_snapshot((place / "f" / "w") @ "s")
        gone = driver.destroy_snapshot((place / "f") @ "s", recursive=True)
        assert sorted(gone) == [(place / "f") @ "s", (place / "f" / "v") @ "s"]
        assert names(driver.list_snapshots(place)) == [f"{place}/f/v@other"]

    def test_snapshot_with_a_clone_is_busy_and_names_it(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        take(driver, (place / "v") @ "s")
        driver.clone((place / "v") @ "s", place / "c")
        with pytest.raises(BusyError) as caught:
            driver.destroy_snapshot((place / "v") @ "s")
        assert f"{place}/c" in caught.value.dependants

    def test_recursive_snapshot_destroy_is_all_or_nothing(self, driver: StorageDriver, place: DatasetName) -> None:
        driver.create_filesystem(place / "f")
        make_volume(driver, place / "f" / "v")
        driver.snapshot((place / "f") @ "s", recursive=True)
        driver.hold((place / "f" / "v") @ "s", "keeper")
        with pytest.raises(BusyError) as caught:
            driver.destroy_snapshot((place / "f") @ "s", recursive=True)
        assert any("keeper" in dependant for dependant in caught.value.dependants)
        assert names(driver.list_snapshots(place)) == [f"{place}/f@s", f"{place}/f/v@s"]

    def test_snapshot_being_read_stays(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        take(driver, (place / "v") @ "s")
        with driver.open_snapshot((place / "v") @ "s"), pytest.raises(BusyError):
            driver.destroy_snapshot((place / "v") @ "s")
        driver.destroy_snapshot((place / "v") @ "s")

    def test_deferred_destroy_waits_for_the_last_clone(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        take(driver, (place / "v") @ "s")
        driver.clone((place / "v") @ "s", place / "c1")
        driver.clone((place / "v") @ "s", place / "c2")
        assert list(driver.destroy_snapshot((place / "v") @ "s", defer=True)) == []
        driver.destroy(place / "c1")
        assert names(driver.list_snapshots(place)) == [f"{place}/v@s"]
        driver.destroy(place / "c2")
        assert list(driver.list_snapshots(place)) == []

    def test_deferred_destroy_waits_for_the_last_hold(self, driver: StorageDriver, place: DatasetName) -> None:
        take(driver, place @ "s")
        for tag in ("a", "b"):
            driver.hold(place @ "s", tag)
        driver.destroy_snapshot(place @ "s", defer=True)
        driver.release(place @ "s", "a")
        assert names(driver.list_snapshots(place)) == [f"{place}@s"]
        driver.release(place @ "s", "b")
        assert list(driver.list_snapshots(place)) == []

    def test_deferred_destroy_of_what_nothing_needs_is_immediate(
        self, driver: StorageDriver, place: DatasetName
    ) -> None:
        take(driver, place @ "s")
        assert list(driver.destroy_snapshot(place @ "s", defer=True)) == [place @ "s"]
        assert list(driver.list_snapshots(place)) == []
