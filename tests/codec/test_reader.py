"""The reader: any split gives the same records, and no damage goes unnoticed."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imaging.errors import BadDataError, UnsupportedError
from imaging.sendstream.reader import StreamReader
from imaging.sendstream.validator import Policy, StreamValidator
from tests.codec import samples

SMALL = [
    "gen-empty",
    "empty-full",
    "plain-inc-s2-s3-shrink",
    "b512-p",
    "b512-full",
    "enc-w-raw-inc",
    "fs-inc",
    "far6G-Lec",
]
WHOLE = [name for name in samples.names() if not str(samples.manifest()[name]["expect"]).startswith("error")]


def read(pieces: list[bytes]) -> list[tuple[int, bytes, bytes, int, int]]:
    reader = StreamReader()
    found = [frame for piece in pieces for frame in samples.plain(reader.feed(piece))]
    reader.finish()
    return found


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(places), len(data)]
    return [data[low:high] for low, high in pairwise(edges)]


@pytest.mark.parametrize("name", WHOLE)
def test_feed_whole_gives_every_byte_in_records(name: str) -> None:
    data = samples.load(name)
    found = samples.frames(data)
    assert b"".join(bytes(f.header) + bytes(f.payload) for f in found) == data
    assert [f.number for f in found] == list(range(len(found)))


@pytest.mark.parametrize("name", SMALL)
def test_feed_byte_by_byte_gives_the_same_records(name: str) -> None:
    data = samples.load(name)
    assert read([data[i : i + 1] for i in range(len(data))]) == read([data])


@pytest.mark.parametrize("name", WHOLE)
def test_feed_random_splits_gives_the_same_records(name: str) -> None:
    data = samples.load(name)
    whole = read([data])
    for seed in range(3):
        places = random.Random(seed).choices(range(len(data)), k=40)
        assert read(cut(data, places)) == whole, f"seed {seed}"


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SMALL), st.data())
def test_feed_any_split_gives_the_same_records(name: str, data: st.DataObject) -> None:
    stream = samples.load(name)
    places = data.draw(st.lists(st.integers(0, len(stream)), max_size=30))
    assert read(cut(stream, places)) == read([stream])


@pytest.mark.parametrize("name", WHOLE)
def test_feed_with_bytes_after_the_end_is_refused(name: str) -> None:
    data = samples.load(name)
    with pytest.raises(BadDataError, match="after the end"):
        read([data + b"\0"])
    with pytest.raises(BadDataError, match="after the end"):
        read([data, b"x"])


@pytest.mark.parametrize("name", ["gen-empty", "plain-inc-s2-s3-shrink", "odd-inc_min"])
def test_truncation_anywhere_is_noticed(name: str) -> None:
    data = samples.load(name)
    for size in range(len(data)):
        with pytest.raises(BadDataError, match=r"truncated|empty"):
            read([data[:size]])


@pytest.mark.parametrize("name", ["b512-p", "lz4-c", "fs-R-package", "enc-w-raw"])
def test_truncation_at_record_edges_is_noticed(name: str) -> None:
    data = samples.load(name)
    for frame in samples.frames(data):
        for size in {frame.offset, frame.offset + 1, frame.offset + 311, frame.offset + 312}:
            if size < len(data):
                with pytest.raises(BadDataError, match=r"truncated|empty"):
                    read([data[:size]])


def verify_whole(validator: StreamValidator, data: bytes) -> None:
    validator.verify(data)
    validator.finish()


def assert_noticed(data: bytes, bit: int) -> None:
    damaged = bytearray(data)
    damaged[bit >> 3] ^= 1 << (bit & 7)
    validator = StreamValidator(policy=Policy(opaque=True))
    with pytest.raises(BadDataError):  # nothing else, whatever bit it is
        verify_whole(validator, bytes(damaged))


@pytest.mark.parametrize("name", ["gen-empty", "plain-inc-s2-s3-shrink"])
def test_every_flipped_bit_of_a_small_stream_is_noticed(name: str) -> None:
    data = samples.load(name)
    for bit in range(len(data) * 8):
        assert_noticed(data, bit)


@pytest.mark.parametrize(
    "name", ["b512-p", "plain-I-s1-s3-package", "gen-props-package", "lz4-inc-ec", "enc-w-raw-inc", "fs-inc"]
)
def test_random_flipped_bits_are_noticed(name: str) -> None:
    data = samples.load(name)
    for bit in random.Random(name).sample(range(len(data) * 8), 300):
        assert_noticed(data, bit)


def test_records_are_released_only_after_the_next_checksum() -> None:
    """BEGIN must not be seen before the record after it was checked."""
    data = samples.load("gen-empty")
    reader = StreamReader()
    assert reader.feed(data[: 312 + 311]) == []
    assert [frame.number for frame in reader.feed(data[312 + 311 : 312 + 312])] == [0]


def test_flipped_begin_is_refused_before_it_is_seen() -> None:
    data = bytearray(samples.load("gen-empty"))
    data[40] ^= 1
    reader = StreamReader()
    with pytest.raises(BadDataError, match=r"record 1 \(OBJECT\) at byte 312"):
        reader.feed(bytes(data))


def test_payload_above_the_limit_is_refused_without_waiting_for_it() -> None:
    data = samples.load("gen-full-8k")
    write = next(frame for frame in samples.frames(data) if frame.type == 3)
    header = bytearray(write.header)
    header[32:40] = (17 << 20).to_bytes(8, "little")
    header[280:312] = bytes(32)  # unsealed, so that only the size is wrong
    with pytest.raises(BadDataError, match="larger than 16777216"):
        StreamReader().feed(data[: write.offset] + bytes(header))


def test_begin_payload_above_the_limit_is_refused() -> None:
    header = bytearray(samples.load("gen-empty")[:312])
    header[4:8] = (65 << 20).to_bytes(4, "little")
    with pytest.raises(BadDataError, match="larger than"):
        StreamReader().feed(bytes(header))


def test_big_endian_stream_is_refused_by_name() -> None:
    header = bytes(8) + bytes.fromhex("00000002f5bacbac") + bytes(296)
    with pytest.raises(UnsupportedError, match="big endian"):
        StreamReader().feed(header)


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=312, max_size=2000))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises((BadDataError, UnsupportedError)):
        read([data])
