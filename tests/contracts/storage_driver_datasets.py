"""Rules on making and changing filesystems and volumes."""

from __future__ import annotations

import pytest

from agent_image.drivers.base import DatasetKind, StorageDriver
from imaging.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    MistifyError,
    NotFoundError,
    WrongKindError,
)
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


class DatasetRules(Suite):
    """create, clone, resize, rename, promote, properties, list."""

    # -- create ------------------------------------------------------------------------------------------------------

    def test_filesystem_is_there_with_what_it_was_made_with(self, driver: StorageDriver, place: DatasetName) -> None:
        made = driver.create_filesystem(place / "f", properties={"test:owner": "somebody"})
        assert driver.get(place / "f") == made
        assert made.kind is DatasetKind.FILESYSTEM
        assert made.guid > 0
        assert made.creation_s > 0
        assert (made.origin, made.volsize_bytes, made.volblocksize_bytes) == (None, None, None)
        assert made.properties["test:owner"] == "somebody"

    def test_volume_is_there_and_reads_as_zeros(self, driver: StorageDriver, place: DatasetName) -> None:
        made = make_volume(driver, place / "v")
        assert driver.get(place / "v") == made
        assert made.kind is DatasetKind.VOLUME
        assert (made.volsize_bytes, made.volblocksize_bytes) == (VOLUME_BYTES, BLOCK_BYTES)
        assert read_all(driver, place / "v") == bytes(VOLUME_BYTES)

    def test_volume_size_is_rounded_up_to_the_block(self, driver: StorageDriver, place: DatasetName) -> None:
        made = make_volume(driver, place / "v", size_bytes=MIB + 1)
        assert made.volsize_bytes == MIB + BLOCK_BYTES

    def test_volume_without_block_size_gets_a_power_of_two(self, driver: StorageDriver, place: DatasetName) -> None:
        made = driver.create_volume(place / "v", MIB, thin=True)
        assert made.volblocksize_bytes is not None
        assert made.volblocksize_bytes & (made.volblocksize_bytes - 1) == 0
        assert made.volsize_bytes == MIB

    @pytest.mark.parametrize("size_bytes", [0, -1, 1 << 63])
    def test_volume_of_an_impossible_size_is_refused(
        self, driver: StorageDriver, place: DatasetName, size_bytes: int
    ) -> None:
        with pytest.raises(InvalidArgumentError):
            driver.create_volume(place / "v", size_bytes, thin=True)
        assert names(driver.list(place)) == [str(place)]

    @pytest.mark.parametrize("block_bytes", [256, 1000, 12288, 1 << 30])
    def test_volume_of_an_impossible_block_size_is_refused(
        self, driver: StorageDriver, place: DatasetName, block_bytes: int
    ) -> None:
        with pytest.raises(InvalidArgumentError):
            driver.create_volume(place / "v", MIB, thin=True, volblocksize_bytes=block_bytes)
        assert names(driver.list(place)) == [str(place)]

    def test_existing_name_is_refused_and_kept(self, driver: StorageDriver, place: DatasetName) -> None:
        volume = make_volume(driver, place / "x")
        take(driver, (place / "x") @ "s")
        for call in (
            lambda: driver.create_filesystem(place / "x"),
            lambda: driver.create_filesystem(place / "x", parents=True),
            lambda: driver.create_volume(place / "x", MIB),
            lambda: driver.clone((place / "x") @ "s", place / "x"),
            lambda: driver.rename(place / "x", place / "x"),
        ):
            with pytest.raises(AlreadyExistsError):
                call()
        assert driver.get(place / "x") == volume

    def test_missing_parent_is_refused_unless_asked_for(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        take(driver, (place / "v") @ "s")
        for call in (
            lambda: driver.create_filesystem(place / "a" / "b"),
            lambda: driver.create_volume(place / "a" / "b", MIB, thin=True),
            lambda: driver.clone((place / "v") @ "s", place / "a" / "b"),
            lambda: driver.rename(place / "v", place / "a" / "b"),
        ):
            with pytest.raises(NotFoundError):
                call()
        driver.create_filesystem(place / "p" / "q" / "f", parents=True)
        driver.create_volume(place / "p" / "r" / "v", MIB, thin=True, parents=True)
        driver.clone((place / "v") @ "s", place / "p" / "t" / "c", parents=True)
        below = [name.removeprefix(f"{place}/") for name in names(driver.list(place))[1:]]
        assert below == ["p", "p/q", "p/q/f", "p/r", "p/r/v", "p/t", "p/t/c", "v"]

    def test_nothing_is_made_below_a_volume(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        driver.create_filesystem(place / "f")
        take(driver, (place / "v") @ "s")
        for call in (
            lambda: driver.create_filesystem(place / "v" / "below"),
            lambda: driver.create_volume(place / "v" / "below", MIB, thin=True),
            lambda: driver.create_volume(place / "v" / "a" / "b", MIB, thin=True, parents=True),
            lambda: driver.clone((place / "v") @ "s", place / "v" / "below"),
            lambda: driver.rename(place / "f", place / "v" / "below"),
        ):
            with pytest.raises(WrongKindError):
                call()
        assert names(driver.list(place)) == [str(place), f"{place}/f", f"{place}/v"]

    def test_guids_differ_and_createtxg_grows(self, driver: StorageDriver, place: DatasetName) -> None:
        made = [driver.create_filesystem(place / f"f{n}") for n in range(5)]
        assert len({info.guid for info in made}) == 5
        txgs = [info.createtxg for info in made]
        assert txgs == sorted(txgs)

    def test_volume_calls_on_a_filesystem_say_so(self, driver: StorageDriver, place: DatasetName) -> None:
        driver.create_filesystem(place / "f")
        take(driver, (place / "f") @ "s")
        for call in (
            lambda: driver.resize(place / "f", MIB),
            lambda: driver.device(place / "f"),
            lambda: driver.open_volume(place / "f").__enter__(),
            lambda: driver.open_volume(place / "f", writable=True).__enter__(),
            lambda: driver.open_snapshot((place / "f") @ "s").__enter__(),
        ):
            with pytest.raises(WrongKindError):
                call()

    # -- list --------------------------------------------------------------------------------------------------------

    def test_list_is_in_name_order_with_the_root_first(self, driver: StorageDriver, place: DatasetName) -> None:
        """By component, so that what is below a dataset follows it at once."""
        for leaf in ("a", "b", "a-1", "a.1", "B"):
            driver.create_filesystem(place / leaf)
        make_volume(driver, place / "a" / "z")
        make_volume(driver, place / "a" / "y")
        listed = [info.name for info in driver.list(place)]
        assert listed == sorted(listed)
        assert listed[0] == place
        assert len(listed) == 8
        assert names(driver.list(place / "a")) == [f"{place}/a", f"{place}/a/y", f"{place}/a/z"]

    def test_list_of_one_kind_leaves_out_the_other(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        driver.create_filesystem(place / "f")
        assert names(driver.list(place, kind=DatasetKind.VOLUME)) == [f"{place}/v"]
        assert names(driver.list(place, kind=DatasetKind.FILESYSTEM)) == [str(place), f"{place}/f"]
        assert names(driver.list(place / "v")) == [f"{place}/v"]

    def test_list_gives_what_get_gives(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        take(driver, (place / "v") @ "s")
        driver.clone((place / "v") @ "s", place / "c", properties={"test:a": "1"})
        for info in driver.list(place):
            assert info == driver.get(info.name)
        for snapshot in driver.list_snapshots(place):
            assert snapshot == driver.get_snapshot(snapshot.name)

    # -- properties --------------------------------------------------------------------------------------------------

    def test_properties_are_set_and_removed_together(self, driver: StorageDriver, place: DatasetName) -> None:
        driver.create_filesystem(place / "f", properties={"test:a": "1", "test:b": "2"})
        driver.set_properties(place / "f", {"test:a": None, "test:b": "two", "test:c": ""})
        properties = driver.get(place / "f").properties
        assert {k: v for k, v in properties.items() if k.startswith("test:")} == {"test:b": "two", "test:c": ""}

    def test_properties_belong_to_the_dataset_they_were_set_on(self, driver: StorageDriver, place: DatasetName) -> None:
        driver.create_filesystem(place / "f", properties={"test:a": "1", "readonly": "on"})
        child = driver.create_filesystem(place / "f" / "child")
        assert not [name for name in child.properties if name.startswith("test:") or name == "readonly"]
        assert driver.get(place / "f").properties["readonly"] == "on"

    @pytest.mark.parametrize("name", ["", "nocolon", "Test:upper", "volsize", "mountpoint", "a:" + "x" * 300])
    def test_property_that_cannot_be_set_changes_nothing(
        self, driver: StorageDriver, place: DatasetName, name: str
    ) -> None:
        driver.create_filesystem(place / "f")
        with pytest.raises(InvalidArgumentError):
            driver.set_properties(place / "f", {"test:good": "1", name: "x"})
        assert "test:good" not in driver.get(place / "f").properties
        with pytest.raises(InvalidArgumentError):
            driver.create_filesystem(place / "g", properties={name: "x"})
        assert names(driver.list(place)) == [str(place), f"{place}/f"]

    @pytest.mark.parametrize(("name", "value"), [("readonly", "maybe"), ("quota", "much"), ("quota", "-1")])
    def test_value_that_cannot_be_is_refused(
        self, driver: StorageDriver, place: DatasetName, name: str, value: str
    ) -> None:
        with pytest.raises(InvalidArgumentError):
            driver.set_properties(place, {name: value})

    # -- clone and promote -------------------------------------------------------------------------------------------

    def test_clone_starts_as_the_snapshot_and_goes_its_own_way(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        write(driver, place / "v", 0, noise(1))
        take(driver, (place / "v") @ "s")
        write(driver, place / "v", 0, noise(2))
        made = driver.clone((place / "v") @ "s", place / "c")
        assert (made.kind, made.origin) == (DatasetKind.VOLUME, (place / "v") @ "s")
        assert (made.volsize_bytes, made.volblocksize_bytes) == (VOLUME_BYTES, BLOCK_BYTES)
        assert read(driver, place / "c", 0, BLOCK_BYTES) == noise(1)
        write(driver, place / "c", 0, noise(3))
        assert read(driver, place / "c", 0, BLOCK_BYTES) == noise(3)
        assert read(driver, place / "v", 0, BLOCK_BYTES) == noise(2)
        assert read(driver, (place / "v") @ "s", 0, BLOCK_BYTES) == noise(1)

    def test_clones_are_listed_by_name(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        take(driver, (place / "v") @ "s")
        assert list(driver.clones((place / "v") @ "s")) == []
        for leaf in ("c2", "c1"):
            driver.clone((place / "v") @ "s", place / leaf)
        assert list(driver.clones((place / "v") @ "s")) == [place / "c1", place / "c2"]

    def test_clone_of_a_filesystem_is_one(self, driver: StorageDriver, place: DatasetName) -> None:
        driver.create_filesystem(place / "f")
        take(driver, (place / "f") @ "s")
        assert driver.clone((place / "f") @ "s", place / "c").kind is DatasetKind.FILESYSTEM

    def test_promoted_clone_owns_the_history(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        for number in range(3):
            write(driver, place / "v", 0, noise(number))
            take(driver, (place / "v") @ f"s{number}")
        driver.clone((place / "v") @ "s1", place / "c")
        write(driver, place / "c", BLOCK_BYTES, noise(9))
        driver.promote(place / "c")
        assert names(driver.list_snapshots(place)) == [f"{place}/c@s0", f"{place}/c@s1", f"{place}/v@s2"]
        assert driver.get(place / "c").origin is None
        assert driver.get(place / "v").origin == (place / "c") @ "s1"
        assert read(driver, (place / "c") @ "s0", 0, BLOCK_BYTES) == noise(0)
        assert read(driver, place / "c", 0, 2 * BLOCK_BYTES) == noise(1) + noise(9)
        assert read(driver, place / "v", 0, BLOCK_BYTES) == noise(2)
        driver.destroy(place / "v", recursive=True)
        driver.destroy(place / "c", recursive=True)

    def test_promote_of_what_is_no_clone_is_refused(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        with pytest.raises(InvalidArgumentError):
            driver.promote(place / "v")

    def test_promote_onto_a_snapshot_of_that_name_is_refused(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        take(driver, (place / "v") @ "s")
        driver.clone((place / "v") @ "s", place / "c")
        take(driver, (place / "c") @ "s")
        with pytest.raises(AlreadyExistsError):
            driver.promote(place / "c")
        assert driver.get(place / "c").origin == (place / "v") @ "s"

    # -- resize ------------------------------------------------------------------------------------------------------

    def test_resize_keeps_what_stays_and_adds_zeros(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v", size_bytes=MIB)
        write(driver, place / "v", MIB - BLOCK_BYTES, noise(1))
        assert driver.resize(place / "v", 2 * MIB - 1).volsize_bytes == 2 * MIB
        assert read_all(driver, place / "v") == bytes(MIB - BLOCK_BYTES) + noise(1) + bytes(MIB)
        assert driver.resize(place / "v", MIB // 2).volsize_bytes == MIB // 2
        driver.resize(place / "v", MIB)
        assert read_all(driver, place / "v") == bytes(MIB)
        assert driver.get(place / "v").volsize_bytes == MIB

    def test_resize_leaves_snapshots_and_clones_alone(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v", size_bytes=MIB)
        write(driver, place / "v", 0, noise(1, MIB))
        take(driver, (place / "v") @ "s")
        driver.clone((place / "v") @ "s", place / "c")
        driver.resize(place / "v", MIB // 2)
        driver.resize(place / "c", 2 * MIB)
        assert driver.get_snapshot((place / "v") @ "s").volsize_bytes == MIB
        assert read_all(driver, (place / "v") @ "s") == noise(1, MIB)
        assert read_all(driver, place / "c") == noise(1, MIB) + bytes(MIB)
        assert read_all(driver, place / "v") == noise(1, MIB)[: MIB // 2]

    @pytest.mark.parametrize("size_bytes", [0, -BLOCK_BYTES, 1 << 63])
    def test_resize_to_an_impossible_size_changes_nothing(
        self, driver: StorageDriver, place: DatasetName, size_bytes: int
    ) -> None:
        made = make_volume(driver, place / "v")
        with pytest.raises(InvalidArgumentError):
            driver.resize(place / "v", size_bytes)
        assert driver.get(place / "v") == made

    # -- rename ------------------------------------------------------------------------------------------------------

    def test_rename_takes_everything_below_along(self, driver: StorageDriver, place: DatasetName) -> None:
        driver.create_filesystem(place / "a")
        volume = make_volume(driver, place / "a" / "v")
        write(driver, place / "a" / "v", 0, noise(1))
        snapshot = take(driver, (place / "a" / "v") @ "s")
        driver.clone(snapshot.name, place / "c")
        driver.create_filesystem(place / "b")
        driver.rename(place / "a", place / "b" / "n")
        moved = place / "b" / "n" / "v"
        assert names(driver.list(place)) == [str(place), f"{place}/b", f"{place}/b/n", str(moved), f"{place}/c"]
        assert driver.get(moved).guid == volume.guid
        assert driver.get_snapshot(moved @ "s").guid == snapshot.guid
        assert driver.get(place / "c").origin == moved @ "s"
        assert read(driver, moved, 0, BLOCK_BYTES) == noise(1)
        write(driver, moved, 0, noise(2))
        assert read(driver, moved @ "s", 0, BLOCK_BYTES) == noise(1)

    def test_rename_of_the_root_or_below_itself_is_refused(self, driver: StorageDriver, place: DatasetName) -> None:
        driver.create_filesystem(place / "a" / "b", parents=True)
        with pytest.raises(InvalidArgumentError):
            driver.rename(place / "a", place / "a" / "b" / "c")
        with pytest.raises(MistifyError):
            driver.rename(driver.pool.root, place / "r")
        assert names(driver.list(place)) == [str(place), f"{place}/a", f"{place}/a/b"]
