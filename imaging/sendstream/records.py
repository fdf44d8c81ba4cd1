"""Record types of a send stream: layouts, feature flags, limits.

A record is a header of HEADER_BYTES and, for some types, a payload. All integers are little endian; big-endian streams are
recognised and refused by the reader. Each record class is a named tuple whose fields stand in the order of its layout, so
that parsing is one ``struct`` call and packing another; padding bytes are checked to be zero only by the validator.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple, TypeAlias

from imaging.errors import BadDataError

HEADER_BYTES = 312
"""Size of every record's header."""
SEALED_BYTES = 280
"""What a record's own checksum covers of its header; the checksum stands in the 32 bytes that follow."""
CHECKSUM_BYTES = 32
"""Four 64-bit accumulators."""
NAME_BYTES = 256
"""Room for BEGIN's name with its terminating NUL."""
PAYLOAD_MAX_BYTES = 16 << 20
"""No block is larger (SPA_MAXBLOCKSIZE); some kernels trust the field, so nothing larger may reach them."""
BEGIN_PAYLOAD_MAX_BYTES = 64 << 20
"""The nvlist of a package names every dataset and snapshot; libzfs refuses more than this."""
MAGIC = 0x00000002F5BACBAC
TO_THE_END = (1 << 64) - 1
"""A FREE of this length reaches to the end of the object."""
U64_MASK = (1 << 64) - 1

DATA_OBJECT = 1
"""A volume's contents."""
PROPERTIES_OBJECT = 2
"""A volume's microzap, which holds its size."""
DATA_TYPE = 23
PROPERTIES_TYPE = 24
CHECKSUM_OFF = 2
"""What WRITE says of the sender's block checksum when there is none."""
MICROZAP_BYTES = 512
BLOCK_MIN_BYTES = 512
BLOCK_MAX_BYTES = 1 << 20
"""What every release since 2.1 takes by default (zfs_max_recordsize)."""
BLOCK_SMALL_MAX_BYTES = 128 << 10
"""Blocks above this need the LARGE_BLOCKS feature."""


class RecordType(IntEnum):
    """The first word of a header."""

    BEGIN = 0
    OBJECT = 1
    FREEOBJECTS = 2
    WRITE = 3
    FREE = 4
    END = 5
    WRITE_BYREF = 6
    SPILL = 7
    WRITE_EMBEDDED = 8
    OBJECT_RANGE = 9
    REDACT = 10


class HeaderType(IntEnum):
    """What a BEGIN begins."""

    PLAIN = 1
    PACKAGE = 2


class StreamKind(IntEnum):
    """What a stream holds."""

    PACKAGE = 0
    FILESYSTEM = 2
    VOLUME = 3


class BeginFlags(IntFlag):
    """BEGIN's flags."""

    CLONE = 1
    CI_DATA = 2
    FREERECORDS = 4
    SPILL_BLOCK = 8


class Feature(IntFlag):
    """Feature flags: the bits of ``versioninfo`` above the header type."""

    DEDUP = 1 << 0
    DEDUPPROPS = 1 << 1
    SA_SPILL = 1 << 2
    EMBED_DATA = 1 << 16
    LZ4 = 1 << 17
    LARGE_BLOCKS = 1 << 19
    RESUMING = 1 << 20
    REDACTED = 1 << 21
    COMPRESSED = 1 << 22
    LARGE_DNODE = 1 << 23
    RAW = 1 << 24
    ZSTD = 1 << 25
    HOLDS = 1 << 26
    SWITCH_TO_LARGE_BLOCKS = 1 << 27
    LONGNAME = 1 << 28
    LARGE_MICROZAP = 1 << 29


KNOWN_FEATURES = sum(feature.value for feature in Feature)
"""A plain integer: inverting a flag would leave out the bits above the highest one known."""


def feature_names(bits: int) -> list[str]:
    """Names of the set bits, lowest first; ``bit N`` for those without a name."""
    names = {feature.value: str(feature.name) for feature in Feature}
    return [names.get(1 << bit, f"bit {bit}") for bit in range(bits.bit_length()) if bits >> bit & 1]


class Begin(NamedTuple):
    """Starts a stream or a package. Confirmed only by the checksum of the record after it."""

    payload_bytes: int
    magic: int
    versioninfo: int
    creation_s: int
    kind: int
    flags: int
    toguid: int
    fromguid: int
    name: bytes

    @property
    def header_type(self) -> int:
        """Plain stream or package, see :class:`HeaderType`."""
        return self.versioninfo & 3

    @property
    def features(self) -> int:
        """The feature flags, unknown ones included."""
        return self.versioninfo >> 2

    @property
    def toname(self) -> str:
        """``pool/path@snapshot``; bytes that are not UTF-8 are escaped."""
        return self.name.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")

    @property
    def dataset(self) -> str:
        """What stands before the ``@``."""
        return self.toname.partition("@")[0]

    @property
    def snapshot(self) -> str:
        """What stands after the ``@``."""
        return self.toname.partition("@")[2]


class Object(NamedTuple):
    """Announces an object: its type and block size."""

    object: int
    type: int
    bonus_type: int
    block_bytes: int
    bonus_bytes: int
    checksum_type: int
    compress: int
    dnode_slots: int
    flags: int
    raw_bonus_bytes: int
    toguid: int
    indirect_block_shift: int
    levels: int
    block_pointers: int
    max_block_id: int


class FreeObjects(NamedTuple):
    """Frees a range of object numbers."""

    first: int
    slots: int
    toguid: int


class Write(NamedTuple):
    """One block of an object."""

    object: int
    type: int
    offset: int
    logical_bytes: int
    toguid: int
    checksum_type: int
    flags: int
    compression: int
    block_checksum: bytes
    block_properties: int
    compressed_bytes: int
    salt: bytes
    iv: bytes
    mac: bytes


