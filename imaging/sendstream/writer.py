"""Records to bytes: the deterministic encoder.

:class:`StreamWriter` seals any records; :class:`VolumeWriter` puts a volume's records in the one order every ZFS release sends
them in. Neither does input or output: both return bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imaging.errors import InvalidArgumentError
from imaging.sendstream import backend, microzap
from imaging.sendstream.blocks import BlockCompression, BlockEncoder
from imaging.sendstream.checksum import ZERO_STATE, Fletcher4, add, advance, feed_seal, pack_state, weights
from imaging.sendstream.records import (
    BLOCK_MAX_BYTES,
    BLOCK_MIN_BYTES,
    BLOCK_SMALL_MAX_BYTES,
    CHECKSUM_BYTES,
    CHECKSUM_OFF,
    DATA_OBJECT,
    DATA_TYPE,
    HEADER_BYTES,
    MAGIC,
    MICROZAP_BYTES,
    NAME_BYTES,
    PROPERTIES_OBJECT,
    PROPERTIES_TYPE,
    SEALED_BYTES,
    TO_THE_END,
    Begin,
    BeginFlags,
    End,
    Feature,
    Free,
    FreeObjects,
    HeaderType,
    Object,
    Record,
    StreamKind,
    Write,
    pack,
)

DNODE_BLOCK_SLOTS = 32
"""Objects come in blocks of this many; a volume uses two of the first block (and slot 0 is the pool's)."""

_WORD = 4
_FREE_SLOTS = DNODE_BLOCK_SLOTS - PROPERTIES_OBJECT - 1
_BETWEEN_SEALS = weights((HEADER_BYTES - CHECKSUM_BYTES) // _WORD)


class StreamWriter:
    """Seals records with their checksums. One writer per stream; a package needs one for its header too."""

    def __init__(self) -> None:
        self._fletcher = Fletcher4()
        self._native = backend.native

    def begin(self, begin: Begin, payload: bytes = b"") -> bytes:
        """A stream's or package's start; the payload length is filled in."""
        self._fletcher.reset()
        data = pack(begin._replace(payload_bytes=len(payload))) + payload
        self._fletcher.update(data)
        return data

    def record(self, record: Record, payload: bytes | memoryview = b"") -> bytes:
        """Any record but BEGIN and END, with its payload."""
        return self.records([(record, payload)])

    def records(self, records: Iterable[tuple[Record, bytes | memoryview]]) -> bytes:
        """Several records; sealing many at once is much faster than one by one."""
        out = bytearray()
        starts = []
        for record, payload in records:
            starts.append(len(out))
            out += pack(record)
            out += bytes(CHECKSUM_BYTES)
            out += payload
        self.seal(out, starts)
        return bytes(out)

    def blocks(self, template: Write, rows: npt.NDArray[np.uint8]) -> bytes:
        """One uncompressed WRITE per row: like ``template``, at its offset and the blocks after it."""
        count, block_bytes = rows.shape
        if self._native is not None:
            state, data = self._native.seal_writes(self._fletcher.state, pack(template), rows, block_bytes)
            self._fletcher.state = state
            return data
        stride = HEADER_BYTES + block_bytes
        grid = np.zeros((count, stride), np.uint8)
        grid[:, :SEALED_BYTES] = np.frombuffer(pack(template), np.uint8)
        offsets = np.arange(count, dtype=np.uint64) * np.uint64(block_bytes) + np.uint64(template.offset)
        grid.view("<u8")[:, 3] = offsets
        grid[:, HEADER_BYTES:] = rows
        self.seal(grid.reshape(-1).data, range(0, count * stride, stride))
        return grid.tobytes()

    def seal(self, data: bytearray | memoryview, starts: Sequence[int]) -> None:
        """Write the checksums into whole records that start at ``starts`` and have zeros in their places.

        The sums of the records' own bytes come from one fast pass; what the checksums add to later checksums is chained here.
        """
        if self._native is not None:
            self._fletcher.state = self._native.seal(self._fletcher.state, data, np.asarray(starts, np.int64))
            return
        traced = self._fletcher.trace(data, [start + SEALED_BYTES for start in starts]).tolist()
        extra, last, gap, factors = ZERO_STATE, 0, -1, _BETWEEN_SEALS
        for start, state in zip(starts, traced, strict=True):
            position = start + SEALED_BYTES
            if position - last != gap:
                gap = position - last
                factors = weights(gap // _WORD)
            extra = advance(extra, factors)
            seal = pack_state(add((state[0], state[1], state[2], state[3]), extra))
            data[position : position + CHECKSUM_BYTES] = seal
            extra = feed_seal(extra, seal)
            last = position + CHECKSUM_BYTES
        self._fletcher.add(advance(extra, weights((len(data) - last) // _WORD)))

    def end(self, toguid: int) -> bytes:
        """A stream's end."""
        return self.records([(End(pack_state(self._fletcher.state), toguid), b"")])

    def package_head_end(self) -> bytes:
        """The end of a package's header, which has no checksum of its own."""
        return pack(End(pack_state(self._fletcher.state), 0)) + bytes(CHECKSUM_BYTES)


def package_end() -> bytes:
    """The end of a package: nothing but its type."""
    return pack(End(bytes(CHECKSUM_BYTES), 0)) + bytes(CHECKSUM_BYTES)


def check_block_size(size_bytes: int) -> None:
    """InvalidArgumentError unless volumes can have blocks of this size."""
    if not BLOCK_MIN_BYTES <= size_bytes <= BLOCK_MAX_BYTES or size_bytes & (size_bytes - 1):
        raise InvalidArgumentError(f"not a volume block size (a power of two, 512 to 1 MiB): {size_bytes}")


@dataclass(frozen=True, slots=True)
class StreamHeader:
    """What a volume's stream says of the snapshot it makes."""

    guid: int
    toname: str
    volblocksize_bytes: int
    creation_s: int = 0
    fromguid: int = 0
    """Guid of the snapshot an increment builds on; 0 is a full stream."""
    clone: bool = False
    """An increment whose base is the origin of the clone it makes."""
    compression: BlockCompression = BlockCompression.NONE

    def check(self) -> None:
        """InvalidArgumentError if no stream can say this."""
        check_block_size(self.volblocksize_bytes)
        if not 0 < self.guid <= TO_THE_END or not 0 <= self.fromguid <= TO_THE_END:
            raise InvalidArgumentError("a snapshot's guid is a 64-bit number other than 0")
        if not 0 <= self.creation_s <= TO_THE_END:
            raise InvalidArgumentError(f"not a time of creation: {self.creation_s}")
        dataset, at, snapshot = self.toname.partition("@")
        if not (dataset and at and snapshot) or "\0" in self.toname or len(self.toname.encode()) >= NAME_BYTES:
            raise InvalidArgumentError(f"not a snapshot name for a stream: {self.toname[:NAME_BYTES]!r}")

    @property
    def features(self) -> Feature:
        """The feature flags the stream needs."""
        features = Feature(0)
        if self.volblocksize_bytes > BLOCK_SMALL_MAX_BYTES:
            features |= Feature.LARGE_BLOCKS
        if self.compression is not BlockCompression.NONE:
            features |= Feature.COMPRESSED
        if self.compression is BlockCompression.LZ4:
            features |= Feature.LZ4
        if self.compression is BlockCompression.ZSTD:
            features |= Feature.ZSTD
        return features

    def begin(self) -> Begin:
        """The BEGIN record."""
        flags = BeginFlags.FREERECORDS | BeginFlags.SPILL_BLOCK | (BeginFlags.CLONE if self.clone else 0)
        return Begin(
            payload_bytes=0,
            magic=MAGIC,
            versioninfo=HeaderType.PLAIN | self.features << 2,
            creation_s=self.creation_s,
            kind=StreamKind.VOLUME,
            flags=flags,
            toguid=self.guid,
            fromguid=self.fromguid,
            name=self.toname.encode(),
        )


class VolumeWriter:
    """A volume's stream in its one order: ``start``, then blocks and holes by ascending offset, then ``finish``.

    Neighbouring holes become one FREE, which is written when something else follows. What was encoded waits for ``take``.
    """

    def __init__(self, header: StreamHeader) -> None:
        header.check()
        self._header = header
        self._stream = StreamWriter()
        self._out: list[bytes] = []
        self._hole: tuple[int, int] | None = None  # start, end
        compressed = header.compression is not BlockCompression.NONE
        self._encoder = BlockEncoder(header.compression) if compressed else None

    def start(self, end_of_data: int | None, begin_payload: bytes = b"", extra_features: int = 0) -> None:
        """BEGIN and the data object. ``end_of_data``: where its last block ends, if that is known already."""
        begin = self._header.begin()
        self._out.append(
            self._stream.begin(begin._replace(versioninfo=begin.versioninfo | extra_features << 2), begin_payload)
        )
        self._put(self._object(DATA_OBJECT, DATA_TYPE, self._header.volblocksize_bytes))
        if end_of_data is not None:
            self.end_of_data(end_of_data)

    def end_of_data(self, offset: int) -> None:
        """Free everything from here on."""
        self._flush_hole()
        self._put(Free(DATA_OBJECT, offset, TO_THE_END, self._header.guid))

    def hole(self, offset: int, length: int) -> None:
        """A range of zeros."""
        if self._hole is not None and self._hole[1] == offset:
            self._hole = (self._hole[0], offset + length)
        else:
            self._flush_hole()
            self._hole = (offset, offset + length)

    def unchanged(self) -> None:
        """A range the base has already: an increment does not mention it."""
        self._flush_hole()

    def blocks(self, offset: int, rows: npt.NDArray[np.uint8]) -> None:
        """Blocks with data, one a row, side by side from ``offset``."""
        self._flush_hole()
        template = self._write(DATA_OBJECT, DATA_TYPE, offset, self._header.volblocksize_bytes)
        if self._encoder is None:
            self._out.append(self._stream.blocks(template, rows))
            return
        size = self._header.volblocksize_bytes
        writes = (template._replace(offset=offset + index * size) for index in range(len(rows)))
        pairs = zip(writes, rows, strict=True)
        self._out.append(self._stream.records(self._compressed(write, row.data) for write, row in pairs))

    def finish(self, volume_size_bytes: int | None) -> None:
        """The properties object and END; an increment that keeps the size does not state it."""
        self._flush_hole()
        guid = self._header.guid
        self._put(self._object(PROPERTIES_OBJECT, PROPERTIES_TYPE, MICROZAP_BYTES))
        self._put(Free(PROPERTIES_OBJECT, MICROZAP_BYTES, TO_THE_END, guid))
        if volume_size_bytes is not None:
            write = self._write(PROPERTIES_OBJECT, PROPERTIES_TYPE, 0, MICROZAP_BYTES)
            self._put(write, microzap.build(volume_size_bytes, guid))
        self._put(FreeObjects(PROPERTIES_OBJECT + 1, _FREE_SLOTS, guid))
        self._out.append(self._stream.end(guid))

    def take(self) -> bytes:
        """What was encoded since the last call."""
        out, self._out = self._out, []
        return b"".join(out)

    @property
    def waiting_bytes(self) -> int:
        """How much ``take`` would return."""
        return sum(map(len, self._out))

    def _compressed(self, write: Write, block: memoryview) -> tuple[Write, bytes | memoryview]:
        assert self._encoder is not None
        packed = self._encoder.encode(block)
        if packed is None:
            return write, block
        return write._replace(compression=self._header.compression, compressed_bytes=len(packed)), packed

    def _flush_hole(self) -> None:
        if self._hole is not None:
            start, end = self._hole
            self._hole = None
            self._put(Free(DATA_OBJECT, start, end - start, self._header.guid))

    def _put(self, record: Record, payload: bytes = b"") -> None:
        self._out.append(self._stream.record(record, payload))

    def _object(self, number: int, object_type: int, block_bytes: int) -> Object:
        return Object(number, object_type, 0, block_bytes, 0, 0, 0, 1, 0, 0, self._header.guid, 0, 0, 0, 0)

    def _write(self, number: int, object_type: int, offset: int, size: int) -> Write:
        guid = self._header.guid
        return Write(
            number, object_type, offset, size, guid, CHECKSUM_OFF, 0, 0, bytes(32), 0, 0, bytes(8), bytes(12), bytes(16)
        )
