"""An image's record and its life, as a pure state machine: values in, values out, no store, no clock.

The life::

    pending --> downloading --> complete
       |             |
       +--> error <--+
              |
              +--> pending            (asked for again)

* ``pending``: accepted, nothing fetched yet. ``downloading``: bytes are coming; a restart of the service continues here.
* ``complete``: the blob named by ``digest`` is stored, whole and durable. Nothing follows it but deletion.
* ``error``: the fetch was given up; ``error`` says why. The next request for the same source starts anew.

A move the picture does not show raises ConflictError, so a late writer can't bring back what another has finished.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

import msgspec

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
    """What the bytes were found to be; empty if nobody looked."""
    error: str = ""
    """Why the fetch was given up."""
    validator: str = ""
    """The source's ETag or Last-Modified as of the bytes fetched so far: what If-Range says when the fetch goes on."""

    @property
    def blob(self) -> Digest:
        """The digest of a complete image's bytes."""
        return Digest.parse(self.digest)


def _move(image: Image, status: ImageStatus) -> None:
    if image.status not in _MOVES[status]:
        raise ConflictError(f"image {image.id} is {image.status} and can't become {status}")


def new_fetch(
    image_id: str, source: str, image_type: ImageType, *, comment: str = "", expected_digest: Digest | None = None
) -> Image:
    """A record for a source that is to be fetched: pending."""
    if len(source) > SOURCE_MAX_CHARS:
        raise InvalidArgumentError(f"image source is longer than {SOURCE_MAX_CHARS} characters")
    return Image(
        id=image_id,
        type=image_type,
        source=source,
        comment=check_comment(comment),
        expected_digest=str(expected_digest or ""),
    )


def check_comment(comment: str) -> str:
    """The comment as it is; InvalidArgumentError if it is too long."""
    if len(comment) > COMMENT_MAX_CHARS:
        raise InvalidArgumentError(f"comment is longer than {COMMENT_MAX_CHARS} characters")
    return comment


def new_upload(image_id: str, image_type: ImageType, comment: str, *, now: datetime) -> Image:
    """A record for an upload under way. Nobody sees it before it is complete."""
    return Image(
        id=image_id,
        type=image_type,
        comment=check_comment(comment),
        status=ImageStatus.DOWNLOADING,
        download_start=now,
    )


def set_pending(image: Image) -> Image:
    """Start anew after an error: as if it had just been asked for."""
    _move(image, ImageStatus.PENDING)
    return Image(
        id=image.id,
        type=image.type,
        source=image.source,
        comment=image.comment,
        expected_digest=image.expected_digest,
    )


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


def set_finished(image: Image, digest: Digest, size_bytes: int, *, now: datetime) -> Image:
    """The bytes are stored and durable."""
    _move(image, ImageStatus.COMPLETE)
    return msgspec.structs.replace(
        image,
        status=ImageStatus.COMPLETE,
        size_bytes=size_bytes,
        expected_size_bytes=size_bytes,
        download_end=now,
        digest=str(digest),
        error="",
        validator="",
    )


def set_failed(image: Image, reason: str, *, now: datetime) -> Image:
    """The fetch was given up; nothing of it is kept."""
    _move(image, ImageStatus.ERROR)
    return msgspec.structs.replace(
        image, status=ImageStatus.ERROR, size_bytes=0, download_end=now, error=reason[:ERROR_MAX_CHARS], validator=""
    )
