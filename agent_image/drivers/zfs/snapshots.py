"""Snapshots of the zfs driver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agent_image.drivers.base import DatasetKind, SnapshotInfo
from agent_image.drivers.zfs.datasets import SEND_TAG_PREFIX, ZfsDatasets, refuse_busy
from agent_image.drivers.zfs.hidden import is_hidden
from imaging.errors import AlreadyExistsError, BusyError, InvalidArgumentError, InvalidNameError, NotFoundError
from imaging.names import NAME_MAX_BYTES, SnapshotName, is_snapshot_part

HOLD_TAG_MAX_BYTES = 255
"""MAXNAMELEN less the NUL."""


def _refuse_needed(name: SnapshotName, needed: Mapping[SnapshotName, Sequence[str]]) -> None:
    refuse_busy(f"cannot destroy {name}", [user for users in needed.values() for user in users])


class ZfsSnapshots(ZfsDatasets):
    """Adds the calls on snapshots."""

    def snapshot(self, name: SnapshotName, *, recursive: bool = False) -> Sequence[SnapshotInfo]:
        """Take a snapshot, of everything below in the same transaction group."""
        with self._lock.shared():
            datasets = [self._find(name.dataset)]
            if recursive:
                datasets = [info for info in self._index.datasets(name.dataset) if not is_hidden(info.name)]
            names = [SnapshotName.parse(f"{info.name}@{name.snapshot}") for info in datasets]
            for wanted in names:
                if self._index.find_snapshot(wanted) is not None:
                    raise AlreadyExistsError(f"{wanted} exists already")
            self._snapshots_together([str(wanted) for wanted in names])
            identities = self._identities(names)
            made = [
                SnapshotInfo(wanted, identity.guid, identity.createtxg, identity.creation_s, info.volsize_bytes)
                for wanted, info in zip(names, datasets, strict=True)
                if (identity := identities.get(str(wanted))) is not None
            ]
            self._index.put_snapshots(made)
            return made

    def destroy_snapshot(
        self, name: SnapshotName, *, recursive: bool = False, defer: bool = False
    ) -> Sequence[SnapshotName]:
        """Destroy snapshots, all or none; with ``defer`` what is needed is only marked, and is not in the answer."""
        self._destroy_left()
        with self._lock:
            self.get_snapshot(name)
            datasets = self._index.datasets_with_snapshot(name.dataset, name.snapshot) if recursive else [name.dataset]
            doomed = [SnapshotName(dataset, name.snapshot) for dataset in datasets]
            needed = self._needed(doomed)
            if not defer:
                _refuse_needed(name, needed)
            try:
                self._lzc.destroy_snapshots([str(snapshot) for snapshot in doomed], defer=defer)
            except BusyError:  # somebody was quicker, or it is being sent: ZFS does not defer that
                _refuse_needed(name, self._needed(doomed))
                raise
            gone = [snapshot for snapshot in doomed if not needed[snapshot] or not self._lzc.exists(str(snapshot))]
            self._index.remove_snapshots(gone)
            return gone

    def _needed(self, doomed: Sequence[SnapshotName]) -> dict[SnapshotName, list[str]]:
        """What needs each of them; NotFoundError if the first is gone."""
        first, *below = doomed
        return {first: self._snapshot_users(first)} | {snapshot: self._users_if_there(snapshot) for snapshot in below}

    def rollback(self, name: SnapshotName, *, destroy_newer: bool = False) -> None:
        """Make the dataset what the snapshot is; a device somebody has open would change under them, so that is refused."""
        self._destroy_left()
        info = self._find(name.dataset)
        if info.kind is DatasetKind.VOLUME:
            self._wait_unheld([name.dataset], f"cannot roll back to {name}")
        with self._lock:
            newer, bookmarks = self._newer(self.get_snapshot(name), destroy_newer=destroy_newer)
            if newer:
                self._destroy_snapshots_now(newer)
            if bookmarks:
                self._lzc.destroy_bookmarks(bookmarks)
            self._devices.flush(str(name.dataset))  # what was written before must not arrive after
            self._lzc.rollback(str(name.dataset), str(name))
            self._devices.flush(str(name.dataset))
            self._learn(name.dataset)

    def _newer(self, snapshot: SnapshotInfo, *, destroy_newer: bool) -> tuple[list[SnapshotName], list[str]]:
        """What a rollback destroys: snapshots and bookmarks taken later."""
        name = snapshot.name
        entries = self._index.snapshots(name.dataset)
        newer = [entry.name for entry in entries if entry.createtxg > snapshot.createtxg]
        marks = self._lzc.bookmarks(str(name.dataset)).items()
        bookmarks = sorted(f"{name.dataset}#{mark}" for mark, createtxg in marks if createtxg > snapshot.createtxg)
        dependants = [user for entry in newer for user in self._users_if_there(entry)]
        if not destroy_newer:
            still_there = [entry for entry in newer if self._index.find_snapshot(entry) is not None]
            dependants = [str(entry) for entry in still_there] + bookmarks
        refuse_busy(f"cannot roll back to {name}", dependants)
        return newer, bookmarks

    def hold(self, name: SnapshotName, tag: str) -> None:
        """Keep a snapshot from being destroyed."""
        if not tag or "\0" in tag or len(tag.encode("utf-8", "replace")) > HOLD_TAG_MAX_BYTES:
            raise InvalidArgumentError(f"a hold's tag has 1 to {HOLD_TAG_MAX_BYTES} bytes and no NUL")
        with self._lock:
            self.get_snapshot(name)
            self._lzc.hold(str(name), tag)

    def release(self, name: SnapshotName, tag: str) -> None:
        """Undo a hold."""
        with self._lock:
            self.get_snapshot(name)
            if tag not in self._lzc.holds(str(name)):
                raise NotFoundError(f"{name} is not held with tag {tag}")
            self._lzc.release(str(name), tag)
            self._settle(name)

    def holds(self, name: SnapshotName) -> Sequence[str]:
        """Tags that hold the snapshot, without those of running sends."""
        self.get_snapshot(name)
        return [tag for tag in self._lzc.holds(str(name)) if not tag.startswith(SEND_TAG_PREFIX)]

    def bookmark(self, name: SnapshotName, bookmark: str) -> None:
        """Remember the snapshot as ``dataset#bookmark``."""
        if not is_snapshot_part(bookmark) or len(f"{name.dataset}#{bookmark}") > NAME_MAX_BYTES:
            raise InvalidNameError(f"not a valid bookmark name: {bookmark[:NAME_MAX_BYTES]!r}")
        with self._lock:
            self.get_snapshot(name)
            self._lzc.bookmark(f"{name.dataset}#{bookmark}", str(name))
