"""What callers may set on a dataset, and the sizes a volume may have. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from agent_image.drivers.zfs.hidden import MARK
from imaging.errors import InvalidArgumentError, WrongKindError

NAME_MAX_BYTES = 255
"""ZAP_MAXNAMELEN less the NUL."""
VALUE_MAX_BYTES = 8191
"""ZAP_MAXVALUELEN less the NUL."""
VOLSIZE_MAX_BYTES = 1 << 43
"""8 TiB: above any guest's disk, and what the file driver takes too, so that both say the same."""
VOLBLOCKSIZE_MIN_BYTES = 512
VOLBLOCKSIZE_MAX_BYTES = 1 << 20
"""What every ZFS with large blocks takes by default."""
VOLBLOCKSIZE_DEFAULT_BYTES = 16 << 10
"""ZFS's own default since 2.2; the 8 KiB of 2.1 waste space on raidz."""
INDIRECT_BLOCK_BYTES = 128 << 10
POINTERS_PER_BLOCK = INDIRECT_BLOCK_BYTES // 128
METADNODE_BLOCKS = 7
METADATA_COPIES = 2

_USER_PROPERTY = re.compile(r"(?!-)[a-z0-9:+._-]*:[a-z0-9:+._-]*\Z")


@dataclass(frozen=True, slots=True)
class Changes:
    """Checked property changes, by the way they have to be made. None removes."""

    user: Mapping[str, str | None] = field(default_factory=dict)
    readonly: str | None = None
    """on, off or inherit."""
    quota_bytes: int | None = None
    """0 removes the quota."""

    def for_creation(self) -> dict[str, int | str]:
        """As libzfs_core takes them when it creates a dataset."""
        values: dict[str, int | str] = {name: value for name, value in self.user.items() if value is not None}
        if self.readonly in {"on", "off"}:
            values["readonly"] = int(self.readonly == "on")
        if self.quota_bytes:
            values["quota"] = self.quota_bytes
        return values

    def as_given(self) -> dict[str, str | None]:
        """As a caller would have given them."""
        given = dict(self.user)
        given.update(self._readonly())
        if self.quota_bytes is not None:
            given["quota"] = str(self.quota_bytes)
        return given

    def applied_to(self, properties: Mapping[str, str]) -> dict[str, str]:
        """The properties of a dataset after the change."""
        result = dict(properties)
        for name, value in (*self.user.items(), *self._readonly()):
            if value is None:
                result.pop(name, None)
            else:
                result[name] = value
        return result

    def _readonly(self) -> tuple[tuple[str, str | None], ...]:
        if self.readonly is None:
            return ()
        return (("readonly", None if self.readonly == "inherit" else self.readonly),)


def check(changes: Mapping[str, str | None], *, is_volume: bool) -> Changes:
    """Sort the changes; InvalidArgumentError names the one that cannot be, WrongKindError if a volume has no such property."""
    user: dict[str, str | None] = {}
    readonly, quota_bytes = None, None
    for name, value in changes.items():
        if name == "quota":
            quota_bytes = _quota(value, is_volume=is_volume)
        elif name == "readonly":
            readonly = _readonly(value)
        else:
            user[_user_name(name)] = value if value is None else _user_value(name, value)
    return Changes(user, readonly, quota_bytes)


def _quota(value: str | None, *, is_volume: bool) -> int:
    if is_volume:
        raise WrongKindError("a volume has no quota")
    if value is None or value == "none":
        return 0
    if not re.fullmatch(r"[0-9]{1,19}", value):
        raise InvalidArgumentError(f"quota is not a number of bytes: {value[:64]!r}")
    return int(value)


def _readonly(value: str | None) -> str:
    if value is None:
        return "inherit"
    if value not in {"on", "off"}:
        raise InvalidArgumentError(f"readonly is on or off, not {value[:64]!r}")
    return value


def _user_name(name: str) -> str:
    if not _USER_PROPERTY.match(name) or len(name) > NAME_MAX_BYTES or name == MARK:
        raise InvalidArgumentError(f"not a property that can be set: {name[:NAME_MAX_BYTES]!r}")
    return name


def _user_value(name: str, value: str) -> str:
    if "\0" in value or len(value.encode("utf-8", "replace")) > VALUE_MAX_BYTES:
        raise InvalidArgumentError(f"value of property {name} has a NUL or more than {VALUE_MAX_BYTES} bytes")
    return value


def check_volblocksize(block_bytes: int) -> int:
    """The block size if a volume can have it."""
    in_range = VOLBLOCKSIZE_MIN_BYTES <= block_bytes <= VOLBLOCKSIZE_MAX_BYTES
    if not in_range or block_bytes & (block_bytes - 1):
        raise InvalidArgumentError(
            f"volblocksize is a power of two from {VOLBLOCKSIZE_MIN_BYTES} to {VOLBLOCKSIZE_MAX_BYTES}, not {block_bytes}"
        )
    return block_bytes


def round_up(size_bytes: int, block_bytes: int, name: object) -> int:
    """The size in whole blocks."""
    if not 0 < size_bytes <= VOLSIZE_MAX_BYTES:
        raise InvalidArgumentError(f"size of {name} is from 1 to {VOLSIZE_MAX_BYTES} bytes, not {size_bytes}")
    return -(-size_bytes // block_bytes) * block_bytes


def reservation(volsize_bytes: int, block_bytes: int) -> int:
    """What a thick volume reserves: its data and the block pointers above it, as ZFS itself reckons for one copy.

    Each level of indirect blocks holds 1,024 pointers a block and is kept twice; seven blocks stand for the object set's own tree.
    """
    indirect_blocks, level_blocks = METADNODE_BLOCKS, volsize_bytes // block_bytes
    while level_blocks > 1:
        level_blocks = (level_blocks + POINTERS_PER_BLOCK - 1) // POINTERS_PER_BLOCK
        indirect_blocks += level_blocks
    return volsize_bytes + indirect_blocks * METADATA_COPIES * INDIRECT_BLOCK_BYTES
