"""App container images as files: what kind of file it is, and the manifest inside the archive."""

from __future__ import annotations

from imaging.aci import MANIFEST_MAX_BYTES, ImageManifest, parse_manifest
from imaging.compression import Compression
from imaging.errors import BadDataError
from imaging.tarball import TarEntry, read_entry, walk_tar

HEAD_BYTES = 512
"""What the kind of a file is seen from."""

_TAR_MAGIC, _TAR_MAGIC_OFFSET = b"ustar", 257
_COMPRESSIONS = (
    (b"\x1f\x8b", Compression.GZIP),
    (b"BZh", Compression.BZIP2),
    (b"\xfd7zXZ\0", Compression.XZ),
    (b"\x28\xb5\x2f\xfd", Compression.ZSTD),
)
_BINARY = frozenset({*range(9), 0x0B, *range(0x0E, 0x1B), *range(0x1C, 0x20)})
"""Control characters that no text has."""


def is_tar(head: bytes) -> bool:
    """Whether content that starts so is a tar archive."""
    return head[_TAR_MAGIC_OFFSET : _TAR_MAGIC_OFFSET + len(_TAR_MAGIC)] == _TAR_MAGIC


def detect_compression(head: bytes) -> Compression:
    """How an archive is packed; BadDataError for what is neither packed nor an archive. ``head``: HEAD_BYTES or all there is."""
    for magic, compression in _COMPRESSIONS:
        if head.startswith(magic):
            return compression
    if is_tar(head):
        return Compression.NONE
    if not _BINARY.intersection(head):
        raise BadDataError("no type returned from DetectFileType?")
    raise BadDataError("error: unknown image filetype")


def read_manifest(fd: int) -> ImageManifest:
    """The manifest of an unpacked archive, after a look at every entry; BadDataError, TooLargeError.

    The first entry named ``manifest`` counts, wherever it is. What else is in the archive does not matter, as long as it stays inside.
    """
    found: TarEntry | None = None
    for entry in walk_tar(fd):
        if found is None and entry.clean_name == "manifest":
            found = entry
    if found is None or not found.is_file:
        raise BadDataError("missing manifest")
    return parse_manifest(read_entry(fd, found, MANIFEST_MAX_BYTES))
