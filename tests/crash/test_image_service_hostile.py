"""Hostile images: whatever the bytes are, looking at them ends in facts or in one of two refusals, within bounds.

``MISTIFY_FUZZ_EXAMPLES`` says how many inputs of each kind to try; the default takes about a minute in all.
"""

from __future__ import annotations

import atexit
import bz2
import functools
import gzip
import io
import lzma
import os
import resource
import shutil
import struct
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lz4.frame
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from image_service import diskfile
from image_service.facts import Facts, ImageFormat, InspectionLimits
from image_service.imagestore.describing import describe
from image_service.inspection import Inspection
from image_service.lifecycle import ImageType
from imaging.blobs.local import LocalBlobStore
from imaging.digests import Digest
from imaging.errors import BadDataError, TooLargeError
from imaging.sendstream import microzap
from imaging.sendstream.records import Free
from tests.codec import samples
from tests.codec.test_validator import GUID, PROPERTIES, Step, obj, stream, write
from tests.diskimage.test_qcow2_hostile import build
from tests.imagestore import images

EXAMPLES = int(os.environ.get("MISTIFY_FUZZ_EXAMPLES", "600"))
LIMITS = InspectionLimits(
    unpacked_size_max_bytes=64 << 20,
    unpacked_ratio_max=100,
    unpacked_ratio_floor_bytes=4 << 20,
    virtual_size_max_bytes=64 << 20,
    digest_size_max_bytes=32 << 20,
)
MEMORY_MAX_BYTES = 1 << 30
"""More than the test's own libraries and a decoder's largest window need together; a bomb that unpacks into memory takes more."""

fuzz = settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))

PACKERS: list[Callable[[bytes], bytes]] = [
    bytes,
    functools.partial(gzip.compress, compresslevel=1),
    functools.partial(lzma.compress, preset=0),
    zstandard.compress,
    bz2.compress,
    lz4.frame.compress,
]


def _tar() -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for number in range(3):
            entry = tarfile.TarInfo(f"rootfs/{number}")
            entry.size = 700
            tar.addfile(entry, io.BytesIO(bytes(700)))
    return archive.getvalue()


SEEDS = {
    "stream": samples.load("b512-full"),
    "package": samples.load("b512-p"),
    "filesystem": samples.load("fs-p-package"),
    "qcow2": bytes(build()),
    "tar": _tar(),
    "aci": images.aci(),
}


@functools.cache
def store() -> tuple[LocalBlobStore, Path]:
    """One store for all: making one takes longer than looking at an image."""
    folder = Path(tempfile.mkdtemp())
    blobs = LocalBlobStore(folder / "images", reserve_free_bytes=0)
    atexit.register(shutil.rmtree, folder)
    atexit.register(blobs.close)
    return blobs, folder


def no_bound(_size: int, _held: int) -> None:
    """There is room."""


@contextmanager
def stored(data: bytes) -> Iterator[LocalBlobStore]:
    """A store with these bytes as a blob."""
    blobs, _ = store()
    with blobs.ingest("x") as writer:
        writer.write(data)
        digest = writer.commit().digest
    try:
        yield blobs
    finally:
        blobs.delete(digest)


def look(data: bytes, kind: ImageType) -> Facts | None:
    """Everything the service looks at; None if the image was refused."""
    digest, (_, folder) = Digest.of(data), store()
    try:
        inspection = Inspection(kind, LIMITS)
        for at in range(0, len(data), 10_000):
            inspection.feed(data[at : at + 10_000])
        facts = inspection.finish(digest)
        if diskfile.needs_look(facts):
            with stored(data) as blobs:
                facts = diskfile.look(blobs, digest, facts, directory=folder, limits=LIMITS, room=no_bound)
        if kind is ImageType.CONTAINER and facts.format in {ImageFormat.TAR, ImageFormat.RAW}:
            with stored(data) as blobs:
                describe(
                    blobs,
                    digest,
                    facts.compression,
                    lambda: diskfile.unpacked(blobs, digest, facts, folder, LIMITS, no_bound),
                )
    except (BadDataError, TooLargeError):
        return None
    return facts


def check(data: bytes) -> None:
    """Refused or within the limits, for either type."""
    for kind in ImageType:
        facts = look(data, kind)
        if facts is not None:
            assert facts.virtual_size_bytes <= LIMITS.virtual_size_max_bytes
            assert facts.unpacked_size_bytes <= LIMITS.unpacked_size_max_bytes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < MEMORY_MAX_BYTES


