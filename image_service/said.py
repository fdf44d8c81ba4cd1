"""What callers say about an image, as headers of a PUT or fields of a POST, and what they look for in a list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from image_service.facts import ImageFormat
from image_service.lifecycle import UNKNOWN_SIZE, Details, Expected, Image, ImageStatus, ImageType
from imaging.digests import Digest
from imaging.errors import InvalidArgumentError
from rpc.messages import FetchRequest

TYPE_HEADER = "X-Image-Type"
COMMENT_HEADER = "X-Image-Comment"
NAME_HEADER = "X-Image-Name"
VERSION_HEADER = "X-Image-Version"
ORIGIN_HEADER = "X-Image-Origin"
LABEL_HEADER = "X-Image-Label"
SIZE_HEADER = "X-Image-Size"
FORMAT_HEADER = "X-Image-Format"
DIGEST_HEADER = "X-Image-Digest"
"""``sha256:<hex>`` of the whole blob, on every answer about it; on an upload it says what the body must be."""

SIZE_MAX_DIGITS = 18


class Repeatable(Protocol):
    """Headers or a query: names that may come more than once."""

    def get(self, key: str, default: str, /) -> str:
        """The first value."""

    def getall(self, key: str, default: list[str], /) -> list[str]:
        """Every value."""


def clean(text: str) -> str:
    """A header's value as text: bytes that are not UTF-8 become replacement characters."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def details_of_headers(headers: Repeatable) -> Details:
    """What the headers of an upload say; InvalidArgumentError."""
    return Details(
        comment=clean(headers.get(COMMENT_HEADER, "")),
        name=clean(headers.get(NAME_HEADER, "")),
        version=clean(headers.get(VERSION_HEADER, "")),
        origin=clean(headers.get(ORIGIN_HEADER, "")),
        labels=dict(parse_label(clean(text)) for text in headers.getall(LABEL_HEADER, [])),
    ).check()


def parse_label(text: str) -> tuple[str, str]:
    """``key=value``; InvalidArgumentError."""
    key, equals, value = text.partition("=")
    if not equals:
        raise InvalidArgumentError(f"a label is written key=value: {text[:128]!r}")
    return key.strip(), value.strip()


def expected_of(values: Repeatable) -> Expected:
    """What ``X-Image-Digest``, ``-Size`` and ``-Format`` say the bytes must be; InvalidArgumentError."""
    digest, size, kind = (values.get(name, "") for name in (DIGEST_HEADER, SIZE_HEADER, FORMAT_HEADER))
    return Expected(
        Digest.parse(digest) if digest else None,
        parse_size(size) if size else UNKNOWN_SIZE,
        ImageFormat.parse(kind) if kind else None,
    )


def parse_size(text: str) -> int:
    """A length in bytes; InvalidArgumentError."""
    if not text.isascii() or not text.isdigit() or len(text) > SIZE_MAX_DIGITS:
        raise InvalidArgumentError(f"not a size in bytes: {text[:64]!r}")
    return int(text)


def details_of_request(request: FetchRequest) -> Details:
    """What the body of a POST says; InvalidArgumentError."""
    return Details(request.comment, request.name, request.version, request.origin, request.labels).check()


def expected_of_request(request: FetchRequest) -> Expected:
    """What the body of a POST says the bytes must be; InvalidArgumentError."""
    if not UNKNOWN_SIZE <= request.length_bytes < 10**SIZE_MAX_DIGITS:
        raise InvalidArgumentError(f"not a size in bytes: {request.length_bytes}")
    return Expected(
        Digest.parse(request.digest) if request.digest else None,
        int(request.length_bytes),
        ImageFormat.parse(request.format) if request.format else None,
    )


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a list shows. Everything said must hold; of several labels every one."""

    type: ImageType | None = None
    status: ImageStatus | None = None
    name: str | None = None
    labels: Sequence[tuple[str, str | None]] = ()
    """Key and value; None is any value."""

    @classmethod
    def parse(cls, query: Repeatable) -> Wanted:
        """From a query string; InvalidArgumentError."""
        kind, status = query.get("type", ""), query.get("status", "")
        try:
            wanted_status = ImageStatus(status) if status else None
        except ValueError as err:
            raise InvalidArgumentError("invalid status") from err
        labels = [text.partition("=") for text in query.getall("label", [])]
        return cls(
            ImageType.parse(kind, "invalid type") if kind else None,
            wanted_status,
            next(iter(query.getall("name", [])), None),
            [(key, value if equals else None) for key, equals, value in labels],
        )

    def fits(self, image: Image) -> bool:
        """Whether the list shows that image."""
        return (
            self.type in (None, image.type)
            and self.status in (None, image.status)
            and self.name in (None, image.name)
            and all(key in image.labels and value in (None, image.labels[key]) for key, value in self.labels)
        )
