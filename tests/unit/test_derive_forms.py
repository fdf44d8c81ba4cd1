"""One disk in many formats gives one stream; increments give the newer disk; nothing depends on the server."""

from __future__ import annotations

import gzip
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from image_service.derive_forms import Form
from imaging.compression import Compression, sniff
from imaging.digests import Digest
from imaging.errors import (
    BadDataError,
    InvalidArgumentError,
    MistifyError,
    NotFoundError,
    TooLargeError,
    WrongKindError,
)
from imaging.sendstream.validator import StreamValidator
from tests.codec import samples
from tests.fakes.derive_world import DeriveWorld, open_derive_world, received, unpack
from tests.fakes.disk_files import BLOCK_BYTES, changed, disk_bytes, encodings, qcow2

OLD = disk_bytes(1)
NEW = changed(OLD, 3, 40)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[DeriveWorld]:
    async with open_derive_world(tmp_path / "one") as world:
        yield world
        assert world.strays() == []


# -- one disk, one stream --------------------------------------------------------------------------------------------


async def test_derived_stream_of_one_disk_in_any_format_is_the_same(world: DeriveWorld, tmp_path: Path) -> None:
    streams = {}
    for number, (name, data) in enumerate(encodings(tmp_path, OLD).items()):
        world.add(f"img{number}", data)
        streams[name] = await world.get(f"img{number}", format="zvol")
    assert len(set(streams.values())) == 1, {name: len(data) for name, data in streams.items()}
    content, state = received(tmp_path / "volume", streams["raw"])
    assert content == OLD
    assert state.volblocksize_bytes == BLOCK_BYTES
    assert state.creation_s == 0


@pytest.mark.parametrize("cut_bytes", [0, 512, 1000])
async def test_derived_stream_is_the_same_whether_the_digest_of_the_disk_is_known_or_not(
    world: DeriveWorld, tmp_path: Path, cut_bytes: int
) -> None:
    disk = OLD[: len(OLD) - cut_bytes]
    async with open_derive_world(tmp_path / "two") as other:
        world.add("img", disk)
        other.add("img", disk, disk=disk + bytes(-len(disk) % 512))
        other.add("qcow2", qcow2(tmp_path, disk), disk=disk + bytes(-len(disk) % 512))
        stream = await world.get("img", format="zvol")
        assert await other.get("img", format="zvol") == stream
        assert await other.get("qcow2", format="zvol") == stream


async def test_derived_stream_passes_the_firewall(world: DeriveWorld) -> None:
    world.add("img", OLD)
    validator = StreamValidator()
    stream = await world.get("img", format="zvol", compression="none")
    assert validator.feed(stream) + validator.finish() == stream


async def test_derived_stream_of_an_odd_size_is_padded(world: DeriveWorld, tmp_path: Path) -> None:
    world.add("img", OLD[:-1000])
    content, _ = received(tmp_path / "volume", await world.get("img", format="zvol"))
    assert content == OLD[:-1000] + bytes(1000)


async def test_raw_form_of_every_format_is_the_disk(world: DeriveWorld, tmp_path: Path) -> None:
    for number, (name, data) in enumerate(encodings(tmp_path, OLD).items()):
        world.add(f"img{number}", data)
        assert await world.get(f"img{number}", format="raw", compression="none") == OLD, name
    world.add("img", await world.get("img0", format="zvol", compression="none"))
    assert await world.get("img", format="raw", compression="none") == OLD


@pytest.mark.parametrize("name", ["plain-full-s1", "zstd-full", "lz4-c", "b512-full"])
async def test_real_stream_gives_the_content_that_was_sent(world: DeriveWorld, tmp_path: Path, name: str) -> None:
    """Streams of a real ``zfs send`` and the raw disk they were taken of have the same content."""
    entry = samples.manifest()[name]
    stream = samples.load(name)
    world.add("img", stream)
    raw = await world.get("img", format="raw", compression="none")
    assert received(tmp_path / "volume", stream)[0] == raw
    assert Digest.of(raw).hex in str(entry), entry


async def test_stored_stream_is_served_as_it_is_unless_asked_otherwise(world: DeriveWorld) -> None:
    stream = samples.load("plain-full-s1")
    packed = gzip.compress(stream, 1, mtime=0)
    info = world.add("img", packed)
    assert await world.info("img", format="zvol") == info
    assert await world.info("img", format="zvol", compression="gzip") == info
    assert await world.get("img", format="zvol", compression="none") == stream
    again = await world.get("img", compression="zstd")
    assert (sniff(again), unpack(again)) == (Compression.ZSTD, stream)
    assert await world.get("img", format="zvol", compression="zstd") == again
    assert world.deriver.started == 2


async def test_compression_of_derived_forms_is_zstd_by_default(world: DeriveWorld, tmp_path: Path) -> None:
    world.add("img", OLD)
    assert (await world.info("img")).digest == (await world.info("img", format="raw")).digest == Digest.of(OLD)
    forms = {name: await world.get("img", format="zvol", compression=name) for name in ("zstd", "gzip", "none")}
    assert [sniff(data).value for data in forms.values()] == list(forms)
    assert len({unpack(data) for data in forms.values()}) == 1
    assert forms["zstd"] == await world.get("img", format="zvol")


