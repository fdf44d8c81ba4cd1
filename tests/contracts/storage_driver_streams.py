"""Rules on send and receive."""

from __future__ import annotations

import io
import os
import threading

import pytest

from agent_image.drivers.base import DatasetKind, SendFlags, StorageDriver
from imaging.errors import (
    AlreadyExistsError,
    BadDataError,
    BusyError,
    ConflictError,
    InvalidArgumentError,
    MistifyError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)
from imaging.names import DatasetName, SnapshotName
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
    receive,
    stream_of,
    take,
    write,
)
from tests.waiting import wait_until

FLAGS = {
    "plain": SendFlags(),
    "compressed": SendFlags(compressed=True),
    "large_blocks": SendFlags(large_blocks=True),
    "embedded": SendFlags(embedded=True),
    "raw": SendFlags(raw=True),
    "properties": SendFlags(properties=True),
    "all": SendFlags(compressed=True, large_blocks=True, embedded=True, properties=True),
}


def make_history(driver: StorageDriver, volume: DatasetName) -> list[SnapshotName]:
    """A volume with three snapshots: written; overwritten and zeroed in part; grown."""
    make_volume(driver, volume)
    write(driver, volume, 0, noise(1, 16 * BLOCK_BYTES) + b"text " * 4096)
    take(driver, volume @ "s0")
    write(driver, volume, 2 * BLOCK_BYTES, noise(2) + bytes(4 * BLOCK_BYTES))
    write(driver, volume, 3 * MIB, noise(3))
    take(driver, volume @ "s1")
    driver.resize(volume, VOLUME_BYTES + MIB)
    write(driver, volume, VOLUME_BYTES, noise(4))
    take(driver, volume @ "s2")
    return [volume @ name for name in ("s0", "s1", "s2")]


