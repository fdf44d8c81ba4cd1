"""Raw image -> stream -> raw image is the identity, for full streams and increments of any shape."""

from __future__ import annotations

import hashlib
import io
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imaging.errors import BadDataError, ConflictError, TooLargeError, UnsupportedError
from imaging.sendstream.resume import ResumeToken
from imaging.sendstream.volume import (
    BlockCompression,
    Limits,
    OlderImage,
    StreamHeader,
    VolumeReceiver,
    VolumeState,
    apply_stream,
    data_ranges,
    derive_guid,
    hash_image,
    make_stream,
    make_stream_from,
    padded_size,
)
from tests.codec import samples

BLOCK_SIZES = [512, 1024, 4096, 8192, 65536, 131072, 262144, 1 << 20]
COMPRESSIONS = [BlockCompression.NONE, BlockCompression.LZ4, BlockCompression.ZSTD, BlockCompression.GZIP_6]


class Picture:
    """A random sparse image in a file; ``seed`` decides everything."""

    def __init__(self, fd: int, seed: int, size: int, like: Picture | None = None) -> None:
        self.fd, self.size = fd, size
        rng = random.Random(seed)
        os.ftruncate(fd, size)
        if like is not None:
            for start, end in data_ranges(like.fd, min(size, like.size)):
                os.pwrite(fd, os.pread(like.fd, end - start, start), start)
        for _ in range(rng.randint(0, 12)):
            start = rng.randrange(size)
            length = min(size - start, rng.choice([1, 100, 4096, 70_000]))
            fill = rng.choice([rng.randbytes(length), bytes(length), (b"ab" * length)[:length]])
            os.pwrite(fd, fill, start)

    def padded(self, block: int) -> bytes:
        return os.pread(self.fd, self.size, 0).ljust(padded_size(self.size, block), b"\0")


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


cases = st.tuples(
    st.integers(0, 1 << 30), st.integers(1, 3 << 20), st.sampled_from(BLOCK_SIZES), st.sampled_from(COMPRESSIONS)
)


@settings(max_examples=40, deadline=None)
@given(cases)
def test_full_stream_there_and_back_is_the_identity(case: tuple[int, int, int, BlockCompression]) -> None:
    seed, size, block, compression = case
    header = StreamHeader(9, "a/b@c", block, 5, compression=compression)
    with samples.scratch() as fd, samples.scratch() as out:
        picture = Picture(fd, seed, size)
        stream = b"".join(make_stream(fd, size, header))
        state = apply_stream(io.BytesIO(stream), out)
        assert state == VolumeState(9, 0, padded_size(size, block), block, 5, "a/b@c")
        assert content(out) == picture.padded(block)
        once = make_stream_from(io.BytesIO(picture.padded(1)), header, size_bytes=size)
        assert b"".join(once) == stream


@settings(max_examples=40, deadline=None)
@given(cases, st.integers(1, 3 << 20))
def test_increment_there_and_back_is_the_identity(
    case: tuple[int, int, int, BlockCompression], newer_size: int
) -> None:
    seed, size, block, compression = case
    with samples.scratch() as old_fd, samples.scratch() as new_fd, samples.scratch() as out:
        old = Picture(old_fd, seed, size)
        new = Picture(new_fd, seed + 1, newer_size, like=old)
        full = StreamHeader(1, "a/b@1", block, compression=compression)
        state = apply_stream(io.BytesIO(b"".join(make_stream(old_fd, size, full))), out)
        step = StreamHeader(2, "a/b@2", block, fromguid=1, compression=compression)
        stream = b"".join(make_stream(new_fd, newer_size, step, older=OlderImage(old_fd, size)))
        state = apply_stream(io.BytesIO(stream), out, state)
        assert (state.guid, state.fromguid) == (2, 1)
        assert content(out) == new.padded(block)


def test_increment_of_the_same_image_holds_no_data() -> None:
    with samples.scratch() as fd:
        Picture(fd, 3, 1 << 20)
        header = StreamHeader(2, "a/b@2", 8192, fromguid=1)
        assert len(b"".join(make_stream(fd, 1 << 20, header, older=OlderImage(fd, 1 << 20)))) == 312 * 7


