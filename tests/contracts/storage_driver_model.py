"""A storage driver as a few lists in memory: what the rules say, with nothing that makes them fast or durable."""

from __future__ import annotations

from dataclasses import dataclass, field

from imaging.errors import (
    AlreadyExistsError,
    BusyError,
    InvalidArgumentError,
    NotFoundError,
    NotPermittedError,
    WrongKindError,
)
from imaging.names import DatasetName, SnapshotName

BLOCK_BYTES = 512


@dataclass(eq=False)
class ModelSnapshot:
    dataset: ModelDataset
    name: str
    order: int
    content: bytes | None
    """None: of a filesystem."""
    holds: set[str] = field(default_factory=set)
    deferred: bool = False


@dataclass(eq=False)
class ModelDataset:
    name: DatasetName
    content: bytes | None
    origin: ModelSnapshot | None = None
    properties: dict[str, str] = field(default_factory=dict)


class Model:
    """Each call does what the driver should, or raises what the driver should and changes nothing."""

    def __init__(self, root: DatasetName) -> None:
        self.root = ModelDataset(root, None)
        self.datasets = [self.root]
        self.snapshots: list[ModelSnapshot] = []
        self._order = 0

    # -- looking -----------------------------------------------------------------------------------------------------

    def find(self, name: DatasetName) -> ModelDataset | None:
        return next((d for d in self.datasets if d.name == name), None)

    def get(self, name: DatasetName) -> ModelDataset:
        found = self.find(name)
        if found is None:
            raise NotFoundError(str(name))
        return found

    def get_snapshot(self, name: SnapshotName) -> ModelSnapshot:
        for snapshot in self.snapshots:
            if (snapshot.dataset.name, snapshot.name) == (name.dataset, name.snapshot):
                return snapshot
        raise NotFoundError(str(name))

    def below(self, top: ModelDataset) -> list[ModelDataset]:
        return sorted((d for d in self.datasets if d.name.is_within(top.name)), key=lambda d: d.name)

    def of(self, dataset: ModelDataset) -> list[ModelSnapshot]:
        return sorted((s for s in self.snapshots if s.dataset is dataset), key=lambda s: s.order)

    def clones(self, snapshot: ModelSnapshot) -> list[ModelDataset]:
        return [d for d in self.datasets if d.origin is snapshot]

    def listing(self) -> list[tuple[str, str | None]]:
        return [
            (str(d.name), f"{d.origin.dataset.name}@{d.origin.name}" if d.origin else None)
            for d in self.below(self.root)
        ]

    def snapshot_listing(self) -> list[str]:
        return [f"{d.name}@{s.name}" for d in self.below(self.root) for s in self.of(d)]

    # -- datasets ----------------------------------------------------------------------------------------------------

    def _place(self, name: DatasetName) -> None:
        if self.find(name) is not None:
            raise AlreadyExistsError(str(name))
        for depth in range(1, len(name.parts)):
            above = self.get(DatasetName(name.parts[:depth]))
            if above.content is not None:
                raise WrongKindError(str(name))

    def create(self, name: DatasetName, content: bytes | None) -> None:
        self._place(name)
        self.datasets.append(ModelDataset(name, content))

    def clone(self, snapshot: SnapshotName, target: DatasetName) -> None:
        origin = self.get_snapshot(snapshot)
        self._place(target)
        self.datasets.append(ModelDataset(target, origin.content, origin))

    def _volume(self, name: DatasetName) -> tuple[ModelDataset, bytes]:
        found = self.get(name)
        if found.content is None:
            raise WrongKindError(str(name))
        return found, found.content

    def write(self, name: DatasetName, offset: int, data: bytes) -> None:
        volume, content = self._volume(name)
        if volume.properties.get("readonly") == "on":
            raise NotPermittedError(str(name))
        data = data[: max(0, len(content) - offset)]  # a volume has an end
        volume.content = content[:offset] + data + content[offset + len(data) :]

    def resize(self, name: DatasetName, size_bytes: int) -> None:
        volume, content = self._volume(name)
        if size_bytes <= 0:
            raise InvalidArgumentError(str(size_bytes))
        size_bytes = -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
        volume.content = content[:size_bytes].ljust(size_bytes, b"\0")

    def rename(self, name: DatasetName, target: DatasetName) -> None:
        moved = self.get(name)
        if moved is self.root or (target != name and target.is_within(name)):
            raise InvalidArgumentError(str(target))
        self._place(target)
        for dataset in self.below(moved):
            dataset.name = DatasetName(target.parts + dataset.name.parts[len(name.parts) :])

    def promote(self, name: DatasetName) -> None:
        clone = self.get(name)
        origin = clone.origin
        if origin is None:
            raise InvalidArgumentError(str(name))
        former = origin.dataset
        moving = [s for s in self.of(former) if s.order <= origin.order]
        if {s.name for s in moving} & {s.name for s in self.of(clone)}:
            raise AlreadyExistsError(str(name))
        for snapshot in moving:
            snapshot.dataset = clone
        clone.origin, former.origin = former.origin, origin

    def destroy(self, name: DatasetName, *, recursive: bool) -> None:
        top = self.get(name)
        if top is self.root:
            raise InvalidArgumentError(str(name))
        doomed = self.below(top)
        if not recursive and (len(doomed) > 1 or self.of(top)):
            raise BusyError(str(name))
        going = [s for d in doomed for s in self.of(d)]
        if any(s.holds or any(c not in doomed for c in self.clones(s)) for s in going):
            raise BusyError(str(name))
        self.datasets = [d for d in self.datasets if d not in doomed]
        self.snapshots = [s for s in self.snapshots if s not in going]
        self._reap()

    # -- snapshots ---------------------------------------------------------------------------------------------------

    def snapshot(self, name: SnapshotName, *, recursive: bool) -> None:
        top = self.get(name.dataset)
        datasets = self.below(top) if recursive else [top]
        if any(s.name == name.snapshot for d in datasets for s in self.of(d)):
            raise AlreadyExistsError(str(name))
        self._order += 1
        self.snapshots += [ModelSnapshot(d, name.snapshot, self._order, d.content) for d in datasets]

    def receive(self, target: SnapshotName, content: bytes) -> None:
        if self.find(target.dataset) is not None:
            raise AlreadyExistsError(str(target))
        self.create(target.dataset, content)
        self.snapshot(target, recursive=False)

    def _needed(self, snapshot: ModelSnapshot) -> bool:
        return bool(snapshot.holds or self.clones(snapshot))

    def _reap(self) -> None:
        self.snapshots = [s for s in self.snapshots if not s.deferred or self._needed(s)]

    def destroy_snapshot(self, name: SnapshotName, *, recursive: bool, defer: bool) -> None:
        snapshot = self.get_snapshot(name)
        doomed = [snapshot]
        if recursive:
            doomed = [s for d in self.below(snapshot.dataset) for s in self.of(d) if s.name == name.snapshot]
        if not defer and any(map(self._needed, doomed)):
            raise BusyError(str(name))
        for each in doomed:
            each.deferred = True
        self._reap()

    def rollback(self, name: SnapshotName, *, destroy_newer: bool) -> None:
        snapshot = self.get_snapshot(name)
        newer = [s for s in self.of(snapshot.dataset) if s.order > snapshot.order]
        if newer and (not destroy_newer or any(map(self._needed, newer))):
            raise BusyError(str(name))
        self.snapshots = [s for s in self.snapshots if s not in newer]
        snapshot.dataset.content = snapshot.content

    def hold(self, name: SnapshotName, tag: str) -> None:
        snapshot = self.get_snapshot(name)
        if tag in snapshot.holds:
            raise AlreadyExistsError(tag)
        snapshot.holds.add(tag)

    def release(self, name: SnapshotName, tag: str) -> None:
        snapshot = self.get_snapshot(name)
        if tag not in snapshot.holds:
            raise NotFoundError(tag)
        snapshot.holds.remove(tag)
        self._reap()
