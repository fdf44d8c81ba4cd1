"""An image's bytes, looked at while they come in: what they are, their digests, and whether they may become an image at all.

Pieces are pushed in as they are stored; nothing is kept but a decoder's state. The format is found by content, never by name. Streams
pass the codec's validator, so that one which could harm a hypervisor is refused before it is complete. A qcow2's tables point
back and forth, so it is only begun here; :mod:`image_service.diskfile` reads it when all of it is stored.

Whatever is wrong with the bytes is a BadDataError (also what is merely not supported: the image is not accepted), a limit that is
passed is a TooLargeError.
"""

from __future__ import annotations

from image_service.facts import Facts, ImageFormat, InspectionLimits
from image_service.lifecycle import ImageType
from image_service.volume_content import VolumeContent
from imaging.compression import (
    OUTPUT_BYTES,
    Compression,
    DecompressingReader,
    sniff,
)
from imaging.digests import Digest, MultiHasher
from imaging.diskimage import DiskFormat, sniff_disk
from imaging.diskimage.base import SECTOR_BYTES
from imaging.diskimage.qcow2 import HEADER_MAX_BYTES, parse_header
from imaging.errors import BadDataError, MistifyError, NoSpaceError, TooLargeError, UnavailableError
from imaging.sendstream.records import HEADER_BYTES, MAGIC, Begin, Feature, HeaderType, StreamKind, feature_names, parse
from imaging.sendstream.validator import Policy, StreamSummary, StreamValidator

HEAD_BYTES = 4096
"""Enough to tell every format: the header of a qcow2 with all its extensions is under 1 KiB, a send stream's 312 bytes."""

FILE_MAX_BYTES = 1 << 62
"""What a file may be long as long as nobody knows."""

_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")
_TAR_MAGIC = slice(257, 262)
_NOT_ITS_FAULT = (BadDataError, TooLargeError, NoSpaceError, UnavailableError)
"""What says by itself what is wrong, and what is no matter of the image."""
_UNUSABLE = set(feature_names(Feature.RAW | Feature.REDACTED | Feature.DEDUP | Feature.DEDUPPROPS | Feature.RESUMING))
"""Streams with one of these can't be received by somebody who has nothing else."""


class _StarvedError(Exception):
    """The bytes pushed so far are used up; more may come."""


class _Pushed:
    """A source a reader pulls from, filled by pushing. Reading past what is there raises before the reader's state has changed."""

    def __init__(self) -> None:
        self._data = memoryview(b"")
        self.ended = False

    def push(self, data: bytes | bytearray | memoryview) -> None:
        """Add a piece; the one before must be used up."""
        self._data = memoryview(data)

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes; empty only at the end."""
        if not len(self._data):
            if self.ended:
                return b""
            raise _StarvedError
        piece = bytes(self._data[:size])
        self._data = self._data[len(piece) :]
        return piece


class Inspection:
    """One image on its way. Blocking; one caller at a time: ``feed`` every stored byte in order, then ``finish``."""

    def __init__(self, image_type: ImageType, limits: InspectionLimits) -> None:
        self._type = image_type
        self._limits = limits
        self._source = _Pushed()
        self._compression = Compression.NONE
        self._reader: DecompressingReader | None = None
        """Of packed bytes; what is not packed goes its way without a copy."""
        self._content: _Content | None = None
        self._head = bytearray()
        self.fed_bytes = 0
        """Stored bytes seen so far: whoever goes on must go on here."""

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """The next stored bytes; they may change once this has returned."""
        self.fed_bytes += len(data)
        if self._content is None:
            self._head += data
            if len(self._head) < HEAD_BYTES:
                return
            data = self._start()
        with judged():
            self._pass_on(data)

    def _start(self) -> bytes:
        """The compression shows; what was held back begins the reading."""
        head, self._head = bytes(self._head), bytearray()
        self._compression = sniff(head)
        packed = self._compression is not Compression.NONE
        self._content = _Content(self._type, self._limits, hash_plain=packed)
        if packed:
            self._reader = DecompressingReader(self._source, self._compression, limits=self._limits.decompression())
        return head

    def _pass_on(self, data: bytes | bytearray | memoryview) -> None:
        assert self._content is not None
        if self._reader is None:
            self._content.feed(data)
            return
        self._source.push(data)
        self._pull(self._reader, self._content)

    @staticmethod
    def _pull(reader: DecompressingReader, content: _Content) -> None:
        try:
            while piece := reader.read(OUTPUT_BYTES):
                content.feed(piece)
        except _StarvedError:
            return

    def finish(self, stored: Digest) -> Facts:
        """The bytes have ended, and ``stored`` is their sha256; what they are."""
        with judged():
            if self._content is None:
                self._pass_on(self._start())
            assert self._content is not None
            if self._reader is not None:
                self._source.ended = True
                self._pull(self._reader, self._content)
            return self._content.finish(self._compression, stored)


class judged:  # noqa: N801 - reads as a word in the with statement
    """What is wrong with an image is bad data, whatever the codec calls it."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, err: BaseException | None, _trace: object) -> None:
        if isinstance(err, MistifyError) and not isinstance(err, _NOT_ITS_FAULT):
            raise BadDataError(err.message) from err


