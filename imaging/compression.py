"""Compressed streams: recognised by content, read and written piece by piece in bounded memory.

gzip, xz, zstd, bzip2 and lz4 (frames). Files of several members or frames are read to their end; one that is cut off, damaged or
followed by something else raises BadDataError. Readers are sequential: ``read(size)`` until it returns nothing.
"""

from __future__ import annotations

import bz2
import lzma
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import lz4.frame
import zstandard
from isal import igzip_lib, isal_zlib

from imaging.errors import BadDataError, InvalidArgumentError, TooLargeError

READ_BYTES = 256 << 10
"""Compressed bytes asked for at once."""
OUTPUT_BYTES = 1 << 20
"""Decompressed bytes taken from a decoder at once, so that a bomb costs no more memory than this."""
XZ_MEMORY_MAX_BYTES = 128 << 20
"""``xz -9`` needs 65 MiB to decompress."""
ZSTD_WINDOW_MAX_BYTES = 128 << 20
"""What the zstd program takes without ``--long``."""
SNIFF_BYTES = 10
"""The longest magic (bzip2 with its first block's)."""
GZIP_LEVEL = 2
"""isal's default: three times as fast as zlib's 6."""
ZSTD_LEVEL = 3


class Compression(StrEnum):
    """A format, as content shows it."""

    NONE = "none"
    GZIP = "gzip"
    XZ = "xz"
    ZSTD = "zstd"
    BZIP2 = "bzip2"
    LZ4 = "lz4"


class Readable(Protocol):
    """A blocking byte source."""

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes; empty at the end."""


class Writable(Protocol):
    """A blocking byte sink."""

    def write(self, data: bytes, /) -> object:
        """Take all of ``data``."""


@dataclass(frozen=True, slots=True)
class DecompressionLimits:
    """What a compressed input may become."""

    output_max_bytes: int = 16 << 40
    """16 TiB, the largest volume there is a use for."""
    ratio_max: int | None = None
    """Output over input. Off by default: an empty disk compresses to a ten-thousandth and is harmless if it is kept sparse."""
    ratio_floor_bytes: int = 64 << 20
    """Below this much output the ratio is not looked at."""


DEFAULT_LIMITS = DecompressionLimits()


def sniff(head: bytes) -> Compression:
    """The format of content that starts with ``head`` (SNIFF_BYTES of it, or all if there is less)."""
    if head[:3] == b"\x1f\x8b\x08":
        return Compression.GZIP
    if head[:6] == b"\xfd7zXZ\0":
        return Compression.XZ
    if head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        return Compression.ZSTD
    if head[:3] == b"BZh" and head[3:4].isdigit() and head[4:10] in {b"1AY&SY", b"\x17rE8P\x90"}:
        return Compression.BZIP2
    if head[:4] == b"\x04\x22\x4d\x18":
        return Compression.LZ4
    return Compression.NONE


class _Decoder(Protocol):
    """One member or frame, as :class:`bz2.BZ2Decompressor` does it."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes | None: ...

    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


_ISAL_ERROR: type[Exception] = igzip_lib.IsalError  # type: ignore[assignment]  # its stub says an instance
_DECODER_ERRORS = (OSError, EOFError, ValueError, RuntimeError, lzma.LZMAError, _ISAL_ERROR, zstandard.ZstdError)
"""What the libraries raise on damaged input."""


def _new_decoder(compression: Compression) -> _Decoder:
    if compression is Compression.GZIP:
        decoder: _Decoder = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
    elif compression is Compression.XZ:
        decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY_MAX_BYTES)
    elif compression is Compression.ZSTD:
        decoder = _ZstdFrame()
    elif compression is Compression.BZIP2:
        decoder = bz2.BZ2Decompressor()
    else:
        decoder = lz4.frame.LZ4FrameDecompressor()
    return decoder


