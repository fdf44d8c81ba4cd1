"""The writer: byte for byte what real receivers were given, and the inverse of the reader."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from imaging.errors import InvalidArgumentError
from imaging.sendstream import nvlist
from imaging.sendstream.checksum import unpack_state
from imaging.sendstream.package import PackagedDataset, package_end, package_head, packaged_datasets
from imaging.sendstream.reader import Frame
from imaging.sendstream.records import Begin, End, HeaderType, RecordType
from imaging.sendstream.volume import (
    BlockCompression,
    OlderImage,
    StreamHeader,
    apply_stream,
    make_stream,
    make_stream_from,
)
from imaging.sendstream.writer import StreamWriter
from tests.codec import samples

CREATION_S = 1_700_000_000
SIZE = 16 << 20


def header(guid: int, block_bytes: int = 8192, name: str = "host/img@base", **more: object) -> StreamHeader:
    return StreamHeader(guid, name, block_bytes, CREATION_S, **more)  # type: ignore[arg-type]


@pytest.fixture(name="image")
def _image(tmp_path: Path) -> Iterator[BinaryIO]:
    path = tmp_path / "a.raw"
    path.write_bytes(samples.raw_image())
    with path.open("rb") as file:
        yield file


def rewrite(frames: list[Frame]) -> bytes:
    """Parse every record and write it again."""
    writer, out, in_package_head = StreamWriter(), [], False
    for frame in frames:
        record = frame.record()
        if isinstance(record, Begin):
            in_package_head = record.header_type == HeaderType.PACKAGE
            out.append(writer.begin(record, bytes(frame.payload)))
        elif not isinstance(record, End):
            out.append(writer.record(record, frame.payload))
        elif in_package_head:
            out.append(writer.package_head_end())
            in_package_head = False
        elif record.toguid == 0 and unpack_state(record.checksum) == (0, 0, 0, 0):
            out.append(package_end())
        else:
            out.append(writer.end(record.toguid))
    return b"".join(out)


UNSEALED = "odd-zerock"
"""Has no record checksums; the writer always writes them."""
WHOLE = [name for name in samples.names() if not str(samples.manifest()[name]["expect"]).startswith("error")]
SOUND = [*WHOLE, *(name for name in samples.names(expect="error") if name.startswith("bad-"))]


@pytest.mark.parametrize("name", [name for name in SOUND if name != UNSEALED])
def test_write_what_was_read_gives_the_same_bytes(name: str) -> None:
    data = samples.load(name)
    assert rewrite(samples.frames(data)) == data


def test_write_of_many_records_at_once_equals_one_by_one() -> None:
    data = samples.load("lz4-c")
    first, *middle, last = samples.frames(data)
    writer = StreamWriter()
    begin = first.record()
    assert isinstance(begin, Begin)
    out = writer.begin(begin) + writer.records([(frame.record(), frame.payload) for frame in middle])
    assert last.type == RecordType.END
    assert out + writer.end(begin.toguid) == data


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("gen-full-8k", header(5001)),
        ("gen-full-64k", header(5002, 65536)),
        ("gen-lz4-16k", header(5005, 16384, compression=BlockCompression.LZ4)),
        ("gen-zstd-16k", header(5006, 16384, compression=BlockCompression.ZSTD)),
    ],
)
def test_make_full_stream_equals_the_received_one(image: BinaryIO, name: str, made: StreamHeader) -> None:
    """lz4 and zstd are not byte-stable over library versions: there, what they decompress to is compared."""
    stream = b"".join(make_stream(image.fileno(), SIZE, made))
    if samples.manifest()[name]["byte_stable"]:
        assert stream == samples.load(name)
    with samples.scratch() as fd, samples.scratch() as theirs:
        assert apply_stream(io.BytesIO(stream), fd) == samples.apply_chain(theirs, [name])
        assert read_all(fd) == read_all(theirs) == samples.raw_image()


def read_all(fd: int) -> bytes:
    with open(fd, "rb", closefd=False) as file:
        file.seek(0)
        return file.read()


def test_make_stream_of_odd_size_pads_to_a_block(image: BinaryIO) -> None:
    stream = b"".join(make_stream(image.fileno(), 5_000_001, header(5009, name="host/odd@base")))
    assert stream == samples.load("gen-odd-size-padded")


def test_make_stream_of_nothing_but_a_hole_is_the_smallest_golden_file(tmp_path: Path) -> None:
    path = tmp_path / "e"
    with path.open("w+b") as file:
        file.truncate(8 << 20)
        assert b"".join(make_stream(file.fileno(), 8 << 20, header(5010, name="host/e@base"))) == samples.load(
            "gen-empty"
        )


def test_make_stream_of_stored_zeros_equals_that_of_a_hole() -> None:
    made = make_stream_from(io.BytesIO(bytes(8 << 20)), header(5010, name="host/e@base"), size_bytes=8 << 20)
    assert b"".join(made) == samples.load("gen-empty")


def test_make_increments_equal_the_received_ones(image: BinaryIO) -> None:
    with samples.scratch() as newer:
        samples.apply_chain(newer, ["gen-full-8k", "gen-inc-8k"])
        old, new = OlderImage(image.fileno(), SIZE), OlderImage(newer, 20 << 20)
        grown = header(5011, name="host/img@inc", fromguid=5001)
        assert b"".join(make_stream(newer, 20 << 20, grown, older=old)) == samples.load("gen-inc-8k")
        clone = header(5013, name="host/clone@inc", fromguid=5001, clone=True)
        assert b"".join(make_stream(newer, 20 << 20, clone, older=old)) == samples.load("gen-clone-8k")
        shrunk = header(5012, name="host/img@inc2", fromguid=5011)
        assert b"".join(make_stream(image.fileno(), SIZE, shrunk, older=new)) == samples.load("gen-inc-8k-shrink")


def test_make_package_equals_the_received_one(image: BinaryIO) -> None:
    stream = b"".join(make_stream(image.fileno(), SIZE, header(5008)))
    properties: nvlist.NvList = {"compression": 15, "org.mistify:id": "abc-1", "snapdev": 1}
    dataset = PackagedDataset("host/img", properties=properties, snapshots={"base": 5008})
    made = package_head("host/img@base", 0x1390, dataset) + stream + package_end()
    assert made == samples.load("gen-props-package")
    assert packaged_datasets(samples.frames(made)[0].payload) == [dataset]


@pytest.mark.parametrize("chunk", [1, 4096, 100_001])
def test_make_stream_from_short_reads_equals_make_stream(chunk: int) -> None:
    class Trickle:
        def __init__(self, data: bytes) -> None:
            self.file = io.BytesIO(data)

        def read(self, size: int = -1, /) -> bytes:
            return self.file.read(min(size, chunk))

    data = samples.raw_image()[: 256 << 10 if chunk == 1 else SIZE]
    once = make_stream_from(Trickle(data), header(5001), size_bytes=len(data))
    assert b"".join(once) == b"".join(make_stream_from(io.BytesIO(data), header(5001), size_bytes=len(data)))


def test_make_stream_from_source_of_unknown_size_is_applied_alike() -> None:
    stream = b"".join(make_stream_from(io.BytesIO(samples.raw_image()[:5_000_001]), header(7)))
    with samples.scratch() as fd:
        state = apply_stream(io.BytesIO(stream), fd)
        assert state.volsize_bytes == 5005312
        assert read_all(fd) == samples.raw_image()[:5_000_001] + bytes(5311)


def test_pieces_are_of_moderate_size(image: BinaryIO) -> None:
    sizes = [len(piece) for piece in make_stream(image.fileno(), SIZE, header(1))]
    assert max(sizes) < 3 << 20


@pytest.mark.parametrize(
    "wrong",
    [
        header(0),
        header(1 << 64),
        header(1, 3000),
        header(1, 256),
        header(1, 2 << 20),
        header(1, name="no-snapshot"),
        header(1, name="a@b" + "x" * 254),
        header(1, fromguid=5),
    ],
)
def test_make_stream_of_what_no_stream_can_say_is_refused(image: BinaryIO, wrong: StreamHeader) -> None:
    with pytest.raises(InvalidArgumentError):
        b"".join(make_stream(image.fileno(), SIZE, wrong))


def test_make_stream_of_an_empty_image_is_refused(image: BinaryIO) -> None:
    with pytest.raises(InvalidArgumentError, match="0 bytes"):
        b"".join(make_stream(image.fileno(), 0, header(1)))
