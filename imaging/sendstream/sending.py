"""Disk images into streams."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import groupby, pairwise

import numpy as np
import numpy.typing as npt

from imaging.compression import Readable
from imaging.digests import Digest
from imaging.diskimage.base import Disk
from imaging.errors import BadDataError, InvalidArgumentError, from_os_error
from imaging.sendstream import backend, nvlist
from imaging.sendstream.image import data_ranges
from imaging.sendstream.records import BLOCK_MAX_BYTES, DATA_OBJECT, Feature
from imaging.sendstream.writer import StreamHeader, VolumeWriter, check_block_size

CHUNK_BYTES = 1 << 20
"""How much of an image is read at once; about the size of the pieces a stream is handed out in."""
EMIT_BYTES = 512 << 10
"""Pieces are handed out when they are at least this large."""

_ZERO, _DATA, _SAME = 0, 1, 2
Rows = npt.NDArray[np.uint8]
Kinds = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class OlderImage:
    """What an increment is made against."""

    fd: int
    size_bytes: int


def derive_guid(content: Digest, volblocksize_bytes: int) -> int:
    """A guid that depends on nothing but the volume's content and block size, so that equal input makes equal streams.

    ``content`` is the digest of the image, padded with zeros to whole blocks.
    """
    check_block_size(volblocksize_bytes)
    text = f"volume {volblocksize_bytes} {content}".encode()
    return int.from_bytes(sha256(text).digest()[:8], "big") or 1


def padded_size(size_bytes: int, block_bytes: int) -> int:
    """The volume size for an image: whole blocks."""
    return -(-size_bytes // block_bytes) * block_bytes


def make_stream(
    fd: int,
    size_bytes: int,
    header: StreamHeader,
    *,
    older: OlderImage | None = None,
    resume_offset: int | None = None,
) -> Iterator[bytes]:
    """The stream of the image behind ``fd``, in pieces of about half a MiB to 1 MiB; the same input gives the same bytes.

    The image is padded with zeros to whole blocks. Holes are skipped without reading them. With ``older`` (and
    ``header.fromguid``) the stream holds only what differs; both images must not change meanwhile. With ``resume_offset`` (from
    a receiver's token, for object 1) it is a resuming stream, which starts there.

    Errors: InvalidArgumentError (header, an empty image), BadDataError (the image is shorter than said).
    """
    _check(size_bytes, header, incremental=older is not None)
    size = padded_size(size_bytes, header.volblocksize_bytes)
    writer = VolumeWriter(header)
    start = 0 if resume_offset is None else resume_offset
    if resume_offset is None:
        writer.start(size)
    else:
        place: nvlist.NvList = {"resume_object": DATA_OBJECT, "resume_offset": resume_offset}
        writer.start(size, nvlist.encode_native(place), Feature.RESUMING)
    images = (_Image(fd, size_bytes, start), _Image(older.fd, older.size_bytes, start) if older else None)
    chunks = _changes(images[0], images[1], size, header) if images[1] else _contents(images[0], size, header)
    yield from _encode(writer, chunks)
    old_size = padded_size(older.size_bytes, header.volblocksize_bytes) if older else None
    writer.finish(None if size == old_size else size)
    yield writer.take()


def make_stream_from(source: Readable, header: StreamHeader, *, size_bytes: int | None = None) -> Iterator[bytes]:
    """A full stream of an image that is read once, front to end.

    With ``size_bytes`` the bytes are the same as :func:`make_stream` gives for such a file (BadDataError if the source is
    shorter or longer). Without it, the end of the data is stated after the data, which every receiver takes as well.
    """
    _check(1 if size_bytes is None else size_bytes, header, incremental=False)
    block_bytes = header.volblocksize_bytes
    writer = VolumeWriter(header)
    writer.start(None if size_bytes is None else padded_size(size_bytes, block_bytes))
    total = 0
    while data := _read_full(source, max(CHUNK_BYTES, block_bytes)):
        rows = _rows(data, block_bytes)
        yield from _encode(writer, [(padded_size(total, block_bytes), rows, _kinds(rows))])
        total += len(data)
    if total == 0 or size_bytes not in {None, total}:
        raise BadDataError(f"the image has {total} bytes, expected {size_bytes or 'at least one'}")
    size = padded_size(total, block_bytes)
    if size_bytes is None:
        writer.end_of_data(size)
    writer.finish(size)
    yield writer.take()


def make_stream_of(disk: Disk, header: StreamHeader) -> Iterator[bytes]:
    """A full stream of a virtual disk, the same bytes as :func:`make_stream` gives for its raw form; what it does not keep is not read.

    BadDataError (tables or data of the disk are malformed), InvalidArgumentError.
    """
    _check(disk.virtual_size_bytes, header, incremental=False)
    size = padded_size(disk.virtual_size_bytes, header.volblocksize_bytes)
    writer = VolumeWriter(header)
    writer.start(size)
    yield from _encode(writer, _kept(disk, size, header.volblocksize_bytes))
    writer.finish(size)
    yield writer.take()


def _kept(disk: Disk, size: int, block_bytes: int) -> Iterator[Chunk]:
    """What a disk keeps, gathered into windows, as its clusters may be smaller than a block; holes between them in one step."""
    step, position = max(CHUNK_BYTES, block_bytes), 0
    for start, pieces in groupby(_within_windows(disk, step), key=lambda piece: piece[0] // step * step):
        if start > position:
            yield position, start - position, _ZERO
        position = min(start + step, size)
        window = bytearray(position - start)
        for offset, data in pieces:
            window[offset - start : offset - start + len(data)] = data
        rows = np.frombuffer(window, np.uint8).reshape(-1, block_bytes)
        yield start, rows, _kinds(rows)
    if position < size:
        yield position, size - position, _ZERO


def _within_windows(disk: Disk, step: int) -> Iterator[tuple[int, memoryview]]:
    """The data with its offsets, cut where windows meet."""
    for extent in disk.extents():
        offset, data = extent.offset_bytes, memoryview(disk.read(extent))
        while data:
            length = min(len(data), step - offset % step)
            yield offset, data[:length]
            offset, data = offset + length, data[length:]


def _check(size_bytes: int, header: StreamHeader, *, incremental: bool) -> None:
    header.check()
    if size_bytes <= 0:
        raise InvalidArgumentError("an image of 0 bytes is no volume")
    if incremental != bool(header.fromguid):
        raise InvalidArgumentError("an increment needs both an older image and its guid")


Chunk = tuple[int, "Rows | int", "Kinds | int"]
"""Offset, then blocks and what is to be done with each; or a count of bytes and one answer for all."""


def _encode(writer: VolumeWriter, chunks: Iterable[Chunk]) -> Iterator[bytes]:
    for offset, rows, kinds in chunks:
        if isinstance(rows, int) or isinstance(kinds, int):
            assert isinstance(rows, int)
            assert isinstance(kinds, int)
            _put(writer, offset, rows, kinds, None)
        else:
            _encode_rows(writer, offset, rows, kinds)
        if writer.waiting_bytes >= EMIT_BYTES:
            yield writer.take()


def _encode_rows(writer: VolumeWriter, offset: int, rows: Rows, kinds: Kinds) -> None:
    block_bytes = rows.shape[1]
    cuts = [0, *(np.flatnonzero(kinds[1:] != kinds[:-1]) + 1).tolist(), len(kinds)]
    for start, end in pairwise(cuts):
        length = (end - start) * block_bytes
        _put(writer, offset + start * block_bytes, length, int(kinds[start]), rows[start:end])


def _put(writer: VolumeWriter, offset: int, length: int, kind: int, rows: Rows | None) -> None:
    if kind == _ZERO:
        writer.hole(offset, length)
    elif kind == _SAME:
        writer.unchanged()
    else:
        assert rows is not None
        writer.blocks(offset, rows)


@dataclass(frozen=True, slots=True)
class _Image:
    """An image from ``start`` on."""

    fd: int
    size_bytes: int
    start: int
    _buffer: bytearray = field(default_factory=lambda: bytearray(max(CHUNK_BYTES, BLOCK_MAX_BYTES)))
    """For what is read: always the same memory, which stays in the cache."""

    def ranges(self, end: int) -> Iterator[tuple[int, int]]:
        """Stretches with data up to ``end``."""
        for low, high in data_ranges(self.fd, min(self.size_bytes, end)):
            if high > self.start:
                yield max(low, self.start), high

    def rows(self, offset: int, length: int, block_bytes: int) -> Rows:
        """Whole blocks, padded with zeros past the image's end. They last until the next call."""
        wanted = max(0, min(length, self.size_bytes - offset))
        with memoryview(self._buffer) as view:
            _read_into(self.fd, offset, view[:wanted])
            view[wanted:length] = bytes(length - wanted)
        return np.frombuffer(self._buffer, np.uint8, length).reshape(-1, block_bytes)


def _contents(image: _Image, size: int, header: StreamHeader) -> Iterator[Chunk]:
    """Every block of an image; holes in one step."""
    block_bytes = header.volblocksize_bytes
    position = image.start
    for start, end in _block_ranges(image.ranges(size), block_bytes):
        if start > position:
            yield position, start - position, _ZERO
        for offset, length in _pieces(start, end, block_bytes):
            rows = image.rows(offset, length, block_bytes)
            yield offset, rows, _kinds(rows)
        position = end
    if position < size:
        yield position, size - position, _ZERO


def _changes(image: _Image, older: _Image, size: int, header: StreamHeader) -> Iterator[Chunk]:
    """Every block that may differ: where either image has data."""
    block_bytes = header.volblocksize_bytes
    both = heapq.merge(image.ranges(size), older.ranges(size))
    position = image.start
    for start, end in _block_ranges(both, block_bytes):
        if start > position:
            yield position, start - position, _SAME
        for offset, length in _pieces(start, end, block_bytes):
            rows = image.rows(offset, length, block_bytes)
            old = older.rows(offset, length, block_bytes)
            if np.array_equal(rows, old):
                yield offset, length, _SAME
            else:
                yield offset, rows, np.where((rows == old).all(axis=1), np.uint8(_SAME), _kinds(rows))
        position = end


def _block_ranges(ranges: Iterable[tuple[int, int]], block_bytes: int) -> Iterator[tuple[int, int]]:
    """Ascending ranges widened to whole blocks, those that touch or overlap joined."""
    joined: tuple[int, int] | None = None
    for low, high in ranges:
        start, end = low // block_bytes * block_bytes, padded_size(high, block_bytes)
        if joined is not None and start <= joined[1]:
            joined = (joined[0], max(joined[1], end))
            continue
        if joined is not None:
            yield joined
        joined = (start, end)
    if joined is not None:
        yield joined


def _pieces(start: int, end: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(CHUNK_BYTES, block_bytes)
    for offset in range(start, end, step):
        yield offset, min(step, end - offset)


def _read_into(fd: int, offset: int, target: memoryview) -> None:
    try:
        while target:
            count = os.preadv(fd, [target], offset)
            if not count:
                raise BadDataError(f"the image ends at byte {offset}, before its stated size")
            offset, target = offset + count, target[count:]
    except OSError as err:
        raise from_os_error(err, "reading the image failed") from err


def _rows(data: bytes, block_bytes: int) -> Rows:
    padding = -len(data) % block_bytes
    return np.frombuffer(data + bytes(padding) if padding else data, np.uint8).reshape(-1, block_bytes)


def _kinds(rows: Rows) -> Kinds:
    """Which blocks are data and which are zeros; only blocks that start with a zero word are looked at as a whole."""
    if backend.native is not None:
        return np.frombuffer(backend.native.zero_blocks(rows, rows.shape[1], 0), np.uint8) ^ np.uint8(_DATA)
    words = rows.view(np.uint64)
    kinds = np.full(len(rows), _DATA, np.uint8)
    for index in np.flatnonzero(words[:, 0] == 0).tolist():
        if not words[index].any():
            kinds[index] = _ZERO
    return kinds


def _read_full(source: Readable, size: int) -> bytes:
    """Exactly ``size`` bytes unless the source ends."""
    pieces, missing = [], size
    while missing and (data := source.read(missing)):
        pieces.append(data)
        missing -= len(data)
    return b"".join(pieces)
