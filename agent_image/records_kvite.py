"""Reads the image table of the program this one replaces, once.

That table is an SQLite file with rows ``(key, bucket, value)``: bucket ``images``, the image as JSON, sizes in MiB.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent_image.records import ImageRecord, ImageRecords
from imaging.errors import BadDataError, InvalidNameError
from imaging.names import DatasetName, ImageId, PoolName, SnapshotName

FILE_NAME = ".images.db"

_QUERY = "SELECT key, value FROM 'mistify-agent-image' WHERE bucket = 'images' ORDER BY key"
_NOTE = "migrated-from"
_MIB_BYTES = 1 << 20
_TIMEOUT_S = 5.0

log = logging.getLogger(__name__)


def migrate(records: ImageRecords, path: Path, pool: PoolName) -> int:
    """Take over the records of an old table that are not known yet; how many. Only the first call for a path reads it."""
    if records.find_note(_NOTE) == str(path) or not path.is_file():
        return 0
    taken = [record for record in read(path, pool) if records.find(record.id) is None]
    for record in taken:
        records.save(record)
    records.save_note(_NOTE, str(path))
    log.warning("took over the image records of an older version", extra={"path": str(path), "records": len(taken)})
    return len(taken)


def read(path: Path, pool: PoolName) -> Sequence[ImageRecord]:
    """The complete images an old table describes; BadDataError if the file is not such a table."""
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_TIMEOUT_S)
        ) as db:
            rows = db.execute(_QUERY).fetchall()
    except sqlite3.Error as err:
        raise BadDataError(f"{path} is not an image table of an older version") from err
    found = (_record(key, value, pool) for key, value in rows)
    return [record for record in found if record is not None]


def _record(key: str, value: str | bytes, pool: PoolName) -> ImageRecord | None:
    """The row as a record; None (and a line in the log) if it can't be one of ours."""
    try:
        old = json.loads(value)
        return _translate(old, pool)
    except (ValueError, TypeError, AttributeError, InvalidNameError):
        log.warning("left out an image record of an older version that can't be read", extra={"key": key})
        return None


def _translate(old: Mapping[str, Any], pool: PoolName) -> ImageRecord | None:
    image_id = ImageId.parse(str(old["id"])) if "id" in old else None
    if image_id is None or old.get("status", "complete") not in {"", "complete"} or not old.get("snapshot"):
        return None
    snapshot = SnapshotName.parse(str(old["snapshot"]))
    volume = DatasetName.parse(str(old.get("volume") or snapshot.dataset))
    if snapshot.dataset != volume or volume.pool != pool:
        return None
    return ImageRecord(
        id=image_id.text,
        type=str(old.get("type", "")),
        volume=str(volume),
        snapshot=str(snapshot),
        size_bytes=int(old.get("size", 0)) * _MIB_BYTES,
    )
