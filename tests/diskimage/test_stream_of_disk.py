"""A virtual disk as a stream: the same bytes as its raw form gives, whatever its clusters and the stream's blocks."""

from __future__ import annotations

from pathlib import Path

import pytest

from imaging.diskimage.probe import open_disk
from imaging.errors import BadDataError
from imaging.sendstream.sending import make_stream, make_stream_of
from imaging.sendstream.writer import StreamHeader
from tests.fakes.disk_files import BLOCK_BYTES, disk_bytes, qcow2

HOLE_BYTES = 5 << 20
DISK = disk_bytes(7, 50) + bytes(HOLE_BYTES) + disk_bytes(8, 80)[: -3 * 512] + bytes(HOLE_BYTES)
"""Larger than the windows data is gathered in, with holes across them, and no whole number of blocks."""


def header(block_bytes: int) -> StreamHeader:
    return StreamHeader(guid=7, toname="tank/v@s", volblocksize_bytes=block_bytes)


def raw_stream(directory: Path, data: bytes, block_bytes: int) -> bytes:
    path = directory / "whole.raw"
    path.write_bytes(data)
    with path.open("rb") as file:
        return b"".join(make_stream(file.fileno(), len(data), header(block_bytes)))


def disk_stream(directory: Path, packed: bytes, block_bytes: int) -> bytes:
    path = directory / "whole.qcow2"
    path.write_bytes(packed)
    with path.open("rb") as file:
        return b"".join(make_stream_of(open_disk(file.fileno()), header(block_bytes)))


@pytest.mark.parametrize("block_bytes", [512, BLOCK_BYTES, 128 << 10, 1 << 20])
@pytest.mark.parametrize("options", [(), ("-c",), ("-o", "cluster_size=512"), ("-o", "cluster_size=2M")], ids=str)
def test_stream_of_a_qcow2_disk_is_that_of_its_raw_form(
    tmp_path: Path, options: tuple[str, ...], block_bytes: int
) -> None:
    assert disk_stream(tmp_path, qcow2(tmp_path, DISK, *options), block_bytes) == raw_stream(
        tmp_path, DISK, block_bytes
    )


def test_disk_that_keeps_nothing_is_a_volume_of_zeros(tmp_path: Path) -> None:
    data = bytes(3 << 20)
    assert disk_stream(tmp_path, qcow2(tmp_path, data), BLOCK_BYTES) == raw_stream(tmp_path, data, BLOCK_BYTES)


def test_data_that_is_cut_off_is_told(tmp_path: Path) -> None:
    packed = qcow2(tmp_path, DISK)
    with pytest.raises(BadDataError):
        disk_stream(tmp_path, packed[: len(packed) - (64 << 10)], BLOCK_BYTES)
