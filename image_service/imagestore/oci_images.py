"""OciImages: images of the OCI layout, beside the app containers of the same store.

Layers, configurations and manifests are kept once each, under their sha256, as they came. A tag is a small file and a row; the rows can be
made anew from files. The order of an import is parts, tag's file, rows; that of a removal the other way round. Parts are shared between
images, so importing and removing hold one lock (``oci``) alone; reading an archive in and unpacking it happen before.
"""

from __future__ import annotations

import io
import os
import sqlite3
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, BinaryIO

from image_service.imagestore.keys import KEY_MIN_CHARS
from image_service.imagestore.oci_reading import LayoutArchive, PartFile, read_layout
from image_service.imagestore.oci_tags import TagFiles
from image_service.imagestore.parts import StoreParts
from imaging.digests import Digest
from imaging.errors import InvalidArgumentError, NotFoundError
from imaging.files import durable_file, os_errors, write_all
from imaging.oci import (
    INDEX_FILE,
    LAYOUT_FILE,
    REF_NAME,
    Descriptor,
    ImageReference,
    blob_path,
    index_json,
    layout_json,
)

LOCK = "oci"

DIGEST_PREFIX = "sha256:"


@dataclass(frozen=True, slots=True)
class OciImage:
    """One image, as a layout's index lists it."""

    digest: str
    media_type: str
    size_bytes: int
    """Of all its parts."""
    import_time_ns: int
    last_used_ns: int
    tags: tuple[str, ...] = ()


def _image(row: tuple[Any, ...], tags: Sequence[str]) -> OciImage:
    digest, media_type, size, imported, used = row
    return OciImage(digest, media_type, size, imported, used, tuple(tags))


