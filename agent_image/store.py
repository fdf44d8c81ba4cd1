"""ImageStore: everything the agent does, without JSON, HTTP or SQL. One object that methods and the web layer call."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from agent_image.drivers.base import DatasetInfo, SnapshotInfo
from agent_image.fetch import FetchOrder
from agent_image.guests import DiskRequest, GuestDisk, Guests
from agent_image.records import ImageRecord
from agent_image.store_images import Images, is_image_id
from agent_image.store_pool import Pool, Snapshot, Volume
from agent_image.store_snapshots import Snapshots
from agent_image.store_volumes import Volumes
from agent_image.workers import FetchPool
from imaging.errors import ConflictError, NotFoundError, NotPermittedError
from imaging.names import SnapshotName

T = TypeVar("T")


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Await a change of several steps; a caller that is cancelled meanwhile does not cut it in two."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _as_ordered(record: ImageRecord, order: FetchOrder) -> ImageRecord:
    """The image, unless the caller named another content: it may be here already, or its fetch be shared with others."""
    ours, wanted = record.digest.partition(":"), order.digest.partition(":")
    if ours[0] == wanted[0] and ours != wanted:
        raise ConflictError(f"image {record.id} is {record.digest}, not {order.digest}")
    return record


class ImageStore:
    """Images, volumes, snapshots, clones and guests of one pool.

    Ids are those of requests (relative to the pool); what is returned carries full names. Errors are those of
    :mod:`imaging.errors`, with the texts clients know, checked in the order of the wire's specification.
    """

    def __init__(
        self, pool: Pool, images: Images, volumes: Volumes, snapshots: Snapshots, guests: Guests, fetches: FetchPool
    ) -> None:
        self._pool = pool
        self._images = images
        self._volumes = volumes
        self._snapshots = snapshots
        self._guests = guests
        self._fetches = fetches

    async def open(self) -> None:
        """Make the layout, bring records and pool together, go on with what was left."""
        await self._pool.open()
        unfinished = await self._fetches.recover()
        await self._images.reconcile(unfinished)
        self._fetches.start()

    async def tidy(self) -> None:
        """Now and then: forget old results, destroy deleted images that have become free."""
        await self._fetches.forget_results()
        await self._images.destroyed([])

    # -- images ------------------------------------------------------------------------------------------------------

    async def list_images(self, *, pending: bool = False) -> Sequence[ImageRecord]:
        """All complete images; with ``pending`` also those on their way."""
        records = self._images.records.list()
        if not pending:
            return records
        complete = {record.id for record in records}
        return [*records, *(one for one in await self._fetches.list_pending() if one.id not in complete)]

    async def get_image(self, image_id: str, *, pending: bool = False) -> ImageRecord:
        """One image; ``not found``. With ``pending`` also one on its way, or why its last fetch was given up."""
        record = self._images.records.find(image_id)
        if record is None and pending and is_image_id(image_id):
            record = await self._fetches.find_pending(image_id) or await self._fetches.find_failed(image_id)
        if record is None:
            raise NotFoundError("not found")
        return record

    async def request_image(self, order: FetchOrder, *, wait: bool = True) -> ImageRecord:
        """Have an image: at once if it is here, else when it was fetched; without ``wait`` what is known now."""
        record = self._images.records.find(order.id)
        if record is not None:
            return _as_ordered(record, order)
        job = await self._fetches.submit(order)
        if wait:
            return _as_ordered(await self._fetches.wait(job), order)
        # It may be complete already; find_pending is None then.
        pending = await self._fetches.find_pending(order.id)
        return pending or await self._fetches.wait(job)

    async def delete_image(self, image_id: str) -> ImageRecord:
        """Forget an image, or stop fetching it; ``not found``."""
        return await to_its_end(self._delete_image(image_id))

    async def _delete_image(self, image_id: str) -> ImageRecord:
        while True:
            if self._images.records.find(image_id) is not None:
                return await self._images.delete(image_id)
            cancelled = await self._fetches.cancel(image_id) if is_image_id(image_id) else None
            if cancelled is not None:
                return cancelled
            # Published between the two looks: it has a record now and is deleted in the next turn.
            self._images.records.get(image_id)

    async def clone_image(self, image_id: str, dest: str) -> Volume:
        """A clone of an image at a full name; ``need dest``, ``not found``."""
        return await to_its_end(self._images.clone(image_id, dest))

    # -- volumes -----------------------------------------------------------------------------------------------------

    async def list_volumes(self) -> Sequence[Volume]:
        """Every volume of the pool."""
        return await self._volumes.list()

    async def get_volume(self, wire_id: str) -> Volume:
        """One volume; ``need an id``, ``not found``, ``not a volume``."""
        return await self._volumes.get(wire_id)

    async def create_volume(self, wire_id: str, size_bytes: int) -> Volume:
        """A thick volume; ``need a valid size``, ``need an id``."""
        return await to_its_end(self._volumes.create(wire_id, size_bytes))

    async def delete_dataset(self, wire_id: str) -> Volume:
        """Destroy a dataset and all below; ``need an id``, ``not found``, ``not a valid dataset``."""
        return await to_its_end(self._delete_dataset(wire_id))

    async def _delete_dataset(self, wire_id: str) -> Volume:
        info = await self._volumes.find_dataset(wire_id)
        async with self._pool.locks.hold(info.name):
            shown = await self._pool.run(self._show_and_destroy, info)
        await self._images.destroyed([info.name])
        return shown

    def _show_and_destroy(self, info: DatasetInfo) -> Volume:
        try:
            shown = self._pool.show_as_is(info)
            self._pool.driver.destroy(info.name, recursive=True)
        except NotFoundError as err:
            raise NotFoundError("not found") from err
        return shown

    # -- snapshots ---------------------------------------------------------------------------------------------------

    async def list_snapshots(self, wire_id: str) -> Sequence[Snapshot]:
        """Snapshots of a dataset and all below, of the whole pool, or one itself; ``not found``."""
        return await self._snapshots.list(wire_id)

    async def get_snapshot(self, wire_id: str) -> Snapshot:
        """One snapshot; ``need an id``, ``not found``, ``not a snapshot``."""
        return await self._snapshots.get(wire_id)

    async def find_snapshot(self, wire_id: str) -> SnapshotInfo:
        """What is fixed about one snapshot; the same errors."""
        return await self._snapshots.find(wire_id)

    async def create_snapshot(self, wire_id: str, dest: str, *, recursive: bool = False) -> Sequence[Snapshot]:
        """Take a snapshot; what was made."""
        return await to_its_end(self._snapshots.create(wire_id, dest, recursive=recursive))

    async def delete_snapshot(
        self, wire_id: str, *, recursive: bool = False, defer: bool = False
    ) -> Sequence[Snapshot]:
        """Destroy a snapshot; what was destroyed. NotPermittedError if an image consists of it.

        BusyError names what needs it, unless ``defer`` says that it may go later.
        """
        info = await self._snapshots.find(wire_id)
        self._check_no_image(info.name, recursive=recursive)
        return await to_its_end(self._snapshots.destroy(wire_id, recursive=recursive, defer=defer))

    def _check_no_image(self, name: SnapshotName, *, recursive: bool) -> None:
        images = self._images.guarding(name, recursive=recursive)
        if images:
            raise NotPermittedError(f"{name} can't be deleted: it is the content of image {', '.join(images)}")

    async def rollback_snapshot(self, wire_id: str, *, destroy_newer: bool = False) -> Snapshot:
        """Make a dataset what its snapshot is."""
        return await to_its_end(self._snapshots.rollback(wire_id, destroy_newer=destroy_newer))

    # -- guests ------------------------------------------------------------------------------------------------------

    async def verify_disks(self, guest_id: str, disks: Sequence[DiskRequest]) -> Sequence[int]:
        """Whether a guest's disks could be made; their sizes. ``invalid argument``, ``not found``, NoSpaceError."""
        return await self._guests.verify(guest_id, disks)

    async def create_guest_disks(self, guest_id: str, disks: Sequence[DiskRequest]) -> Sequence[GuestDisk]:
        """Make a guest's disks, all or none; the same errors."""
        return await to_its_end(self._guests.create_disks(guest_id, disks))

    async def delete_guest_disks(self, guest_id: str) -> None:
        """Destroy a guest's disks; ``invalid argument``."""
        await to_its_end(self._guests.delete_disks(guest_id))
