"""Reading and spoiling a guest's disk through its ``source`` path, as a guest would."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_CHUNK_BYTES = 1 << 20
DAMAGE_BYTES = 1 << 20  # boot record, marker and the start of the first file system on most disks


def sha256_of(disk: Path) -> str:
    """Digest everything on a disk."""
    with disk.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_bytes_of(disk: Path) -> int:
    """Return the size of a disk file or device."""
    with disk.open("rb") as file:
        return file.seek(0, os.SEEK_END)


def spoil(disk: Path) -> None:
    """Overwrite the start of a disk, durably."""
    with disk.open("r+b") as file:
        file.write(b"\xa5" * min(DAMAGE_BYTES, size_bytes_of(disk)))
        file.flush()
        os.fsync(file.fileno())