class StreamRules(Suite):
    """A stream carries a snapshot whole or not at all."""

    @pytest.mark.parametrize("flags", sorted(FLAGS))
    def test_received_snapshot_is_the_sent_one(self, driver: StorageDriver, place: DatasetName, flags: str) -> None:
        s0, s1, _ = make_history(driver, place / "v")
        target = place / "w"
        for snapshot, base in ((s0, None), (s1, "s0")):
            stream = stream_of(driver, snapshot, base=base, flags=FLAGS[flags])
            made = receive(driver, target @ snapshot.snapshot, stream)
            sent = driver.get_snapshot(snapshot)
            assert made == driver.get_snapshot(target @ snapshot.snapshot)
            assert (made.guid, made.creation_s, made.volsize_bytes) == (sent.guid, sent.creation_s, sent.volsize_bytes)
            assert read_all(driver, made.name) == read_all(driver, snapshot)
            assert read_all(driver, target) == read_all(driver, snapshot)
        info = driver.get(target)
        assert (info.kind, info.volblocksize_bytes, info.origin) == (DatasetKind.VOLUME, BLOCK_BYTES, None)

    def test_increment_over_several_snapshots_and_sizes(self, driver: StorageDriver, place: DatasetName) -> None:
        s0, _, s2 = make_history(driver, place / "v")
        receive(driver, (place / "w") @ "a", stream_of(driver, s0))
        receive(driver, (place / "w") @ "b", stream_of(driver, s2, base="s0"))
        assert driver.get(place / "w").volsize_bytes == VOLUME_BYTES + MIB
        assert read_all(driver, place / "w") == read_all(driver, s2)
        assert read_all(driver, (place / "w") @ "a") == read_all(driver, s0)

    def test_snapshot_is_named_as_the_target_says(self, driver: StorageDriver, place: DatasetName) -> None:
        s0, *_ = make_history(driver, place / "v")
        receive(driver, (place / "w") @ "other", stream_of(driver, s0))
        assert names(driver.list_snapshots(place / "w")) == [f"{place}/w@other"]

    def test_volume_never_written_to_is_sent_and_received(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        take(driver, (place / "v") @ "s")
        receive(driver, (place / "w") @ "s", stream_of(driver, (place / "v") @ "s"))
        assert read_all(driver, place / "w") == bytes(VOLUME_BYTES)

    def test_received_volume_can_be_written_and_used_on(self, driver: StorageDriver, place: DatasetName) -> None:
        s0, *_ = make_history(driver, place / "v")
        made = receive(driver, (place / "w") @ "s", stream_of(driver, s0))
        write(driver, place / "w", 0, noise(9))
        driver.clone(made.name, place / "c")
        assert read(driver, place / "w", 0, BLOCK_BYTES) == noise(9)
        assert read(driver, place / "c", 0, BLOCK_BYTES) == read(driver, s0, 0, BLOCK_BYTES)

    def test_properties_are_set_on_what_is_received(self, driver: StorageDriver, place: DatasetName) -> None:
        s0, *_ = make_history(driver, place / "v")
        properties = {"test:a": "1", "readonly": "on"}
        driver.receive((place / "w") @ "s", io.BytesIO(stream_of(driver, s0)), properties=properties)
        assert properties.items() <= driver.get(place / "w").properties.items()

    # -- bases -------------------------------------------------------------------------------------------------------

    def test_increment_from_the_origin_makes_a_clone_of_it(self, driver: StorageDriver, place: DatasetName) -> None:
        s0, *_ = make_history(driver, place / "v")
        driver.clone(s0, place / "c")
        write(driver, place / "c", BLOCK_BYTES, noise(7))
        take(driver, (place / "c") @ "mine")
        stream = stream_of(driver, (place / "c") @ "mine", base=str(s0))
        assert len(stream) < len(stream_of(driver, (place / "c") @ "mine"))
        driver.receive((place / "d") @ "mine", io.BytesIO(stream), origin=s0)
        assert driver.get(place / "d").origin == s0
        assert read_all(driver, place / "d") == read_all(driver, (place / "c") @ "mine")

    def test_full_stream_onto_an_origin_makes_a_clone_of_it(self, driver: StorageDriver, place: DatasetName) -> None:
        s0, s1, _ = make_history(driver, place / "v")
        driver.receive((place / "d") @ "x", io.BytesIO(stream_of(driver, s1)), origin=s0)
        assert driver.get(place / "d").origin == s0
        assert read_all(driver, place / "d") == read_all(driver, s1)
        with pytest.raises(BusyError):
            driver.destroy_snapshot(s0)

    def test_increment_from_a_bookmark_while_its_snapshot_is_there(
        self, driver: StorageDriver, place: DatasetName
    ) -> None:
        s0, s1, _ = make_history(driver, place / "v")
        driver.bookmark(s0, "b0")
        receive(driver, (place / "w") @ "s0", stream_of(driver, s0))
        receive(driver, (place / "w") @ "s1", stream_of(driver, s1, base="#b0"))
        assert read_all(driver, place / "w") == read_all(driver, s1)

    def test_increment_from_a_bookmark_whose_snapshot_is_gone_is_right_or_refused(
        self, driver: StorageDriver, place: DatasetName
    ) -> None:
        s0, s1, _ = make_history(driver, place / "v")
        driver.bookmark(s0, "b0")
        receive(driver, (place / "w") @ "s0", stream_of(driver, s0))
        driver.destroy_snapshot(s0)
        try:
            stream = stream_of(driver, s1, base="#b0")
        except UnsupportedError:
            assert driver.name == "file"  # it has nothing to compare with
        else:
            receive(driver, (place / "w") @ "s1", stream)
            assert read_all(driver, place / "w") == read_all(driver, s1)

    def test_base_that_is_not_there_is_not_found(self, driver: StorageDriver, place: DatasetName) -> None:
        s0, *_ = make_history(driver, place / "v")
        for base in ("absent", "#absent", f"{place}/v@absent", f"{place}/absent@s"):
            with pytest.raises(NotFoundError):
                stream_of(driver, s0, base=base)

    def test_base_that_is_not_older_is_refused(self, driver: StorageDriver, place: DatasetName) -> None:
        s0, s1, _ = make_history(driver, place / "v")
        make_volume(driver, place / "x")
        take(driver, (place / "x") @ "s")
        for base in ("s1", "s2", f"{place}/x@s"):
            with pytest.raises(InvalidArgumentError):
                stream_of(driver, s1, base=base)
        assert read_all(driver, s0)

    # -- refusals ----------------------------------------------------------------------------------------------------

    def test_full_stream_onto_what_exists_is_refused(self, driver: StorageDriver, place: DatasetName) -> None:
        s0, *_ = make_history(driver, place / "v")
        stream = stream_of(driver, s0)
        make_volume(driver, place / "w")
        driver.create_filesystem(place / "f")
        for leaf in ("w", "f", "v"):
            with pytest.raises(AlreadyExistsError):
                receive(driver, (place / leaf) @ "new", stream)
        assert read_all(driver, place / "w") == bytes(VOLUME_BYTES)

    def test_stream_below_what_is_not_there_or_a_volume_is_refused(
        self, driver: StorageDriver, place: DatasetName
    ) -> None:
        s0, *_ = make_history(driver, place / "v")
        stream = stream_of(driver, s0)
        with pytest.raises(NotFoundError):
            receive(driver, (place / "a" / "w") @ "s", stream)
        with pytest.raises(InvalidArgumentError):
            receive(driver, (place / "v" / "w") @ "s", stream)
        with pytest.raises(NotFoundError):
            receive(driver, (place / "w") @ "s", stream, origin=(place / "v") @ "absent")
        assert names(driver.list(place)) == [str(place), f"{place}/v"]

    def test_increment_without_its_base_conflicts_and_names_the_guid(
        self, driver: StorageDriver, place: DatasetName
    ) -> None:
        s0, s1, s2 = make_history(driver, place / "v")
        wanted = str(driver.get_snapshot(s1).guid)
        stream = stream_of(driver, s2, base="s1")
        make_volume(driver, place / "empty")
        receive(driver, (place / "other") @ "s", stream_of(driver, s0))
        for target, origin in (("absent", None), ("empty", None), ("other", None), ("new", s0)):
            with pytest.raises(ConflictError) as caught:
                receive(driver, (place / target) @ "x", stream, origin=origin)
            assert wanted in caught.value.message, target
        assert names(driver.list_snapshots(place / "other")) == [f"{place}/other@s"]
        assert len(driver.list(place)) == 4

    def test_increment_onto_a_changed_volume_conflicts(self, driver: StorageDriver, place: DatasetName) -> None:
        s0, s1, _ = make_history(driver, place / "v")
        receive(driver, (place / "w") @ "s0", stream_of(driver, s0))
        write(driver, place / "w", 20 * BLOCK_BYTES, noise(8))
        with pytest.raises(ConflictError):
            receive(driver, (place / "w") @ "s1", stream_of(driver, s1, base="s0"))
        assert read(driver, place / "w", 20 * BLOCK_BYTES, BLOCK_BYTES) == noise(8)
        driver.rollback((place / "w") @ "s0")
        receive(driver, (place / "w") @ "s1", stream_of(driver, s1, base="s0"))
        assert read_all(driver, place / "w") == read_all(driver, s1)

    def test_increment_onto_a_volume_with_newer_snapshots_conflicts(
        self, driver: StorageDriver, place: DatasetName
    ) -> None:
        s0, s1, _ = make_history(driver, place / "v")
        receive(driver, (place / "w") @ "s0", stream_of(driver, s0))
        take(driver, (place / "w") @ "newer")
        with pytest.raises(ConflictError):
            receive(driver, (place / "w") @ "s1", stream_of(driver, s1, base="s0"))
        assert names(driver.list_snapshots(place / "w")) == [f"{place}/w@s0", f"{place}/w@newer"]

    def test_increment_onto_a_taken_snapshot_name_is_refused(self, driver: StorageDriver, place: DatasetName) -> None:
        s0, s1, _ = make_history(driver, place / "v")
        receive(driver, (place / "w") @ "s", stream_of(driver, s0))
        with pytest.raises(AlreadyExistsError):
            receive(driver, (place / "w") @ "s", stream_of(driver, s1, base="s0"))
        assert read_all(driver, (place / "w") @ "s") == read_all(driver, s0)

    @pytest.mark.parametrize("damage", ["truncated", "flipped", "trailing", "empty", "garbage"])
    @pytest.mark.parametrize("base", [None, "s0"])
    def test_damaged_stream_leaves_everything_as_it_was(
        self, driver: StorageDriver, place: DatasetName, damage: str, base: str | None
    ) -> None:
        s0, s1, _ = make_history(driver, place / "v")
        receive(driver, (place / "w") @ "s0", stream_of(driver, s0))
        target = (place / ("w" if base else "x")) @ "s1"
        before = driver.list(place), driver.list_snapshots(place)
        with pytest.raises(BadDataError):
            receive(driver, target, _damaged(stream_of(driver, s1, base=base), damage))
        assert (driver.list(place), driver.list_snapshots(place)) == before
        assert read_all(driver, place / "w") == read_all(driver, s0)
        receive(driver, target, stream_of(driver, s1, base=base))
        assert read_all(driver, target) == read_all(driver, s1)

    def test_source_that_fails_leaves_everything_as_it_was(self, driver: StorageDriver, place: DatasetName) -> None:
        s0, *_ = make_history(driver, place / "v")
        before = driver.list(place), driver.list_snapshots(place)
        with pytest.raises(UnavailableError):
            driver.receive((place / "w") @ "s", _Failing(stream_of(driver, s0)))
        assert (driver.list(place), driver.list_snapshots(place)) == before

    def test_reader_that_goes_away_is_unavailable_and_frees_the_snapshot(
        self, driver: StorageDriver, place: DatasetName
    ) -> None:
        make_volume(driver, place / "v")
        write(driver, place / "v", 0, noise(1, 2 * MIB))
        take(driver, (place / "v") @ "s")
        read_end, write_end = os.pipe()
        os.close(read_end)
        try:
            with pytest.raises(UnavailableError):
                driver.send((place / "v") @ "s", write_end)
        finally:
            os.close(write_end)
        driver.destroy_snapshot((place / "v") @ "s")

    def test_snapshot_being_sent_stays(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        write(driver, place / "v", 0, noise(1, 2 * MIB))
        take(driver, (place / "v") @ "s")
        read_end, write_end = os.pipe()
        sender = threading.Thread(target=_send_and_close, args=(driver, (place / "v") @ "s", write_end))
        sender.start()
        try:
            assert os.read(read_end, 1)  # from now on it is under way, and the pipe is too small to hold the rest
            with pytest.raises(BusyError):
                driver.destroy_snapshot((place / "v") @ "s")
            with pytest.raises(BusyError):
                driver.destroy(place / "v", recursive=True)
        finally:
            while os.read(read_end, MIB):
                pass
            sender.join()
            os.close(read_end)
        driver.destroy_snapshot((place / "v") @ "s")

    def test_two_receives_of_one_target_make_one(self, driver: StorageDriver, place: DatasetName) -> None:
        s0, *_ = make_history(driver, place / "v")
        stream = stream_of(driver, s0)
        outcomes: list[MistifyError | None] = []

        def run() -> None:
            try:
                receive(driver, (place / "w") @ "s", stream)
            except MistifyError as err:
                outcomes.append(err)
            else:
                outcomes.append(None)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: len(outcomes) == 4, "four outcomes")
        assert outcomes.count(None) == 1, outcomes
        assert all(isinstance(o, AlreadyExistsError | BusyError) for o in outcomes if o is not None), outcomes
        assert read_all(driver, place / "w") == read_all(driver, s0)


class _Failing:
    """A source whose connection breaks in the middle."""

    def __init__(self, stream: bytes) -> None:
        self._pieces = io.BytesIO(stream[: len(stream) // 2])

    def read(self, size: int = -1, /) -> bytes:
        piece = self._pieces.read(size if size >= 0 else 65536)
        if not piece:
            raise UnavailableError("the connection broke")
        return piece


def _send_and_close(driver: StorageDriver, name: SnapshotName, fd: int) -> None:
    try:
        driver.send(name, fd)
    finally:
        os.close(fd)


def _damaged(stream: bytes, damage: str) -> bytes:
    middle = len(stream) // 2
    return {
        "truncated": stream[: len(stream) - 312],
        "flipped": stream[:middle] + bytes([stream[middle] ^ 1]) + stream[middle + 1 :],
        "trailing": stream + b"\0" * 8,
        "empty": b"",
        "garbage": noise(1, 4096),
    }[damage]
