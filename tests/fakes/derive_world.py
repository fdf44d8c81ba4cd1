"""What derives images, over real stores, without HTTP."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from image_service.admission import Admission, AdmissionLimits
from image_service.collector import Collector
from image_service.derive import DerivedStore, Deriver
from image_service.derive_forms import Form
from image_service.derive_work import DeriveLimits
from image_service.lifecycle import Image, ImageStatus, ImageType
from image_service.metadata import MetadataStore
from imaging.blobs.base import BlobInfo
from imaging.blobs.local import LocalBlobStore
from imaging.compression import open_decompressed
from imaging.digests import Digest
from imaging.errors import NotFoundError
from imaging.kv.sqlite import SqliteKeyValue
from imaging.sendstream.volume import VolumeState, apply_stream
from imaging.threads import Offload

LIMITS = DeriveLimits(wait_s=120.0, free_min_bytes=0)


class DeriveWorld:
    """One service's stores and its deriver."""

    def __init__(self, directory: Path, limits: DeriveLimits, quota_bytes: int | None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.work_directory = directory / "derive"
        self.now_s = 0.0
        self.blobs = LocalBlobStore(directory / "images", reserve_free_bytes=0, quota_bytes=quota_bytes)
        self.engine = SqliteKeyValue(directory / "records.db")
        self.records = MetadataStore.over(self.engine)
        self.collector = Collector(self.records, self.blobs)
        admission = Admission(AdmissionLimits(free_min_bytes=0))
        self.store = DerivedStore(self.blobs, self.engine, self.collector, admission, limits)
        self.offload = Offload("data", 4)
        self.deriver = Deriver(self.find_blob, self.store, self.offload, self.work_directory, limits=limits)

    async def find_blob(self, image_id: str) -> tuple[Image, BlobInfo]:
        image = self.records.get_by_id(image_id)
        if image.status is not ImageStatus.COMPLETE:
            raise NotFoundError("incomplete image")
        return image, self.blobs.info(image.blob)

    def add(self, image_id: str, data: bytes, *, disk: bytes = b"") -> BlobInfo:
        """A complete image; with ``disk`` its record says what disk is in it."""
        with self.blobs.ingest(f"test-{image_id}") as writer:
            writer.write(data)
            info = writer.commit()
        image = Image(
            id=image_id,
            type=ImageType.KVM,
            status=ImageStatus.COMPLETE,
            digest=str(info.digest),
            virtual_size_bytes=len(disk),
            content_digest=str(Digest.of(disk)) if disk else "",
        )
        self.records.put(image)
        return info

    async def get(self, image_id: str, **query: str) -> bytes:
        """The bytes of an image in a form; ``base`` stands for ``from``."""
        return self.read(await self.info(image_id, **query))

    async def info(self, image_id: str, **query: str) -> BlobInfo:
        """Its blob."""
        named = {"from" if name == "base" else name: value for name, value in query.items()}
        return await self.deriver.get_blob(image_id, Form.parse(named))

    def read(self, info: BlobInfo) -> bytes:
        """A blob's bytes, verified."""
        with self.blobs.open(info.digest, verify=True) as file:
            return file.read()

    def strays(self) -> list[str]:
        """Ingests, leases and temporary files."""
        files = [path.name for path in self.work_directory.iterdir()]
        return [one.ref for one in self.blobs.ingests()] + list(self.blobs.leases()) + files

    async def close(self) -> None:
        await self.deriver.close()
        self.offload.close()
        self.engine.close()
        self.blobs.close()


@asynccontextmanager
async def open_derive_world(
    directory: Path, *, quota_bytes: int | None = None, **changes: Any
) -> AsyncIterator[DeriveWorld]:
    """A world that is closed in the end."""
    world = DeriveWorld(directory, replace(LIMITS, **changes), quota_bytes)
    try:
        yield world
    finally:
        await world.close()


def unpack(data: bytes) -> bytes:
    """Whatever compression it has."""
    return open_decompressed(io.BytesIO(data)).read()


def received(path: Path, *streams: bytes) -> tuple[bytes, VolumeState]:
    """The volume that streams make, one after another, and its state."""
    state = None
    with path.open("w+b") as file:
        for stream in streams:
            state = apply_stream(io.BytesIO(unpack(stream)), file.fileno(), state)
        assert state is not None
        file.seek(0)
        return file.read(), state


def digest_of(data: bytes) -> str:
    return Digest.of(data).hex
