"""The microzap: the one block of a volume's properties object, which holds the volume's size."""

from __future__ import annotations

import struct

from imaging.errors import BadDataError
from imaging.sendstream.records import MICROZAP_BYTES

_MAGIC = 0x8000000000000003
_ENTRY = struct.Struct("<QIH50s")
_ENTRY_BYTES = 64
_FIRST_ENTRY = 64
_SIZE_NAME = b"size"


def build(volume_size_bytes: int, guid: int) -> bytes:
    """A microzap with one entry. The salt may be any odd number; it is taken from the guid so that streams are repeatable."""
    block = bytearray(MICROZAP_BYTES)
    struct.pack_into("<QQ", block, 0, _MAGIC, guid | 1)
    _ENTRY.pack_into(block, _FIRST_ENTRY, volume_size_bytes, 0, 0, _SIZE_NAME)
    return bytes(block)


def volume_size(block: bytes | memoryview) -> int:
    """The ``size`` entry; BadDataError if this is no microzap or has none (or two)."""
    if len(block) < MICROZAP_BYTES or len(block) % _ENTRY_BYTES or struct.unpack_from("<Q", block)[0] != _MAGIC:
        raise BadDataError("the volume's properties are not a microzap")
    entries = (_ENTRY.unpack_from(block, at) for at in range(_FIRST_ENTRY, len(block), _ENTRY_BYTES))
    sizes = [value for value, _collision, _zero, name in entries if name.split(b"\0", 1)[0] == _SIZE_NAME]
    if len(sizes) != 1:
        raise BadDataError("the volume's properties have no volume size")
    return int(sizes[0])
