"""Snapshots of the pool: list, take, destroy, roll back."""

from __future__ import annotations

from collections.abc import Sequence

from agent_image.drivers.base import DatasetInfo, SnapshotInfo
from agent_image.store_pool import Pool, Snapshot
from imaging.errors import InvalidArgumentError, InvalidNameError, NotFoundError, WrongKindError
from imaging.names import DatasetName, SnapshotName, is_snapshot_part


class Snapshots:
    """Snapshots, by the ids of requests."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def list(self, wire_id: str) -> Sequence[Snapshot]:
        """Snapshots of a dataset and all below; without an id of the whole pool; the id of a snapshot gives itself."""
        name = await self._pool.resolve(wire_id) if wire_id else self._pool.root
        if isinstance(name, SnapshotName):
            info = await self._pool.get_snapshot(name)
            return await self._pool.look(self._pool.show_snapshots, [info.name])
        await self._pool.get(name)
        return await self._pool.look(self._list, name)

    def _list(self, root: DatasetName) -> Sequence[Snapshot]:
        infos = self._pool.driver.list_snapshots(root)
        return self._pool.show_snapshots([info.name for info in infos if not self._pool.is_hidden(info.name.dataset)])

    async def get(self, wire_id: str) -> Snapshot:
        """One snapshot; ``need an id``, ``not found``, ``not a snapshot``, ``not a valid dataset``."""
        info = await self.find(wire_id)
        return (await self._show([info.name]))[0]

    async def find(self, wire_id: str) -> SnapshotInfo:
        """What is fixed about one snapshot; the same errors."""
        info = await self._pool.find(wire_id)
        if not isinstance(info, SnapshotInfo):
            raise WrongKindError("not a snapshot")
        return info

    async def _show(self, names: Sequence[SnapshotName]) -> Sequence[Snapshot]:
        shown = await self._pool.look(self._pool.show_snapshots, names)
        if len(shown) != len(names):
            raise NotFoundError("not found")
        return shown

    async def create(self, wire_id: str, dest: str, *, recursive: bool) -> Sequence[Snapshot]:
        """Take a snapshot (with ``recursive`` of everything below at one instant); what was made."""
        info = await self._pool.find(wire_id)
        if not isinstance(info, DatasetInfo):
            raise InvalidNameError("cannot create a snapshot of a snapshot")
        if not dest:
            raise InvalidArgumentError("need a dest")
        if not is_snapshot_part(dest):
            raise InvalidArgumentError("invalid snapshot dest")
        name = info.name @ dest
        async with self._pool.locks.hold(info.name):
            made = await self._pool.run(self._pool.driver.snapshot, name, recursive=recursive)
            return await self._show([one.name for one in made if not self._pool.is_hidden(one.name.dataset)])

    async def destroy(self, wire_id: str, *, recursive: bool, defer: bool) -> Sequence[Snapshot]:
        """Destroy a snapshot (with ``recursive`` also those of that name below); what was destroyed, not what is deferred."""
        info = await self.find(wire_id)
        async with self._pool.locks.hold(info.name.dataset):
            return await self._pool.run(self._destroy, info.name, recursive=recursive, defer=defer)

    def _destroy(self, name: SnapshotName, *, recursive: bool, defer: bool) -> Sequence[Snapshot]:
        doomed = [name]
        if recursive:
            infos = self._pool.driver.list_snapshots(name.dataset)
            doomed = [info.name for info in infos if info.name.snapshot == name.snapshot]
        # Sizes can only be read before; the driver says what really went.
        sizes = {shown.name: shown for shown in self._pool.show_snapshots(doomed)}
        gone = self._pool.driver.destroy_snapshot(name, recursive=recursive, defer=defer)
        return [sizes.get(one, Snapshot(one, 0)) for one in gone if not self._pool.is_hidden(one.dataset)]

    async def rollback(self, wire_id: str, *, destroy_newer: bool) -> Snapshot:
        """Make the dataset what the snapshot is; the snapshot."""
        info = await self.find(wire_id)
        async with self._pool.locks.hold(info.name.dataset):
            await self._pool.run(self._pool.driver.rollback, info.name, destroy_newer=destroy_newer)
            return (await self._show([info.name]))[0]
