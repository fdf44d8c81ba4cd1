"""OCI images: the documents of an image layout, parsed and checked. No IO.

An *index* lists manifests (or further indexes), a *manifest* names a configuration and layers, a *descriptor* says
media type, digest and size of each. Everything is found by its sha256 digest; a document is believed only after its digest
was verified (:func:`check_content`).

Errors: BadDataError (malformed, or not what its descriptor says), UnsupportedError (valid, but of a kind we don't keep).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from imaging.digests import Digest
from imaging.errors import BadDataError, InvalidArgumentError, InvalidNameError, MistifyError, UnsupportedError

T = TypeVar("T")

LAYOUT_FILE = "oci-layout"
INDEX_FILE = "index.json"
LAYOUT_VERSION = "1.0.0"

DOCUMENT_MAX_BYTES = 4 << 20
"""What registries accept as the longest manifest."""

DESCRIPTORS_MAX = 10_000
"""Manifests of one index or layers of one image; real ones have tens."""

NESTING_MAX = 3
"""An index of indexes is legal and rare."""

REF_NAME = "org.opencontainers.image.ref.name"
FULL_NAME = "io.containerd.image.name"

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_INDEXES = frozenset({INDEX, "application/vnd.docker.distribution.manifest.list.v2+json"})
_MANIFESTS = frozenset({MANIFEST, "application/vnd.docker.distribution.manifest.v2+json"})

DEFAULT_TAG = "latest"

_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")
_PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"(?=.{{1,255}}\Z)(?:[A-Za-z0-9.-]+(?::\d{{1,5}})?/)?{_PART}(?:/{_PART})*\Z")


class Descriptor(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """What something is, how long, and under which digest it is found."""

    media_type: str
    digest: str
    size: int
    annotations: dict[str, str] = {}
    platform: dict[str, Any] = {}

    @property
    def parsed_digest(self) -> Digest:
        """The digest; UnsupportedError for another algorithm than sha256."""
        try:
            digest = Digest.parse(self.digest)
        except InvalidArgumentError as err:
            raise BadDataError(f"not a digest in a descriptor: {self.digest[:160]!r}") from err
        if digest.algorithm != "sha256":
            raise UnsupportedError(f"only sha256 digests are kept, not {self.digest[:160]}")
        return digest

    @property
    def is_index(self) -> bool:
        """Whether it lists manifests."""
        return self.media_type in _INDEXES

    @property
    def is_manifest(self) -> bool:
        """Whether it is one image."""
        return self.media_type in _MANIFESTS


class _Index(msgspec.Struct, frozen=True, rename="camel"):
    schema_version: int
    manifests: tuple[Descriptor, ...]


class Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """One image: a configuration and layers."""

    schema_version: int
    config: Descriptor
    layers: tuple[Descriptor, ...] = ()
    annotations: dict[str, str] = {}


class _Layout(msgspec.Struct, frozen=True, rename="camel"):
    image_layout_version: str


def _decode(data: bytes, kind: type[T], what: str) -> T:
    if len(data) > DOCUMENT_MAX_BYTES:
        raise BadDataError(f"the {what} is larger than {DOCUMENT_MAX_BYTES} bytes")
    try:
        return msgspec.convert(_without_nulls(msgspec.json.decode(data)), kind)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as err:
        raise BadDataError(f"the {what} is malformed") from err


def _without_nulls(value: Any) -> Any:
    """Go's programs write null for what is empty."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def check_layout(data: bytes) -> None:
    """The file that says that this is a layout; UnsupportedError for a version we don't know."""
    version = _decode(data, _Layout, LAYOUT_FILE).image_layout_version
    if version != LAYOUT_VERSION:
        raise UnsupportedError(f"image layout version {version[:32]!r} is not {LAYOUT_VERSION}")


def parse_index(data: bytes) -> tuple[Descriptor, ...]:
    """What an index lists."""
    index = _decode(data, _Index, "index")
    if index.schema_version != 2:
        raise BadDataError(f"schema version {index.schema_version} of an index is not 2")
    _check_descriptors(index.manifests)
    for descriptor in index.manifests:
        if not descriptor.is_index and not descriptor.is_manifest:
            raise UnsupportedError(f"not an image: {descriptor.media_type[:128]!r}")
    return index.manifests


def parse_image(data: bytes) -> Manifest:
    """One image's manifest."""
    manifest = _decode(data, Manifest, "manifest")
    if manifest.schema_version != 2:
        raise BadDataError(f"schema version {manifest.schema_version} of a manifest is not 2")
    _check_descriptors((manifest.config, *manifest.layers))
    return manifest


def _check_descriptors(descriptors: tuple[Descriptor, ...]) -> None:
    if len(descriptors) > DESCRIPTORS_MAX:
        raise BadDataError(f"more than {DESCRIPTORS_MAX} descriptors in one document")
    for descriptor in descriptors:
        if descriptor.size < 0:
            raise BadDataError(f"the size of {descriptor.digest[:160]} is negative")
        _ = descriptor.parsed_digest


def check_content(descriptor: Descriptor, data: bytes) -> bytes:
    """``data`` if it is what the descriptor says; BadDataError."""
    if len(data) != descriptor.size:
        raise BadDataError(f"{descriptor.digest} has {len(data)} bytes instead of {descriptor.size}")
    if not Digest.of(data).matches(descriptor.parsed_digest):
        raise BadDataError(f"{descriptor.digest} has another digest")
    return data


# -- names -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class ImageReference:
    """A name and a tag."""

    name: str
    tag: str = DEFAULT_TAG

    @classmethod
    def parse(cls, text: str) -> ImageReference:
        """Parse ``name[:tag]``; InvalidNameError."""
        name, colon, tag = text.rpartition(":")
        if not colon or "/" in tag:  # the colon of a port
            name, tag = text, DEFAULT_TAG
        if not _NAME.match(name) or not _TAG.match(tag):
            raise InvalidNameError(f"not an image name with a tag: {text[:300]!r}")
        return cls(name, tag)

    def __str__(self) -> str:
        return f"{self.name}:{self.tag}"


def name_of(annotations: Mapping[str, str], default_name: str) -> ImageReference:
    """What an entry of a layout's index is called: by its whole name, by a tag of ``default_name``, or that name's latest."""
    for text in (annotations.get(FULL_NAME, ""), annotations.get(REF_NAME, "")):
        if ":" in text or "/" in text:
            try:
                return ImageReference.parse(text)
            except MistifyError:  # a free text, as the annotation's definition allows
                continue
    tag = annotations.get(REF_NAME, DEFAULT_TAG)
    return ImageReference(ImageReference.parse(default_name).name, tag if _TAG.match(tag) else DEFAULT_TAG)


# -- writing ---------------------------------------------------------------------------------------------------------------


def layout_json() -> bytes:
    """The file that says that this is a layout."""
    return msgspec.json.encode(_Layout(LAYOUT_VERSION))


def index_json(descriptors: tuple[Descriptor, ...]) -> bytes:
    """An index of these."""
    return msgspec.json.encode({"schemaVersion": 2, "mediaType": INDEX, "manifests": descriptors})


def blob_path(digest: Digest) -> str:
    """Where a layout keeps a blob."""
    return f"blobs/{digest.algorithm}/{digest.hex}"
