"""Streams into and out of a real pool: the firewall before the kernel, and both drivers understanding each other."""

from __future__ import annotations

import hashlib
import io
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_image.drivers.base import SendFlags, StorageDriver
from agent_image.drivers.file import FileDriver
from agent_image.drivers.zfs import ZfsDriver
from imaging.errors import BadDataError, ConflictError, MistifyError, UnsupportedError
from imaging.names import DatasetName, PoolName, SnapshotName
from tests.codec import samples
from tests.contracts.storage_driver_tools import (
    BLOCK_BYTES,
    MIB,
    make_volume,
    noise,
    receive,
    stream_of,
    take,
    write,
)
from tests.integration.zfs_pool import lab_driver, new_place, run, there

pytestmark = pytest.mark.backend("zfs")

KERNEL_STREAMS = [
    "plain-full-s1",
    "plain-inc-s2-s3-shrink",
    "plain-e-s1",
    "plain-w-s1",
    "lz4-inc-Lec",
    "zstd-ec",
    "gzip-ec",
    "lzjb-ec",
    "zle-ec",
    "big1M-Lec",
    "big1M-inc-noL",
    "b512-full",
    "empty-full",
    "enc-plain",
    "gen-inc-8k-shrink",
    "gen-zstd-16k",
    "gen-odd-size-padded",
]
DAMAGED_PLACES = 100
READ_BYTES = 1 << 20
SMALL_BLOCK_BYTES = 128 << 10


@pytest.fixture(scope="module")
def driver() -> Iterator[ZfsDriver]:
    with lab_driver() as driver:
        yield driver


@pytest.fixture
def place(driver: ZfsDriver) -> Iterator[DatasetName]:
    with new_place(driver, "streams") as name:
        yield name


def digest(driver: StorageDriver, name: DatasetName | SnapshotName) -> str:
    opened = driver.open_snapshot(name) if isinstance(name, SnapshotName) else driver.open_volume(name)
    found, offset = hashlib.sha256(), 0
    with opened as fd:
        while data := os.pread(fd, READ_BYTES, offset):
            found.update(data)
            offset += len(data)
    return found.hexdigest()


def receive_chain(driver: StorageDriver, volume: DatasetName, chain: list[str]) -> list[SnapshotName]:
    made = []
    for number, name in enumerate(chain):
        made.append(receive(driver, volume @ f"s{number}", samples.load(name)).name)
    return made


# -- the firewall --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", samples.names(expect="error"))
def test_damaged_or_dangerous_stream_leaves_the_pool_as_it_was(
    driver: ZfsDriver, place: DatasetName, name: str
) -> None:
    """Some of these would panic the kernel: that the test ends is half of what it shows."""
    receive_chain(driver, place / "v", samples.manifest()[name].get("base", []))
    before = there(place)
    target = (place / "v") @ "bad" if len(before) > 1 else (place / "new") @ "bad"
    with pytest.raises((BadDataError, UnsupportedError)):
        receive(driver, target, samples.load(name))
    assert there(place) == before
    assert [str(info.name) for info in driver.list(place)] == [line for line in before if "@" not in line]


def test_refusal_names_rule_record_and_offset(driver: ZfsDriver, place: DatasetName) -> None:
    with pytest.raises(BadDataError, match=r"\[rule [a-z ]+\]: record \d+ \(\w+\) at byte \d+"):
        receive(driver, (place / "v") @ "s", samples.load("bad-blksz3"))


@pytest.mark.parametrize("name", ["enc-w-raw", "plain-redacted", "fs-inc", "plain-resume-t"])
def test_stream_that_cannot_be_checked_to_the_end_is_refused(driver: ZfsDriver, place: DatasetName, name: str) -> None:
    """Encrypted contents, holes in place of data, filesystems, the rest of a transfer."""
    with pytest.raises(MistifyError):
        receive(driver, (place / "v") @ "s", samples.load(name))
    assert there(place) == [str(place)]


