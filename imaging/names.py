"""Names, parsed once and then trusted.

The grammar is ZFS's own (``zcommon/zfs_namecheck.c``): components of letters, digits and ``-_.:``, joined by ``/``, at most
255 bytes with the pool, no empty, ``.`` or ``..`` component; ours adds that no component starts with ``-`` (it would look like an
option) and that there are no spaces. ``%`` stays out: ZFS keeps it for hidden datasets.

A :class:`DatasetName` always includes the pool. Ids on the wire do not; :func:`parse_wire_name` turns one into the other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from imaging.errors import InvalidNameError

NAME_MAX_BYTES = 255
"""ZFS_MAX_DATASET_NAME_LEN (256) less the terminating NUL."""

_COMPONENT = re.compile(r"[A-Za-z0-9_.:][A-Za-z0-9_.:-]*\Z")
_SNAPSHOT = re.compile(r"[A-Za-z0-9_\-:.]+\Z")
_POOL = re.compile(r"[A-Za-z][A-Za-z0-9_.:-]*\Z")
_IMAGE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_RESERVED_POOLS = frozenset({"mirror", "raidz", "draid", "spare", "log"})


def _refuse(text: str) -> InvalidNameError:
    err = InvalidNameError("not a valid dataset")  # the words old clients know
    err.add_note(f"name: {text[:NAME_MAX_BYTES]!r}")
    return err


def _check_component(component: str, whole: str) -> str:
    if component in {".", ".."} or not _COMPONENT.match(component):
        raise _refuse(whole)
    return component


@dataclass(frozen=True, slots=True, order=True)
class PoolName:
    """The name of a pool."""

    text: str

    @classmethod
    def parse(cls, text: str) -> PoolName:
        """Parse a pool name; InvalidNameError otherwise."""
        if not _POOL.match(text) or text in _RESERVED_POOLS or len(text) > NAME_MAX_BYTES:
            raise InvalidNameError(f"not a valid pool name: {text[:NAME_MAX_BYTES]!r}")
        return cls(text)

    def __str__(self) -> str:
        return self.text

    @property
    def root(self) -> DatasetName:
        """The pool's root dataset."""
        return DatasetName((self.text,))


@dataclass(frozen=True, slots=True, order=True)
class DatasetName:
    """A filesystem or volume, with its pool as first part. Orders as ``zfs list`` does: by component."""

    parts: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> DatasetName:
        """Parse a full name (pool first); InvalidNameError otherwise."""
        if len(text) > NAME_MAX_BYTES:
            raise _refuse(text)
        parts = text.split("/")
        PoolName.parse(parts[0])
        return cls(tuple(_check_component(part, text) for part in parts))

    def __str__(self) -> str:
        return "/".join(self.parts)

    def __truediv__(self, below: str) -> DatasetName:
        """The dataset ``below`` this one (one or more components)."""
        return DatasetName.parse(f"{self}/{below}")

    def __matmul__(self, snapshot: str) -> SnapshotName:
        """The snapshot of this dataset with that name."""
        return SnapshotName.parse(f"{self}@{snapshot}")

    @property
    def pool(self) -> PoolName:
        """The pool this dataset is in."""
        return PoolName(self.parts[0])

    @property
    def parent(self) -> DatasetName | None:
        """The dataset above, or None for the pool's root."""
        return DatasetName(self.parts[:-1]) if len(self.parts) > 1 else None

    @property
    def leaf(self) -> str:
        """The last component."""
        return self.parts[-1]

    @property
    def relative(self) -> str:
        """The name without the pool; empty for the root."""
        return "/".join(self.parts[1:])

    def is_within(self, other: DatasetName) -> bool:
        """Whether this is ``other`` or below it."""
        return self.parts[: len(other.parts)] == other.parts


@dataclass(frozen=True, slots=True, order=True)
class SnapshotName:
    """A snapshot, ``pool/path@name``."""

    dataset: DatasetName
    snapshot: str

    @classmethod
    def parse(cls, text: str) -> SnapshotName:
        """Parse a full snapshot name; InvalidNameError otherwise."""
        dataset, at, snapshot = text.partition("@")
        if not at or len(text) > NAME_MAX_BYTES or not _SNAPSHOT.match(snapshot):
            raise _refuse(text)
        return cls(DatasetName.parse(dataset), snapshot)

    def __str__(self) -> str:
        return f"{self.dataset}@{self.snapshot}"


def is_snapshot_part(text: str) -> bool:
    """Whether ``text`` may stand after the ``@`` of a snapshot."""
    return _SNAPSHOT.match(text) is not None


def parse_wire_name(pool: PoolName, wire_id: str) -> DatasetName | SnapshotName:
    """Turn an id of a request (relative to the pool) into a name confined to the pool; InvalidNameError otherwise."""
    text = f"{pool}/{wire_id}"
    return SnapshotName.parse(text) if "@" in wire_id else DatasetName.parse(text)


@dataclass(frozen=True, slots=True, order=True)
class ImageId:
    """An image's id: safe as one path component, one dataset component and one URL segment."""

    text: str

    @classmethod
    def parse(cls, text: str) -> ImageId:
        """Parse an image id; InvalidNameError otherwise."""
        if not _IMAGE_ID.match(text):
            raise InvalidNameError(f"not a valid image id: {text[:128]!r}")
        return cls(text)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, order=True)
class GuestId:
    """A guest's id: one dataset component below ``POOL/guests``."""

    text: str

    @classmethod
    def parse(cls, text: str) -> GuestId:
        """Parse a guest id; InvalidNameError otherwise."""
        if not _IMAGE_ID.match(text):
            raise InvalidNameError(f"not a valid guest id: {text[:128]!r}")
        return cls(text)

    def __str__(self) -> str:
        return self.text