class _ZstdFrame:
    """One zstd frame, decoded block by block.

    The library's own incremental decoder neither bounds its output nor tells a frame that ended from one that was cut off. Blocks
    state their size and whether they are the last, and none becomes more than 128 KiB, so handing them over one by one does both.
    """

    _HEADER_MAX_BYTES = 18
    _BLOCK_HEADER_BYTES = 3
    _CHECKSUM_BYTES = 4
    _RLE = 1

    def __init__(self) -> None:
        self._held = bytearray()
        self._started = False
        self._last_seen = False
        self._skip = 0
        self._trailer = 0
        self._inner = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_MAX_BYTES).decompressobj()
        self.eof = False
        self.needs_input = True

    @property
    def unused_data(self) -> bytes:
        """What follows the frame."""
        return bytes(self._held) if self.eof else b""

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        """Add input; about ``max_length`` bytes of output (at most a block more)."""
        self._held += data
        out: list[bytes] = []
        size = 0
        self.needs_input = False
        while not self.eof and (max_length < 0 or size < max_length):
            unit = self._next_unit()
            if unit is None:
                self.needs_input = True
                break
            piece = self._inner.decompress(unit) if unit else b""
            out.append(piece)
            size += len(piece)
        return b"".join(out)

    def _next_unit(self) -> bytes | None:
        """The frame's header, a block or its trailing checksum; None if it is not all there."""
        if self._skip:
            return self._pass_over()
        if not self._started:
            return self._header()
        if self._last_seen:
            return self._take(self._trailer, last=True)
        if len(self._held) < self._BLOCK_HEADER_BYTES:
            return None
        word = int.from_bytes(self._held[: self._BLOCK_HEADER_BYTES], "little")
        body_bytes = 1 if word >> 1 & 3 == self._RLE else word >> 3
        block = self._take(self._BLOCK_HEADER_BYTES + body_bytes, last=bool(word & 1) and not self._trailer)
        if block is not None and word & 1:
            self._last_seen = True
        return block

    def _header(self) -> bytes | None:
        if len(self._held) < 8:
            return None
        (magic,) = struct.unpack_from("<I", self._held)
        if magic & 0xFFFFFFF0 == 0x184D2A50:
            self._skip = 8 + int(struct.unpack_from("<I", self._held, 4)[0])
            return b""
        head = bytes(self._held[: self._HEADER_MAX_BYTES])
        size = zstandard.frame_header_size(head)
        if len(self._held) < size:
            return None
        self._trailer = self._CHECKSUM_BYTES if zstandard.get_frame_parameters(head).has_checksum else 0
        self._started = True
        return self._take(size, last=False)

    def _pass_over(self) -> bytes | None:
        """Skip a frame that holds no data."""
        passed = min(self._skip, len(self._held))
        del self._held[:passed]
        self._skip -= passed
        if self._skip:
            return None
        self.eof = True
        return b""

    def _take(self, size: int, *, last: bool) -> bytes | None:
        if len(self._held) < size:
            return None
        unit = bytes(self._held[:size])
        del self._held[:size]
        self.eof = last
        return unit


