"""Stores named by addresses, for the copy commands.

    sqlite:///var/lib/mistify-image-service/records.db
    etcd://etcd1:2379,etcd2:2379/mistify?user=images&password_file=/etc/...   (etcds:// with TLS)
    file:///var/lib/mistify-image-service/images
    s3://bucket/prefix?endpoint=https://...&access_key=...&secret_key_file=/etc/...

What follows the question mark are keys of the store's table in the configuration file.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from image_service.copying import BlobSource, LocalBlobFiles
from image_service.shared_stores import open_etcd, open_s3
from imaging.blobs.base import BlobStore
from imaging.blobs.local import LocalBlobStore
from imaging.errors import InvalidArgumentError, NotFoundError
from imaging.kv.base import KeyValue
from imaging.kv.sqlite import SqliteKeyValue, from_sqlite_error

_NUMBERS = ("part_size_bytes", "parts_max", "redirect_s")


def _split(url: str) -> tuple[SplitResult, dict[str, Any]]:
    parts = urlsplit(url)
    table: dict[str, Any] = dict(parse_qsl(parts.query, keep_blank_values=True))
    for key in _NUMBERS:
        if key in table:
            if not table[key].isdecimal():
                raise InvalidArgumentError(f"{key!r} must be a whole number above 0")
            table[key] = int(table[key])
    return parts, table


def _path(parts: SplitResult) -> Path:
    if parts.netloc or not parts.path:
        raise InvalidArgumentError(f"needs an absolute path: {parts.scheme}:///...")
    return Path(unquote(parts.path))


def _etcd(parts: SplitResult, table: dict[str, Any]) -> KeyValue:
    scheme = "https" if parts.scheme == "etcds" else "http"
    machines = [f"{scheme}://{host}" for host in parts.netloc.split(",") if host]
    prefix = {"prefix": unquote(parts.path)} if parts.path.strip("/") else {}
    return open_etcd({"machines": machines, **prefix, **table})


@contextmanager
def _sqlite_snapshot(path: Path) -> Iterator[KeyValue]:
    """A consistent copy of the records, made beside the service that owns them."""
    if not path.is_file():
        raise NotFoundError(f"no such file: {path}")
    with tempfile.TemporaryDirectory(prefix="mistify-copy-") as directory:
        copy = Path(directory) / "records.db"
        try:
            with (
                closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as source,
                closing(sqlite3.connect(copy)) as target,
            ):
                source.backup(target)
        except sqlite3.Error as err:
            raise from_sqlite_error(err, f"cannot read the records in {path}") from err
        with SqliteKeyValue(copy) as store:
            yield store


@contextmanager
def records_source(url: str) -> Iterator[KeyValue]:
    """The records an address names, for reading."""
    parts, _table = _split(url)
    if parts.scheme == "sqlite":
        with _sqlite_snapshot(_path(parts)) as store:
            yield store
        return
    with records_target(url) as store:
        yield store


@contextmanager
def records_target(url: str) -> Iterator[KeyValue]:
    """The records an address names, for writing."""
    parts, table = _split(url)
    if parts.scheme == "sqlite":
        store: KeyValue = SqliteKeyValue(_path(parts))
    elif parts.scheme in {"etcd", "etcds"}:
        store = _etcd(parts, table)
    else:
        raise InvalidArgumentError(f"not an address of records (sqlite, etcd, etcds): {url[:80]!r}")
    with closing(store):
        yield store


def _bucket(parts: SplitResult, table: dict[str, Any]) -> BlobStore:
    prefix = unquote(parts.path).lstrip("/")
    return open_s3({"bucket": parts.netloc, "prefix": f"{prefix.rstrip('/')}/" if prefix else "", **table})


@contextmanager
def blobs_source(url: str) -> Iterator[BlobSource]:
    """The blobs an address names, for reading."""
    parts, _table = _split(url)
    if parts.scheme == "file":
        yield LocalBlobFiles(_path(parts))
        return
    with blobs_target(url) as store:
        yield store


@contextmanager
def blobs_target(url: str) -> Iterator[BlobStore]:
    """The blobs an address names, for writing."""
    parts, table = _split(url)
    if parts.scheme == "file":
        store: BlobStore = LocalBlobStore(_path(parts))
    elif parts.scheme == "s3":
        store = _bucket(parts, table)
    else:
        raise InvalidArgumentError(f"not an address of blobs (file, s3): {url[:80]!r}")
    with closing(store):
        yield store
