"""Disks of guests: ``POOL/guests/ID/disk-N``, clones of images or empty volumes, all of them or none."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from agent_image.drivers.base import DatasetInfo
from agent_image.guests_space import SpaceLedger, thick_volume_bytes
from agent_image.store_images import Images
from agent_image.store_pool import NOT_A_DATASET, Pool
from agent_image.store_volumes import Volumes
from imaging.errors import InvalidArgumentError, InvalidNameError, MistifyError, NoSpaceError, NotFoundError
from imaging.names import DatasetName, GuestId, SnapshotName

BLOCK_BYTES_MAX = 8 * 1024
"""The reservation of a disk is computed for blocks of at most this size: the smaller they are, the more pointers there are."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DiskRequest:
    """What a guest wants: a clone of an image, or so many bytes of zeros."""

    image: str
    size_bytes: int
    thin: bool = False


@dataclass(frozen=True, slots=True)
class GuestDisk:
    """A disk that is there."""

    volume: str
    size_bytes: int
    source: str


@dataclass(frozen=True, slots=True)
class _Plan:
    """One disk, checked: where, how big, from which snapshot."""

    name: DatasetName
    size_bytes: int
    snapshot: SnapshotName | None
    thin: bool


class Guests:
    """Disks of guests, by the guest's id."""

    def __init__(
        self,
        pool: Pool,
        images: Images,
        volumes: Volumes,
        ledger: SpaceLedger,
        *,
        block_bytes: int = BLOCK_BYTES_MAX,
    ) -> None:
        self._pool = pool
        self._images = images
        self._volumes = volumes
        self._ledger = ledger
        self._block_bytes = min(block_bytes, BLOCK_BYTES_MAX)

    def dataset(self, guest_id: str) -> DatasetName:
        """Where a guest's disks are; ``invalid argument`` for no id, InvalidNameError for one that breaks the grammar."""
        if not guest_id:
            raise InvalidArgumentError("invalid argument")
        try:
            return self._pool.guests / GuestId.parse(guest_id).text
        except InvalidNameError as err:
            raise InvalidNameError(NOT_A_DATASET) from err

    async def verify(self, guest_id: str, disks: Sequence[DiskRequest]) -> Sequence[int]:
        """Whether the disks could be made now; their sizes in bytes. ``invalid argument``, ``not found``, NoSpaceError."""
        plans = self._plan(guest_id, disks)
        await self._pool.run(self._check_space, plans)
        return [plan.size_bytes for plan in plans]

    def _check_space(self, plans: Sequence[_Plan]) -> None:
        self._ledger.check(sum(self._need_bytes(plan) for plan in plans))

    async def create_disks(self, guest_id: str, disks: Sequence[DiskRequest]) -> Sequence[GuestDisk]:
        """Make all disks or none; those the same request made before are kept."""
        plans = self._plan(guest_id, disks)
        images = [plan.snapshot.dataset for plan in plans if plan.snapshot is not None]
        async with self._pool.locks.hold(self.dataset(guest_id), reads=images):
            plans = self._plan(guest_id, disks)  # an image may have gone while we waited
            return await self._pool.run(self._create, plans)

    async def delete_disks(self, guest_id: str) -> None:
        """Destroy all disks of a guest; fine if there are none."""
        name = self.dataset(guest_id)
        async with self._pool.locks.hold(name):
            try:
                await self._pool.run(self._pool.driver.destroy, name, recursive=True)
            except NotFoundError:
                return  # nothing is there, which is what was asked for
        await self._images.destroyed([name])

    # -- planning ----------------------------------------------------------------------------------------------------

    def _plan(self, guest_id: str, disks: Sequence[DiskRequest]) -> Sequence[_Plan]:
        parent = self.dataset(guest_id)
        if not disks or any(not disk.image and disk.size_bytes <= 0 for disk in disks):
            raise InvalidArgumentError("invalid argument")
        return [self._plan_disk(parent / f"disk-{number}", disk) for number, disk in enumerate(disks)]

    def _plan_disk(self, name: DatasetName, disk: DiskRequest) -> _Plan:
        if not disk.image:
            return _Plan(name, disk.size_bytes, None, disk.thin)
        record = self._images.records.get(disk.image)
        return _Plan(name, record.size_bytes, record.snapshot_name, disk.thin)

    def _need_bytes(self, plan: _Plan) -> int:
        """Space a disk may take that is not taken yet.

        A thick volume takes its reservation. A clone takes nothing at first, but its guest may write all of it, and a guest that
        finds its disk full in mid-flight is what this check is to prevent. A disk that is there has its space, and whoever asks for
        a thin one takes that risk.
        """
        if plan.thin or self._find(plan.name) is not None:
            return 0
        if plan.snapshot is not None:
            return plan.size_bytes
        return thick_volume_bytes(plan.size_bytes, self._block_bytes)

    def _find(self, name: DatasetName) -> DatasetInfo | None:
        try:
            return self._pool.driver.get(name)
        except NotFoundError:
            return None

    # -- making ------------------------------------------------------------------------------------------------------

    def _create(self, plans: Sequence[_Plan]) -> Sequence[GuestDisk]:
        """Blocking: under the guest's lock."""
        guest = plans[0].name.parent
        existed = {name for plan in plans if self._find(name := plan.name) is not None}
        guest_existed = guest is None or self._find(guest) is not None
        made: list[DatasetName] = []
        try:
            with self._ledger.admit(sum(self._need_bytes(plan) for plan in plans)):
                infos = [self._make(plan, existed, made) for plan in plans]
            return [self._show(plan, info) for plan, info in zip(plans, infos, strict=True)]
        except MistifyError as err:
            self._undo(made)
            if not guest_existed and guest is not None:
                self._undo([guest])
            if isinstance(err, NoSpaceError):
                raise NoSpaceError("no space left on device") from err
            raise

    def _make(self, plan: _Plan, existed: set[DatasetName], made: list[DatasetName]) -> DatasetInfo:
        if plan.snapshot is None:
            info = self._volumes.ensure(plan.name, plan.size_bytes, thin=plan.thin)
        else:
            info = self._volumes.ensure_clone(plan.snapshot, plan.name)
        if plan.name not in existed:
            made.append(plan.name)
        return info

    def _show(self, plan: _Plan, info: DatasetInfo) -> GuestDisk:
        shown = self._pool.show(info)
        return GuestDisk(str(shown.name), plan.size_bytes, shown.device)

    def _undo(self, made: Sequence[DatasetName]) -> None:
        """Destroy what this request made, and nothing else."""
        for name in reversed(made):
            try:
                self._pool.driver.destroy(name)
            except NotFoundError:
                continue
            except MistifyError:
                log.exception("a disk of a request that failed stays behind", extra={"dataset": str(name)})
