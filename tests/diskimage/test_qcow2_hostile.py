"""Malformed qcow2: every input is read within its limits or refused by one of our errors, nothing else."""

from __future__ import annotations

import struct
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imaging.diskimage import open_disk, sniff_disk
from imaging.errors import BadDataError, MistifyError, TooLargeError, UnsupportedError

CLUSTER = 4096


def build(*, size: int = 8 * CLUSTER, **changes: int) -> bytearray:
    """A small valid qcow2: header, L1, one L2 with a plain, a compressed and a zero cluster."""
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = packed.compress(b"p" * CLUSTER) + packed.flush()
    fields = {
        "version": 3, "backing": 0, "backing_size": 0, "bits": 12, "size": size, "crypt": 0, "l1_entries": 1,
        "l1_offset": CLUSTER, "incompatible": 0, "order": 4, "length": 104, **changes,
    }  # fmt: skip
    head = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", fields["version"], fields["backing"], fields["backing_size"], fields["bits"],
        fields["size"], fields["crypt"], fields["l1_entries"], fields["l1_offset"], 0, 0, 0, 0,
    )  # fmt: skip
    head += struct.pack(">QQQII", fields["incompatible"], 0, 0, fields["order"], fields["length"])
    image = bytearray(5 * CLUSTER)
    image[: len(head)] = head
    struct.pack_into(">Q", image, CLUSTER, (2 * CLUSTER) | 1 << 63)
    struct.pack_into(">QQQ", image, 2 * CLUSTER, 3 * CLUSTER | 1 << 63, 1 << 62 | 4 * CLUSTER, 1)
    image[3 * CLUSTER : 4 * CLUSTER] = b"d" * CLUSTER
    image[4 * CLUSTER : 4 * CLUSTER + len(body)] = body
    return image


@contextmanager
def opened(image: bytes | bytearray) -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        file.write(image)
        file.flush()
        yield file.fileno()


def read_all(image: bytes | bytearray) -> bytes:
    with opened(image) as fd:
        disk = open_disk(fd, virtual_size_max_bytes=1 << 30)
        content = bytearray(disk.virtual_size_bytes) if disk.virtual_size_bytes < 1 << 20 else bytearray()
        total = 0
        for extent in disk.extents():
            data = disk.read(extent)
            total += len(data)
            if content:
                content[extent.offset_bytes : extent.offset_bytes + len(data)] = data
        assert total <= disk.virtual_size_bytes
        return bytes(content)


def test_handmade_image_reads_as_built() -> None:
    assert read_all(build()) == b"d" * CLUSTER + b"p" * CLUSTER + bytes(6 * CLUSTER)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"version": 1}, UnsupportedError, "version 1"),
        ({"version": 4}, UnsupportedError, "version 4"),
        ({"backing": 200, "backing_size": 11}, UnsupportedError, "backing file"),
        ({"crypt": 1}, UnsupportedError, "encryption"),
        ({"bits": 8}, BadDataError, "cluster_bits"),
        ({"bits": 63}, BadDataError, "cluster_bits"),
        ({"size": 1000}, BadDataError, "multiple"),
        ({"size": 1 << 62}, BadDataError, "L1 table"),
        ({"size": 1 << 40, "l1_entries": 1 << 19}, BadDataError, "outside the file"),
        ({"size": 0}, BadDataError, "empty"),
        ({"l1_offset": 100}, BadDataError, "misaligned"),
        ({"l1_offset": 1 << 50}, BadDataError, "outside"),
        ({"incompatible": 2}, UnsupportedError, "corrupt"),
        ({"incompatible": 4}, UnsupportedError, "external data file"),
        ({"incompatible": 8}, UnsupportedError, "compression"),
        ({"incompatible": 16}, UnsupportedError, "extended L2"),
        ({"incompatible": 1 << 40}, UnsupportedError, "unknown incompatible"),
        ({"order": 7}, BadDataError, "refcount order"),
        ({"length": 103}, BadDataError, "length 103"),
        ({"length": 1 << 20}, BadDataError, "length"),
    ],
)
def test_header_that_lies_is_refused_with_what_was_wrong(
    changes: dict[str, int], error: type[MistifyError], words: str
) -> None:
    with pytest.raises(error, match=words):
        read_all(build(**changes))


@pytest.mark.parametrize(
    ("at", "entry", "words"),
    [
        (CLUSTER, 100 << 9, "not aligned"),
        (CLUSTER, 1 << 40, "outside"),
        (2 * CLUSTER, 3 * CLUSTER + 512, "not aligned"),
        (2 * CLUSTER, 1 << 50, "outside"),
        (2 * CLUSTER + 16, 3 * CLUSTER, "named twice"),
        (2 * CLUSTER, 2 * CLUSTER, "named twice"),
        (2 * CLUSTER + 8, 1 << 62 | 3 * CLUSTER, "decompress"),
        (2 * CLUSTER + 8, 1 << 62 | 1 << 40, "outside"),
    ],
)
def test_table_that_lies_is_refused_with_what_was_wrong(at: int, entry: int, words: str) -> None:
    image = build()
    struct.pack_into(">Q", image, at, entry)
    with pytest.raises(BadDataError, match=words):
        read_all(image)


def test_virtual_size_over_the_limit_is_refused() -> None:
    with opened(build(size=4 << 20)) as fd, pytest.raises(BadDataError, match="L1"):
        open_disk(fd)
    with opened(build(size=2 << 20)) as fd, pytest.raises(TooLargeError, match="limit"):
        open_disk(fd, virtual_size_max_bytes=1 << 20)


@pytest.mark.parametrize("magic", [b"KDMV", b"conectix", b"vhdxfile", b"\x7fELF"])
def test_foreign_format_is_refused_by_name(magic: bytes) -> None:
    with pytest.raises(UnsupportedError, match="convert it"):
        sniff_disk(magic + bytes(508))


@given(cut=st.integers(0, 5 * CLUSTER))
def test_truncated_anywhere_is_refused_or_reads_fully(cut: int) -> None:
    image = bytes(build()[:cut])
    if not image.startswith(b"QFI\xfb"):
        return
    try:
        content = read_all(image)
    except MistifyError:
        return
    assert content == read_all(build())


@settings(max_examples=400)
@given(changes=st.lists(st.tuples(st.integers(0, 3 * CLUSTER - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_anywhere_gives_only_our_errors(changes: list[tuple[int, int]]) -> None:
    image = build()
    for at, value in changes:
        image[at] = value
    with suppress(MistifyError):
        read_all(image)  # any other exception fails the test; so does content beyond the virtual size
