"""An image's record and its life, as a pure state machine: values in, values out, no store, no clock.

The life::

    pending --> downloading --> complete
       |             |
       +--> error <--+
              |
              +--> pending            (asked for again)

* ``pending``: accepted, nothing fetched yet. ``downloading``: bytes are coming; a restart of the service continues here.
* ``complete``: the blob named by ``digest`` is stored, whole, durable and looked at. Nothing follows it but deletion, or ``error`` if the
  stored bytes are found damaged.
* ``error``: the fetch was given up; ``error`` says why. The next request for the same source starts anew.

A move the picture does not show raises ConflictError, so a late writer can't bring back what another has finished.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

import msgspec

from image_service.facts import Facts, ImageFormat
from imaging.compression import Compression
from imaging.digests import Digest
from imaging.errors import ConflictError, InvalidArgumentError

UNKNOWN_SIZE = -1
"""What ``expected_size_bytes`` is as long as nobody knows the length."""

SOURCE_MAX_CHARS = 8192
"""Long enough for a presigned URL (about 2,000), short enough for every proxy between."""

COMMENT_MAX_CHARS = 16_384
"""A comment is a note, and a record must stay far below the key/value store's 1 MiB."""

ERROR_MAX_CHARS = 1024
"""The reason of a failed fetch is one sentence."""

WORD_MAX_CHARS = 255
"""A name, a version, a label's key: what a list can show and a dataset's property can hold."""

LABEL_VALUE_MAX_CHARS = 1024
"""A label's value: a URL or a sentence."""

LABELS_MAX = 64
"""More are a document; a record must stay far below the key/value store's 1 MiB."""

_LABEL_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]*\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class ImageType(StrEnum):
    """What an image becomes on a hypervisor."""

    KVM = "kvm"
    CONTAINER = "container"

    @classmethod
    def parse(cls, text: object, complaint: str) -> ImageType:
        """The type of that name; InvalidArgumentError with the words ``complaint`` otherwise."""
        try:
            return cls(str(text))
        except ValueError as err:
            raise InvalidArgumentError(complaint) from err


class ImageStatus(StrEnum):
    """Where an image is in its life."""

    PENDING = "pending"
    DOWNLOADING = "downloading"
    COMPLETE = "complete"
    ERROR = "error"


UNFINISHED = frozenset({ImageStatus.PENDING, ImageStatus.DOWNLOADING})
"""States in which somebody owes work."""

_MOVES: dict[ImageStatus, frozenset[ImageStatus]] = {
    ImageStatus.PENDING: frozenset({ImageStatus.ERROR}),
    ImageStatus.DOWNLOADING: UNFINISHED,
    ImageStatus.COMPLETE: UNFINISHED,
    ImageStatus.ERROR: UNFINISHED,
}
"""State -> the states it may be reached from."""


@dataclass(frozen=True, slots=True)
class Details:
    """What whoever brings an image says about it."""

    comment: str = ""
    name: str = ""
    version: str = ""
    origin: str = ""
    """Where it comes from, in the bringer's words: an older image's id, a catalogue's product."""
    labels: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> Details:
        """These details; InvalidArgumentError if they break a limit."""
        if len(self.comment) > COMMENT_MAX_CHARS:
            raise InvalidArgumentError(f"comment is longer than {COMMENT_MAX_CHARS} characters")
        for what, text in (("name", self.name), ("version", self.version)):
            if len(text) > WORD_MAX_CHARS or _CONTROL.search(text):
                raise InvalidArgumentError(f"{what} must be at most {WORD_MAX_CHARS} printable characters")
        if len(self.origin) > SOURCE_MAX_CHARS:
            raise InvalidArgumentError(f"origin is longer than {SOURCE_MAX_CHARS} characters")
        if len(self.labels) > LABELS_MAX:
            raise InvalidArgumentError(f"more than {LABELS_MAX} labels")
        for key, value in self.labels.items():
            if not _LABEL_KEY.match(key) or len(key) > WORD_MAX_CHARS:
                raise InvalidArgumentError(f"not a valid label: {key[:WORD_MAX_CHARS]!r}")
            if len(value) > LABEL_VALUE_MAX_CHARS or _CONTROL.search(value):
                raise InvalidArgumentError(f"label {key} must be at most {LABEL_VALUE_MAX_CHARS} printable characters")
        return self