@st.composite
def damaged(draw: st.DrawFn, seed: bytes) -> bytes:
    """A sound image with some bytes changed, cut out, doubled or put in."""
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        near_start = draw(st.booleans())
        at = at % 600 if near_start else at
        change = draw(st.sampled_from(["set", "number", "cut", "double", "insert", "end"]))
        if change == "set":
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif change == "number":
            value = draw(st.sampled_from([0, 1, 511, 1 << 31, 1 << 32, 1 << 62, (1 << 64) - 1]))
            data[at : at + 8] = struct.pack(draw(st.sampled_from("<>")) + "Q", value)
        elif change == "cut":
            del data[at : at + draw(st.integers(1, 5000))]
        elif change == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 5000))]
        elif change == "insert":
            data[at:at] = draw(st.binary(max_size=64))
        else:
            del data[at:]
    return bytes(data)


_NUMBERS = st.sampled_from([0, 1, 2, 3, 511, 512, 4096, 8192, 1 << 17, 1 << 20, 1 << 24, 1 << 40, (1 << 63) - 512])


@st.composite
def lying(draw: st.DrawFn) -> bytes:
    """A stream whose checksums are right and whose records are not."""
    steps: list[Step] = [(obj(1, 23, draw(st.sampled_from([512, 8192, 1 << 20]))), b"")]
    for _ in range(draw(st.integers(0, 8))):
        number, kind = draw(st.integers(0, 3)), draw(st.sampled_from([23, 24, 1, 200]))
        choice = draw(st.sampled_from(["object", "write", "free", "size"]))
        if choice == "object":
            steps.append((obj(number, kind, draw(_NUMBERS) & 0xFFFFFFFF), b""))
        elif choice == "write":
            size = draw(st.sampled_from([0, 512, 8192, 1 << 17]))
            steps.append((write(number, kind, draw(_NUMBERS), size), draw(st.binary(max_size=8)).ljust(size, b"w")))
        elif choice == "free":
            steps.append((Free(number, draw(_NUMBERS), draw(_NUMBERS), GUID), b""))
        else:
            steps += [PROPERTIES, (write(2, 24, 0, 512), microzap.build(draw(_NUMBERS), GUID))]
    features, fromguid = draw(st.sampled_from([0, 1 << 19, 1 << 24, 1 << 50])), draw(st.sampled_from([0, 7]))
    return stream(steps, features=features, fromguid=fromguid)


@pytest.mark.timeout(1800)
@fuzz
@given(lying(), st.sampled_from(PACKERS))
def test_stream_with_right_checksums_and_wrong_records_is_refused_or_harmless(
    data: bytes, pack: Callable[[bytes], bytes]
) -> None:
    check(pack(data))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SEEDS)
def test_damaged_image_is_refused_or_harmless(name: str) -> None:
    @fuzz
    @given(st.data())
    def run(data: st.DataObject) -> None:
        check(data.draw(damaged(SEEDS[name])))

    run()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SEEDS)
def test_damage_before_and_after_packing_is_refused_or_harmless(name: str) -> None:
    @fuzz
    @given(st.data())
    def run(data: st.DataObject) -> None:
        packed = data.draw(st.sampled_from(PACKERS[1:]))(data.draw(damaged(SEEDS[name])))
        check(data.draw(damaged(packed)) if data.draw(st.booleans()) else packed)

    run()


@pytest.mark.timeout(1800)
@fuzz
@given(
    st.binary(max_size=2000),
    st.sampled_from([b"", b"QFI\xfb\0\0\0\3", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0"]),
)
def test_noise_behind_a_magic_is_refused_or_harmless(noise: bytes, magic: bytes) -> None:
    check(magic + noise)


@pytest.mark.parametrize("pack", PACKERS[1:])
@pytest.mark.parametrize("size", [8 << 20, 100 << 20])
def test_bomb_is_refused_before_it_is_large(pack: Callable[[bytes], bytes], size: int) -> None:
    bomb = pack(bytes(size))
    for kind in ImageType:
        for data in (bomb, gzip.compress(bomb)):
            facts = look(data, kind)
            assert facts is None or facts.unpacked_size_bytes <= LIMITS.unpacked_size_max_bytes
    assert len(bomb) < size // 50
    assert look(bomb, ImageType.KVM) is None
