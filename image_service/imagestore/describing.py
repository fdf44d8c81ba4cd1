"""What an uploaded container image says about itself: its kind, name and labels, read from the stored bytes.

App containers and OCI layouts are checked: one that claims to be such and breaks the rules is refused (BadDataError,
TooLargeError). Anything else, a plain root file system for instance, has nothing to say and is left as it is.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec

from image_service.imagestore.oci_reading import read_layout
from imaging.aci import MANIFEST_MAX_BYTES, parse_manifest
from imaging.blobs.base import BlobStore
from imaging.compression import Compression, open_decompressed
from imaging.digests import Digest
from imaging.errors import BadDataError, MistifyError, TooLargeError
from imaging.files import os_errors, write_all
from imaging.oci import INDEX_FILE, LAYOUT_FILE
from imaging.tarball import TarEntry, read_entry, walk_tar

UNPACKED_MAX_BYTES = 64 << 20
"""So much of a packed image is unpacked to look at: manifests come first in app containers, and small layouts are whole."""

PIECE_BYTES = 1 << 20
SQUASHFS_MAGIC = b"hsqs"
KIND_LABEL = "kind"
DEFAULT_NAME = "image"


@dataclass(frozen=True, slots=True)
class Description:
    """What was found; empty if there is nothing to say."""

    name: str = ""
    version: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Bytes:
    """The beginning of the unpacked bytes, as a file; ``whole`` if it is all of them."""

    fd: int
    whole: bool


def describe(blobs: BlobStore, digest: Digest, compression: Compression) -> Description:
    """Look at a stored container image."""
    with _unpacked(blobs, digest, compression) as unpacked:
        if os.pread(unpacked.fd, len(SQUASHFS_MAGIC), 0) == SQUASHFS_MAGIC:
            return Description(labels={KIND_LABEL: "squashfs"})
        found = _find_entries(unpacked.fd)
        if "manifest" in found:
            return _describe_aci(read_entry(unpacked.fd, found["manifest"], MANIFEST_MAX_BYTES))
        if unpacked.whole and LAYOUT_FILE in found and INDEX_FILE in found:
            return _describe_layout(unpacked.fd)
    return Description(labels={KIND_LABEL: "oci"} if LAYOUT_FILE in found else {})


@contextmanager
def _unpacked(blobs: BlobStore, digest: Digest, compression: Compression) -> Iterator[_Bytes]:
    path = blobs.path(digest) if compression is Compression.NONE else None
    if path is not None:
        with os_errors(f"cannot open {digest}"):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield _Bytes(fd, whole=True)
        finally:
            os.close(fd)
        return
    with tempfile.TemporaryFile() as file, blobs.open(digest) as stored:
        reader, size = open_decompressed(stored, compression=compression), 0
        while size < UNPACKED_MAX_BYTES and (piece := reader.read(PIECE_BYTES)):
            with os_errors("cannot write a temporary file"):
                write_all(file.fileno(), piece, size)
            size += len(piece)
        yield _Bytes(file.fileno(), whole=size < UNPACKED_MAX_BYTES)


def _find_entries(fd: int) -> dict[str, TarEntry]:
    """The first of each file that tells kinds apart. What is no sound archive, or is cut here, tells nothing more."""
    found: dict[str, TarEntry] = {}
    try:
        for entry in walk_tar(fd):
            if entry.is_file and entry.clean_name in {"manifest", LAYOUT_FILE, INDEX_FILE}:
                found.setdefault(entry.clean_name, entry)
    except (BadDataError, TooLargeError):
        return found
    return found


def _describe_aci(document: bytes) -> Description:
    """A file called ``manifest`` is an app container's if it says so; then it must be a sound one."""
    try:
        value = msgspec.json.decode(document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Description()
    if not isinstance(value, dict) or "acKind" not in value:
        return Description()
    manifest = parse_manifest(document)
    labels = manifest.label_values
    return Description(manifest.name, labels.get("version", ""), {**labels, KIND_LABEL: "aci"})


def _describe_layout(fd: int) -> Description:
    """A layout: all of it is verified; the first image gives the name."""
    try:
        layout = read_layout(fd, DEFAULT_NAME)
        for part in layout.parts.values():
            part.verify()
    except (BadDataError, TooLargeError):
        raise
    except MistifyError as err:
        raise BadDataError(err.message) from err
    reference, _ = layout.images[0]
    name = "" if reference.name == DEFAULT_NAME else reference.name
    return Description(name, reference.tag, {"tag": reference.tag, KIND_LABEL: "oci"})