@dataclass(frozen=True, slots=True)
class Expected:
    """What the bytes must turn out to be; whatever is not said is not checked."""

    digest: Digest | None = None
    size_bytes: int = UNKNOWN_SIZE
    format: ImageFormat | None = None


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """One image's record as stored. Times are UTC; None is a time that has not come."""

    id: str
    type: ImageType
    source: str = ""
    comment: str = ""
    status: ImageStatus = ImageStatus.PENDING
    size_bytes: int = 0
    expected_size_bytes: int = UNKNOWN_SIZE
    download_start: datetime | None = None
    download_end: datetime | None = None
    digest: str = ""
    """``sha256:<hex>`` of the stored bytes; empty until complete."""
    expected_digest: str = ""
    """What the caller said the bytes must be; empty if nothing was said."""
    format: str = ""
    """What the bytes were found to be; empty if nobody looked. This and the next six: see :class:`~image_service.facts.Facts`."""
    compression: str = ""
    virtual_size_bytes: int = 0
    content_digest: str = ""
    unpacked_size_bytes: int = 0
    unpacked_sha256: str = ""
    unpacked_sha512: str = ""
    expected_format: str = ""
    wanted_size_bytes: int = UNKNOWN_SIZE
    """The length the caller said, as opposed to the one the source says."""
    name: str = ""
    version: str = ""
    origin: str = ""
    labels: dict[str, str] = {}
    error: str = ""
    """Why the fetch was given up."""
    validator: str = ""
    """The source's ETag or Last-Modified as of the bytes fetched so far: what If-Range says when the fetch goes on."""

    @property
    def blob(self) -> Digest:
        """The digest of a complete image's bytes."""
        return Digest.parse(self.digest)

    @property
    def details(self) -> Details:
        """What its bringer said about it."""
        return Details(self.comment, self.name, self.version, self.origin, self.labels)


def facts_of(image: Image) -> Facts:
    """What was found about the bytes of a complete image."""
    return Facts(
        ImageFormat(image.format),
        Compression(image.compression),
        image.unpacked_size_bytes,
        image.unpacked_sha256,
        image.unpacked_sha512,
        image.virtual_size_bytes,
        image.content_digest,
    )


def _move(image: Image, status: ImageStatus) -> None:
    if image.status not in _MOVES[status]:
        raise ConflictError(f"image {image.id} is {image.status} and can't become {status}")


def new_fetch(
    image_id: str,
    source: str,
    image_type: ImageType,
    details: Details = Details(),
    expected: Expected = Expected(),
) -> Image:
    """A record for a source that is to be fetched: pending."""
    if len(source) > SOURCE_MAX_CHARS:
        raise InvalidArgumentError(f"image source is longer than {SOURCE_MAX_CHARS} characters")
    return _new(image_id, image_type, details, expected, source=source)


def new_upload(
    image_id: str,
    image_type: ImageType,
    details: Details = Details(),
    expected: Expected = Expected(),
    *,
    now: datetime,
) -> Image:
    """A record for an upload under way. Nobody sees it before it is complete."""
    image = _new(image_id, image_type, details, expected)
    return msgspec.structs.replace(image, status=ImageStatus.DOWNLOADING, download_start=now)


