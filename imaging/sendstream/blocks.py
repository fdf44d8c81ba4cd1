"""Compression of single blocks as it stands in WRITE and WRITE_EMBEDDED payloads.

Decoding covers everything ZFS has; encoding lz4, zstd and gzip. A decoder is used by one thread at a time.
"""

from __future__ import annotations

import struct
import zlib
from enum import IntEnum

import lz4.block
import zstandard

from imaging.errors import BadDataError, UnsupportedError

SECTOR_BYTES = 512
"""Compressed payloads are padded to a multiple of this."""
ZSTD_WINDOW_MAX_BYTES = 16 << 20
"""A frame may not make the decoder allocate more than the largest block."""
ZSTD_LEVEL = 3
"""The pool's own default."""
GZIP_LEVEL = 6
_ZSTD_VERSION = 10405
"""What ZFS 2.x links (1.4.5); written for the reader's information only."""


class BlockCompression(IntEnum):
    """Values of the compression fields."""

    NONE = 0
    OFF = 2
    LZJB = 3
    GZIP_1 = 5
    GZIP_6 = 10
    GZIP_9 = 13
    ZLE = 14
    LZ4 = 15
    ZSTD = 16


def _bad(name: str) -> BadDataError:
    return BadDataError(f"the {name} data of a block is damaged")


def _with_length(name: str, data: memoryview, start: int = 4) -> memoryview:
    """What stands at ``start``, as long as the big-endian word at 0 says."""
    if len(data) < start:
        raise _bad(name)
    length = int.from_bytes(data[:4], "big")
    if length > len(data) - start:
        raise _bad(name)
    return data[start : start + length]


class BlockDecoder:
    """Decompresses blocks; ``decode`` gives exactly the size asked for or raises."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor(
            format=zstandard.FORMAT_ZSTD1_MAGICLESS, max_window_size=ZSTD_WINDOW_MAX_BYTES
        )

    def decode(self, compression: int, data: bytes | memoryview, size_bytes: int) -> bytes | memoryview:
        """The block; BadDataError if the data does not hold it, UnsupportedError for an unknown compression."""
        view = memoryview(data)
        if compression in {BlockCompression.NONE, BlockCompression.OFF}:
            block: bytes | memoryview = view[:size_bytes]
            name = "plain"
        elif compression == BlockCompression.LZ4:
            block, name = _decode_lz4(view, size_bytes), "lz4"
        elif compression == BlockCompression.ZSTD:
            block, name = self._decode_zstd(view, size_bytes), "zstd"
        elif BlockCompression.GZIP_1 <= compression <= BlockCompression.GZIP_9:
            block, name = _decode_gzip(view, size_bytes), "gzip"
        elif compression == BlockCompression.LZJB:
            block, name = _decode_lzjb(bytes(view), size_bytes), "lzjb"
        elif compression == BlockCompression.ZLE:
            block, name = _decode_zle(bytes(view), size_bytes), "zle"
        else:
            raise UnsupportedError(f"unknown block compression {compression}")
        if len(block) != size_bytes:
            raise _bad(name)
        return block

    def _decode_zstd(self, data: memoryview, size_bytes: int) -> bytes:
        frame = _with_length("zstd", data, 8)  # a word with version and level stands between length and frame
        try:
            stated = zstandard.get_frame_parameters(frame, format=zstandard.FORMAT_ZSTD1_MAGICLESS)
            if stated.content_size not in {zstandard.CONTENTSIZE_UNKNOWN, size_bytes}:
                raise _bad("zstd")
            return self._zstd.decompress(frame, max_output_size=size_bytes, allow_extra_data=False)
        except zstandard.ZstdError as err:
            raise _bad("zstd") from err


def _decode_lz4(data: memoryview, size_bytes: int) -> bytes:
    try:
        return bytes(lz4.block.decompress(_with_length("lz4", data), uncompressed_size=size_bytes))
    except (lz4.block.LZ4BlockError, ValueError, OverflowError) as err:
        raise _bad("lz4") from err


def _decode_gzip(data: memoryview, size_bytes: int) -> bytes:
    inflater = zlib.decompressobj()
    try:
        block = inflater.decompress(data, size_bytes + 1)
    except zlib.error as err:
        raise _bad("gzip") from err
    if not inflater.eof and len(block) == size_bytes:
        raise _bad("gzip")
    return block


def _decode_lzjb(data: bytes, size_bytes: int) -> bytes:
    out = bytearray()
    source = iter(data)
    try:
        while len(out) < size_bytes:
            bitmap = next(source)
            for bit in range(8):
                if len(out) >= size_bytes:
                    break
                if bitmap >> bit & 1:
                    _copy_match(out, next(source), next(source), size_bytes)
                else:
                    out.append(next(source))
    except StopIteration as err:
        raise _bad("lzjb") from err
    return bytes(out)


def _copy_match(out: bytearray, first: int, second: int, size_bytes: int) -> None:
    length = min((first >> 2) + 3, size_bytes - len(out))
    distance = (first << 8 | second) & 0x3FF
    if distance == 0 or distance > len(out):
        raise _bad("lzjb")
    for _ in range(length):  # byte by byte: a match may overlap what it produces
        out.append(out[-distance])


def _decode_zle(data: bytes, size_bytes: int) -> bytes:
    out = bytearray()
    position = 0
    while len(out) < size_bytes:
        if position >= len(data):
            raise _bad("zle")
        control = data[position]
        position += 1
        if control < 64:
            out += data[position : position + control + 1]
            position += control + 1
        else:
            out += bytes(control - 63)
    return bytes(out)


class BlockEncoder:
    """Compresses blocks with one algorithm; the same block gives the same bytes with the same library version."""

    def __init__(self, compression: BlockCompression) -> None:
        if compression not in {BlockCompression.LZ4, BlockCompression.ZSTD, BlockCompression.GZIP_6}:
            raise UnsupportedError(f"cannot compress blocks with {compression.name.lower()}")
        self.compression = compression
        self._zstd = zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters.from_level(
                ZSTD_LEVEL,
                format=zstandard.FORMAT_ZSTD1_MAGICLESS,
                write_content_size=False,
                write_checksum=False,
            )
        )

    def encode(self, block: bytes | memoryview) -> bytes | None:
        """The padded payload, or None if it would save less than an eighth: then the block is sent as it is."""
        packed = self._pack(block)
        if len(packed) > len(block) - (len(block) >> 3):
            return None
        padded = packed + bytes(-len(packed) % SECTOR_BYTES)
        return padded if len(padded) < len(block) else None

    def _pack(self, block: bytes | memoryview) -> bytes:
        if self.compression is BlockCompression.LZ4:
            packed = bytes(lz4.block.compress(block, store_size=False))
            return struct.pack(">I", len(packed)) + packed
        if self.compression is BlockCompression.ZSTD:
            packed = self._zstd.compress(block)
            return struct.pack(">II", len(packed), ZSTD_LEVEL << 24 | _ZSTD_VERSION) + packed
        return zlib.compress(block, GZIP_LEVEL)
