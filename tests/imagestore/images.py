"""Images made in memory, sound and broken."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard

from image_service.imagestore.store import ImageStore

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}


def manifest(name: str = "example.com/app", **changes: Any) -> dict[str, Any]:
    """A manifest; ``labels`` may be a dictionary, ``...`` leaves a member out."""
    labels = changes.pop("labels", {})
    if isinstance(labels, dict):
        labels = [{"name": key, "value": value} for key, value in labels.items()]
    document = {"acKind": "ImageManifest", "acVersion": "0.8.11", "name": name, "labels": labels} | changes
    return {key: value for key, value in document.items() if value is not ...}


def entry(name: str, data: bytes | None = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    """One entry of an archive; no data makes a directory."""
    info = tarfile.TarInfo(name)
    info.size = len(data or b"")
    if data is None:
        info.type, info.mode = tarfile.DIRTYPE, 0o755
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data or b""


def tar(*entries: tuple[tarfile.TarInfo, bytes], style: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive of these entries."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=style) as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def aci(name: str = "example.com/app", *, content: bytes = b"hello\n", **changes: Any) -> bytes:
    """A small sound image (or one whose manifest is not)."""
    document = json.dumps(manifest(name, **changes)).encode()
    return tar(entry("manifest", document), entry("rootfs", None), entry("rootfs/file", content))


def key_of(image: bytes) -> str:
    """The key of an unpacked image."""
    return f"sha512-{hashlib.sha512(image).hexdigest()[:64]}"


def put(store: ImageStore, image: bytes, *, latest: bool | None = None) -> str:
    """Import an image."""
    return store.write_aci(io.BytesIO(image), latest=latest)


def files(store: ImageStore) -> set[str]:
    """Every file of the store that holds content, below its directory."""
    layout = store.layout
    parents = (layout.blobs, layout.manifests, layout.temporary, layout.oci_blobs, layout.quarantine)
    return {str(path.relative_to(layout.root)) for parent in parents for path in parent.rglob("*") if path.is_file()}


def files_of(*keys: str) -> set[str]:
    """What :func:`files` should say if these images are stored."""
    return {f"{base}/sha512/{key[7:9]}/{key}" for base in ("blob", "imageManifest") for key in keys}


def blob_of(store: ImageStore, key: str) -> Path:
    """The archive of an image."""
    return store.layout.blob(key)


def read(store: ImageStore, reference: str, *, verify: bool = False) -> bytes:
    """The whole archive of an image."""
    with store.open_stream(reference, verify=verify) as file:
        return file.read()
