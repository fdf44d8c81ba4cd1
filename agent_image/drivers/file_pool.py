"""The part of the file driver everything else stands on: one pool's lock, records, content files and running uses.

How a call works. Under ``_lock`` it reads the catalog, refuses what must be refused and commits one change. Long copying happens
outside the lock, into a content file nothing refers to yet; afterwards, under the lock again, the call checks that what it copied is
still what it meant and commits, or starts over. A crash leaves at most a content file without a record, and ``open`` removes those.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from agent_image.drivers.base import DatasetKind
from agent_image.drivers.file_contents import ContentFiles
from agent_image.drivers.file_links import DeviceLinks
from agent_image.drivers.file_records import (
    Catalog,
    Change,
    DatasetRecord,
    PoolRecord,
    SnapshotRecord,
    new_guid,
    new_id,
)
from agent_image.drivers.file_store import RecordStore
from imaging import files
from imaging.errors import (
    AlreadyExistsError,
    BadDataError,
    BusyError,
    InvalidNameError,
    NotFoundError,
    UnavailableError,
    WrongKindError,
)
from imaging.names import DatasetName, PoolName, SnapshotName


class FilePool:
    """State and shared steps; the classes derived from it add the calls of the contract."""

    def __init__(self, pool: PoolName, state_dir: Path, *, size_bytes: int | None, now: Callable[[], float]) -> None:
        self._pool = pool
        self._directory = state_dir / "pools" / pool.text
        self._links_root = state_dir / "zvol"
        self._size_bytes = size_bytes
        self._now = now
        self._lock = threading.RLock()
        self._pins: Counter[str] = Counter()
        """Snapshot id -> sends and open descriptors of it."""
        self._uses: Counter[str] = Counter()
        """Dataset id -> open descriptors of the volume."""
        self._lock_file: files.LockFile | None = None
        self._is_open = False
        self._store: RecordStore
        self._contents: ContentFiles
        self._links: DeviceLinks
        self._catalog: Catalog
        self._pool_record: PoolRecord

    @property
    def name(self) -> str:
        """The driver's name."""
        return "file"

    @property
    def pool(self) -> PoolName:
        """The pool this driver serves."""
        return self._pool

    # -- life --------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Lock the pool, load its records, remove what a crash left."""
        with self._lock:
            if self._is_open:
                return
            files.make_directory(self._directory)
            lock = files.LockFile(self._directory / "lock").acquire()
            try:
                self._store = RecordStore(self._directory / "records.db")
                try:
                    self._load()
                except BaseException:
                    self._store.close()
                    raise
            except BaseException:
                lock.release()
                raise
            self._lock_file, self._is_open = lock, True

    def _load(self) -> None:
        self._contents = ContentFiles(self._directory / "contents")
        self._links = DeviceLinks(self._links_root, self._pool)
        self._pool_record, self._catalog = self._store.load()
        wanted = self._catalog.contents()
        lost = self._contents.missing(wanted)
        if lost:
            raise BadDataError(f"pool {self._pool} has lost {len(lost)} content files, the first is {lost[0]}")
        self._contents.sweep(wanted)
        if self._catalog.find(self._pool.root) is None:
            change = Change()
            change.put(self._new_dataset("", self._pool.text, DatasetKind.FILESYSTEM))
            self._commit(change)
        self._repair()

    def _repair(self) -> None:
        self._repair_files()
        change = Change()
        if self._pool_record.boot_id != files.boot_id():  # modification times may be older than the bytes: forget them
            self._pool_record = msgspec.structs.replace(self._pool_record, boot_id=files.boot_id())
            for volume in self._catalog.all_datasets():
                if volume.synced_mtime_ns:
                    change.put(msgspec.structs.replace(volume, synced_mtime_ns=0))
        for snapshot in self._catalog.all_snapshots():  # what needed it may have died with the process
            if self._is_due(snapshot):
                change.delete(snapshot)
        if change.puts or change.deletes:
            self._commit(change)

    def _repair_files(self) -> None:
        volumes = [d for d in self._catalog.all_datasets() if d.private]
        for volume in volumes:  # a resize that was cut off: the record decides
            self._contents.resize(volume.content, volume.volsize_bytes)
        for content in self._catalog.contents() - {v.content for v in volumes}:
            self._contents.freeze(content)
        self._links.rebuild({self._catalog.name_of(v): self._contents.path(v.content) for v in volumes})

    def close(self) -> None:
        """Unlock; calls that come later raise UnavailableError."""
        with self._lock:
            if not self._is_open:
                return
            self._is_open = False
            self._store.close()
            if self._lock_file is not None:
                self._lock_file.release()

    # -- finding -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[Catalog]:
        """The catalog, for as long as nobody changes it."""
        with self._lock:
            if not self._is_open:
                raise UnavailableError(f"pool {self._pool} is not open")
            yield self._catalog

    def _check_pool(self, name: DatasetName) -> None:
        if DatasetName.parse(str(name)) != name:  # names may have been put together without being parsed
            raise InvalidNameError(f"not a valid dataset: {name}")
        if name.pool != self._pool:
            raise InvalidNameError(f"{name} is not in pool {self._pool}")

    def _dataset(self, name: DatasetName) -> DatasetRecord:
        self._check_pool(name)
        found = self._catalog.find(name)
        if found is None:
            raise NotFoundError(f"dataset not found: {name}")
        return found

    def _volume(self, name: DatasetName) -> DatasetRecord:
        found = self._dataset(name)
        if not found.is_volume:
            raise WrongKindError(f"not a volume: {name}")
        return found

    def _check_snapshot_name(self, name: SnapshotName) -> None:
        self._check_pool(name.dataset)
        if SnapshotName.parse(str(name)) != name:
            raise InvalidNameError(f"not a valid snapshot: {name}")

    def _snapshot(self, name: SnapshotName) -> SnapshotRecord:
        self._check_pool(name.dataset)
        dataset = self._catalog.find(name.dataset)
        found = self._catalog.find_snapshot(dataset, name.snapshot) if dataset is not None else None
        if found is None:
            raise NotFoundError(f"snapshot not found: {name}")
        return found

    def _volume_snapshot(self, name: SnapshotName) -> SnapshotRecord:
        found = self._snapshot(name)
        if not found.volsize_bytes:
            raise WrongKindError(f"not a snapshot of a volume: {name}")
        return found

    # -- making names ------------------------------------------------------------------------------------------------

    def _new_dataset(self, parent: str, leaf: str, kind: DatasetKind) -> DatasetRecord:
        return DatasetRecord(
            id=new_id(),
            parent=parent,
            leaf=leaf,
            kind=kind,
            guid=new_guid(),
            createtxg=self._pool_record.txg + 1,
            creation_s=int(self._now()),
        )

    def _place(self, name: DatasetName, change: Change, *, parents: bool) -> DatasetRecord:
        """The dataset above a new name, made in ``change`` with all above it if asked; refuses a name that is taken."""
        self._check_pool(name)
        if self._catalog.find(name) is not None:
            raise AlreadyExistsError(f"dataset already exists: {name}")
        above = self._catalog.find(self._pool.root)
        assert above is not None
        for depth in range(2, len(name.parts)):
            wanted = DatasetName(name.parts[:depth])
            found = self._catalog.find(wanted)
            if found is None:
                if not parents:
                    raise NotFoundError(f"parent of {name} not found: {wanted}")
                found = self._new_dataset(above.id, wanted.leaf, DatasetKind.FILESYSTEM)
                change.put(found)
            above = found
            if above.is_volume:
                raise WrongKindError(f"parent of {name} is not a filesystem: {wanted}")
        return above

    # -- committing --------------------------------------------------------------------------------------------------

    @property
    def _next_txg(self) -> int:
        return self._pool_record.txg + 1

    def _commit(self, change: Change) -> None:
        """Make a change durable, then visible, then remove what nothing refers to any more (which may not fail)."""
        record = msgspec.structs.replace(self._pool_record, txg=self._next_txg)
        before = [self._catalog.records.get(key) for key in (*change.puts, *change.deletes)]
        self._store.commit(record, change)
        self._pool_record = record
        self._catalog.apply(change)
        for old in before:
            if isinstance(old, DatasetRecord | SnapshotRecord):
                self._discard([old.content])

    def _discard(self, contents: Iterable[str]) -> None:
        """Remove files no record refers to."""
        for content in contents:
            if content and self._catalog.references(content) == 0:
                self._contents.remove(content)

    # -- who needs it ------------------------------------------------------------------------------------------------

    def _device_users(self, dataset: DatasetRecord) -> list[str]:
        """Who has the volume open, in words; empty if nobody."""
        used = self._uses[dataset.id] > 0 or (dataset.private and self._contents.is_open(dataset.content))
        return [f"{self._catalog.name_of(dataset)} is open"] if used else []

    def _snapshot_users(self, snapshot: SnapshotRecord, *, going: frozenset[str] = frozenset()) -> list[str]:
        """What needs a snapshot: holds, running sends, and clones other than those that go with it."""
        name = self._catalog.snapshot_name(snapshot)
        users = [f"{name} held by {tag}" for tag in snapshot.holds]
        if self._pins[snapshot.id] > 0:
            users.append(f"{name} is being read")
        clones = (c for c in self._catalog.clones(snapshot) if c.id not in going)
        return users + sorted(str(self._catalog.name_of(clone)) for clone in clones)

    def _is_due(self, snapshot: SnapshotRecord, *, going: frozenset[str] = frozenset()) -> bool:
        """Whether a snapshot whose destruction was deferred is needed by nothing but what goes now."""
        return snapshot.deferred and not self._snapshot_users(snapshot, going=going)

    def _reap(self, snapshot_id: str) -> None:
        """Destroy a snapshot whose destruction was deferred, if nothing needs it any more."""
        with self._lock:
            snapshot = self._catalog.snapshot(snapshot_id)
            if self._is_open and snapshot is not None and self._is_due(snapshot):
                change = Change()
                change.delete(snapshot)
                self._commit(change)

    @contextmanager
    def _pinned(self, snapshot: SnapshotRecord) -> Iterator[None]:
        """Keep a snapshot until the block ends."""
        try:
            with self._counted(self._pins, snapshot.id):
                yield
        finally:
            self._reap(snapshot.id)

    @contextmanager
    def _counted(self, counter: Counter[str], key: str) -> Iterator[None]:
        """Count a use until the block ends."""
        with self._lock:
            counter[key] += 1
        try:
            yield
        finally:
            with self._lock:
                counter[key] -= 1
                if counter[key] <= 0:
                    del counter[key]


def refuse_busy(what: str, dependants: list[str]) -> None:
    """Raise BusyError if there are any dependants."""
    if dependants:
        shown = ", ".join(dependants[:5]) + (f" and {len(dependants) - 5} more" if len(dependants) > 5 else "")
        raise BusyError(f"{what}: needed by {shown}", dependants)