class OciImages:
    """The OCI images of an open store."""

    def __init__(self, store: StoreParts) -> None:
        self._store = store
        self._index = store.index
        self.tag_files = TagFiles(store.layout.root / "oci" / "tags")

    # -- importing -----------------------------------------------------------------------------------------------------

    def import_layout(self, fd: int, name: str) -> list[tuple[ImageReference, OciImage]]:
        """Import every image of an unpacked layout archive; BadDataError, UnsupportedError. ``name`` is for tags without one.

        All or nothing: every part is verified before any row is written, and what a refused layout brought is removed.
        """
        with self._store.locks.hold(LOCK, exclusive=True):
            layout = read_layout(fd, name)
            new: list[Digest] = []
            try:
                for part in layout.parts.values():
                    self._keep(part, new)
                self._record(layout)
            except BaseException:
                self._undo(new)
                raise
        return [(reference, self.get(descriptor.digest)) for reference, descriptor in layout.images]

    def _keep(self, part: PartFile, new: list[Digest]) -> None:
        """Verify a part, and store it if it is not there."""
        digest = part.descriptor.parsed_digest
        target = self._store.layout.oci_blob(digest)
        if target.exists():
            part.verify()
            return
        with durable_file(target) as fd:
            offset = 0
            for piece in part.verified_pieces():
                with os_errors(f"cannot write {digest}"):
                    write_all(fd, piece, offset)
                offset += len(piece)
        new.append(digest)

    def _record(self, layout: LayoutArchive) -> None:
        now_ns = self._store.now_ns()
        for reference, descriptor in layout.images:
            self.tag_files.save(reference, descriptor)
        with self._index.change() as cursor:
            for reference, descriptor in layout.images:
                save_image(cursor, descriptor, layout.parts_of[descriptor.digest], now_ns)
                save_tag(cursor, reference, descriptor.digest)

    def _undo(self, digests: Sequence[Digest]) -> None:
        """After a failed import, alone: what it brought goes."""
        for digest in digests:
            if not self._index.query("SELECT 1 FROM ocipart WHERE digest = ? LIMIT 1", (str(digest),)):
                self._store.layout.oci_blob(digest).unlink(missing_ok=True)

    # -- reading -------------------------------------------------------------------------------------------------------

    def list(self) -> list[OciImage]:
        """All images, by digest."""
        tags: dict[str, list[str]] = {}
        for name, tag, digest in self._index.query("SELECT name, tag, digest FROM ocitag ORDER BY name, tag"):
            tags.setdefault(digest, []).append(f"{name}:{tag}")
        rows = self._index.query("SELECT digest, mediatype, size, importtime, lastused FROM ociimage ORDER BY digest")
        return [_image(row, tags.get(row[0], ())) for row in rows]

    def get(self, digest: str) -> OciImage:
        """The image of a whole digest; NotFoundError."""
        rows = self._index.query(
            "SELECT digest, mediatype, size, importtime, lastused FROM ociimage WHERE digest = ?", (digest,)
        )
        if not rows:
            raise NotFoundError(f"no image {digest[:160]}")
        tags = self._index.query("SELECT name, tag FROM ocitag WHERE digest = ? ORDER BY name, tag", (digest,))
        return _image(rows[0], [f"{name}:{tag}" for name, tag in tags])

    def resolve(self, reference: str) -> OciImage:
        """The image of ``name[:tag]`` or of a digest's beginning; NotFoundError, InvalidArgumentError (ambiguous)."""
        if reference.startswith(DIGEST_PREFIX):
            return self._resolve_digest(reference)
        wanted = ImageReference.parse(reference)
        rows = self._index.query("SELECT digest FROM ocitag WHERE name = ? AND tag = ?", (wanted.name, wanted.tag))
        if not rows:
            raise NotFoundError(f"no image {wanted}")
        return self.get(str(rows[0][0]))

    def _resolve_digest(self, prefix: str) -> OciImage:
        if len(prefix) < KEY_MIN_CHARS:
            raise InvalidArgumentError("image ID too short")
        rows = self._index.query(
            "SELECT digest FROM ociimage WHERE digest >= ? AND digest < ? LIMIT 2", (prefix, prefix + "\U0010ffff")
        )
        if not rows:
            raise NotFoundError("no image IDs found")
        if len(rows) > 1:
            raise InvalidArgumentError(f'ambiguous image ID: "{prefix[:128]}"')
        return self.get(str(rows[0][0]))

    def manifest_json(self, image: OciImage) -> bytes:
        """The image's manifest (or index) as it came."""
        with os_errors(f"cannot read {image.digest}"):
            return self._store.layout.oci_blob(Digest.parse(image.digest)).read_bytes()

    def export(self, image: OciImage, target: BinaryIO) -> None:
        """Write a layout archive with this image, as other tools read it. What is removed meanwhile is written all the same."""
        tag = image.tags[0].rpartition(":")[2] if image.tags else ""
        annotations = {REF_NAME: tag} if tag else {}
        size = len(self.manifest_json(image))
        descriptor = Descriptor(image.media_type, image.digest, size, annotations)
        with ExitStack() as stack:
            with self._store.locks.hold(LOCK, exclusive=False):
                parts = [(digest, stack.enter_context(self._open(digest))) for digest in self._parts(image.digest)]
                self._touch(image.digest)
            with os_errors("cannot write the image"), tarfile.open(fileobj=target, mode="w|") as archive:
                _add(archive, LAYOUT_FILE, layout_json())
                _add(archive, INDEX_FILE, index_json((descriptor,)))
                for digest, file in parts:
                    archive.addfile(_entry(blob_path(digest), os.fstat(file.fileno()).st_size), file)

    def _parts(self, image_digest: str) -> Iterator[Digest]:
        rows = self._index.query("SELECT digest FROM ocipart WHERE image = ? ORDER BY digest", (image_digest,))
        return (Digest.parse(row[0]) for row in rows)

    def _open(self, digest: Digest) -> BinaryIO:
        with os_errors(f"cannot open {digest}"):
            return self._store.layout.oci_blob(digest).open("rb")

    def _touch(self, digest: str) -> None:
        with self._index.change() as cursor:
            cursor.execute("UPDATE ociimage SET lastused = ? WHERE digest = ?", (self._store.now_ns(), digest))

    # -- removing ------------------------------------------------------------------------------------------------------

    def delete(self, reference: str) -> None:
        """Remove a tag, and the image with its last tag; a digest removes the image with all its tags."""
        with self._store.locks.hold(LOCK, exclusive=True):
            image = self.resolve(reference)
            gone = image.tags if reference.startswith(DIGEST_PREFIX) else (str(ImageReference.parse(reference)),)
            self.delete_locked(image, gone)

    def delete_locked(self, image: OciImage, tags: Sequence[str]) -> None:
        """The same for who holds the lock: rows first, then files."""
        last = set(image.tags) <= set(tags)
        parts = list(self._parts(image.digest)) if last else []
        references = [ImageReference.parse(tag) for tag in tags]

        def work(cursor: sqlite3.Cursor) -> None:
            for reference in references:
                cursor.execute("DELETE FROM ocitag WHERE name = ? AND tag = ?", (reference.name, reference.tag))
            if last:
                delete_image(cursor, image.digest)

        self._index.change_even_if_full(work)
        for reference in references:
            self.tag_files.delete(reference)
        self._undo(parts)


# -- rows ------------------------------------------------------------------------------------------------------------------


def save_image(cursor: sqlite3.Cursor, descriptor: Descriptor, parts: Mapping[str, Descriptor], now_ns: int) -> None:
    """An image and what it is made of."""
    delete_image(cursor, descriptor.digest)
    size_bytes = sum(part.size for part in parts.values())
    values = (descriptor.digest, descriptor.media_type, size_bytes, now_ns, now_ns)
    cursor.execute("INSERT INTO ociimage VALUES (?, ?, ?, ?, ?)", values)
    rows = [(descriptor.digest, part.digest, part.media_type, part.size) for part in parts.values()]
    cursor.executemany("INSERT INTO ocipart VALUES (?, ?, ?, ?)", rows)


def save_tag(cursor: sqlite3.Cursor, reference: ImageReference, digest: str) -> None:
    """A tag; it may have meant another image before."""
    cursor.execute("INSERT OR REPLACE INTO ocitag VALUES (?, ?, ?)", (reference.name, reference.tag, digest))


def delete_image(cursor: sqlite3.Cursor, digest: str) -> None:
    """An image's rows."""
    cursor.execute("DELETE FROM ociimage WHERE digest = ?", (digest,))
    cursor.execute("DELETE FROM ocipart WHERE image = ?", (digest,))


def _entry(name: str, size_bytes: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size_bytes, 0o644
    return info


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    archive.addfile(_entry(name, len(data)), io.BytesIO(data))
