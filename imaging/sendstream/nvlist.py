"""Name/value lists as they stand in BEGIN payloads and resume tokens: XDR and native encoding, hostile input expected.

Python values: ``int`` is uint64 (other integer types are read as ``int`` too), ``str``, ``bytes`` (byte arrays), ``True`` (a boolean,
which has no value but its presence), ``dict`` (nvlist), and lists of ``int`` (uint64 array), ``str`` or ``dict``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TypeAlias

from imaging.errors import BadDataError, InvalidArgumentError, UnsupportedError

SIZE_MAX_BYTES = 64 << 20
"""What libzfs takes."""
NESTING_MAX = 20
"""What the kernel's own decoder takes; deeper lists could only mean to exhaust a stack."""
PAIRS_MAX = 1_000_000
"""Two hundred thousand datasets with five pairs each; a list may not blow up memory by being made of tiny pairs."""

Value: TypeAlias = "int | str | bytes | bool | NvList | list[int] | list[str] | list[NvList]"
NvList: TypeAlias = "dict[str, Value]"

_BOOLEAN, _UINT64, _STRING, _BYTE_ARRAY = 1, 8, 9, 10
_UINT64_ARRAY, _STRING_ARRAY, _NVLIST, _NVLIST_ARRAY, _BOOLEAN_VALUE = 16, 17, 19, 20, 21
_UINT8_ARRAY, _UNIQUE_NAME = 26, 1
_NATIVE, _XDR = 0, 1
_SCALARS = {2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "q", 8: "Q", 18: "q", 22: "b", 23: "B"}
"""Integer types and their formats in memory."""
_ARRAYS = {11: "h", 12: "H", 13: "i", 14: "I", 15: "q", 16: "Q", 24: "i", 25: "b"}


def decode(data: bytes | memoryview) -> NvList:
    """The list; BadDataError if it is damaged or too large, UnsupportedError for big-endian native encoding."""
    if len(data) > SIZE_MAX_BYTES:
        raise BadDataError(f"an nvlist of {len(data)} bytes is larger than {SIZE_MAX_BYTES}")
    if len(data) < 4 or data[0] not in {_NATIVE, _XDR}:
        raise BadDataError("not an nvlist")
    if data[0] == _NATIVE and data[1] != 1:
        raise UnsupportedError("the nvlist is big endian")
    decoder = _Native(bytes(data)) if data[0] == _NATIVE else _Xdr(bytes(data))
    try:
        return decoder.members(0)
    except (struct.error, ValueError, IndexError, OverflowError) as err:
        raise BadDataError("the nvlist is damaged") from err


class _Decoder:
    """A position in the data, and what both encodings share."""

    order = "<"

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 4
        self.pairs = 0

    def members(self, depth: int) -> NvList:
        """The pairs of a list that starts here with its version and flags."""
        self.unpack("iI")
        return self.pairs_here(depth)

    def pairs_here(self, depth: int) -> NvList:
        """The pairs up to the end mark."""
        if depth > NESTING_MAX:
            raise BadDataError(f"the nvlist is nested deeper than {NESTING_MAX}")
        found: NvList = {}
        while (pair := self.pair(depth)) is not None:
            self.pairs += 1
            if self.pairs > PAIRS_MAX:
                raise BadDataError(f"the nvlist has more than {PAIRS_MAX} pairs")
            found[pair[0]] = pair[1]
        return found

    def pair(self, depth: int) -> tuple[str, Value] | None:
        """The next pair at this depth, or None at the end mark."""
        raise BadDataError(f"an nvlist of unknown encoding at depth {depth}")

    def unpack(self, layout: str) -> tuple[int, ...]:
        """Integers here, in the encoding's byte order."""
        found = struct.unpack_from(self.order + layout, self.data, self.position)
        self.position += struct.calcsize(self.order + layout)
        return found

    def take(self, size: int) -> bytes:
        """So many bytes."""
        if size < 0 or size > len(self.data) - self.position:
            raise BadDataError("the nvlist is cut off")
        self.position += size
        return self.data[self.position - size : self.position]

    def integers(self, layout: str, count: int, item_bytes: int) -> list[int]:
        """An array, checked against what is there before anything is allocated."""
        if count < 0 or count * item_bytes > len(self.data) - self.position:
            raise BadDataError("the nvlist is cut off")
        return list(self.unpack(f"{count}{layout}"))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


