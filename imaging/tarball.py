"""Tar archives, walked header by header: what is in them and where, in bounded memory.

For archives from strangers: every length is checked before it is used, long names and extended headers are bounded, and what cannot be
understood raises BadDataError. Reads ustar, GNU (long names, large sizes) and pax. Nothing is unpacked.
"""

from __future__ import annotations

import os
import posixpath
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from imaging.errors import BadDataError, TooLargeError
from imaging.files import os_errors

BLOCK_BYTES = 512

EXTENDED_MAX_BYTES = 1 << 20
"""A pax header or a long name; Linux knows no path longer than 4 KiB, and extended attributes are at most 64 KiB each."""

ENTRIES_MAX = 20_000_000
"""More than the files of any image; a bomb of empty entries ends here."""

CUT_OFF = "unexpected EOF"

_DIRECTORY, _HARD_LINK = b"5", b"1"
_FILES = frozenset({b"0", b"\0", b"7"})
_NO_CONTENT = frozenset({b"1", b"2", b"3", b"4", b"5", b"6"})
_ZEROS = bytes(BLOCK_BYTES)


@dataclass(frozen=True, slots=True)
class TarEntry:
    """One entry, and where its content is in the archive."""

    name: str
    """As written; :attr:`clean_name` is what it means."""
    offset_bytes: int
    size_bytes: int
    is_file: bool
    is_directory: bool
    link_name: str = ""
    is_hard_link: bool = False

    @property
    def clean_name(self) -> str:
        """The name without ``./`` and doubled slashes."""
        return posixpath.normpath(self.name) if self.name else ""


def walk_tar(fd: int) -> Iterator[TarEntry]:
    """Every entry, in order; BadDataError for what is no sound archive, also for names that lead out of it."""
    with os_errors("cannot read an archive"):
        walk = _Walk(fd, os.fstat(fd).st_size)
    for count, entry in enumerate(walk):
        if count >= ENTRIES_MAX:
            raise TooLargeError(f"the archive has more than {ENTRIES_MAX} entries")
        _check_inside(entry.name)
        if entry.is_hard_link:
            _check_inside(entry.link_name)
        yield entry


def read_entry(fd: int, entry: TarEntry, max_bytes: int) -> bytes:
    """The content of a small file; TooLargeError."""
    if entry.size_bytes > max_bytes:
        raise TooLargeError(f"{entry.clean_name[:128]!r} of the archive is larger than {max_bytes} bytes")
    return _read(fd, entry.offset_bytes, entry.size_bytes)


def _check_inside(name: str) -> None:
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise BadDataError(f"the archive has a name that leads out of it: {name[:128]!r}")


def _read(fd: int, offset_bytes: int, size_bytes: int) -> bytes:
    with os_errors("cannot read an archive"):
        data = os.pread(fd, size_bytes, offset_bytes)
    if len(data) < size_bytes:
        raise BadDataError(CUT_OFF)
    return data


class _Walk:
    """The state between two headers: what extended headers said about the next entry."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._fd = fd
        self._size_bytes = size_bytes
        self._global: dict[str, str] = {}

    def __iter__(self) -> Iterator[TarEntry]:
        offset, extra = 0, dict(self._global)
        while offset < self._size_bytes:
            header = _read(self._fd, offset, BLOCK_BYTES)
            if header == _ZEROS:
                return
            _check_sum(header)
            kind, size, body = header[156:157], _number(header[124:136]), offset + BLOCK_BYTES
            if kind in b"xgLKX" and kind:
                self._extend(kind, _extended(self._fd, body, size), extra)
            else:
                size, body = _size(kind, extra, size), self._after_sparse_map(header, body)
                yield _entry(header, kind, body, size, extra)
                extra = dict(self._global)
            offset = body + -(-size // BLOCK_BYTES) * BLOCK_BYTES
            if body + size > self._size_bytes:
                raise BadDataError(CUT_OFF)

    def _after_sparse_map(self, header: bytes, body: int) -> int:
        """Where the content begins: GNU's sparse files may have blocks with more of their map before it."""
        more = header[156:157] == b"S" and header[482]
        while more:
            more = _read(self._fd, body, BLOCK_BYTES)[504]
            body += BLOCK_BYTES
        return body

    def _extend(self, kind: bytes, data: bytes, extra: dict[str, str]) -> None:
        if kind == b"L":
            extra["path"] = _string(data)
        elif kind == b"K":
            extra["linkpath"] = _string(data)
        else:
            records = dict(_pax_records(data))
            extra.update(records)
            if kind == b"g":
                self._global.update(records)


def _extended(fd: int, offset_bytes: int, size_bytes: int) -> bytes:
    if size_bytes > EXTENDED_MAX_BYTES:
        raise TooLargeError(f"an extended header of the archive is larger than {EXTENDED_MAX_BYTES} bytes")
    return _read(fd, offset_bytes, size_bytes)


def _size(kind: bytes, extra: dict[str, str], size_bytes: int) -> int:
    if kind in _NO_CONTENT:
        return 0
    try:
        told = extra.get("size")
        size_bytes = size_bytes if told is None else int(told)
    except ValueError as err:
        raise BadDataError("a size in the archive is not a number") from err
    if size_bytes < 0:
        raise BadDataError("a size in the archive is negative")
    return size_bytes


def _entry(header: bytes, kind: bytes, body: int, size: int, extra: dict[str, str]) -> TarEntry:
    name = _string(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        name = f"{_string(header[345:500])}/{name}"
    name = extra.get("GNU.sparse.name") or extra.get("path") or name
    return TarEntry(
        name=name,
        offset_bytes=body,
        size_bytes=size,
        is_file=kind in _FILES and not (kind == b"\0" and name.endswith("/")),
        is_directory=kind == _DIRECTORY or (kind == b"\0" and name.endswith("/")),
        link_name=extra.get("linkpath") or _string(header[157:257]),
        is_hard_link=kind == _HARD_LINK,
    )


def _string(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    """An octal number, or a binary one where the first bit says so."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
        if field[0] == 0xFF or value >> 63:
            raise BadDataError("a size in the archive is negative or absurd")
        return value
    text = field.split(b"\0", 1)[0].strip()
    try:
        return int(text, 8) if text else 0
    except ValueError as err:
        raise BadDataError("archive/tar: invalid tar header") from err


def _check_sum(header: bytes) -> None:
    told = _number(header[148:156])
    blank = header[:148] + b" " * 8 + header[156:]
    if told != sum(blank) and told != sum(struct.unpack(f"{BLOCK_BYTES}b", blank)):  # some old programs sum signed
        raise BadDataError("archive/tar: invalid tar header")


def _pax_records(data: bytes) -> Iterator[tuple[str, str]]:
    """Records of a length in decimal, a key and a value, each ended by a newline."""
    while data:
        digits, space, _ = data.partition(b" ")
        if not space or not digits.isdigit() or len(digits) > 7:
            raise BadDataError("archive/tar: invalid tar header")
        length = int(digits)
        record, data = data[len(digits) + 1 : length], data[length:]
        key, equals, value = record[:-1].partition(b"=")
        if not equals or not record.endswith(b"\n"):
            raise BadDataError("archive/tar: invalid tar header")
        yield key.decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape")
