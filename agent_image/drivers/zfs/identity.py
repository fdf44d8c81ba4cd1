"""What ZFS chose for an object just made, asked by one plain call.

A channel program answers the same, but starting one costs more than the snapshot it asks about. OBJSET_STATS is the call behind ``zfs
list`` and as old as ZFS; of its argument only the first fields matter here, and the answer is searched for three numbers. Should a
kernel ever see it differently, :class:`Identities` notices when it is made and asks by channel program.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import re
import struct
import threading
from collections.abc import Callable, Mapping, Sequence

from agent_image.drivers.zfs.programs import Identity

OBJSET_STATS = 0x5A12
"""ZFS_IOC_OBJSET_STATS, number 18 of the calls."""
COMMAND_BYTES = 32 << 10
"""More than any zfs_cmd_t, of which the kernel copies as much as it knows."""
ANSWER_BYTES = 64 << 10
"""All properties of a dataset take 3 KiB; with many long ones of users the channel program is asked."""
FEW = 4
"""More names are asked about together, by one channel program."""

_HEAD = struct.Struct("=4096sQQQQ")
"""zc_name, zc_nvlist_src, its size, zc_nvlist_dst, its size."""
_FIELDS = ("guid", "createtxg", "creation")
_UINT64, _NVLIST = 8, 19

Ask = Callable[[Sequence[str]], Mapping[str, Identity]]

log = logging.getLogger(__name__)


def _pair(name: str, kind: int, value_bytes: int) -> bytes:
    """A native pair up to its value."""
    place = (16 + len(name) + 1 + 7) & ~7
    head = struct.pack("<ihhii", place + value_bytes, len(name) + 1, 0, 1, kind)
    return (head + name.encode()).ljust(place, b"\0")


_NUMBERS = [
    re.compile(
        re.escape(_pair(name, _NVLIST, 24)) + b".{24}" + re.escape(_pair("value", _UINT64, 8)) + b"(.{8})", re.DOTALL
    )
    for name in _FIELDS
]
"""A property is a list with its value: no text of a user's can look so, as text has no zeros in it."""


def find_identity(answer: bytes) -> Identity | None:
    """The three numbers in a packed list of properties."""
    found = [pattern.search(answer) for pattern in _NUMBERS]
    numbers = [int.from_bytes(match[1], "little") for match in found if match is not None]
    return Identity(*numbers) if len(numbers) == len(_FIELDS) else None


class Identities:
    """Asks about objects by name. Safe to use from several threads."""

    def __init__(self, fd: int, known: str, ask: Ask) -> None:
        """``fd`` is an open /dev/zfs, ``known`` an object that is there, ``ask`` the other way."""
        self._fd = fd
        self._ask = ask
        self._buffers = threading.local()
        self._is_usable = self._stats(known) == ask([known]).get(known)
        if not self._is_usable:
            log.warning("zfs_stats_not_understood")

    def of(self, names: Sequence[str]) -> Mapping[str, Identity]:
        """Identities of those that are there."""
        if len(names) > FEW or not self._is_usable:
            return self._ask(names)
        found = {name: identity for name in names if (identity := self._stats(name)) is not None}
        missing = [name for name in names if name not in found]
        return {**found, **self._ask(missing)} if missing else found

    def _stats(self, name: str) -> Identity | None:
        """None if the call says no, for whatever reason."""
        if not hasattr(self._buffers, "pair"):
            answer = bytearray(ANSWER_BYTES)
            address = ctypes.addressof(ctypes.c_char.from_buffer(answer))
            self._buffers.pair = bytearray(COMMAND_BYTES), answer, address
        command, answer, address = self._buffers.pair
        command[:] = _HEAD.pack(name.encode(), 0, 0, address, ANSWER_BYTES).ljust(COMMAND_BYTES, b"\0")
        try:
            fcntl.ioctl(self._fd, OBJSET_STATS, command)
        except OSError:
            return None
        return find_identity(bytes(answer[: min(_HEAD.unpack_from(command)[4], ANSWER_BYTES)]))