@pytest.mark.parametrize("offset", [0, 8192, 4 << 20, 16 << 20])
def test_resuming_stream_continues_the_transfer(offset: int) -> None:
    """Cut off a stream anywhere, make the rest from the receiver's token, and the volume is whole."""
    with samples.scratch() as image, samples.scratch() as out:
        os.pwrite(image, samples.raw_image(), 0)
        header = StreamHeader(77, "a/b@c", 8192, 5)
        stream = b"".join(make_stream(image, 16 << 20, header))
        receiver = VolumeReceiver(out)
        receiver.feed(stream[: 30_000 + offset // 200])
        point = receiver.interrupted()
        assert point is not None
        token = ResumeToken.parse(ResumeToken.at(point, 30_000).encode())
        assert (token.toguid, token.object, token.toname) == (77, 1, "a/b@c")
        rest = b"".join(make_stream(image, 16 << 20, header, resume_offset=token.offset))
        assert len(rest) < len(stream)
        state = apply_stream(io.BytesIO(rest), out, resume=point)
        assert state == VolumeState(77, 0, 16 << 20, 8192, 5, "a/b@c")
        assert content(out) == samples.raw_image()


def test_real_resuming_stream_continues_a_cut_off_one() -> None:
    with samples.scratch() as out:
        receiver = VolumeReceiver(out)
        receiver.feed(samples.load("plain-full-s1")[:60_000])
        state = apply_stream(io.BytesIO(samples.load("plain-resume-t")), out, resume=receiver.interrupted())
        result = samples.manifest()["plain-resume-t"]["result"]
        assert hash_image(out, state.volsize_bytes).hex == result["sha256"]
        assert str(state.guid) == result["guid"]


def test_resuming_stream_that_leaves_a_gap_is_refused() -> None:
    with samples.scratch() as out:
        receiver = VolumeReceiver(out)
        receiver.feed(samples.load("plain-full-s1")[:30_000])
        with pytest.raises(ConflictError, match="goes on at"):
            apply_stream(io.BytesIO(samples.load("plain-resume-t")), out, resume=receiver.interrupted())


def test_resuming_stream_without_a_beginning_is_refused() -> None:
    with samples.scratch() as out, pytest.raises(UnsupportedError, match="interrupted"):
        apply_stream(io.BytesIO(samples.load("plain-resume-t")), out)


def test_increment_on_another_base_is_refused_and_names_the_guid() -> None:
    with samples.scratch() as out:
        state = samples.apply_chain(out, ["lz4-full"])
        with pytest.raises(ConflictError, match="3487082587457790019"):
            apply_stream(io.BytesIO(samples.load("plain-inc-s1-s2")), out, state)


def test_increment_without_base_is_refused() -> None:
    with samples.scratch() as out, pytest.raises(ConflictError, match="needs a volume with guid"):
        apply_stream(io.BytesIO(samples.load("plain-inc-s1-s2")), out)


def test_full_stream_onto_a_base_is_refused_and_changes_nothing() -> None:
    with samples.scratch() as out:
        state = samples.apply_chain(out, ["plain-full-s1"])
        before = content(out)
        with pytest.raises(ConflictError):
            apply_stream(io.BytesIO(samples.load("gen-full-8k")), out, state)
        assert content(out) == before


def test_large_block_increment_on_a_base_received_without_is_refused() -> None:
    """Kernels take this and zero every unchanged block."""
    with samples.scratch() as out, samples.scratch() as image:
        state = samples.apply_chain(out, ["big1M-noL"])
        assert state is not None
        os.ftruncate(image, 16 << 20)
        header = StreamHeader(3, "a/b@c", 1 << 20, fromguid=state.guid)
        stream = b"".join(make_stream(image, 16 << 20, header, older=OlderImage(out, 16 << 20)))
        with pytest.raises(BadDataError, match="differs from the base"):
            apply_stream(io.BytesIO(stream), out, state)


@pytest.mark.parametrize("name", ["gen-full-8k", "plain-e-s1"])
def test_volume_above_the_limit_is_refused(name: str) -> None:
    with samples.scratch() as out, pytest.raises(TooLargeError, match=r"\[rule size\]"):
        apply_stream(io.BytesIO(samples.load(name)), out, limits=Limits(volume_size_max_bytes=8 << 20))


def test_applied_holes_take_no_space(tmp_path: Path) -> None:
    path = tmp_path / "v"
    with path.open("w+b") as file:
        file.write(b"x" * (1 << 20))
        file.flush()
        state = apply_stream(io.BytesIO(samples.load("gen-empty")), file.fileno())
        assert (os.fstat(file.fileno()).st_size, os.fstat(file.fileno()).st_blocks) == (state.volsize_bytes, 0)


def test_hash_image_covers_holes_and_padding() -> None:
    with samples.scratch() as fd:
        Picture(fd, 11, 1_000_003)
        data = os.pread(fd, 1_000_003, 0)
        assert hash_image(fd, 1_000_003).hex == hashlib.sha256(data).hexdigest()
        assert hash_image(fd, 1 << 20).hex == hashlib.sha256(data.ljust(1 << 20, b"\0")).hexdigest()


def test_derived_guid_depends_on_content_and_block_size_only() -> None:
    with samples.scratch() as fd:
        os.pwrite(fd, b"content", 0)
        digest = hash_image(fd, 8192)
        assert derive_guid(digest, 8192) == derive_guid(digest, 8192) > 0
        assert derive_guid(digest, 8192) != derive_guid(digest, 4096)


def test_state_survives_its_wire_form() -> None:
    state = VolumeState((1 << 64) - 1, 3, 512, 512, 0, "a/b@c")
    assert VolumeState.from_wire(state.to_wire()) == state
    for wrong in (None, {}, {**state.to_wire(), "guid": "x"}, {**state.to_wire(), "volsize_bytes": -1}):
        with pytest.raises(BadDataError):
            VolumeState.from_wire(wrong)