def test_stream_cut_or_changed_anywhere_is_refused(driver: ZfsDriver, place: DatasetName) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    make_volume(driver, place / "v", size_bytes=MIB)
    for offset in range(0, MIB // 2, 4 * BLOCK_BYTES):
        write(driver, place / "v", offset, noise(offset))
    take(driver, (place / "v") @ "s")
    stream = stream_of(driver, (place / "v") @ "s")
    before = there(place)
    for number in range(2 * DAMAGED_PLACES):
        position = chance.randrange(len(stream))
        damaged = bytearray(stream)
        damaged[position] ^= 1 << chance.randrange(8)
        data = bytes(damaged) if number % 2 else stream[:position]
        with pytest.raises((BadDataError, UnsupportedError, ConflictError)):
            receive(driver, (place / "w") @ "s", data)
        assert driver.list(place)[-1].name == place / "v", f"seed {seed}, place {position}"
    assert there(place) == before, f"seed {seed}"


# -- what kernels and generators made --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNEL_STREAMS)
def test_real_stream_is_received_with_its_contents(driver: ZfsDriver, place: DatasetName, name: str) -> None:
    entry = samples.manifest()[name]
    made = receive_chain(driver, place / "v", [*entry["base"], name])
    wanted = entry["result"]
    info = driver.get_snapshot(made[-1])
    assert (info.guid, info.volsize_bytes) == (int(wanted["guid"]), wanted["volsize"])
    assert info.creation_s == wanted["creation"]
    in_small_blocks = "noL" in name  # without -L the kernel cuts large blocks, and the receiver keeps the pieces
    assert driver.get(place / "v").volblocksize_bytes == (
        SMALL_BLOCK_BYTES if in_small_blocks else wanted["volblocksize"]
    )
    assert digest(driver, place / "v") == wanted["sha256"]


@pytest.mark.parametrize("name", ["b512-p", "gen-props-package"])
def test_package_of_one_stream_is_received_without_its_wrapping(
    driver: ZfsDriver, place: DatasetName, name: str
) -> None:
    receive(driver, (place / "v") @ "s", samples.load(name))
    wanted = samples.manifest()[name]["result"]
    assert driver.get_snapshot((place / "v") @ "s").guid == int(wanted["guid"])
    assert digest(driver, place / "v") == wanted["sha256"]
    assert "readonly" not in driver.get(place / "v").properties


def test_package_of_several_streams_is_refused_whole(driver: ZfsDriver, place: DatasetName) -> None:
    (base,) = receive_chain(driver, place / "v", ["plain-full-s1"])
    with pytest.raises(UnsupportedError, match="several streams"):
        receive(driver, (place / "v") @ "s3", samples.load("plain-I-s1-s3-package"))
    assert there(place) == [str(place), f"{place}/v", str(base)]


def test_increment_of_a_clone_is_received_onto_its_origin(driver: ZfsDriver, place: DatasetName) -> None:
    receive(driver, (place / "v") @ "s1", samples.load("plain-full-s1"))
    wrong = receive(driver, (place / "w") @ "s1", samples.load("gen-full-8k")).name
    stream = samples.load("clone-inc-s1-c1")
    with pytest.raises(ConflictError, match="3487082587457790019"):
        receive(driver, (place / "c") @ "c1", stream, origin=wrong)
    with pytest.raises(ConflictError, match="3487082587457790019"):
        receive(driver, (place / "c") @ "c1", stream)
    receive(driver, (place / "c") @ "c1", stream, origin=(place / "v") @ "s1")
    assert driver.get(place / "c").origin == (place / "v") @ "s1"
    assert digest(driver, (place / "c") @ "c1") == samples.manifest()["clone-inc-s1-c1"]["result"]["sha256"]


def test_received_dataset_has_its_properties_from_the_start(driver: ZfsDriver, place: DatasetName) -> None:
    properties = {"test:image": "i1", "readonly": "on"}
    driver.receive((place / "v") @ "s", io.BytesIO(samples.load("gen-full-8k")), properties=properties)
    assert driver.get(place / "v").properties == properties
    assert run("zfs", "get", "-H", "-o", "value", "readonly,test:image", place / "v").split() == ["on", "i1"]


def test_pool_is_still_healthy(driver: ZfsDriver) -> None:
    """After everything above: no checksum error anywhere."""
    run("zpool", "scrub", "-w", driver.pool)
    assert "No known data errors" in run("zpool", "status", driver.pool)


# -- both drivers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file_driver(tmp_path: Path) -> Iterator[FileDriver]:
    driver = FileDriver(PoolName.parse("files"), tmp_path)
    driver.open()
    yield driver
    driver.close()


@pytest.mark.parametrize(
    "flags", [SendFlags(), SendFlags(compressed=True, large_blocks=True, embedded=True)], ids=["plain", "compressed"]
)
@pytest.mark.parametrize("way", ["file to zfs", "zfs to file"])
def test_stream_of_one_driver_is_received_by_the_other(
    driver: ZfsDriver, file_driver: FileDriver, place: DatasetName, way: str, flags: SendFlags
) -> None:
    local = file_driver.pool.root / "v"
    there_first = way == "file to zfs"
    sender: StorageDriver = file_driver if there_first else driver
    receiver: StorageDriver = driver if there_first else file_driver
    source, target = (local, place / "v") if there_first else (place / "v", local)
    make_volume(sender, source)
    for number in range(3):
        write(sender, source, number * 16 * BLOCK_BYTES, noise(number) + bytes(BLOCK_BYTES) + b"text " * 1000)
        take(sender, source @ f"s{number}")
        base = None if number == 0 else f"s{number - 1}"
        receive(receiver, target @ f"s{number}", stream_of(sender, source @ f"s{number}", base=base, flags=flags))
        assert receiver.get_snapshot(target @ f"s{number}").guid == sender.get_snapshot(source @ f"s{number}").guid
    for number in range(3):
        assert digest(receiver, target @ f"s{number}") == digest(sender, source @ f"s{number}")
