"""Rules on names and on the life of a driver."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest

from agent_image.drivers.base import DatasetKind, StorageDriver
from imaging.errors import BusyError, InvalidNameError, NotFoundError, UnavailableError
from imaging.names import DatasetName
from tests.contracts.storage_driver_tools import Suite, make_volume, names, stream_of, take

ELSEWHERE = DatasetName.parse("otherpool/x")

Call = Callable[[StorageDriver, Any], object]

DATASET_CALLS: dict[str, Call] = {
    "get": lambda d, n: d.get(n),
    "list": lambda d, n: d.list(n),
    "list_snapshots": lambda d, n: d.list_snapshots(n),
    "usage": lambda d, n: d.usage(n),
    "resize": lambda d, n: d.resize(n, 1 << 20),
    "promote": lambda d, n: d.promote(n),
    "destroy": lambda d, n: d.destroy(n),
    "destroy-recursive": lambda d, n: d.destroy(n, recursive=True),
    "set_properties": lambda d, n: d.set_properties(n, {"test:a": "b"}),
    "device": lambda d, n: d.device(n),
    "open_volume": lambda d, n: d.open_volume(n).__enter__(),
    "open_volume-writable": lambda d, n: d.open_volume(n, writable=True).__enter__(),
    "rename": lambda d, n: d.rename(n, d.pool.root / "renamed"),
    "snapshot": lambda d, n: d.snapshot(n @ "s"),
    "snapshot-recursive": lambda d, n: d.snapshot(n @ "s", recursive=True),
}

SNAPSHOT_CALLS: dict[str, Call] = {
    "get_snapshot": lambda d, s: d.get_snapshot(s),
    "clones": lambda d, s: d.clones(s),
    "usage": lambda d, s: d.usage(s),
    "clone": lambda d, s: d.clone(s, d.pool.root / "cloned"),
    "destroy_snapshot": lambda d, s: d.destroy_snapshot(s),
    "rollback": lambda d, s: d.rollback(s),
    "hold": lambda d, s: d.hold(s, "tag"),
    "release": lambda d, s: d.release(s, "tag"),
    "holds": lambda d, s: d.holds(s),
    "bookmark": lambda d, s: d.bookmark(s, "b"),
    "open_snapshot": lambda d, s: d.open_snapshot(s).__enter__(),
    "send": lambda d, s: d.send(s, -1),
}

MAKING_CALLS: dict[str, Call] = {
    "create_filesystem": lambda d, n: d.create_filesystem(n),
    "create_volume": lambda d, n: d.create_volume(n, 1 << 20),
}


class NameRules(Suite):
    """Nothing leaves the pool, and what is not there is said so."""

    @pytest.mark.parametrize("call", sorted(DATASET_CALLS))
    def test_dataset_call_with_absent_name_is_not_found(
        self, driver: StorageDriver, place: DatasetName, call: str
    ) -> None:
        before = names(driver.list(driver.pool.root))
        with pytest.raises(NotFoundError):
            DATASET_CALLS[call](driver, place / "absent")
        assert names(driver.list(driver.pool.root)) == before

    @pytest.mark.parametrize("call", sorted(SNAPSHOT_CALLS))
    def test_snapshot_call_with_absent_name_is_not_found(
        self, driver: StorageDriver, place: DatasetName, call: str
    ) -> None:
        with pytest.raises(NotFoundError):
            SNAPSHOT_CALLS[call](driver, place @ "absent")
        with pytest.raises(NotFoundError):
            SNAPSHOT_CALLS[call](driver, (place / "absent") @ "s")

    @pytest.mark.parametrize("call", sorted(DATASET_CALLS | MAKING_CALLS))
    def test_dataset_call_with_another_pools_name_is_refused(self, driver: StorageDriver, call: str) -> None:
        with pytest.raises(InvalidNameError):
            (DATASET_CALLS | MAKING_CALLS)[call](driver, ELSEWHERE)

    @pytest.mark.parametrize("call", sorted(SNAPSHOT_CALLS))
    def test_snapshot_call_with_another_pools_name_is_refused(self, driver: StorageDriver, call: str) -> None:
        with pytest.raises(InvalidNameError):
            SNAPSHOT_CALLS[call](driver, ELSEWHERE @ "s")

    def test_target_in_another_pool_is_refused(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        take(driver, (place / "v") @ "s")
        stream = stream_of(driver, (place / "v") @ "s")
        with pytest.raises(InvalidNameError):
            driver.rename(place / "v", ELSEWHERE)
        with pytest.raises(InvalidNameError):
            driver.clone((place / "v") @ "s", ELSEWHERE)
        with pytest.raises(InvalidNameError):
            driver.receive(ELSEWHERE @ "s", io.BytesIO(stream))
        assert names(driver.list(place)) == [str(place), f"{place}/v"]

    def test_name_longer_than_the_limit_after_a_rename_is_refused(
        self, driver: StorageDriver, place: DatasetName
    ) -> None:
        """The names of what is below count too."""
        driver.create_filesystem(place / "a" / ("b" * 120), parents=True)
        driver.create_filesystem(place / ("c" * 100))
        with pytest.raises(InvalidNameError):
            driver.rename(place / "a", place / ("c" * 100) / ("d" * 30))
        assert driver.get(place / "a" / ("b" * 120)).kind is DatasetKind.FILESYSTEM

    def test_bookmark_that_is_no_name_is_refused(self, driver: StorageDriver, place: DatasetName) -> None:
        take(driver, place @ "s")
        for bad in ("", "a/b", "a b", "a#b", "a@b"):
            with pytest.raises(InvalidNameError):
                driver.bookmark(place @ "s", bad)

    # -- life --------------------------------------------------------------------------------------------------------

    def test_driver_says_what_it_is(self, driver: StorageDriver) -> None:
        assert isinstance(driver, StorageDriver)
        assert driver.name
        assert driver.get(driver.pool.root).kind is DatasetKind.FILESYSTEM
        assert driver.get(driver.pool.root).name == driver.pool.root

    def test_open_twice_and_close_twice_are_fine(self, driver: StorageDriver, place: DatasetName) -> None:
        driver.open()
        driver.close()
        driver.close()
        with pytest.raises(UnavailableError):
            driver.get(place)
        driver.open()
        assert driver.get(place).name == place

    def test_second_driver_of_one_pool_is_busy_until_the_first_closes(
        self, driver: StorageDriver, rival: StorageDriver, place: DatasetName
    ) -> None:
        with pytest.raises(BusyError):
            rival.open()
        driver.close()
        try:
            rival.open()
            assert rival.get(place).name == place
            rival.close()
        finally:
            driver.open()

    def test_everything_is_there_after_close_and_open(self, driver: StorageDriver, place: DatasetName) -> None:
        volume = make_volume(driver, place / "v")
        made = take(driver, (place / "v") @ "s")
        driver.hold(made.name, "tag")
        clone = driver.clone(made.name, place / "c", properties={"test:p": "x"})
        driver.close()
        driver.open()
        assert driver.get(place / "v") == volume
        assert driver.get_snapshot(made.name) == made
        assert driver.holds(made.name) == ["tag"]
        assert driver.get(place / "c") == clone
        assert driver.clones(made.name) == [place / "c"]
