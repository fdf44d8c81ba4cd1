"""Snapshots of the file driver: taking them at one instant, going back to them, keeping and destroying them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import msgspec

from agent_image.drivers.base import SnapshotInfo
from agent_image.drivers.file_access import ATTEMPTS_MAX
from agent_image.drivers.file_contents import SNAPSHOT_MODE, VOLUME_MODE
from agent_image.drivers.file_datasets import FileDatasets
from agent_image.drivers.file_pool import refuse_busy
from agent_image.drivers.file_records import (
    NO_CONTENT,
    BookmarkRecord,
    Change,
    DatasetRecord,
    SnapshotRecord,
    new_guid,
    new_id,
)
from imaging import files
from imaging.errors import AlreadyExistsError, BusyError, InvalidArgumentError, InvalidNameError, NotFoundError
from imaging.names import NAME_MAX_BYTES, SnapshotName, is_snapshot_part

HOLD_TAG_MAX_BYTES = 255
"""ZFS: MAXNAMELEN less the NUL."""


@dataclass(slots=True)
class _Part:
    """One dataset of a snapshot that is being taken."""

    dataset: DatasetRecord
    content: str | None
    """What the dataset's bytes equal; None until they are copied."""
    mtime_ns: int = 0
    """Of the private file: while it lasts, nobody has written."""
    fd: int = -1


class _ChangedError(Exception):
    """Somebody wrote between the beginning and the end of a copy."""


