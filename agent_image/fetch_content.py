"""What a download is, found by its first bytes: compressed or not, a volume stream or a raw disk, or something that is no image."""

from __future__ import annotations

from agent_image.fetch_pipe import ReadAhead
from imaging.compression import SNIFF_BYTES, Compression, DecompressingReader, DecompressionLimits, sniff
from imaging.errors import BadDataError, UnsupportedError
from imaging.names import is_snapshot_part
from imaging.sendstream.records import HEADER_BYTES, MAGIC, Begin, parse

HEAD_BYTES = HEADER_BYTES
"""What is looked at to tell what an image is."""

_SNAPSHOT_DEFAULT = "image"
"""Of a stream whose own name is not one a snapshot may have here."""

_QCOW2 = b"QFI\xfb"
_OTHER_FORMATS = {_QCOW2: "qcow2", b"KDMV": "vmdk", b"vhdxfile": "vhdx", b"conectix": "vhd"}
"""Disk formats whose bytes must not become a raw disk: whoever opens that later may guess the format and follow what it says."""

_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")


def decompressed(packed: ReadAhead, *, size_max_bytes: int) -> DecompressingReader | None:
    """A reader of what is packed in a download, or None if it comes as it is."""
    packing = sniff(packed.peek(SNIFF_BYTES))
    if packing is Compression.NONE:
        return None
    return DecompressingReader(packed, packing, limits=DecompressionLimits(output_max_bytes=size_max_bytes))


def stream_snapshot(plain: ReadAhead) -> str | None:
    """The snapshot part of the stream that begins here, or None if it is no stream."""
    head = plain.peek(HEAD_BYTES)
    if head[8:16] == MAGIC.to_bytes(8, "big"):
        raise UnsupportedError("the image is a big-endian send stream")
    if len(head) < HEADER_BYTES or head[8:16] != MAGIC.to_bytes(8, "little"):
        return None
    begin = parse(head)
    toname = begin.toname if isinstance(begin, Begin) else ""
    _, at, part = toname.rpartition("@")
    return part if at and is_snapshot_part(part) else _SNAPSHOT_DEFAULT


def is_qcow2(head: bytes) -> bool:
    """Whether a qcow2 disk begins so."""
    return head.startswith(_QCOW2)


def check_raw(head: bytes) -> None:
    """Refuse what is plainly not a raw disk by its beginning: nothing at all, a page of text, another disk format."""
    if not head:
        raise BadDataError("the image is empty")
    for magic, name in _OTHER_FORMATS.items():
        if head.startswith(magic):
            raise UnsupportedError(
                f"the image is in the {name} format; the agent takes volume streams, raw and qcow2 disks"
            )
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_MARKUP):
        raise BadDataError("the download is a page of text, not an image")
