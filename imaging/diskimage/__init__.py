"""Virtual disk formats, read as extents of data; what is not in an extent reads as zero."""

from imaging.diskimage.base import Disk, DiskFormat, Extent
from imaging.diskimage.probe import content_digest, open_disk, sniff_disk, write_raw

__all__ = ["Disk", "DiskFormat", "Extent", "content_digest", "open_disk", "sniff_disk", "write_raw"]
