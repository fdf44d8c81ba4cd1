"""Volumes and datasets of the pool: list, create, show, destroy."""

from __future__ import annotations

from collections.abc import Sequence

from agent_image.drivers.base import DatasetInfo, DatasetKind, SnapshotInfo
from agent_image.store_pool import NOT_A_DATASET, Pool, Volume
from imaging.errors import AlreadyExistsError, InvalidArgumentError, InvalidNameError, NotFoundError, WrongKindError
from imaging.names import DatasetName, SnapshotName


def already_exists(name: DatasetName) -> AlreadyExistsError:
    """The error of a request that is not the one that made what is there."""
    err = AlreadyExistsError("dataset already exists")
    err.add_note(str(name))
    return err


class Volumes:
    """Volumes, and datasets in general where a caller destroys one."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def list(self) -> Sequence[Volume]:
        """Every volume of the pool, in name order."""
        return await self._pool.look(self._list)

    def _list(self) -> Sequence[Volume]:
        volumes = self._pool.driver.list(self._pool.root, kind=DatasetKind.VOLUME)
        return self._pool.show_listed(info for info in volumes if not self._pool.is_hidden(info.name))

    async def get(self, wire_id: str) -> Volume:
        """One volume; ``need an id``, ``not found``, ``not a volume``."""
        return await self._pool.find_and(self._show_volume, wire_id)

    def _show_volume(self, info: DatasetInfo | SnapshotInfo) -> Volume:
        if not isinstance(info, DatasetInfo) or info.kind is not DatasetKind.VOLUME:
            raise WrongKindError("not a volume")
        return self._pool.show(info)

    async def create(self, wire_id: str, size_bytes: int) -> Volume:
        """A thick volume with its parents. The same request again is fine; anything else that is there is AlreadyExistsError."""
        if size_bytes <= 0:
            raise InvalidArgumentError("need a valid size")
        if not wire_id:
            raise InvalidArgumentError("need an id")
        name = await self._pool.resolve_new(wire_id)
        async with self._pool.locks.hold(name):
            info = await self._pool.run(self.ensure, name, size_bytes)
            return await self._pool.run(self._pool.show, info)

    def ensure(self, name: DatasetName, size_bytes: int, *, thin: bool = False) -> DatasetInfo:
        """Blocking: the volume of that size, made now or by the same request before; the caller holds the lock."""
        try:
            return self._pool.driver.create_volume(name, size_bytes, thin=thin, parents=True)
        except AlreadyExistsError as err:
            info = self._existing(name, err)
            if info.origin is None and is_size(info, size_bytes):
                return info
            raise already_exists(name) from err

    def _existing(self, name: DatasetName, err: AlreadyExistsError) -> DatasetInfo:
        """What is there; the error itself if it spoke of something else (a volume where a parent should be)."""
        try:
            return self._pool.driver.get(name)
        except NotFoundError:
            raise already_exists(name) from err

    def ensure_clone(self, snapshot: SnapshotName, name: DatasetName) -> DatasetInfo:
        """Blocking: the clone of that snapshot, made now or by the same request before; the caller holds the locks."""
        try:
            return self._pool.driver.clone(snapshot, name, parents=True)
        except AlreadyExistsError as err:
            info = self._existing(name, err)
            size_bytes = self._pool.driver.get_snapshot(snapshot).volsize_bytes
            if info.origin == snapshot and info.volsize_bytes == size_bytes:
                return info
            raise already_exists(name) from err

    async def find_dataset(self, wire_id: str) -> DatasetInfo:
        """The dataset an id names, to destroy it; ``need an id``, ``not found``, ``not a valid dataset``."""
        info = await self._pool.find(wire_id)
        if not isinstance(info, DatasetInfo):
            raise InvalidNameError(NOT_A_DATASET)
        self._pool.check_destroyable(info.name)
        return info


def is_size(info: DatasetInfo, size_bytes: int) -> bool:
    """Whether a volume is what a request for that size makes: the size rounded up to the block size."""
    block_bytes = info.volblocksize_bytes or 1
    return info.kind is DatasetKind.VOLUME and info.volsize_bytes == -(-size_bytes // block_bytes) * block_bytes
