"""What the file driver remembers about a pool: records, and the catalog that indexes them.

Nothing here does IO. Records refer to each other and to content files by ids that are never reused; a name is a parent and a leaf. So a
rename, a promotion or a recursive snapshot changes records only, and all records of one change are committed together.

*Content* is the id of a file that holds a volume's bytes; the empty id means "all zeros, no file". Snapshots, and volumes that nobody has
asked to write to yet, share content; a volume with ``private`` content is the only one that refers to it.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from agent_image.drivers.base import DatasetInfo, DatasetKind, SnapshotInfo
from imaging.names import DatasetName, SnapshotName

NO_CONTENT = ""
"""Content of a volume nobody has written to: zeros."""


class PoolRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The pool itself; written with every change."""

    format: int = 1
    txg: int = 0
    """Counts changes; never goes back. ``createtxg`` is the value of the change that made a thing."""
    boot_id: str = ""
    """The machine's boot in which the pool was last opened."""


class DatasetRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A filesystem or volume."""

    id: str
    parent: str
    """Id of the dataset above; empty for the pool's root."""
    leaf: str
    kind: DatasetKind
    guid: int
    createtxg: int
    creation_s: int
    origin: str = ""
    """Id of the snapshot this is a clone of."""
    volsize_bytes: int = 0
    volblocksize_bytes: int = 0
    properties: dict[str, str] = {}
    quota_bytes: int = 0
    refreservation_bytes: int = 0
    content: str = NO_CONTENT
    private: bool = False
    """Whether ``content`` is this volume's own writable file, whose path may have been handed out."""
    synced_content: str = NO_CONTENT
    synced_mtime_ns: int = 0
    """While the private file has this modification time its bytes are those of ``synced_content``; 0: never."""

    @property
    def is_volume(self) -> bool:
        """Whether this is a volume."""
        return self.kind is DatasetKind.VOLUME


class SnapshotRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of a filesystem or volume."""

    id: str
    dataset: str
    """Id of the dataset it belongs to; promotion changes it."""
    name: str
    guid: int
    createtxg: int
    creation_s: int
    volsize_bytes: int = 0
    volblocksize_bytes: int = 0
    content: str = NO_CONTENT
    holds: tuple[str, ...] = ()
    deferred: bool = False
    """To be destroyed as soon as no clone and no hold needs it."""


class BookmarkRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What outlives a snapshot: enough to know it again."""

    id: str
    dataset: str
    name: str
    guid: int
    createtxg: int
    creation_s: int


Record = DatasetRecord | SnapshotRecord | BookmarkRecord

RECORD_KINDS: dict[str, type[Record]] = {"d": DatasetRecord, "s": SnapshotRecord, "b": BookmarkRecord}
"""First letter of a record's key -> its kind."""

_LETTERS = {kind: letter for letter, kind in RECORD_KINDS.items()}


def new_id() -> str:
    """An id for a record or a content file; random, so that a crash cannot make two things share one."""
    return secrets.token_hex(8)


def new_guid() -> int:
    """A random guid; 0 would mean "full" in a stream."""
    return secrets.randbits(64) or 1


def key_of(record: Record) -> str:
    """The key a record is stored under."""
    return f"{_LETTERS[type(record)]}/{record.id}"


@dataclass(slots=True)
class Change:
    """Records to put and to delete together."""

    puts: dict[str, Record] = field(default_factory=dict)
    deletes: dict[str, Record] = field(default_factory=dict)

    def put(self, record: Record) -> None:
        """Create or replace a record; the last put of one record counts."""
        self.puts[key_of(record)] = record

    def delete(self, record: Record) -> None:
        """Remove a record."""
        self.puts.pop(key_of(record), None)
        self.deletes[key_of(record)] = record


