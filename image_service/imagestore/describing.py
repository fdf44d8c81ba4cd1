"""What an uploaded container image says about itself: its kind, name and labels, read from the stored bytes.

Of a packed image the beginning is unpacked, and all of it only if it looks like one whose documents come last. App containers
and OCI layouts are checked: one that claims to be such and breaks the rules is refused (BadDataError, TooLargeError). Anything
else, a plain root file system for instance, has nothing to say and is left as it is.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
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

BEGINNING_BYTES = 64 << 20
"""So much of a packed image is unpacked to look at: manifests come first in most app containers, and small layouts are whole."""

_TOPS = (frozenset({"blobs", LAYOUT_FILE, INDEX_FILE}), frozenset({"rootfs", "manifest"}))
"""What layouts and app containers have at their top, and nothing else."""

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


Whole = Callable[[], AbstractContextManager[int]]
"""Unpacks all of an image into a file."""


def describe(blobs: BlobStore, digest: Digest, compression: Compression, whole: Whole) -> Description:
    """Look at a stored container image."""
    with _unpacked(blobs, digest, compression) as beginning:
        said = _describe(beginning)
    if said is None:
        with whole() as fd:
            said = _describe(_Bytes(fd, whole=True))
    return said or Description()


def _describe(unpacked: _Bytes) -> Description | None:
    """What these bytes say; None if the rest of them must be seen."""
    with os_errors("cannot read an image"):
        if os.pread(unpacked.fd, len(SQUASHFS_MAGIC), 0) == SQUASHFS_MAGIC:
            return Description(labels={KIND_LABEL: "squashfs"})
    found, tops = _find_entries(unpacked.fd)
    if "manifest" in found:
        return _describe_aci(read_entry(unpacked.fd, found["manifest"], MANIFEST_MAX_BYTES))
    if not unpacked.whole and tops and any(tops <= known for known in _TOPS):
        return None
    if LAYOUT_FILE in found and INDEX_FILE in found:
        return _describe_layout(unpacked.fd)
    return Description()


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
        while size < BEGINNING_BYTES and (piece := reader.read(PIECE_BYTES)):
            with os_errors("cannot write a temporary file"):
                write_all(file.fileno(), piece, size)
            size += len(piece)
        yield _Bytes(file.fileno(), whole=size < BEGINNING_BYTES)


def _find_entries(fd: int) -> tuple[dict[str, TarEntry], set[str]]:
    """The first of each file that tells kinds apart, and all names at the top. What is no sound archive, or is cut here, ends it."""
    found: dict[str, TarEntry] = {}
    tops: set[str] = set()
    try:
        for entry in walk_tar(fd):
            tops.add(entry.clean_name.split("/", 1)[0])
            if entry.is_file and entry.clean_name in {"manifest", LAYOUT_FILE, INDEX_FILE}:
                found.setdefault(entry.clean_name, entry)
    except (BadDataError, TooLargeError):
        return found, tops - {"."}
    return found, tops - {"."}


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
