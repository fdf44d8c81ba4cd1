"""Resume tokens: how far an interrupted transfer got, in the form ``zfs send -t`` takes.

``1-<checksum>-<length>-<data>``, all hexadecimal: data is a compressed XDR nvlist, length its size before compression, checksum
the first Fletcher-4 word of the data.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

from imaging.errors import BadDataError
from imaging.sendstream import nvlist
from imaging.sendstream.checksum import digest
from imaging.sendstream.records import Feature
from imaging.sendstream.state import ResumePoint

TOKEN_MAX_BYTES = 64 << 10
"""A token is a name and a few numbers; a larger one only wants memory."""
_TOKEN = re.compile(r"1-([0-9a-f]{1,16})-([0-9a-f]{1,8})-((?:[0-9a-f]{2})+)\Z")
_FLAGS = {
    "largeblockok": Feature.LARGE_BLOCKS,
    "embedok": Feature.EMBED_DATA,
    "compressok": Feature.COMPRESSED,
    "rawok": Feature.RAW,
}


@dataclass(frozen=True, slots=True)
class ResumeToken:
    """What a token says."""

    toguid: int
    fromguid: int
    toname: str
    object: int
    offset: int
    received_bytes: int
    features: int = 0

    @classmethod
    def at(cls, point: ResumePoint, received_bytes: int) -> ResumeToken:
        """The token for a transfer that broke off there."""
        known = point.features & sum(_FLAGS.values())
        return cls(point.toguid, point.fromguid, point.toname, point.object, point.offset, received_bytes, known)

    def encode(self) -> str:
        """The token's text."""
        values: nvlist.NvList = {"fromguid": self.fromguid} if self.fromguid else {}
        values |= {"object": self.object, "offset": self.offset, "bytes": self.received_bytes}
        values |= {"toguid": self.toguid, "toname": self.toname}
        values |= {name: True for name, feature in _FLAGS.items() if self.features & feature}
        packed = nvlist.encode_xdr(values)
        data = zlib.compress(packed)
        return f"1-{digest(data)[0]:x}-{len(packed):x}-{data.hex()}"

    @classmethod
    def parse(cls, text: str) -> ResumeToken:
        """Parse a token; BadDataError if it is damaged."""
        match = _TOKEN.match(text) if len(text) <= TOKEN_MAX_BYTES else None
        if match is None:
            raise BadDataError("not a resume token")
        data, size = bytes.fromhex(match[3]), int(match[2], 16)
        if digest(data)[0] != int(match[1], 16) or size > TOKEN_MAX_BYTES:
            raise BadDataError("the resume token is damaged")
        return cls._of(nvlist.decode(_inflate(data, size)))

    @classmethod
    def _of(cls, values: nvlist.NvList) -> ResumeToken:
        def number(name: str) -> int:
            value = values.get(name, 0)
            if not isinstance(value, int):
                raise BadDataError(f"the resume token has no number {name}")
            return value

        features = sum(feature for name, feature in _FLAGS.items() if name in values)
        place = number("object"), number("offset"), number("bytes")
        return cls(number("toguid"), number("fromguid"), str(values.get("toname", "")), *place, features)


def _inflate(data: bytes, size: int) -> bytes:
    inflater = zlib.decompressobj()
    try:
        packed = inflater.decompress(data, size + 1)
    except zlib.error as err:
        raise BadDataError("the resume token is damaged") from err
    if len(packed) != size or not inflater.eof:
        raise BadDataError("the resume token is damaged")
    return packed