class Catalog:
    """Every record of a pool in memory, with the indexes that make all questions cheap."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.version = 0
        """Changes with every change; what is derived from the catalog may be kept as long as it stays."""
        self._children: dict[str, dict[str, DatasetRecord]] = {}
        self._snapshots: dict[str, dict[str, SnapshotRecord]] = {}
        self._bookmarks: dict[str, dict[str, BookmarkRecord]] = {}
        self._clones: dict[str, dict[str, DatasetRecord]] = {}
        self._references: Counter[str] = Counter()

    def apply(self, change: Change) -> None:
        """Take over a change that is already durable."""
        for key in (*change.deletes, *change.puts):
            old = self.records.pop(key, None)
            if old is not None:
                self._forget(old)
        for key, record in change.puts.items():
            self.records[key] = record
            self._index(record)
        self.version += 1

    def _index(self, record: Record) -> None:
        if isinstance(record, DatasetRecord):
            self._children.setdefault(record.parent, {})[record.leaf] = record
            if record.origin:
                self._clones.setdefault(record.origin, {})[record.id] = record
            self._references[record.content] += 1
        elif isinstance(record, SnapshotRecord):
            self._snapshots.setdefault(record.dataset, {})[record.name] = record
            self._references[record.content] += 1
        else:
            self._bookmarks.setdefault(record.dataset, {})[record.name] = record

    def _forget(self, record: Record) -> None:
        if isinstance(record, DatasetRecord):
            self._children[record.parent].pop(record.leaf)
            if record.origin:
                self._clones[record.origin].pop(record.id)
            self._references[record.content] -= 1
        elif isinstance(record, SnapshotRecord):
            self._snapshots[record.dataset].pop(record.name)
            self._references[record.content] -= 1
        else:
            self._bookmarks[record.dataset].pop(record.name)

    # -- by id -------------------------------------------------------------------------------------------------------

    def dataset(self, dataset_id: str) -> DatasetRecord | None:
        """The dataset with this id."""
        record = self.records.get(f"d/{dataset_id}")
        return record if isinstance(record, DatasetRecord) else None

    def snapshot(self, snapshot_id: str) -> SnapshotRecord | None:
        """The snapshot with this id."""
        record = self.records.get(f"s/{snapshot_id}")
        return record if isinstance(record, SnapshotRecord) else None

    def name_of(self, dataset: DatasetRecord) -> DatasetName:
        """The name of a dataset as it is now."""
        parts = [dataset.leaf]
        above = self.dataset(dataset.parent)
        while above is not None:
            parts.append(above.leaf)
            above = self.dataset(above.parent)
        return DatasetName(tuple(reversed(parts)))

    def snapshot_name(self, snapshot: SnapshotRecord) -> SnapshotName:
        """The name of a snapshot as it is now."""
        dataset = self.dataset(snapshot.dataset)
        assert dataset is not None, snapshot
        return SnapshotName(self.name_of(dataset), snapshot.name)

    # -- by name -----------------------------------------------------------------------------------------------------

    def find(self, name: DatasetName) -> DatasetRecord | None:
        """The dataset of that name."""
        found = self._children.get("", {}).get(name.parts[0])
        for part in name.parts[1:]:
            if found is None:
                return None
            found = self._children.get(found.id, {}).get(part)
        return found

    def find_snapshot(self, dataset: DatasetRecord, name: str) -> SnapshotRecord | None:
        """The snapshot of that name."""
        return self._snapshots.get(dataset.id, {}).get(name)

    def find_bookmark(self, dataset: DatasetRecord, name: str) -> BookmarkRecord | None:
        """The bookmark of that name."""
        return self._bookmarks.get(dataset.id, {}).get(name)

    # -- relations ---------------------------------------------------------------------------------------------------

    def walk(self, root: DatasetRecord) -> Iterator[DatasetRecord]:
        """``root`` and everything below, in name order."""
        yield root
        for _, child in sorted(self._children.get(root.id, {}).items()):
            yield from self.walk(child)

    def children(self, dataset: DatasetRecord) -> list[DatasetRecord]:
        """Datasets directly below, in name order."""
        return [child for _, child in sorted(self._children.get(dataset.id, {}).items())]

    def snapshots(self, dataset: DatasetRecord) -> list[SnapshotRecord]:
        """Snapshots, oldest first."""
        return sorted(self._snapshots.get(dataset.id, {}).values(), key=lambda s: s.createtxg)

    def bookmarks(self, dataset: DatasetRecord) -> list[BookmarkRecord]:
        """Bookmarks, oldest first."""
        return sorted(self._bookmarks.get(dataset.id, {}).values(), key=lambda b: (b.createtxg, b.name))

    def newest(self, dataset: DatasetRecord) -> SnapshotRecord | None:
        """The newest snapshot of a dataset."""
        return max(self._snapshots.get(dataset.id, {}).values(), key=lambda s: s.createtxg, default=None)

    def before(self, snapshot: SnapshotRecord) -> SnapshotRecord | None:
        """The snapshot this one builds on: the one before it, or the origin of its dataset."""
        older = [s for s in self._snapshots[snapshot.dataset].values() if s.createtxg < snapshot.createtxg]
        if older:
            return max(older, key=lambda s: s.createtxg)
        dataset = self.dataset(snapshot.dataset)
        return self.snapshot(dataset.origin) if dataset is not None else None

    def base(self, dataset: DatasetRecord) -> SnapshotRecord | None:
        """The snapshot the dataset's present state builds on: its newest, or its origin."""
        return self.newest(dataset) or self.snapshot(dataset.origin)

    def clones(self, snapshot: SnapshotRecord) -> list[DatasetRecord]:
        """Datasets whose origin is this snapshot."""
        return list(self._clones.get(snapshot.id, {}).values())

    # -- content -----------------------------------------------------------------------------------------------------

    def references(self, content: str) -> int:
        """How many records refer to a content file."""
        return self._references[content]

    def contents(self) -> set[str]:
        """Every content file a record refers to."""
        return {content for content, count in self._references.items() if count and content}

    def all_datasets(self) -> list[DatasetRecord]:
        """Every dataset, in no order."""
        return [record for record in self.records.values() if isinstance(record, DatasetRecord)]

    def all_snapshots(self) -> list[SnapshotRecord]:
        """Every snapshot, in no order."""
        return [record for record in self.records.values() if isinstance(record, SnapshotRecord)]

    # -- as seen from outside ----------------------------------------------------------------------------------------

    def dataset_info(self, dataset: DatasetRecord) -> DatasetInfo:
        """A dataset as the contract shows it."""
        origin = self.snapshot(dataset.origin)
        return DatasetInfo(
            name=self.name_of(dataset),
            kind=dataset.kind,
            guid=dataset.guid,
            createtxg=dataset.createtxg,
            creation_s=dataset.creation_s,
            origin=self.snapshot_name(origin) if origin is not None else None,
            volsize_bytes=dataset.volsize_bytes if dataset.is_volume else None,
            volblocksize_bytes=dataset.volblocksize_bytes if dataset.is_volume else None,
            properties=dict(dataset.properties),
        )

    def snapshot_info(self, snapshot: SnapshotRecord) -> SnapshotInfo:
        """A snapshot as the contract shows it."""
        return SnapshotInfo(
            name=self.snapshot_name(snapshot),
            guid=snapshot.guid,
            createtxg=snapshot.createtxg,
            creation_s=snapshot.creation_s,
            volsize_bytes=snapshot.volsize_bytes or None,
        )
