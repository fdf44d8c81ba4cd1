"""StorageDriver: the contract between the image store and one pool.

Words are ZFS's: *pool, dataset, filesystem, volume, snapshot, bookmark, clone, origin, promote, rollback, hold, property, send
stream, receive, guid*. A *thick* volume reserves its size (``refreservation``), a *thin* one does not. ``written`` is what a snapshot
or dataset wrote since the snapshot before it; ``referenced`` is what it can reach; ``used`` is what destroying it would free.

Rules.

* A call that raises has changed nothing, unless the error says what it left.
* Destroying (or rolling back over) what something else needs raises BusyError whose ``dependants`` name it: clones, holds, open devices,
  running sends.
* ``create_*``, ``clone``, ``rename``, ``snapshot`` and ``receive`` refuse a name that exists (AlreadyExistsError) and a missing parent
  (NotFoundError) unless ``parents`` asks to make it.
* A recursive snapshot is atomic: all datasets below at one instant, or none.
* ``receive`` shows the dataset or snapshot only after the stream's END was verified; a stream that is damaged, dangerous or does not
  fit (wrong origin, other kind) raises BadDataError or ConflictError and leaves what was there as it was.
* A snapshot never changes. Its ``guid`` is unique (a received one keeps the stream's), its ``createtxg`` orders snapshots of one pool.
* Every acknowledged call survives kill -9. A call that was cut off by a crash is complete or undone after the next ``open``.
* Names are DatasetName/SnapshotName of this pool; another pool's raises InvalidNameError. Nothing leaves the pool.
* Calls block; they may come from several threads. The driver serializes what must be.

Errors: NotFoundError, AlreadyExistsError, BusyError, WrongKindError (also: something below a volume, a quota of a volume),
InvalidNameError, InvalidArgumentError (sizes, properties, the root of the pool, a base that is not older), ConflictError (receive: the
base is missing or changed), BadDataError (stream), NoSpaceError (pool or quota), NotPermittedError (a read-only volume opened to write),
UnsupportedError (a feature this driver or pool lacks), UnavailableError (pool suspended, exported or not open).

Life: construct, ``open`` (locks the pool; BusyError if another process has it), use, ``close``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol, runtime_checkable

from imaging.names import DatasetName, PoolName, SnapshotName


class DatasetKind(StrEnum):
    """What a dataset is."""

    FILESYSTEM = "filesystem"
    VOLUME = "volume"


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """What is fixed about a dataset, or changes only by our own calls. Cheap to get."""

    name: DatasetName
    kind: DatasetKind
    guid: int
    createtxg: int
    creation_s: int
    origin: SnapshotName | None = None
    volsize_bytes: int | None = None
    volblocksize_bytes: int | None = None
    properties: Mapping[str, str] = field(default_factory=dict)
    """User properties (``module:name``) set on this dataset, and ``readonly`` if it was set."""


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """What is fixed about a snapshot."""

    name: SnapshotName
    guid: int
    createtxg: int
    creation_s: int
    volsize_bytes: int | None = None
    """Of a volume's snapshot; None for a filesystem's."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Sizes that move, read for what is asked only."""

    used_bytes: int
    referenced_bytes: int
    written_bytes: int
    available_bytes: int
    """What can still be written below this dataset; for a snapshot 0."""
    quota_bytes: int = 0
    refreservation_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SendFlags:
    """Which features a stream may use; a driver without one sends a plain stream instead."""

    compressed: bool = False
    large_blocks: bool = False
    embedded: bool = False
    raw: bool = False
    properties: bool = False