class _Xdr(_Decoder):
    order = ">"

    def pair(self, depth: int) -> tuple[str, Value] | None:
        start = self.position
        encoded_bytes, decoded_bytes = self.unpack("II")
        if encoded_bytes == 0 and decoded_bytes == 0:
            return None
        name = self.string()
        kind, count = self.unpack("iI")
        value = self.value(kind, count, depth)
        if self.position != start + encoded_bytes:
            raise BadDataError(f"the nvlist's pair {name[:64]!r} has a wrong size")
        return name, value

    def string(self) -> str:
        (size,) = self.unpack("I")
        text = self.take(size)
        self.take(-size % 4)
        return _text(text)

    def value(self, kind: int, count: int, depth: int) -> Value:
        if kind == _BOOLEAN:
            return True
        if kind == _STRING:
            return self.string()
        if kind == _NVLIST:
            return self.members(depth + 1)
        if kind in _SCALARS:
            wide = (
                "q"
                if _SCALARS[kind] == "q"
                else "Q"
                if _SCALARS[kind] == "Q"
                else "i"
                if _SCALARS[kind].islower()
                else "I"
            )
            return self.unpack(wide)[0]
        if kind == _BOOLEAN_VALUE:
            return bool(self.unpack("i")[0])
        return self.array(kind, count, depth)

    def array(self, kind: int, count: int, depth: int) -> Value:
        if kind == _BYTE_ARRAY:
            data = self.take(count)
            self.take(-count % 4)
            return data
        if kind == _NVLIST_ARRAY:
            return [self.members(depth + 1) for _ in range(self.bounded(count, 8))]
        if kind == _STRING_ARRAY:
            return [self.string() for _ in range(self.bounded(count, 4))]
        (stated,) = self.unpack("I")
        if stated != count:
            raise BadDataError("an nvlist's array has two lengths")
        if kind == _UINT8_ARRAY:
            return bytes(value & 0xFF for value in self.integers("I", count, 4))
        layout = _ARRAYS.get(kind, "")
        if not layout:
            raise BadDataError(f"the nvlist has a value of unknown type {kind}")
        wide = layout if layout in "qQ" else "i" if layout.islower() else "I"
        return self.integers(wide, count, struct.calcsize(">" + wide))

    def bounded(self, count: int, item_bytes: int) -> int:
        if count * item_bytes > len(self.data) - self.position:
            raise BadDataError("the nvlist is cut off")
        return count


class _Native(_Decoder):
    order = "<"

    def pair(self, depth: int) -> tuple[str, Value] | None:
        start = self.position
        (size,) = self.unpack("i")
        if size == 0:
            return None
        name_bytes, _reserved, count, kind = self.unpack("hhii")
        name = _text(self.take(name_bytes).rstrip(b"\0"))
        self.position = start + (16 + name_bytes + 7 & ~7)
        end = start + size
        if size < 16 or end < self.position or end > len(self.data) or count < 0:
            raise BadDataError(f"the nvlist's pair {name[:64]!r} has a wrong size")
        value = self.value(kind, count, end, depth)
        return name, value

    def value(self, kind: int, count: int, end: int, depth: int) -> Value:
        if kind == _NVLIST:
            self.position = end
            return self.pairs_here(depth + 1)
        if kind == _NVLIST_ARRAY:
            if count * 32 > end - self.position:
                raise BadDataError("the nvlist is cut off")
            self.position = end
            return [self.pairs_here(depth + 1) for _ in range(count)]
        value = self.plain(kind, count, self.data[self.position : end])
        self.position = end
        return value

    def plain(self, kind: int, count: int, room: bytes) -> Value:
        if kind == _BOOLEAN:
            return True
        if kind == _STRING:
            return _text(room.split(b"\0", 1)[0])
        if kind in {_BYTE_ARRAY, _UINT8_ARRAY}:
            if count > len(room):
                raise BadDataError("the nvlist is cut off")
            return room[:count]
        if kind == _STRING_ARRAY:
            return [_text(text) for text in room[8 * count :].split(b"\0")[:count]]
        if kind == _BOOLEAN_VALUE:
            return bool(struct.unpack_from("<i", room)[0])
        if kind in _SCALARS:
            return int(struct.unpack_from("<" + _SCALARS[kind], room)[0])
        if kind not in _ARRAYS:
            raise BadDataError(f"the nvlist has a value of unknown type {kind}")
        if count * struct.calcsize("<" + _ARRAYS[kind]) > len(room):
            raise BadDataError("the nvlist is cut off")
        return list(struct.unpack_from(f"<{count}{_ARRAYS[kind]}", room))


