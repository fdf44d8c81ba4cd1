"""Images that are in the pool: publish, clone, delete, and bring records and pool together at start.

An image is the dataset ``POOL/images/ID`` with one snapshot and our mark (user properties), and a record. The orders below are
chosen so that a kill at any instant leaves what :meth:`Images.reconcile` understands:

* publish: mark the incoming dataset complete, rename it, put the record. Marked without a record: the record is put at start.
* delete: rename the dataset to a tombstone, delete the record, destroy the tombstone. A record without a dataset is
  removed at start, a tombstone is destroyed as soon as nothing was cloned from it.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Collection, Mapping, Sequence

from agent_image.drivers.base import DatasetInfo
from agent_image.records import ImageRecord, ImageRecords
from agent_image.store_pool import Pool, Volume
from agent_image.store_volumes import Volumes, already_exists
from imaging.errors import BusyError, InvalidArgumentError, InvalidNameError, MistifyError, NotFoundError
from imaging.names import DatasetName, ImageId, SnapshotName
from imaging.release import release

PROPERTY_IMAGE = "mistify:image"
PROPERTY_TYPE = "mistify:type"
PROPERTY_SOURCE = "mistify:source"
PROPERTY_DIGEST = "mistify:digest"
PROPERTY_SNAPSHOT = "mistify:snapshot"
PROPERTY_CREATED_BY = "mistify:created-by"
CREATED_BY = f"mistify-agent-image {release()}"
"""So that an administrator sees who put a dataset there, and which release wrote what looks odd."""

_PROPERTY_VALUE_MAX = 1024
"""What every version of ZFS takes as the value of a user property."""

log = logging.getLogger(__name__)


def mark(image_id: str, snapshot: str, *, kind: str, source: str, digest: str) -> Mapping[str, str]:
    """Properties that say: this dataset is that image, whole and verified."""
    facts = {PROPERTY_TYPE: kind, PROPERTY_SOURCE: source, PROPERTY_DIGEST: digest}
    kept = {name: value for name, value in facts.items() if 0 < len(value.encode()) < _PROPERTY_VALUE_MAX}
    ours = {PROPERTY_IMAGE: image_id, PROPERTY_SNAPSHOT: snapshot, PROPERTY_CREATED_BY: CREATED_BY}
    return kept | ours | {"readonly": "on"}


class Images:
    """Complete images: the pool and the table of records, kept together."""

    def __init__(self, pool: Pool, records: ImageRecords, volumes: Volumes) -> None:
        self.pool = pool
        self.records = records
        self._volumes = volumes
        self._tombstones: set[DatasetName] = set()

    def dataset(self, image_id: str) -> DatasetName:
        """Where an image lives."""
        return self.pool.images / image_id

    # -- at start ----------------------------------------------------------------------------------------------------

    async def reconcile(self, unfinished: Collection[str]) -> None:
        """Make records and pool agree; ``unfinished`` are ids whose fetch will go on, so that what arrived so far is kept."""
        await self.pool.run(self._reconcile, frozenset(unfinished))

    def _reconcile(self, unfinished: Collection[str]) -> None:
        datasets = {info.name: info for info in self.pool.driver.list(self.pool.images)}
        for record in self.records.list():
            if not self._is_there(record):
                log.warning("removed the record of an image that is not in the pool", extra={"image_id": record.id})
                self.records.delete(record.id)
        for name, info in datasets.items():
            if self.pool.is_tombstone(name):
                self._tombstones.add(name)
            elif self.pool.is_incoming(name):
                self._drop_leftover(name, unfinished)
            else:
                self._adopt(info)
        self._reap()

    def _is_there(self, record: ImageRecord) -> bool:
        try:
            self.pool.driver.get_snapshot(record.snapshot_name)
        except MistifyError:
            return False
        return True

    def _drop_leftover(self, name: DatasetName, unfinished: Collection[str]) -> None:
        if self.pool.incoming_id(name) not in unfinished:
            log.warning("destroyed what an abandoned fetch left", extra={"dataset": str(name)})
            self.pool.driver.destroy(name, recursive=True)

    def _adopt(self, info: DatasetInfo) -> None:
        """Put the record of an image that was published but not recorded."""
        image_id = info.properties.get(PROPERTY_IMAGE, "")
        is_image = info.name.parent == self.pool.images and info.name.leaf == image_id
        if not is_image or self.records.find(image_id) is not None:
            return
        record = self.record_of(info)
        if record is not None:
            self.records.save(record)
            log.warning("recorded an image that was found in the pool", extra={"image_id": image_id})

    def record_of(self, info: DatasetInfo) -> ImageRecord | None:
        """Blocking: the record a marked dataset should have; None if it carries no mark or its snapshot is gone."""
        image_id, part = info.properties.get(PROPERTY_IMAGE), info.properties.get(PROPERTY_SNAPSHOT)
        if image_id is None or part is None:
            return None
        try:
            snapshot = self.pool.driver.get_snapshot(info.name @ part)
        except NotFoundError:
            return None
        target = self.dataset(image_id)
        return ImageRecord(
            id=image_id,
            type=info.properties.get(PROPERTY_TYPE, ""),
            volume=str(target),
            snapshot=str(target @ part),
            size_bytes=snapshot.volsize_bytes or 0,
            source=info.properties.get(PROPERTY_SOURCE, ""),
            digest=info.properties.get(PROPERTY_DIGEST, ""),
        )

    # -- publish -----------------------------------------------------------------------------------------------------

    def check_free(self, image_id: str) -> None:
        """Blocking: AlreadyExistsError if something that is not this image has its place."""
        try:
            info = self.pool.driver.get(self.dataset(image_id))
        except NotFoundError:
            return
        if info.properties.get(PROPERTY_IMAGE) != image_id:
            raise already_exists(info.name)

    def publish(self, image_id: str) -> ImageRecord:
        """Blocking: give a marked incoming dataset its name and its record. The caller holds the image's lock."""
        incoming, target = self.pool.incoming(image_id), self.dataset(image_id)
        record = self.record_of(self.pool.driver.get(incoming))
        if record is None:
            raise NotFoundError(f"{incoming} holds no complete image")
        self.check_free(image_id)
        self.pool.driver.rename(incoming, target)
        self.records.save(record)
        return record

    # -- clone and delete --------------------------------------------------------------------------------------------

    async def clone(self, image_id: str, dest: str) -> Volume:
        """A clone of the image's snapshot at the full name ``dest``; the same request again is fine."""
        if not dest:
            raise InvalidArgumentError("need dest")
        record = self.records.get(image_id)
        name = self.pool.parse_new(dest)
        async with self.pool.locks.hold(name, reads=[self.dataset(record.id)]):
            record = self.records.get(image_id)
            info = await self.pool.run(self._volumes.ensure_clone, record.snapshot_name, name)
            return await self.pool.run(self.pool.show, info)

    async def delete(self, image_id: str) -> ImageRecord:
        """Forget an image; ``not found``. Its blocks stay as long as a clone needs them."""
        self.records.get(image_id)
        async with self.pool.locks.hold(self.dataset(image_id)):
            record = self.records.get(image_id)
            await self.pool.run(self._bury, record)
        return record

    def _bury(self, record: ImageRecord) -> None:
        grave = self.pool.tombstone(record.id, secrets.token_hex(4))
        try:
            self.pool.driver.rename(self.dataset(record.id), grave)
        except NotFoundError:
            log.warning("deleted the record of an image that is not in the pool", extra={"image_id": record.id})
        else:
            self._tombstones.add(grave)
        self.records.delete(record.id)
        self._reap()

    async def destroyed(self, names: Sequence[DatasetName]) -> None:
        """Told that datasets are gone: forget records of images among them, reap tombstones they were cloned from."""
        await self.pool.run(self._destroyed, names)

    def _destroyed(self, names: Sequence[DatasetName]) -> None:
        for name in names:
            if name.parent == self.pool.images and self.records.find(name.leaf) is not None:
                self.records.delete(name.leaf)
        self._reap()

    def _reap(self) -> None:
        """Destroy tombstones nothing was cloned from."""
        for grave in sorted(self._tombstones):
            try:
                snapshots = self.pool.driver.list_snapshots(grave)
                if any(self.pool.driver.clones(one.name) for one in snapshots):
                    continue
                self.pool.driver.destroy(grave, recursive=True)
            except NotFoundError:
                pass  # somebody else destroyed it, which is what we want
            except BusyError as err:
                log.info("a deleted image is still in use", extra={"dataset": str(grave), "needs": err.dependants})
                continue
            self._tombstones.discard(grave)

    def guarding(self, name: SnapshotName, *, recursive: bool) -> Sequence[str]:
        """Ids of images whose snapshot would go if this one was destroyed."""
        found = []
        for record in self.records.list():
            own = record.snapshot_name
            below = recursive and own.dataset.is_within(name.dataset) and own.snapshot == name.snapshot
            if own == name or below:
                found.append(record.id)
        return found


def parse_image_id(text: str) -> str:
    """A well-formed image id; InvalidArgumentError ``need id`` for none, InvalidNameError otherwise."""
    if not text:
        raise InvalidArgumentError("need id")
    return ImageId.parse(text).text


def is_image_id(text: str) -> bool:
    """Whether an image may have that id; nothing has one that breaks the grammar."""
    try:
        ImageId.parse(text)
    except InvalidNameError:
        return False
    return True
