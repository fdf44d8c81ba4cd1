"""Where everything is in the store's directory.

blob/sha512/<hh>/<key>            an unpacked archive, mode 0600
imageManifest/sha512/<hh>/<key>   its manifest, canonical
oci/blobs/sha256/<hh>/<hex>       a layer, configuration or manifest of OCI images
db/index.sqlite                   the index
db-backups/<n>/                   what the index was before a migration or a rebuild, 0 the youngest
imagelocks/<key>                  a lock
quarantine/                       damaged files, for whoever wants to know what happened
tmp/                              files being written
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from imaging.digests import Digest
from imaging.files import TEMPORARY_PREFIX, fsync_directory, make_directory, os_errors

DIRECTORY_MODE = 0o770


class Layout:
    """The paths below one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = root / "blob" / "sha512"
        self.manifests = root / "imageManifest" / "sha512"
        self.oci_blobs = root / "oci" / "blobs" / "sha256"
        self.index = root / "db"
        self.backups = root / "db-backups"
        self.locks = root / "imagelocks"
        self.quarantine = root / "quarantine"
        self.temporary = root / "tmp"

    def ensure(self) -> None:
        """Make every directory, so that publishing never waits for one."""
        make_directory(self.root)
        for path in (self.index, self.locks, self.quarantine, self.temporary):
            make_directory(path)
        for path in (self.blobs, self.manifests, self.oci_blobs):
            _make_folders(make_directory(path))

    def blob(self, key: str) -> Path:
        """The archive of a whole key."""
        return self.blobs / key[7:9] / key

    def manifest(self, key: str) -> Path:
        """The manifest of a whole key."""
        return self.manifests / key[7:9] / key

    def oci_blob(self, digest: Digest) -> Path:
        """A part of OCI images."""
        return self.oci_blobs / digest.hex[:2] / digest.hex


def _make_folders(parent: Path) -> None:
    folders = [parent / f"{number:02x}" for number in range(256)]
    with os_errors(f"cannot make the directories of {parent}"):
        if all(path.is_dir() for path in folders):
            return
        for path in folders:
            path.mkdir(exist_ok=True)
    fsync_directory(parent)


def list_files(parent: Path) -> Iterator[str]:
    """Names of the published files below a directory's folders, in order."""
    with os_errors(f"cannot list {parent}"):
        for folder in sorted(parent.iterdir()):
            names = sorted(path.name for path in folder.iterdir())
            yield from (name for name in names if not name.startswith(TEMPORARY_PREFIX))
