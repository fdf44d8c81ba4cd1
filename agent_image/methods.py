"""The methods of ``ImageStore.*``: wire structs in, wire structs out. No decisions here, only translation."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from agent_image.fetch import FetchOrder
from agent_image.guests import DiskRequest
from agent_image.records import ImageRecord, ImageStatus
from agent_image.store import ImageStore
from agent_image.store_pool import Snapshot, Volume
from rpc import messages as wire
from rpc.dispatch import Registry

SERVICE = "ImageStore"


def register_methods(registry: Registry, store: ImageStore) -> None:
    """Offer every method under its name and its other spelling."""
    _register_images(registry, ImageMethods(store))
    _register_volumes(registry, VolumeMethods(store))
    _register_snapshots(registry, SnapshotMethods(store))
    _register_guests(registry, GuestMethods(store))


def _register_images(registry: Registry, methods: ImageMethods) -> None:
    for name, handler in (
        ("ListImages", methods.list_images),
        ("GetImage", methods.get_image),
        ("RequestImage", methods.request_image),
        ("DeleteImage", methods.delete_image),
    ):
        registry.register(f"{SERVICE}.{name}", handler, request=wire.ImageRequest, answer=wire.ImagesAnswer)
    registry.register(
        f"{SERVICE}.CloneImage", methods.clone_image, request=wire.ImageRequest, answer=wire.VolumesAnswer
    )


def _register_volumes(registry: Registry, methods: VolumeMethods) -> None:
    for name, handler in (
        ("ListVolumes", methods.list_volumes),
        ("CreateVolume", methods.create_volume),
        ("GetVolume", methods.get_volume),
        ("DeleteDataset", methods.delete_dataset),
    ):
        registry.register(f"{SERVICE}.{name}", handler, request=wire.VolumeRequest, answer=wire.VolumesAnswer)


def _register_snapshots(registry: Registry, methods: SnapshotMethods) -> None:
    for name, handler, aliases in (
        ("ListSnapshots", methods.list_snapshots, (f"{SERVICE}.ListSnapshot",)),
        ("GetSnapshot", methods.get_snapshot, ()),
        ("CreateSnapshot", methods.create_snapshot, ()),
        ("DeleteSnapshot", methods.delete_snapshot, ()),
        ("RollbackSnapshot", methods.rollback_snapshot, ()),
    ):
        registry.register(
            f"{SERVICE}.{name}", handler, request=wire.SnapshotRequest, answer=wire.SnapshotsAnswer, aliases=aliases
        )


def _register_guests(registry: Registry, methods: GuestMethods) -> None:
    for name, handler, aliases in (
        ("VerifyDisks", methods.verify_disks, ()),
        ("CreateGuestDisks", methods.create_guest_disks, ()),
        ("DeleteGuestsDisks", methods.delete_guest_disks, (f"{SERVICE}.DeleteGuestDisks",)),
    ):
        registry.register(
            f"{SERVICE}.{name}", handler, request=wire.GuestRequest, answer=wire.GuestResponse, aliases=aliases
        )


class ImageMethods:
    """Images."""

    def __init__(self, store: ImageStore) -> None:
        self._store = store

    async def list_images(self, request: wire.ImageRequest) -> wire.ImagesAnswer:
        """All images the agent has."""
        return _images(await self._store.list_images(pending=request.pending))

    async def get_image(self, request: wire.ImageRequest) -> wire.ImagesAnswer:
        """One image."""
        return _images([await self._store.get_image(request.id, pending=request.pending)])

    async def request_image(self, request: wire.ImageRequest) -> wire.ImagesAnswer:
        """Have an image: fetched from the image server if it is not here."""
        order = FetchOrder.checked(request.id, kind=request.type, source=request.source, digest=request.digest)
        return _images([await self._store.request_image(order, wait=request.wait)])

    async def delete_image(self, request: wire.ImageRequest) -> wire.ImagesAnswer:
        """Forget an image, or stop fetching it."""
        return _images([await self._store.delete_image(request.id)])

    async def clone_image(self, request: wire.ImageRequest) -> wire.VolumesAnswer:
        """A writable volume that starts as the image."""
        return _volumes([await self._store.clone_image(request.id, request.dest)])


class VolumeMethods:
    """Volumes and datasets."""

    def __init__(self, store: ImageStore) -> None:
        self._store = store

    async def list_volumes(self, _request: wire.VolumeRequest) -> wire.VolumesAnswer:
        """Every volume of the pool."""
        return _volumes(await self._store.list_volumes())

    async def create_volume(self, request: wire.VolumeRequest) -> wire.VolumesAnswer:
        """A new volume of zeros that reserves its space."""
        size_bytes = wire.bytes_from_mib(request.size_mib)
        return _volumes([await self._store.create_volume(request.id, size_bytes)])

    async def get_volume(self, request: wire.VolumeRequest) -> wire.VolumesAnswer:
        """One volume."""
        return _volumes([await self._store.get_volume(request.id)])

    async def delete_dataset(self, request: wire.VolumeRequest) -> wire.VolumesAnswer:
        """Destroy a dataset and everything below it."""
        return _volumes([await self._store.delete_dataset(request.id)])


class SnapshotMethods:
    """Snapshots."""

    def __init__(self, store: ImageStore) -> None:
        self._store = store

    async def list_snapshots(self, request: wire.SnapshotRequest) -> wire.SnapshotsAnswer:
        """Snapshots of a dataset and everything below it, or of the whole pool."""
        return _snapshots(await self._store.list_snapshots(request.id))

    async def get_snapshot(self, request: wire.SnapshotRequest) -> wire.SnapshotsAnswer:
        """One snapshot."""
        return _snapshots([await self._store.get_snapshot(request.id)])

    async def create_snapshot(self, request: wire.SnapshotRequest) -> wire.SnapshotsAnswer:
        """Take a snapshot of a dataset, or of everything below it at one instant."""
        made = await self._store.create_snapshot(request.id, request.dest, recursive=request.recursive)
        return _snapshots(made)

    async def delete_snapshot(self, request: wire.SnapshotRequest) -> wire.SnapshotsAnswer:
        """Destroy a snapshot, or also those of its name below; what has to wait because of ``defer`` is not in the answer."""
        gone = await self._store.delete_snapshot(request.id, recursive=request.recursive, defer=request.defer)
        return _snapshots(gone)

    async def rollback_snapshot(self, request: wire.SnapshotRequest) -> wire.SnapshotsAnswer:
        """Make a dataset what it was when the snapshot was taken."""
        destroy_newer = request.destroy_more_recent
        return _snapshots([await self._store.rollback_snapshot(request.id, destroy_newer=destroy_newer)])


class GuestMethods:
    """Disks of guests. The guest comes back as it came, except for what is filled in."""

    def __init__(self, store: ImageStore) -> None:
        self._store = store

    async def verify_disks(self, request: wire.GuestRequest) -> wire.GuestResponse:
        """Check that a guest's disks can be made, and fill in their sizes."""
        guest = request.guest
        sizes = await self._store.verify_disks(guest.id, _disk_requests(guest))
        disks = [
            msgspec.structs.replace(disk, size_mib=wire.mib_from_bytes(size_bytes))
            for disk, size_bytes in zip(guest.disks, sizes, strict=True)
        ]
        return wire.GuestResponse(guest=msgspec.structs.replace(guest, disks=disks))

    async def create_guest_disks(self, request: wire.GuestRequest) -> wire.GuestResponse:
        """Make a guest's disks and fill in where they are."""
        guest = request.guest
        made = await self._store.create_guest_disks(guest.id, _disk_requests(guest))
        disks = [
            msgspec.structs.replace(
                disk, size_mib=wire.mib_from_bytes(one.size_bytes), volume=one.volume, source=one.source
            )
            for disk, one in zip(guest.disks, made, strict=True)
        ]
        return wire.GuestResponse(guest=msgspec.structs.replace(guest, disks=disks))

    async def delete_guest_disks(self, request: wire.GuestRequest) -> wire.GuestResponse:
        """Destroy a guest's disks."""
        await self._store.delete_guest_disks(request.guest.id)
        return wire.GuestResponse(guest=msgspec.structs.replace(request.guest, disks=[]))