class DecompressingReader:
    """Reads the decompressed bytes of a source; see :func:`open_decompressed`."""

    def __init__(
        self,
        source: Readable,
        compression: Compression,
        head: bytes = b"",
        limits: DecompressionLimits = DEFAULT_LIMITS,
    ) -> None:
        self.compression = compression
        self.consumed_bytes = len(head)
        """Compressed bytes read so far."""
        self.produced_bytes = 0
        self._source = source
        self._limits = limits
        self._pending = head
        self._source_ended = False
        self._decoder: _Decoder | None = None
        self._out = memoryview(b"")

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes, fewer only at the end or between pieces; empty at the end."""
        if size == 0:
            return b""
        if size < 0:
            return b"".join(iter(lambda: self.read(OUTPUT_BYTES), b""))
        if not len(self._out):
            self._out = memoryview(self._more(min(size, OUTPUT_BYTES)))
        piece = bytes(self._out[:size])
        self._out = self._out[size:]
        return piece

    def _more(self, size: int) -> bytes:
        """The next piece of output; empty at the end."""
        data = b""
        while not data:
            if self.compression is Compression.NONE:
                data = self._input(size)
            elif self._at_end():
                return b""
            else:
                data = self._decode(size)
            if not data and self.compression is Compression.NONE:
                return b""
        self.produced_bytes += len(data)
        self._check_limits()
        return data

    def _decode(self, size: int) -> bytes:
        decoder = self._decoder
        if decoder is None:
            decoder = self._decoder = _new_decoder(self.compression)
        wants = decoder.needs_input
        data = self._input(READ_BYTES) if wants else b""
        if wants and not data:
            raise BadDataError(f"the {self.compression} data is cut off after {self.consumed_bytes} bytes")
        try:
            out = decoder.decompress(data, size)
            if decoder.eof:
                self._pending = bytes(decoder.unused_data or b"") + self._pending
                self._decoder = None
        except _DECODER_ERRORS as err:
            raise BadDataError(f"the {self.compression} data is damaged near byte {self.consumed_bytes}") from err
        return out

    def _at_end(self) -> bool:
        """Whether the input ended between two members; padding of zeros does not count as a member."""
        if self._decoder is not None:
            return False
        padded = self.compression in {Compression.GZIP, Compression.XZ} and self.produced_bytes > 0
        while True:
            if padded:
                self._pending = self._pending.lstrip(b"\0")
            if self._pending:
                return False
            self._pending = self._input(READ_BYTES)
            if not self._pending:
                return True

    def _input(self, size: int) -> bytes:
        if self._pending:
            data, self._pending = self._pending, b""
            return data
        if self._source_ended:
            return b""
        data = self._source.read(size)
        self._source_ended = not data
        self.consumed_bytes += len(data)
        return data

    def _check_limits(self) -> None:
        limits = self._limits
        if self.produced_bytes > limits.output_max_bytes:
            raise TooLargeError(f"the {self.compression} data is larger than {limits.output_max_bytes} bytes")
        if limits.ratio_max is None or self.produced_bytes <= limits.ratio_floor_bytes:
            return
        if self.produced_bytes > limits.ratio_max * self.consumed_bytes:
            raise TooLargeError(f"the {self.compression} data grows to more than {limits.ratio_max} times its size")


def open_decompressed(
    source: Readable, *, compression: Compression | None = None, limits: DecompressionLimits = DEFAULT_LIMITS
) -> DecompressingReader:
    """A reader of the decompressed bytes; the format is recognised by content unless it is given.

    Plain content passes through. Errors while reading: BadDataError (damaged, cut off), TooLargeError (a limit).
    """
    if compression is not None:
        return DecompressingReader(source, compression, limits=limits)
    head = b""
    while len(head) < SNIFF_BYTES and (more := source.read(SNIFF_BYTES - len(head))):
        head += more
    return DecompressingReader(source, sniff(head), head, limits)


class _Encoder(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


def _new_encoder(compression: Compression, level: int | None) -> _Encoder:
    if compression is Compression.ZSTD:
        zstd: _Encoder = zstandard.ZstdCompressor(level=level or ZSTD_LEVEL, write_checksum=True).compressobj()
        return zstd
    if compression is Compression.GZIP:
        gzip: _Encoder = isal_zlib.compressobj(GZIP_LEVEL if level is None else level, wbits=31)
        return gzip
    raise InvalidArgumentError(f"cannot write {compression} data, only zstd and gzip")


class CompressingWriter:
    """Compresses what is written into ``sink``; ``close`` (or leaving it without an error) ends the frame, not the sink.

    The output depends on nothing but the input and the library: no file name, no time.
    """

    def __init__(self, sink: Writable, compression: Compression, *, level: int | None = None) -> None:
        self._sink = sink
        self._encoder: _Encoder | None = _new_encoder(compression, level)

    def write(self, data: bytes) -> int:
        """Compress a piece."""
        if self._encoder is None:
            raise InvalidArgumentError("the compressed data was ended already")
        if packed := self._encoder.compress(data):
            self._sink.write(packed)
        return len(data)

    def close(self) -> None:
        """End the compressed data; idempotent."""
        encoder, self._encoder = self._encoder, None
        if encoder is not None:
            self._sink.write(encoder.flush())

    def __enter__(self) -> CompressingWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()


def compress_pieces(pieces: Iterable[bytes], compression: Compression, *, level: int | None = None) -> Iterator[bytes]:
    """The compressed form of ``pieces``, as it comes."""
    encoder = _new_encoder(compression, level)
    for piece in pieces:
        if packed := encoder.compress(piece):
            yield packed
    yield encoder.flush()