class FileSnapshots(FileDatasets):
    """Adds the calls on snapshots."""

    # -- taking ------------------------------------------------------------------------------------------------------

    def snapshot(self, name: SnapshotName, *, recursive: bool = False) -> Sequence[SnapshotInfo]:
        """Take a snapshot.

        Files are marked first and looked at last: if no mark is gone, the moment between is the instant of all of them.
        """
        for _ in range(ATTEMPTS_MAX):
            made: list[str] = []
            try:
                with ExitStack() as opened:
                    parts = self._begin_snapshot(name, opened, recursive=recursive)
                    with self._copies(parts, made):
                        self._check_marks(parts)
                infos = self._commit_snapshot(name, parts)
            except _ChangedError:
                continue
            finally:
                self._discard(made)
            return infos
        raise BusyError(f"cannot take {name}: the volume is written to all the time", [f"{name.dataset} is open"])

    def _begin_snapshot(self, name: SnapshotName, opened: ExitStack, *, recursive: bool) -> list[_Part]:
        with self._locked() as catalog:
            self._check_snapshot_name(name)
            top = self._dataset(name.dataset)
            datasets = list(catalog.walk(top)) if recursive else [top]
            for dataset in datasets:
                SnapshotName.parse(f"{catalog.name_of(dataset)}@{name.snapshot}")
                if catalog.find_snapshot(dataset, name.snapshot) is not None:
                    raise AlreadyExistsError(f"snapshot already exists: {catalog.name_of(dataset)}@{name.snapshot}")
            return [self._begin_part(dataset, name, opened) for dataset in datasets]

    def _begin_part(self, dataset: DatasetRecord, name: SnapshotName, opened: ExitStack) -> _Part:
        content = self._settled_content(dataset)
        if content is not None and (not content or self._catalog.references(content)):
            return _Part(dataset, content, dataset.synced_mtime_ns)
        self._admit(dataset, self._contents.allocated(dataset.content), f"cannot take {name}")
        mtime_ns = self._contents.mark(dataset.content)
        fd = opened.enter_context(self._contents.open(dataset.content, dataset.volsize_bytes))
        return _Part(dataset, None, mtime_ns, fd)

    @contextmanager
    def _copies(self, parts: list[_Part], made: list[str]) -> Iterator[None]:
        """Copy what must be copied; the copies are durable after the block, and gone if it raises."""
        with ExitStack() as copies:
            for part in parts:
                if part.content is not None:
                    continue
                if next(files.data_ranges(part.fd), None) is None:
                    part.content = NO_CONTENT
                    continue
                part.content, fd = copies.enter_context(self._contents.new(mode=SNAPSHOT_MODE))
                made.append(part.content)
                files.copy_file(part.fd, fd)
            yield

    def _check_marks(self, parts: list[_Part]) -> None:
        for part in parts:
            if part.dataset.private and self._contents.mtime_ns(part.dataset.content) != part.mtime_ns:
                raise _ChangedError

    def _commit_snapshot(self, name: SnapshotName, parts: list[_Part]) -> list[SnapshotInfo]:
        with self._locked() as catalog:
            if self._has_changed(name, parts):
                raise _ChangedError
            change, taken = Change(), []
            for part in parts:
                taken.append(self._snapshot_record(part, name.snapshot))
                change.put(taken[-1])
                if part.fd >= 0 and not self._device_users(part.dataset):
                    change.put(self._synced(part))
            self._commit(change)
            for snapshot in taken:
                if snapshot.content:
                    self._contents.freeze(snapshot.content)
            return [catalog.snapshot_info(snapshot) for snapshot in taken]

    def _has_changed(self, name: SnapshotName, parts: list[_Part]) -> bool:
        """Whether the datasets are no longer those that were copied (``_dataset`` raises if the first is gone)."""
        catalog, top = self._catalog, self._dataset(name.dataset)
        if any(catalog.dataset(part.dataset.id) is not part.dataset for part in parts) or parts[0].dataset is not top:
            return True
        if len(parts) > 1 and [p.dataset for p in parts] != list(catalog.walk(top)):
            return True
        taken = any(catalog.find_snapshot(part.dataset, name.snapshot) is not None for part in parts)
        lost = any(part.content and not self._contents.path(part.content).exists() for part in parts)
        return taken or lost

    def _snapshot_record(self, part: _Part, name: str) -> SnapshotRecord:
        assert part.content is not None
        return SnapshotRecord(
            id=new_id(),
            dataset=part.dataset.id,
            name=name,
            guid=new_guid(),
            createtxg=self._next_txg,
            creation_s=int(self._now()),
            volsize_bytes=part.dataset.volsize_bytes,
            volblocksize_bytes=part.dataset.volblocksize_bytes,
            content=part.content,
        )

    def _synced(self, part: _Part) -> DatasetRecord:
        """Remember that the volume equals its snapshot.

        Not while somebody has it open: a direct write that was on its way when the file was marked may land after the copy without
        another change of the modification time.
        """
        assert part.content is not None
        return msgspec.structs.replace(part.dataset, synced_content=part.content, synced_mtime_ns=part.mtime_ns)

    # -- destroying --------------------------------------------------------------------------------------------------

    def destroy_snapshot(
        self, name: SnapshotName, *, recursive: bool = False, defer: bool = False
    ) -> Sequence[SnapshotName]:
        """Destroy a snapshot; with ``defer`` what is needed is only marked, and is not in the answer."""
        with self._locked() as catalog:
            top = self._snapshot(name)
            doomed = [top]
            if recursive:
                found = (catalog.find_snapshot(d, name.snapshot) for d in catalog.walk(self._dataset(name.dataset)))
                doomed = [snapshot for snapshot in found if snapshot is not None]
            needed = {s.id: self._snapshot_users(s) for s in doomed}
            if not defer:
                refuse_busy(f"cannot destroy {name}", [user for users in needed.values() for user in users])
            change, gone = Change(), [s for s in doomed if not needed[s.id]]
            for snapshot in doomed:
                if needed[snapshot.id]:
                    change.put(msgspec.structs.replace(snapshot, deferred=True))
                else:
                    change.delete(snapshot)
            names = [catalog.snapshot_name(s) for s in gone]
            self._commit(change)
            return names

    # -- going back --------------------------------------------------------------------------------------------------

    def rollback(self, name: SnapshotName, *, destroy_newer: bool = False) -> None:
        """Make the dataset what the snapshot is."""
        for _ in range(ATTEMPTS_MAX):
            with ExitStack() as opened:
                with self._locked():
                    snapshot = self._snapshot(name)
                    dataset = self._dataset(name.dataset)
                    newer = self._newer(snapshot, dataset, destroy_newer=destroy_newer)
                    if not dataset.private:
                        self._commit_rollback(self._rolled_back(dataset, snapshot), newer)
                        return
                    fd = opened.enter_context(self._contents.open(snapshot.content, snapshot.volsize_bytes))
                content = self._contents.copy_of(fd, snapshot.volsize_bytes, mode=VOLUME_MODE)
            if self._replace_private(dataset, snapshot, content, destroy_newer=destroy_newer):
                return
        raise BusyError(f"{name.dataset} kept changing while it was rolled back")

    def _replace_private(
        self, dataset: DatasetRecord, snapshot: SnapshotRecord, content: str, *, destroy_newer: bool
    ) -> bool:
        with self._locked() as catalog:
            try:
                if catalog.dataset(dataset.id) is not dataset or catalog.snapshot(snapshot.id) is not snapshot:
                    return False
                newer = self._newer(snapshot, dataset, destroy_newer=destroy_newer)
                rolled = self._as_private(self._rolled_back(dataset, snapshot), content, snapshot.content)
                self._commit_rollback(rolled, newer)
                self._links.point(catalog.name_of(rolled), self._contents.path(content))
            finally:
                self._discard([content])
            return True

    def _newer(
        self, snapshot: SnapshotRecord, dataset: DatasetRecord, *, destroy_newer: bool
    ) -> list[SnapshotRecord | BookmarkRecord]:
        """What a rollback destroys; BusyError if that was not asked for or something needs it."""
        catalog = self._catalog
        name = catalog.name_of(dataset)
        snapshots = [s for s in catalog.snapshots(dataset) if s.createtxg > snapshot.createtxg]
        bookmarks = [b for b in catalog.bookmarks(dataset) if b.createtxg > snapshot.createtxg]
        dependants = [user for s in snapshots for user in self._snapshot_users(s)]
        if not destroy_newer:
            dependants = [f"{name}@{s.name}" for s in snapshots] + [f"{name}#{b.name}" for b in bookmarks]
        refuse_busy(f"cannot roll back to {name}@{snapshot.name}", dependants + self._device_users(dataset))
        return [*snapshots, *bookmarks]

    def _rolled_back(self, dataset: DatasetRecord, snapshot: SnapshotRecord) -> DatasetRecord:
        return msgspec.structs.replace(
            dataset,
            content=snapshot.content,
            volsize_bytes=snapshot.volsize_bytes,
            volblocksize_bytes=snapshot.volblocksize_bytes,
        )

    def _commit_rollback(self, rolled: DatasetRecord, newer: list[SnapshotRecord | BookmarkRecord]) -> None:
        change = Change()
        change.put(rolled)
        for record in newer:
            change.delete(record)
        self._commit(change)

    # -- keeping -----------------------------------------------------------------------------------------------------

    def hold(self, name: SnapshotName, tag: str) -> None:
        """Keep a snapshot from being destroyed."""
        if not tag or "\0" in tag or len(tag.encode("utf-8", "replace")) > HOLD_TAG_MAX_BYTES:
            raise InvalidArgumentError(f"a hold's tag has 1 to {HOLD_TAG_MAX_BYTES} bytes and no NUL")
        with self._locked():
            snapshot = self._snapshot(name)
            if tag in snapshot.holds:
                raise AlreadyExistsError(f"{name} is already held by {tag}")
            self._put_holds(snapshot, (*snapshot.holds, tag))

    def release(self, name: SnapshotName, tag: str) -> None:
        """Undo a hold."""
        with self._locked():
            snapshot = self._snapshot(name)
            if tag not in snapshot.holds:
                raise NotFoundError(f"{name} is not held by {tag}")
            self._put_holds(snapshot, tuple(t for t in snapshot.holds if t != tag))
            self._reap(snapshot.id)

    def _put_holds(self, snapshot: SnapshotRecord, holds: tuple[str, ...]) -> None:
        change = Change()
        change.put(msgspec.structs.replace(snapshot, holds=holds))
        self._commit(change)

    def holds(self, name: SnapshotName) -> Sequence[str]:
        """Tags that hold the snapshot."""
        with self._locked():
            return sorted(self._snapshot(name).holds)

    def bookmark(self, name: SnapshotName, bookmark: str) -> None:
        """Remember the snapshot's guid."""
        if not is_snapshot_part(bookmark) or len(f"{name.dataset}#{bookmark}") > NAME_MAX_BYTES:
            raise InvalidNameError(f"not a valid name of a bookmark: {bookmark[:NAME_MAX_BYTES]!r}")
        with self._locked() as catalog:
            snapshot = self._snapshot(name)
            dataset = self._dataset(name.dataset)
            if catalog.find_bookmark(dataset, bookmark) is not None:
                raise AlreadyExistsError(f"bookmark already exists: {name.dataset}#{bookmark}")
            change = Change()
            change.put(
                BookmarkRecord(
                    id=new_id(),
                    dataset=dataset.id,
                    name=bookmark,
                    guid=snapshot.guid,
                    createtxg=snapshot.createtxg,
                    creation_s=snapshot.creation_s,
                )
            )
            self._commit(change)