class _Content:
    """The unpacked bytes."""

    def __init__(self, image_type: ImageType, limits: InspectionLimits, *, hash_plain: bool) -> None:
        self._type = image_type
        self._limits = limits
        # Of bytes that are stored as they are the store computes sha256 anyway.
        self._hasher = MultiHasher(("sha256", "sha512") if hash_plain else ("sha512",))
        self._head: bytearray | None = bytearray()
        self._format = ImageFormat.RAW
        self._validator: StreamValidator | None = None
        self._volume = VolumeContent(limits.digest_size_max_bytes)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        self._hasher.update(data)
        if self._hasher.size_bytes > self._limits.unpacked_size_max_bytes:
            raise TooLargeError(f"image is larger than {self._limits.unpacked_size_max_bytes} bytes")
        if self._head is not None:
            self._head += data
            if len(self._head) < HEAD_BYTES:
                return
            data = self._begin()
        self._pass_on(data)

    def _begin(self) -> bytes:
        """Enough is here to tell the format."""
        assert self._head is not None
        head, self._head = bytes(self._head), None
        self._format = find_format(head, self._type)
        if self._format in {ImageFormat.ZVOL, ImageFormat.ZFS}:
            _check_stream_head(head, self._type)
            policy = Policy(opaque=self._type is ImageType.CONTAINER)
            self._validator = StreamValidator(policy=policy, observe=self._volume.take)
        elif self._format is ImageFormat.QCOW2:
            parse_header(head[:HEADER_MAX_BYTES], FILE_MAX_BYTES)
        return head

    def _pass_on(self, data: bytes | bytearray | memoryview) -> None:
        if self._validator is None:
            return
        self._validator.verify(bytes(data))  # it keeps parts of them, which must not change
        if self._validator.summaries:
            _check_full(self._validator.summaries[0].fromguid)
            _check_summary(self._validator.summaries[-1])
            if len(self._validator.summaries) > 1:
                self._volume.give_up()

    def finish(self, compression: Compression, stored: Digest) -> Facts:
        """What the unpacked bytes are."""
        if self._head is not None:
            self._pass_on(self._begin())
        size_bytes = self._hasher.size_bytes
        unpacked = stored if compression is Compression.NONE else self._hasher.digest()
        virtual_size_bytes, content = self._content(unpacked)
        return Facts(
            self._format,
            compression,
            size_bytes,
            str(unpacked),
            str(self._hasher.digest("sha512")),
            virtual_size_bytes,
            content,
        )

    def _content(self, unpacked: Digest) -> tuple[int, str]:
        """Size of the virtual disk, and the content's digest as far as it shows already."""
        if self._validator is not None:
            return self._stream_content(self._validator, unpacked)
        if self._format is ImageFormat.TAR:
            return 0, str(unpacked)
        size_bytes = self._hasher.size_bytes
        whole = self._format is ImageFormat.RAW and size_bytes % SECTOR_BYTES == 0
        return (0 if self._format is ImageFormat.QCOW2 else size_bytes), (str(unpacked) if whole else "")

    def _stream_content(self, validator: StreamValidator, unpacked: Digest) -> tuple[int, str]:
        validator.finish()
        volumes = [one for one in validator.summaries if one.kind == "volume"]
        if not volumes:
            self._format = ImageFormat.ZFS
            return 0, str(unpacked)
        if len(validator.summaries) > 1:
            self._volume.give_up()
        size_bytes = volumes[-1].volsize_bytes or 0
        if size_bytes > self._limits.virtual_size_max_bytes:
            raise TooLargeError(
                f"virtual size {size_bytes} bytes is over the limit of {self._limits.virtual_size_max_bytes}"
            )
        return size_bytes, str(self._volume.digest(size_bytes) or "")


def find_format(head: bytes, image_type: ImageType) -> ImageFormat:
    """The format of unpacked bytes that begin with ``head``; formats nobody here can read are refused by name."""
    if head[8:16] in {MAGIC.to_bytes(8, "little"), MAGIC.to_bytes(8, "big")}:
        begin = _begin_of(head)
        filesystem = begin is not None and begin.kind == StreamKind.FILESYSTEM
        return ImageFormat.ZFS if filesystem else ImageFormat.ZVOL
    if sniff_disk(head) is DiskFormat.QCOW2:
        return ImageFormat.QCOW2
    if image_type is ImageType.CONTAINER:
        return ImageFormat.TAR if head[_TAR_MAGIC] == b"ustar" else ImageFormat.RAW
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_MARKUP):
        raise BadDataError("this is a page of text, not an image")
    return ImageFormat.RAW


def _begin_of(head: bytes) -> Begin | None:
    if len(head) < HEADER_BYTES or head[8:16] != MAGIC.to_bytes(8, "little") or head[0]:
        return None
    record = parse(head)
    return record if isinstance(record, Begin) else None


def _check_stream_head(head: bytes, image_type: ImageType) -> None:
    """Refuse early what the end would show as well: an increment, a filesystem where a volume is wanted."""
    begin = _begin_of(head)
    if begin is None or begin.header_type == HeaderType.PACKAGE:
        return
    _check_full(begin.fromguid)
    if begin.kind == StreamKind.FILESYSTEM and image_type is ImageType.KVM:
        raise BadDataError("the stream holds a filesystem: an image of type kvm needs a volume")


def _check_full(fromguid: int) -> None:
    if fromguid:
        raise BadDataError(f"the stream is an increment onto guid {fromguid}: by itself it is no image")


def _check_summary(summary: StreamSummary) -> None:
    unusable = _UNUSABLE & set(summary.features)
    if unusable:
        raise BadDataError(f"the stream can't be received by everybody: it has {', '.join(sorted(unusable))}")
