"""Which kind of container image a tarball is, by what it has at its top.

Image servers know two: a plain root file system, and the unified tarball of Incus and LXD (``metadata.yaml`` beside ``rootfs/``), which
they offer under a name of its own. App containers and OCI layouts are tarballs, too, and nothing their clients could start.
"""

from __future__ import annotations

import posixpath
import tarfile
from enum import StrEnum

from imaging.blobs.base import BlobInfo, BlobStore
from imaging.compression import Readable, open_decompressed
from imaging.errors import BadDataError

LOOK_MAX_BYTES = 16 << 20
"""So much is unpacked to look at: what tells the kinds apart comes first in all that tools write."""


class TarballKind(StrEnum):
    """What a tarball holds."""

    ROOTFS = "rootfs"
    UNIFIED = "unified"
    ACI = "app container"
    OCI = "OCI layout"


_MARKS = (
    (TarballKind.UNIFIED, {"metadata.yaml", "rootfs"}),
    (TarballKind.ACI, {"manifest", "rootfs"}),
    (TarballKind.OCI, {"oci-layout"}),
)


class _Bounded:
    """The beginning of the unpacked bytes."""

    def __init__(self, source: Readable) -> None:
        self._source = source
        self._left_bytes = LOOK_MAX_BYTES

    def read(self, size: int = -1, /) -> bytes:
        piece = self._source.read(min(size, self._left_bytes)) if self._left_bytes else b""
        self._left_bytes -= len(piece)
        return piece


def find_tarball_kind(blobs: BlobStore, info: BlobInfo) -> TarballKind:
    """The kind of a stored tarball, packed or not."""
    names: set[str] = set()
    with blobs.open(info.digest) as file:
        bounded = _Bounded(open_decompressed(file))
        try:
            with tarfile.open(fileobj=bounded, mode="r|") as archive:  # type: ignore[call-overload]  # it only reads
                for member in archive:
                    names.add(posixpath.normpath(member.name).lstrip("/").split("/", 1)[0])
                    for kind, marks in _MARKS:
                        if marks <= names:
                            return kind
        except (tarfile.TarError, BadDataError):
            return TarballKind.ROOTFS  # cut at the bound, or old: what was seen until there has no mark
    return TarballKind.ROOTFS
