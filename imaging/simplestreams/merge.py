"""Adding images to a site's own catalogue, without losing what it says already."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import msgspec

from imaging.errors import NotFoundError, UnsupportedError
from imaging.files import atomic_write_bytes, make_directory, os_errors
from imaging.simplestreams.constraint import ImageConstraint, product_id, series_version
from imaging.simplestreams.model import CloudSpec, ImageMetadata, Index, check_format, decode_document
from imaging.simplestreams.paths import (
    BASE_IMAGES_PATH,
    INDEX_FORMAT,
    PRODUCT_METADATA_PATH,
    check_path,
    index_storage_path,
    join_url,
    product_metadata_storage_path,
)
from imaging.simplestreams.reader import Lookup, fetch, sort_images
from imaging.simplestreams.selecting import parse_products, select_items
from imaging.simplestreams.sources import Fetched
from imaging.simplestreams.writer import WriteOptions, image_product_id, marshal_image_metadata

_PRODUCT_ID = re.compile(r"com\.ubuntu\.cloud(?:\.([^:]+))?:server:([^:]+):([^:]+)\Z")


class MetadataStorage(Protocol):
    """Where a site keeps its documents."""

    def get(self, path: str) -> bytes:
        """A document; NotFoundError."""

    def put(self, path: str, data: bytes) -> None:
        """Create or replace a document, whole or not at all."""


class FileStorage:
    """Documents in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def get(self, path: str) -> bytes:
        """A document; NotFoundError."""
        file = self.directory / check_path(path)
        with os_errors(f"cannot read {file}"):
            return file.read_bytes()

    def put(self, path: str, data: bytes) -> None:
        """Create or replace a document, whole or not at all."""
        file = self.directory / check_path(path)
        make_directory(file.parent)
        atomic_write_bytes(file, data)


class StorageSource:
    """A site's storage as a source of documents."""

    def __init__(self, storage: MetadataStorage, base: str = BASE_IMAGES_PATH, description: str = "storage") -> None:
        self._storage = storage
        self._base = base
        self.description = description

    def url(self, path: str) -> str:
        """The document's path in the storage, as a URL."""
        return f"storage:///{join_url(self._base, path)}"

    def fetch(self, path: str) -> Fetched:
        """Read a whole document."""
        return Fetched(self._storage.get(join_url(self._base, check_path(path))), self.url(path))


def merge_and_write_metadata(
    series: str,
    images: Sequence[ImageMetadata],
    cloud: CloudSpec,
    storage: MetadataStorage,
    *,
    now: datetime | None = None,
    compat: bool = False,
) -> None:
    """Add images of a series in a cloud's region to the catalogue in ``storage``; they replace those they stand for.

    The records' own version and region give way to the arguments. Everything else that is there stays: other series, regions and
    streams. The products file is written before the index, so that no reader finds a promise that is not kept yet.
    With ``compat`` only released images of known series and architectures stay, and the index is written first.
    """
    existing = _read_compat(storage) if compat else _read_all(storage)
    version = series_version(series, compat=compat)
    region, endpoint = cloud.region or "", cloud.endpoint or ""
    added = [msgspec.structs.replace(image, version=version, region_name=region, endpoint=endpoint) for image in images]
    replaced = {_key(image, compat=compat) for image in added}
    kept = [image for image in existing if _key(image, compat=compat) not in replaced]
    clouds = [cloud, *(CloudSpec(image.region_name, image.endpoint) for image in kept)]
    index, products = marshal_image_metadata(
        [*added, *kept],
        _one_a_region(clouds, compat=compat),
        now or datetime.now(UTC),
        WriteOptions(compat=compat, storage=not compat),
    )
    writes = [(index_storage_path(), index), (product_metadata_storage_path(), products)]
    for path, data in writes if compat else reversed(writes):
        storage.put(path, data)


def _key(image: ImageMetadata, *, compat: bool) -> tuple[str, ...]:
    """What an added image replaces; the original took a paravirtual image for a fully virtual one of the same product."""
    key = (image_product_id(image), image.region_name)
    return key if compat else (*key, image.virt_type, image.storage)


def _one_a_region(clouds: Sequence[CloudSpec], *, compat: bool) -> list[CloudSpec]:
    """The new cloud, then one for each region that was there; only the original may name the new one's region twice."""
    first, rest = clouds[0], clouds[1:]
    seen = set() if compat else {first.region or ""}
    chosen = [first]
    for cloud in rest:
        if (cloud.region or "") not in seen:
            seen.add(cloud.region or "")
            chosen.append(cloud)
    return chosen


def _read_compat(storage: MetadataStorage) -> list[ImageMetadata]:
    """What the default constraint finds."""
    try:
        return fetch([StorageSource(storage)], ImageConstraint(compat=True), Lookup(compat=True))[0]
    except NotFoundError:
        return []


def _read_all(storage: MetadataStorage) -> list[ImageMetadata]:
    """The newest of everything; a catalogue this could not write back whole is an error."""
    try:
        index_data = storage.get(index_storage_path())
    except NotFoundError:
        return []
    index = decode_document(index_data, Index, f"cannot unmarshal JSON index metadata in {index_storage_path()}")
    check_format(index.format, INDEX_FORMAT, index_storage_path())
    foreign = [entry.path for _, entry in index.entries() if entry.path != PRODUCT_METADATA_PATH]
    if foreign:
        raise UnsupportedError(f"cannot merge into an index that names other products files: {foreign[0]!r}")
    return _read_products(storage)


def _read_products(storage: MetadataStorage) -> list[ImageMetadata]:
    path = product_metadata_storage_path()
    try:
        products = parse_products(storage.get(path), path)
    except NotFoundError as err:
        raise NotFoundError(f"cannot merge: the index names {path}, which is not there") from err
    found: list[ImageMetadata] = []
    for name in products.product_ids():
        stream = _stream_of(name)
        try:
            items = select_items(products, [name], "")
        except NotFoundError:
            continue  # a product without items has nothing to keep
        found += [_with_stream(item, name, stream) for item in items]
    return sort_images(found)


def _stream_of(name: str) -> str:
    match = _PRODUCT_ID.match(name)
    if match is None:
        raise UnsupportedError(f"cannot merge: product {name!r} is not named as image ids are")
    return match[1] or ""


def _with_stream(image: ImageMetadata, name: str, stream: str) -> ImageMetadata:
    """The record with what only the product's name tells; it must lead back to the same product."""
    match = _PRODUCT_ID.match(name)
    assert match is not None
    whole = msgspec.structs.replace(
        image, stream=stream, version=image.version or match[2], arch=image.arch or match[3]
    )
    if product_id(whole.version, whole.arch, whole.stream) != name:
        raise UnsupportedError(f"cannot merge: product {name!r} has an image of another version or architecture")
    return whole
