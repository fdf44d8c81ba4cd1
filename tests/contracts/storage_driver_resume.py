"""Rules on sending the rest of a stream that broke off."""

from __future__ import annotations

import io
import os
import tempfile

import pytest

from agent_image.drivers.base import SendFlags, StorageDriver
from imaging.errors import ConflictError, InvalidArgumentError, NotFoundError
from imaging.names import DatasetName, SnapshotName
from imaging.sendstream.receiving import VolumeReceiver
from imaging.sendstream.resume import ResumeToken
from imaging.sendstream.state import ResumePoint, VolumeState
from imaging.sendstream.volume import apply_stream
from tests.contracts.storage_driver_streams import FLAGS
from tests.contracts.storage_driver_tools import (
    BLOCK_BYTES,
    MIB,
    Suite,
    make_volume,
    noise,
    read_all,
    stream_of,
    take,
    write,
)


def make_increment(driver: StorageDriver, volume: DatasetName) -> tuple[SnapshotName, SnapshotName]:
    """A volume with two snapshots that differ by more than a few blocks."""
    make_volume(driver, volume)
    for number, size_bytes in enumerate((24 * BLOCK_BYTES, 32 * BLOCK_BYTES)):
        write(driver, volume, number * MIB, noise(number, size_bytes) + b"text " * 4096)
        take(driver, volume @ f"s{number}")
    return volume @ "s0", volume @ "s1"


def broken_off(fd: int, stream: bytes, base: VolumeState | None) -> tuple[ResumePoint, str]:
    """Apply the beginning of a stream; where it ended, and the token that says so."""
    receiver = VolumeReceiver(fd, base)
    receiver.feed(stream)
    point = receiver.interrupted()
    assert point is not None
    return point, ResumeToken.at(point, len(stream)).encode()


def rest_of(driver: StorageDriver, name: SnapshotName, token: str) -> bytes:
    with tempfile.TemporaryFile() as target:
        driver.send(name, target.fileno(), resume_token=token)
        target.seek(0)
        return target.read()


class ResumeRules(Suite):
    """The beginning of a stream and its rest are the snapshot."""

    @pytest.mark.parametrize("flags", ["plain", "compressed", "large_blocks"])
    @pytest.mark.parametrize("base", [None, "s0"])
    def test_rest_of_a_stream_that_broke_off_completes_it(
        self, driver: StorageDriver, place: DatasetName, base: str | None, flags: str
    ) -> None:
        s0, s1 = make_increment(driver, place / "v")
        first = io.BytesIO(stream_of(driver, s0))
        stream = stream_of(driver, s1, base=base, flags=FLAGS[flags])
        for percent in (30, 60, 90):
            first.seek(0)
            with tempfile.TemporaryFile() as image:
                state = apply_stream(first, image.fileno()) if base else None
                point, token = broken_off(image.fileno(), stream[: len(stream) * percent // 100], state)
                rest = rest_of(driver, s1, token)
                assert len(rest) < len(stream)
                done = apply_stream(io.BytesIO(rest), image.fileno(), state, resume=point)
                assert done.guid == driver.get_snapshot(s1).guid
                assert os.pread(image.fileno(), done.volsize_bytes, 0) == read_all(driver, s1)

    def test_token_that_fits_nothing_is_refused(self, driver: StorageDriver, place: DatasetName) -> None:
        s0, s1 = make_increment(driver, place / "v")
        stream = stream_of(driver, s0)
        with tempfile.TemporaryFile() as image:
            _, token = broken_off(image.fileno(), stream[: len(stream) // 2], None)
        with pytest.raises(ConflictError, match=str(driver.get_snapshot(s0).guid)):
            rest_of(driver, s1, token)
        for damaged in ("", "1-2-3", token[:-2], token.replace("1-", "2-", 1)):
            with pytest.raises(InvalidArgumentError):
                rest_of(driver, s0, damaged)

    def test_token_with_base_or_flags_besides_is_refused(self, driver: StorageDriver, place: DatasetName) -> None:
        s0, s1 = make_increment(driver, place / "v")
        stream = stream_of(driver, s1, base="s0")
        with tempfile.TemporaryFile() as image:
            state = apply_stream(io.BytesIO(stream_of(driver, s0)), image.fileno())
            _, token = broken_off(image.fileno(), stream[: len(stream) // 2], state)
            with pytest.raises(InvalidArgumentError):
                driver.send(s1, image.fileno(), base="s0", resume_token=token)
            with pytest.raises(InvalidArgumentError):
                driver.send(s1, image.fileno(), flags=SendFlags(compressed=True), resume_token=token)

    def test_token_whose_base_is_gone_is_not_found(self, driver: StorageDriver, place: DatasetName) -> None:
        s0, s1 = make_increment(driver, place / "v")
        stream = stream_of(driver, s1, base="s0")
        with tempfile.TemporaryFile() as image:
            state = apply_stream(io.BytesIO(stream_of(driver, s0)), image.fileno())
            _, token = broken_off(image.fileno(), stream[: len(stream) // 2], state)
        driver.destroy_snapshot(s0)
        with pytest.raises(NotFoundError, match=str(state.guid)):
            rest_of(driver, s1, token)

    def test_token_of_an_increment_from_the_origin_finds_it(self, driver: StorageDriver, place: DatasetName) -> None:
        s0, _ = make_increment(driver, place / "v")
        driver.clone(s0, place / "c")
        with driver.open_volume(place / "c", writable=True) as fd:
            os.pwrite(fd, os.urandom(1 << 18), 1 << 20)
        made = take(driver, (place / "c") @ "c0").name
        stream = stream_of(driver, made, base=str(s0))
        with tempfile.TemporaryFile() as image:
            state = apply_stream(io.BytesIO(stream_of(driver, s0)), image.fileno())
            point, token = broken_off(image.fileno(), stream[: len(stream) // 2], state)
            done = apply_stream(io.BytesIO(rest_of(driver, made, token)), image.fileno(), state, resume=point)
            assert os.pread(image.fileno(), done.volsize_bytes, 0) == read_all(driver, made)

    def test_place_past_the_volume_is_refused(self, driver: StorageDriver, place: DatasetName) -> None:
        make_volume(driver, place / "v")
        sent = take(driver, (place / "v") @ "s")
        for offset in (1 << 50, 12_345):
            token = ResumeToken(sent.guid, 0, str(sent.name), 1, offset, 0).encode()
            with tempfile.TemporaryFile() as target, pytest.raises(InvalidArgumentError):
                driver.send(sent.name, target.fileno(), resume_token=token)
