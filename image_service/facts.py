"""What is known about an image's bytes after they were looked at, and the limits on looking.

*Stored* bytes are what was uploaded or fetched. *Unpacked* bytes are the same without their compression. *Content* is what a guest or
container gets in the end: the virtual disk of a raw or qcow2 image or of a volume stream, with its zeros, otherwise the unpacked bytes.
Two images with one content digest are the same image, whatever their encoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from imaging.compression import Compression, DecompressionLimits
from imaging.diskimage.base import VIRTUAL_SIZE_MAX_BYTES
from imaging.errors import InvalidArgumentError


class ImageFormat(StrEnum):
    """What unpacked bytes are, by their content."""

    ZVOL = "zvol"
    """A send stream of a volume."""
    ZFS = "zfs"
    """A send stream of a filesystem."""
    RAW = "raw"
    """The disk itself, or what has no format of its own."""
    QCOW2 = "qcow2"
    TAR = "tar"

    @classmethod
    def parse(cls, text: str) -> ImageFormat:
        """The format of that name; InvalidArgumentError otherwise."""
        try:
            return cls(text)
        except ValueError as err:
            known = ", ".join(cls)
            raise InvalidArgumentError(f"unknown image format {text[:64]!r}; there is: {known}") from err


@dataclass(frozen=True, slots=True)
class InspectionLimits:
    """What an image's bytes may ask for."""

    unpacked_size_max_bytes: int = 1 << 40
    """1 TiB, as for stored bytes; a compressed image is read to its end, which costs time in proportion to this."""
    unpacked_ratio_max: int = 10_000
    """Unpacked over stored size: ten times what gzip reaches with nothing but zeros; a disk with a boot loader stays below."""
    unpacked_ratio_floor_bytes: int = 16 << 30
    """Up to this size the ratio is not looked at: an empty disk packs to nothing and is no bomb."""
    virtual_size_max_bytes: int = VIRTUAL_SIZE_MAX_BYTES
    """What a guest would see; a header of some bytes can claim any number."""
    digest_size_max_bytes: int = 256 << 30
    """Largest disk whose zeros are hashed for the content digest: four minutes for a stream of a few bytes that claims it."""

    def decompression(self) -> DecompressionLimits:
        """The limits as the decompressor takes them."""
        return DecompressionLimits(
            self.unpacked_size_max_bytes, self.unpacked_ratio_max, self.unpacked_ratio_floor_bytes
        )


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found. Digests are written ``<algorithm>:<hex>``; empty if not known."""

    format: ImageFormat = ImageFormat.RAW
    compression: Compression = Compression.NONE
    unpacked_size_bytes: int = 0
    unpacked_sha256: str = ""
    unpacked_sha512: str = ""
    virtual_size_bytes: int = 0
    """Size of the virtual disk; 0 if there is none."""
    content_digest: str = ""
    """sha256 of the content. Unknown for disks over ``InspectionLimits.digest_size_max_bytes`` and for encrypted volumes."""
    name: str = ""
    """What the image calls itself. This and the next two: app containers and OCI layouts."""
    version: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