class Free(NamedTuple):
    """Frees a range of an object; ``length`` may be TO_THE_END."""

    object: int
    offset: int
    length: int
    toguid: int


class End(NamedTuple):
    """Ends a stream; ``checksum`` is the state before this record."""

    checksum: bytes
    toguid: int


class WriteByRef(NamedTuple):
    """A block of a deduplicated stream: named, verified, never applied."""

    object: int
    offset: int
    length: int
    toguid: int
    refguid: int
    refobject: int
    refoffset: int
    checksum_type: int
    flags: int
    key: bytes


class Spill(NamedTuple):
    """System attributes of a filesystem's object."""

    object: int
    length: int
    toguid: int
    flags: int
    compression: int
    compressed_bytes: int
    salt: bytes
    iv: bytes
    mac: bytes
    type: int


class WriteEmbedded(NamedTuple):
    """A block so small (compressed) that its data sits in the block pointer."""

    object: int
    offset: int
    length: int
    toguid: int
    compression: int
    embedded_type: int
    logical_bytes: int
    physical_bytes: int


class ObjectRange(NamedTuple):
    """Encryption parameters of a range of objects (raw streams)."""

    first: int
    slots: int
    toguid: int
    salt: bytes
    iv: bytes
    mac: bytes
    flags: int


class Redact(NamedTuple):
    """A range whose data was left out on purpose."""

    object: int
    offset: int
    length: int
    toguid: int


Record: TypeAlias = (
    Begin | Object | FreeObjects | Write | Free | End | WriteByRef | Spill | WriteEmbedded | ObjectRange | Redact
)

RECORD_CLASSES: tuple[type[Record], ...] = (
    Begin,
    Object,
    FreeObjects,
    Write,
    Free,
    End,
    WriteByRef,
    Spill,
    WriteEmbedded,
    ObjectRange,
    Redact,
)
"""By record type."""

_LAYOUTS = (
    struct.Struct("<4xIQQQIIQQ256s"),
    struct.Struct("<8xQIIIIBBBBIQBBB5xQ216x"),
    struct.Struct("<8xQQQ248x"),
    struct.Struct("<8xQI4xQQQBBB5x32sQQ8s12s16s140x"),
    struct.Struct("<8xQQQQ240x"),
    struct.Struct("<8x32sQ232x"),
    struct.Struct("<8xQQQQQQQBB6x40s168x"),
    struct.Struct("<8xQQQBB6xQ8s12s16sI192x"),
    struct.Struct("<8xQQQQBB6xII224x"),
    struct.Struct("<8xQQQ8s12s16sB211x"),
    struct.Struct("<8xQQQQ240x"),
)
"""By record type: a header's fields up to its checksum (of BEGIN: all of it)."""
_TYPES: dict[type[tuple[object, ...]], int] = {cls: number for number, cls in enumerate(RECORD_CLASSES)}
_TYPE_WORDS = tuple(struct.pack("<I", number) for number in range(len(RECORD_CLASSES)))
_SIZES_OF_OBJECT = struct.Struct("<28xI4xI")
_SIZES_OF_WRITE = struct.Struct("<32xQ10xB45xQ")
_SIZES_OF_SPILL = struct.Struct("<16xQ16xQ")
_SIZES_OF_EMBEDDED = struct.Struct("<52xI")


def pack(record: Record) -> bytes:
    """The header without its checksum: SEALED_BYTES, for BEGIN all HEADER_BYTES."""
    number = _TYPES[type(record)]
    return _TYPE_WORDS[number] + _LAYOUTS[number].pack(*record)[4:]


def parse(header: bytes | memoryview) -> Record:
    """The record whose header this is; its type must be known."""
    number = header[0]
    return RECORD_CLASSES[number]._make(_LAYOUTS[number].unpack_from(header))


def payload_size(record_type: int, header: bytes | memoryview, start: int = 0) -> int:
    """Bytes of payload after the header at ``start``; BadDataError if the type is unknown or the size out of bounds."""
    if record_type == RecordType.WRITE:
        logical, compression, compressed = _SIZES_OF_WRITE.unpack_from(header, start)
        size: int = compressed if compression else logical
    elif record_type == RecordType.BEGIN:
        size = int.from_bytes(header[start + 4 : start + 8], "little")
        return _checked(record_type, size, 4, BEGIN_PAYLOAD_MAX_BYTES)
    else:
        size = _rare_payload_size(record_type, header, start)
    if size > PAYLOAD_MAX_BYTES or size & 7:
        return _checked(record_type, size, 8, PAYLOAD_MAX_BYTES)
    return size


def _rare_payload_size(record_type: int, header: bytes | memoryview, start: int) -> int:
    if record_type == RecordType.OBJECT:
        bonus, raw_bonus = _SIZES_OF_OBJECT.unpack_from(header, start)
        return int(raw_bonus or (bonus + 7) & ~7)
    if record_type == RecordType.SPILL:
        length, compressed = _SIZES_OF_SPILL.unpack_from(header, start)
        return int(compressed or length)
    if record_type == RecordType.WRITE_EMBEDDED:
        return int(_SIZES_OF_EMBEDDED.unpack_from(header, start)[0] + 7) & ~7
    if record_type >= len(RECORD_CLASSES):
        raise BadDataError(f"unknown record type {record_type}")
    return 0


def _checked(record_type: int, size: int, multiple: int, max_bytes: int) -> int:
    name = RecordType(record_type).name
    if size > max_bytes:
        raise BadDataError(f"{name} payload of {size} bytes is larger than {max_bytes}")
    if size % multiple:
        raise BadDataError(f"{name} payload of {size} bytes is not a multiple of {multiple}")
    return size
