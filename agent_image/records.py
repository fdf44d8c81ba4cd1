"""What the agent knows about its images, kept in a key/value table and mirrored in memory.

A record exists only for an image that is whole and verified: nothing else ever puts one. What is on its way lives in the job
queue. The pool is the truth: a dataset that carries our mark has a record, a record without its dataset is removed (see
:mod:`agent_image.store_images`).

One process owns the table, so reads come from memory: ``GetImage`` costs no disk access and no thread.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import msgspec

from imaging.errors import BadDataError, NotFoundError
from imaging.kv import base as kv
from imaging.names import ImageId, SnapshotName

_PREFIX = "images/"
_META_PREFIX = "meta/"


class ImageStatus(StrEnum):
    """Where an image is on its way; only ``complete`` ones have a record, ``error`` is a fetch that was given up lately."""

    PENDING = "pending"
    DOWNLOADING = "downloading"
    COMPLETE = "complete"
    ERROR = "error"


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One image. Sizes are bytes; names are full."""

    id: str
    type: str = ""
    volume: str = ""
    snapshot: str = ""
    size_bytes: int = 0
    status: ImageStatus = ImageStatus.COMPLETE
    source: str = ""
    digest: str = ""
    progress: dict[str, Any] = {}
    """Only of images on their way: what the fetch reported last."""

    @property
    def snapshot_name(self) -> SnapshotName:
        """The snapshot that clones start from."""
        return SnapshotName.parse(self.snapshot)


class ImageRecords:
    """The table of images. Reads are immediate; ``save`` and ``delete`` block until durable."""

    def __init__(self, store: kv.KeyValue) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._records: dict[str, ImageRecord] = {}

    def load(self) -> None:
        """Read the whole table; BadDataError names a record that can't be read."""
        with self._lock:
            self._records = {record.id: record for record in map(_decode, self._store.list(_PREFIX))}

    def find(self, image_id: str) -> ImageRecord | None:
        """The image's record, or None."""
        return self._records.get(image_id)

    def get(self, image_id: str) -> ImageRecord:
        """The image's record; NotFoundError."""
        record = self._records.get(image_id)
        if record is None:
            raise NotFoundError("not found")
        return record

    def list(self) -> Sequence[ImageRecord]:
        """All records in order of id."""
        return sorted(self._records.values(), key=lambda record: record.id)

    def save(self, record: ImageRecord) -> None:
        """Put a record, durably."""
        ImageId.parse(record.id)
        with self._lock:
            kv.put(self._store, _PREFIX + record.id, msgspec.json.encode(record))
            self._records[record.id] = record

    def delete(self, image_id: str) -> None:
        """Remove a record, durably; absent is fine."""
        with self._lock:
            kv.delete(self._store, _PREFIX + image_id)
            self._records.pop(image_id, None)

    def find_note(self, name: str) -> str | None:
        """A remembered fact about the table itself (``migrated-from``), or None."""
        entry = self._store.get(_META_PREFIX + name)
        return None if entry is None else entry.value.decode()

    def save_note(self, name: str, text: str) -> None:
        """Remember a fact about the table itself, durably."""
        kv.put(self._store, _META_PREFIX + name, text.encode())


def _decode(entry: kv.Entry) -> ImageRecord:
    try:
        return msgspec.json.decode(entry.value, type=ImageRecord)
    except msgspec.MsgspecError as err:
        raise BadDataError(f"the record {entry.key!r} of the image table can't be read") from err
