"""Making, changing and destroying filesystems and volumes of the file driver."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from agent_image.drivers.base import DatasetInfo, DatasetKind
from agent_image.drivers.file_access import FileAccess
from agent_image.drivers.file_pool import refuse_busy
from agent_image.drivers.file_properties import with_properties
from agent_image.drivers.file_records import Change, DatasetRecord, Record, SnapshotRecord
from imaging.errors import AlreadyExistsError, InvalidArgumentError, NoSpaceError
from imaging.names import DatasetName, SnapshotName

VOLBLOCKSIZE_MIN_BYTES = 512
"""ZFS: SPA_MINBLOCKSIZE."""

VOLBLOCKSIZE_MAX_BYTES = 1 << 20
"""What every ZFS with large blocks takes by default; 2.2 and later go higher, and a stream of theirs is still received."""

VOLSIZE_MAX_BYTES = 1 << 43
"""8 TiB: below ext4's 16 TiB limit of a file, above any guest's disk."""


class FileDatasets(FileAccess):
    """Adds the calls on datasets."""

    def __init__(self, *args: object, volblocksize_default_bytes: int, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._volblocksize_default_bytes = _check_volblocksize(volblocksize_default_bytes)

    # -- creating ----------------------------------------------------------------------------------------------------

    def create_filesystem(
        self, name: DatasetName, *, properties: Mapping[str, str] | None = None, parents: bool = False
    ) -> DatasetInfo:
        """Create a filesystem."""
        with self._locked():
            change = Change()
            above = self._place(name, change, parents=parents)
            made = self._new_dataset(above.id, name.leaf, DatasetKind.FILESYSTEM)
            return self._create(change, with_properties(made, properties or {}))

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
        """Create a volume of zeros."""
        block_bytes = _check_volblocksize(volblocksize_bytes or self._volblocksize_default_bytes)
        size_bytes = _round_up(size_bytes, block_bytes, name)
        with self._locked():
            change = Change()
            above = self._place(name, change, parents=parents)
            if not thin:
                self._admit(self._existing(above), size_bytes, f"cannot create {name}")
            made = msgspec.structs.replace(
                self._new_dataset(above.id, name.leaf, DatasetKind.VOLUME),
                volsize_bytes=size_bytes,
                volblocksize_bytes=block_bytes,
                refreservation_bytes=0 if thin else size_bytes,
            )
            return self._create(change, with_properties(made, properties or {}))

    def clone(
        self,
        snapshot: SnapshotName,
        target: DatasetName,
        *,
        properties: Mapping[str, str] | None = None,
        parents: bool = False,
    ) -> DatasetInfo:
        """A writable dataset that starts as the snapshot. It shares the snapshot's file until somebody asks to write."""
        with self._locked() as catalog:
            origin = self._snapshot(snapshot)
            of = catalog.dataset(origin.dataset)
            assert of is not None
            change = Change()
            above = self._place(target, change, parents=parents)
            made = msgspec.structs.replace(
                self._new_dataset(above.id, target.leaf, of.kind),
                origin=origin.id,
                volsize_bytes=origin.volsize_bytes,
                volblocksize_bytes=origin.volblocksize_bytes,
                content=origin.content,
            )
            return self._create(change, with_properties(made, properties or {}))

    def _create(self, change: Change, made: DatasetRecord) -> DatasetInfo:
        change.put(made)
        self._commit(change)
        return self._catalog.dataset_info(made)

    def _existing(self, dataset: DatasetRecord) -> DatasetRecord:
        """The nearest dataset at or above one that may not be committed yet."""
        while self._catalog.dataset(dataset.id) is None:
            above = self._catalog.dataset(dataset.parent)
            if above is None:  # its parent is as new as itself: nothing in between can have a quota
                return self._dataset(self._pool.root)
            dataset = above
        return dataset

    # -- changing ----------------------------------------------------------------------------------------------------

    def set_properties(self, name: DatasetName, properties: Mapping[str, str | None]) -> None:
        """Set or remove properties in one change."""
        with self._locked():
            old = self._dataset(name)
            new = with_properties(old, properties)
            if new.quota_bytes and new.quota_bytes != old.quota_bytes and new.quota_bytes < self._used(old):
                raise NoSpaceError(f"quota of {name} is less than what it already uses")
            change = Change()
            change.put(new)
            self._commit(change)

    def resize(self, name: DatasetName, size_bytes: int) -> DatasetInfo:
        """Change a volume's size."""
        with self._private(name, resizing=True) as volume:  # what snapshots share keeps its size
            size_bytes = _round_up(size_bytes, volume.volblocksize_bytes, name)
            thick = volume.refreservation_bytes > 0
            if thick:
                self._admit(volume, max(0, size_bytes - volume.refreservation_bytes), f"cannot resize {name}")
            resized = msgspec.structs.replace(
                volume, volsize_bytes=size_bytes, refreservation_bytes=size_bytes if thick else 0, synced_mtime_ns=0
            )
            self._resize_content(volume, resized)
            return self._catalog.dataset_info(resized)

    def _resize_content(self, old: DatasetRecord, new: DatasetRecord) -> None:
        """Extend before the record says so and cut after: cut off in between, the file is never too short."""
        change = Change()
        change.put(new)
        try:
            if new.content and new.volsize_bytes > old.volsize_bytes:
                self._contents.resize(new.content, new.volsize_bytes)
            self._commit(change)
        except BaseException:
            if new.content:
                self._contents.resize(new.content, old.volsize_bytes)
            raise
        if new.content:
            self._contents.resize(new.content, new.volsize_bytes)

    def rename(self, name: DatasetName, target: DatasetName) -> None:
        """Rename a dataset with everything below; one record changes."""
        with self._locked() as catalog:
            moved = self._dataset(name)
            self._check_pool(target)
            if not moved.parent:
                raise InvalidArgumentError(f"the root of pool {name} cannot be renamed")
            if target != name and target.is_within(name):
                raise InvalidArgumentError(f"{name} cannot move below itself: {target}")
            change = Change()
            above = self._place(target, change, parents=False)
            self._check_lengths(moved, name, target)
            self._check_quotas(moved, above)
            before = [catalog.name_of(d) for d in catalog.walk(moved) if d.private]
            change.put(msgspec.structs.replace(moved, parent=above.id, leaf=target.leaf))
            self._commit(change)
            self._move_links(before, moved.id)

    def _move_links(self, before: list[DatasetName], dataset_id: str) -> None:
        for old in before:
            self._links.drop(old)
        moved = self._catalog.dataset(dataset_id)
        assert moved is not None
        for volume in self._catalog.walk(moved):
            if volume.private:
                self._links.point(self._catalog.name_of(volume), self._contents.path(volume.content))

    def _check_lengths(self, moved: DatasetRecord, name: DatasetName, target: DatasetName) -> None:
        for dataset in self._catalog.walk(moved):
            old = self._catalog.name_of(dataset)
            new = DatasetName(target.parts + old.parts[len(name.parts) :])
            DatasetName.parse(str(new))
            for snapshot in self._catalog.snapshots(dataset):
                SnapshotName.parse(f"{new}@{snapshot.name}")

    def _check_quotas(self, moved: DatasetRecord, above: DatasetRecord) -> None:
        """Refuse a move below a quota that has no room; the pool itself has, and so has what is above both places."""
        shared = {d.id for d in self._above(moved)}
        for new in self._above(above):
            if new.quota_bytes and new.id not in shared and new.quota_bytes < self._used(new) + self._used(moved):
                raise NoSpaceError(f"quota of {self._catalog.name_of(new)} has no room: no space left on device")

    def promote(self, name: DatasetName) -> None:
        """Make a clone own the history it was cloned from."""
        with self._locked() as catalog:
            clone = self._dataset(name)
            origin = catalog.snapshot(clone.origin)
            if origin is None:
                raise InvalidArgumentError(f"not a clone: {name}")
            former = catalog.dataset(origin.dataset)
            assert former is not None
            moving = [s for s in catalog.snapshots(former) if s.createtxg <= origin.createtxg]
            self._check_promotable(clone, moving)
            change = Change()
            for snapshot in moving:
                change.put(msgspec.structs.replace(snapshot, dataset=clone.id))
            change.put(msgspec.structs.replace(clone, origin=former.origin))
            change.put(msgspec.structs.replace(former, origin=origin.id))
            self._commit(change)

    def _check_promotable(self, clone: DatasetRecord, moving: list[SnapshotRecord]) -> None:
        name = self._catalog.name_of(clone)
        for snapshot in moving:
            SnapshotName.parse(f"{name}@{snapshot.name}")
            if self._catalog.find_snapshot(clone, snapshot.name) is not None:
                raise AlreadyExistsError(f"cannot promote {name}: snapshot exists: {name}@{snapshot.name}")

    # -- destroying --------------------------------------------------------------------------------------------------

    def destroy(self, name: DatasetName, *, recursive: bool = False) -> None:
        """Destroy a dataset, all of it or nothing."""
        with self._locked() as catalog:
            top = self._dataset(name)
            if not top.parent:
                raise InvalidArgumentError(f"the root of pool {name} cannot be destroyed")
            doomed = list(catalog.walk(top))
            refuse_busy(f"cannot destroy {name}", self._dependants(doomed, recursive=recursive))
            names = [catalog.name_of(d) for d in doomed if d.private]
            self._commit(self._destruction(doomed))
            for link in names:
                self._links.drop(link)

    def _dependants(self, doomed: list[DatasetRecord], *, recursive: bool) -> list[str]:
        catalog, top = self._catalog, doomed[0]
        if not recursive:
            below = [str(catalog.name_of(child)) for child in catalog.children(top)]
            below += [str(catalog.snapshot_name(s)) for s in catalog.snapshots(top)]
            if below:
                return below
        going = frozenset(d.id for d in doomed)
        found: list[str] = []
        for dataset in doomed:
            found += self._device_users(dataset)
            for snapshot in catalog.snapshots(dataset):
                found += self._snapshot_users(snapshot, going=going)
        return found

    def _destruction(self, doomed: list[DatasetRecord]) -> Change:
        change = Change()
        going = frozenset(d.id for d in doomed)
        for dataset in doomed:
            belongings: list[Record] = [dataset, *self._catalog.snapshots(dataset), *self._catalog.bookmarks(dataset)]
            for record in belongings:
                change.delete(record)
        for dataset in doomed:
            origin = self._catalog.snapshot(dataset.origin)
            if origin is not None and origin.dataset not in going and self._is_due(origin, going=going):
                change.delete(origin)
        return change


def _check_volblocksize(block_bytes: int) -> int:
    in_range = VOLBLOCKSIZE_MIN_BYTES <= block_bytes <= VOLBLOCKSIZE_MAX_BYTES
    if not in_range or block_bytes & (block_bytes - 1):
        raise InvalidArgumentError(
            f"volblocksize is a power of two from {VOLBLOCKSIZE_MIN_BYTES} to {VOLBLOCKSIZE_MAX_BYTES}, not {block_bytes}"
        )
    return block_bytes


def _round_up(size_bytes: int, block_bytes: int, name: DatasetName) -> int:
    if not 0 < size_bytes <= VOLSIZE_MAX_BYTES:
        raise InvalidArgumentError(f"size of {name} is from 1 to {VOLSIZE_MAX_BYTES} bytes, not {size_bytes}")
    return -(-size_bytes // block_bytes) * block_bytes
