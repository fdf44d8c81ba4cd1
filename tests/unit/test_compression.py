"""Compressed streams: every format, several members, damage, bombs."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import tracemalloc
from collections.abc import Callable

import lz4.frame
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from imaging.compression import (
    OUTPUT_BYTES,
    CompressingWriter,
    Compression,
    DecompressionLimits,
    compress_pieces,
    open_decompressed,
    sniff,
)
from imaging.errors import BadDataError, InvalidArgumentError, TooLargeError

CONTENT = random.Random(7).randbytes(300_000) + bytes(3_000_000) + b"the end"
SKIPPABLE = b"\x50\x2a\x4d\x18\x05\0\0\0abcde"


def zstd(data: bytes, **options: object) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)  # type: ignore[arg-type]


PACKERS: dict[Compression, Callable[[bytes], bytes]] = {
    Compression.GZIP: gzip.compress,
    Compression.XZ: lzma.compress,
    Compression.ZSTD: lambda data: zstd(data, write_checksum=True),
    Compression.BZIP2: bz2.compress,
    Compression.LZ4: lambda data: lz4.frame.compress(data, content_checksum=True),
}
FORMATS = sorted(PACKERS)


class Trickle:
    """Gives a few bytes at a time."""

    def __init__(self, data: bytes, most: int = 7) -> None:
        self.file, self.most = io.BytesIO(data), most

    def read(self, size: int = -1, /) -> bytes:
        return self.file.read(self.most if size < 0 else min(size, self.most))


def unpack(data: bytes, **options: object) -> bytes:
    return open_decompressed(io.BytesIO(data), **options).read()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", FORMATS)
def test_read_gives_the_content_and_names_the_format(kind: Compression) -> None:
    reader = open_decompressed(io.BytesIO(PACKERS[kind](CONTENT)))
    assert reader.compression is kind
    assert reader.read() == CONTENT
    assert reader.read(10) == b""
    assert reader.produced_bytes == len(CONTENT)


@pytest.mark.parametrize("kind", FORMATS)
def test_read_from_a_trickle_in_small_pieces_gives_the_content(kind: Compression) -> None:
    content = CONTENT[299_000:303_000]
    reader = open_decompressed(Trickle(PACKERS[kind](content)))
    pieces = list(iter(lambda: reader.read(100), b""))
    assert b"".join(pieces) == content
    assert max(map(len, pieces)) <= 100


@pytest.mark.parametrize("kind", FORMATS)
def test_read_several_members_gives_all_of_them(kind: Compression) -> None:
    packed = PACKERS[kind](CONTENT) + PACKERS[kind](b"") + PACKERS[kind](b"more")
    assert unpack(packed) == CONTENT + b"more"
    assert open_decompressed(Trickle(packed, 5000)).read() == CONTENT + b"more"


@pytest.mark.parametrize("kind", FORMATS)
def test_read_truncated_anywhere_raises_bad_data(kind: Compression) -> None:
    packed = PACKERS[kind](CONTENT[299_990:301_000])
    for size in range(11, len(packed)):
        with pytest.raises(BadDataError, match=r"cut off|damaged"):
            unpack(packed[:size])


@pytest.mark.parametrize("kind", FORMATS)
def test_read_damaged_raises_bad_data(kind: Compression) -> None:
    packed = PACKERS[kind](CONTENT[:20_000])
    for index in random.Random(kind).sample(range(10, len(packed)), 100):
        damaged = bytearray(packed)
        damaged[index] ^= 0x10
        try:
            assert unpack(bytes(damaged)) == CONTENT[:20_000]  # a few header bits mean nothing (time, system)
        except BadDataError:
            continue


@pytest.mark.parametrize("kind", FORMATS)
def test_read_with_garbage_behind_raises_bad_data(kind: Compression) -> None:
    with pytest.raises(BadDataError):
        unpack(PACKERS[kind](CONTENT) + b"garbage, and more of it")


@pytest.mark.parametrize("kind", [Compression.GZIP, Compression.XZ])
def test_read_with_zero_padding_behind_gives_the_content(kind: Compression) -> None:
    assert unpack(PACKERS[kind](CONTENT) + bytes(100_000)) == CONTENT
    assert open_decompressed(Trickle(PACKERS[kind](b"abc") + bytes(512), 3)).read() == b"abc"


@pytest.mark.parametrize(
    "packed",
    [
        zstd(CONTENT),
        zstd(CONTENT, write_content_size=False),
        zstd(CONTENT, level=19),
        SKIPPABLE + zstd(CONTENT) + SKIPPABLE,
        zstd(CONTENT, write_checksum=True) * 1,
        zstd(bytes(1 << 20)) + zstd(CONTENT[1 << 20 :]),
    ],
)
def test_read_zstd_of_every_shape(packed: bytes) -> None:
    expected = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True).read()
    assert unpack(packed) == open_decompressed(Trickle(packed, 1000)).read() == expected


def test_read_plain_passes_through() -> None:
    for data in (b"", b"x", b"BZhello", b"\x1f\x8b", CONTENT):
        reader = open_decompressed(Trickle(data, 4096))
        assert (reader.compression, reader.read()) == (Compression.NONE, data)


def test_sniff_zfs_stream_and_disk_is_plain() -> None:
    assert sniff(bytes(8) + bytes.fromhex("accbbaf502000000")) is Compression.NONE
    assert sniff(b"\xeb\x63\x90" + bytes(7)) is Compression.NONE


@pytest.mark.parametrize("kind", FORMATS)
def test_read_bomb_stops_at_the_limit_in_bounded_memory(kind: Compression) -> None:
    packed = PACKERS[kind](bytes(64 << 20))
    tracemalloc.start()
    try:
        reader = open_decompressed(io.BytesIO(packed), limits=DecompressionLimits(output_max_bytes=48 << 20))
        with pytest.raises(TooLargeError, match="larger than"):
            sum(map(len, iter(lambda: reader.read(OUTPUT_BYTES), b"")))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


def test_read_that_grows_too_much_is_refused_above_the_floor() -> None:
    packed = zstd(bytes(32 << 20))
    limits = DecompressionLimits(ratio_max=100, ratio_floor_bytes=8 << 20)
    with pytest.raises(TooLargeError, match="more than 100 times"):
        unpack(packed, limits=limits)
    assert len(unpack(zstd(bytes(8 << 20)), limits=limits)) == 8 << 20


@pytest.mark.parametrize("kind", [Compression.GZIP, Compression.ZSTD])
def test_write_then_read_is_the_identity_and_repeatable(kind: Compression) -> None:
    sinks = [io.BytesIO(), io.BytesIO()]
    for sink in sinks:
        with CompressingWriter(sink, kind) as writer:
            for start in range(0, len(CONTENT), 100_000):
                assert writer.write(CONTENT[start : start + 100_000]) > 0
        writer.close()
        with pytest.raises(InvalidArgumentError):
            writer.write(b"late")
    assert sinks[0].getvalue() == sinks[1].getvalue()
    assert unpack(sinks[0].getvalue()) == CONTENT
    assert unpack(b"".join(compress_pieces([CONTENT, b"", b"x"], kind))) == CONTENT + b"x"


def test_write_that_failed_leaves_no_end() -> None:
    sink = io.BytesIO()
    with pytest.raises(ZeroDivisionError), CompressingWriter(sink, Compression.GZIP) as writer:
        writer.write(bytes(1 // (len(CONTENT) - writer.write(CONTENT))))
    with pytest.raises(BadDataError, match="cut off"):
        unpack(sink.getvalue())


def test_write_of_what_is_read_only_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="xz"):
        CompressingWriter(io.BytesIO(), Compression.XZ)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMATS), st.lists(st.binary(max_size=2000), max_size=4), st.integers(1, 5000))
def test_any_members_in_any_pieces_give_the_content(kind: Compression, members: list[bytes], most: int) -> None:
    packed = b"".join(PACKERS[kind](member) for member in members)
    assert open_decompressed(Trickle(packed, most)).read() == b"".join(members)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(FORMATS), st.binary(max_size=500))
def test_garbage_behind_a_magic_raises_bad_data(kind: Compression, garbage: bytes) -> None:
    with pytest.raises(BadDataError):
        unpack(PACKERS[kind](b"content")[:10] + garbage, compression=kind)
