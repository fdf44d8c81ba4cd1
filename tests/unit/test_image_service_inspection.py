"""Looking at images: formats by content, one content digest for every encoding, and nothing harmful or boundless gets through."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lz4.frame
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from image_service import diskfile
from image_service.admission import Admission, AdmissionLimits
from image_service.collector import Collector
from image_service.facts import Facts, ImageFormat, InspectionLimits
from image_service.importer import utc_now
from image_service.inspection import Inspection
from image_service.inspector import Inspector
from image_service.lifecycle import ImageStatus, ImageType, new_upload, set_finished
from image_service.metadata import MetadataStore
from imaging.blobs.local import LocalBlobStore
from imaging.compression import Compression
from imaging.digests import Digest
from imaging.errors import BadDataError, InvalidArgumentError, NoSpaceError, TooLargeError
from imaging.kv.sqlite import SqliteKeyValue
from imaging.sendstream.volume import apply_stream
from tests.codec import samples
from tests.codec.test_package import package
from tests.diskimage.test_qcow2_hostile import build

LIMITS = InspectionLimits()
PACKERS: dict[Compression, Callable[[bytes], bytes]] = {
    Compression.NONE: bytes,
    Compression.GZIP: gzip.compress,
    Compression.XZ: lzma.compress,
    Compression.ZSTD: zstandard.compress,
    Compression.BZIP2: bz2.compress,
    Compression.LZ4: lz4.frame.compress,
}


def inspect(
    data: bytes, *, kind: ImageType = ImageType.KVM, limits: InspectionLimits = LIMITS, piece: int = 1 << 20
) -> Facts:
    inspection = Inspection(kind, limits)
    for at in range(0, len(data), piece):
        inspection.feed(data[at : at + piece])
    assert inspection.fed_bytes == len(data)
    return inspection.finish(Digest.of(data))


def store(tmp_path: Path, data: bytes) -> LocalBlobStore:
    blobs = LocalBlobStore(tmp_path / "images", reserve_free_bytes=0)
    with blobs.ingest("x") as writer:
        writer.write(data)
        writer.commit()
    return blobs


def look(tmp_path: Path, data: bytes, limits: InspectionLimits = LIMITS) -> Facts:
    """Both looks, as the service takes them."""
    facts = inspect(data, limits=limits)
    with store(tmp_path, data) as blobs:
        return diskfile.look(
            blobs, Digest.of(data), facts, directory=tmp_path, limits=limits, room=lambda _size, _held: None
        )


@pytest.mark.parametrize("packing", list(PACKERS))
def test_raw_disk_has_one_content_in_every_packing(packing: Compression) -> None:
    disk = samples.raw_image()
    facts = inspect(PACKERS[packing](disk))
    assert facts == Facts(
        ImageFormat.RAW,
        packing,
        len(disk),
        str(Digest.of(disk)),
        str(Digest.of(disk, "sha512")),
        len(disk),
        str(Digest.of(disk)),
    )


@pytest.mark.parametrize("name", ["plain-full-s1", "plain-c-s1", "lz4-c", "zstd-ec", "gen-props-package", "big1M-Lec"])
def test_stream_has_the_content_of_its_disk(name: str) -> None:
    facts = inspect(samples.load(name))
    for piece in (997, 1 << 20):
        assert inspect(samples.load(name), piece=piece) == facts
        assert (facts.format, facts.virtual_size_bytes) == (ImageFormat.ZVOL, len(samples.raw_image()))
        assert facts.content_digest == str(Digest.of(samples.raw_image()))
    packed = inspect(zstandard.compress(samples.load(name)))
    assert (packed.compression, packed.content_digest) == (Compression.ZSTD, facts.content_digest)
    assert packed.unpacked_sha256 == facts.unpacked_sha256


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_package_of_snapshots_has_the_content_of_its_disk(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    """The digest is that of the disk after the last stream."""
    streams = package("plain-full-s1", "plain-inc-s1-s2", "plain-inc-s2-s3-shrink")
    with (tmp_path / "disk").open("w+b") as disk:
        state = apply_stream(io.BytesIO(streams), disk.fileno())
        expected = Digest.of(disk.read())
    data = pack(streams)
    assert inspect(data).content_digest == ""
    facts = look(tmp_path, data)
    assert (facts.format, facts.virtual_size_bytes) == (ImageFormat.ZVOL, state.volsize_bytes)
    assert facts.content_digest == str(expected)
    small = look(tmp_path / "small", data, replace(LIMITS, digest_size_max_bytes=1 << 20))
    assert (small.content_digest, small.unpacked_sha512) == ("", facts.unpacked_sha512)


def test_package_of_several_volumes_is_refused() -> None:
    with pytest.raises(BadDataError, match="several datasets"):
        inspect(package("b512-full", "empty-full"))


def test_package_that_has_no_room_to_be_put_together_is_refused(tmp_path: Path) -> None:
    def refuse(_size: int, _held: int) -> None:
        raise NoSpaceError("full")

    data = package("plain-full-s1", "plain-inc-s1-s2")
    with store(tmp_path, data) as blobs, pytest.raises(NoSpaceError):
        diskfile.look(blobs, Digest.of(data), inspect(data), directory=tmp_path, limits=LIMITS, room=refuse)


@pytest.mark.parametrize("options", [[], ["-c"], ["-o", "compat=0.10"]])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_qcow2_has_the_content_of_its_disk(tmp_path: Path, options: list[str], pack: Callable[[bytes], bytes]) -> None:
    raw, image = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(samples.raw_image())
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, str(raw), str(image)]
    subprocess.run(command, check=True, timeout=60)
    data = pack(image.read_bytes())
    facts = look(tmp_path, data)
    assert facts.format is ImageFormat.QCOW2
    assert facts.virtual_size_bytes == len(samples.raw_image())
    assert facts.content_digest == str(Digest.of(samples.raw_image()))


def test_raw_that_ends_within_a_sector_is_as_its_disk(tmp_path: Path) -> None:
    facts = look(tmp_path, b"x" * 700)
    assert (facts.unpacked_size_bytes, facts.virtual_size_bytes) == (700, 1024)
    assert facts.content_digest == str(Digest.of(b"x" * 700 + bytes(324)))
    assert look(tmp_path / "packed", gzip.compress(b"x" * 700)).content_digest == facts.content_digest


def test_nothing_is_a_raw_image_of_no_size(tmp_path: Path) -> None:
    facts = look(tmp_path, b"")
    assert (facts.format, facts.virtual_size_bytes, facts.unpacked_size_bytes) == (ImageFormat.RAW, 0, 0)


def test_container_archives_are_known(tmp_path: Path) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("rootfs"))
    for data in (archive.getvalue(), gzip.compress(archive.getvalue())):
        facts = inspect(data, kind=ImageType.CONTAINER)
        assert (facts.format, facts.content_digest) == (ImageFormat.TAR, str(Digest.of(archive.getvalue())))


@pytest.mark.parametrize("name", ["fs-Lec", "fs-p-package"])
def test_filesystem_streams_are_for_containers_only(name: str) -> None:
    data = samples.load(name)
    facts = inspect(data, kind=ImageType.CONTAINER)
    assert (facts.format, facts.content_digest) == (ImageFormat.ZFS, str(Digest.of(data)))
    with pytest.raises(BadDataError, match="filesystem"):
        inspect(data)


_REFUSED = sorted({*samples.names(expect="error"), "plain-redacted", "plain-resume-t", "enc-w-raw"})
_INCREMENTS = ["plain-inc-s1-s2", "plain-I-s1-s3-package", "clone-inc-s1-c1", "fs-inc"]


@pytest.mark.parametrize("kind", ImageType)
@pytest.mark.parametrize("name", [*_REFUSED, *_INCREMENTS])
def test_stream_that_must_not_reach_a_hypervisor_is_refused(name: str, kind: ImageType) -> None:
    with pytest.raises(BadDataError):
        inspect(samples.load(name), kind=kind)
    with pytest.raises(BadDataError):
        inspect(gzip.compress(samples.load(name)), kind=kind)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"<!DOCTYPE html><title>please log in", "page of text"),
        (b"KDMV" + bytes(600), "vmdk"),
        (b"conectix" + bytes(600), "vhd"),
        (bytes(build(backing=200, backing_size=11)), "backing file"),
        (bytes(build(incompatible=4)), "external data file"),
        (bytes(build(crypt=1)), "encryption"),
        (bytes(build(bits=63)), "cluster_bits"),
        (gzip.compress(b"x" * 5000, mtime=0)[:-9], "cut off"),
        (gzip.compress(b"x" * 5000, mtime=0) + b"junk", "cut off"),
        (b"\xfd7zXZ\0" + b"junk" * 20, "damaged"),
        (b"\x28\xb5\x2f\xfd" + b"\xff" * 40, "damaged"),
    ],
)
def test_what_is_no_image_is_refused_by_name(data: bytes, words: str) -> None:
    with pytest.raises(BadDataError, match=words):
        inspect(data)


@pytest.mark.parametrize("changes", [{"size": 1 << 50, "l1_entries": 1 << 20}, {"size": 1000}])
def test_qcow2_with_an_absurd_header_is_refused(tmp_path: Path, changes: dict[str, int]) -> None:
    with pytest.raises(BadDataError):
        look(tmp_path, bytes(build(**changes)))


def test_virtual_size_over_the_limit_is_refused(tmp_path: Path) -> None:
    limits = replace(LIMITS, virtual_size_max_bytes=1 << 14)
    with pytest.raises(TooLargeError, match="virtual size"):
        look(tmp_path, bytes(build()), limits)
    with pytest.raises(TooLargeError, match="virtual size"):
        inspect(samples.load("far6G-full"), limits=replace(limits, digest_size_max_bytes=1 << 14))


def test_disk_too_large_to_hash_is_read_but_has_no_content_digest(tmp_path: Path) -> None:
    limits = replace(LIMITS, digest_size_max_bytes=1 << 14)
    assert look(tmp_path, bytes(build()), limits).content_digest == ""
    assert inspect(samples.load("far6G-full"), limits=limits).content_digest == ""


@pytest.mark.parametrize("packing", [one for one in PACKERS if one is not Compression.NONE])
def test_bomb_is_refused_by_size_and_by_ratio(packing: Compression) -> None:
    bomb = PACKERS[packing](bytes(8 << 20))
    with pytest.raises(TooLargeError, match="larger than"):
        inspect(bomb, limits=replace(LIMITS, unpacked_size_max_bytes=4 << 20))
    with pytest.raises(TooLargeError, match="times its size"):
        inspect(bomb, limits=replace(LIMITS, unpacked_ratio_max=20, unpacked_ratio_floor_bytes=1 << 20))


def test_unpacking_asks_for_room_and_leaves_nothing(tmp_path: Path) -> None:
    data = gzip.compress(bytes(build()))
    asked: list[tuple[int, int]] = []

    def refuse(size: int, held: int) -> None:
        asked.append((size, held))
        raise NoSpaceError("full")

    with store(tmp_path, data) as blobs, pytest.raises(NoSpaceError):
        diskfile.look(blobs, Digest.of(data), inspect(data), directory=tmp_path, limits=LIMITS, room=refuse)
    assert asked == [(len(build()), 0)]
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_images_stored_before_anybody_looked_are_looked_at(tmp_path: Path) -> None:
    sound, harmful = samples.load("b512-full"), samples.load("bad-nosize")
    with LocalBlobStore(tmp_path / "images", reserve_free_bytes=0) as blobs:
        records = MetadataStore.over(SqliteKeyValue(tmp_path / "records.db"))
        for name, data in (("sound", sound), ("harmful", harmful)):
            with blobs.ingest(name) as writer:
                writer.write(data)
                info = writer.commit()
            image = new_upload(name, ImageType.KVM, now=utc_now())
            records.put(set_finished(image, info.digest, info.size_bytes, now=utc_now()))
        inspector = Inspector(records, blobs, Admission(AdmissionLimits()), Collector(records, blobs))
        for image in inspector.unseen():
            inspector.catch_up(image)
        assert inspector.unseen() == []
        assert records.get_by_id("sound").content_digest == inspect(sound).content_digest
        refused = records.get_by_id("harmful")
        assert (refused.status, refused.digest) == (ImageStatus.ERROR, "")
        assert "no volume size" in refused.error
        records.shutdown()


def test_format_of_an_unknown_name_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="zvol"):
        ImageFormat.parse("vmdk")


@given(st.data())
def test_pieces_do_not_matter(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["b512-full", "empty-full"]))
    content = data.draw(st.sampled_from([samples.load(name), gzip.compress(samples.load(name)), b"raw" * 100]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=20)))
    inspection = Inspection(ImageType.KVM, LIMITS)
    for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
        inspection.feed(content[start:end])
    assert inspection.finish(Digest.of(content)) == inspect(content)