class Readable(Protocol):
    """A blocking byte source."""

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes; empty at the end."""


@runtime_checkable
class StorageDriver(Protocol):
    """See the module's docstring: it is the specification."""

    @property
    def name(self) -> str:
        """``file`` or ``zfs``."""

    @property
    def pool(self) -> PoolName:
        """The one pool this driver serves."""

    def open(self) -> None:
        """Lock the pool and repair what a crash left; idempotent."""

    def close(self) -> None:
        """Unlock; idempotent."""

    # -- reading -----------------------------------------------------------------------------------------------------

    def get(self, name: DatasetName) -> DatasetInfo:
        """The dataset; NotFoundError."""

    def list(self, root: DatasetName, *, kind: DatasetKind | None = None) -> Sequence[DatasetInfo]:
        """``root`` and everything below it in name order; NotFoundError if root is absent."""

    def get_snapshot(self, name: SnapshotName) -> SnapshotInfo:
        """The snapshot; NotFoundError."""

    def list_snapshots(self, root: DatasetName, *, recursive: bool = True) -> Sequence[SnapshotInfo]:
        """Snapshots of ``root`` (and below): datasets by name, each one's snapshots by createtxg; NotFoundError."""

    def clones(self, snapshot: SnapshotName) -> Sequence[DatasetName]:
        """Datasets whose origin is ``snapshot``, by name."""

    def usage(self, name: DatasetName | SnapshotName) -> Usage:
        """The sizes that move; NotFoundError."""

    def written(self, names: Sequence[SnapshotName]) -> Mapping[SnapshotName, int]:
        """``usage(name).written_bytes`` of many snapshots, those that are gone left out."""

    # -- datasets ----------------------------------------------------------------------------------------------------

    def create_filesystem(
        self, name: DatasetName, *, properties: Mapping[str, str] | None = None, parents: bool = False
    ) -> DatasetInfo:
        """Create a filesystem. ``properties``: user properties, and ``quota`` in bytes."""

    def create_volume(
        self,
        name: DatasetName,
        size_bytes: int,
        *,
        thin: bool = False,
        volblocksize_bytes: int | None = None,
        properties: Mapping[str, str] | None = None,
        parents: bool = False,
    ) -> DatasetInfo:
        """Create a volume of zeros; the size is rounded up to the block size. Thick volumes raise NoSpaceError at once."""

    def clone(
        self,
        snapshot: SnapshotName,
        target: DatasetName,
        *,
        properties: Mapping[str, str] | None = None,
        parents: bool = False,
    ) -> DatasetInfo:
        """A writable dataset that starts as ``snapshot``; shares its blocks."""

    def resize(self, name: DatasetName, size_bytes: int) -> DatasetInfo:
        """Change a volume's size (rounded up to the block size); shrinking discards the tail. A thick volume stays thick."""

    def rename(self, name: DatasetName, target: DatasetName) -> None:
        """Rename a dataset with everything below and its snapshots; atomic."""

    def promote(self, name: DatasetName) -> None:
        """Make a clone independent: its origin's older snapshots move to it. InvalidArgumentError if it is no clone."""

    def destroy(self, name: DatasetName, *, recursive: bool = False) -> None:
        """Destroy a dataset; with ``recursive`` also its snapshots and everything below (never clones elsewhere).

        Without it BusyError names children and snapshots. Nothing is destroyed if anything stands in the way.
        """

    def set_properties(self, name: DatasetName, properties: Mapping[str, str | None]) -> None:
        """Set (or with None remove) user properties, ``readonly`` (on/off) and ``quota`` (bytes or none) in one change.

        ``readonly`` is inherited by what is below and has no value of its own. A quota less than what is used: NoSpaceError.
        """

    # -- snapshots ---------------------------------------------------------------------------------------------------

    def snapshot(self, name: SnapshotName, *, recursive: bool = False) -> Sequence[SnapshotInfo]:
        """Take a snapshot (of everything below too); what was made, in list order.

        A driver that cannot take volumes at one instant while they are written to raises BusyError instead.
        """

    def destroy_snapshot(
        self, name: SnapshotName, *, recursive: bool = False, defer: bool = False
    ) -> Sequence[SnapshotName]:
        """Destroy a snapshot (and those of that name below); what was destroyed.

        ``defer``: as soon as nothing needs it; what has to wait stays visible and is not in the answer. A driver may refuse
        that (BusyError) while it is being sent.
        """

    def rollback(self, name: SnapshotName, *, destroy_newer: bool = False) -> None:
        """Make the dataset what the snapshot is. Newer snapshots and bookmarks: BusyError names them, or destroyed on demand.

        A driver may refuse (BusyError) while the volume is open.
        """

    def hold(self, name: SnapshotName, tag: str) -> None:
        """Keep a snapshot from being destroyed; AlreadyExistsError if the tag is there."""

    def release(self, name: SnapshotName, tag: str) -> None:
        """Undo a hold; NotFoundError if the tag is not there."""

    def holds(self, name: SnapshotName) -> Sequence[str]:
        """Tags that hold the snapshot, sorted."""

    def bookmark(self, name: SnapshotName, bookmark: str) -> None:
        """Remember the snapshot's guid as ``dataset#bookmark``, a base for sends that outlives the snapshot."""

    # -- content -----------------------------------------------------------------------------------------------------

    def device(self, name: DatasetName, *, timeout_s: float = 10.0) -> Path:
        """A path a guest can open as its disk, only once it is there and is this volume. WrongKindError: not a volume.

        UnavailableError if it does not appear in time. Without any time nothing is made that is not there yet.
        """

    def open_volume(self, name: DatasetName, *, writable: bool = False) -> AbstractContextManager[int]:
        """The volume's bytes as a file descriptor (pread, pwrite, fsync). Closing it after writing makes it durable."""

    def open_snapshot(self, name: SnapshotName) -> AbstractContextManager[int]:
        """A volume snapshot's bytes as a read-only file descriptor."""

    def send(
        self,
        name: SnapshotName,
        fd: int,
        *,
        base: str | None = None,
        flags: SendFlags = SendFlags(),
        resume_token: str | None = None,
    ) -> None:
        """Write a send stream to a blocking descriptor; the snapshot is held meanwhile.

        ``base``: a snapshot or bookmark part (``s0``, ``#b0``) of the same dataset, or a full snapshot name (the origin
        of a clone). It must be one the snapshot grew out of (InvalidArgumentError). UnavailableError if the reader goes away.
        UnsupportedError if a bookmark's snapshot is gone and the driver cannot do without its bytes.

        ``resume_token``: send only the rest of a stream that broke off, from where the token of its receiver says. The token
        names base and flags too (InvalidArgumentError if they are given besides). ConflictError: it is of another snapshot.
        """

    def receive(
        self,
        target: SnapshotName,
        source: Readable,
        *,
        origin: SnapshotName | None = None,
        properties: Mapping[str, str] | None = None,
    ) -> SnapshotInfo:
        """Receive a volume stream as ``target``.

        A full stream makes the dataset (as a clone if ``origin`` is given), an incremental one adds a snapshot to it, or with
        ``origin`` makes a new clone. ConflictError names the guid that is wanted if the base does not fit: the target is absent, its
        newest snapshot is another one, or it was written to since. A full stream onto what exists: AlreadyExistsError. The snapshot's
        name is the target's, not the stream's; ``properties`` are set on the dataset. The source is read to its end: bytes after END are
        BadDataError.
        """
