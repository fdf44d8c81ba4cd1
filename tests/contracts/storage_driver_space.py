"""Rules on space. What is compared has room for metadata and padding; what ZFS counts a txg later is waited for."""

from __future__ import annotations

import threading

import pytest

from agent_image.drivers.base import StorageDriver, Usage
from imaging.errors import InvalidArgumentError, MistifyError, NoSpaceError
from imaging.names import DatasetName, SnapshotName
from tests.contracts.storage_driver_tools import (
    MIB,
    Suite,
    make_volume,
    names,
    noise,
    receive,
    stream_of,
    take,
    write,
)
from tests.waiting import wait_until

SLACK_BYTES = 2 * MIB
"""Metadata, padding and what is counted a little later."""


class SpaceRules(Suite):
    """usage, quota, thick and thin."""

    def test_new_thin_volume_takes_next_to_nothing(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v", size_bytes=64 * MIB)
        usage = driver.usage(place / "v")
        assert max(usage.used_bytes, usage.referenced_bytes, usage.written_bytes) <= SLACK_BYTES
        assert usage.refreservation_bytes == 0
        assert usage.quota_bytes == 0

    def test_written_data_is_counted_at_the_volume_and_above(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v", size_bytes=64 * MIB)
        before = driver.usage(place).used_bytes
        write(driver, place / "v", 0, noise(1, 8 * MIB))
        usage = settled(driver, place / "v", lambda u: u.written_bytes >= 8 * MIB)
        for counted in (usage.used_bytes, usage.referenced_bytes, usage.written_bytes):
            assert 8 * MIB <= counted <= 8 * MIB + SLACK_BYTES
        above = settled(driver, place, lambda u: u.used_bytes >= before + 8 * MIB)
        assert above.used_bytes <= before + 8 * MIB + SLACK_BYTES

    def test_written_starts_anew_with_each_snapshot(self, driver: StorageDriver, place: DatasetName) -> None:
        volume = place / "v"
        make_volume(driver, volume, size_bytes=64 * MIB)
        write(driver, volume, 0, noise(1, 8 * MIB))
        take(driver, volume @ "s1")
        settled(driver, volume, lambda u: u.written_bytes <= SLACK_BYTES)
        write(driver, volume, 0, noise(2, 4 * MIB))
        settled(driver, volume, lambda u: 4 * MIB <= u.written_bytes <= 4 * MIB + SLACK_BYTES)
        take(driver, volume @ "s2")
        first, second = driver.usage(volume @ "s1"), driver.usage(volume @ "s2")
        assert 8 * MIB <= first.written_bytes <= 8 * MIB + SLACK_BYTES
        assert 4 * MIB <= second.written_bytes <= 4 * MIB + SLACK_BYTES
        for usage in (first, second):
            assert 8 * MIB <= usage.referenced_bytes <= 8 * MIB + SLACK_BYTES
            assert usage.available_bytes == 0
        pair = [volume @ "s1", volume @ "s2"]
        both = {pair[0]: first.written_bytes, pair[1]: second.written_bytes}
        assert driver.written([*pair, volume @ "absent", place / "absent" @ "s"]) == both
        assert driver.written(pair) == both
        driver.destroy_snapshot(volume @ "s1")
        settled(driver, volume @ "s2", lambda u: u.written_bytes >= 8 * MIB)
        assert driver.written(pair) == {pair[1]: driver.usage(volume @ "s2").written_bytes}

    def test_written_of_a_clone_starts_at_its_origin(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v", size_bytes=64 * MIB)
        write(driver, place / "v", 0, noise(1, 8 * MIB))
        take(driver, (place / "v") @ "s")
        driver.clone((place / "v") @ "s", place / "c")
        usage = settled(driver, place / "c", lambda u: u.referenced_bytes >= 8 * MIB)
        assert usage.written_bytes <= SLACK_BYTES
        write(driver, place / "c", 16 * MIB, noise(2, 2 * MIB))
        settled(driver, place / "c", lambda u: 2 * MIB <= u.written_bytes <= 2 * MIB + SLACK_BYTES)

    def test_destroying_gives_the_space_back(self, driver: StorageDriver, place: DatasetName) -> None:
        before = driver.usage(place).available_bytes
        make_volume(driver, place / "v", size_bytes=64 * MIB)
        write(driver, place / "v", 0, noise(1, 32 * MIB))
        settled(driver, place, lambda u: u.available_bytes <= before - 32 * MIB)
        driver.destroy(place / "v")
        settled(driver, place, lambda u: u.available_bytes >= before - SLACK_BYTES)

    # -- thick and thin ----------------------------------------------------------------------------------------------

    def test_thick_volume_reserves_its_size_at_once(self, driver: StorageDriver, place: DatasetName) -> None:
        before = driver.usage(place).available_bytes
        size_bytes = 64 * MIB
        make_volume(driver, place / "v", size_bytes=size_bytes, thin=False)
        usage = driver.usage(place / "v")
        assert size_bytes <= usage.refreservation_bytes <= size_bytes * 5 // 4
        assert usage.used_bytes >= size_bytes
        assert usage.available_bytes >= size_bytes
        settled(driver, place, lambda u: u.available_bytes <= before - size_bytes + SLACK_BYTES)
        write(driver, place / "v", 0, noise(1, 8 * MIB))
        usage = settled(driver, place / "v", lambda u: u.referenced_bytes >= 8 * MIB)
        assert usage.used_bytes <= usage.refreservation_bytes + SLACK_BYTES

    def test_thick_volume_larger_than_the_pool_is_refused_at_once(
        self, driver: StorageDriver, place: DatasetName
    ) -> None:
        room = driver.usage(place).available_bytes
        with pytest.raises(NoSpaceError):
            make_volume(driver, place / "v", size_bytes=room + 64 * MIB, thin=False)
        assert names(driver.list(place)) == [str(place)]
        made = make_volume(driver, place / "v", size_bytes=room + 64 * MIB)
        assert made.volsize_bytes is not None
        assert made.volsize_bytes > room

    def test_refused_thick_volume_leaves_no_parents(self, driver: StorageDriver, place: DatasetName) -> None:
        room = driver.usage(place).available_bytes
        with pytest.raises(NoSpaceError):
            driver.create_volume(place / "a" / "b" / "v", room + 64 * MIB, parents=True)
        assert names(driver.list(place)) == [str(place)]

    def test_thick_volumes_made_at_once_never_promise_too_much(self, driver: StorageDriver, place: DatasetName) -> None:
        room = driver.usage(place).available_bytes
        size_bytes = room // 3
        made: list[int] = []

        def run(number: int) -> None:
            try:
                make_volume(driver, place / f"v{number}", size_bytes=size_bytes, thin=False)
            except NoSpaceError:
                return
            made.append(number)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 2 <= len(made) <= 3
        assert len(driver.list(place)) == 1 + len(made)

    def test_resize_of_a_thick_volume_reserves_the_new_size(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v", size_bytes=16 * MIB, thin=False)
        driver.resize(place / "v", 48 * MIB)
        assert 48 * MIB <= driver.usage(place / "v").refreservation_bytes <= 60 * MIB
        room = driver.usage(place).available_bytes
        with pytest.raises(NoSpaceError):
            driver.resize(place / "v", room + 128 * MIB)
        assert driver.get(place / "v").volsize_bytes == 48 * MIB

    def test_clone_of_a_thick_volume_reserves_nothing(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v", size_bytes=16 * MIB, thin=False)
        take(driver, (place / "v") @ "s")
        driver.clone((place / "v") @ "s", place / "c")
        assert driver.usage(place / "c").refreservation_bytes == 0

    # -- quota -------------------------------------------------------------------------------------------------------

    def test_quota_limits_what_is_available_below(self, driver: StorageDriver, place: DatasetName) -> None:
        driver.create_filesystem(place / "f", properties={"quota": str(64 * MIB)})
        driver.create_filesystem(place / "f" / "g")
        assert driver.usage(place / "f").quota_bytes == 64 * MIB
        assert driver.usage(place / "f" / "g").available_bytes <= 64 * MIB
        with pytest.raises(NoSpaceError):
            make_volume(driver, place / "f" / "g" / "v", size_bytes=65 * MIB, thin=False)
        make_volume(driver, place / "f" / "g" / "v", size_bytes=32 * MIB, thin=False)
        assert driver.usage(place / "f").available_bytes <= 32 * MIB

    @pytest.mark.parametrize("none", [None, "none"])
    def test_quota_can_be_lifted(self, driver: StorageDriver, place: DatasetName, none: str | None) -> None:
        driver.set_properties(place, {"quota": str(16 * MIB)})
        assert driver.usage(place).available_bytes <= 16 * MIB
        driver.set_properties(place, {"quota": none})
        assert driver.usage(place).quota_bytes == 0
        assert driver.usage(place).available_bytes > 16 * MIB

    def test_quota_below_what_is_used_is_refused(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v", size_bytes=32 * MIB, thin=False)
        with pytest.raises(NoSpaceError):
            driver.set_properties(place, {"quota": str(8 * MIB)})
        assert driver.usage(place).quota_bytes == 0

    def test_volume_has_no_quota(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        with pytest.raises(InvalidArgumentError):
            driver.set_properties(place / "v", {"quota": str(MIB)})

    def test_receive_beyond_the_quota_leaves_nothing(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v", size_bytes=64 * MIB)
        write(driver, place / "v", 0, noise(1, 24 * MIB))
        take(driver, (place / "v") @ "s")
        stream = stream_of(driver, (place / "v") @ "s")
        driver.create_filesystem(place / "f", properties={"quota": str(12 * MIB)})
        with pytest.raises(NoSpaceError):
            receive(driver, (place / "f" / "w") @ "s", stream)
        assert names(driver.list(place / "f")) == [f"{place}/f"]
        settled(driver, place / "f", lambda u: u.used_bytes <= SLACK_BYTES)

    def test_usage_of_the_pool_is_its_capacity(self, driver: StorageDriver, place: DatasetName) -> None:
        """What is used and what is available add up to the same, whatever is made."""
        usage = driver.usage(driver.pool.root)
        capacity = usage.used_bytes + usage.available_bytes
        make_volume(driver, place / "v", size_bytes=64 * MIB)
        write(driver, place / "v", 0, noise(1, 16 * MIB))
        make_volume(driver, place / "thick", size_bytes=32 * MIB, thin=False)
        usage = settled(driver, driver.pool.root, lambda u: u.used_bytes >= 48 * MIB)
        assert abs(usage.used_bytes + usage.available_bytes - capacity) <= 4 * SLACK_BYTES


def settled(driver: StorageDriver, name: DatasetName | SnapshotName, holds: object) -> Usage:
    """The usage once ``holds`` says so."""
    assert callable(holds)
    seen: list[Usage] = []

    def check() -> Usage | None:
        try:
            seen.append(driver.usage(name))
        except MistifyError as err:
            raise AssertionError(f"usage of {name}") from err
        return seen[-1] if holds(seen[-1]) else None

    try:
        found = wait_until(check, f"usage of {name}")
    except AssertionError as err:
        raise AssertionError(f"usage of {name} stays {seen[-1]}") from err
    assert found is not None
    return found
