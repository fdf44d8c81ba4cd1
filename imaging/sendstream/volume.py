"""Volume streams onto disk images and back: the part of the codec that does input and output.

* :func:`apply_stream` (or :class:`VolumeReceiver`, piece by piece): stream or package -> image, returns the :class:`VolumeState`.
* :func:`make_stream`: image (and an older one) -> stream; :func:`make_stream_from`: bytes read once -> stream.
* :func:`hash_image`, :func:`data_ranges`, :func:`derive_guid`: around it.
"""

from imaging.compression import Readable
from imaging.sendstream.blocks import BlockCompression
from imaging.sendstream.image import data_ranges, hash_image, image_size, punch_hole
from imaging.sendstream.receiving import VolumeReceiver, apply_stream
from imaging.sendstream.rules import DEFAULT_LIMITS, Limits
from imaging.sendstream.sending import OlderImage, derive_guid, make_stream, make_stream_from, padded_size
from imaging.sendstream.state import ResumePoint, VolumeState
from imaging.sendstream.writer import StreamHeader, check_block_size

__all__ = [
    "DEFAULT_LIMITS",
    "BlockCompression",
    "Limits",
    "OlderImage",
    "Readable",
    "ResumePoint",
    "StreamHeader",
    "VolumeReceiver",
    "VolumeState",
    "apply_stream",
    "check_block_size",
    "data_ranges",
    "derive_guid",
    "hash_image",
    "image_size",
    "make_stream",
    "make_stream_from",
    "padded_size",
    "punch_hole",
]
