"""Which form of an image is asked for, which recipe that means for the blobs that are stored, and the bytes the recipe makes.

The bytes depend on nothing but the stored blobs and the recipe: no name, no time, no id. So every server makes the same
stream, and an increment made by one fits the full stream received from another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import StrEnum

from image_service.derive_sources import (
    READ_BYTES,
    Content,
    OpenedDisk,
    Payload,
    Watched,
    disk_pieces,
    identify,
    open_disk_of,
    unpacked,
)
from image_service.derive_work import Work
from image_service.lifecycle import Image
from imaging.blobs.base import BlobStore
from imaging.compression import Compression, compress_pieces
from imaging.digests import Digest
from imaging.errors import InvalidArgumentError, WrongKindError
from imaging.sendstream.volume import OlderImage, StreamHeader, make_stream

TONAME = "volume@image"
"""The snapshot a derived stream names; receivers choose their own name."""

COMPRESSION_DEFAULT = Compression.ZSTD
"""Of what has to be made anyway: unpacks several times faster than gzip and is smaller."""

RECIPE_VERSION = 1
"""Raised when the same recipe makes other bytes."""

_COMPRESSIONS = {one.value: one for one in (Compression.NONE, Compression.GZIP, Compression.ZSTD)}


class Shape(StrEnum):
    """What the bytes are, before they are packed."""

    STORED = "stored"
    """What was stored, packed otherwise."""
    ZVOL = "zvol"
    RAW = "raw"


@dataclass(frozen=True, slots=True)
class Form:
    """What a request asks for; empty means: as it is stored."""

    shape: Shape | None = None
    compression: Compression | None = None
    base_id: str = ""

    @classmethod
    def parse(cls, query: Mapping[str, str]) -> Form:
        """From ``format``, ``compression`` and ``from``; InvalidArgumentError."""
        shape, compression, base_id = query.get("format", ""), query.get("compression", ""), query.get("from", "")
        if shape not in {"", Shape.ZVOL, Shape.RAW}:
            raise InvalidArgumentError(f"format must be zvol or raw: {shape[:64]!r}")
        if compression and compression not in _COMPRESSIONS:
            raise InvalidArgumentError(f"compression must be zstd, gzip or none: {compression[:64]!r}")
        if "from" in query and (not base_id or shape == Shape.RAW):
            raise InvalidArgumentError("from names an older image, and only a stream (format=zvol) can build on it")
        return cls(
            Shape(shape or Shape.ZVOL) if shape or base_id else None,
            _COMPRESSIONS[compression] if compression else None,
            base_id,
        )

    @property
    def is_stored(self) -> bool:
        """Whether nothing but the stored bytes is asked for."""
        return self == Form()


@dataclass(frozen=True, slots=True)
class Recipe:
    """How bytes are made from stored blobs. Equal recipes make equal bytes."""

    source: Digest
    shape: Shape
    compression: Compression
    base: Digest | None = None

    @property
    def key(self) -> str:
        """Names the recipe; starts with the source's digest."""
        base = self.base.hex if self.base else "-"
        return f"{self.source.hex}/{base}/{self.shape}-{self.compression}-{RECIPE_VERSION}"


def resolve(form: Form, source: Digest, content: Content, base: tuple[Digest, Content] | None) -> Recipe | None:
    """The recipe for a form; None if the stored blob is it already. WrongKindError if the image has no such form."""
    if form.shape is not None and not content.payload.is_disk:
        raise WrongKindError(f"an image of format {content.payload} is no disk and has no other format")
    if base is not None:
        return _increment(form, source, base)
    stored_shape = {Payload.VOLUME_STREAM: Shape.ZVOL, Payload.RAW: Shape.RAW}.get(content.payload)
    if form.shape in {None, stored_shape}:
        if form.compression in {None, content.compression}:
            return None
        return Recipe(source, Shape.STORED, form.compression or COMPRESSION_DEFAULT)
    return Recipe(source, form.shape or Shape.STORED, form.compression or COMPRESSION_DEFAULT)


def _increment(form: Form, source: Digest, base: tuple[Digest, Content]) -> Recipe:
    digest, content = base
    if not content.payload.is_disk:
        raise WrongKindError(f"the older image, of format {content.payload}, is no disk: no increment builds on it")
    if digest == source:
        raise InvalidArgumentError("both images have the same content: there is nothing between them")
    return Recipe(source, Shape.ZVOL, form.compression or COMPRESSION_DEFAULT, digest)


class Contents:
    """What stored blobs are, remembered: a blob never changes."""

    REMEMBERED_MAX = 4096
    """Entries of about 200 bytes; when full the memory starts anew."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._known: dict[Digest, Content] = {}

    def note(self, image: Image) -> Content:
        """What an image's blob is, with what its record says about the disk in it."""
        found = self.of(image.blob)
        if image.content_digest.startswith("sha256:") and not found.disk_digest:
            size_bytes = image.virtual_size_bytes
            found = replace(found, disk_size_bytes=size_bytes, disk_digest=image.content_digest)
            self._known[image.blob] = found
        return found

    def of(self, digest: Digest) -> Content:
        """See :func:`image_service.derive_sources.identify`."""
        known = self._known.get(digest)
        if known is None:
            found = identify(self._blobs, digest)
            if len(self._known) >= self.REMEMBERED_MAX:
                self._known.clear()
            known = self._known.setdefault(digest, found)
        return known


def make(recipe: Recipe, blobs: BlobStore, contents: Contents, work: Work) -> Iterator[bytes]:
    """The bytes of a recipe, piece by piece, in bounded memory."""
    with ExitStack() as stack:
        plain = _shape(recipe, blobs, contents, work, stack)
        if recipe.compression is Compression.NONE:
            yield from plain
        else:
            yield from compress_pieces(plain, recipe.compression)


def _shape(recipe: Recipe, blobs: BlobStore, contents: Contents, work: Work, stack: ExitStack) -> Iterator[bytes]:
    if recipe.shape is Shape.STORED:
        source = Watched(unpacked(stack.enter_context(blobs.open(recipe.source)), work), work)
        return iter(lambda: source.read(READ_BYTES), b"")
    disk = stack.enter_context(open_disk_of(blobs, recipe.source, contents.of(recipe.source), work))
    if recipe.shape is Shape.RAW:
        return disk_pieces(disk.fd, disk.size_bytes, disk.size_bytes, work)
    if recipe.base is None:
        return _stepped(make_stream(disk.fd, disk.size_bytes, _header(disk)), work)
    older = stack.enter_context(open_disk_of(blobs, recipe.base, contents.of(recipe.base), work))
    return _stepped(_changes(disk, older), work)


def _header(disk: OpenedDisk, fromguid: int = 0) -> StreamHeader:
    """Creation stays 0: a time of ours would make every server's stream another."""
    return StreamHeader(disk.guid, TONAME, disk.volblocksize_bytes, fromguid=fromguid)


def _changes(disk: OpenedDisk, older: OpenedDisk) -> Iterator[bytes]:
    if disk.volblocksize_bytes != older.volblocksize_bytes:
        raise InvalidArgumentError(
            f"no increment between block sizes: {older.volblocksize_bytes} and {disk.volblocksize_bytes} bytes"
        )
    if disk.guid == older.guid:
        raise InvalidArgumentError("both images have the same content: there is nothing between them")
    header = _header(disk, fromguid=older.guid)
    return make_stream(disk.fd, disk.size_bytes, header, older=OlderImage(older.fd, older.size_bytes))


def _stepped(pieces: Iterator[bytes], work: Work) -> Iterator[bytes]:
    for piece in pieces:
        work.step(len(piece))
        yield piece