def _new(image_id: str, image_type: ImageType, details: Details, expected: Expected, source: str = "") -> Image:
    details.check()
    return Image(
        id=image_id,
        type=image_type,
        source=source,
        comment=details.comment,
        name=details.name,
        version=details.version,
        origin=details.origin,
        labels=dict(details.labels),
        expected_digest=str(expected.digest or ""),
        expected_format=str(expected.format or ""),
        wanted_size_bytes=expected.size_bytes,
    )


def set_pending(image: Image) -> Image:
    """Start anew after an error: as if it had just been asked for."""
    _move(image, ImageStatus.PENDING)
    expected = Expected(
        Digest.parse(image.expected_digest) if image.expected_digest else None,
        image.wanted_size_bytes,
        ImageFormat(image.expected_format) if image.expected_format else None,
    )
    return _new(image.id, image.type, image.details, expected, source=image.source)


def set_downloading(image: Image, expected_size_bytes: int, *, now: datetime, validator: str = "") -> Image:
    """Bytes are coming. A fetch that goes on after a break keeps the time it first started."""
    _move(image, ImageStatus.DOWNLOADING)
    return msgspec.structs.replace(
        image,
        status=ImageStatus.DOWNLOADING,
        expected_size_bytes=max(expected_size_bytes, UNKNOWN_SIZE),
        download_start=image.download_start or now,
        validator=validator,
    )


def update_size(image: Image, size_bytes: int) -> Image:
    """So many bytes are here."""
    if image.status is not ImageStatus.DOWNLOADING:
        raise ConflictError(f"image {image.id} is {image.status}: its size does not grow")
    return msgspec.structs.replace(image, size_bytes=size_bytes)


def set_finished(
    image: Image,
    digest: Digest,
    size_bytes: int,
    facts: Facts | None = None,
    *,
    now: datetime,
) -> Image:
    """The bytes are stored and durable, and were looked at."""
    _move(image, ImageStatus.COMPLETE)
    complete = msgspec.structs.replace(
        image,
        status=ImageStatus.COMPLETE,
        size_bytes=size_bytes,
        expected_size_bytes=size_bytes,
        download_end=now,
        digest=str(digest),
        error="",
        validator="",
    )
    return complete if facts is None else _with_facts(complete, facts)


def _with_facts(image: Image, facts: Facts) -> Image:
    return msgspec.structs.replace(
        image,
        format=facts.format.value,
        compression=facts.compression.value,
        virtual_size_bytes=facts.virtual_size_bytes,
        content_digest=facts.content_digest,
        unpacked_size_bytes=facts.unpacked_size_bytes,
        unpacked_sha256=facts.unpacked_sha256,
        unpacked_sha512=facts.unpacked_sha512,
        name=image.name or facts.name,
        version=image.version or facts.version,
        labels={**facts.labels, **image.labels},
    )


def set_seen(image: Image, digest: Digest, facts: Facts) -> Image:
    """A complete image nobody had looked at was looked at."""
    if image.status is not ImageStatus.COMPLETE or image.digest != str(digest):
        raise ConflictError(f"image {image.id} is {image.status} and does not have the blob {digest}")
    return _with_facts(image, facts)


def set_damaged(image: Image, digest: Digest, reason: str) -> Image:
    """The stored bytes turned out to be damaged: the image is not offered any more. Asking for its source again fetches it anew."""
    if image.status is not ImageStatus.COMPLETE or image.digest != str(digest):
        raise ConflictError(f"image {image.id} is {image.status} and does not have the blob {digest}")
    return msgspec.structs.replace(
        image, status=ImageStatus.ERROR, size_bytes=0, digest="", content_digest="", error=reason[:ERROR_MAX_CHARS]
    )


def set_failed(image: Image, reason: str, *, now: datetime) -> Image:
    """The fetch was given up; nothing of it is kept."""
    _move(image, ImageStatus.ERROR)
    return msgspec.structs.replace(
        image,
        status=ImageStatus.ERROR,
        size_bytes=0,
        download_end=now,
        error=reason[:ERROR_MAX_CHARS],
        validator="",
    )
