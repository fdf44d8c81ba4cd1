"""Taking over what the original service left: its kvite file with the records, and the directory with the images.

The original's file is a SQLite database with one table of ``key``, ``bucket``, ``value``; the bucket ``images`` holds each record as JSON
under the image's id. The bytes of image ID are in the file ID of the image store's directory. Both are only read, never changed: they stay
as the way back. A complete image is copied into the blob store and gets its digest on the way.

The import runs at the first start that finds the file, and is repeated until it has once come to its end; records that are there are left
alone, so it may be cut off anywhere.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from image_service.lifecycle import (
    COMMENT_MAX_CHARS,
    SOURCE_MAX_CHARS,
    UNFINISHED,
    Image,
    ImageStatus,
    ImageType,
)
from image_service.metadata import MetadataStore
from imaging.blobs.base import BlobInfo, BlobStore
from imaging.errors import (
    BadDataError,
    ConflictError,
    InvalidArgumentError,
    MistifyError,
    from_os_error,
)
from imaging.kv.sqlite import from_sqlite_error
from imaging.names import ImageId

BUCKET = "images"
SQLITE_MAGIC = b"SQLite format 3\x00"
COLUMNS = {"key", "bucket", "value"}

READ_TIMEOUT_S = 10.0
"""The original may still hold its lock for the length of one write; it should not be running at all."""

COPY_BYTES = 1 << 20
"""Copied at once."""

DATA_LOST = "the image's data was not there when the original's records were taken over"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Original:
    """A kvite file and the table in it."""

    path: Path
    table: str


def find_original(config: Mapping[str, Any]) -> Original | None:
    """The original's file, if ``filename`` of the metadata store's configuration is one."""
    path = Path(str(config.get("filename", "")))
    try:
        with path.open("rb") as file:
            if file.read(len(SQLITE_MAGIC)) != SQLITE_MAGIC:
                return None
    except (FileNotFoundError, IsADirectoryError):
        return None
    except OSError as err:
        raise from_os_error(err, f"the metadata file {path} can't be read") from err
    with closing(_connect(path)) as database:
        tables = [name for name in _tables(database) if _columns(database, name) == COLUMNS]
    wanted = str(config.get("table", ""))
    if wanted in tables or (tables and not wanted):
        return Original(path, wanted or tables[0])
    return None


def _connect(path: Path) -> sqlite3.Connection:
    try:
        return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=READ_TIMEOUT_S)
    except sqlite3.Error as err:
        raise from_sqlite_error(err, f"the metadata file {path} can't be opened") from err


def _rows(database: sqlite3.Connection, query: str, *values: str) -> list[tuple[Any, ...]]:
    try:
        return database.execute(query, values).fetchall()
    except sqlite3.Error as err:
        damaged = isinstance(from_sqlite_error(err, ""), BadDataError)
        what = "the original's metadata file is damaged" if damaged else f"the metadata file can't be read ({err})"
        raise from_sqlite_error(err, what) from err


def _tables(database: sqlite3.Connection) -> list[str]:
    return [str(row[0]) for row in _rows(database, "SELECT name FROM sqlite_master WHERE type='table' ORDER BY name")]


def _columns(database: sqlite3.Connection, table: str) -> set[str]:
    return {str(row[0]) for row in _rows(database, "SELECT name FROM pragma_table_info(?)", table)}


def read_records(original: Original) -> Iterator[Mapping[str, Any]]:
    """The original's records, their keys in lower case without underscores (it wrote both spellings in its time)."""
    quoted = '"' + original.table.replace('"', '""') + '"'
    with closing(_connect(original.path)) as database:
        rows = _rows(database, f"SELECT key, value FROM {quoted} WHERE bucket = ? ORDER BY key", BUCKET)  # noqa: S608
    for key, value in rows:
        try:
            record = json.loads(value)
            yield {name.lower().replace("_", ""): item for name, item in record.items()}
        except (ValueError, AttributeError, TypeError) as err:
            raise BadDataError(f"the original's record {key!r} is damaged") from err


def import_original(original: Original, records: MetadataStore, blobs: BlobStore, images: Path | None) -> int:
    """Take over every record that is not here yet, with its bytes from the directory ``images``; how many."""
    mark = f"original/{original.path.name}"
    if records.is_marked(mark):
        return 0
    taken = 0
    found = sorted(read_records(original), key=lambda record: record.get("status") != ImageStatus.COMPLETE)
    for record in found:  # complete ones first: of two records for one source, the useful one keeps it
        taken += _take(record, records, blobs, images)
    records.mark(mark)
    log.warning("took over the original's records; its files may be removed", extra={"images": taken})
    return taken


def _take(record: Mapping[str, Any], records: MetadataStore, blobs: BlobStore, images: Path | None) -> bool:
    try:
        image_id = ImageId.parse(str(record.get("id", ""))).text
        image = _convert(image_id, record)
    except InvalidArgumentError as err:
        log.warning("a record of the original's is left out: %s", err, extra={"image_id": str(record.get("id"))[:128]})
        return False
    if records.find_by_id(image_id) is not None:
        return False
    if image.status is ImageStatus.COMPLETE:
        image = _with_data(image, blobs, images)
    try:
        records.put(image)
    except ConflictError:
        log.warning("source is there twice: the later record loses it", extra={"image_id": image.id})
        records.put(replace(image, source=""))
    return True


def _convert(image_id: str, record: Mapping[str, Any]) -> Image:
    image = Image(
        id=image_id,
        type=ImageType.parse(record.get("type"), f"unknown type {str(record.get('type'))[:32]!r}"),
        source=str(record.get("source") or "")[:SOURCE_MAX_CHARS],
        comment=str(record.get("comment") or "")[:COMMENT_MAX_CHARS],
        download_start=_time(record.get("downloadstart")),
        download_end=_time(record.get("downloadend")),
    )
    if record.get("status") == ImageStatus.COMPLETE:
        return replace(image, status=ImageStatus.COMPLETE)
    if record.get("status") in UNFINISHED and image.source:
        return image  # pending: fetched anew
    return replace(image, status=ImageStatus.ERROR, error="the original did not complete this image")


def _time(text: Any) -> datetime | None:
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    if moment.year == 1:  # the zero time
        return None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _with_data(image: Image, blobs: BlobStore, images: Path | None) -> Image:
    path = None if images is None else images / image.id
    if path is None or not path.is_file():
        log.error("data of a complete image is missing", extra={"image_id": image.id})
        return replace(image, status=ImageStatus.ERROR, error=DATA_LOST)
    info = _copy(path, f"original-{image.id}", blobs)
    return replace(image, digest=str(info.digest), size_bytes=info.size_bytes, expected_size_bytes=info.size_bytes)


def _copy(path: Path, ref: str, blobs: BlobStore) -> BlobInfo:
    try:
        with path.open("rb") as file, blobs.ingest(ref) as writer:
            writer.restart()
            while piece := file.read(COPY_BYTES):
                writer.write(piece)
            return writer.commit()
    except OSError as err:
        raise from_os_error(err, f"the original's image {path} can't be read") from err
    except MistifyError:
        blobs.abort(ref)
        raise