# -- increments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old_format", ["raw", "qcow2", "stream"])
@pytest.mark.parametrize("new_format", ["raw", "qcow2", "stream"])
async def test_increment_on_the_full_stream_of_the_old_gives_the_new(
    world: DeriveWorld, tmp_path: Path, old_format: str, new_format: str
) -> None:
    for image_id, data, kind in (("old", OLD, old_format), ("new", NEW, new_format)):
        world.add(f"{image_id}-raw", data)
        stream = await world.get(f"{image_id}-raw", format="zvol", compression="none")
        stored = {"raw": data, "qcow2": qcow2(tmp_path, data, "-c"), "stream": stream}
        if kind != "raw":
            world.add(image_id, stored[kind])
    old, new = ("old" if old_format != "raw" else "old-raw"), ("new" if new_format != "raw" else "new-raw")
    full, increment = await world.get(old, format="zvol"), await world.get(new, base=old)
    content, state = received(tmp_path / "volume", full, increment)
    assert content == NEW
    assert state.guid == received(tmp_path / "other", await world.get(new, format="zvol"))[1].guid
    assert len(unpack(increment)) < 6 * BLOCK_BYTES


async def test_increment_to_another_size_gives_the_new(world: DeriveWorld, tmp_path: Path) -> None:
    world.add("old", OLD)
    for image_id, data in (("longer", NEW + disk_bytes(9, 8)), ("shorter", NEW[: len(NEW) // 2])):
        world.add(image_id, data)
        increment = await world.get(image_id, base="old", format="zvol")
        content, _ = received(tmp_path / "volume", await world.get("old", format="zvol"), increment)
        assert content == data


async def test_increments_of_two_real_streams_continue_a_real_one(world: DeriveWorld, tmp_path: Path) -> None:
    """An increment made here fits a volume that got its full stream from a real pool."""
    first = samples.load("plain-full-s1")
    content, state = received(tmp_path / "volume", first)
    world.add("s1", first)
    world.add("s2", changed(content, 2))
    if state.volblocksize_bytes != BLOCK_BYTES:
        with pytest.raises(InvalidArgumentError, match="no increment between block sizes"):
            await world.get("s2", base="s1")
        return
    assert received(tmp_path / "other", first, await world.get("s2", base="s1"))[0] == changed(content, 2)


async def test_two_services_make_the_same_bytes(world: DeriveWorld, tmp_path: Path) -> None:
    async with open_derive_world(tmp_path / "two") as other:
        for one, names in ((world, ("a", "b")), (other, ("x", "y"))):
            one.add(names[0], OLD)
            one.add(names[1], NEW)
        for compression in ("none", "zstd", "gzip"):
            ours = await world.get("b", base="a", compression=compression)
            assert ours == await other.get("y", base="x", compression=compression)
            assert await world.get("a", format="zvol", compression=compression) == await other.get(
                "x", format="zvol", compression=compression
            )


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"format": "vmdk"}, "format must be zvol or raw"),
        ({"format": "stored"}, "format must be zvol or raw"),
        ({"compression": "xz"}, "compression must be zstd, gzip or none"),
        ({"from": ""}, "from names an older image"),
        ({"from": "a", "format": "raw"}, "from names an older image"),
    ],
)
def test_form_with_a_bad_parameter_is_refused(query: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        Form.parse(query)


async def test_forms_an_image_does_not_have_are_refused(world: DeriveWorld) -> None:
    world.add("disk", OLD)
    world.add("same", gzip.compress(OLD, 1, mtime=0))
    world.add("fs", samples.load("fs-Lec"))
    world.add("tar", b"name".ljust(257, b"\0") + b"ustar" + bytes(1 << 16))
    cases: list[tuple[str, dict[str, str], type[MistifyError], str]] = [
        ("fs", {"format": "raw"}, WrongKindError, "format zfs is no disk"),
        ("tar", {"format": "zvol"}, WrongKindError, "format tar is no disk"),
        ("disk", {"base": "fs"}, WrongKindError, "no increment builds on it"),
        ("disk", {"base": "disk"}, InvalidArgumentError, "same content"),
        ("disk", {"base": "same"}, InvalidArgumentError, "same content"),
        ("disk", {"base": "absent"}, NotFoundError, "named by from"),
        ("absent", {"format": "zvol"}, NotFoundError, "not found"),
    ]
    for image_id, query, kind, words in cases:
        with pytest.raises(kind, match=words):
            await world.get(image_id, **query)
    packed = await world.get("tar", compression="zstd")
    assert sniff(packed) is Compression.ZSTD


async def test_damaged_sources_are_refused_and_leave_nothing(world: DeriveWorld, tmp_path: Path) -> None:
    whole = gzip.compress(OLD, 1)
    world.add("cut", whole[: len(whole) // 2])
    world.add("backed", _with_backing(tmp_path))
    world.add("flipped", samples.load("flip-write-cksum"))
    for image_id, query in (("cut", {"format": "zvol"}), ("flipped", {"format": "raw"}), ("backed", {"format": "raw"})):
        with pytest.raises(MistifyError) as caught:
            await world.get(image_id, **query)
        assert not caught.value.retryable, image_id
    with pytest.raises(BadDataError):
        await world.get("cut", compression="none")


def _with_backing(directory: Path) -> bytes:
    (directory / "base.raw").write_bytes(OLD)
    image = directory / "backed.qcow2"
    command = ["qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", str(directory / "base.raw"), str(image)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return image.read_bytes()


async def test_disks_over_the_limit_are_refused(tmp_path: Path) -> None:
    async with open_derive_world(tmp_path / "small", size_max_bytes=len(OLD) - 1) as world:
        for image_id, data in (("raw", OLD), ("qcow2", qcow2(tmp_path, OLD))):
            world.add(image_id, data)
            with pytest.raises(TooLargeError):
                await world.get(image_id, format="zvol")
        assert world.strays() == []
