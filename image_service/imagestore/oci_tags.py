"""Tags as small files, so that a lost index can be made anew with the names people gave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from imaging.digests import Digest
from imaging.errors import BadDataError
from imaging.files import TEMPORARY_PREFIX, atomic_write_bytes, fsync_directory, make_directory, os_errors
from imaging.oci import Descriptor, ImageReference


class _TagFile(msgspec.Struct, frozen=True):
    name: str
    tag: str
    image: Descriptor


class TagFiles:
    """One file per tag, named by the digest of ``name:tag``."""

    def __init__(self, directory: Path) -> None:
        self.directory = make_directory(directory)

    def _path(self, reference: ImageReference) -> Path:
        return self.directory / Digest.of(str(reference).encode()).hex

    def save(self, reference: ImageReference, image: Descriptor) -> None:
        """Write a tag, or let it mean another image."""
        atomic_write_bytes(self._path(reference), msgspec.json.encode(_TagFile(reference.name, reference.tag, image)))

    def delete(self, reference: ImageReference) -> None:
        """Remove a tag; absent is fine."""
        with os_errors(f"cannot remove the tag {reference}"):
            self._path(reference).unlink(missing_ok=True)
        fsync_directory(self.directory)

    def list(self) -> Iterator[tuple[ImageReference, Descriptor]]:
        """All tags that can be read."""
        with os_errors(f"cannot list {self.directory}"):
            paths = sorted(path for path in self.directory.iterdir() if not path.name.startswith(TEMPORARY_PREFIX))
        for path in paths:
            yield self._load(path)

    def _load(self, path: Path) -> tuple[ImageReference, Descriptor]:
        try:
            with os_errors(f"cannot read the tag {path.name}"):
                stored = msgspec.json.decode(path.read_bytes(), type=_TagFile)
        except msgspec.DecodeError as err:
            raise BadDataError(f"the tag's file is damaged: {path.name}") from err
        return ImageReference(stored.name, stored.tag), stored.image
