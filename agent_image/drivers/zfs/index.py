"""The index of the pool: what is fixed about each dataset and snapshot, in memory.

It answers get and list without asking ZFS, whose lists cost milliseconds per object. It knows nothing of ZFS itself: the driver puts in
what its own calls did, :mod:`watch` what others did.

A *reading* is a look at ZFS whose result is put in later. What changed in the index in between is newer than the reading, so those
names are left as they are: our own change is never overwritten by an older look. What was left is told, as it has to be looked at again:
somebody else's change may be among it.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from agent_image.drivers.base import DatasetInfo, DatasetKind, SnapshotInfo
from agent_image.drivers.zfs.written import WrittenMemory
from imaging.names import DatasetName, SnapshotName


class Reading:
    """A look at ZFS that is under way; collects the names that change meanwhile."""

    def __init__(self) -> None:
        self._touched: set[tuple[str, ...]] = set()
        self._touched_snapshots: dict[DatasetName, set[str]] = {}
        self.left: set[DatasetName] = set()
        """Datasets that were not put in, or not with all their snapshots."""

    def touch(self, name: DatasetName) -> None:
        """``name`` and what is below changed."""
        self._touched.add(name.parts)

    def touch_snapshot(self, name: SnapshotName) -> None:
        """One snapshot came or went."""
        self._touched_snapshots.setdefault(name.dataset, set()).add(name.snapshot)

    def is_outdated(self, name: DatasetName) -> bool:
        """Whether ``name`` changed since the reading began."""
        return any(name.parts[:length] in self._touched for length in range(1, len(name.parts) + 1))

    def leaves(self, name: DatasetName, snapshot: str | None = None) -> bool:
        """Whether the dataset, or this snapshot of it, must be left as it is, which is noted."""
        return self._noted(name, is_left=self.is_outdated(name) or snapshot in self._touched_snapshots.get(name, ()))

    def leaves_snapshots(self, name: DatasetName) -> bool:
        """The same for all snapshots of a dataset together."""
        return self._noted(name, is_left=self.is_outdated(name) or name in self._touched_snapshots)

    def _noted(self, name: DatasetName, *, is_left: bool) -> bool:
        if is_left:
            self.left.add(name)
        return is_left


class PoolIndex:
    """Datasets and snapshots by name. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._names: list[DatasetName] = []
        self._datasets: dict[DatasetName, DatasetInfo] = {}
        self._snapshots: dict[DatasetName, dict[str, SnapshotInfo]] = {}
        self._clones: dict[SnapshotName, set[DatasetName]] = {}
        self._readings: list[Reading] = []
        self.written = WrittenMemory()

    # -- answers -----------------------------------------------------------------------------------------------------

    def find(self, name: DatasetName) -> DatasetInfo | None:
        """The dataset, or None."""
        return self._datasets.get(name)

    def find_snapshot(self, name: SnapshotName) -> SnapshotInfo | None:
        """The snapshot, or None."""
        with self._lock:
            return self._snapshots.get(name.dataset, {}).get(name.snapshot)

    def datasets(self, root: DatasetName, kind: DatasetKind | None = None) -> list[DatasetInfo]:
        """``root`` and what is below, in name order."""
        with self._lock:
            found = [self._datasets[name] for name in self._subtree(root)]
        return [info for info in found if kind is None or info.kind is kind]

    def children(self, name: DatasetName) -> list[DatasetName]:
        """What lies directly below, in name order."""
        with self._lock:
            return [below for below in self._subtree(name) if len(below.parts) == len(name.parts) + 1]

    def snapshots(self, name: DatasetName) -> list[SnapshotInfo]:
        """Snapshots of one dataset, oldest first."""
        with self._lock:
            found = list(self._snapshots.get(name, {}).values())
        return sorted(found, key=lambda info: (info.createtxg, info.name.snapshot))

    def clones(self, snapshot: SnapshotName) -> list[DatasetName]:
        """Datasets whose origin is ``snapshot``, by name."""
        with self._lock:
            return sorted(self._clones.get(snapshot, ()))

    def datasets_with_snapshot(self, root: DatasetName, snapshot: str) -> Sequence[DatasetName]:
        """Datasets at and below ``root`` that have a snapshot of that name."""
        with self._lock:
            return [name for name in self._subtree(root) if snapshot in self._snapshots.get(name, {})]

    def _subtree(self, root: DatasetName) -> Iterator[DatasetName]:
        start = bisect.bisect_left(self._names, root)
        for position in range(start, len(self._names)):
            name = self._names[position]
            if not name.is_within(root):
                return
            yield name

    # -- changes -----------------------------------------------------------------------------------------------------

    def put(self, info: DatasetInfo) -> None:
        """Add or replace a dataset; its snapshots stay."""
        with self._lock:
            self._touch(info.name)
            self._put(info)

    def put_snapshots(self, infos: Iterable[SnapshotInfo]) -> None:
        """Add or replace snapshots; those of an unknown dataset are left out."""
        with self._lock:
            for info in infos:
                self._touch_snapshot(info.name)
                if info.name.dataset in self._datasets:
                    self._snapshots.setdefault(info.name.dataset, {})[info.name.snapshot] = info

    def replace_snapshots(self, name: DatasetName, infos: Iterable[SnapshotInfo]) -> None:
        """These are all snapshots of the dataset."""
        with self._lock:
            self._touch(name)
            if name in self._datasets:
                self._snapshots[name] = {info.name.snapshot: info for info in infos}

    def remove(self, name: DatasetName) -> None:
        """Forget a dataset, its snapshots and everything below."""
        with self._lock:
            self._touch(name)
            for below in list(self._subtree(name)):
                self._remove(below)

    def remove_snapshots(self, names: Iterable[SnapshotName]) -> None:
        """Forget snapshots."""
        with self._lock:
            for name in names:
                self._touch_snapshot(name)
                self._snapshots.get(name.dataset, {}).pop(name.snapshot, None)

    def rename(self, name: DatasetName, target: DatasetName) -> None:
        """Move a dataset with all below; origins that named its snapshots follow."""
        with self._lock:
            self._touch(name)
            self._touch(target)
            moved = [(self._datasets[below], self._snapshots.get(below, {})) for below in self._subtree(name)]
            for info, _ in moved:
                self._remove(info.name)
            for info, snapshots in moved:
                new = _moved(info.name, name, target)
                self._put(replace(info, name=new))
                self._snapshots[new] = {
                    key: replace(entry, name=SnapshotName(new, key)) for key, entry in snapshots.items()
                }
            self._move_origins(name, target)

    def _move_origins(self, name: DatasetName, target: DatasetName) -> None:
        for snapshot in [snapshot for snapshot in self._clones if snapshot.dataset.is_within(name)]:
            origin = SnapshotName(_moved(snapshot.dataset, name, target), snapshot.snapshot)
            for clone in list(self._clones[snapshot]):
                self._touch(clone)
                self._put(replace(self._datasets[clone], origin=origin))

    def _put(self, info: DatasetInfo) -> None:
        old = self._datasets.get(info.name)
        if old is None:
            bisect.insort(self._names, info.name)
        elif old.origin is not None:
            self._unlink(old.origin, info.name)
        self._datasets[info.name] = info
        if info.origin is not None:
            self._clones.setdefault(info.origin, set()).add(info.name)

    def _remove(self, name: DatasetName) -> None:
        info = self._datasets.pop(name)
        position = bisect.bisect_left(self._names, name)
        del self._names[position]
        self._snapshots.pop(name, None)
        if info.origin is not None:
            self._unlink(info.origin, name)

    def _unlink(self, origin: SnapshotName, clone: DatasetName) -> None:
        clones = self._clones.get(origin, set())
        clones.discard(clone)
        if not clones:
            self._clones.pop(origin, None)

    # -- readings ----------------------------------------------------------------------------------------------------

    def _touch(self, name: DatasetName) -> None:
        for reading in self._readings:
            reading.touch(name)

    def _touch_snapshot(self, name: SnapshotName) -> None:
        for reading in self._readings:
            reading.touch_snapshot(name)

    @contextlib.contextmanager
    def reading(self) -> Iterator[Reading]:
        """Begin a look at ZFS before looking."""
        reading = Reading()
        with self._lock:
            self._readings.append(reading)
        try:
            yield reading
        finally:
            with self._lock:
                self._readings.remove(reading)

    def apply(self, reading: Reading, name: DatasetName, info: DatasetInfo | None) -> None:
        """Put in what the reading found about one dataset (None: it is gone)."""
        with self._lock:
            if reading.leaves(name):
                return
            if info is None and self._is_arriving(name):
                return
            if info is None:
                for below in list(self._subtree(name)):
                    self._remove(below)
            else:
                self._put(info)

    def apply_snapshots(self, reading: Reading, name: DatasetName, snapshots: Iterable[SnapshotInfo]) -> None:
        """Put in all snapshots the reading found on one dataset."""
        with self._lock:
            if not reading.leaves_snapshots(name) and name in self._datasets:
                self._snapshots[name] = {info.name.snapshot: info for info in snapshots}

    def apply_snapshot(self, reading: Reading, name: SnapshotName, info: SnapshotInfo | None) -> None:
        """Put in what the reading found about one snapshot (None: it is gone)."""
        with self._lock:
            if reading.leaves(name.dataset, name.snapshot) or name.dataset not in self._datasets:
                return
            entries = self._snapshots.setdefault(name.dataset, {})
            if info is None:
                entries.pop(name.snapshot, None)
            else:
                entries[name.snapshot] = info

    def apply_all(self, reading: Reading, datasets: Iterable[DatasetInfo], snapshots: Iterable[SnapshotInfo]) -> None:
        """Put in a reading of the whole pool; what it did not see is gone."""
        by_dataset: dict[DatasetName, list[SnapshotInfo]] = {}
        for entry in snapshots:
            by_dataset.setdefault(entry.name.dataset, []).append(entry)
        self.written.forget()
        with self._lock:
            seen = set()
            for info in datasets:
                seen.add(info.name)
                self.apply(reading, info.name, info)
                self.apply_snapshots(reading, info.name, by_dataset.get(info.name, ()))
            for name in [name for name in self._names if name not in seen and not reading.leaves(name)]:
                if not self._is_arriving(name):
                    self._remove(name)

    def _is_arriving(self, name: DatasetName) -> bool:
        """Whether we are receiving it: ZFS does not show it yet."""
        info = self._datasets.get(name)
        return info is not None and info.guid == 0


def _moved(name: DatasetName, old: DatasetName, new: DatasetName) -> DatasetName:
    return DatasetName(new.parts + name.parts[len(old.parts) :])