def _disk_requests(guest: wire.Guest) -> list[DiskRequest]:
    return [DiskRequest(disk.image, wire.bytes_from_mib(disk.size_mib), thin=disk.thin) for disk in guest.disks]


def _images(records: Sequence[ImageRecord]) -> wire.ImagesAnswer:
    return wire.ImagesAnswer(images=[image_to_wire(record) for record in records])


def image_to_wire(record: ImageRecord) -> wire.Image:
    """A record as clients see it."""
    return wire.Image(
        id=record.id,
        type=record.type,
        volume=record.volume,
        snapshot=record.snapshot,
        size_mib=wire.mib_from_bytes(record.size_bytes),
        status=record.status.value,
        digest=record.digest,
        progress=None if record.status is ImageStatus.COMPLETE else _progress(record),
    )


def _progress(record: ImageRecord) -> wire.Progress:
    facts = record.progress
    expected = facts.get("expected_bytes")
    return wire.Progress(
        stage=str(facts.get("stage", record.status.value)),
        received_bytes=int(facts.get("received_bytes", 0)),
        expected_bytes=-1 if expected is None else int(expected),
        attempt=int(facts.get("attempt", 0)),
        message=str(facts.get("message", "")),
    )


def _volumes(volumes: Sequence[Volume]) -> wire.VolumesAnswer:
    return wire.VolumesAnswer(
        volumes=[
            wire.Volume(id=str(one.name), size_mib=wire.mib_from_bytes(one.size_bytes), device=one.device)
            for one in volumes
        ]
    )


def _snapshots(snapshots: Sequence[Snapshot]) -> wire.SnapshotsAnswer:
    return wire.SnapshotsAnswer(
        snapshots=[
            wire.Snapshot(id=str(one.name), size_mib=wire.mib_from_bytes(one.written_bytes)) for one in snapshots
        ]
    )
