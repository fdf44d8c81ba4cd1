"""Metadata stores and image stores, registered by name: what a configuration file can ask for.

To add one: write a function that opens the engine from the configuration's table, and register a factory here under its name.
A factory makes a store that is not open yet; ``init`` opens it.
"""

from __future__ import annotations

import builtins
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from image_service.metadata import MetadataStore
from image_service.original import find_original
from image_service.shared_stores import open_etcd, open_s3
from imaging.blobs.base import BlobInfo, BlobStore
from imaging.blobs.local import LocalBlobStore
from imaging.blobs.space import RESERVE_FREE_BYTES
from imaging.digests import Digest
from imaging.errors import AlreadyExistsError, InvalidArgumentError
from imaging.files import make_directory
from imaging.kv.base import KeyValue
from imaging.kv.sqlite import SqliteKeyValue

T = TypeVar("T")

COPY_BYTES = 1 << 20
"""Copied at once between a blob and a file object."""


class StoreRegistry(Generic[T]):
    """Names and the factories behind them."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._factories: dict[str, Callable[[], T]] = {}

    def register(self, name: str, factory: Callable[[], T]) -> None:
        """Give a factory a name; AlreadyExistsError if it is taken."""
        if name in self._factories:
            raise AlreadyExistsError(f"{self._kind} type {name!r} is registered already")
        self._factories[name] = factory

    def list(self) -> builtins.list[str]:
        """The names, sorted."""
        return sorted(self._factories)

    def new_store(self, name: str) -> T:
        """A store of that type, not open yet; InvalidArgumentError if nobody registered it."""
        try:
            factory = self._factories[name]
        except KeyError as err:
            known = ", ".join(self.list())
            raise InvalidArgumentError(f"unknown {self._kind} type {name!r}; there is: {known}") from err
        return factory()


class ImageStore:
    """Image data by digest. ``blobs`` is the whole store; the calls beside it are what the configuration's users know."""

    def __init__(self, open_blobs: Callable[[Mapping[str, Any]], BlobStore]) -> None:
        self._open_blobs = open_blobs
        self._blobs: BlobStore | None = None

    def init(self, config: Mapping[str, Any]) -> None:
        """Open the store the configuration describes."""
        self._blobs = self._open_blobs(config)

    def shutdown(self) -> None:
        """Release it; idempotent."""
        if self._blobs is not None:
            self._blobs.close()

    @property
    def blobs(self) -> BlobStore:
        """The store; InvalidArgumentError before ``init``."""
        if self._blobs is None:
            raise InvalidArgumentError("the image store is not open")
        return self._blobs

    def stat(self, digest: Digest) -> BlobInfo:
        """The blob; NotFoundError."""
        return self.blobs.info(digest)

    def get(self, digest: Digest, target: BinaryIO) -> None:
        """Copy a blob to ``target``, verified on the way; NotFoundError, BadDataError."""
        with self.blobs.open(digest, verify=True) as source:
            shutil.copyfileobj(source, target, COPY_BYTES)

    def put(self, ref: str, source: BinaryIO) -> BlobInfo:
        """Store everything ``source`` gives; nothing is left of it if it fails."""
        with self.blobs.ingest(ref) as writer:
            try:
                shutil.copyfileobj(source, writer, COPY_BYTES)
                return writer.commit()
            except BaseException:
                writer.abort()
                raise

    def delete(self, digest: Digest) -> None:
        """Remove a blob; NotFoundError, BusyError."""
        self.blobs.delete(digest)


def required_text(config: Mapping[str, Any], key: str, what: str) -> str:
    """A value that must be a non-empty string; InvalidArgumentError otherwise."""
    value = config.get(key)
    if not isinstance(value, str) or not value:
        raise InvalidArgumentError(f"{what} needs {key!r}, a non-empty string")
    return value


def _open_embedded(config: Mapping[str, Any]) -> KeyValue:
    """The embedded engine in ``filename``, or beside it if that is a file of the original's, which is never written to."""
    path = Path(required_text(config, "filename", "metadataStoreConfig"))
    make_directory(path.parent)
    if find_original(config) is not None:
        path = path.with_name(path.name + ".records")
    return SqliteKeyValue(path)


def _open_local(config: Mapping[str, Any]) -> BlobStore:
    directory = make_directory(Path(required_text(config, "dir", "imageStoreConfig")))
    return LocalBlobStore(
        directory,
        quota_bytes=config.get("quota_bytes") or None,
        reserve_free_bytes=config.get("free_min_bytes", RESERVE_FREE_BYTES),
    )


metadata_stores: StoreRegistry[MetadataStore] = StoreRegistry("metadata store")
metadata_stores.register("kvite", lambda: MetadataStore(_open_embedded))
metadata_stores.register("sqlite", lambda: MetadataStore(_open_embedded))
metadata_stores.register("etcd", lambda: MetadataStore(open_etcd))

image_stores: StoreRegistry[ImageStore] = StoreRegistry("image store")
image_stores.register("fs", lambda: ImageStore(_open_local))
image_stores.register("s3", lambda: ImageStore(open_s3))