# -- encoding ----------------------------------------------------------------------------------------------------------


def encode_xdr(values: Mapping[str, Value]) -> bytes:
    """XDR encoding, as userland writes it (packages, tokens)."""
    return bytes((_XDR, 1, 0, 0)) + _xdr_list(values)


def encode_native(values: Mapping[str, Value]) -> bytes:
    """Native little-endian encoding, as the kernel writes it (streams)."""
    return bytes((_NATIVE, 1, 0, 0)) + struct.pack("<iI", 0, _UNIQUE_NAME) + _native_pairs(values)


def _xdr_list(values: Mapping[str, Value]) -> bytes:
    pairs = b"".join(_xdr_pair(name, value) for name, value in values.items())
    return struct.pack(">iI", 0, _UNIQUE_NAME) + pairs + bytes(8)


def _xdr_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">I", len(data)) + data + bytes(-len(data) % 4)


def _xdr_pair(name: str, value: Value) -> bytes:
    kind, count, body, memory_bytes = _xdr_value(value)
    rest = _xdr_string(name) + struct.pack(">II", kind, count) + body
    decoded_bytes = _align(16 + len(name.encode()) + 1) + memory_bytes
    return struct.pack(">II", len(rest) + 8, decoded_bytes) + rest


def _xdr_value(value: Value) -> tuple[int, int, bytes, int]:
    """Type, count, encoded value, and the size it takes in the decoder's memory."""
    if value is True:
        return _BOOLEAN, 0, b"", 0
    if isinstance(value, int):
        return _UINT64, 1, struct.pack(">Q", value), 8
    if isinstance(value, str):
        return _STRING, 1, _xdr_string(value), _align(len(value.encode()) + 1)
    if isinstance(value, bytes):
        return _BYTE_ARRAY, len(value), value + bytes(-len(value) % 4), _align(len(value))
    if isinstance(value, dict):
        return _NVLIST, 1, _xdr_list(value), 24
    numbers = _numbers(value)
    return _UINT64_ARRAY, len(numbers), struct.pack(f">I{len(numbers)}Q", len(numbers), *numbers), 8 * len(numbers)


def _native_pairs(values: Mapping[str, Value]) -> bytes:
    return b"".join(_native_pair(name, value) for name, value in values.items()) + bytes(4)


def _native_pair(name: str, value: Value) -> bytes:
    kind, count, body, members = _native_value(value)
    text = name.encode() + b"\0"
    head_bytes = _align(16 + len(text))
    size = head_bytes + _align(len(body))
    head = struct.pack("<ihhii", size, len(text), 0, count, kind) + text
    return head.ljust(head_bytes, b"\0") + body.ljust(size - head_bytes, b"\0") + members


def _native_value(value: Value) -> tuple[int, int, bytes, bytes]:
    """Type, count, value, and what follows the pair (the members of a list)."""
    if value is True:
        return _BOOLEAN, 0, b"", b""
    if isinstance(value, int):
        return _UINT64, 1, struct.pack("<Q", value), b""
    if isinstance(value, str):
        return _STRING, 1, value.encode() + b"\0", b""
    if isinstance(value, bytes):
        return _BYTE_ARRAY, len(value), value, b""
    if isinstance(value, dict):
        return _NVLIST, 1, struct.pack("<iIQQ", 0, _UNIQUE_NAME, 0, 0), _native_pairs(value)
    numbers = _numbers(value)
    return _UINT64_ARRAY, len(numbers), struct.pack(f"<{len(numbers)}Q", *numbers), b""


def _numbers(value: Value) -> list[int]:
    if not isinstance(value, list):
        raise InvalidArgumentError(f"an nvlist cannot hold {value!r}")
    numbers = [item for item in value if isinstance(item, int)]
    if len(numbers) != len(value):
        raise InvalidArgumentError("an nvlist's array to write holds numbers only")
    return numbers


def _align(size: int) -> int:
    return size + 7 & ~7
