"""An image layout as a tar archive: which images it has, and where their parts are in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from imaging.digests import MultiHasher
from imaging.errors import BadDataError
from imaging.files import os_errors
from imaging.oci import (
    DOCUMENT_MAX_BYTES,
    INDEX_FILE,
    LAYOUT_FILE,
    NESTING_MAX,
    Descriptor,
    ImageReference,
    blob_path,
    check_content,
    check_layout,
    name_of,
    parse_image,
    parse_index,
)
from imaging.tarball import CUT_OFF, TarEntry, read_entry, walk_tar

PIECE_BYTES = 1 << 20

PARTS_MAX = 100_000
"""Files of one layout that are looked at; registries' largest repositories have some thousands."""


@dataclass(frozen=True, slots=True)
class PartFile:
    """One part and the range of the archive that is said to be it."""

    descriptor: Descriptor
    fd: int
    offset_bytes: int

    def verified_pieces(self) -> Iterator[bytes]:
        """The content; BadDataError at its end if it is not what the descriptor says."""
        hasher, size = MultiHasher(), self.descriptor.size
        while hasher.size_bytes < size:
            with os_errors("cannot read an archive"):
                count = min(PIECE_BYTES, size - hasher.size_bytes)
                piece = os.pread(self.fd, count, self.offset_bytes + hasher.size_bytes)
            if not piece:
                raise BadDataError(CUT_OFF)
            hasher.update(piece)
            yield piece
        if not hasher.digest().matches(self.descriptor.parsed_digest):
            raise BadDataError(f"{self.descriptor.digest} has another digest")

    def verify(self) -> None:
        """Only look."""
        for _ in self.verified_pieces():
            continue


@dataclass(slots=True)
class LayoutArchive:
    """What a layout holds."""

    images: list[tuple[ImageReference, Descriptor]] = field(default_factory=list)
    parts: dict[str, PartFile] = field(default_factory=dict)
    """By digest: each once, however many images have it."""
    parts_of: dict[str, dict[str, Descriptor]] = field(default_factory=dict)
    """By an image's digest: everything it is made of, itself too."""


def is_layout(fd: int) -> bool:
    """Whether an unpacked archive is an image layout, by the file that says so."""
    return any(entry.clean_name == LAYOUT_FILE and entry.is_file for entry in walk_tar(fd))


def read_layout(fd: int, name: str) -> LayoutArchive:
    """The images of an archive, their documents verified and the sizes of all parts; the digests of layers are not yet."""
    entries = _find_entries(fd)
    for required in (LAYOUT_FILE, INDEX_FILE):
        if required not in entries:
            raise BadDataError(f"missing {required}")
    check_layout(read_entry(fd, entries[LAYOUT_FILE], DOCUMENT_MAX_BYTES))
    archive = LayoutArchive()
    for descriptor in parse_index(read_entry(fd, entries[INDEX_FILE], DOCUMENT_MAX_BYTES)):
        parts = collect_parts(descriptor, lambda part: _find_part(fd, entries, part, archive))
        archive.images.append((name_of(descriptor.annotations, name), descriptor))
        archive.parts_of[descriptor.digest] = parts
    if not archive.images:
        raise BadDataError("the layout has no image")
    return archive


def _find_entries(fd: int) -> dict[str, TarEntry]:
    entries: dict[str, TarEntry] = {}
    for entry in walk_tar(fd):
        name = entry.clean_name
        if entry.is_file and (name in {LAYOUT_FILE, INDEX_FILE} or name.startswith("blobs/")):
            entries.setdefault(name, entry)
        if len(entries) > PARTS_MAX:
            raise BadDataError(f"the layout has more than {PARTS_MAX} files")
    return entries


def _find_part(fd: int, entries: Mapping[str, TarEntry], descriptor: Descriptor, archive: LayoutArchive) -> bytes:
    """Note where a part is; its content if it is a document."""
    entry = entries.get(blob_path(descriptor.parsed_digest))
    if entry is None:
        raise BadDataError(f"{descriptor.digest} is missing")
    if entry.size_bytes != descriptor.size:
        raise BadDataError(f"{descriptor.digest} has {entry.size_bytes} bytes instead of {descriptor.size}")
    archive.parts.setdefault(descriptor.digest, PartFile(descriptor, fd, entry.offset_bytes))
    if descriptor.is_index or descriptor.is_manifest:
        return check_content(descriptor, read_entry(fd, entry, DOCUMENT_MAX_BYTES))
    return b""


def collect_parts(root: Descriptor, read: Callable[[Descriptor], bytes]) -> dict[str, Descriptor]:
    """Everything an image is made of, by digest; ``read`` gives a document's verified content and refuses what is missing."""
    found: dict[str, Descriptor] = {}
    waiting = [(root, 0)]
    while waiting:
        descriptor, depth = waiting.pop()
        if descriptor.digest in found:
            continue
        if depth > NESTING_MAX:
            raise BadDataError(f"indexes are nested more than {NESTING_MAX} deep")
        found[descriptor.digest] = descriptor
        if len(found) > PARTS_MAX:
            raise BadDataError(f"an image has more than {PARTS_MAX} parts")
        data = read(descriptor)
        if descriptor.is_index:
            waiting += [(below, depth + 1) for below in parse_index(data)]
        elif descriptor.is_manifest:
            image = parse_image(data)
            waiting += [(below, 0) for below in (image.config, *image.layers)]
    return found
