"""Compression of single blocks."""

from __future__ import annotations

import random
import struct

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from imaging.errors import BadDataError, MistifyError, UnsupportedError
from imaging.sendstream.blocks import BlockCompression, BlockDecoder, BlockEncoder
from imaging.sendstream.records import Write
from tests.codec import samples

ENCODERS = [BlockCompression.LZ4, BlockCompression.ZSTD, BlockCompression.GZIP_6]
blocks = st.builds(
    lambda seed, size, unit: (random.Random(seed).randbytes(unit) * size)[:size],
    st.integers(0, 1000),
    st.sampled_from([512, 4096, 16384, 131072, 1 << 20]),
    st.integers(1, 300),
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ENCODERS), blocks)
def test_encode_then_decode_is_the_identity(kind: BlockCompression, block: bytes) -> None:
    packed = BlockEncoder(kind).encode(block)
    if packed is not None:
        assert len(packed) % 512 == 0
        assert len(packed) < len(block)
        assert bytes(BlockDecoder().decode(kind, packed, len(block))) == block


@pytest.mark.parametrize("kind", ENCODERS)
def test_encode_what_saves_less_than_an_eighth_is_left_plain(kind: BlockCompression) -> None:
    assert BlockEncoder(kind).encode(random.Random(1).randbytes(16384)) is None


def test_encode_with_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="lzjb"):
        BlockEncoder(BlockCompression.LZJB)


def compressed_writes(name: str) -> list[tuple[int, bytes, int]]:
    found = []
    for frame in samples.frames(samples.load(name)):
        record = frame.record()
        if isinstance(record, Write) and record.compression:
            found.append((record.compression, bytes(frame.payload), record.logical_bytes))
    return found


@pytest.mark.parametrize("name", ["lz4-c", "zstd-ec", "gzip-ec", "lzjb-c", "zle-ec"])
def test_decode_damaged_payload_raises_bad_data_or_gives_a_block(name: str) -> None:
    """Nothing but BadDataError, never more than a block, whatever the bytes are."""
    decoder, rng = BlockDecoder(), random.Random(name)
    writes = compressed_writes(name)
    assert writes
    for kind, payload, size in writes[:4]:
        for _ in range(150):
            damaged = bytearray(payload)
            damaged[rng.randrange(min(200, len(payload)))] ^= 1 << rng.randrange(8)
            try:
                assert len(decoder.decode(kind, bytes(damaged), size)) == size
            except BadDataError:
                continue


@pytest.mark.parametrize("kind", [3, 5, 10, 13, 14, 15, 16])
def test_decode_payload_that_is_cut_off_raises_bad_data(kind: int) -> None:
    for data in (b"", b"\0", b"\0\0\0\x10", bytes(8), b"\xff" * 8):
        with pytest.raises(BadDataError):
            BlockDecoder().decode(kind, data, 4096)


def test_decode_plain_payload_of_another_size_raises_bad_data() -> None:
    with pytest.raises(BadDataError, match="plain"):
        BlockDecoder().decode(0, bytes(511), 512)


@pytest.mark.parametrize("kind", [1, 4, 17, 255])
def test_decode_unknown_compression_is_refused(kind: int) -> None:
    with pytest.raises(MistifyError, match=f"unknown block compression {kind}"):
        BlockDecoder().decode(kind, bytes(512), 512)


def test_decode_zstd_frame_that_claims_another_size_allocates_nothing() -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(
        3, format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=True
    )
    frame = zstandard.ZstdCompressor(compression_params=parameters).compress(bytes(64 << 20))
    with pytest.raises(BadDataError, match="zstd"):
        BlockDecoder().decode(16, struct.pack(">II", len(frame), 0) + frame, 8192)


def test_decode_lzjb_match_before_the_start_raises_bad_data() -> None:
    with pytest.raises(BadDataError, match="lzjb"):
        BlockDecoder().decode(3, bytes([1, 0, 5]), 512)


def test_decode_zle_runs() -> None:
    assert bytes(BlockDecoder().decode(14, bytes([1, 7, 8, 255, 255, 63 + 126]), 512)) == bytes([7, 8]) + bytes(510)
    with pytest.raises(BadDataError, match="zle"):
        BlockDecoder().decode(14, bytes([255, 255, 255]), 512)
